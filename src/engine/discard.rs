//! Discarding and zeroing.

use super::volume::{Held, VolumeHandle};
use super::{Memory, Storage};
use crate::error::Result;
use crate::format::{EntryKind, Record};
use crate::units::{BLOCK_BYTES, VirtualBlock};

/// Bytes of zeros written at a time.
const ZERO_BYTES: u64 = 1 << 20;

impl<S: Storage> VolumeHandle<S> {
    /// Unmaps `length` bytes at `offset`: they read as zeros afterwards. Blocks covered only in part are zeroed there.
    pub async fn discard(&self, offset: u64, length: u64) -> Result<Held<S>> {
        self.check_write(offset, length)?;
        let end = offset + length;
        let first = offset.next_multiple_of(BLOCK_BYTES);
        let last = end - end % BLOCK_BYTES;
        if first >= last {
            return match self.zero_edges(&[(offset, end)]).await? {
                Some(held) => Ok(held),
                None => self.hold_nothing(offset, end).await,
            };
        }
        let edges = self.zero_edges(&[(offset, first), (last, end)]).await?;
        let held = self.unmap(first / BLOCK_BYTES, last / BLOCK_BYTES).await?;
        Ok(match edges {
            Some(edges) => held.join(edges),
            None => held,
        })
    }

    /// Makes `length` bytes at `offset` read as zeros. Without `unmap` they stay provisioned: zeros are written.
    pub async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<Held<S>> {
        if unmap {
            return self.discard(offset, length).await;
        }
        self.check_write(offset, length)?;
        let zeros = self.pool.inner.storage.allocate(ZERO_BYTES.min(length) as usize);
        let end = offset + length;
        let mut held: Option<Held<S>> = None;
        let mut at = offset;
        while at < end {
            // Parts begin on whole blocks, so that none is read to be merged.
            let stop = ((at / BLOCK_BYTES * BLOCK_BYTES) + ZERO_BYTES).min(end);
            let part = self.write_through(at, &zeros.slice(0..(stop - at) as usize), false).await?;
            held = Some(match held {
                Some(held) => held.join(part),
                None => part,
            });
            at = stop;
        }
        match held {
            Some(held) => Ok(held),
            None => self.hold_nothing(offset, end).await,
        }
    }

    async fn hold_nothing(&self, offset: u64, end: u64) -> Result<Held<S>> {
        self.pool.hold_range(self.id, offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES)).await
    }

    async fn zero_edges(&self, edges: &[(u64, u64)]) -> Result<Option<Held<S>>> {
        let mut held: Option<Held<S>> = None;
        for (start, end) in edges.iter().copied().filter(|(start, end)| start < end) {
            let zeros = self.pool.inner.storage.allocate((end - start) as usize);
            let part = self.write_through(start, &zeros, true).await?;
            held = Some(match held {
                Some(held) => held.join(part),
                None => part,
            });
        }
        Ok(held)
    }

    /// Unmaps the blocks `start..end` in one change.
    async fn unmap(&self, start: u64, end: u64) -> Result<Held<S>> {
        let pool = &self.pool;
        let promise = pool.promise(1, 64).await?;
        let held = pool.hold_range(self.id, start, end).await?;
        let stay = pool.enter();
        let id = self.id;
        pool.attempt(|state| {
            if state.root(super::state::TreeKey::Volume(id)).entry.kind == EntryKind::Hole {
                return Ok(());
            }
            state.check_unmap(id, start, end)?;
            let record = Record::Unmap { volume: id, virtual_block: VirtualBlock(start), count: end - start };
            let lsn = state.publish(Some(id), &record);
            state.unmap(id, start, end, lsn);
            Ok(())
        })
        .await?;
        drop((stay, promise));
        Ok(held)
    }
}

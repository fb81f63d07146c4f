//! Discarding and zeroing.

use super::growth::Use;
use super::patience::Waited;
use super::volume::{Held, VolumeHandle};
use super::write::{Lacking, MAP_RECORD_BYTES};
use super::{Memory, Storage};
use crate::error::Result;
use crate::format::{EntryKind, Record};
use crate::units::{BLOCK_BYTES, VirtualBlock};

/// Bytes of zeros written at a time.
const ZERO_BYTES: u64 = 1 << 20;

/// A change of one range in several steps, all under one hold: two that overlap would wait for each other's parts.
#[derive(Clone, Copy)]
struct Clearing {
    /// Bytes to be zeroed, and whether only where they are mapped.
    zeroed: [(u64, u64); 2],
    mapped_only: bool,
    /// Blocks to be unmapped.
    unmapped: (u64, u64),
}

impl<S: Storage> VolumeHandle<S> {
    /// Unmaps `length` bytes at `offset`: they read as zeros afterwards. Blocks covered only in part are zeroed there.
    pub async fn discard(&self, offset: u64, length: u64) -> Result<Held<S>> {
        self.check_write(offset, length)?;
        let end = offset + length;
        let first = offset.next_multiple_of(BLOCK_BYTES);
        let last = end - end % BLOCK_BYTES;
        let clearing = if first < last {
            let unmapped = (first / BLOCK_BYTES, last / BLOCK_BYTES);
            Clearing { zeroed: [(offset, first), (last, end)], mapped_only: true, unmapped }
        } else {
            Clearing { zeroed: [(offset, end), (end, end)], mapped_only: true, unmapped: (0, 0) }
        };
        self.clear(offset, end, clearing).await
    }

    /// Makes `length` bytes at `offset` read as zeros. Without `unmap` they stay provisioned: zeros are written.
    pub async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<Held<S>> {
        if unmap {
            return self.discard(offset, length).await;
        }
        self.check_write(offset, length)?;
        let end = offset + length;
        let clearing = Clearing { zeroed: [(offset, end), (end, end)], mapped_only: false, unmapped: (0, 0) };
        self.clear(offset, end, clearing).await.inspect_err(|_| self.note_failed_write())
    }

    /// Where a step lacks room, everything is let go and begun again when there is some (rule O8): what has been zeroed
    /// is the volume's own by then and needs none.
    async fn clear(&self, offset: u64, end: u64, clearing: Clearing) -> Result<Held<S>> {
        // Zeros that are to be there wait as other writes do; a discard does not.
        let mut waited = Waited::new(!clearing.mapped_only);
        loop {
            let held = self.pool.hold_range(self.id, offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES)).await?;
            let Some((lacking, blocks)) = self.clear_held(clearing).await? else { return Ok(held.answered()) };
            drop(held);
            drop(self.wait_for(lacking, blocks, &mut waited).await?);
        }
    }

    /// Answers what it lacks, and for how many blocks.
    async fn clear_held(&self, clearing: Clearing) -> Result<Option<(Lacking, u64)>> {
        let pool = &self.pool;
        for (start, end) in clearing.zeroed {
            let zeros = pool.inner.storage.allocate(ZERO_BYTES.min(end - start) as usize);
            let mut at = start;
            while at < end {
                // Parts begin on whole blocks, so that none is read to be merged.
                let stop = ((at / BLOCK_BYTES * BLOCK_BYTES) + ZERO_BYTES).min(end);
                let blocks = stop.div_ceil(BLOCK_BYTES) - at / BLOCK_BYTES;
                let promise = pool.try_promise(self.id, blocks, blocks as usize * MAP_RECORD_BYTES)?;
                let part = zeros.slice(0..(stop - at) as usize);
                if let Some(lacking) = self.write_held(at, &part, clearing.mapped_only, promise.is_some()).await? {
                    return Ok(Some((lacking, blocks)));
                }
                at = stop;
            }
        }
        let (start, end) = clearing.unmapped;
        if start < end { self.unmap_promised(start, end).await } else { Ok(None) }
    }

    /// Unmaps the blocks `start..end`, which are held, where room for that is promised; else answers what it lacks, and for
    /// how many blocks.
    pub(super) async fn unmap_promised(&self, start: u64, end: u64) -> Result<Option<(Lacking, u64)>> {
        const BLOCKS: u64 = 2;
        let pool = &self.pool;
        let copies = {
            let _stay = pool.enter();
            pool.attempt(|state| state.unmap_copies(self.id, start, end)).await?
        };
        let wanted = if copies { Use::Metadata } else { Use::Release };
        let Some(promise) = pool.try_promise_for(wanted, Some(self.id), BLOCKS, BLOCKS as usize * MAP_RECORD_BYTES)?
        else {
            return Ok(Some((Lacking::Promise(wanted), BLOCKS)));
        };
        self.unmap_held(start, end).await?;
        drop(promise);
        Ok(None)
    }

    /// Unmaps the blocks `start..end`, which are held, in one change.
    async fn unmap_held(&self, start: u64, end: u64) -> Result<()> {
        let pool = &self.pool;
        let id = self.id;
        let _stay = pool.enter();
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
        .await
    }
}

//! Blocks that are written as zeros and unmapped instead, where their volume asks for it.
//!
//! Invariants: a whole, aligned block of zeros is what a discard of it is, in the same steps and as durable; every other byte
//! is written as by any write. All parts of one write are done under one hold of its range (O8), in their order; who lacks
//! room lets go and begins again, which changes nothing of what was done: the data is the volume's own by then, and holes stay
//! holes.

use super::patience::Waited;
use super::pool::Pool;
use super::volume::{Held, VolumeHandle};
use super::write::{Lacking, MAP_RECORD_BYTES};
use super::{Memory, Storage};
use crate::error::Result;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};

/// A part of a write, in bytes of its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    from: usize,
    to: usize,
    is_zero: bool,
}

impl<S: Storage> Pool<S> {
    /// Unmaps blocks of a volume that are written as zeros, instead of storing them, or no longer.
    pub async fn detect_zeroes(&self, id: VolumeId, on: bool) -> Result<()> {
        self.change(id, |_, record| {
            record.flags.detect_zeroes = on;
            Ok(())
        })
        .await
    }
}

impl<S: Storage> VolumeHandle<S> {
    /// Whether whole blocks of zeros are to be looked for.
    pub(super) fn detects_zeroes(&self) -> bool {
        let state = self.pool.inner.state.borrow();
        state.volumes.get(&self.id).is_some_and(|volume| volume.record.flags.detect_zeroes)
    }

    /// Writes what is not zero and unmaps the rest. None when there is nothing to unmap: then nothing has been done.
    pub(super) async fn write_sparsely(&self, offset: u64, from: &S::Memory) -> Result<Option<Held<S>>> {
        let parts = parts(offset, from);
        if parts.iter().all(|part| !part.is_zero) {
            return Ok(None);
        }
        let end = offset + from.len() as u64;
        let mut waited = Waited::new(true);
        loop {
            let held = self.pool.hold_range(self.id, offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES)).await?;
            let Some((lacking, blocks)) = self.write_parts(offset, from, &parts).await? else {
                return Ok(Some(held));
            };
            drop(held);
            drop(self.wait_for(lacking, blocks, &mut waited).await?);
        }
    }

    /// Answers what it lacks, and for how many blocks.
    async fn write_parts(&self, offset: u64, from: &S::Memory, parts: &[Part]) -> Result<Option<(Lacking, u64)>> {
        for part in parts {
            let (start, end) = (offset + part.from as u64, offset + part.to as u64);
            if part.is_zero {
                if let Some(lacking) = self.unmap_promised(start / BLOCK_BYTES, end / BLOCK_BYTES).await? {
                    return Ok(Some(lacking));
                }
                continue;
            }
            let blocks = end.div_ceil(BLOCK_BYTES) - start / BLOCK_BYTES;
            let promise = self.pool.try_promise(self.id, blocks, blocks as usize * MAP_RECORD_BYTES)?;
            let data = from.slice(part.from..part.to);
            if let Some(lacking) = self.write_held(start, &data, false, promise.is_some()).await? {
                return Ok(Some((lacking, blocks)));
            }
        }
        Ok(None)
    }
}

/// Cuts a write at `offset` into what is whole blocks of zeros, and the rest.
fn parts(offset: u64, memory: &impl Memory) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut from = 0;
    while from < memory.len() {
        let skip = ((offset + from as u64) % BLOCK_BYTES) as usize;
        let to = (from + BLOCK_SIZE - skip).min(memory.len());
        let is_zero = to - from == BLOCK_SIZE && memory.is_zero(from..to);
        match parts.last_mut() {
            Some(last) if last.is_zero == is_zero => last.to = to,
            _ => parts.push(Part { from, to, is_zero }),
        }
        from = to;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::{assert_clean, bytes, memory, new_clone, new_snapshot, new_volume, with_pool};

    const BLOCK: usize = BLOCK_SIZE;

    #[test]
    fn only_whole_aligned_blocks_of_zeros_are_parts_of_their_own() {
        let mut content = vec![0; 4 * BLOCK];
        content[2 * BLOCK + 4095] = 1;
        let part = |from: usize, to: usize, is_zero| Part { from, to, is_zero };
        assert_eq!(
            parts(0, &memory(&content)),
            [part(0, 2 * BLOCK, true), part(2 * BLOCK, 3 * BLOCK, false), part(3 * BLOCK, 4 * BLOCK, true)]
        );
        // 512 bytes further the one byte is in the next block, and the ends are no whole blocks.
        assert_eq!(
            parts(512, &memory(&content)),
            [
                part(0, BLOCK - 512, false),
                part(BLOCK - 512, 3 * BLOCK - 512, true),
                part(3 * BLOCK - 512, 4 * BLOCK, false)
            ]
        );
        assert_eq!(parts(512, &memory(&[0; 512])), [part(0, 512, false)]);
    }

    #[test]
    fn zeros_take_no_space_where_they_are_detected_and_are_provisioned_elsewhere() {
        with_pool(|pool| async move {
            for (name, on) in [("sparse", true), ("plain", false)] {
                let id = pool.create_volume(new_volume(name, 1 << 30)).await.unwrap().id;
                pool.detect_zeroes(id, on).await.unwrap();
                assert_eq!(pool.volume(name).unwrap().detect_zeroes, on);
                let handle = pool.open_volume(id, false).unwrap();
                let write = async |at: usize, content: &[u8]| {
                    drop(handle.write(at as u64, &memory(content), true).await.unwrap());
                };
                write(0, &vec![7; 64 * BLOCK]).await;
                let mut mixed = vec![0; 32 * BLOCK];
                mixed[5 * BLOCK..6 * BLOCK].fill(9);
                write(16 * BLOCK, &mixed).await;
                // Of part of a block there is no telling.
                write(200 * BLOCK + 512, &[0; 1024]).await;
                write(300 * BLOCK, &vec![0; 10 * BLOCK]).await;
                let blocks = if on { 64 - 31 + 1 } else { 64 + 1 + 10 };
                assert_eq!(pool.volume(name).unwrap().own_bytes, blocks * BLOCK_BYTES);
                let mut expected = vec![7; 64 * BLOCK];
                expected[16 * BLOCK..48 * BLOCK].copy_from_slice(&mixed);
                assert!(bytes(&pool, id, 0, 64 * BLOCK).await == expected);
                assert_eq!(handle.seek(310 * BLOCK_BYTES, true).await.unwrap(), None);
            }
            assert_clean(&pool).await;
        });
    }

    #[test]
    fn zeros_over_a_shared_block_leave_the_snapshot_as_it_is() {
        with_pool(|pool| async move {
            let id = pool.create_volume(new_volume("v", 1 << 30)).await.unwrap().id;
            pool.detect_zeroes(id, true).await.unwrap();
            let handle = pool.open_volume(id, false).unwrap();
            drop(handle.write(0, &memory(&vec![3; 8 * BLOCK]), false).await.unwrap());
            let snapshot = pool.create_snapshot(id, new_snapshot("s")).await.unwrap().id;
            drop(handle.write(BLOCK_BYTES, &memory(&vec![0; 2 * BLOCK]), false).await.unwrap());
            assert_eq!(pool.volume("v").unwrap().mapped_bytes, 6 * BLOCK_BYTES);
            assert!(bytes(&pool, snapshot, 0, 8 * BLOCK).await.iter().all(|byte| *byte == 3));
            assert!(bytes(&pool, id, BLOCK_BYTES, 2 * BLOCK).await.iter().all(|byte| *byte == 0));
            let clone = pool.create_clone(snapshot, new_clone("c")).await.unwrap();
            assert!(clone.detect_zeroes, "a clone does as its origin");
            assert_clean(&pool).await;
        });
    }
}

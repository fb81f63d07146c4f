//! Reads that hold what they read against the recorded checksums: damage is an error, never data.
//!
//! The checksum of a block is looked up in the step that looks up where it stands. The block stays as it is while the
//! read's epoch lasts (O7), and one that has a checksum is not overwritten in place, so the two belong together.

use super::pool::Pool;
use super::volume::{Extent, VolumeHandle};
use super::{Memory, Storage};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};

/// A part of a read: where its bytes go, and the checksums of the whole blocks that it lies in.
struct Part {
    extent: Extent,
    into: usize,
    checksums: Vec<Option<u32>>,
}

impl<S: Storage> Pool<S> {
    /// Verifies every read of sealed blocks through this volume, or no longer.
    pub async fn verify_volume_on_read(&self, id: VolumeId, on: bool) -> Result<()> {
        self.change(id, |_, record| {
            record.flags.verify_on_read = on;
            Ok(())
        })
        .await
    }

    /// Verifies every read of sealed blocks through any volume, or no longer but where a volume asks for it.
    pub async fn verify_pool_on_read(&self, on: bool) -> Result<()> {
        self.inner.state.borrow_mut().verify_on_read = on;
        self.checkpoint().await
    }
}

impl<S: Storage> VolumeHandle<S> {
    /// Whether reads are to be verified.
    pub(super) fn verifies(&self) -> bool {
        let state = self.pool.inner.state.borrow();
        state.verify_on_read || state.volumes.get(&self.id).is_some_and(|volume| volume.record.flags.verify_on_read)
    }

    /// Fills `into` from `offset`, whole blocks being read and those that have a checksum held against it.
    ///
    /// # Errors
    /// `Corrupt` for a block that does not match.
    pub(super) async fn read_verified(&self, offset: u64, into: &S::Memory) -> Result<()> {
        let length = into.len() as u64;
        let _stay = self.pool.enter();
        let parts = self
            .pool
            .attempt(|state| {
                let mut parts = Vec::new();
                let mut position = 0;
                for extent in state.extents(self.id, offset, length)? {
                    let mut checksums = Vec::new();
                    if let Some(first) = extent.at {
                        for block in 0..(extent.skip + extent.length).div_ceil(BLOCK_BYTES) {
                            checksums.push(state.data_checksum(first.plus(block))?);
                        }
                    }
                    parts.push(Part { extent, into: position, checksums });
                    position += extent.length as usize;
                }
                Ok(parts)
            })
            .await?;
        let storage = &self.pool.inner.storage;
        let mut reads = Vec::new();
        for part in &parts {
            match part.extent.at {
                None => into.zero(part.into..part.into + part.extent.length as usize),
                Some(block) => {
                    let whole = storage.allocate(part.checksums.len() * BLOCK_SIZE);
                    reads.push((part, block, storage.read(block.offset_bytes(), &whole), whole));
                }
            }
        }
        // All of them end before the epoch does.
        let mut outcome = Ok(());
        let mut content = vec![0; BLOCK_SIZE];
        for (part, first, read, whole) in reads {
            if let Err(error) = read.await {
                let name = self.pool.volume_name(self.id);
                outcome = outcome.and(Err(Error::io(format!("read of {name} at byte {offset}"), error)));
                continue;
            }
            for (index, expected) in part.checksums.iter().enumerate() {
                let Some(expected) = *expected else { continue };
                whole.read(index * BLOCK_SIZE, &mut content);
                let found = crc32fast::hash(&content);
                if found != expected {
                    let (address, check) = (first.plus(index as u64), Check::Checksum { expected, found });
                    let damage = Corrupt { structure: Structure::Data, address, check };
                    let at = offset + part.into as u64;
                    tracing::error!(volume = %self.pool.volume_name(self.id), at, "a read is refused: {damage}");
                    self.pool.inner.state.borrow_mut().counters.checksum_mismatches += 1;
                    outcome = outcome.and(Err(damage.into()));
                }
            }
            let (skip, length) = (part.extent.skip as usize, part.extent.length as usize);
            into.copy_from(part.into, &whole.slice(skip..skip + length));
        }
        outcome
    }
}

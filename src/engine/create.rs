//! Creating a pool: a superblock in slot A and a journal of zeros. Groups come into use with the first allocation.

use uuid::Uuid;

use super::pool::to_memory;
use super::{Memory, Pool, Storage};
use crate::error::{Error, Result};
use crate::format::{
    Entry, Geometry, HOST_CLAIM, JOURNAL_FIRST, POOL_NAME_BYTES_MAX, Root, SUPERBLOCK_COPIES, ScrubState, Superblock,
    check_name,
};
use crate::units::{BLOCK_BYTES, Clock, Generation, Lsn, VolumeId};

/// Size of a journal unless another is asked for, in bytes.
pub const JOURNAL_BYTES: u64 = 64 << 20;
/// Bytes of zeros written at a time.
const ZERO_BYTES: u64 = 1 << 20;

/// How a pool is to be created.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Its uuid, chosen by the caller.
    pub uuid: Uuid,
    /// Its name, at most 64 bytes.
    pub name: String,
    /// Its size in bytes, a multiple of 4096: the file or device is at least so large.
    pub size_bytes: u64,
    /// Size of the journal in bytes.
    pub journal_bytes: u64,
}

impl<S: Storage> Pool<S> {
    /// Writes a new, empty pool to `storage`, over whatever is there.
    ///
    /// # Errors
    /// `InvalidInput` for a name or a size that cannot be; `Io` and `NoSpace` from the storage.
    pub async fn create(storage: &S, options: &CreateOptions) -> Result<()> {
        check_name(&options.name)?;
        if options.name.len() > POOL_NAME_BYTES_MAX {
            return Err(Error::InvalidInput(format!("a pool's name has at most {POOL_NAME_BYTES_MAX} bytes")));
        }
        let geometry = Geometry::new(options.size_bytes, options.journal_bytes)?;
        if storage.size_bytes() < options.size_bytes {
            return Err(Error::InvalidInput(format!(
                "the file has {} bytes, the pool is to have {}",
                storage.size_bytes(),
                options.size_bytes
            )));
        }
        let start = JOURNAL_FIRST.offset_bytes();
        let end = start + geometry.journal_blocks * BLOCK_BYTES;
        let zeros = storage.allocate(ZERO_BYTES as usize);
        // This host's claim of a device stands between: without it the host would take itself for driven out.
        for range in [0..HOST_CLAIM.offset_bytes(), HOST_CLAIM.plus(1).offset_bytes()..end] {
            let extended = storage.extend(range.clone()).await;
            extended.map_err(|error| Error::io("allocation of the journal", error))?;
            // Zeros, written: a leftover of an earlier pool must not be taken for a batch or a superblock.
            let mut at = range.start;
            while at < range.end {
                let length = ZERO_BYTES.min(range.end - at);
                let written = storage.write(at, &zeros.slice(0..length as usize)).await;
                written.map_err(|error| Error::io(format!("write of the journal at byte {at}"), error))?;
                at += length;
            }
        }
        storage.flush().await.map_err(|error| Error::io("flush of a new pool", error))?;
        let hole = Root { entry: Entry::hole(Clock(0)), level: 0 };
        let superblock = Superblock {
            uuid: options.uuid,
            name: options.name.clone(),
            read_only_compatible: 0,
            compatible: 0,
            incompatible: 0,
            generation: Generation(1),
            clock: Clock(1),
            lsn: Lsn(0),
            geometry,
            groups_in_use: 0,
            journal_append: 0,
            journal_chain: 0,
            session: 0,
            volume_table: hole,
            carcass_table: hole,
            next_volume: VolumeId(1),
            next_carcass: 1,
            transaction_id: 0,
            size_limit_bytes: 0,
            verify_on_read: false,
            scrub: ScrubState::default(),
            volume_count: 0,
            used_blocks: 0,
            metadata_blocks: Some(0),
            group_index: Vec::new(),
        };
        let memory = to_memory(storage, &superblock.encode());
        for copy in SUPERBLOCK_COPIES[0] {
            let written = storage.write_durable(copy.offset_bytes(), &memory).await;
            written.map_err(|error| Error::io("write of the superblock", error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::block_on;

    use super::*;
    use crate::io::{IoMemory, MemoryStorage};
    use crate::units::BLOCK_SIZE;

    #[test]
    fn creation_leaves_the_claim_of_the_host_and_zeroes_all_else_that_is_looked_at() {
        const SIZE: u64 = 256 << 20;
        let storage = MemoryStorage::new(SIZE);
        let leftover = IoMemory::from_bytes(&vec![7; 16 << 20]);
        let options =
            CreateOptions { uuid: Uuid::from_u128(1), name: "pool".into(), size_bytes: SIZE, journal_bytes: 8 << 20 };
        block_on(async {
            storage.write(0, &leftover).await.expect("written");
            Pool::create(&storage, &options).await.expect("created");
        });
        let image = storage.snapshot_image();
        let journal_end = JOURNAL_FIRST.0 + options.journal_bytes / BLOCK_BYTES;
        for block in 0..journal_end {
            let mut bytes = [1; BLOCK_SIZE];
            image.read(block * BLOCK_BYTES, &mut bytes);
            let is_superblock = SUPERBLOCK_COPIES[0].iter().any(|copy| copy.0 == block);
            let expected = if block == HOST_CLAIM.0 { 7 } else { 0 };
            assert!(is_superblock || bytes.iter().all(|byte| *byte == expected), "block {block}");
        }
    }
}

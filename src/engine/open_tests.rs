//! What opening makes of a damaged journal.

use std::collections::BTreeMap;
use std::rc::Rc;

use async_executor::LocalExecutor;
use futures_lite::future::block_on;
use uuid::Uuid;

use super::*;
use crate::error::{Corrupt, Error, Structure};
use crate::format::{BatchHeader, JOURNAL_FIRST, decode_batch_header};
use crate::io::{IoMemory, MemoryImage, MemoryStorage};
use crate::units::{BLOCK_SIZE, PoolBlock};

const POOL: Uuid = Uuid::from_u128(1);
const POOL_BYTES: u64 = 256 << 20;
const JOURNAL_BYTES: u64 = 4 << 20;

/// A pool that lost power after several commits.
fn unclean_pool() -> MemoryImage {
    let storage = MemoryStorage::new(POOL_BYTES);
    let executor = Rc::new(LocalExecutor::new());
    block_on(executor.run(async {
        let options =
            CreateOptions { uuid: POOL, name: "pool".into(), size_bytes: POOL_BYTES, journal_bytes: JOURNAL_BYTES };
        Pool::create(&storage, &options).await.unwrap();
        let storage = MemoryStorage::from_image(storage.snapshot_image());
        let pool = Pool::open(storage, Box::new(PrivateLog::new(1)), OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        for number in 1..=4 {
            let new = NewVolume {
                uuid: Uuid::from_u128(number),
                name: format!("v{number}"),
                size_bytes: 1 << 20,
                sector_size: 512,
                quota_bytes: 0,
                reservation_bytes: 0,
                created: 0,
                attributes: BTreeMap::new(),
            };
            pool.create_volume(new).await.unwrap();
        }
        let image = pool.inner.storage.snapshot_image();
        drop(task);
        image
    }))
}

/// The last batch of the ring and its block.
fn newest_batch(image: &MemoryImage) -> (BatchHeader, PoolBlock) {
    let storage = MemoryStorage::from_image(image.clone());
    let ring = IoMemory::zeroed(JOURNAL_BYTES as usize);
    block_on(storage.read(JOURNAL_FIRST.offset_bytes(), &ring)).unwrap();
    let blocks = ring.to_vec();
    let batches = blocks.chunks(BLOCK_SIZE).enumerate().filter_map(|(index, block)| {
        decode_batch_header(&POOL, block).map(|header| (header, JOURNAL_FIRST.plus(index as u64)))
    });
    batches.max_by_key(|(header, _)| header.first).expect("commits were made")
}

/// The names of all volumes after opening, with `bit` of `block` flipped.
fn volumes_with_bit_flipped(image: &MemoryImage, block: PoolBlock, bit: usize) -> Result<Vec<String>, Error> {
    let storage = MemoryStorage::from_image(image.clone());
    block_on(async {
        let content = IoMemory::zeroed(BLOCK_SIZE);
        storage.read(block.offset_bytes(), &content).await.unwrap();
        let mut bytes = content.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        storage.write(block.offset_bytes(), &IoMemory::from_bytes(&bytes)).await.unwrap();
        let pool = Pool::open(storage, Box::new(PrivateLog::new(2)), OpenOptions::default()).await?;
        Ok(pool.volumes().into_iter().map(|volume| volume.name).collect())
    })
}

/// A flipped bit in the header of the newest batch made it look like the end of the chain, or like an older batch: what
/// it held, though acknowledged, was gone without a word.
#[test]
fn flipped_bit_in_the_newest_header_is_damage_not_the_end() {
    let image = unclean_pool();
    let (header, address) = newest_batch(&image);
    assert!(header.first < header.last.next() && header.blocks == 1);
    // The whole header, and the stamp of its sector.
    for byte in (0..72).chain(504..512) {
        let error = volumes_with_bit_flipped(&image, address, byte * 8 + byte % 8).expect_err("found");
        let Error::Corrupt(Corrupt { structure, address: place, .. }) = error else { panic!("{error}") };
        assert_eq!((structure, place), (Structure::Batch, address), "byte {byte}");
    }
}

#[test]
fn flipped_bit_behind_the_newest_batch_is_nobodys_loss() {
    let image = unclean_pool();
    let (header, address) = newest_batch(&image);
    let behind = address.plus(header.blocks);
    let volumes = volumes_with_bit_flipped(&image, behind, 77).expect("opens");
    assert_eq!(volumes, ["v1", "v2", "v3", "v4"]);
}

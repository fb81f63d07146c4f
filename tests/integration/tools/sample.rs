//! A sample pool in memory: trees of three heights, sealed snapshots, shared and own nodes, attributes, a carcass half eaten, and changes in
//! the journal that no checkpoint holds.

use std::collections::BTreeMap;
use std::rc::Rc;

use async_executor::LocalExecutor;
use futures_lite::future::block_on;
use plywood::engine::{
    CheckReport, CreateOptions, NewClone, NewSnapshot, NewVolume, OpenOptions, Pace, Pool, PrivateLog, check_metadata,
};
use plywood::error::Result;
use plywood::io::{IoMemory, MemoryImage, MemoryStorage};
use plywood::units::VolumeId;
use uuid::Uuid;

pub const POOL: Uuid = Uuid::from_u128(0x1234);
pub const POOL_BYTES: u64 = 300 << 20;
pub const JOURNAL_BYTES: u64 = 1 << 20;
const MIB: u64 = 1 << 20;

pub type MemoryPool = Pool<MemoryStorage>;

fn new_volume(number: u128, name: &str, size_bytes: u64) -> NewVolume {
    NewVolume {
        uuid: Uuid::from_u128(number),
        name: name.into(),
        size_bytes,
        sector_size: 512,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 1,
        attributes: BTreeMap::new(),
    }
}

pub fn new_snapshot(number: u128, name: &str) -> NewSnapshot {
    NewSnapshot { uuid: Uuid::from_u128(number), name: name.into(), created: 2, attributes: BTreeMap::new() }
}

fn new_clone(number: u128, name: &str) -> NewClone {
    let attributes = [("label".to_owned(), vec![1, 2, 3])].into();
    NewClone { uuid: Uuid::from_u128(number), name: name.into(), created: 3, size_bytes: None, attributes }
}

/// What a block of a volume is filled with.
pub fn content(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

pub async fn write(pool: &MemoryPool, volume: VolumeId, block: u64, seed: u64) {
    let handle = pool.open_volume(volume, false).unwrap();
    drop(handle.write(block * 4096, &IoMemory::from_bytes(&content(seed)), false).await.unwrap());
}

/// Opens the pool in `image`, does `work`, and answers what is there afterwards: with `closed` after a checkpoint, without as
/// a power cut leaves it after a commit.
pub fn with_pool<T>(image: MemoryImage, closed: bool, work: impl AsyncFnOnce(&MemoryPool) -> T) -> (MemoryImage, T) {
    let storage = MemoryStorage::from_image(image);
    let seen = storage.clone();
    let executor = Rc::new(LocalExecutor::new());
    block_on(executor.run(async {
        let pool = Pool::open(storage, Box::new(PrivateLog::new(0)), OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let done = work(&pool).await;
        if closed {
            pool.close().await.unwrap();
            task.await;
        } else {
            pool.commit().await.unwrap();
        }
        (seen.snapshot_image(), done)
    }))
}

/// A new pool without anything.
pub fn empty() -> MemoryImage {
    let storage = MemoryStorage::new(POOL_BYTES);
    let options =
        CreateOptions { uuid: POOL, name: "sample".into(), size_bytes: POOL_BYTES, journal_bytes: JOURNAL_BYTES };
    block_on(Pool::create(&storage, &options)).unwrap();
    storage.snapshot_image()
}

/// The sample, made once.
pub fn sample() -> MemoryImage {
    thread_local! {
        static SAMPLE: MemoryImage = make();
    }
    SAMPLE.with(Clone::clone)
}

fn make() -> MemoryImage {
    let (image, ()) = with_pool(empty(), true, async |pool| {
        let one = pool.create_volume(new_volume(1, "one", 64 * MIB)).await.unwrap().id;
        // Three levels.
        let high = pool.create_volume(new_volume(2, "high", 1 << 40)).await.unwrap().id;
        // A leaf alone.
        let low = pool.create_volume(new_volume(3, "low", MIB)).await.unwrap().id;
        let gone = pool.create_volume(new_volume(4, "gone", 1 << 30)).await.unwrap().id;
        for block in 0..64 {
            write(pool, one, block * 100, 1000 + block).await;
        }
        for block in 0..60 {
            write(pool, gone, block * 256, 2000 + block).await;
        }
        for at in [0, 1 << 16, (1 << 24) + 77, (1 << 28) - 1] {
            write(pool, high, at, 3000 + at).await;
        }
        for block in 0..256 {
            write(pool, low, block, 4000 + block).await;
        }
        pool.create_snapshot(one, new_snapshot(5, "kept")).await.unwrap();
        let kept = pool.volume("kept").unwrap().id;
        write(pool, one, 100, 5000).await;
        pool.create_clone(kept, new_clone(6, "clone")).await.unwrap();
        let clone = pool.volume("clone").unwrap().id;
        write(pool, clone, 6300, 5001).await;
        pool.create_snapshot(low, new_snapshot(7, "low-kept")).await.unwrap();
        for sealed in ["kept", "low-kept"] {
            pool.seal(pool.volume(sealed).unwrap().id, Pace::Full).await.unwrap();
        }
        let long = bytes(9000);
        pool.set_attributes(one, [("long".to_owned(), Some(long))].into()).await.unwrap();
    });
    let (image, ()) = with_pool(image, false, async |pool| {
        // The checkpoint has the carcass, not yet touched.
        let gone = pool.volume("gone").unwrap().id;
        let (deleted, checkpointed) = futures_lite::future::zip(pool.delete_volume(gone), pool.checkpoint()).await;
        deleted.and(checkpointed).unwrap();
        let one = pool.volume("one").unwrap().id;
        write(pool, one, 100, 6000).await;
        pool.commit().await.unwrap();
        write(pool, one, 15_000, 6001).await;
        pool.commit().await.unwrap();
        pool.create_snapshot(one, new_snapshot(8, "late")).await.unwrap();
        write(pool, one, 15_000, 6002).await;
    });
    image
}

/// A pool of which one volume was discarded as a whole a moment ago.
pub fn discarded() -> MemoryImage {
    let (image, ()) = with_pool(empty(), true, async |pool| {
        let volume = pool.create_volume(new_volume(1, "one", 1 << 30)).await.unwrap().id;
        for leaf in 0..100 {
            write(pool, volume, leaf * 256, leaf).await;
        }
    });
    let (image, ()) = with_pool(image, false, async |pool| {
        let handle = pool.open_volume(pool.volume("one").unwrap().id, false).unwrap();
        drop(handle.discard(0, 1 << 30).await.unwrap());
        pool.checkpoint().await.unwrap();
    });
    image
}

fn bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    bytes
}

/// What a check of the pool nobody uses says.
pub fn check(image: &MemoryImage) -> Result<CheckReport> {
    let storage = MemoryStorage::from_image(image.clone());
    block_on(check_metadata(&storage, &mut |_| ()))
}

#[track_caller]
pub fn assert_sound(image: &MemoryImage) -> CheckReport {
    let report = check(image).unwrap();
    assert!(report.is_clean(), "{} faults: {:#?}", report.fault_count, report.faults);
    report
}

/// Mapped blocks of every volume by name, with their content.
pub type Contents = BTreeMap<String, BTreeMap<u64, Vec<u8>>>;

/// Everything that the volumes hold.
pub fn contents(image: &MemoryImage) -> Contents {
    let (_, contents) = with_pool(image.clone(), false, async |pool| {
        let mut contents = Contents::new();
        for volume in pool.volumes() {
            let handle = pool.open_volume(volume.id, true).unwrap();
            let mut blocks = BTreeMap::new();
            // Where the sample writes.
            let last = volume.size_bytes / 4096;
            let near =
                (0..last.min(20_000)).step_by(100).chain(0..last.min(256)).chain((0..last.min(20_000)).step_by(256));
            let far = [1 << 16, (1 << 24) + 77, (1 << 28) - 1].into_iter().filter(|at| *at < last);
            for at in near.chain(far) {
                let memory = IoMemory::zeroed(4096);
                match handle.read(at * 4096, &memory).await {
                    Ok(()) if memory.to_vec().iter().any(|byte| *byte != 0) => {
                        blocks.insert(at, memory.to_vec());
                    }
                    Ok(()) => {}
                    Err(_) => {
                        blocks.insert(at, b"error".to_vec());
                    }
                }
            }
            contents.insert(volume.name, blocks);
        }
        contents
    });
    contents
}

#[test]
fn sample_is_sound_and_has_what_it_is_for() {
    let report = assert_sound(&sample());
    assert_eq!(report.volumes, 6);
    assert!(report.journal_records >= 3, "{report:?}");
    assert_eq!(report.unaccounted_blocks, 0);
    let contents = contents(&sample());
    assert_eq!(contents["one"][&100], content(6000));
    assert_eq!(contents["late"][&15_000], content(6001));
    assert_eq!(contents["kept"][&100], content(1001));
    assert_eq!(contents["low-kept"].len(), 256);
    assert_eq!(contents["high"][&((1 << 28) - 1)], content(3000 + (1 << 28) - 1));
}

#[test]
fn pool_just_created_is_sound() {
    assert_eq!(assert_sound(&empty()).used_blocks, 0);
}

#[test]
fn check_in_use_finds_the_same_as_one_of_the_closed_pool() {
    let (image, online) = with_pool(sample(), true, async |pool| {
        pool.settle().await.unwrap();
        pool.check().await.unwrap()
    });
    assert!(online.is_clean(), "{:#?}", online.faults);
    let offline = assert_sound(&image);
    assert_eq!((online.volumes, online.data_blocks), (offline.volumes, offline.data_blocks));
}

#[test]
fn check_in_use_goes_on_beside_writes() {
    let (image, ()) = with_pool(sample(), true, async |pool| {
        let one = pool.volume("one").unwrap().id;
        let writes = async {
            for round in 0..40 {
                write(pool, one, (round * 37) % 16_000, 7000 + round).await;
                if round % 4 == 0 {
                    pool.checkpoint().await.unwrap();
                }
            }
        };
        let checks = async {
            for _ in 0..8 {
                let report = pool.check().await.unwrap();
                assert!(report.is_clean(), "{:#?}", report.faults);
            }
        };
        futures_lite::future::zip(writes, checks).await;
    });
    assert_sound(&image);
}

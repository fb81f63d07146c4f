//! Real pools, small ones, each made by the engine itself and always the same.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use plywood::engine::{CreateOptions, Memory, NewClone, NewSnapshot, NewVolume, Pace, Pool, Storage, VolumeHandle};
use plywood::error::Error;
use plywood::units::BLOCK_SIZE;
use uuid::Uuid;

use crate::image::Image;
use crate::layout::{self, Structure};
use crate::session::{Session, SharedLog};
use crate::storage::FuzzStorage;

/// 2 MiB of superblocks, 1 MiB of journal, one short group.
pub const POOL_BYTES: u64 = (512 + 256 + 4096) * 4096;
const MIB: u64 = 1 << 20;

/// In which state a sample was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sample {
    /// Created and never used.
    Fresh,
    /// Closed: all is in the checkpoint.
    Closed,
    /// Cut off: the last changes are in the journal only, every kind of record among them.
    Journal,
    /// Deleted trees wait to be taken apart.
    Carcasses,
    /// Its snapshots are sealed, one after the other, and all reads verified.
    Sealed,
}

impl Sample {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fresh, Self::Closed, Self::Journal, Self::Carcasses, Self::Sealed];

    /// The pool, made when it is first asked for.
    pub fn image(self) -> Image {
        thread_local! {
            static IMAGES: [OnceLock<Image>; 5] = const { [const { OnceLock::new() }; 5] };
        }
        IMAGES.with(|images| images[self as usize].get_or_init(|| make(self)).clone())
    }
}

/// A volume as the samples and the model make them, its uuid from its number.
pub fn new_volume(number: u64, size_bytes: u64) -> NewVolume {
    NewVolume {
        uuid: Uuid::from_u128(u128::from(number) + 1),
        name: format!("volume-{number}"),
        size_bytes,
        sector_size: 4096,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 1_700_000_000_000_000_000 + number,
        attributes: BTreeMap::new(),
    }
}

/// A snapshot, likewise.
pub fn new_snapshot(number: u64) -> NewSnapshot {
    let NewVolume { uuid, name, created, attributes, .. } = new_volume(number, 0);
    NewSnapshot { uuid, name, created, attributes }
}

/// A clone, likewise.
pub fn new_clone(number: u64) -> NewClone {
    let NewVolume { uuid, name, created, attributes, .. } = new_volume(number, 0);
    NewClone { uuid, name, created, attributes, size_bytes: None }
}

/// An empty pool.
pub fn created() -> Image {
    let storage = FuzzStorage::new(Image::new(POOL_BYTES), u64::MAX);
    let options = CreateOptions {
        uuid: Uuid::from_u128(0x0066_757a_7a00),
        name: "fuzz".to_owned(),
        size_bytes: POOL_BYTES,
        journal_bytes: MIB,
    };
    let target = storage.clone();
    let made = Session::new(&storage).run(async move { Pool::create(&target, &options).await });
    made.expect("the storage answers").expect("the options are right");
    let mut image = storage.image();
    image.compact();
    image
}

fn make(sample: Sample) -> Image {
    let storage = FuzzStorage::new(created(), u64::MAX);
    if sample == Sample::Fresh {
        return storage.image();
    }
    let mut session = Session::new(&storage);
    let pool = session.open(&SharedLog::new(7), true).expect("the storage answers").expect("a new pool opens");
    let (work, target) = (pool.clone(), storage.clone());
    let made = session.run(async move {
        fill(&work, &target).await?;
        match sample {
            Sample::Fresh | Sample::Closed => work.close().await,
            Sample::Journal => {
                work.checkpoint().await?;
                change(&work, &target).await?;
                work.commit().await
            }
            Sample::Carcasses => {
                leave_carcasses(&work, &target).await?;
                work.checkpoint().await
            }
            Sample::Sealed => {
                let snapshots = work.volumes().into_iter().filter(|info| info.read_only).map(|info| info.id);
                for id in snapshots {
                    work.seal(id, Pace::Full).await?;
                    work.verify_volume_on_read(id, true).await?;
                }
                work.verify_pool_on_read(true).await?;
                work.close().await
            }
        }
    });
    made.expect("the storage answers").unwrap_or_else(|error| panic!("{sample:?}: {error}"));
    let mut image = storage.image();
    image.compact();
    let found = layout::walk(&mut image, false);
    let has = |structure| found.iter().any(|found| found.structure == structure);
    assert_eq!(sample == Sample::Carcasses, has(Structure::CarcassPage), "the carcass worker was caught at work");
    assert_eq!(sample == Sample::Sealed, has(Structure::ChecksumPage), "sealed snapshots have checksums");
    assert!(sample != Sample::Journal || has(Structure::Journal), "the last changes are in the journal");
    image
}

async fn write(
    handle: &VolumeHandle<FuzzStorage>,
    storage: &FuzzStorage,
    block: u64,
    count: usize,
) -> Result<(), Error> {
    let memory = storage.allocate(count * BLOCK_SIZE);
    memory.write(0, &vec![block as u8 | 1; count * BLOCK_SIZE]);
    drop(handle.write(block * BLOCK_SIZE as u64, &memory, false).await?);
    Ok(())
}

/// Volumes of several heights, a chain of snapshots and clones, attributes of more than one block.
async fn fill(pool: &Pool<FuzzStorage>, storage: &FuzzStorage) -> Result<(), Error> {
    let mut first = new_volume(1, 1 << 30);
    first.attributes.insert("image.config".into(), vec![b'x'; 5000]);
    first.attributes.insert("label".into(), b"one".to_vec());
    let first = pool.create_volume(first).await?.id;
    let second = pool.create_volume(NewVolume { quota_bytes: 8 * MIB, ..new_volume(2, MIB) }).await?.id;
    let high = pool.create_volume(NewVolume { sector_size: 512, ..new_volume(3, 1 << 40) }).await?.id;
    let handle = pool.open_volume(first, false)?;
    for block in [0, 3, 255, 256, 700, 65535, 65536, 70000] {
        write(&handle, storage, block, 2).await?;
    }
    drop(handle);
    let handle = pool.open_volume(second, false)?;
    write(&handle, storage, 0, 256).await?;
    drop(handle);
    let handle = pool.open_volume(high, false)?;
    write(&handle, storage, (1 << 28) - 1, 1).await?;
    drop(handle);
    let snapshot = pool.create_snapshot(first, new_snapshot(4)).await?.id;
    let clone = pool.create_clone(snapshot, new_clone(5)).await?.id;
    let handle = pool.open_volume(clone, false)?;
    write(&handle, storage, 3, 1).await?;
    write(&handle, storage, 1000, 20).await?;
    drop(handle.discard(255 * 4096, 8192).await?);
    drop(handle);
    pool.protect_volume(snapshot, true).await?;
    pool.create_snapshot(clone, new_snapshot(6)).await?;
    let handle = pool.open_volume(first, false)?;
    write(&handle, storage, 0, 1).await?;
    Ok(())
}

/// One of each kind of record.
async fn change(pool: &Pool<FuzzStorage>, storage: &FuzzStorage) -> Result<(), Error> {
    let id = |number: u64| pool.volume(&format!("volume-{number}")).map(|info| info.id);
    let created = pool.create_volume(new_volume(7, 64 * MIB)).await?.id;
    let handle = pool.open_volume(created, false)?;
    write(&handle, storage, 5, 3).await?;
    drop(handle.discard(6 * 4096, 4096).await?);
    handle.flush().await?;
    drop(handle);
    pool.set_attributes(id(7)?, BTreeMap::from([("key".to_owned(), Some(b"value".to_vec()))])).await?;
    pool.create_snapshot(created, new_snapshot(8)).await?;
    let handle = pool.open_volume(created, false)?;
    write(&handle, storage, 5, 1).await?;
    drop(handle.discard(0, 64 * MIB).await?);
    drop(handle);
    pool.roll_back(created, id(8)?, None).await?;
    pool.create_clone(id(8)?, new_clone(9)).await?;
    pool.rename_volume(id(9)?, "renamed").await?;
    pool.resize_volume(id(2)?, MIB / 2).await?;
    pool.delete_volume(id(3)?).await
}

/// Leaves of the volumes that become carcasses: enough for the worker to be caught at work.
const LEAVES: u64 = 100;

/// A deleted volume, a large discard, and a shrunk volume whose tree a snapshot holds too.
async fn leave_carcasses(pool: &Pool<FuzzStorage>, storage: &FuzzStorage) -> Result<(), Error> {
    let mut ids = Vec::new();
    for number in [10, 11, 12] {
        let id = pool.create_volume(new_volume(number, 1 << 30)).await?.id;
        let handle = pool.open_volume(id, false)?;
        for leaf in 0..LEAVES {
            write(&handle, storage, leaf * 256, 1).await?;
        }
        ids.push(id);
    }
    pool.create_snapshot(ids[2], new_snapshot(13)).await?;
    pool.checkpoint().await?;
    let handle = pool.open_volume(ids[1], false)?;
    drop(handle.discard(0, 1 << 30).await?);
    drop(handle);
    pool.resize_volume(ids[2], MIB).await?;
    pool.delete_volume(ids[0]).await
}

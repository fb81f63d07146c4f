//! A pool on blank memory with its background work, and the volumes that costs are measured on.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;

use async_executor::LocalExecutor;
use futures_lite::future;
use plywood::engine::{
    CreateOptions, JOURNAL_BYTES, NewClone, NewSnapshot, NewVolume, OpenOptions, Pool, PrivateLog, VolumeHandle,
};
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};
use uuid::Uuid;

use crate::blank_storage::{BlankMemory, BlankStorage};

pub const GIB: u64 = 1 << 30;

/// One block of payload.
pub const BLOCK: BlankMemory = BlankMemory::Blank(BLOCK_SIZE);

pub struct World {
    /// Where the background work runs.
    pub executor: LocalExecutor<'static>,
    pub pool: Pool<BlankStorage>,
    pub storage: BlankStorage,
    created: Cell<u128>,
}

impl World {
    /// A new pool of `size_bytes`, open with the default options.
    pub fn new(size_bytes: u64) -> Self {
        let storage = BlankStorage::new(size_bytes);
        let executor = LocalExecutor::new();
        let pool = future::block_on(executor.run(async {
            let options = CreateOptions {
                uuid: Uuid::from_u128(1),
                name: "cost".to_owned(),
                size_bytes,
                journal_bytes: JOURNAL_BYTES,
            };
            Pool::create(&storage, &options).await.expect("create of the pool");
            let log = Box::new(PrivateLog::new(1));
            Pool::open(storage.clone(), log, OpenOptions::default()).await.expect("open of the pool")
        }));
        let background = pool.clone();
        executor.spawn(async move { background.run().await }).detach();
        Self { executor, pool, storage, created: Cell::new(1) }
    }

    /// Runs `work` to its end beside the pool's background work.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        future::block_on(self.executor.run(work))
    }

    fn name(&self) -> (Uuid, String) {
        self.created.set(self.created.get() + 1);
        (Uuid::from_u128(self.created.get()), format!("volume-{}", self.created.get()))
    }

    pub async fn volume(&self, size_bytes: u64) -> VolumeId {
        let (uuid, name) = self.name();
        let new = NewVolume {
            uuid,
            name,
            size_bytes,
            sector_size: 4096,
            quota_bytes: 0,
            reservation_bytes: 0,
            created: 0,
            attributes: BTreeMap::new(),
        };
        self.pool.create_volume(new).await.expect("create of a volume").id
    }

    pub async fn snapshot(&self, of: VolumeId) -> VolumeId {
        let (uuid, name) = self.name();
        let new = NewSnapshot { uuid, name, created: 0, attributes: BTreeMap::new() };
        self.pool.create_snapshot(of, new).await.expect("snapshot").id
    }

    pub async fn clone_of(&self, snapshot: VolumeId) -> VolumeId {
        let (uuid, name) = self.name();
        let new = NewClone { uuid, name, created: 0, size_bytes: None, attributes: BTreeMap::new() };
        self.pool.create_clone(snapshot, new).await.expect("clone").id
    }

    pub fn handle(&self, volume: VolumeId) -> VolumeHandle<BlankStorage> {
        let read_only = self.pool.volume_by_id(volume).expect("a volume").read_only;
        self.pool.open_volume(volume, read_only).expect("open of a volume")
    }

    /// Writes all blocks of a volume.
    pub async fn fill(&self, volume: VolumeId) {
        let size_bytes = self.pool.volume_by_id(volume).expect("a volume").size_bytes;
        self.fill_part(volume, 0..size_bytes).await;
    }

    /// Writes whole mebibytes of a volume, one at a time.
    pub async fn fill_part(&self, volume: VolumeId, bytes: Range<u64>) {
        const STEP: u64 = 1 << 20;
        let handle = self.handle(volume);
        for offset in bytes.step_by(STEP as usize) {
            drop(handle.write(offset, &BlankMemory::Blank(STEP as usize), false).await.expect("write"));
        }
    }

    /// Writes single blocks, `count` of them evenly over the whole volume, so that no two are neighbours.
    pub async fn scatter(&self, volume: VolumeId, count: u64) {
        let handle = self.handle(volume);
        let distance = handle.size_bytes() / BLOCK_BYTES / count;
        assert!(distance > 1, "scattered blocks are no neighbours");
        for index in 0..count {
            write_block(&handle, index * distance).await;
        }
    }
}

/// Writes one block of payload.
pub async fn write_block(handle: &VolumeHandle<BlankStorage>, block: u64) {
    drop(handle.write(block * BLOCK_BYTES, &BLOCK, false).await.expect("write"));
}

/// Reads one block of payload.
pub async fn read_block(handle: &VolumeHandle<BlankStorage>, block: u64) {
    handle.read(block * BLOCK_BYTES, &BLOCK).await.expect("read");
}

//! One engine on a medium that does at once what it is asked, for stories: each call is run to its end, or begun and left
//! to wait for an operation that is held.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use async_executor::LocalExecutor;
use plywood::engine::{CreateOptions, NewClone, NewSnapshot, NewVolume, OpenOptions, Pool, VolumeHandle, VolumeInfo};
use plywood::error::Error;
use plywood::io::IoMemory;
use plywood::units::{BLOCK_BYTES, VolumeId};
use uuid::Uuid;

use crate::image::Image;
use crate::log::Log;
use crate::medium::{Left, Medium};
use crate::task::Panicked;
use crate::verify::{check, run};

pub const MIB: u64 = 1 << 20;
pub const POOL_BYTES: u64 = 8 * MIB;
const JOURNAL_BYTES: u64 = MIB;

/// An engine on a medium that does at once what it is asked.
pub struct Engine {
    pub medium: Medium,
    pub executor: LocalExecutor<'static>,
    pub pool: Pool<Medium>,
    panicked: Panicked,
}

pub fn at_once(left: Left) -> Medium {
    Medium::at_once(left, 7, 512, JOURNAL_BYTES, u64::MAX)
}

/// A medium that answers no more after so many operations.
pub fn stopping(left: Left, stop_after: u64) -> Medium {
    Medium::at_once(left, 7, 512, JOURNAL_BYTES, stop_after)
}

/// A medium that writes no less than a block.
pub fn at_once_in_blocks(left: Left) -> Medium {
    Medium::at_once(left, 7, 4096, JOURNAL_BYTES, u64::MAX)
}

/// A new pool.
pub fn new_pool() -> Left {
    pool_of(POOL_BYTES)
}

/// A new pool of another size than stories usually need.
pub fn pool_of(size_bytes: u64) -> Left {
    let medium = at_once(Image::new(size_bytes).into());
    let options =
        CreateOptions { uuid: Uuid::from_u128(77), name: "story".to_owned(), size_bytes, journal_bytes: JOURNAL_BYTES };
    let storage = medium.clone();
    let made = run(&LocalExecutor::new(), || None, async move { Pool::create(&storage, &options).await });
    made.expect("not stuck").expect("created");
    medium.power_cut_keeping(|_| true)
}

/// A call that was begun; what it answered, when it has.
pub type Begun<T> = Rc<RefCell<Option<T>>>;

fn new_snapshot(number: u128) -> NewSnapshot {
    let name = format!("v{number}");
    NewSnapshot { uuid: Uuid::from_u128(number), name, created: 0, attributes: BTreeMap::new() }
}

impl Engine {
    pub fn open(medium: Medium, log: Log) -> Result<Self, Error> {
        Self::open_with(medium, log, 1 << 20)
    }

    /// The first engine of a new pool.
    pub fn on(pool: Left) -> Self {
        Self::open(at_once(pool), Log::new(1)).expect("open")
    }

    /// The engine after a power cut that leaves nothing but what was durable.
    pub fn lose_power(self) -> Self {
        let session = 1000 + u128::from(self.pool.info().generation.0);
        let left = self.medium.power_cut_keeping(|_| false);
        drop(self);
        Self::open(at_once(left), Log::new(session)).expect("open after the loss of power")
    }

    /// An engine whose nodes have so much memory.
    pub fn open_with(medium: Medium, log: Log, cache_bytes: usize) -> Result<Self, Error> {
        let executor = LocalExecutor::new();
        let (storage, options) = (medium.clone(), OpenOptions { cache_bytes });
        let pool = run(&executor, || None, async move { Pool::open(storage, Box::new(log), options).await });
        let pool = pool.expect("opening is not stuck")?;
        let background = pool.clone();
        let panicked = Panicked::default();
        panicked.spawn(&executor, async move { background.run().await });
        Ok(Self { medium, executor, pool, panicked })
    }

    /// Runs a call to its end.
    pub fn finish<T: 'static>(&self, call: impl Future<Output = T> + 'static) -> T {
        let done = run(&self.executor, || Some(self.pool.clone()), call);
        self.panicked.check().unwrap_or_else(|error| panic!("{error}"));
        done.expect("not stuck")
    }

    pub fn create(&self, number: u128, size_bytes: u64) -> VolumeId {
        self.try_create(number, size_bytes).expect("a volume")
    }

    pub fn try_create(&self, number: u128, size_bytes: u64) -> Result<VolumeId, Error> {
        let new = NewVolume {
            uuid: Uuid::from_u128(number),
            name: format!("v{number}"),
            size_bytes,
            sector_size: 512,
            quota_bytes: 0,
            reservation_bytes: 0,
            created: 0,
            attributes: BTreeMap::new(),
        };
        let pool = self.pool.clone();
        self.finish(async move { pool.create_volume(new).await }).map(|info| info.id)
    }

    pub fn write(&self, volume: VolumeId, block: u64, byte: u8) -> Result<(), Error> {
        let handle = self.pool.open_volume(volume, false)?;
        let memory = IoMemory::from_bytes(&[byte; BLOCK_BYTES as usize]);
        self.finish(async move { handle.write(block * BLOCK_BYTES, &memory, false).await.map(drop) })
    }

    /// Writes whole sectors.
    pub fn write_bytes(&self, volume: VolumeId, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let (handle, memory) = (self.handle(volume), IoMemory::from_bytes(bytes));
        self.finish(async move { handle.write(offset, &memory, false).await.map(drop) })
    }

    /// The bytes of a block.
    pub fn read_block(&self, volume: VolumeId, block: u64) -> Vec<u8> {
        let handle = self.pool.open_volume(volume, true).expect("open");
        let memory = IoMemory::zeroed(BLOCK_BYTES as usize);
        let into = memory.clone();
        self.finish(async move { handle.read(block * BLOCK_BYTES, &into).await }).expect("readable");
        memory.to_vec()
    }

    /// Writes zeros that take room.
    pub fn zero(&self, volume: VolumeId, offset: u64, length: u64) -> Result<(), Error> {
        let handle = self.handle(volume);
        self.finish(async move { handle.write_zeroes(offset, length, false).await.map(drop) })
    }

    pub fn info(&self, volume: VolumeId) -> VolumeInfo {
        self.pool.volume_by_id(volume).expect("there")
    }

    pub fn flush(&self, volume: VolumeId) -> Result<(), Error> {
        let handle = self.pool.open_volume(volume, true)?;
        self.finish(async move { handle.flush().await })
    }

    pub fn read(&self, volume: VolumeId, block: u64) -> Result<u8, Error> {
        let handle = self.pool.open_volume(volume, true)?;
        let memory = IoMemory::zeroed(BLOCK_BYTES as usize);
        let into = memory.clone();
        self.finish(async move { handle.read(block * BLOCK_BYTES, &into).await })?;
        let bytes = memory.to_vec();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a block of several writes");
        Ok(bytes[0])
    }

    /// Begins a call and lets it come as far as it can.
    pub fn begin<T: 'static>(&self, call: impl Future<Output = T> + 'static) -> Begun<T> {
        let begun: Begun<T> = Rc::default();
        let slot = Rc::clone(&begun);
        self.panicked.spawn(&self.executor, async move {
            let value = call.await;
            *slot.borrow_mut() = Some(value);
        });
        self.turns();
        begun
    }

    /// Lets everything come as far as it can.
    pub fn turns(&self) {
        for _ in 0..20_000 {
            if !self.executor.try_tick() {
                break;
            }
        }
        self.panicked.check().unwrap_or_else(|error| panic!("{error}"));
    }

    /// As a second that passes.
    pub fn tick(&self) {
        self.pool.tick();
        self.turns();
    }

    pub fn handle(&self, volume: VolumeId) -> VolumeHandle<Medium> {
        self.pool.open_volume(volume, false).expect("open")
    }

    /// A write that is begun.
    pub fn begin_write(&self, volume: VolumeId, block: u64, byte: u8) -> Begun<Result<(), Error>> {
        let handle = self.handle(volume);
        let memory = IoMemory::from_bytes(&[byte; BLOCK_BYTES as usize]);
        self.begin(async move { handle.write(block * BLOCK_BYTES, &memory, false).await.map(drop) })
    }

    /// A FLUSH that is begun.
    pub fn begin_flush(&self, volume: VolumeId) -> Begun<Result<(), Error>> {
        let handle = self.pool.open_volume(volume, true).expect("open");
        self.begin(async move { handle.flush().await })
    }

    /// A read that is begun: the memory, and how it ended.
    pub fn begin_read(&self, volume: VolumeId, block: u64) -> (IoMemory, Begun<Result<(), Error>>) {
        let handle = self.pool.open_volume(volume, true).expect("open");
        let memory = IoMemory::zeroed(BLOCK_BYTES as usize);
        let into = memory.clone();
        (memory, self.begin(async move { handle.read(block * BLOCK_BYTES, &into).await }))
    }

    pub fn discard(&self, volume: VolumeId, block: u64, count: u64) -> Result<(), Error> {
        let handle = self.handle(volume);
        self.finish(async move { handle.discard(block * BLOCK_BYTES, count * BLOCK_BYTES).await.map(drop) })
    }

    pub fn begin_snapshot(&self, origin: VolumeId, number: u128) -> Begun<Result<VolumeId, Error>> {
        let (pool, new) = (self.pool.clone(), new_snapshot(number));
        self.begin(async move { pool.create_snapshot(origin, new).await.map(|info| info.id) })
    }

    pub fn snapshot(&self, origin: VolumeId, number: u128) -> VolumeId {
        let (pool, new) = (self.pool.clone(), new_snapshot(number));
        self.finish(async move { pool.create_snapshot(origin, new).await }).expect("a snapshot").id
    }

    /// Snapshots of several volumes at one instant, which are begun: pairs of volume and number.
    pub fn begin_snapshots(&self, wanted: &[(VolumeId, u128)]) -> Begun<Result<Vec<VolumeId>, Error>> {
        let (pool, wanted) =
            (self.pool.clone(), wanted.iter().map(|(id, number)| (*id, new_snapshot(*number))).collect());
        self.begin(async move {
            let taken = pool.create_snapshots(wanted).await?;
            Ok(taken.into_iter().map(|info| info.id).collect())
        })
    }

    pub fn snapshots(&self, wanted: &[(VolumeId, u128)]) -> Result<Vec<VolumeId>, Error> {
        let (pool, wanted) =
            (self.pool.clone(), wanted.iter().map(|(id, number)| (*id, new_snapshot(*number))).collect());
        let taken = self.finish(async move { pool.create_snapshots(wanted).await })?;
        Ok(taken.into_iter().map(|info| info.id).collect())
    }

    pub fn clone_of(&self, snapshot: VolumeId, number: u128) -> VolumeId {
        let (pool, name) = (self.pool.clone(), format!("v{number}"));
        let attributes = BTreeMap::new();
        let new = NewClone { uuid: Uuid::from_u128(number), name, created: 0, size_bytes: None, attributes };
        self.finish(async move { pool.create_clone(snapshot, new).await }).expect("a clone").id
    }

    pub fn delete(&self, volume: VolumeId) -> Result<(), Error> {
        let pool = self.pool.clone();
        self.finish(async move { pool.delete_volume(volume).await })
    }

    pub fn commit(&self) {
        let pool = self.pool.clone();
        self.finish(async move { pool.commit().await }).expect("committed");
    }

    /// Has the carcasses eaten.
    pub fn settle(&self) {
        let pool = self.pool.clone();
        self.finish(async move { pool.settle().await }).expect("settled");
    }

    /// Compares every count with what a walk finds.
    pub fn assert_clean(&self) {
        check(&self.executor, &self.pool).expect("clean");
    }

    /// Writes single blocks of `volume` until the pool is full; answers how many.
    pub fn fill(&self, volume: VolumeId, byte: u8) -> u64 {
        (0..).find(|block| self.write(volume, *block, byte).is_err()).expect("the pool is full sometime")
    }

    /// A checkpoint that is begun.
    pub fn begin_checkpoint(&self) -> Begun<Result<(), Error>> {
        let pool = self.pool.clone();
        self.begin(async move { pool.checkpoint().await })
    }

    pub fn roll_back(&self, volume: VolumeId, snapshot: VolumeId) -> Result<(), Error> {
        let pool = self.pool.clone();
        self.finish(async move { pool.roll_back(volume, snapshot, None).await })
    }

    pub fn resize(&self, volume: VolumeId, size_bytes: u64) -> Result<(), Error> {
        let pool = self.pool.clone();
        self.finish(async move { pool.resize_volume(volume, size_bytes).await })
    }

    pub fn checkpoint(&self) -> Result<(), Error> {
        let pool = self.pool.clone();
        self.finish(async move { pool.checkpoint().await })
    }

    pub fn close(self) {
        let pool = self.pool.clone();
        self.finish(async move { pool.close().await }).expect("closed");
    }
}

//! What the crash simulator found, each as a story of its own.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use async_executor::LocalExecutor;
use futures_lite::future::{block_on, yield_now, zip};
use uuid::Uuid;

use super::*;
use crate::format::JOURNAL_FIRST;
use crate::io::{IoMemory, MemoryImage, MemoryStorage};
use crate::units::{BLOCK_BYTES, VolumeId};

const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 64 * MIB;

/// A pending log that outlives its engine.
#[derive(Clone)]
struct Log(Rc<RefCell<PrivateLog>>);

impl Log {
    fn new(session: u128) -> Self {
        Self(Rc::new(RefCell::new(PrivateLog::new(session))))
    }
}

impl PendingLog for Log {
    fn session(&self) -> u128 {
        self.0.borrow().session()
    }
    fn free_bytes(&self) -> usize {
        self.0.borrow().free_bytes()
    }
    fn publish(&mut self, lsn: crate::units::Lsn, record: &[u8]) {
        self.0.borrow_mut().publish(lsn, record);
    }
    fn release(&mut self, through: crate::units::Lsn) {
        self.0.borrow_mut().release(through);
    }
    fn poison(&mut self) {
        self.0.borrow_mut().poison();
    }
    fn is_poisoned(&self) -> bool {
        self.0.borrow().is_poisoned()
    }
    fn published(&self) -> Vec<(crate::units::Lsn, Vec<u8>)> {
        self.0.borrow().published()
    }
}

/// Memory whose appends to the journal, or reads of one block, wait while they are held.
#[derive(Clone)]
struct Gated {
    inner: MemoryStorage,
    journal: Rc<Cell<bool>>,
    read_of: Rc<Cell<u64>>,
}

impl Gated {
    fn new(image: MemoryImage) -> Self {
        Self { inner: MemoryStorage::from_image(image), journal: Rc::default(), read_of: Rc::new(Cell::new(u64::MAX)) }
    }
}

async fn while_held(is_held: impl Fn() -> bool) {
    while is_held() {
        yield_now().await;
    }
}

impl Storage for Gated {
    type Memory = IoMemory;
    fn allocate(&self, len: usize) -> IoMemory {
        self.inner.allocate(len)
    }
    fn alignment(&self) -> usize {
        self.inner.alignment()
    }
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }
    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        let (storage, into) = (self.clone(), into.clone());
        async move {
            while_held(|| storage.read_of.get() == offset).await;
            storage.inner.read(offset, &into).await
        }
    }
    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.write(offset, from)
    }
    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        let (storage, from) = (self.clone(), from.clone());
        async move {
            while_held(|| storage.journal.get() && offset >= JOURNAL_FIRST.offset_bytes()).await;
            storage.inner.write_durable(offset, &from).await
        }
    }
    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.flush()
    }
    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.extend(range)
    }
    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.punch(range)
    }
}

fn new_image() -> MemoryImage {
    let storage = MemoryStorage::new(POOL_BYTES);
    let options =
        CreateOptions { uuid: Uuid::from_u128(1), name: "pool".into(), size_bytes: POOL_BYTES, journal_bytes: MIB };
    block_on(Pool::create(&storage, &options)).unwrap();
    storage.snapshot_image()
}

/// Opens `storage` with `log` and runs `body` beside the pool's background work, which ends with it.
fn with<S: Storage, T, F: Future<Output = T>>(storage: S, log: &Log, body: impl FnOnce(Pool<S>) -> F) -> T {
    let executor = Rc::new(LocalExecutor::new());
    let log = Box::new(log.clone());
    block_on(executor.run(async {
        let pool = Pool::open(storage, log, OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let done = body(pool).await;
        drop(task);
        done
    }))
}

async fn create<S: Storage<Memory = IoMemory>>(pool: &Pool<S>, number: u128, size_bytes: u64) -> VolumeId {
    let new = NewVolume {
        uuid: Uuid::from_u128(number),
        name: format!("v{number}"),
        size_bytes,
        sector_size: 512,
        quota_bytes: 0,
        created: 0,
        attributes: BTreeMap::new(),
    };
    pool.create_volume(new).await.unwrap().id
}

fn memory(byte: u8, blocks: u64) -> IoMemory {
    IoMemory::from_bytes(&vec![byte; (blocks * BLOCK_BYTES) as usize])
}

async fn write<S: Storage<Memory = IoMemory>>(pool: &Pool<S>, id: VolumeId, block: u64, byte: u8) {
    let handle = pool.open_volume(id, false).unwrap();
    drop(handle.write(block * BLOCK_BYTES, &memory(byte, 1), false).await.unwrap());
}

async fn first_byte<S: Storage<Memory = IoMemory>>(pool: &Pool<S>, id: VolumeId, block: u64) -> u8 {
    let into = IoMemory::zeroed(BLOCK_BYTES as usize);
    pool.open_volume(id, true).unwrap().read(block * BLOCK_BYTES, &into).await.unwrap();
    into.to_vec()[0]
}

async fn assert_clean<S: Storage<Memory = IoMemory>>(pool: &Pool<S>) {
    pool.settle().await.unwrap();
    let report = pool.check().await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.faults);
}

/// A volume discarded to its last block had a root that was a hole and still a height. Its record was written so, and
/// refused by the next opening: the whole pool was lost.
#[test]
fn volume_discarded_whole_does_not_keep_the_pool_from_opening() {
    let storage = MemoryStorage::from_image(new_image());
    with(storage.clone(), &Log::new(1), |pool| async move {
        let volume = create(&pool, 1, 8 * MIB).await;
        write(&pool, volume, 300, 1).await;
        let handle = pool.open_volume(volume, false).unwrap();
        drop(handle.discard(0, 8 * MIB).await.unwrap());
        drop(handle);
        pool.close().await.unwrap();
    });
    with(storage, &Log::new(2), |pool| async move {
        let volume = pool.volume("v1").unwrap().id;
        assert_eq!(first_byte(&pool, volume, 300).await, 0);
        write(&pool, volume, 300, 2).await;
        assert_clean(&pool).await;
    });
}

/// A batch was being appended while a checkpoint with more changes than it holds was written. The next batch then began
/// above the one before with a gap that the checkpoint fills; the next opening took that for the journal's end and dropped
/// what was acknowledged.
#[test]
fn batch_behind_changes_that_only_a_checkpoint_holds_is_replayed() {
    let storage = Gated::new(new_image());
    let gate = Rc::clone(&storage.journal);
    let image = storage.inner.clone();
    with(storage, &Log::new(1), |pool| async move {
        let volume = create(&pool, 1, 8 * MIB).await;
        gate.set(true);
        write(&pool, volume, 0, 1).await;
        let committed = pool.commit();
        let checkpointed = async {
            // The commit's cut is made by now, and its batch waits.
            for _ in 0..100 {
                yield_now().await;
            }
            write(&pool, volume, 1, 2).await;
            pool.checkpoint().await.unwrap();
            gate.set(false);
        };
        let (committed, ()) = zip(committed, checkpointed).await;
        committed.unwrap();
        write(&pool, volume, 2, 3).await;
        pool.commit().await.unwrap();
    });
    with(MemoryStorage::from_image(image.snapshot_image()), &Log::new(2), |pool| async move {
        let volume = pool.volume("v1").unwrap().id;
        for (block, byte) in [(0, 1), (1, 2), (2, 3)] {
            assert_eq!(first_byte(&pool, volume, block).await, byte, "block {block}");
        }
        assert_clean(&pool).await;
    });
}

/// An engine died with a change published and not recorded. Its successor took the change over, answered a FLUSH without
/// recording it, and lost power: what had been flushed was gone.
#[test]
fn flush_after_a_takeover_waits_for_what_was_taken_over() {
    let storage = Gated::new(new_image());
    let (gate, log) = (Rc::clone(&storage.journal), Log::new(1));
    with(storage.clone(), &log, |pool| async move {
        let volume = create(&pool, 1, 8 * MIB).await;
        write(&pool, volume, 0, 1).await;
    });
    assert!(!log.published().is_empty());
    let recorded = with(storage, &log, |pool| async move {
        let handle = pool.open_volume(pool.volume("v1").unwrap().id, false).unwrap();
        // No batch reaches the medium: a FLUSH must not come back.
        gate.set(true);
        let flushed = async { Some(handle.flush().await) };
        let waited = async {
            for _ in 0..1000 {
                yield_now().await;
            }
            None
        };
        let early = futures_lite::future::or(flushed, waited).await;
        gate.set(false);
        early.is_none()
    });
    assert!(recorded, "FLUSH was answered before the change it covers was recorded");
}

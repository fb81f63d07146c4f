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

use super::state::TreeKey;
use super::*;
use crate::error::Error;
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

/// Memory whose appends to the journal, writes that are not durable, or reads of one place wait while they are held.
#[derive(Clone)]
struct Gated {
    inner: MemoryStorage,
    journal: Rc<Cell<bool>>,
    writes: Rc<Cell<bool>>,
    flushes: Rc<Cell<bool>>,
    read_of: Rc<Cell<u64>>,
}

impl Gated {
    fn new(image: MemoryImage) -> Self {
        Self {
            inner: MemoryStorage::from_image(image),
            journal: Rc::default(),
            writes: Rc::default(),
            flushes: Rc::default(),
            read_of: Rc::new(Cell::new(u64::MAX)),
        }
    }
}

fn is_journal(offset: u64) -> bool {
    (JOURNAL_FIRST.offset_bytes()..JOURNAL_FIRST.offset_bytes() + MIB).contains(&offset)
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
        let (storage, from) = (self.clone(), from.clone());
        async move {
            while_held(|| storage.writes.get() || (storage.journal.get() && is_journal(offset))).await;
            storage.inner.write(offset, &from).await
        }
    }
    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        let (storage, from) = (self.clone(), from.clone());
        async move {
            while_held(|| storage.journal.get() && is_journal(offset)).await;
            storage.inner.write_durable(offset, &from).await
        }
    }
    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        let storage = self.clone();
        async move {
            while_held(|| storage.flushes.get()).await;
            storage.inner.flush().await
        }
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
    pool.create_volume(new_volume(number, size_bytes)).await.unwrap().id
}

fn new_volume(number: u128, size_bytes: u64) -> NewVolume {
    NewVolume {
        uuid: Uuid::from_u128(number),
        name: format!("v{number}"),
        size_bytes,
        sector_size: 512,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 0,
        attributes: BTreeMap::new(),
    }
}

async fn snapshot<S: Storage>(pool: &Pool<S>, origin: VolumeId, number: u128) -> VolumeId {
    let new = NewSnapshot {
        uuid: Uuid::from_u128(number),
        name: format!("s{number}"),
        created: 0,
        attributes: BTreeMap::new(),
    };
    pool.create_snapshot(origin, new).await.unwrap().id
}

async fn turns(count: u32) {
    for _ in 0..count {
        yield_now().await;
    }
}

/// Writes until the pool is full.
async fn fill<S: Storage<Memory = IoMemory>>(pool: &Pool<S>, id: VolumeId, byte: u8) {
    let handle = pool.open_volume(id, false).unwrap();
    for blocks in [256, 16, 1] {
        for at in (0..).step_by(blocks as usize) {
            match handle.write(at * BLOCK_BYTES, &memory(byte, blocks), false).await {
                Ok(held) => drop(held),
                Err(Error::NoSpace(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
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
    let (gate, flushes) = (Rc::clone(&storage.journal), Rc::clone(&storage.flushes));
    let image = storage.inner.clone();
    with(storage, &Log::new(1), |pool| async move {
        let volume = create(&pool, 1, 8 * MIB).await;
        gate.set(true);
        flushes.set(true);
        write(&pool, volume, 0, 1).await;
        let committed = async {
            // The second is wanted while the first flushes: so the first one's batch is only written.
            let second = async {
                turns(100).await;
                pool.commit().await
            };
            let (first, second) = zip(pool.commit(), second).await;
            first.and(second)
        };
        let checkpointed = async {
            turns(200).await;
            flushes.set(false);
            // The batch waits by now.
            turns(100).await;
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
            turns(1000).await;
            None
        };
        let early = futures_lite::future::or(flushed, waited).await;
        gate.set(false);
        early.is_none()
    });
    assert!(recorded, "FLUSH was answered before the change it covers was recorded");
}

/// A block that only a checkpoint finds to be free was handed out at once, though a read planned before still had it to
/// read: the read brought another volume's data (rule O7).
#[test]
fn block_freed_by_a_checkpoint_waits_for_reads_planned_before() {
    let storage = Gated::new(new_image());
    let read_of = Rc::clone(&storage.read_of);
    with(storage, &Log::new(1), |pool| async move {
        let (volume, other) = (create(&pool, 1, 8 * MIB).await, create(&pool, 2, 1 << 30).await);
        let all = async |byte| {
            let handle = pool.open_volume(volume, false).unwrap();
            drop(handle.write(0, &memory(byte, 1024), false).await.unwrap());
        };
        all(1).await;
        let shared = snapshot(&pool, volume, 3).await;
        pool.delete_volume(shared).await.unwrap();
        pool.settle().await.unwrap();
        let at = pool
            .attempt(|state| Ok(state.leaf(TreeKey::Volume(volume), 10)?.unwrap().entry(10).address))
            .await
            .unwrap();
        read_of.set(at.offset_bytes());
        let handle = pool.open_volume(volume, true).unwrap();
        let into = IoMemory::zeroed(BLOCK_BYTES as usize);
        let reading = handle.read(10 * BLOCK_BYTES, &into);
        let changing = async {
            // Not exclusive by birth, so nobody knows yet that nothing holds the blocks any more.
            all(2).await;
            pool.checkpoint().await.unwrap();
            let filled = fill(&pool, other, 9);
            let opened = async {
                turns(3000).await;
                read_of.set(u64::MAX);
            };
            zip(filled, opened).await;
        };
        let (read, ()) = zip(reading, changing).await;
        read.unwrap();
        assert_eq!(into.to_vec()[0], 1, "the read brought what another volume wrote");
        assert_clean(&pool).await;
    });
}

/// Attributes are written before the record that names them. A checkpoint between the two counted their blocks, and
/// replaying the record counted them again: they were never free any more.
#[test]
fn attributes_written_before_a_checkpoint_are_counted_once() {
    let storage = Gated::new(new_image());
    let (gate, image) = (Rc::clone(&storage.writes), storage.inner.clone());
    with(storage, &Log::new(1), |pool| async move {
        let attributes = BTreeMap::from([("key".to_owned(), vec![1; 6000])]);
        gate.set(true);
        let creating = pool.create_volume(NewVolume { attributes, ..new_volume(1, 8 * MIB) });
        let checkpointing = async {
            turns(100).await;
            let checkpointed = pool.checkpoint();
            let opened = async {
                turns(100).await;
                gate.set(false);
            };
            zip(checkpointed, opened).await.0.unwrap();
        };
        zip(creating, checkpointing).await.0.unwrap();
    });
    with(MemoryStorage::from_image(image.snapshot_image()), &Log::new(2), |pool| async move {
        let volume = pool.volume("v1").unwrap().id;
        assert_eq!(pool.attributes(volume).await.unwrap()["key"], vec![1; 6000]);
        assert_clean(&pool).await;
        pool.delete_volume(volume).await.unwrap();
        assert_clean(&pool).await;
    });
}

/// Attributes whose volume is not made after all were counted for ever.
#[test]
fn attributes_of_a_refused_volume_come_free() {
    let storage = Gated::new(new_image());
    let gate = Rc::clone(&storage.writes);
    with(storage, &Log::new(1), |pool| async move {
        let attributes = BTreeMap::from([("key".to_owned(), vec![1; 6000])]);
        let first = NewVolume { attributes, ..new_volume(1, MIB) };
        let second = NewVolume { uuid: Uuid::from_u128(2), ..first.clone() };
        drop(pool.create_volume(NewVolume { attributes: BTreeMap::new(), ..first.clone() }).await.unwrap());
        pool.delete_volume(pool.volume("v1").unwrap().id).await.unwrap();
        let used = pool.check().await.unwrap().used_blocks;
        // Both pass the first look at the name.
        gate.set(true);
        let both = zip(pool.create_volume(first), pool.create_volume(second));
        let opened = async {
            turns(100).await;
            gate.set(false);
        };
        let ((first, second), ()) = zip(both, opened).await;
        assert_ne!(first.is_ok(), second.is_ok());
        assert_clean(&pool).await;
        pool.delete_volume(pool.volume("v1").unwrap().id).await.unwrap();
        assert_clean(&pool).await;
        assert_eq!(pool.check().await.unwrap().used_blocks, used);
    });
}

/// Two discards that overlap held the blocks at their edges while each waited for what lay between: for ever.
#[test]
fn overlapping_discards_with_odd_edges_both_end() {
    let storage = Gated::new(new_image());
    let gate = Rc::clone(&storage.writes);
    with(storage, &Log::new(1), |pool| async move {
        let volume = create(&pool, 1, 8 * MIB).await;
        for block in 0..16 {
            write(&pool, volume, block, 1).await;
        }
        let handle = pool.open_volume(volume, false).unwrap();
        let discard = async |first: u64, last: u64| {
            let offset = first * BLOCK_BYTES + 512;
            drop(handle.discard(offset, last * BLOCK_BYTES + 512 - offset).await.unwrap());
        };
        let both = async {
            zip(discard(0, 9), discard(5, 12)).await;
            true
        };
        gate.set(true);
        let waited = async {
            turns(100).await;
            gate.set(false);
            turns(5000).await;
            false
        };
        assert!(futures_lite::future::or(both, waited).await, "they wait for each other");
        assert_eq!(first_byte(&pool, volume, 0).await, 1);
        assert_eq!(first_byte(&pool, volume, 7).await, 0);
        assert_clean(&pool).await;
    });
}

/// Every volume whose record changed needs a new pair of blocks at the next checkpoint. Nobody kept them back: on a full
/// pool with many volumes in use the checkpoint found none and the pool was poisoned.
#[test]
fn full_pool_keeps_blocks_for_the_records_of_its_volumes() {
    with(MemoryStorage::from_image(new_image()), &Log::new(1), |pool| async move {
        let mut volumes = Vec::new();
        for number in 0..120 {
            let volume = create(&pool, 100 + number, 300 * MIB).await;
            write(&pool, volume, 0, 1).await;
            write(&pool, volume, 1, 1).await;
            write(&pool, volume, 70000, 1).await;
            snapshot(&pool, volume, 1000 + number).await;
            volumes.push(volume);
        }
        pool.checkpoint().await.unwrap();
        let ballast = create(&pool, 1, 1 << 30).await;
        fill(&pool, ballast, 9).await;
        for volume in volumes {
            // A discard of one block of a shared leaf takes metadata and gives nothing back. It may be refused.
            let handle = pool.open_volume(volume, false).unwrap();
            match handle.discard(0, BLOCK_BYTES).await {
                Ok(held) => drop(held),
                Err(Error::NoSpace(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_clean(&pool).await;
    });
}

//! Space of hosts that have little of it, or that keep what they have.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;

use async_executor::LocalExecutor;
use futures_lite::future::{block_on, yield_now};

use super::growth::Use;
use super::tests::{memory, new_volume, uuid};
use super::*;
use crate::error::Error;
use crate::io::{IoMemory, MemoryStorage, holes_between};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};

const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 512 * MIB;

/// Memory on a host that has so many blocks more, and perhaps cannot punch.
#[derive(Clone)]
struct Host {
    inner: MemoryStorage,
    backed: Rc<RefCell<HashSet<u64>>>,
    left: Rc<Cell<u64>>,
    punches: bool,
}

impl Host {
    fn new(inner: MemoryStorage, left: u64, punches: bool) -> Self {
        let backed = inner.snapshot_image().written_blocks().into_iter().collect();
        Self { inner, backed: Rc::new(RefCell::new(backed)), left: Rc::new(Cell::new(left)), punches }
    }

    /// What holds zeros only is given back behind the pool's back (`fallocate --dig-holes`): that is all its free space.
    fn dig_holes(&self) {
        let image = self.inner.snapshot_image();
        self.backed.borrow_mut().retain(|block| {
            let mut bytes = [0; BLOCK_SIZE];
            image.read(block * BLOCK_BYTES, &mut bytes);
            bytes != [0; BLOCK_SIZE]
        });
    }

    /// Gives a range its blocks, all or none.
    fn back(&self, range: &Range<u64>) -> io::Result<()> {
        let mut backed = self.backed.borrow_mut();
        let missing: Vec<u64> = (range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES))
            .filter(|block| !backed.contains(block))
            .collect();
        let Some(left) = self.left.get().checked_sub(missing.len() as u64) else {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        };
        self.left.set(left);
        backed.extend(missing);
        Ok(())
    }
}

/// What an operation comes to that the host allows or not.
fn after<F: Future<Output = io::Result<()>> + 'static>(
    allowed: io::Result<()>,
    operation: impl FnOnce() -> F,
) -> Pin<Box<dyn Future<Output = io::Result<()>>>> {
    let issued = allowed.map(|()| operation());
    Box::pin(async move { issued?.await })
}

impl Storage for Host {
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
        self.inner.read(offset, into)
    }
    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        let backed = self.back(&(offset..offset + from.len() as u64));
        after(backed, || self.inner.write(offset, from))
    }
    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.write(offset, from)
    }
    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.flush()
    }
    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        after(self.back(&range), || self.inner.extend(range))
    }
    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        let allowed = if self.punches { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) };
        after(allowed, || {
            let mut backed = self.backed.borrow_mut();
            let blocks = range.start / BLOCK_BYTES..range.end / BLOCK_BYTES;
            self.left.set(self.left.get() + blocks.filter(|block| backed.remove(block)).count() as u64);
            self.inner.punch(range)
        })
    }
    fn holes(&self, range: Range<u64>) -> Vec<Range<u64>> {
        holes_between(&range, |block| self.backed.borrow().contains(&block))
    }
}

fn new_pool() -> MemoryStorage {
    let storage = MemoryStorage::new(POOL_BYTES);
    let options = CreateOptions { uuid: uuid(1), name: "pool".into(), size_bytes: POOL_BYTES, journal_bytes: 4 * MIB };
    block_on(Pool::create(&storage, &options)).unwrap();
    storage
}

/// Opens a pool, runs `body` beside its background work and closes it.
fn with<T, F: Future<Output = T>>(host: &Host, body: impl FnOnce(Pool<Host>) -> F) -> T {
    let executor = Rc::new(LocalExecutor::new());
    block_on(executor.run(async {
        let pool = Pool::open(host.clone(), Box::new(PrivateLog::new(1)), OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let done = body(pool.clone()).await;
        pool.close().await.unwrap();
        task.await;
        done
    }))
}

async fn create(pool: &Pool<Host>, name: &str) -> VolumeId {
    pool.create_volume(new_volume(name, 256 * MIB)).await.unwrap().id
}

async fn fill(pool: &Pool<Host>, id: VolumeId, mib: Range<u64>, blocks: usize) -> crate::error::Result<()> {
    let handle = pool.open_volume(id, false)?;
    let content = memory(&vec![7; blocks << 12]);
    for at in (mib.start * MIB..mib.end * MIB).step_by(blocks << 12) {
        drop(handle.write(at, &content, false).await?);
    }
    Ok(())
}

/// A pool with 64 MiB in use, and holes where 128 MiB were.
fn pool_with_holes() -> MemoryStorage {
    let host = Host::new(new_pool(), u64::MAX / 2, true);
    with(&host, |pool| async move {
        let (kept, gone) = (create(&pool, "kept").await, create(&pool, "gone").await);
        fill(&pool, gone, 0..128, 256).await.unwrap();
        fill(&pool, kept, 0..64, 256).await.unwrap();
        pool.delete_volume(gone).await.unwrap();
        pool.settle().await.unwrap();
        pool.trim().await.unwrap();
    });
    host.inner
}

/// The host refuses 8 MiB at a time and has some blocks all the same; or has none. What is there is read and overwritten, the
/// pool is closed with a checkpoint, and nothing is poisoned.
#[test]
fn pool_with_holes_opens_on_a_host_with_little_left() {
    for left in [1700, 2500] {
        let host = Host::new(pool_with_holes(), left, true);
        host.dig_holes();
        let written = with(&host, |pool| async move {
            let kept = pool.volume("kept").unwrap().id;
            fill(&pool, kept, 0..64, 1).await.unwrap();
            let other = create(&pool, "other").await;
            let mut written = 0;
            while fill(&pool, other, written..written + 1, 256).await.is_ok() {
                written += 1;
            }
            assert!(pool.poison_error().is_none());
            written
        });
        assert!(written <= left / 256, "{written} MiB were written on a host that had {left} blocks");
    }
}

/// No commit and no checkpoint is to fail for host space: without room for the ring the pool is not opened, and is opened when
/// there is some.
#[test]
fn pool_whose_ring_the_host_cannot_hold_is_not_opened() {
    let host = Host::new(pool_with_holes(), 900, true);
    host.dig_holes();
    let opened = block_on(Pool::open(host.clone(), Box::new(PrivateLog::new(1)), OpenOptions::default()));
    assert!(matches!(opened.err(), Some(Error::NoSpace(_))));
    host.left.set(100_000);
    with(&host, |pool| async move {
        let id = create(&pool, "other").await;
        fill(&pool, id, 0..64, 256).await.unwrap();
    });
}

/// A group that the host has and that is not in memory yet is used, though it refuses the holes of another.
#[test]
fn what_the_host_has_elsewhere_is_used_when_it_refuses_holes() {
    let host = Host::new(new_pool(), u64::MAX / 2, true);
    with(&host, |pool| async move {
        let (first, second) = (create(&pool, "first").await, create(&pool, "second").await);
        fill(&pool, first, 0..110, 256).await.unwrap();
        fill(&pool, second, 0..110, 256).await.unwrap();
        pool.delete_volume(first).await.unwrap();
        pool.settle().await.unwrap();
        pool.trim().await.unwrap();
        // Its blocks come free by the checkpoint of closing: the host keeps them.
        pool.delete_volume(second).await.unwrap();
    });
    let host = Host::new(host.inner, 2500, true);
    let written = with(&host, |pool| async move {
        pool.settle().await.unwrap();
        pool.checkpoint().await.unwrap();
        let other = create(&pool, "other").await;
        let mut written = 0;
        while written < 100 && fill(&pool, other, written..written + 1, 256).await.is_ok() {
            written += 1;
        }
        written
    });
    assert!(written >= 60, "{written} MiB");
}

/// What it keeps is as good as it was: it is not written with zeros before it is used again, and not tried again.
#[test]
fn host_that_cannot_punch_keeps_its_blocks_as_they_are() {
    let host = Host::new(new_pool(), u64::MAX / 2, false);
    with(&host, |pool| async move {
        let first = create(&pool, "first").await;
        fill(&pool, first, 0..128, 256).await.unwrap();
        pool.delete_volume(first).await.unwrap();
        pool.settle().await.unwrap();
        pool.trim().await.unwrap();
        assert_eq!(pool.counters().blocks_punched, 0);
        assert!(pool.info().ready_bytes >= 128 * MIB, "{}", pool.info().ready_bytes);
        let before = pool.counters().blocks_extended;
        let second = create(&pool, "second").await;
        fill(&pool, second, 0..64, 1).await.unwrap();
        assert_eq!(pool.counters().blocks_extended, before);
    });
}

/// Long writes have space reserved for them, and metadata cannot use that: what it wants is written, however much has been
/// reserved, and takes no more of the pool than it needs.
#[test]
fn metadata_wants_blocks_that_are_written() {
    let host = Host::new(new_pool(), u64::MAX / 2, true);
    with(&host, |pool| async move {
        let id = create(&pool, "v").await;
        fill(&pool, id, 0..64, 256).await.unwrap();
        let groups = pool.counters().groups_appended;
        pool.make_room(6000, Use::Metadata, None, 0).await.unwrap();
        assert!(pool.inner.state.borrow().allocator.fresh() >= 6000);
        assert!(pool.counters().groups_appended <= groups + 1, "{} groups", pool.counters().groups_appended);
    });
}

/// Whoever writes meanwhile has blocks made ready, which the trim does not run after.
#[test]
fn trim_ends_though_somebody_writes() {
    let host = Host::new(pool_with_holes(), u64::MAX / 2, true);
    with(&host, |pool| async move {
        let id = create(&pool, "v").await;
        let is_done = Rc::new(Cell::new(false));
        let (writer, stop) = (pool.clone(), Rc::clone(&is_done));
        let writes = async move {
            let mut turn = 0;
            while !stop.get() {
                fill(&writer, id, turn % 200..turn % 200 + 1, 1).await.unwrap();
                let handle = writer.open_volume(id, false).unwrap();
                drop(handle.discard(turn % 200 * MIB, MIB).await.unwrap());
                drop(handle);
                turn += 1;
                yield_now().await;
            }
            turn
        };
        let trims = async {
            let trimmed = pool.trim().await;
            is_done.set(true);
            trimmed
        };
        let (turns, trimmed) = futures_lite::future::zip(writes, trims).await;
        trimmed.unwrap();
        assert!(turns > 0);
    });
}

#[test]
fn full_host_is_an_error_of_space() {
    let host = Host::new(pool_with_holes(), 4000, true);
    let outcome = with(&host, |pool| async move {
        let id = create(&pool, "v").await;
        fill(&pool, id, 0..200, 256).await
    });
    assert!(matches!(outcome, Err(Error::NoSpace(_))), "{outcome:?}");
}

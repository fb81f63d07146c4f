//! The engine on memory: one behaviour each.

use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;

use async_executor::LocalExecutor;
use uuid::Uuid;

use super::*;
use crate::error::Error;
use crate::io::{IoMemory, MemoryImage, MemoryStorage};
use crate::units::VolumeId;

const GIB: u64 = 1 << 30;

pub(super) fn uuid(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// Runs a test's body beside the pool's background work.
pub(super) fn with_pool<T, F: Future<Output = T>>(body: impl FnOnce(Pool<MemoryStorage>) -> F) -> T {
    let storage = MemoryStorage::new(2 * GIB);
    futures_lite::future::block_on(async {
        let options = CreateOptions { uuid: uuid(1), name: "pool".into(), size_bytes: 2 * GIB, journal_bytes: 4 << 20 };
        Pool::create(&storage, &options).await.unwrap();
    });
    with_image(storage.snapshot_image(), 1, body)
}

pub(super) fn with_image<T, F: Future<Output = T>>(
    image: MemoryImage,
    session: u128,
    body: impl FnOnce(Pool<MemoryStorage>) -> F,
) -> T {
    let storage = MemoryStorage::from_image(image);
    let executor = Rc::new(LocalExecutor::new());
    futures_lite::future::block_on(executor.run(async {
        let log = Box::new(PrivateLog::new(session));
        let pool = Pool::open(storage, log, OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let done = body(pool).await;
        drop(task);
        done
    }))
}

/// Runs a test's body on a pool that takes nothing apart by itself.
pub(super) fn without_worker<T, F: Future<Output = T>>(
    image: MemoryImage,
    session: u128,
    body: impl FnOnce(Pool<MemoryStorage>) -> F,
) -> T {
    let storage = MemoryStorage::from_image(image);
    let executor = LocalExecutor::new();
    futures_lite::future::block_on(executor.run(async {
        let log = Box::new(PrivateLog::new(session));
        let pool = Pool::open(storage, log, OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move {
            futures_lite::future::zip(background.run_commits(), background.run_checkpoints()).await
        });
        let done = body(pool).await;
        drop(task);
        done
    }))
}

pub(super) fn memory(bytes: &[u8]) -> IoMemory {
    let memory = IoMemory::zeroed(bytes.len());
    memory.write(0, bytes);
    memory
}

pub(super) fn new_volume(name: &str, size_bytes: u64) -> NewVolume {
    NewVolume {
        uuid: Uuid::new_v4(),
        name: name.into(),
        size_bytes,
        sector_size: 512,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 0,
        attributes: BTreeMap::new(),
    }
}

pub(super) fn new_snapshot(name: &str) -> NewSnapshot {
    NewSnapshot { uuid: Uuid::new_v4(), name: name.into(), created: 0, attributes: BTreeMap::new() }
}

pub(super) fn new_clone(name: &str) -> NewClone {
    NewClone { uuid: Uuid::new_v4(), name: name.into(), created: 0, size_bytes: None, attributes: BTreeMap::new() }
}

pub(super) async fn fill(pool: &Pool<MemoryStorage>, id: VolumeId, offset: u64, length: usize, byte: u8) {
    let handle = pool.open_volume(id, false).unwrap();
    drop(handle.write(offset, &memory(&vec![byte; length]), false).await.unwrap());
}

pub(super) async fn bytes(pool: &Pool<MemoryStorage>, id: VolumeId, offset: u64, length: usize) -> Vec<u8> {
    let handle = pool.open_volume(id, true).unwrap();
    let into = IoMemory::zeroed(length);
    handle.read(offset, &into).await.unwrap();
    let mut bytes = vec![0; length];
    into.read(0, &mut bytes);
    bytes
}

pub(super) async fn assert_clean(pool: &Pool<MemoryStorage>) {
    pool.settle().await.unwrap();
    let report = pool.check().await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.faults);
}

#[test]
fn volume_reads_what_was_written_and_zeros_elsewhere() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        fill(&pool, volume, 512, 10000 / 512 * 512, 7).await;
        let read = bytes(&pool, volume, 0, 12288).await;
        assert!(read[..512].iter().all(|byte| *byte == 0));
        assert!(read[512..512 + 9728].iter().all(|byte| *byte == 7));
        assert!(read[512 + 9728..].iter().all(|byte| *byte == 0));
        assert_eq!(pool.volume("v").unwrap().own_bytes, 3 * 4096);
        assert_clean(&pool).await;
    });
}

#[test]
fn snapshot_keeps_its_content_when_the_origin_changes() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        fill(&pool, volume, 0, 1 << 20, 1).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        fill(&pool, volume, 4096, 4096, 2).await;
        let clone = pool.create_clone(snapshot, new_clone("c")).await.unwrap().id;
        fill(&pool, clone, 8192, 4096, 3).await;
        assert_eq!(bytes(&pool, snapshot, 0, 12288).await, vec![1; 12288]);
        assert_eq!(bytes(&pool, volume, 4096, 4096).await, vec![2; 4096]);
        assert_eq!(bytes(&pool, clone, 4096, 4096).await, vec![1; 4096]);
        assert_eq!(bytes(&pool, clone, 8192, 4096).await, vec![3; 4096]);
        assert_eq!(pool.volume("c").unwrap().own_bytes, 4096);
        assert_clean(&pool).await;
        pool.delete_volume(snapshot).await.unwrap();
        pool.delete_volume(volume).await.unwrap();
        assert_clean(&pool).await;
        assert_eq!(bytes(&pool, clone, 0, 4096).await, vec![1; 4096]);
        pool.delete_volume(clone).await.unwrap();
        assert_clean(&pool).await;
    });
}

#[test]
fn unclean_pool_is_replayed_and_holds_what_was_flushed() {
    let image = std::cell::RefCell::new(None);
    let storage = MemoryStorage::new(2 * GIB);
    let executor = Rc::new(LocalExecutor::new());
    futures_lite::future::block_on(executor.run(async {
        let options = CreateOptions { uuid: uuid(1), name: "pool".into(), size_bytes: 2 * GIB, journal_bytes: 4 << 20 };
        Pool::create(&storage, &options).await.unwrap();
        let storage = MemoryStorage::from_image(storage.snapshot_image());
        let pool = Pool::open(storage, Box::new(PrivateLog::new(5)), OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        fill(&pool, volume, 0, 1 << 20, 1).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        fill(&pool, volume, 4096, 4096, 2).await;
        pool.roll_back(volume, snapshot, Some(new_snapshot("kept"))).await.unwrap();
        fill(&pool, volume, 8192, 4096, 3).await;
        let handle = pool.open_volume(volume, false).unwrap();
        drop(handle.discard(0, 4096).await.unwrap());
        handle.flush().await.unwrap();
        *image.borrow_mut() = Some(pool.inner.storage.snapshot_image());
        drop(task);
    }));
    with_image(image.take().unwrap(), 9, |pool| async move {
        assert!(pool.counters().records_replayed > 4);
        let volume = pool.volume("v").unwrap().id;
        let kept = pool.volume("kept").unwrap().id;
        assert_eq!(bytes(&pool, volume, 0, 4096).await, vec![0; 4096]);
        assert_eq!(bytes(&pool, volume, 4096, 4096).await, vec![1; 4096]);
        assert_eq!(bytes(&pool, volume, 8192, 4096).await, vec![3; 4096]);
        assert_eq!(bytes(&pool, kept, 4096, 4096).await, vec![2; 4096]);
        assert_clean(&pool).await;
        pool.close().await.unwrap();
    });
}

#[test]
fn discard_of_a_shared_subtree_takes_own_bytes_down_exactly() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        for mib in 0..300 {
            fill(&pool, volume, mib << 20, 4096, 1).await;
        }
        pool.create_snapshot(volume, new_snapshot("s")).await.unwrap();
        for mib in 0..20 {
            fill(&pool, volume, mib << 20, 4096, 2).await;
        }
        let handle = pool.open_volume(volume, false).unwrap();
        drop(handle.discard(0, 290 << 20).await.unwrap());
        drop(handle);
        pool.settle().await.unwrap();
        assert_eq!(pool.volume("v").unwrap().own_bytes, 10 * 4096);
        assert_clean(&pool).await;
    });
}

/// What the checkpoint freed waited for somebody to leave an epoch. On a pool at rest nobody did.
#[test]
fn pool_at_rest_gives_back_what_its_last_checkpoint_freed() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("one", GIB)).await.unwrap();
        fill(&pool, volume.id, 0, 64 << 20, 1).await;
        pool.create_snapshot(volume.id, new_snapshot("kept")).await.unwrap();
        let kept = pool.volumes().iter().find(|info| info.name == "kept").unwrap().id;
        pool.delete_volume(volume.id).await.unwrap();
        pool.delete_volume(kept).await.unwrap();
        pool.settle().await.unwrap();
        pool.checkpoint().await.unwrap();
        for _ in 0..50 {
            pool.tick();
            for _ in 0..100 {
                futures_lite::future::yield_now().await;
            }
        }
        let punched = pool.counters().blocks_punched;
        assert!(punched >= (32 << 20) / 4096, "{punched} blocks punched");
    });
}

/// A fuzzer's pools were slow: SEEK_DATA went through the holes of a volume of 16 TiB leaf by leaf, 16 million of them.
#[test]
fn seek_passes_over_missing_subtrees_as_a_whole() {
    with_pool(|pool| async move {
        let size = 16 << 40;
        let volume = pool.create_volume(new_volume("v", size)).await.unwrap().id;
        let after = |block| pool.inner.state.borrow().after_hole(state::TreeKey::Volume(volume), block);
        assert_eq!(after(0), 1 << 32, "nothing is mapped at all");
        fill(&pool, volume, 0, 4096, 1).await;
        fill(&pool, volume, size - 4096, 4096, 2).await;
        assert_eq!(after(256), 512, "a leaf is missing in a node");
        assert_eq!(after(65536), 2 * 65536, "a node of leaves is missing");
        assert_eq!(after(1 << 24), 2 << 24, "a node of nodes is missing");
        let handle = pool.open_volume(volume, true).unwrap();
        assert_eq!(handle.seek(4096, true).await.unwrap(), Some(size - 4096));
        assert_eq!(handle.seek(0, false).await.unwrap(), Some(4096));
        assert_eq!(handle.seek(size - 4096, false).await.unwrap(), Some(size));
    });
}

#[test]
fn changed_ranges_are_found_without_reading_what_is_shared() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        fill(&pool, volume, 0, 1 << 20, 1).await;
        let first = pool.create_snapshot(volume, new_snapshot("s1")).await.unwrap().id;
        fill(&pool, volume, 8192, 8192, 2).await;
        let handle = pool.open_volume(volume, false).unwrap();
        drop(handle.discard(65536, 4096).await.unwrap());
        drop(handle);
        let second = pool.create_snapshot(volume, new_snapshot("s2")).await.unwrap().id;
        let ranges = pool.changed_ranges(first, second).await.unwrap();
        let expected = [
            ChangedRange { offset_bytes: 8192, length_bytes: 8192, mapped: true },
            ChangedRange { offset_bytes: 65536, length_bytes: 4096, mapped: false },
        ];
        assert_eq!(ranges, expected);
    });
}

#[test]
fn pages_of_changed_ranges_join_without_gap_or_overlap() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 64 * GIB)).await.unwrap().id;
        fill(&pool, volume, 0, 1 << 20, 1).await;
        let first = pool.create_snapshot(volume, new_snapshot("s1")).await.unwrap().id;
        // Scattered blocks in one leaf, runs over the ends of leaves, and leaves far apart.
        for index in 0..100 {
            fill(&pool, volume, index * 8192, 4096, 2).await;
        }
        for leaf in [3_u64, 4, 300, 60_000, (64 << 10) - 1] {
            fill(&pool, volume, (leaf << 20) - 8192, 16384, 3).await;
        }
        let second = pool.create_snapshot(volume, new_snapshot("s2")).await.unwrap().id;
        for (from, to) in [(Some(first), second), (None, second), (None, volume), (Some(second), first)] {
            let whole = pool.changed_page(from, to, 0, usize::MAX).await.unwrap();
            assert_eq!(whole.next_bytes, None);
            let whole: Vec<_> = blocks(&whole.ranges);
            for most in [1, 2, 50, 1000] {
                let (mut next, mut joined, mut pages) = (Some(0), Vec::new(), 0);
                while let Some(start) = next {
                    let page = pool.changed_page(from, to, start, most).await.unwrap();
                    assert!(page.next_bytes.is_none_or(|next| next > start), "it moves on");
                    joined.extend(blocks(&page.ranges));
                    (next, pages) = (page.next_bytes, pages + 1);
                }
                assert!(most > 1 || pages > 1, "{pages} pages of {most}");
                assert_eq!(joined, whole);
            }
            // From the middle of a range, as after a page of another moment.
            let middle = whole[whole.len() / 2].0;
            let rest = pool.changed_page(from, to, middle, usize::MAX).await.unwrap();
            assert_eq!(blocks(&rest.ranges), whole[whole.len() / 2..]);
        }
    });
}

/// Each block that differs, and whether it is mapped.
fn blocks(ranges: &[ChangedRange]) -> Vec<(u64, bool)> {
    let of = |range: &ChangedRange| {
        (range.offset_bytes..range.offset_bytes + range.length_bytes)
            .step_by(4096)
            .map(|at| (at, range.mapped))
            .collect()
    };
    ranges.iter().flat_map(|range: &ChangedRange| -> Vec<(u64, bool)> { of(range) }).collect()
}

#[test]
fn full_pool_refuses_new_blocks_and_recovers_by_discard() {
    let storage = MemoryStorage::new(256 << 20);
    futures_lite::future::block_on(async {
        let options =
            CreateOptions { uuid: uuid(1), name: "pool".into(), size_bytes: 160 << 20, journal_bytes: 4 << 20 };
        Pool::create(&storage, &options).await.unwrap();
    });
    with_image(storage.snapshot_image(), 1, |pool| async move {
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        let handle = pool.open_volume(volume, false).unwrap();
        let block = memory(&vec![5; 1 << 20]);
        let mut written = 0;
        let error = loop {
            match handle.write(written << 20, &block, false).await {
                Ok(held) => drop(held),
                Err(error) => break error,
            }
            written += 1;
        };
        assert!(matches!(error, Error::NoSpace(_)), "{error}");
        assert!(written > 100, "{written} {error} {:?}", pool.info());
        // In place still works, and so does giving back.
        drop(handle.write(0, &block, false).await.unwrap());
        drop(handle.discard(0, 64 << 20).await.unwrap());
        drop(handle.write(200 << 20, &block, false).await.unwrap());
        drop(handle);
        assert_clean(&pool).await;
    });
}

#[test]
fn names_and_sizes_are_checked() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", GIB)).await.unwrap();
        assert!(matches!(pool.create_volume(new_volume("v", GIB)).await, Err(Error::AlreadyExists(_))));
        assert!(matches!(pool.create_volume(new_volume("", GIB)).await, Err(Error::InvalidInput(_))));
        assert!(matches!(pool.create_volume(new_volume("w", 0)).await, Err(Error::InvalidInput(_))));
        assert!(matches!(pool.create_volume(new_volume("w", 4097)).await, Err(Error::InvalidInput(_))));
        let again = NewVolume { uuid: volume.uuid, ..new_volume("v", GIB) };
        assert_eq!(pool.create_volume(again).await.unwrap().id, volume.id);
        pool.protect_volume(volume.id, true).await.unwrap();
        assert!(matches!(pool.delete_volume(volume.id).await, Err(Error::ReadOnly(_))));
        pool.set_attributes(volume.id, BTreeMap::from([("k".into(), Some(b"v".to_vec()))])).await.unwrap();
        assert_eq!(pool.attributes(volume.id).await.unwrap(), BTreeMap::from([("k".to_owned(), b"v".to_vec())]));
        assert_clean(&pool).await;
    });
}

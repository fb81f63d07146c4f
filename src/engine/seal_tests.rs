//! Sealing, the checksums it leaves, and reads that are held against them.

use super::tests::{assert_clean, bytes, fill, new_clone, new_snapshot, new_volume, with_image, with_pool};
use super::*;
use crate::error::{Check, Error, Structure};
use crate::io::{IoMemory, MemoryStorage};
use crate::units::{BLOCK_BYTES, PoolBlock, VolumeId};

const MIB: u64 = 1 << 20;

/// Where the volume's block at `offset` stands.
async fn place_of(pool: &Pool<MemoryStorage>, id: VolumeId, offset: u64) -> PoolBlock {
    pool.attempt(|state| state.extents(id, offset, BLOCK_BYTES)).await.unwrap()[0].at.expect("mapped")
}

/// Blocks that have a checksum, and asserts that none of them is free.
async fn checksummed(pool: &Pool<MemoryStorage>) -> u64 {
    let geometry = pool.inner.state.borrow().geometry;
    let groups = pool.inner.state.borrow().groups_in_use;
    let mut found = 0;
    for group in 0..groups {
        for index in geometry.layout_blocks(group)..geometry.group_blocks(group) {
            let block = geometry.group_start(group).plus(index);
            if pool.attempt(|state| state.data_checksum(block)).await.unwrap().is_some() {
                found += 1;
                let count = pool.attempt(|state| state.exact_count(block)).await.unwrap();
                assert!(count > 0, "block {block} is free and has a checksum");
            }
        }
    }
    found
}

#[test]
fn sealed_snapshot_has_a_checksum_for_each_block_after_reopening() {
    let (image, digest) = with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 100 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, MIB as usize, 1).await;
        fill(&pool, volume, 70 * MIB, 8192, 2).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        assert!(matches!(pool.seal(volume, Pace::Full).await, Err(Error::InvalidInput(_))));
        let report = pool.seal(snapshot, Pace::Full).await.unwrap();
        assert_eq!((report.blocks_read, report.blocks_sealed), (258, 258));
        let info = pool.volume("s").unwrap();
        assert!(info.sealed && info.digest == Some(report.digest));
        assert!(!pool.volume("v").unwrap().sealed);
        assert_eq!(checksummed(&pool).await, 258);
        // Again: nothing to do.
        assert_eq!(pool.seal(snapshot, Pace::Full).await.unwrap().blocks_read, 0);
        assert_clean(&pool).await;
        (pool.inner.storage.snapshot_image(), report.digest)
    });
    with_image(image, 2, |pool| async move {
        assert_eq!(pool.volume("s").unwrap().digest, Some(digest));
        assert_eq!(checksummed(&pool).await, 258);
        assert_clean(&pool).await;
    });
}

#[test]
fn equal_content_has_an_equal_digest_in_any_pool() {
    let straight = with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 100 * MIB)).await.unwrap().id;
        fill(&pool, volume, 4096, 8192, 1).await;
        fill(&pool, volume, 50 * MIB, 4096, 2).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        pool.seal(snapshot, Pace::Full).await.unwrap().digest
    });
    with_pool(|pool| async move {
        // The same by a long way: other blocks, zeros instead of holes, snapshots between, a clone.
        let first = pool.create_volume(new_volume("first", 100 * MIB)).await.unwrap().id;
        fill(&pool, first, 60 * MIB, MIB as usize, 9).await;
        fill(&pool, first, 50 * MIB, 4096, 7).await;
        let base = pool.create_snapshot(first, new_snapshot("base")).await.unwrap().id;
        pool.seal(base, Pace::Full).await.unwrap();
        let clone = pool.create_clone(base, new_clone("clone")).await.unwrap().id;
        fill(&pool, clone, 60 * MIB, MIB as usize, 0).await;
        fill(&pool, clone, 4096, 8192, 1).await;
        let middle = pool.create_snapshot(clone, new_snapshot("middle")).await.unwrap().id;
        assert_ne!(pool.seal(middle, Pace::Full).await.unwrap().digest, straight);
        fill(&pool, clone, 50 * MIB, 4096, 2).await;
        let last = pool.create_snapshot(clone, new_snapshot("last")).await.unwrap().id;
        assert_eq!(pool.seal(last, Pace::Full).await.unwrap().digest, straight);
    });
}

#[test]
fn sealing_the_next_snapshot_reads_only_what_changed() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 200 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 64 * MIB as usize, 1).await;
        let one = pool.create_snapshot(volume, new_snapshot("1")).await.unwrap().id;
        assert_eq!(pool.seal(one, Pace::Full).await.unwrap().blocks_read, 64 * 256);
        fill(&pool, volume, 10 * MIB, 4096, 2).await;
        fill(&pool, volume, 90 * MIB, 4096, 3).await;
        drop(pool.open_volume(volume, false).unwrap().discard(20 * MIB, MIB).await.unwrap());
        let two = pool.create_snapshot(volume, new_snapshot("2")).await.unwrap().id;
        let report = pool.seal(two, Pace::Full).await.unwrap();
        // Old and new content of one, the new of another, the old of 256 that are gone.
        assert_eq!((report.blocks_read, report.blocks_sealed), (2 + 1 + 256, 2));
        // From the later to the earlier, too.
        assert_eq!(pool.counters().seal_blocks_read, 64 * 256 + 259);
        // A clone starts where its snapshot was.
        let clone = pool.create_clone(two, new_clone("c")).await.unwrap().id;
        fill(&pool, clone, 0, 4096, 4).await;
        let three = pool.create_snapshot(clone, new_snapshot("3")).await.unwrap().id;
        assert_eq!(pool.seal(three, Pace::Full).await.unwrap().blocks_read, 2);
        assert_clean(&pool).await;
    });
}

#[test]
fn block_that_comes_free_loses_its_checksum() {
    with_pool(|pool| async move {
        for round in 0..4 {
            let volume = pool.create_volume(new_volume("v", 100 * MIB)).await.unwrap().id;
            fill(&pool, volume, 0, 4 * MIB as usize, round).await;
            let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
            assert_eq!(pool.seal(snapshot, Pace::Full).await.unwrap().blocks_sealed, 1024);
            fill(&pool, volume, 0, MIB as usize, 100 + round).await;
            assert_eq!(checksummed(&pool).await, 1024);
            pool.delete_volume(snapshot).await.unwrap();
            pool.settle().await.unwrap();
            pool.checkpoint().await.unwrap();
            // What the volume still shares keeps its checksums.
            assert_eq!(checksummed(&pool).await, 768);
            pool.delete_volume(volume).await.unwrap();
            pool.settle().await.unwrap();
            pool.checkpoint().await.unwrap();
            assert_eq!(checksummed(&pool).await, 0);
        }
        assert_clean(&pool).await;
    });
}

#[test]
fn snapshot_that_is_deleted_while_it_is_sealed_leaves_no_checksum() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 100 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 16 * MIB as usize, 1).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        pool.delete_volume(volume).await.unwrap();
        let delete = async {
            futures_lite::future::yield_now().await;
            pool.delete_volume(snapshot).await.unwrap();
        };
        let (sealed, ()) = futures_lite::future::zip(pool.seal(snapshot, Pace::Full), delete).await;
        assert!(matches!(sealed, Err(Error::NotFound(_))), "{sealed:?}");
        pool.settle().await.unwrap();
        pool.checkpoint().await.unwrap();
        assert_eq!(checksummed(&pool).await, 0);
        assert_clean(&pool).await;
    });
}

#[test]
fn damaged_block_of_a_sealed_snapshot_is_not_returned() {
    let (image, bad) = with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 100 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 65536, 1).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        pool.seal(snapshot, Pace::Full).await.unwrap();
        pool.create_clone(snapshot, new_clone("c")).await.unwrap();
        pool.close().await.unwrap();
        let bad = place_of(&pool, snapshot, 8192).await;
        (pool.inner.storage.snapshot_image(), bad)
    });
    let mut image = image;
    image.write(bad.offset_bytes() + 700, &[0]);
    let read = async |pool: &Pool<MemoryStorage>, name: &str, offset: u64, length: usize| {
        let handle = pool.open_volume(pool.volume(name).unwrap().id, true).unwrap();
        let into = IoMemory::zeroed(length);
        handle.read(offset, &into).await
    };
    with_image(image, 2, |pool| async move {
        // Nobody asked for it.
        assert!(read(&pool, "s", 8192, 4096).await.is_ok());
        let clone = pool.volume("c").unwrap().id;
        pool.verify_volume_on_read(clone, true).await.unwrap();
        for (offset, length) in [(8192, 4096), (8192 + 512, 512), (0, 65536), (4096 + 512, 4096)] {
            let Err(Error::Corrupt(found)) = read(&pool, "c", offset, length).await else { panic!("at {offset}") };
            assert_eq!((found.structure, found.address), (Structure::Data, bad));
            assert!(matches!(found.check, Check::Checksum { .. }));
        }
        assert!(read(&pool, "s", 8192, 4096).await.is_ok(), "only the clone is verified");
        for (offset, length) in [(0, 8192), (12288, 65536), (12288 + 1024, 1536)] {
            assert!(read(&pool, "c", offset, length).await.is_ok());
        }
        // What is written over is good again.
        fill(&pool, clone, 8192, 4096, 5).await;
        assert_eq!(bytes(&pool, clone, 8192, 4096).await, vec![5; 4096]);
        assert_eq!(pool.counters().checksum_mismatches, 4);
        pool.verify_pool_on_read(true).await.unwrap();
        assert!(read(&pool, "s", 8192, 4096).await.is_err());
        assert_eq!(bytes(&pool, clone, 512, 1024).await, vec![1; 1024]);
    });
}

#[test]
fn snapshots_are_sealed_in_the_background_when_they_have_lasted() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 100 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 3 * MIB as usize, 1).await;
        pool.create_snapshot(volume, new_snapshot("s")).await.unwrap();
        pool.seal_in_background(MIB);
        let wait = async |ticks: u32| {
            for _ in 0..ticks {
                pool.tick();
                for _ in 0..2000 {
                    futures_lite::future::yield_now().await;
                }
            }
        };
        wait(60).await;
        assert_eq!(pool.counters().blocks_sealed, 0);
        wait(2).await;
        let sealed = pool.counters().blocks_sealed;
        assert!((256..768).contains(&sealed), "{sealed} blocks at 256 a second");
        wait(5).await;
        assert!(pool.volume("s").unwrap().sealed);
    });
}

#[test]
fn answer_about_what_another_call_makes_is_durable_too() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 4096, 1).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        let durable = || {
            let state = pool.inner.state.borrow();
            (state.journal.durable(), state.journal.last())
        };
        let made = new_volume("w", MIB);
        let first = pool.create_volume(made.clone());
        let second = async {
            // The first has made it by now, and waits for its record.
            futures_lite::future::yield_now().await;
            let answer = pool.create_volume(made.clone()).await;
            assert_eq!(durable().0, durable().1);
            answer
        };
        let (first, second) = futures_lite::future::zip(first, second).await;
        assert_eq!(first.unwrap(), second.unwrap());
        let seals = [pool.seal(snapshot, Pace::Full), pool.seal(snapshot, Pace::Full)].map(Box::pin);
        let [one, other] = seals;
        let durable_after = async |seal: std::pin::Pin<Box<dyn Future<Output = Result<SealReport, Error>> + '_>>| {
            let report = seal.await.unwrap();
            assert_eq!(durable().0, durable().1);
            report.digest
        };
        let (one, other) = futures_lite::future::zip(durable_after(one), durable_after(other)).await;
        assert_eq!(one, other);
    });
}

//! A full pool, and volumes whose writes wait for space.

use futures_lite::future::{poll_once, yield_now, zip};

use super::tests::{assert_clean, bytes, fill, memory, new_snapshot, new_volume, with_pool};
use super::*;
use crate::error::Error;
use crate::io::MemoryStorage;
use crate::units::VolumeId;

const MIB: u64 = 1 << 20;

/// Fills the pool from a volume of its own; answers that volume.
async fn fill_up(pool: &Pool<MemoryStorage>) -> VolumeId {
    let ballast = pool.create_volume(new_volume("ballast", 4 << 30)).await.unwrap().id;
    let handle = pool.open_volume(ballast, false).unwrap();
    let mut at = 0;
    for length in [MIB, 4096] {
        while let Ok(held) = handle.write_zeroes(at, length, false).await {
            drop(held);
            at += length;
        }
    }
    handle.flush().await.unwrap();
    ballast
}

/// Lets a second pass, and everything happen that can.
async fn tick(pool: &Pool<MemoryStorage>) {
    pool.tick();
    for _ in 0..3000 {
        yield_now().await;
    }
}

/// The host is full under a block that a former session left unbacked.
#[test]
fn write_that_the_host_has_no_space_for_waits_likewise() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 64 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 4096, 1).await;
        let handle = pool.open_volume(volume, false).unwrap();
        let (content, refuse) = (memory(&[2; 4096]), || pool.inner.storage.fail_operation(0, libc::ENOSPC));
        refuse();
        assert!(matches!(handle.write(0, &content, false).await, Err(Error::NoSpace(_))));
        assert_eq!(bytes(&pool, volume, 0, 4096).await, vec![1; 4096], "nothing has changed");
        pool.set_on_full(volume, true).await.unwrap();
        for offset in [0, MIB] {
            refuse();
            let mut writing = Box::pin(handle.write(offset, &content, false));
            while pool.waiting_for_space() == 0 {
                assert!(poll_once(&mut writing).await.is_none());
                yield_now().await;
            }
            tick(&pool).await;
            drop(writing.await.unwrap());
            assert_eq!(bytes(&pool, volume, offset, 4096).await, vec![2; 4096]);
        }
        assert_clean(&pool).await;
    });
}

#[test]
fn write_waits_for_space_and_goes_on_when_there_is_some() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 64 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 4096, 1).await;
        let ballast = fill_up(&pool).await;
        let handle = pool.open_volume(volume, false).unwrap();
        assert!(matches!(handle.write(MIB, &memory(&[2; 4096]), false).await, Err(Error::NoSpace(_))));
        pool.set_on_full(volume, true).await.unwrap();
        assert!(pool.volume("v").unwrap().waits_when_full);
        let content = memory(&vec![3; 65536]);
        let mut writing = Box::pin(handle.write(MIB, &content, true));
        for _ in 0..3 {
            assert!(poll_once(&mut writing).await.is_none());
            tick(&pool).await;
        }
        // It has looked for room again, in vain.
        while pool.waiting_for_space() == 0 {
            assert!(poll_once(&mut writing).await.is_none());
            yield_now().await;
        }
        // Nobody else waits for it: what needs no space goes on, in the same range too.
        assert_eq!(bytes(&pool, volume, 0, 4096).await, vec![1; 4096]);
        assert_eq!(bytes(&pool, volume, MIB, 4096).await, vec![0; 4096]);
        fill(&pool, volume, 0, 4096, 4).await;
        handle.flush().await.unwrap();
        drop(handle.discard(MIB, 4096).await.unwrap());
        let other = pool.open_volume(ballast, false).unwrap();
        assert!(matches!(other.write(3 << 30, &memory(&[9; 4096]), false).await, Err(Error::NoSpace(_))));
        drop(other.discard(0, 64 * MIB).await.unwrap());
        other.flush().await.unwrap();
        let free = async {
            for _ in 0..5 {
                tick(&pool).await;
            }
        };
        let (written, ()) = zip(writing, free).await;
        drop(written.unwrap());
        assert_eq!(pool.waiting_for_space(), 0);
        assert_eq!(bytes(&pool, volume, MIB, 65536).await, vec![3; 65536]);
        drop((handle, other));
        assert_clean(&pool).await;
    });
}

#[test]
fn waiting_has_an_end_and_so_has_the_number_of_those_who_wait() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 64 * MIB)).await.unwrap().id;
        pool.set_on_full(volume, true).await.unwrap();
        fill_up(&pool).await;
        pool.bound_waiting(2, 10);
        let handle = pool.open_volume(volume, false).unwrap();
        let content = memory(&[2; 4096]);
        let mut writes: Vec<_> = (0..3).map(|at| Box::pin(handle.write(at * MIB, &content, false))).collect();
        let mut refused = Vec::new();
        for second in 0..12 {
            for index in (0..writes.len()).rev() {
                if let Some(outcome) = poll_once(&mut writes[index]).await {
                    assert!(matches!(outcome, Err(Error::NoSpace(_))));
                    refused.push(second);
                    drop(writes.remove(index));
                }
            }
            tick(&pool).await;
        }
        let at_once = refused.iter().filter(|second| **second < 3).count();
        assert!(at_once == 1 && refused.len() == 3, "two wait, one does not: {refused:?}");
        assert!(refused.iter().filter(|second| **second >= 3).all(|second| *second >= 8), "{refused:?}");
        // A quota is not space.
        pool.set_quota(volume, 4096).await.unwrap();
        drop(writes);
        drop(handle);
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await;
        assert!(snapshot.is_ok(), "administration goes on in a full pool: {snapshot:?}");
    });
}

#[test]
fn full_pool_grows_by_itself_up_to_its_limit() {
    with_pool(|pool| async move {
        let size = pool.info().size_bytes;
        pool.set_size_limit(3 << 30).await.unwrap();
        assert!(matches!(pool.set_size_limit(12345).await, Err(Error::InvalidInput(_))));
        // Without somebody who makes the file larger it stays as it is.
        let ballast = fill_up(&pool).await;
        assert_eq!(pool.info().size_bytes, size);
        let storage = pool.inner.storage.clone();
        pool.enlarge_with(move |bytes| {
            storage.grow(bytes);
            Ok(())
        });
        let volume = pool.create_volume(new_volume("v", 4 << 30)).await.unwrap().id;
        let handle = pool.open_volume(volume, false).unwrap();
        let mut at = 0;
        while let Ok(held) = handle.write_zeroes(at, MIB, false).await {
            drop(held);
            at += MIB;
        }
        assert_eq!(pool.info().size_bytes, 3 << 30);
        assert!(at > 900 * MIB, "{at} bytes more fitted");
        drop(handle);
        pool.delete_volume(ballast).await.unwrap();
        assert_clean(&pool).await;
    });
}

/// Writes a volume's first `bytes`, and discards the blocks of even number again.
async fn every_other_block(pool: &Pool<MemoryStorage>, volume: VolumeId, bytes: u64) -> VolumeHandle<MemoryStorage> {
    fill(pool, volume, 0, bytes as usize, 1).await;
    let handle = pool.open_volume(volume, false).unwrap();
    for block in (0..bytes / 4096).step_by(2) {
        drop(handle.discard(block * 4096, 4096).await.unwrap());
    }
    for _ in 0..5 {
        tick(pool).await;
    }
    handle
}

/// The holes that a trim had left between blocks in use kept these from being a run when they came free.
#[test]
fn what_is_freed_among_holes_is_given_back() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 256 * MIB)).await.unwrap().id;
        let handle = every_other_block(&pool, volume, 128 * MIB).await;
        pool.trim().await.unwrap();
        let before = pool.counters().blocks_punched;
        drop(handle.discard(0, 256 * MIB).await.unwrap());
        drop(handle);
        pool.settle().await.unwrap();
        pool.checkpoint().await.unwrap();
        for _ in 0..50 {
            tick(&pool).await;
        }
        // 64 MiB came free; 32 MiB are kept ready, and 8 MiB for metadata.
        let (punched, ready_bytes) = (pool.counters().blocks_punched - before, pool.info().ready_bytes);
        assert!(punched >= 24 * MIB / 4096 && ready_bytes <= 41 * MIB, "{punched} blocks punched, {ready_bytes} ready");
        assert_clean(&pool).await;
    });
}

#[test]
fn trim_gives_single_blocks_back() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 64 * MIB)).await.unwrap().id;
        let handle = every_other_block(&pool, volume, 16 * MIB).await;
        let before = pool.counters().blocks_punched;
        pool.trim().await.unwrap();
        assert!(pool.counters().blocks_punched >= before + 2048, "{} punched", pool.counters().blocks_punched - before);
        assert_eq!(bytes(&pool, volume, 4096, 4096).await, vec![1; 4096]);
        drop(handle);
        assert_clean(&pool).await;
    });
}

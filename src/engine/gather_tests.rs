//! What long reads bring together, and what they leave alone.

use futures_lite::future::yield_now;

use super::tests::{assert_clean, fill, memory, new_clone, new_snapshot, new_volume, with_pool};
use super::{Memory, Pool, VolumeHandle};
use crate::error::Error;
use crate::io::{IoMemory, MemoryStorage};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};

const BLOCKS: u64 = 64;
const LENGTH: u64 = BLOCKS * BLOCK_BYTES;

/// A volume whose first blocks were written one by one, in an order that leaves no two of them together.
async fn scattered(pool: &Pool<MemoryStorage>) -> VolumeId {
    let id = pool.create_volume(new_volume("v", 1 << 30)).await.unwrap().id;
    for block in (0..BLOCKS).map(|number| number * 37 % BLOCKS) {
        fill(pool, id, block * BLOCK_BYTES, BLOCK_SIZE, block as u8 + 1).await;
    }
    id
}

fn runs(pool: &Pool<MemoryStorage>, id: VolumeId) -> usize {
    let extents = pool.inner.state.borrow_mut().extents(id, 0, LENGTH);
    extents.unwrap_or_else(|_| panic!("its leaf is in memory")).len()
}

async fn read(handle: &VolumeHandle<MemoryStorage>) {
    let into = IoMemory::zeroed(LENGTH as usize);
    handle.read(0, &into).await.unwrap();
    for block in 0..BLOCKS {
        let mut bytes = [0; BLOCK_SIZE];
        into.read(block as usize * BLOCK_SIZE, &mut bytes);
        assert_eq!(bytes, [block as u8 + 1; BLOCK_SIZE], "block {block}");
    }
}

/// Lets the background go as far as it comes.
async fn pause() {
    for _ in 0..1000 {
        yield_now().await;
    }
}

#[test]
fn blocks_that_are_read_together_are_brought_together() {
    with_pool(|pool| async move {
        let id = scattered(&pool).await;
        assert!(runs(&pool, id) > 32, "{} runs", runs(&pool, id));
        let own = pool.volume("v").unwrap().own_bytes;
        let handle = pool.open_volume(id, false).unwrap();
        read(&handle).await;
        pause().await;
        assert_eq!((runs(&pool, id), pool.counters().blocks_gathered), (1, BLOCKS));
        assert_eq!(pool.volume("v").unwrap().own_bytes, own);
        // Once is enough.
        read(&handle).await;
        pause().await;
        assert_eq!(pool.counters().blocks_gathered, BLOCKS);
        drop(handle);
        assert_clean(&pool).await;
    });
}

#[test]
fn shared_blocks_stay_where_they_are() {
    with_pool(|pool| async move {
        let id = scattered(&pool).await;
        pool.create_snapshot(id, new_snapshot("s")).await.unwrap();
        let snapshot = pool.volume("s").unwrap().id;
        let clone = pool.create_clone(snapshot, new_clone("c")).await.unwrap().id;
        for id in [id, clone] {
            let handle = pool.open_volume(id, false).unwrap();
            read(&handle).await;
            pause().await;
        }
        read(&pool.open_volume(snapshot, true).unwrap()).await;
        pause().await;
        assert_eq!(pool.counters().blocks_gathered, 0);
        assert_clean(&pool).await;
    });
}

/// Waiting for the last of what is gathered must not become waiting for the load: of a volume in use, some range is always held.
#[test]
fn volume_under_load_grows_and_is_not_deleted() {
    with_pool(|pool| async move {
        let id = scattered(&pool).await;
        let handle = pool.open_volume(id, false).unwrap();
        let held = handle.write(0, &memory(&[1; BLOCK_SIZE]), false).await.unwrap();
        assert!(matches!(pool.delete_volume(id).await, Err(Error::Busy(_))));
        assert!(matches!(pool.resize_volume(id, 1 << 20).await, Err(Error::Busy(_))));
        pool.resize_volume(id, 2 << 30).await.unwrap();
        drop(held);
        drop(handle);
        pool.delete_volume(id).await.unwrap();
        assert_clean(&pool).await;
    });
}

#[test]
fn writes_and_deletion_during_gathering_are_not_lost() {
    with_pool(|pool| async move {
        let id = scattered(&pool).await;
        let handle = pool.open_volume(id, false).unwrap();
        for turns in 0..200 {
            read(&handle).await;
            for _ in 0..turns {
                yield_now().await;
            }
            // The same content, to blocks that may be on their way.
            let block = turns % BLOCKS;
            let bytes = vec![block as u8 + 1; BLOCK_SIZE];
            drop(handle.write(block * BLOCK_BYTES, &memory(&bytes), false).await.unwrap());
            if turns % 5 == 0 {
                // What is shared now is scattered again by the next writes.
                let name = format!("s{turns}");
                pool.create_snapshot(id, new_snapshot(&name)).await.unwrap();
                pool.delete_volume(pool.volume(&name).unwrap().id).await.unwrap();
                for block in (0..BLOCKS).map(|number| number * 37 % BLOCKS) {
                    fill(&pool, id, block * BLOCK_BYTES, BLOCK_SIZE, block as u8 + 1).await;
                }
            }
        }
        assert!(pool.counters().blocks_gathered > 100 * BLOCKS / 5, "{} blocks", pool.counters().blocks_gathered);
        read(&handle).await;
        drop(handle);
        // Whatever is still under way, nobody has it open: it goes at once.
        pool.delete_volume(id).await.unwrap();
        assert_clean(&pool).await;
        assert_eq!(pool.volumes().len(), 0);
    });
}

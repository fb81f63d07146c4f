//! What the worker reads.

use super::tests::{fill, new_snapshot, new_volume, with_pool, without_worker};
use crate::units::BLOCK_BYTES;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Leaves with a block each.
const LEAVES: u64 = 300;

#[test]
fn leaves_of_a_scattered_volume_are_read_together() {
    let image = with_pool(|pool| async move {
        let id = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        for leaf in 0..LEAVES {
            fill(&pool, id, leaf * MIB, BLOCK_BYTES as usize, 1).await;
        }
        pool.checkpoint().await.unwrap();
        pool.inner.storage.snapshot_image()
    });
    without_worker(image, 2, |pool| async move {
        let id = pool.volume("v").unwrap().id;
        pool.delete_volume(id).await.unwrap();
        pool.commit().await.unwrap();
        let (mut steps, mut most) = (0, 0);
        while !pool.inner.state.borrow().carcasses.is_empty() {
            let before = pool.counters().nodes_read;
            pool.eat_something().await.unwrap();
            most = most.max(pool.counters().nodes_read - before);
            steps += 1;
            assert!(steps < 100, "it comes to an end");
        }
        assert!(most >= 128, "at most {most} nodes were read in a step");
        // Two nodes above; each leaf once.
        assert!(pool.counters().nodes_read <= LEAVES + 8, "{} nodes were read", pool.counters().nodes_read);
    });
}

#[test]
fn leaves_that_others_hold_are_not_read() {
    let image = with_pool(|pool| async move {
        let id = pool.create_volume(new_volume("v", GIB)).await.unwrap().id;
        for leaf in 0..LEAVES {
            fill(&pool, id, leaf * MIB, BLOCK_BYTES as usize, 1).await;
        }
        pool.create_snapshot(id, new_snapshot("s")).await.unwrap();
        // The path to it is the volume's own from here on, the other leaves are not.
        fill(&pool, id, 5 * MIB, BLOCK_BYTES as usize, 2).await;
        pool.checkpoint().await.unwrap();
        pool.inner.storage.snapshot_image()
    });
    without_worker(image, 2, |pool| async move {
        let id = pool.volume("v").unwrap().id;
        pool.delete_volume(id).await.unwrap();
        pool.settle().await.unwrap();
        assert!(pool.counters().nodes_read <= 8, "{} nodes were read", pool.counters().nodes_read);
    });
}

//! Snapshot and clone are O(1): they cost the same for an empty volume and one with a million scattered blocks.

use plywood::engine::Counters;
use plywood::units::VolumeId;

use crate::blank_storage::Requests;
use crate::world::{GIB, World};

const MILLION: u64 = 1_000_000;

/// What an operation and the checkpoint after it cost.
#[derive(Debug, PartialEq, Eq)]
struct Cost {
    nodes_read: u64,
    nodes_written: u64,
    nodes_shadowed: u64,
    pages_written: u64,
    metadata_bytes: u64,
    requests: Requests,
    used_bytes: u64,
}

impl Cost {
    /// What does not depend on where in the pool the counts of blocks stand.
    fn without_counts(&self) -> (u64, u64, u64, u64, u64) {
        (self.nodes_read, self.nodes_written, self.nodes_shadowed, self.requests.flushes, self.used_bytes)
    }
}

/// Counts what `work` does. Caches are cold before it and nothing is dirty.
async fn cost_of<T>(world: &World, checkpointed: bool, work: impl Future<Output = T>) -> (Cost, T) {
    let pool = &world.pool;
    pool.checkpoint().await.unwrap();
    pool.drop_caches();
    let (before, requests, used) = (pool.counters(), world.storage.requests(), pool.info().used_bytes);
    let done = work.await;
    if checkpointed {
        pool.checkpoint().await.unwrap();
    }
    let (after, now) = (pool.counters(), world.storage.requests());
    let difference = |of: fn(&Counters) -> u64| of(&after) - of(&before);
    let cost = Cost {
        nodes_read: difference(|counters| counters.nodes_read),
        nodes_written: difference(|counters| counters.nodes_written),
        nodes_shadowed: difference(|counters| counters.nodes_shadowed),
        pages_written: difference(|counters| counters.pages_written),
        metadata_bytes: difference(|counters| counters.metadata_bytes_written),
        requests: Requests {
            reads: now.reads - requests.reads,
            read_bytes: now.read_bytes - requests.read_bytes,
            writes: now.writes - requests.writes,
            written_bytes: now.written_bytes - requests.written_bytes,
            flushes: now.flushes - requests.flushes,
        },
        used_bytes: pool.info().used_bytes - used,
    };
    (cost, done)
}

/// An empty volume and one with a million blocks of which no two are neighbours, each in a pool of its own, so that both
/// are the only volume and stand at the same place of the table.
fn empty_and_scattered() -> [(World, VolumeId); 2] {
    [0, MILLION].map(|blocks| {
        let world = World::new(64 * GIB);
        let volume = world.run(async {
            let volume = world.volume(32 * GIB).await;
            if blocks > 0 {
                world.scatter(volume, blocks).await;
                assert_eq!(world.pool.volume_by_id(volume).unwrap().mapped_bytes, MILLION * 4096);
            }
            volume
        });
        (world, volume)
    })
}

#[test]
fn snapshot_and_clone_cost_the_same_empty_and_with_a_million_scattered_blocks() {
    let costs = empty_and_scattered().map(|(world, volume)| {
        world.run(async {
            let (snapshot_cost, snapshot) = cost_of(&world, false, world.snapshot(volume)).await;
            let (clone_cost, _) = cost_of(&world, false, world.clone_of(snapshot)).await;
            let (snapshot_and_checkpoint, _) = cost_of(&world, true, world.snapshot(volume)).await;
            let (clone_and_checkpoint, _) = cost_of(&world, true, world.clone_of(snapshot)).await;
            [snapshot_cost, clone_cost, snapshot_and_checkpoint, clone_and_checkpoint]
        })
    });
    let [empty, scattered] = costs;
    assert_eq!(empty[..2], scattered[..2], "until they are acknowledged they do the very same");
    let names = ["snapshot", "clone", "snapshot + checkpoint", "clone + checkpoint"];
    for ((name, empty), scattered) in names.into_iter().zip(empty).zip(scattered) {
        println!("{name}: {empty:?}\n  with a million blocks: {scattered:?}");
        assert_eq!(empty.nodes_read, 0, "{name} loads no node of the map");
        assert_eq!(empty.without_counts(), scattered.without_counts(), "{name}");
        // The one count that changes in a mapped volume, its root's, may stand in a page and a group of its own.
        assert!(scattered.pages_written <= empty.pages_written + 1, "{name}");
        assert!(scattered.metadata_bytes <= empty.metadata_bytes + 3 * 4096, "{name}");
    }
}

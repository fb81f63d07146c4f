//! Reads do not get slower with the depth of the chain (P8): the map has no layers to go through.

use fastrand::Rng;
use plywood::units::{BLOCK_BYTES, VolumeId};

use crate::world::{GIB, World, read_block, write_block};

const SEED: u64 = 8;
const DEPTH: u32 = 1000;
const SIZE: u64 = 2 * GIB;
/// Blocks that each layer overwrites, anywhere.
const OVERWRITTEN: u64 = 32;
/// Blocks that are read.
const READS: u64 = 500;

/// Nodes loaded by the same random reads, each with a cold cache.
async fn nodes_loaded(world: &World, volume: VolumeId) -> u64 {
    let mut random = Rng::with_seed(SEED);
    let handle = world.handle(volume);
    let before = world.pool.counters().nodes_read;
    for _ in 0..READS {
        world.pool.drop_caches();
        read_block(&handle, random.u64(..SIZE / BLOCK_BYTES)).await;
    }
    world.pool.counters().nodes_read - before
}

#[test]
fn read_at_depth_1000_loads_as_many_nodes_as_at_depth_1() {
    let world = World::new(16 * GIB);
    world.run(async {
        let mut random = Rng::with_seed(SEED + 1);
        let mut volume = world.volume(SIZE).await;
        world.fill(volume).await;
        let first = world.snapshot(volume).await;
        let mut snapshot = first;
        for layer in 0..DEPTH / 2 {
            // A snapshot and a clone of it are a step of two.
            if layer > 0 {
                snapshot = world.snapshot(volume).await;
            }
            volume = world.clone_of(snapshot).await;
            let handle = world.handle(volume);
            for _ in 0..OVERWRITTEN {
                write_block(&handle, random.u64(..SIZE / BLOCK_BYTES)).await;
            }
        }
        world.pool.checkpoint().await.unwrap();
        let (shallow, deep) = (world.pool.volume_by_id(first).unwrap(), world.pool.volume_by_id(volume).unwrap());
        assert_eq!((shallow.depth, deep.depth), (1, DEPTH));
        let loaded = [nodes_loaded(&world, first).await, nodes_loaded(&world, volume).await];
        println!("nodes loaded by {READS} cold reads: {loaded:?} at depths 1 and {DEPTH}");
        // The root, a node and a leaf each.
        assert_eq!(loaded, [3 * READS, 3 * READS]);
    });
}

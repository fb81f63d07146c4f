//! For how long does a checkpoint of 8192 dirty leaves hold up a write?
//!
//! The time is that of the slowest of the writes that were made one after the other while the checkpoint ran. The storage
//! completes at once, so this is what the engine's thread does without a pause.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use plywood::units::{BLOCK_BYTES, VolumeId};
use world::{GIB, World, write_block};

const SIZE: u64 = 8 * GIB;
const LEAF_BLOCKS: u64 = 256;

/// Dirties every leaf of a clone, starts a checkpoint, and answers the slowest write beside it.
async fn slowest(world: &World, snapshot: VolumeId) -> Duration {
    let clone = world.clone_of(snapshot).await;
    let handle = world.handle(clone);
    for leaf in 0..SIZE / BLOCK_BYTES / LEAF_BLOCKS {
        write_block(&handle, leaf * LEAF_BLOCKS).await;
    }
    let pool = world.pool.clone();
    let checkpoint = world.executor.spawn(async move { pool.checkpoint().await.expect("checkpoint") });
    let writer = handle.clone();
    let slowest = world.executor.spawn(async move {
        let mut slowest = Duration::ZERO;
        while !checkpoint.is_finished() {
            let begun = Instant::now();
            write_block(&writer, 0).await;
            futures_lite::future::yield_now().await;
            slowest = slowest.max(begun.elapsed());
        }
        slowest
    });
    let slowest = slowest.await;
    drop(handle);
    world.pool.delete_volume(clone).await.expect("delete");
    world.pool.settle().await.expect("settle");
    world.pool.checkpoint().await.expect("checkpoint");
    slowest
}

fn stall(criterion: &mut Criterion) {
    let world = World::new(64 * GIB);
    let snapshot = world.run(async {
        let volume = world.volume(SIZE).await;
        world.fill(volume).await;
        world.snapshot(volume).await
    });
    let mut group = criterion.benchmark_group("stall");
    group.throughput(Throughput::Elements(1)).sample_size(10);
    group.bench_function("slowest write beside a checkpoint", |bencher| {
        bencher.iter_custom(|count| (0..count).map(|_| world.run(slowest(&world, snapshot))).sum());
    });
    group.finish();
}

criterion_group!(benches, stall);
criterion_main!(benches);

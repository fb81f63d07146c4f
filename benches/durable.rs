//! What does it cost to make changes durable: a commit by its records, a checkpoint by its dirty nodes, and replaying them?
//!
//! The storage completes at once: this is the engine's own time, without a flush. Writes are to a clone, so that each has a record.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures_lite::future;
use plywood::engine::{OpenOptions, Pool, PrivateLog};
use plywood::units::{BLOCK_BYTES, VolumeId};
use world::{GIB, World, write_block};

const SIZE: u64 = 8 * GIB;
const LEAF_BLOCKS: u64 = 256;

/// A world with a snapshot of a full volume, everything in a checkpoint.
fn full() -> (World, VolumeId) {
    let world = World::new(64 * GIB);
    let snapshot = world.run(async {
        let volume = world.volume(SIZE).await;
        world.fill(volume).await;
        let snapshot = world.snapshot(volume).await;
        world.pool.checkpoint().await.expect("checkpoint");
        snapshot
    });
    (world, snapshot)
}

/// Writes blocks of a new clone, times what is done then, and takes the clone away again.
async fn timed(world: &World, snapshot: VolumeId, blocks: impl Iterator<Item = u64>, commit: bool) -> Duration {
    let clone = world.clone_of(snapshot).await;
    world.pool.commit().await.expect("commit");
    let handle = world.handle(clone);
    for block in blocks {
        write_block(&handle, block).await;
    }
    if !commit {
        world.pool.commit().await.expect("commit");
    }
    let begun = Instant::now();
    if commit {
        world.pool.commit().await.expect("commit");
    } else {
        world.pool.checkpoint().await.expect("checkpoint");
    }
    let time = begun.elapsed();
    drop(handle);
    world.pool.delete_volume(clone).await.expect("delete");
    world.pool.settle().await.expect("settle");
    world.pool.checkpoint().await.expect("checkpoint");
    time
}

fn commit(criterion: &mut Criterion) {
    let (world, snapshot) = full();
    let mut group = criterion.benchmark_group("commit");
    group.sample_size(10);
    for records in [1, 16, 256, 4096] {
        group.throughput(Throughput::Elements(records));
        group.bench_function(BenchmarkId::new("records", records), |bencher| {
            // Every other block, so that no two share a record.
            let blocks = || (0..records).map(|index| index * 2);
            bencher.iter_custom(|count| (0..count).map(|_| world.run(timed(&world, snapshot, blocks(), true))).sum());
        });
    }
    group.finish();
}

fn checkpoint(criterion: &mut Criterion) {
    let (world, snapshot) = full();
    let mut group = criterion.benchmark_group("checkpoint");
    group.sample_size(10);
    for leaves in [1, 16, 256, 4096] {
        group.throughput(Throughput::Elements(leaves));
        group.bench_function(BenchmarkId::new("dirty leaves", leaves), |bencher| {
            let blocks = || (0..leaves).map(|leaf| leaf * LEAF_BLOCKS);
            bencher.iter_custom(|count| (0..count).map(|_| world.run(timed(&world, snapshot, blocks(), false))).sum());
        });
    }
    group.finish();
}

fn replay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("replay");
    group.sample_size(10);
    for records in [256, 4096, 65536] {
        let (world, snapshot) = full();
        world.run(async {
            let clone = world.clone_of(snapshot).await;
            let handle = world.handle(clone);
            for index in 0..records {
                write_block(&handle, (index * 31) % (SIZE / BLOCK_BYTES)).await;
            }
            world.pool.commit().await.expect("commit");
        });
        // The pool is not closed, and its background does not run on: what follows opens it as after a crash.
        group.throughput(Throughput::Elements(records));
        group.bench_function(BenchmarkId::new("records", records), |bencher| {
            bencher.iter_custom(|count| {
                let mut time = Duration::ZERO;
                for session in 0..count {
                    let storage = world.storage.copied();
                    let begun = Instant::now();
                    let log = Box::new(PrivateLog::new(2 + u128::from(session)));
                    let pool = future::block_on(Pool::open(storage, log, OpenOptions::default())).expect("open");
                    time += begun.elapsed();
                    drop(pool);
                }
                time
            });
        });
    }
    group.finish();
}

criterion_group!(benches, commit, checkpoint, replay);
criterion_main!(benches);

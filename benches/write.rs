//! What does the engine do for a 4 KiB write, by what has to become of the map?
//!
//! The storage completes at once and copies nothing: this is the engine alone.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use plywood::units::BLOCK_BYTES;
use world::{GIB, World, write_block};

const SEED: u64 = 1;
const SIZE: u64 = 8 * GIB;
const LEAF_BLOCKS: u64 = 256;
/// So few that they are in the processor's caches.
const HOT_LEAVES: u64 = 64;

/// A full volume, everything in a checkpoint.
fn full() -> (World, plywood::units::VolumeId) {
    let world = World::new(64 * GIB);
    let volume = world.run(async {
        let volume = world.volume(SIZE).await;
        world.fill(volume).await;
        world.pool.checkpoint().await.expect("checkpoint");
        volume
    });
    (world, volume)
}

fn in_place(criterion: &mut Criterion) {
    let (world, volume) = full();
    let handle = world.handle(volume);
    let mut random = Rng::with_seed(SEED);
    let mut group = criterion.benchmark_group("write");
    group.throughput(Throughput::Elements(1));
    for (name, blocks) in [("in place", SIZE / BLOCK_BYTES), ("in place, 64 leaves", HOT_LEAVES * LEAF_BLOCKS)] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let blocks: Vec<u64> = (0..count).map(|_| random.u64(..blocks)).collect();
                world.run(async {
                    let begun = Instant::now();
                    for block in blocks {
                        write_block(&handle, block).await;
                    }
                    begun.elapsed()
                })
            });
        });
    }
    group.bench_function("in place, FLUSH", |bencher| {
        bencher.iter_custom(|count| {
            let blocks: Vec<u64> = (0..count).map(|_| random.u64(..SIZE / BLOCK_BYTES)).collect();
            world.run(async {
                let begun = Instant::now();
                for block in blocks {
                    write_block(&handle, block).await;
                    handle.flush().await.expect("flush");
                }
                begun.elapsed()
            })
        });
    });
    group.finish();
}

/// Times `count` writes to clones of a full volume; `blocks` answers which to write to one clone before they are timed,
/// and which are timed. The clones are deleted and everything is settled outside the time.
fn clones(
    world: &World,
    snapshot: plywood::units::VolumeId,
    count: u64,
    flush: bool,
    mut blocks: impl FnMut() -> (Vec<u64>, Vec<u64>),
) -> Duration {
    let mut left = count;
    let mut time = Duration::ZERO;
    while left > 0 {
        let (before, timed) = blocks();
        time += world.run(async {
            let clone = world.clone_of(snapshot).await;
            let handle = world.handle(clone);
            for block in before {
                write_block(&handle, block).await;
            }
            world.pool.commit().await.expect("commit");
            let begun = Instant::now();
            let mut done = 0;
            for block in timed.into_iter().take(left as usize) {
                write_block(&handle, block).await;
                if flush {
                    handle.flush().await.expect("flush");
                }
                done += 1;
            }
            let time = begun.elapsed();
            left -= done;
            drop(handle);
            world.pool.delete_volume(clone).await.expect("delete");
            world.pool.settle().await.expect("settle");
            world.pool.checkpoint().await.expect("checkpoint");
            time
        });
    }
    time
}

fn redirect(criterion: &mut Criterion) {
    let (world, volume) = full();
    let snapshot = world.run(world.snapshot(volume));
    let mut random = Rng::with_seed(SEED);
    let leaves = SIZE / BLOCK_BYTES / LEAF_BLOCKS;
    let mut group = criterion.benchmark_group("write");
    group.throughput(Throughput::Elements(1));

    let mut once_each = || {
        let mut order: Vec<u64> = (0..leaves).collect();
        random.shuffle(&mut order);
        (Vec::new(), order.into_iter().map(|leaf| leaf * LEAF_BLOCKS + leaf % LEAF_BLOCKS).collect())
    };
    group.bench_function("redirect, first touch of a shared leaf", |bencher| {
        bencher.iter_custom(|count| clones(&world, snapshot, count, false, &mut once_each));
    });

    let mut random = Rng::with_seed(SEED);
    let mut again = || {
        let mut order: Vec<u64> = (0..HOT_LEAVES * LEAF_BLOCKS).filter(|block| block % LEAF_BLOCKS != 0).collect();
        random.shuffle(&mut order);
        ((0..HOT_LEAVES).map(|leaf| leaf * LEAF_BLOCKS).collect(), order)
    };
    group.bench_function("redirect, leaf already exclusive", |bencher| {
        bencher.iter_custom(|count| clones(&world, snapshot, count, false, &mut again));
    });
    group.bench_function("redirect, leaf already exclusive, FLUSH", |bencher| {
        bencher.iter_custom(|count| clones(&world, snapshot, count, true, &mut again));
    });
    group.finish();
}

criterion_group!(benches, in_place, redirect);
criterion_main!(benches);

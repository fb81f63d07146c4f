//! Do reads get slower with the depth of the chain?
//!
//! Each layer has overwritten blocks all over the volume. The storage completes at once and copies no data.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use plywood::units::{BLOCK_BYTES, VolumeId};
use world::{GIB, World, read_block, write_block};

const SEED: u64 = 1;
const SIZE: u64 = 8 * GIB;
const DEPTH: u32 = 1000;
/// Blocks that each layer overwrites.
const OVERWRITTEN: u64 = 64;

/// A chain; answers its snapshot at depth 1 and its clone at depth 1000.
async fn chain(world: &World) -> [VolumeId; 2] {
    let mut random = Rng::with_seed(SEED);
    let mut volume = world.volume(SIZE).await;
    world.fill(volume).await;
    let first = world.snapshot(volume).await;
    let mut snapshot = first;
    for layer in 0..DEPTH / 2 {
        if layer > 0 {
            snapshot = world.snapshot(volume).await;
        }
        volume = world.clone_of(snapshot).await;
        let handle = world.handle(volume);
        for _ in 0..OVERWRITTEN {
            write_block(&handle, random.u64(..SIZE / BLOCK_BYTES)).await;
        }
    }
    world.pool.checkpoint().await.expect("checkpoint");
    [first, volume]
}

fn depth(criterion: &mut Criterion) {
    let world = World::new(64 * GIB);
    let volumes = world.run(chain(&world));
    let mut group = criterion.benchmark_group("depth");
    group.throughput(Throughput::Elements(1));
    for (depth, volume) in [1, DEPTH].into_iter().zip(volumes) {
        assert_eq!(world.pool.volume_by_id(volume).expect("a volume").depth, depth);
        let handle = world.handle(volume);
        for cold in [false, true] {
            let mut random = Rng::with_seed(SEED);
            let name = if cold { "cold" } else { "warm" };
            group.bench_function(BenchmarkId::new(name, depth), |bencher| {
                bencher.iter_custom(|count| {
                    let mut time = Duration::ZERO;
                    world.run(async {
                        for _ in 0..count {
                            let block = random.u64(..SIZE / BLOCK_BYTES);
                            if cold {
                                world.pool.drop_caches();
                            }
                            let begun = Instant::now();
                            read_block(&handle, block).await;
                            time += begun.elapsed();
                        }
                    });
                    time
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, depth);
criterion_main!(benches);

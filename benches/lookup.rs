//! What does it cost to find a block, and so to read it, by the height of the tree, the map being in memory or not?
//!
//! The storage completes at once and copies nothing: this is the engine alone. "found" asks where the next mapped block is,
//! of a block that is: a lookup and nothing else.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use plywood::engine::VolumeHandle;
use plywood::units::BLOCK_BYTES;
use world::{GIB, World, read_block};

const SEED: u64 = 1;

type Handle = VolumeHandle<blank_storage::BlankStorage>;

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    group.throughput(Throughput::Elements(1));
    // Trees of two, three and four levels; what is mapped fits the cache.
    for (name, size_bytes) in [("256 MiB", GIB / 4), ("8 GiB", 8 * GIB), ("1 TiB", 1024 * GIB)] {
        let world = World::new(16 * GIB);
        let volume = world.run(world.volume(size_bytes));
        let handle = world.handle(volume);
        let mapped = size_bytes.min(8 * GIB);
        world.run(async {
            // A volume is only as high as its last block asks for.
            world::write_block(&handle, size_bytes / BLOCK_BYTES - 1).await;
            world.fill_part(volume, 0..mapped).await;
            world.pool.checkpoint().await.expect("checkpoint");
        });
        for (kind, span) in [("mapped at random", mapped), ("mapped, one leaf", 1 << 20)] {
            let mut random = Rng::with_seed(SEED);
            group.bench_function(BenchmarkId::new(kind, name), |bencher| {
                bencher.iter_custom(|count| {
                    let blocks: Vec<u64> = (0..count).map(|_| random.u64(..span / BLOCK_BYTES)).collect();
                    world.run(async {
                        let begun = Instant::now();
                        for block in blocks {
                            read_block(black_box(&handle), block).await;
                        }
                        begun.elapsed()
                    })
                });
            });
        }
        let mut random = Rng::with_seed(SEED);
        group.bench_function(BenchmarkId::new("found", name), |bencher| {
            bencher.iter_custom(|count| {
                let blocks: Vec<u64> = (0..count).map(|_| random.u64(..mapped / BLOCK_BYTES)).collect();
                world.run(found(&handle, &blocks))
            });
        });
        group.bench_function(BenchmarkId::new("found, one leaf", name), |bencher| {
            bencher.iter_custom(|count| {
                let blocks: Vec<u64> = (0..count).map(|_| random.u64(..(1 << 20) / BLOCK_BYTES)).collect();
                world.run(found(&handle, &blocks))
            });
        });
        group.bench_function(BenchmarkId::new("found, cold", name), |bencher| {
            bencher.iter_custom(|count| {
                let mut time = Duration::ZERO;
                for _ in 0..count {
                    world.pool.drop_caches();
                    let block = random.u64(..mapped / BLOCK_BYTES);
                    time += world.run(found(&handle, &[block]));
                }
                time
            });
        });
    }
    group.finish();
}

/// How long it takes to find each of these blocks.
async fn found(handle: &Handle, blocks: &[u64]) -> Duration {
    let begun = Instant::now();
    for block in blocks {
        let at = black_box(handle).seek(block * BLOCK_BYTES, true).await.expect("a lookup");
        black_box(at);
    }
    begun.elapsed()
}

criterion_group!(benches, lookup);
criterion_main!(benches);

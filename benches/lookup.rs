//! What does it cost to find a block, and so to read it, when the map is in memory?
//!
//! The storage completes at once and copies nothing: this is the engine alone.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::hint::black_box;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use plywood::units::BLOCK_BYTES;
use world::{GIB, World, read_block};

const SEED: u64 = 1;

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
    }
    group.finish();
}

criterion_group!(benches, lookup);
criterion_main!(benches);

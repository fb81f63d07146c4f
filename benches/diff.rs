//! What does it cost to tell two volumes of one family apart, by what differs and by what there is?
//!
//! The storage completes at once, and the map is in memory.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use plywood::units::BLOCK_BYTES;
use world::{GIB, World, write_block};

const SEED: u64 = 1;

fn diff(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("diff");
    group.sample_size(20);
    for (size, size_bytes) in [("1 GiB", GIB), ("8 GiB", 8 * GIB)] {
        for changed in [1, 1000] {
            let world = World::new(32 * GIB);
            let (snapshot, clone) = world.run(async {
                let volume = world.volume(size_bytes).await;
                world.fill(volume).await;
                let snapshot = world.snapshot(volume).await;
                let clone = world.clone_of(snapshot).await;
                let handle = world.handle(clone);
                let mut random = Rng::with_seed(SEED);
                for _ in 0..changed {
                    write_block(&handle, random.u64(..size_bytes / BLOCK_BYTES)).await;
                }
                world.pool.checkpoint().await.expect("checkpoint");
                (snapshot, clone)
            });
            group.throughput(Throughput::Elements(changed));
            group.bench_function(BenchmarkId::new(format!("{changed} blocks changed"), size), |bencher| {
                bencher.iter_custom(|count| {
                    world.run(async {
                        let begun = Instant::now();
                        for _ in 0..count {
                            let ranges = world.pool.changed_ranges(snapshot, clone).await.expect("diff");
                            assert!(!ranges.is_empty());
                        }
                        begun.elapsed()
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, diff);
criterion_main!(benches);

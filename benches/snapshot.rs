//! Does a snapshot, or a clone, cost more when there is more to share?
//!
//! The storage completes at once: this is the engine's own time, without the one flush.

#[path = "../tests/cost/blank_storage.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod blank_storage;
#[path = "../tests/cost/world.rs"]
#[allow(dead_code, reason = "what the tests of cost use as well")]
mod world;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use plywood::units::VolumeId;
use world::{GIB, World};

/// How many are made before they are deleted again, outside the time.
const BATCH: u64 = 64;

/// Times `count` calls of `make`, deleting what they made.
fn timed<F: Future<Output = VolumeId>>(world: &World, count: u64, make: impl Fn() -> F) -> Duration {
    world.run(async {
        let mut time = Duration::ZERO;
        let mut left = count;
        while left > 0 {
            let mut made = Vec::new();
            let begun = Instant::now();
            for _ in 0..left.min(BATCH) {
                made.push(make().await);
            }
            time += begun.elapsed();
            left -= made.len() as u64;
            for volume in made {
                world.pool.delete_volume(volume).await.expect("delete");
            }
            world.pool.settle().await.expect("settle");
        }
        time
    })
}

fn snapshot(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot");
    group.throughput(Throughput::Elements(1));
    for (name, size_bytes, blocks) in
        [("empty", 100 * GIB, 0), ("1 M scattered blocks of 100 GiB", 100 * GIB, 1_000_000)]
    {
        let world = World::new(128 * GIB);
        let volume = world.run(async {
            let volume = world.volume(size_bytes).await;
            if blocks > 0 {
                world.scatter(volume, blocks).await;
            }
            world.pool.checkpoint().await.expect("checkpoint");
            volume
        });
        group.bench_function(BenchmarkId::new("snapshot", name), |bencher| {
            bencher.iter_custom(|count| timed(&world, count, || world.snapshot(volume)));
        });
        let origin = world.run(world.snapshot(volume));
        group.bench_function(BenchmarkId::new("clone", name), |bencher| {
            bencher.iter_custom(|count| timed(&world, count, || world.clone_of(origin)));
        });
    }
    group.finish();
}

criterion_group!(benches, snapshot);
criterion_main!(benches);

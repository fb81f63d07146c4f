//! Seeded random operations on a pool in scrambled memory, against a plain model of it.
//!
//! `PLYWOOD_MODEL_SEED` repeats one seed, `PLYWOOD_MODEL_OPERATIONS` says how many operations to run in all.

mod content;
mod met;
mod model;
mod operations;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};

use met::Met;
use world::{End, World};

/// Runs that are the same every time; PLYWOOD_MODEL_FRESH adds one with a fresh seed.
const FIXED_SEEDS: [u64; 4] = [1, 2, 3, 4];
const OPERATIONS: u64 = 120_000;
/// Rounds from one end of the engine to the next, on average.
const ROUNDS_A_LIFE: u32 = 40;

/// Set when a run has failed, so that those beside it need not go on to their end.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Tells how to repeat a run that does not come to its end.
struct Repeat {
    seed: u64,
    operations: u64,
    done: u64,
}

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            FAILED.store(true, Ordering::Relaxed);
            println!(
                "seed {} failed after {} operations; repeat it with:\n  PLYWOOD_MODEL_SEED={} PLYWOOD_MODEL_OPERATIONS={} \
                 cargo test --profile checked --test simulation random_operations -- --nocapture",
                self.seed, self.done, self.seed, self.operations
            );
        }
    }
}

fn run(seed: u64, operations: u64) -> Met {
    let mut repeat = Repeat { seed, operations, done: 0 };
    let mut world = World::new(seed);
    while repeat.done < operations && !FAILED.load(Ordering::Relaxed) {
        let ends = world.random.u32(..ROUNDS_A_LIFE) == 0;
        let end = match world.random.u32(..3) {
            _ if !ends => None,
            0 => Some(End::Closed),
            1 => Some(End::CutOff),
            _ => Some(End::Died),
        };
        repeat.done += world.round(end == Some(End::Died));
        if let Some(end) = end {
            world.reopen(end);
            world.verify();
        }
    }
    world.verify();
    world.reopen(End::Closed);
    world.verify();
    let mut met = world.shared.met.borrow().clone();
    met.operations = repeat.done;
    met
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

#[test]
fn random_operations_equal_the_model() {
    let operations = environment("PLYWOOD_MODEL_OPERATIONS").unwrap_or(OPERATIONS);
    if let Some(seed) = environment("PLYWOOD_MODEL_SEED") {
        let met = run(seed, operations);
        println!("seed {seed}: {met:?}");
        return;
    }
    let fresh = std::env::var_os("PLYWOOD_MODEL_FRESH").map(|_| fastrand::u64(..));
    let seeds: Vec<u64> = FIXED_SEEDS.into_iter().chain(fresh).collect();
    println!("seeds: {seeds:?}");
    let share = operations.div_ceil(seeds.len() as u64);
    let mut met = Met::default();
    std::thread::scope(|scope| {
        let runs: Vec<_> = seeds.iter().map(|seed| scope.spawn(move || run(*seed, share))).collect();
        for run in runs {
            match run.join() {
                Ok(one) => met.merge(&one),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    println!("{} operations", met.operations);
    for (name, count) in met.list() {
        println!("  {name}: {count}");
    }
    assert!(met.operations >= operations);
    let never: Vec<_> = met.list().into_iter().filter(|(_, count)| *count == 0).map(|(name, _)| name).collect();
    assert!(never.is_empty(), "never met, so nothing was shown about: {}", never.join(", "));
}

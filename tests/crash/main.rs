//! Crashes at every moment: the real engine on a medium with a volatile cache, driven by seeded operations from volumes
//! that share blocks; what a power cut or the death of the process may leave is opened, compared with a model, checked,
//! and gone on from.
//!
//! `PLYWOOD_CRASH_SECONDS` (20) or `PLYWOOD_CRASH_STATES` says for how long, `PLYWOOD_CRASH_SEED` with which world to
//! begin, `PLYWOOD_CRASH_THREADS` how many worlds at a time. A failure prints the command that repeats it. With the
//! feature `canary` the rules are broken one by one, and each must be found broken.

mod action;
#[cfg(feature = "canary")]
mod canaries;
mod content;
mod engine;
mod errors;
mod image;
mod log;
mod medium;
mod met;
mod model;
mod operations;
mod request;
mod reserving;
mod seals;
mod stories;
mod task;
mod together;
mod verify;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use met::Met;
use world::World;

/// Prints how to repeat the world that fails.
struct Repeat(u64);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "to repeat: PLYWOOD_CRASH_SEED={} PLYWOOD_CRASH_SECONDS=0 cargo test --profile checked --test crash \
                 crash_at -- --nocapture",
                self.0
            );
        }
    }
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// States after which a long run says how far it is.
const TELL_EVERY: u64 = 100_000;

/// One world from its creation over several crashes.
fn run_world(seed: u64) -> Result<Met, String> {
    let mut world = World::new(seed);
    for _ in 0..world.random.u32(3..12) {
        let events = world.random.u64(50..900);
        world.live(events, 12).map_err(|error| format!("seed {seed}: {error}"))?;
        world.crash().map_err(|error| format!("seed {seed}: {error}"))?;
    }
    Ok(world.shared.met.borrow().clone())
}

#[test]
fn crash_at_any_moment_leaves_what_was_promised() {
    let seconds = from_environment("PLYWOOD_CRASH_SECONDS").unwrap_or(20);
    let states = from_environment("PLYWOOD_CRASH_STATES").unwrap_or(0);
    // The same worlds every time unless a seed is given: `tools/crash-loop` looks at new ones.
    let first = from_environment("PLYWOOD_CRASH_SEED").unwrap_or(1);
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let threads = from_environment("PLYWOOD_CRASH_THREADS").unwrap_or(cores);
    let start = Instant::now();
    let next = AtomicU64::new(first);
    let failed = AtomicBool::new(false);
    let sum = Mutex::new(Met::default());
    let is_enough = || {
        let sum = sum.lock().expect("no world panics while it adds");
        let elapsed = start.elapsed();
        let (wanted, most) = (Duration::from_secs(seconds), Duration::from_secs(seconds * 10));
        // A slow machine goes on until it has met everything, within reason.
        let complete = seconds < 20 || sum.list().iter().all(|(_, count)| *count > 0);
        elapsed >= wanted && (complete || elapsed >= most) && sum.states >= states
    };
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let repeat = Repeat(seed);
            let outcome = std::panic::catch_unwind(|| run_world(seed));
            match outcome {
                Ok(Ok(met)) => {
                    let mut sum = sum.lock().expect("no world panics while it adds");
                    let before = sum.states / TELL_EVERY;
                    sum.merge(&met);
                    if sum.states / TELL_EVERY > before {
                        println!("{} crash states after {:.0} s", sum.states, start.elapsed().as_secs_f64());
                    }
                }
                Ok(Err(error)) => {
                    failed.store(true, Ordering::Relaxed);
                    panic!("{error}");
                }
                Err(panic) => {
                    failed.store(true, Ordering::Relaxed);
                    std::panic::resume_unwind(panic);
                }
            }
            std::mem::forget(repeat);
            if failed.load(Ordering::Relaxed) || is_enough() {
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    let met = sum.into_inner().expect("no world panicked");
    let elapsed = start.elapsed().as_secs_f64();
    println!("seeds {first} to {}, {elapsed:.1} s, {threads} at a time", next.into_inner() - 1);
    println!("{} crash states checked, {:.0} a minute", met.states, met.states as f64 / elapsed * 60.0);
    for (what, count) in met.list() {
        println!("{count:>10} {what}");
    }
    if seconds >= 20 || met.states >= 20_000 {
        for (what, count) in met.list() {
            assert!(count > 0, "never met: {what}");
        }
    }
}

//! Crashes at every moment: the real engine on a medium with a volatile cache, driven by seeded operations from volumes
//! that share blocks; what a power cut or the death of the process may leave is opened, compared with a model, checked,
//! and gone on from.
//!
//! `PLYWOOD_CRASH_SECONDS` (20) says for how long, `PLYWOOD_CRASH_SEED` with which world to begin. A failure prints the
//! command that repeats it.

mod content;
mod log;
mod medium;
mod met;
mod model;
mod operations;
mod verify;
mod world;

use std::time::{Duration, Instant};

use met::Met;
use world::World;

/// Prints how to repeat the world that fails.
struct Repeat(u64);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "to repeat: PLYWOOD_CRASH_SEED={} PLYWOOD_CRASH_SECONDS=0 cargo test --test crash -- --nocapture",
                self.0
            );
        }
    }
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// One world from its creation over several crashes.
fn run_world(seed: u64) -> Met {
    let _repeat = Repeat(seed);
    let mut world = World::new(seed);
    for _ in 0..world.random.u32(2..7) {
        let events = world.random.u64(50..1500);
        let lived = world.live(events, 12);
        lived.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        world.crash().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    world.shared.met.borrow().clone()
}

#[test]
fn crash_at_any_moment_leaves_what_was_promised() {
    let seconds = from_environment("PLYWOOD_CRASH_SECONDS").unwrap_or(20);
    // The same worlds every time unless a seed is given: `PLYWOOD_CRASH_SEED=$(date +%s)` looks at new ones.
    let first = from_environment("PLYWOOD_CRASH_SEED").unwrap_or(1);
    let start = Instant::now();
    let mut met = Met::default();
    let mut seed = first;
    loop {
        met.merge(&run_world(seed));
        seed += 1;
        let complete = seconds < 20 || met.list().iter().all(|(_, count)| *count > 0);
        let most = Duration::from_secs(seconds * 10);
        // A slow machine goes on until it has met everything, within reason.
        if start.elapsed() >= Duration::from_secs(seconds) && (complete || start.elapsed() >= most) {
            break;
        }
    }
    let elapsed = start.elapsed().as_secs_f64();
    println!("seeds {first} to {}, {:.1} s", seed - 1, elapsed);
    println!("{} crash states checked, {:.0} a second", met.states, met.states as f64 / elapsed);
    for (what, count) in met.list().into_iter().chain(met.rare()) {
        println!("{count:>10} {what}");
    }
    if seconds >= 20 {
        for (what, count) in met.list() {
            assert!(count > 0, "never met: {what}");
        }
    }
}

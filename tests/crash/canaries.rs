//! Each rule broken on purpose must be found broken, by random worlds or by the story of that rule, within a minute.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use plywood::canary::{Canary, break_rule};

use crate::run_world;

const MINUTE: Duration = Duration::from_secs(60);

/// The first world that notices, what it says, or none.
fn find(canary: Canary) -> Option<(u64, String)> {
    let start = Instant::now();
    for seed in 1.. {
        break_rule(Some(canary));
        let outcome = catch_unwind(AssertUnwindSafe(|| run_world(seed)));
        break_rule(None);
        match outcome {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Some((seed, error)),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                return Some((seed, format!("panic: {}", text.unwrap_or_default())));
            }
        }
        if start.elapsed() > MINUTE {
            break;
        }
    }
    None
}

/// Panics of worlds under a broken rule are what is looked for: they are not printed.
fn quiet_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if !name.starts_with("canary") {
            default(info);
        }
    }));
}

#[test]
fn canaries_are_found() {
    quiet_panics();
    let wanted = std::env::var("PLYWOOD_CANARY").unwrap_or_default();
    let canaries: Vec<Canary> =
        Canary::ALL.into_iter().filter(|canary| format!("{canary:?}").contains(&wanted)).collect();
    let next = AtomicUsize::new(0);
    let survivors = Mutex::new(Vec::new());
    let work = || {
        while let Some(canary) = canaries.get(next.fetch_add(1, Ordering::Relaxed)) {
            let start = Instant::now();
            let found = find(*canary);
            let seconds = start.elapsed().as_secs_f64();
            match found {
                Some((seed, error)) => {
                    let error: String = error.chars().take(150).collect();
                    println!("{canary:?}: found by world {seed} in {seconds:.1} s: {error}");
                }
                None => {
                    println!("{canary:?}: NOT FOUND in {seconds:.1} s");
                    survivors.lock().expect("nobody panics here").push(*canary);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for number in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            let builder = std::thread::Builder::new().name(format!("canary-{number}"));
            builder.spawn_scoped(scope, work).expect("a thread");
        }
    });
    let survivors = survivors.into_inner().expect("nobody panics here");
    assert!(survivors.is_empty(), "nobody noticed: {survivors:?}");
}

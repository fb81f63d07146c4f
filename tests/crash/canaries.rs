//! Each rule broken on purpose must be found broken, by random worlds or by the story of that rule, within a minute.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use plywood::canary::{Canary, break_rule};
use rustix::time::{ClockId, clock_gettime};

use crate::{run_world, stories, task};

const MINUTE: Duration = Duration::from_secs(60);

/// Time that this thread has had on a processor: a machine that does other things too must not make a canary survive.
fn time_of_thread() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().expect("time runs forward")
}

/// The story that is the instrument for a rule which random worlds cannot reach.
fn story(canary: Canary) -> Option<fn()> {
    Some(match canary {
        Canary::AnySession => stories::memory_of_another_session_is_refused,
        Canary::UnseededChecksums => stories::node_in_a_wrong_place_is_found,
        Canary::FailedFlushIgnored => stories::failed_flush_is_never_taken_for_one_that_worked,
        Canary::ReplayNotFlushed => stories::superblock_found_after_a_death_is_durable_before_its_free_blocks_are_used,
        Canary::SnapshotOverWrites => stories::snapshot_waits_for_writes_in_place_from_before_its_tick,
        Canary::EatenFreedAtOnce => stories::what_a_carcass_gives_back_waits_for_a_checkpoint,
        Canary::FreedUnderPlans => stories::read_in_flight_over_a_free_does_not_see_the_next_owner,
        Canary::LetGoBeforeReply => stories::request_sent_again_never_lands_on_a_later_one,
        Canary::OneSuperblockCopy => stories::death_between_the_two_copies_of_a_superblock_leaves_the_former_whole,
        _ => return None,
    })
}

/// What `look` says, with the rule broken: an error or a panic.
fn complaint<T>(canary: Canary, look: impl FnOnce() -> Result<T, String>) -> Option<String> {
    break_rule(Some(canary));
    let outcome = catch_unwind(AssertUnwindSafe(look));
    break_rule(None);
    match outcome {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error),
        Err(panic) => Some(task::told(&*panic)),
    }
}

/// The first world that notices (0 for a story), what it says, or none.
fn find(canary: Canary) -> Option<(u64, String)> {
    if let Some(story) = story(canary) {
        return complaint(canary, || {
            story();
            Ok(())
        })
        .map(|error| (0, error));
    }
    let start = time_of_thread();
    for seed in 1.. {
        if let Some(error) = complaint(canary, || run_world(seed)) {
            return Some((seed, error));
        }
        if time_of_thread() - start > MINUTE {
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
            let start = time_of_thread();
            let found = find(*canary);
            let seconds = (time_of_thread() - start).as_secs_f64();
            match found {
                Some((seed, error)) => {
                    let error: String = error.chars().take(if wanted.is_empty() { 150 } else { 6000 }).collect();
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

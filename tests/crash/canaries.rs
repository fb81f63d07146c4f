//! Each rule broken on purpose must be found broken: by the story of that rule, where it has one, and by random worlds
//! within a minute, where they reach it.

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

/// The story of a rule. It must notice by itself.
fn story(canary: Canary) -> Option<fn()> {
    Some(match canary {
        Canary::CutAfterFlush => stories::write_that_lands_during_a_flush_is_not_in_its_batch,
        Canary::FlushWithoutRecords => stories::flush_during_a_commit_waits_for_the_batch,
        Canary::SnapshotOverWrites => stories::snapshot_waits_for_writes_in_place_from_before_its_tick,
        Canary::FreedBeforeRecorded => stories::block_freed_by_a_record_is_not_reused_before_that_is_durable,
        Canary::EatenFreedAtOnce => stories::what_a_carcass_gives_back_waits_for_a_checkpoint,
        Canary::OneSuperblockCopy => stories::death_between_the_two_copies_of_a_superblock_leaves_the_former_whole,
        Canary::MappedBeforeLanded => stories::redirected_block_is_mapped_when_its_data_has_landed,
        Canary::ExclusiveByCount => stories::block_that_became_exclusive_is_not_overwritten_in_place,
        Canary::TickAfterSharing => stories::youngest_blocks_of_a_snapshot_are_not_overwritten,
        Canary::FreedUnderPlans => stories::read_in_flight_over_a_free_does_not_see_the_next_owner,
        Canary::PunchUnclaimed => stories::block_under_punch_is_not_handed_out,
        Canary::RangesOverlap => stories::two_writes_into_one_block_both_stay,
        Canary::LetGoBeforeReply => stories::request_sent_again_never_lands_on_a_later_one,
        Canary::ReplayNotFlushed => stories::superblock_found_after_a_death_is_durable_before_its_free_blocks_are_used,
        Canary::NotPublished => stories::death_loses_nothing_that_was_answered,
        Canary::AnySession => stories::memory_of_another_session_is_refused,
        Canary::SlotByGeneration => stories::leftovers_of_an_aborted_checkpoint_are_never_adopted,
        Canary::OnePassReplay => stories::replay_puts_no_node_on_what_a_later_record_maps,
        Canary::UnseededChecksums => stories::node_in_a_wrong_place_is_found,
        Canary::FailedFlushIgnored => stories::failed_flush_is_never_taken_for_one_that_worked,
        Canary::FlushBelievedAlone => stories::flush_beside_one_that_fails_is_not_believed,
        Canary::AnsweredWhenWritten => stories::batch_that_was_only_written_is_not_answered,
        Canary::ChecksumKept => stories::checksum_goes_with_the_content_it_was_taken_of,
        Canary::SealedTooEarly => stories::snapshot_is_called_sealed_after_its_checksums_are_durable,
        Canary::ChecksumPagesUnprepared => stories::sealing_on_a_full_host_fails_and_no_checkpoint_does,
        _ => return None,
    })
}

/// Whether random worlds must notice too. They do not reach the others, or not within a minute on any machine.
fn is_for_worlds(canary: Canary) -> bool {
    !matches!(
        canary,
        Canary::AnySession
            | Canary::UnseededChecksums
            | Canary::FailedFlushIgnored
            | Canary::FlushBelievedAlone
            | Canary::ReplayNotFlushed
            | Canary::SnapshotOverWrites
            | Canary::EatenFreedAtOnce
            | Canary::ChecksumPagesUnprepared
            | Canary::FreedUnderPlans
            | Canary::LetGoBeforeReply
            | Canary::OneSuperblockCopy
    )
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

/// What the story says, if there is one.
fn told_by_story(canary: Canary) -> Option<Option<String>> {
    let story = story(canary)?;
    Some(complaint(canary, || {
        story();
        Ok(())
    }))
}

/// The first world that notices, and what it says, or none.
fn told_by_world(canary: Canary) -> Option<(u64, String)> {
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
            let shorten =
                |error: String| -> String { error.chars().take(if wanted.is_empty() { 150 } else { 6000 }).collect() };
            let survives = || survivors.lock().expect("nobody panics here").push(*canary);
            match told_by_story(*canary) {
                Some(Some(error)) => println!("{canary:?}: found by its story: {}", shorten(error)),
                Some(None) => {
                    println!("{canary:?}: NOT FOUND by its story");
                    survives();
                }
                None => {}
            }
            if !is_for_worlds(*canary) {
                continue;
            }
            let start = time_of_thread();
            let found = told_by_world(*canary);
            let seconds = (time_of_thread() - start).as_secs_f64();
            match found {
                Some((seed, error)) => {
                    println!("{canary:?}: found by world {seed} in {seconds:.1} s: {}", shorten(error));
                }
                None => {
                    println!("{canary:?}: NOT FOUND by worlds in {seconds:.1} s");
                    survives();
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

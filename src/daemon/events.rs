//! What happens to a pool in use, kept for those who follow it: a bounded ring of numbered events in the engine process.
//!
//! Whoever follows asks for what has a higher number than the last it has seen, and waits when there is nothing. Numbers go
//! on rising when another engine process takes over; what its predecessor had kept is lost then, and said to be.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::execute::now_ns;
use super::protocol::{Check, Command, Event, EventKind, Events, Reply, SnapshotOf};
use super::size_words;
use crate::error::{Error, Result};

/// Events that are kept.
const KEPT: usize = 1024;
/// Most events in one answer.
const AT_A_TIME: usize = 256;
/// Most who wait at a time: each has a thread and a connection, which commands need, too.
const FOLLOWERS: usize = 16;
/// Longest wait.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Engine processes of one daemon are this far apart in their numbers.
const PER_ENGINE: u64 = 1 << 32;

/// An event that has no number yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Draft {
    pub(super) kind: EventKind,
    pub(super) volume: Option<String>,
    pub(super) text: String,
}

impl Draft {
    /// One about the pool.
    pub(super) fn new(kind: EventKind, text: impl Into<String>) -> Self {
        Self { kind, volume: None, text: text.into() }
    }

    /// One about a volume or snapshot.
    pub(super) fn about(kind: EventKind, volume: &str, text: impl Into<String>) -> Self {
        Self { kind, volume: Some(volume.to_owned()), text: text.into() }
    }
}

/// The events of one engine process.
#[derive(Debug)]
pub struct EventRing {
    engine_pid: u32,
    first: u64,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<Event>,
    last: u64,
    followers: usize,
}

impl EventRing {
    /// The ring of the engine process that has `before` predecessors under the same front.
    pub(super) fn new(before: u64) -> Self {
        let first = before.saturating_mul(PER_ENGINE);
        let state = State { last: first, ..State::default() };
        Self { engine_pid: std::process::id(), first, state: Mutex::new(state), more: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // An event is there whole or not at all.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event; the oldest goes when there are too many. Never waits for those who follow.
    pub(super) fn post(&self, Draft { kind, volume, text }: Draft) {
        let mut state = self.lock();
        state.last += 1;
        if state.kept.len() == KEPT {
            state.kept.pop_front();
        }
        let number = state.last;
        state.kept.push_back(Event { number, time_ns: now_ns(), kind, volume, text });
        drop(state);
        self.more.notify_all();
    }

    /// What has a higher number than `after`; waits up to `wait` when there is nothing. A number that was never given out
    /// is one of an earlier daemon's, and everything that is kept comes after it.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many wait already.
    pub(super) fn after(&self, after: u64, wait: Duration) -> Result<Events> {
        let mut state = self.lock();
        let anew = after > state.last;
        let after = if anew { 0 } else { after };
        if state.last == after && !wait.is_zero() {
            if state.followers >= FOLLOWERS {
                return Err(Error::Busy(format!(
                    "{FOLLOWERS} follow the events of this pool already; end one of them"
                )));
            }
            state.followers += 1;
            let waited = self.more.wait_timeout_while(state, wait.min(WAIT_MAX), |state| state.last == after);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.followers -= 1;
        }
        let oldest = state.kept.front().map_or(state.last + 1, |event| event.number);
        // Of an engine process before this one nothing is known, and 0 asks for whatever there is.
        let lost = anew || after != 0 && (after < self.first || after + 1 < oldest);
        let events: Vec<Event> =
            state.kept.iter().filter(|event| event.number > after).take(AT_A_TIME).cloned().collect();
        let last = events.last().map_or(state.last.max(after), |event| event.number);
        Ok(Events { engine_pid: self.engine_pid, lost, last, events })
    }
}

/// What is told when a command that takes long begins.
pub(super) fn begun(command: &Command) -> Option<Draft> {
    let began = |text: &str| Some(Draft::new(EventKind::Began, text));
    match command {
        Command::PoolCheck => began("check"),
        Command::ScrubBegin => began("scrub"),
        Command::PoolTrim => began("trim"),
        Command::SnapshotSeal { name } => Some(Draft::about(EventKind::Began, name, "sealing")),
        _ => None,
    }
}

/// What is told when a command has been done.
pub(super) fn done(command: &Command, reply: &Reply) -> Vec<Draft> {
    use EventKind as Kind;

    let draft = match (command, reply) {
        (Command::VolumeCreate { name, size_bytes, .. }, _) => {
            Draft::about(Kind::Created, name, format!("empty, {}", size_words(*size_bytes)))
        }
        (Command::CloneCreate { snapshot, name, .. }, _) => {
            Draft::about(Kind::Created, name, format!("clone of {snapshot}"))
        }
        (Command::SnapshotCreate { volume, name, .. }, _) => {
            Draft::about(Kind::Snapshotted, name, format!("snapshot of {volume}"))
        }
        (Command::SnapshotCreateAll { snapshots }, _) => {
            let told = |taken: &SnapshotOf| {
                let (origin, others) = (&taken.volume, snapshots.len() - 1);
                Draft::about(Kind::Snapshotted, &taken.name, format!("snapshot of {origin}, with {others} others"))
            };
            return snapshots.iter().map(told).collect();
        }
        (Command::VolumeDelete { name, .. } | Command::SnapshotDelete { name }, _) => {
            Draft::about(Kind::Deleted, name, "its blocks are given back in the background")
        }
        (Command::VolumeRename { name, to }, _) => Draft::about(Kind::Renamed, name, format!("now {to}")),
        (Command::VolumeResize { name, size_bytes, .. }, _) => {
            Draft::about(Kind::Resized, name, format!("now {}", size_words(*size_bytes)))
        }
        (Command::SnapshotRollback { volume, snapshot, .. }, _) => {
            Draft::about(Kind::RolledBack, volume, format!("to {snapshot}"))
        }
        (Command::SnapshotSeal { name }, _) => Draft::about(Kind::Ended, name, "sealing"),
        (Command::PoolTrim, _) => Draft::new(Kind::Ended, "trim"),
        (Command::PoolCheck, Reply::Check(check)) => {
            let ended = Draft::new(Kind::Ended, "check");
            return found(check, 0).into_iter().chain([ended]).collect();
        }
        (Command::ScrubBegin, Reply::Scrub(scrub)) => {
            return scrub.check.iter().filter_map(|check| found(check, scrub.mended)).collect();
        }
        (Command::ScrubStep { .. }, Reply::Scrub(scrub)) => {
            let damaged = (scrub.damaged_count > 0).then(|| {
                Draft::new(Kind::Damage, format!("{} blocks of data do not match their checksums", scrub.damaged_count))
            });
            let ended = (!scrub.more).then(|| Draft::new(Kind::Ended, "scrub"));
            return damaged.into_iter().chain(ended).collect();
        }
        (Command::Upgrade, _) => Draft::new(Kind::Engine, "the engine process is about to hand over to a successor"),
        _ => return Vec::new(),
    };
    vec![draft]
}

/// What a check has found, when it has found something.
fn found(check: &Check, mended: u64) -> Option<Draft> {
    let first = check.faults.first()?;
    let count = check.fault_count;
    let mended = if mended > 0 { format!(", {mended} mended") } else { String::new() };
    Some(Draft::new(EventKind::Damage, format!("{count} faults{mended}; the first: {}", first.message)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    fn told(ring: &EventRing, after: u64) -> Events {
        ring.after(after, Duration::ZERO).unwrap()
    }

    fn post(ring: &EventRing, text: &str) {
        ring.post(Draft::new(EventKind::Began, text));
    }

    #[test]
    fn who_waits_is_told_what_happens() {
        let ring = Arc::new(EventRing::new(0));
        post(&ring, "before");
        let seen = told(&ring, 0).last;
        let waits = Arc::clone(&ring);
        let follower = thread::spawn(move || waits.after(seen, Duration::from_secs(30)).unwrap());
        post(&ring, "then");
        let events = follower.join().unwrap();
        assert_eq!(events.events.len(), 1);
        assert_eq!((events.events[0].text.as_str(), events.lost), ("then", false));
        // Nothing more: the wait ends without anything.
        let none = ring.after(events.last, Duration::from_millis(10)).unwrap();
        assert_eq!((none.events.len(), none.last, none.lost), (0, events.last, false));
    }

    #[test]
    fn ring_is_bounded_and_says_what_is_lost() {
        let ring = EventRing::new(0);
        for number in 0..KEPT + 10 {
            post(&ring, &number.to_string());
        }
        let mut after = 5;
        let mut seen = Vec::new();
        loop {
            let part = told(&ring, after);
            assert_eq!(part.lost, seen.is_empty(), "events 6 to 10 are gone, and later ones are not");
            if part.events.is_empty() {
                break;
            }
            assert!(part.events.len() <= AT_A_TIME);
            after = part.last;
            seen.extend(part.events.into_iter().map(|event| event.number));
        }
        assert_eq!(seen, (11..=KEPT as u64 + 10).collect::<Vec<_>>());
    }

    #[test]
    fn numbers_rise_over_engine_processes_and_what_was_kept_is_said_to_be_lost() {
        let (first, second) = (EventRing::new(0), EventRing::new(1));
        post(&first, "old");
        post(&second, "new");
        let seen = told(&first, 0).last;
        let after = told(&second, seen);
        assert!(after.lost && after.last > seen);
        assert_eq!(after.events[0].text, "new");
        assert!(!told(&second, after.last).lost);
        // Of a daemon that was started anew, whose numbers are lower.
        let anew = told(&first, after.last);
        assert_eq!((anew.events[0].text.as_str(), anew.lost), ("old", true));
    }

    #[test]
    fn too_many_followers_are_refused() {
        let ring = Arc::new(EventRing::new(0));
        let waiting: Vec<_> = (0..FOLLOWERS)
            .map(|_| {
                let ring = Arc::clone(&ring);
                thread::spawn(move || ring.after(0, Duration::from_secs(30)))
            })
            .collect();
        while ring.lock().followers < FOLLOWERS {
            thread::yield_now();
        }
        assert!(matches!(ring.after(0, Duration::from_secs(30)), Err(Error::Busy(_))));
        post(&ring, "end");
        assert!(waiting.into_iter().all(|follower| follower.join().unwrap().is_ok()));
    }
}

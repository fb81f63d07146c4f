//! What an engine was at, in the header page of the pending log: counted by the engine, read by the front when the engine
//! has died, and left by it for the successor to tell.
//!
//! An older build counts nothing here; it is told from one that was idle by the first word.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::memory::SharedMemory;
use crate::engine::{Work, WorkBoard};
use crate::error::Result;
use crate::io::Mapping;

/// Whether the engine counts here at all.
const COUNTS: usize = 256;
/// A number for each kind of work: how many of it are underway.
const UNDERWAY: usize = 260;
/// What the last engine died at: a bit for each kind, whether that is known, requests in flight.
const DIED_AT: usize = 384;
const DIED_COUNTED: usize = 388;
const DIED_WITH: usize = 392;
const _: () = assert!(UNDERWAY + Work::ALL.len() * 4 <= DIED_AT && Work::ALL.len() <= 32);

/// The board of one session.
#[derive(Clone, Debug)]
pub struct SharedBoard {
    memory: Arc<Mapping>,
}

/// What an engine was at when it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plight {
    works: u32,
    counted: bool,
    requests: u32,
}

impl SharedBoard {
    pub(super) fn new(memory: Arc<Mapping>) -> Self {
        Self { memory }
    }

    /// The board in a pending log, for somebody who only looks.
    ///
    /// # Errors
    /// [`Error::Incompatible`](crate::error::Error::Incompatible) when it is no such memory.
    pub fn watch(pending_log: OwnedFd) -> Result<Self> {
        Ok(Self::new(Arc::clone(SharedMemory::open(pending_log)?.mapping())))
    }

    /// From now on work is counted here, by the engine that calls this.
    pub(super) fn count(&self) {
        self.memory.atomic_u32(COUNTS).store(1, Ordering::Relaxed);
    }

    /// What the engine is at, or was at when it died.
    pub fn plight(&self, requests: u32) -> Plight {
        let is_underway = |work: &&Work| self.memory.atomic_u32(place(**work)).load(Ordering::Relaxed) != 0;
        let works = Work::ALL.iter().filter(is_underway).fold(0, |works, work| works | bit(*work));
        Plight { works, counted: self.memory.atomic_u32(COUNTS).load(Ordering::Relaxed) != 0, requests }
    }

    /// Leaves for the successor how its predecessor died, and clears what that had counted.
    pub fn bury(&self, plight: Plight) {
        let leave = |at, number| self.memory.atomic_u32(at).store(number, Ordering::Relaxed);
        leave(DIED_AT, plight.works);
        leave(DIED_COUNTED, u32::from(plight.counted));
        leave(DIED_WITH, plight.requests);
        self.clear();
    }

    /// Nobody counts, and nothing is underway.
    pub(super) fn clear(&self) {
        self.memory.atomic_u32(COUNTS).store(0, Ordering::Relaxed);
        Work::ALL.iter().for_each(|work| self.memory.atomic_u32(place(*work)).store(0, Ordering::Relaxed));
    }

    /// How the predecessor ended, as the front has seen it.
    pub fn predecessor(&self) -> Plight {
        let left = |at| self.memory.atomic_u32(at).load(Ordering::Relaxed);
        Plight { works: left(DIED_AT), counted: left(DIED_COUNTED) != 0, requests: left(DIED_WITH) }
    }
}

fn place(work: Work) -> usize {
    UNDERWAY + work.number() * 4
}

fn bit(work: Work) -> u32 {
    1 << work.number()
}

impl WorkBoard for SharedBoard {
    fn begin(&self, work: Work) {
        self.memory.atomic_u32(place(work)).fetch_add(1, Ordering::Relaxed);
    }

    fn end(&self, work: Work) {
        self.memory.atomic_u32(place(work)).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Plight {
    /// Whether it was at this.
    pub fn has(self, work: Work) -> bool {
        self.works & bit(work) != 0
    }
}

impl fmt::Display for Plight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.counted {
            return write!(f, "before it had the pool, with {} requests in flight", self.requests);
        }
        let mut between = "";
        f.write_str("at: ")?;
        for work in Work::ALL.into_iter().filter(|work| self.has(*work)) {
            write!(f, "{between}{}", work.words())?;
            between = ", ";
        }
        if between.is_empty() {
            f.write_str(if self.requests > 0 { "requests only" } else { "nothing" })?;
        }
        write!(f, "; {} requests in flight", self.requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_reads_what_the_dead_were_at_and_leaves_it_to_the_successor() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        let (engine, front) =
            (SharedBoard::new(Arc::clone(memory.mapping())), SharedBoard::new(Arc::clone(memory.mapping())));
        assert_eq!(front.plight(2).to_string(), "before it had the pool, with 2 requests in flight");
        engine.count();
        assert_eq!(front.plight(0).to_string(), "at: nothing; 0 requests in flight");
        assert_eq!(front.plight(9).to_string(), "at: requests only; 9 requests in flight");
        for work in [Work::Checkpoint, Work::Flush, Work::Flush, Work::Punch] {
            engine.begin(work);
        }
        engine.end(Work::Flush);
        engine.end(Work::Punch);
        let plight = front.plight(5);
        assert!(plight.has(Work::Flush) && plight.has(Work::Checkpoint) && !plight.has(Work::Punch));
        let watched = SharedBoard::watch(memory.descriptor().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(watched.plight(5), plight);
        assert_eq!(plight.to_string(), "at: data flush, checkpoint; 5 requests in flight");
        front.bury(plight);
        assert_eq!(engine.predecessor(), plight);
        assert_eq!(front.plight(0).to_string(), "before it had the pool, with 0 requests in flight");
    }
}

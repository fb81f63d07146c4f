//! What the requests of each volume came to: operations, bytes, errors and latencies by kind.
//!
//! Counting takes no lock, no allocation and no system call: the counters of a volume are found when its file is opened,
//! and the clock is read once for all requests that are taken together, and once at the end of each.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::units::VolumeId;

/// Upper bounds of the latency buckets in microseconds; one more bucket holds what took longer.
pub const LATENCY_BOUNDS_US: [u64; 9] = [50, 100, 250, 500, 1000, 2500, 10_000, 100_000, 1_000_000];
/// Buckets of latencies.
pub const LATENCY_BUCKETS: usize = LATENCY_BOUNDS_US.len() + 1;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Reads.
    Read,
    /// Writes data.
    Write,
    /// Makes durable what was answered.
    Flush,
    /// Gives space back.
    Discard,
    /// Writes zeros.
    Zero,
}

impl IoKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::Zero];

    /// Its name, as logs and metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::Zero => "write-zeroes",
        }
    }
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindCounters {
    /// Requests that were done, failed ones included.
    pub operations: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Of these, the ones that met damage.
    pub damaged: u64,
    /// Sum of their latencies.
    pub latency_ns: u64,
    /// How many took how long: a count for each of [`LATENCY_BOUNDS_US`], and one for the rest.
    pub latencies: [u64; LATENCY_BUCKETS],
}

/// Requests of one volume since the engine process began to serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoCounters {
    /// Reads.
    pub read: KindCounters,
    /// Writes.
    pub write: KindCounters,
    /// Flushes.
    pub flush: KindCounters,
    /// Discards.
    pub discard: KindCounters,
    /// Zeros written without data.
    pub zero: KindCounters,
}

impl IoCounters {
    /// Those of one kind.
    pub fn of(&self, kind: IoKind) -> &KindCounters {
        match kind {
            IoKind::Read => &self.read,
            IoKind::Write => &self.write,
            IoKind::Flush => &self.flush,
            IoKind::Discard => &self.discard,
            IoKind::Zero => &self.zero,
        }
    }

    fn of_mut(&mut self, kind: IoKind) -> &mut KindCounters {
        match kind {
            IoKind::Read => &mut self.read,
            IoKind::Write => &mut self.write,
            IoKind::Flush => &mut self.flush,
            IoKind::Discard => &mut self.discard,
            IoKind::Zero => &mut self.zero,
        }
    }

    /// Counts one request.
    pub(super) fn count(&mut self, kind: IoKind, bytes: u64, took: Duration, error: Option<&Error>) {
        let counters = self.of_mut(kind);
        counters.operations += 1;
        match error {
            None => counters.bytes += bytes,
            Some(error) => {
                counters.errors += 1;
                counters.damaged += u64::from(matches!(error, Error::Corrupt(_)));
            }
        }
        // No request takes 580 years.
        let took_ns = took.as_nanos() as u64;
        counters.latency_ns = counters.latency_ns.wrapping_add(took_ns);
        let bucket = LATENCY_BOUNDS_US.iter().position(|bound| took_ns <= bound * 1000);
        counters.latencies[bucket.unwrap_or(LATENCY_BUCKETS - 1)] += 1;
    }
}

/// The counters of one volume, shared by its open files.
pub(super) type VolumeCounters = Rc<RefCell<IoCounters>>;

/// The counters of all volumes that were in use.
#[derive(Default)]
pub(super) struct AllCounters(RefCell<BTreeMap<VolumeId, VolumeCounters>>);

impl AllCounters {
    /// Those of a volume, which are made when it is opened for the first time.
    pub(super) fn of(&self, volume: VolumeId) -> VolumeCounters {
        Rc::clone(self.0.borrow_mut().entry(volume).or_default())
    }

    pub(super) fn all(&self) -> Vec<(VolumeId, IoCounters)> {
        self.0.borrow().iter().map(|(volume, counters)| (*volume, *counters.borrow())).collect()
    }

    pub(super) fn retain(&self, keep: impl Fn(VolumeId) -> bool) {
        self.0.borrow_mut().retain(|volume, _| keep(*volume));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind_and_latency() {
        let mut counters = IoCounters::default();
        counters.count(IoKind::Read, 4096, Duration::from_micros(50), None);
        counters.count(IoKind::Read, 8192, Duration::from_micros(51), None);
        counters.count(IoKind::Read, 512, Duration::from_secs(3), Some(&Error::Busy(String::new())));
        assert_eq!((counters.read.operations, counters.read.bytes, counters.read.errors), (3, 12288, 1));
        assert_eq!(counters.read.latencies, [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(counters.read.latency_ns, 101_000 + 3_000_000_000);
        assert_eq!((counters.read.damaged, counters.write), (0, KindCounters::default()));
    }

    #[test]
    fn volumes_that_are_gone_are_forgotten() {
        let all = AllCounters::default();
        for volume in [1, 2, 1] {
            all.of(VolumeId(volume)).borrow_mut().count(IoKind::Flush, 0, Duration::ZERO, None);
        }
        assert_eq!(all.all().iter().map(|(_, counted)| counted.flush.operations).collect::<Vec<_>>(), [2, 1]);
        all.retain(|volume| volume == VolumeId(2));
        assert_eq!(all.all().len(), 1);
    }
}

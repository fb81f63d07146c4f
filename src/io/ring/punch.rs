//! Giving space back to the host, in pieces that hold nobody up.
//!
//! While the host punches a hole it holds the file's lock alone: every other direct I/O on the file waits. So a long range
//! goes in pieces, each as long as the last ones say that the host manages within [`LONG`], and what waits gets its turn
//! between two of them. While nobody else wants anything of the file pieces are longer: a call costs the host something
//! whatever it punches.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::operation::{RingFile, Step};

/// A piece that took longer than this is followed by one half as long. With it 99 of 100 stay below 2 ms beside other I/O,
/// whose end a piece waits for (docs/operations.md).
const LONG: Duration = Duration::from_micros(500);
/// One that took less may be followed by one twice as long.
const SHORT: Duration = Duration::from_micros(200);
/// The same while the file is [`QUIET`]; it is what the first request afterwards may wait.
const LONG_QUIET: Duration = Duration::from_millis(8);
const SHORT_QUIET: Duration = Duration::from_millis(3);
/// How long nobody has wanted anything then.
const QUIET: Duration = Duration::from_millis(100);
const PIECE_BYTES_FIRST: u64 = 4 << 20;
const PIECE_BYTES_MIN: u64 = 256 << 10;
const PIECE_BYTES_MAX: u64 = 32 << 20;

/// Upper bounds of the buckets of [`PunchStatistics::durations`] in microseconds; one more holds what took longer.
pub const PUNCH_BOUNDS_US: [u64; 7] = [100, 250, 500, 1000, 2000, 10_000, 100_000];

/// What punching came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PunchStatistics {
    /// Calls.
    pub calls: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How long all of them took together, the wait for I/O that was under way included.
    pub total: Duration,
    /// How long the longest took.
    pub longest: Duration,
    /// Calls by how long they took.
    pub durations: [u64; PUNCH_BOUNDS_US.len() + 1],
}

/// How long the next piece is, and what the ones before took.
#[derive(Debug)]
pub(in crate::io) struct PunchPace {
    piece_bytes: Cell<u64>,
    quiet_piece_bytes: Cell<u64>,
    /// Other operations on the file so far; as of the last piece; and when that was last seen to differ.
    others: Cell<u64>,
    others_seen: Cell<u64>,
    disturbed: Cell<Instant>,
    statistics: RefCell<PunchStatistics>,
}

impl PunchPace {
    pub(in crate::io) fn new() -> Rc<Self> {
        Rc::new(Self {
            piece_bytes: Cell::new(PIECE_BYTES_FIRST),
            quiet_piece_bytes: Cell::new(PIECE_BYTES_FIRST),
            others: Cell::new(0),
            others_seen: Cell::new(0),
            disturbed: Cell::new(Instant::now()),
            statistics: RefCell::default(),
        })
    }

    /// Something else is asked of the file.
    pub(in crate::io) fn note_other(&self) {
        self.others.set(self.others.get() + 1);
    }

    fn is_quiet(&self, now: Instant) -> bool {
        if self.others_seen.replace(self.others.get()) != self.others.get() {
            self.disturbed.set(now);
        }
        now - self.disturbed.get() >= QUIET
    }

    fn bounds(&self, is_quiet: bool) -> (&Cell<u64>, Duration, Duration) {
        if is_quiet { (&self.quiet_piece_bytes, SHORT_QUIET, LONG_QUIET) } else { (&self.piece_bytes, SHORT, LONG) }
    }

    pub(in crate::io) fn statistics(&self) -> PunchStatistics {
        *self.statistics.borrow()
    }

    fn took(&self, piece_bytes: u64, is_quiet: bool, took: Duration, succeeded: bool) {
        let statistics = &mut *self.statistics.borrow_mut();
        statistics.calls += 1;
        statistics.bytes += if succeeded { piece_bytes } else { 0 };
        statistics.total += took;
        statistics.longest = statistics.longest.max(took);
        let bucket = PUNCH_BOUNDS_US.iter().position(|bound| took <= Duration::from_micros(*bound));
        statistics.durations[bucket.unwrap_or(PUNCH_BOUNDS_US.len())] += 1;
        let (next, short, long) = self.bounds(is_quiet);
        let present = next.get();
        if took > long {
            next.set((present / 2).max(PIECE_BYTES_MIN));
        } else if took < short && piece_bytes == present {
            next.set((present * 2).min(PIECE_BYTES_MAX));
        }
    }
}

/// A range on its way back to the host.
pub(in crate::io) struct Punch {
    pub(super) file: Rc<RingFile>,
    left: Range<u64>,
    piece_bytes: u64,
    is_quiet: bool,
    begun: Instant,
    pace: Rc<PunchPace>,
}

impl Punch {
    pub(in crate::io) fn new(file: Rc<RingFile>, range: Range<u64>, pace: Rc<PunchPace>) -> Self {
        Self { file, left: range, piece_bytes: 0, is_quiet: false, begun: Instant::now(), pace }
    }

    /// The next piece.
    pub(super) fn piece(&mut self) -> Range<u64> {
        self.begun = Instant::now();
        self.is_quiet = self.pace.is_quiet(self.begun);
        let (next, ..) = self.pace.bounds(self.is_quiet);
        self.piece_bytes = next.get().min(self.left.end - self.left.start);
        self.left.start..self.left.start + self.piece_bytes
    }

    pub(super) fn complete(&mut self, result: i32) -> Step {
        self.pace.took(self.piece_bytes, self.is_quiet, self.begun.elapsed(), result == 0);
        match result {
            0 => {
                self.left.start += self.piece_bytes;
                if self.left.is_empty() { Step::Finished(Ok(())) } else { Step::Again }
            }
            result => Step::Finished(Err(io::Error::from_raw_os_error(-result))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(pace: &PunchPace, took_us: &[u64]) -> u64 {
        for took in took_us {
            pace.took(pace.piece_bytes.get(), false, Duration::from_micros(*took), true);
        }
        pace.piece_bytes.get()
    }

    #[test]
    fn pieces_are_as_long_as_the_host_manages_in_half_a_millisecond() {
        let pace = PunchPace::new();
        assert_eq!(after(&pace, &[100]), 2 * PIECE_BYTES_FIRST);
        assert_eq!(after(&pace, &[250, 450]), 2 * PIECE_BYTES_FIRST, "good as it is");
        assert_eq!(after(&pace, &[100; 20]), PIECE_BYTES_MAX);
        assert_eq!(after(&pace, &[501]), PIECE_BYTES_MAX / 2);
        assert_eq!(after(&pace, &[50_000; 20]), PIECE_BYTES_MIN);
        // The short rest of a range says nothing of a long piece.
        pace.took(4096, false, Duration::ZERO, true);
        assert_eq!(pace.piece_bytes.get(), PIECE_BYTES_MIN);
    }

    #[test]
    fn pieces_are_longer_when_nobody_has_wanted_anything_for_a_while() {
        let pace = PunchPace::new();
        let begun = Instant::now();
        assert!(!pace.is_quiet(begun), "it has just been opened");
        assert!(pace.is_quiet(begun + 2 * QUIET));
        pace.took(PIECE_BYTES_FIRST, true, Duration::from_millis(2), true);
        pace.took(PIECE_BYTES_FIRST, false, Duration::from_millis(2), true);
        assert_eq!(pace.quiet_piece_bytes.get(), 2 * PIECE_BYTES_FIRST);
        assert_eq!(pace.piece_bytes.get(), PIECE_BYTES_FIRST / 2, "the other kind has a length of its own");
        pace.note_other();
        assert!(!pace.is_quiet(begun + 3 * QUIET));
        assert!(!pace.is_quiet(begun + 3 * QUIET + QUIET / 2));
        assert!(pace.is_quiet(begun + 4 * QUIET));
    }

    #[test]
    fn calls_are_counted_by_how_long_they_took() {
        let pace = PunchPace::new();
        pace.took(4096, false, Duration::from_micros(100), true);
        pace.took(8192, false, Duration::from_millis(2), true);
        pace.took(1, false, Duration::from_secs(3), false);
        let statistics = pace.statistics();
        assert_eq!((statistics.calls, statistics.bytes), (3, 12288));
        assert_eq!(statistics.durations, [1, 0, 0, 0, 1, 0, 0, 1]);
        assert_eq!(statistics.longest, Duration::from_secs(3));
        assert_eq!(statistics.total, Duration::from_micros(3_002_100));
    }
}

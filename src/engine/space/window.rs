//! Consecutive free blocks set aside for one volume, so that its random writes become sequential ones in the pool.
//!
//! A window exists in memory only: its blocks count as free on disk, and are given back when space is short and at every
//! checkpoint's instant.

use super::Run;
use crate::units::PoolBlock;

/// Blocks a window starts with (64 KiB).
const SMALL: u64 = 16;
/// Blocks a busy volume's window grows to (1 MiB).
const LARGE: u64 = 256;

#[derive(Debug)]
pub(crate) struct Window {
    run: Run,
    size: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { run: Run { start: PoolBlock(0), count: 0 }, size: SMALL }
    }
}

impl Window {
    /// Takes up to `count` consecutive blocks.
    pub(crate) fn take(&mut self, count: u64) -> Option<Run> {
        let taken = Run { start: self.run.start, count: count.min(self.run.count) };
        self.run.start = self.run.start.plus(taken.count);
        self.run.count -= taken.count;
        (taken.count > 0).then_some(taken)
    }

    /// Blocks to ask for next: twice as many each time, up to a bound.
    pub(crate) fn wanted(&mut self, count: u64) -> u64 {
        let wanted = self.size.max(count);
        self.size = (self.size * 2).min(LARGE);
        wanted
    }

    /// Puts a new run in place of the used-up one.
    pub(crate) fn refill(&mut self, run: Run) {
        debug_assert_eq!(self.run.count, 0);
        self.run = run;
    }

    /// Gives up what is left.
    pub(crate) fn give_back(&mut self) -> Option<Run> {
        self.size = SMALL;
        let left = std::mem::replace(&mut self.run, Run { start: PoolBlock(0), count: 0 });
        (left.count > 0).then_some(left)
    }
}

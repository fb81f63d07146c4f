//! Changes of volumes that are under way, and waiting for them: whoever sent one may have died, and nobody else is answered.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Those under way, by the order in which they began.
#[derive(Debug, Default)]
pub(super) struct Changes {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    under_way: BTreeSet<u64>,
}

/// One that is under way, until it is dropped.
#[derive(Debug)]
pub(super) struct Change<'a> {
    changes: &'a Changes,
    number: u64,
}

impl Changes {
    pub(super) fn begin(&self) -> Change<'_> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.under_way.insert(number);
        Change { changes: self, number }
    }

    /// Waits until all have ended that have begun by now. False: one has not, after all that patience.
    pub(super) fn settle(&self, patience: Duration) -> bool {
        let began = Instant::now();
        let mut state = self.state();
        let now = state.next;
        while state.under_way.first().is_some_and(|number| *number < now) {
            let left = patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                return false;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.changes.state().under_way.remove(&self.number);
        self.changes.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_began_before_is_waited_for_and_nothing_else() {
        let changes = Changes::default();
        assert!(changes.settle(Duration::ZERO));
        let (first, second) = (changes.begin(), changes.begin());
        drop(second);
        assert!(!changes.settle(Duration::from_millis(1)), "the first has not ended");
        std::thread::scope(|scope| {
            let settled = scope.spawn(|| changes.settle(LONG));
            // One that never ends begins meanwhile, or before; then it is waited for in vain.
            std::thread::sleep(Duration::from_millis(50));
            let later = changes.begin();
            drop(first);
            std::thread::sleep(Duration::from_millis(50));
            drop(later);
            assert!(settled.join().unwrap());
        });
        assert!(changes.state().under_way.is_empty());
    }
}

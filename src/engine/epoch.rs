//! Epochs: what must have ended before a freed block may be used again (rule O7).
//!
//! Every plan (a read, a write, a node being loaded, a background step) enters the current epoch and leaves it when its
//! I/O has ended. A block freed now may still be the target of any plan of the current epoch or an earlier one; it passes
//! on when all of these have left. Nothing waits while it is inside an epoch, except for I/O that ends by itself.

use std::collections::VecDeque;

/// Number of an epoch.
pub(super) type EpochId = u64;

/// The epochs that still have plans inside, oldest first; the last one is current.
#[derive(Debug)]
pub(super) struct Epochs {
    oldest: EpochId,
    inside: VecDeque<u32>,
}

impl Epochs {
    pub(super) fn new() -> Self {
        Self { oldest: 0, inside: VecDeque::from([0]) }
    }

    /// Enters the current epoch.
    pub(super) fn enter(&mut self) -> EpochId {
        if let Some(current) = self.inside.back_mut() {
            *current += 1;
        }
        self.oldest + self.inside.len() as EpochId - 1
    }

    /// Leaves `epoch`. Answers whether an epoch has ended by this.
    pub(super) fn leave(&mut self, epoch: EpochId) -> bool {
        if let Some(count) = self.inside.get_mut((epoch - self.oldest) as usize) {
            *count -= 1;
        }
        self.retire()
    }

    /// Ends the current epoch for newcomers and answers its number: plans from now on belong to the next.
    pub(super) fn advance(&mut self) -> EpochId {
        let ended = self.oldest + self.inside.len() as EpochId - 1;
        if self.inside.back() == Some(&0) && self.inside.len() == 1 {
            // Nobody is inside: the epoch is over at once and its number can be told apart from the next one's.
            self.oldest += 1;
            return ended;
        }
        self.inside.push_back(0);
        self.retire();
        ended
    }

    /// Whether every plan of `epoch` and of those before it has left.
    pub(super) fn is_over(&self, epoch: EpochId) -> bool {
        epoch < self.oldest
    }

    fn retire(&mut self) -> bool {
        let before = self.oldest;
        while self.inside.len() > 1 && self.inside.front() == Some(&0) {
            self.inside.pop_front();
            self.oldest += 1;
        }
        self.oldest != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoch_is_over_when_its_last_plan_leaves() {
        let mut epochs = Epochs::new();
        let first = epochs.enter();
        let ended = epochs.advance();
        assert_eq!(first, ended);
        let second = epochs.enter();
        assert!(!epochs.is_over(ended));
        assert!(epochs.leave(first));
        assert!(epochs.is_over(ended));
        assert!(!epochs.is_over(second));
    }

    #[test]
    fn later_epoch_waits_for_an_earlier_one() {
        let mut epochs = Epochs::new();
        let first = epochs.enter();
        epochs.advance();
        let second = epochs.enter();
        let ended = epochs.advance();
        epochs.leave(second);
        assert!(!epochs.is_over(ended));
        epochs.leave(first);
        assert!(epochs.is_over(ended));
    }

    #[test]
    fn epoch_without_plans_is_over_at_once() {
        let mut epochs = Epochs::new();
        let ended = epochs.advance();
        assert!(epochs.is_over(ended));
        let inside = epochs.enter();
        assert!(inside > ended);
    }
}

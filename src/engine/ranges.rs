//! One change at a time for a virtual block (rule O8).
//!
//! Writes, discards and zeroes hold their blocks from before they are planned until their reply has been handed over; an
//! overlapping one waits in the order of arrival. Reads hold nothing: they see a block before a change or after it.

use std::ops::Range;

use crate::canary::{Canary, is_broken};

/// Identity of a held or wanted range.
pub(super) type RangeId = u64;

#[derive(Debug)]
struct Entry {
    id: RangeId,
    blocks: Range<u64>,
}

/// The ranges of one volume, in order of arrival. A range is held when no earlier one overlaps it.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    entries: Vec<Entry>,
    next: RangeId,
}

impl Ranges {
    /// Queues up for `blocks`.
    pub(super) fn request(&mut self, blocks: Range<u64>) -> RangeId {
        let id = self.next;
        self.next += 1;
        self.entries.push(Entry { id, blocks });
        id
    }

    /// Whether the range is held now.
    pub(super) fn is_held(&self, id: RangeId) -> bool {
        let Some(position) = self.entries.iter().position(|entry| entry.id == id) else { return false };
        if is_broken(Canary::RangesOverlap) {
            return true;
        }
        let wanted = &self.entries[position].blocks;
        self.entries[..position]
            .iter()
            .all(|earlier| earlier.blocks.end <= wanted.start || wanted.end <= earlier.blocks.start)
    }

    /// Gives the range up, held or not. Answers whether somebody may be waiting for it.
    pub(super) fn release(&mut self, id: RangeId) -> bool {
        if let Some(position) = self.entries.iter().position(|entry| entry.id == id) {
            self.entries.remove(position);
            return position < self.entries.len();
        }
        false
    }

    /// Whether no change is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_are_held_in_order_of_arrival() {
        let mut ranges = Ranges::default();
        let first = ranges.request(0..4);
        let second = ranges.request(3..5);
        let third = ranges.request(4..8);
        let apart = ranges.request(8..9);
        assert!(ranges.is_held(first) && !ranges.is_held(second) && !ranges.is_held(third) && ranges.is_held(apart));
        assert!(ranges.release(first));
        assert!(ranges.is_held(second) && !ranges.is_held(third));
        ranges.release(second);
        assert!(ranges.is_held(third));
    }
}

//! Sets of blocks as ranges.

use std::ops::Range;

/// A set of blocks: ranges that ascend and do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks(Vec<Range<u64>>);

impl FromIterator<Range<u64>> for Blocks {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        Self(joined)
    }
}

impl Blocks {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().cloned().flatten()
    }

    /// Whether any block of a range is in it.
    pub(super) fn meets(&self, range: &Range<u64>) -> bool {
        let next = self.0.partition_point(|held| held.end <= range.start);
        !range.is_empty() && self.0.get(next).is_some_and(|held| held.start < range.end)
    }

    /// Those that are in the other, too.
    pub(super) fn both(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut both = Vec::new();
        while let (Some(one), Some(two)) = (left.peek(), right.peek()) {
            let common = one.start.max(two.start)..one.end.min(two.end);
            if !common.is_empty() {
                both.push(common);
            }
            if one.end <= two.end {
                left.next()
            } else {
                right.next()
            };
        }
        Self(both)
    }

    /// Those that are not in the other.
    pub(super) fn without(&self, other: &Self) -> Self {
        let mut others = other.0.iter().peekable();
        let mut left = Vec::new();
        for range in &self.0 {
            let mut at = range.start;
            while let Some(taken) = others.next_if(|taken| taken.end <= range.end) {
                if taken.start > at {
                    left.push(at..taken.start);
                }
                at = at.max(taken.end);
            }
            // The one that reaches further is looked at again for the next.
            let end = others.peek().map_or(range.end, |taken| range.end.min(taken.start).max(at));
            if at < end {
                left.push(at..end);
            }
        }
        Self(left)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Against sets of single blocks, for all pairs of some shapes.
    #[test]
    fn sets_are_what_sets_of_blocks_are() {
        let shapes: Vec<Vec<Range<u64>>> = (0_u64..256)
            .map(|bits| {
                (0..8)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| bit * 3 % 8 * 2..bit * 3 % 8 * 2 + 1 + bit % 3)
                    .collect()
            })
            .collect();
        for one in &shapes {
            for two in shapes.iter().step_by(7) {
                let (left, right): (Blocks, Blocks) = (one.iter().cloned().collect(), two.iter().cloned().collect());
                let (all, others): (BTreeSet<u64>, BTreeSet<u64>) = (left.iter().collect(), right.iter().collect());
                assert_eq!(left.without(&right).iter().collect::<BTreeSet<_>>(), &all - &others, "{one:?} {two:?}");
                assert_eq!(left.both(&right).iter().collect::<BTreeSet<_>>(), &all & &others, "{one:?} {two:?}");
                for range in two {
                    assert_eq!(left.meets(range), range.clone().any(|block| all.contains(&block)));
                }
            }
        }
    }
}

//! How often each block was reached, in one byte for each block.
//!
//! A group's bytes exist from the first block of it that is reached. Seven bits count, the eighth says that the block is
//! metadata; what is reached more often than seven bits hold is counted in a table beside.

use rustc_hash::FxHashMap;

use crate::format::{GROUP_BLOCKS, Geometry};
use crate::units::PoolBlock;

const METADATA: u8 = 0x80;
/// In the low bits: the number stands in the table.
const MANY: u8 = 0x7f;

/// What a block was before it was reached now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Reached {
    /// Nothing.
    First,
    /// The same.
    Again,
    /// Data, and it is metadata now, or the other way round.
    Otherwise,
    /// It is in no group in use, or it is the layout's: nothing else can stand there.
    Outside,
}

/// Counts of all blocks.
pub(in crate::engine) struct Counts {
    geometry: Geometry,
    groups_in_use: u64,
    groups: FxHashMap<u64, Box<[u8]>>,
    many: FxHashMap<u64, u32>,
    reached: u64,
}

impl Counts {
    pub(in crate::engine) fn new(geometry: Geometry, groups_in_use: u64) -> Self {
        Self { geometry, groups_in_use, groups: FxHashMap::default(), many: FxHashMap::default(), reached: 0 }
    }

    /// More groups are in use.
    pub(in crate::engine) fn grow(&mut self, groups_in_use: u64) {
        self.groups_in_use = self.groups_in_use.max(groups_in_use);
    }

    /// Counts a block once more.
    pub(in crate::engine) fn add(&mut self, block: PoolBlock, metadata: bool) -> Reached {
        let Some((group, index)) = self.geometry.group_of(block) else { return Reached::Outside };
        if group >= self.groups_in_use || u64::from(index) < self.geometry.layout_blocks(group) {
            return Reached::Outside;
        }
        let group = self.groups.entry(group).or_insert_with(|| vec![0; GROUP_BLOCKS as usize].into_boxed_slice());
        let Some(byte) = group.get_mut(index as usize) else { return Reached::Outside };
        let kind = if metadata { METADATA } else { 0 };
        let before = match *byte {
            0 => Reached::First,
            known if known & METADATA == kind => Reached::Again,
            _ => Reached::Otherwise,
        };
        match *byte & MANY {
            MANY => {
                let many = self.many.entry(block.0).or_default();
                *many = many.saturating_add(1);
            }
            count if count + 1 == MANY => {
                *byte = *byte & METADATA | MANY;
                self.many.insert(block.0, u32::from(MANY));
            }
            0 => *byte = kind | 1,
            _ => *byte += 1,
        }
        self.reached += u64::from(before == Reached::First);
        before
    }

    /// How often a block was reached.
    pub(in crate::engine) fn get(&self, block: PoolBlock) -> u32 {
        let Some((group, index)) = self.geometry.group_of(block) else { return 0 };
        let byte = self.groups.get(&group).and_then(|group| group.get(index as usize)).copied().unwrap_or(0);
        match byte & MANY {
            MANY => self.many.get(&block.0).copied().unwrap_or(0),
            count => count.into(),
        }
    }

    /// Blocks reached at all.
    pub(in crate::engine) fn reached(&self) -> u64 {
        self.reached
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_beyond_a_byte_and_kinds_are_told_apart() {
        let geometry = Geometry::new(256 << 20, 4 << 20).unwrap();
        let mut counts = Counts::new(geometry, 1);
        let block = geometry.group_start(0).plus(500);
        assert_eq!(counts.add(block, true), Reached::First);
        for count in 1..1000 {
            assert_eq!(counts.get(block), count);
            assert_eq!(counts.add(block, true), Reached::Again);
        }
        assert_eq!(counts.add(block, false), Reached::Otherwise);
        assert_eq!(counts.get(block), 1001);
        assert_eq!(counts.get(block.plus(1)), 0);
        assert_eq!(counts.add(PoolBlock(5), false), Reached::Outside);
        assert_eq!(counts.reached(), 1);
    }
}

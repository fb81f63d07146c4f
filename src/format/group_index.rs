//! A group-index block: 512 groups, eight bytes each, so that opening a pool reads a block for every 64 GiB.

use super::geometry::{GROUP_BLOCKS, GROUPS_PER_INDEX, Slot};
use super::layout::{at_most, raw, raw_struct};
use super::little_endian::{U16, U32};
use crate::error::Check;
use crate::units::BLOCK_SIZE;

const ENTRIES: usize = GROUPS_PER_INDEX as usize;
const SLOT_B: u8 = 1;
const EMPTY: u8 = 2;

raw_struct! {
    /// What a group index says of one group.
    RawGroupIndexEntry: 8 {
        0 checksum: U32,
        4 free_blocks: U16,
        6 flags: u8,
        7 reserved: u8,
    }
}

raw_struct! {
    /// A group-index block as it stands on disk.
    RawGroupIndex: 4096 {
        0 entries: [RawGroupIndexEntry; ENTRIES],
    }
}

/// What a group index says of one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupIndexEntry {
    /// Checksum of the group's descriptor; meaningless, and written as 0, for an empty group.
    pub checksum: u32,
    /// Where the current descriptor stands; meaningless, and written as A, for an empty group.
    pub slot: Slot,
    /// No block is in use but those of the layout; there is no descriptor, there are no pages.
    pub empty: bool,
    /// Blocks whose count is 0, at most 32768.
    pub free_blocks: u32,
}

impl GroupIndexEntry {
    /// A group of which nothing has been used yet.
    pub const EMPTY: Self = Self { checksum: 0, slot: Slot::A, empty: true, free_blocks: 0 };
}

/// A group-index block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupIndex {
    /// Its groups, in order. Those that the pool does not have, or does not use yet, are empty.
    pub entries: Box<[GroupIndexEntry; ENTRIES]>,
}

impl GroupIndex {
    /// An index of empty groups, their free counts 0.
    pub fn new() -> Self {
        Self { entries: Box::new([GroupIndexEntry::EMPTY; ENTRIES]) }
    }

    /// Its block.
    ///
    /// # Panics
    /// When a free count is above the size of a group.
    pub fn encode(&self) -> Box<[u8; BLOCK_SIZE]> {
        let entries = self.entries.each_ref().map(|entry| {
            assert!(u64::from(entry.free_blocks) <= GROUP_BLOCKS, "a group has no more blocks");
            let (checksum, flags) = match (entry.empty, entry.slot) {
                (true, _) => (0, EMPTY),
                (false, Slot::A) => (entry.checksum, 0),
                (false, Slot::B) => (entry.checksum, SLOT_B),
            };
            RawGroupIndexEntry {
                checksum: U32::new(checksum),
                free_blocks: U16::new(entry.free_blocks as u16),
                flags,
                reserved: 0,
            }
        });
        Box::new(bytemuck::cast(RawGroupIndex { entries }))
    }

    /// Reads a block.
    ///
    /// # Errors
    /// A wrong length, an undefined flag, a free count that no group has, or a field that an empty group does not have.
    pub fn decode(bytes: &[u8]) -> Result<Self, Check> {
        let raw: &RawGroupIndex = raw(bytes)?;
        let mut index = Self::new();
        for (entry, raw) in index.entries.iter_mut().zip(&raw.entries) {
            *entry = decode_entry(raw)?;
        }
        Ok(index)
    }
}

impl Default for GroupIndex {
    fn default() -> Self {
        Self::new()
    }
}

fn decode_entry(raw: &RawGroupIndexEntry) -> Result<GroupIndexEntry, Check> {
    if raw.reserved != 0 {
        return Err(Check::Reserved("group.reserved"));
    }
    if raw.flags & !(SLOT_B | EMPTY) != 0 {
        return Err(Check::Undefined { field: "group.flags", value: raw.flags.into() });
    }
    let entry = GroupIndexEntry {
        checksum: raw.checksum.get(),
        slot: if raw.flags & SLOT_B != 0 { Slot::B } else { Slot::A },
        empty: raw.flags & EMPTY != 0,
        free_blocks: at_most(raw.free_blocks.get().into(), GROUP_BLOCKS, "group.free_blocks")? as u32,
    };
    if entry.empty && (entry.checksum != 0 || entry.slot == Slot::B) {
        return Err(Check::Reserved("group.checksum"));
    }
    Ok(entry)
}

//! A node of a mapping tree: 256 entries in one block, like a page of a processor's page table.
//!
//! A node carries nothing but its entries: its checksum stands in the entry that points at it, seeded with its place. A
//! node is checked once, when it is decoded; looking up an entry afterwards cannot fail.

use super::entry::{Entry, EntryKind, RawEntry};
use super::layout::{at_most, raw_struct};
use crate::error::Check;
use crate::units::{BLOCK_SIZE, Clock};

/// Entries of a node.
pub const ENTRIES_PER_NODE: usize = 256;
/// Level of the root of the highest tree, 16 TiB.
pub const LEVEL_MAX: u8 = 3;
/// Most blocks of a volume, and one more than the highest volume id.
pub const VOLUME_BLOCKS_MAX: u64 = 1 << 32;

raw_struct! {
    /// A node as it stands in its block.
    RawNode: 4096 {
        0 entries: [RawEntry; ENTRIES_PER_NODE],
    }
}

/// Virtual blocks that one node of `level` covers: 256 for a leaf, level 0.
///
/// # Panics
/// When `level` is above 6: no tree is so high, and the span would not fit.
pub const fn span_blocks(level: u8) -> u64 {
    1 << (8 * (level as u32 + 1))
}

/// Which trees a node can belong to: what its leaves may hold differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tree {
    Volume,
    Table,
}

/// A node, all of whose entries have been checked. It is as large as its block: keep it behind a pointer.
#[derive(Clone, PartialEq, Eq)]
pub struct Node {
    bytes: [u8; BLOCK_SIZE],
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mapped = (0..ENTRIES_PER_NODE).map(|index| (index, self.entry(index)));
        f.debug_map().entries(mapped.filter(|(_, entry)| entry.kind != EntryKind::Hole)).finish()
    }
}

impl Node {
    /// A node of holes, all of them since `birth`.
    pub fn new(birth: Clock) -> Self {
        let raw = RawNode { entries: [Entry::hole(birth).to_raw(); ENTRIES_PER_NODE] };
        Self { bytes: bytemuck::cast(raw) }
    }

    /// Reads a node of a volume's tree, of `level`, in a pool of `pool_blocks`.
    ///
    /// # Errors
    /// [`Check::Truncated`] when `bytes` are not one block, and what [`Entry::decode`] refuses; an address outside the
    /// pool; a kind that does not belong there: a leaf has holes and blocks, all others holes and nodes.
    pub fn decode(bytes: &[u8], level: u8, pool_blocks: u64) -> Result<Self, Check> {
        Self::decode_of(Tree::Volume, bytes, level, pool_blocks)
    }

    /// Reads a node of the volume table or the carcass table. Its leaves, too, have holes and *nodes*: the record blocks
    /// and pages they point at are metadata, checksummed and written as pairs.
    ///
    /// # Errors
    /// As [`decode`](Node::decode).
    pub fn decode_table(bytes: &[u8], level: u8, pool_blocks: u64) -> Result<Self, Check> {
        Self::decode_of(Tree::Table, bytes, level, pool_blocks)
    }

    fn decode_of(tree: Tree, bytes: &[u8], level: u8, pool_blocks: u64) -> Result<Self, Check> {
        let bytes: &[u8; BLOCK_SIZE] = bytes.try_into().map_err(|_| Check::Truncated)?;
        at_most(level.into(), LEVEL_MAX.into(), "level")?;
        let raw: &RawNode = bytemuck::cast_ref(bytes);
        let mapped_kind = if level == 0 && tree == Tree::Volume { EntryKind::Block } else { EntryKind::Node };
        for raw_entry in &raw.entries {
            let entry = Entry::from_raw(raw_entry)?;
            if entry.kind != EntryKind::Hole && entry.kind != mapped_kind {
                return Err(Check::Inconsistent("an entry's kind does not belong on this level"));
            }
            entry.check_address(pool_blocks)?;
        }
        Ok(Self { bytes: *bytes })
    }

    /// The entry at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`ENTRIES_PER_NODE`].
    #[inline]
    pub fn entry(&self, index: usize) -> Entry {
        let raw: &RawNode = bytemuck::cast_ref(&self.bytes);
        Entry::from_checked(&raw.entries[index])
    }

    /// Puts `entry` at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`ENTRIES_PER_NODE`], and as [`Entry::encode`].
    #[inline]
    pub fn set(&mut self, index: usize, entry: Entry) {
        let raw: &mut RawNode = bytemuck::cast_mut(&mut self.bytes);
        raw.entries[index] = entry.to_raw();
    }

    /// Its block, to be written.
    pub fn bytes(&self) -> &[u8; BLOCK_SIZE] {
        &self.bytes
    }

    /// Whether all entries are holes.
    pub fn is_empty(&self) -> bool {
        (0..ENTRIES_PER_NODE).all(|index| self.entry(index).kind == EntryKind::Hole)
    }
}

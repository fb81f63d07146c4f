//! The entry of a mapping node, 16 bytes, and the root of a tree.
//!
//! An entry says where a virtual block or a child node stands in the pool and when that mapping was made. Kinds 3 to 5
//! (zero, run, external) are reserved; a pool that used them would carry an incompatible feature bit, so here they are
//! damage.

use super::layout::{at_most, raw_struct, zero};
use super::little_endian::{U32, U40, U48};
use super::node::LEVEL_MAX;
use crate::error::Check;
use crate::units::{Clock, PoolBlock};

/// Largest value of a clock or a birth: 40 bits.
pub const CLOCK_MAX: u64 = (1 << 40) - 1;
/// Largest number of a pool block: 48 bits.
pub(super) const ADDRESS_MAX: u64 = (1 << 48) - 1;

const KIND_BITS: u8 = 0x0f;
const HOLE: u8 = 0;
const BLOCK: u8 = 1;
const NODE: u8 = 2;
const MIRRORED: u8 = 0x10;

raw_struct! {
    /// An entry as it stands in a node.
    RawEntry: 16 {
        0 address: U48,
        6 kind_and_flags: u8,
        7 checksum: U32,
        11 birth: U40,
    }
}

raw_struct! {
    /// A root as it stands in the superblock or a volume's record.
    RawRoot: 24 {
        0 entry: RawEntry,
        16 level: u8,
        17 reserved: [u8; 7],
    }
}

/// What an entry stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EntryKind {
    /// Nothing is mapped; it reads as zeros.
    Hole,
    /// A block of data.
    Block,
    /// A node of the next level below; in the leaves of the volume table and the carcass table, a record block or page.
    Node,
}

/// Where a virtual block or a child stands, and since when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What it stands for.
    pub kind: EntryKind,
    /// Whether the block after [`address`](Entry::address) holds the same bytes. Only for [`EntryKind::Node`].
    pub mirrored: bool,
    /// Its block; 0 for a hole.
    pub address: PoolBlock,
    /// Checksum of the block, seeded with its place. Only for [`EntryKind::Node`], 0 otherwise.
    pub checksum: u32,
    /// The pool's clock when the mapping was made. Holes have one too, so that a difference "since" sees discards.
    pub birth: Clock,
}

impl Entry {
    /// Nothing, since `birth`.
    pub const fn hole(birth: Clock) -> Self {
        Self { kind: EntryKind::Hole, mirrored: false, address: PoolBlock(0), checksum: 0, birth }
    }

    /// The data block at `address`.
    pub const fn block(address: PoolBlock, birth: Clock) -> Self {
        Self { kind: EntryKind::Block, mirrored: false, address, checksum: 0, birth }
    }

    /// The node, record or page at `address`, and its copy in the next block when `mirrored`.
    pub const fn node(address: PoolBlock, mirrored: bool, checksum: u32, birth: Clock) -> Self {
        Self { kind: EntryKind::Node, mirrored, address, checksum, birth }
    }

    /// Its 16 bytes.
    ///
    /// # Panics
    /// When the address has more than 48 or the birth more than 40 bits.
    #[inline]
    pub fn encode(&self) -> [u8; 16] {
        bytemuck::cast(self.to_raw())
    }

    /// Reads an entry of any kind.
    ///
    /// # Errors
    /// [`Check::Undefined`] for kinds and flags that this version does not know; [`Check::OutOfBounds`] for a block or
    /// node at address 0; [`Check::Reserved`] for a field that its kind does not have.
    pub fn decode(bytes: &[u8; 16]) -> Result<Self, Check> {
        Self::from_raw(bytemuck::cast_ref(bytes))
    }

    #[inline]
    pub(super) fn to_raw(self) -> RawEntry {
        let kind = match self.kind {
            EntryKind::Hole => HOLE,
            EntryKind::Block => BLOCK,
            EntryKind::Node => NODE,
        };
        RawEntry {
            address: U48::new(self.address.0),
            kind_and_flags: kind | if self.mirrored { MIRRORED } else { 0 },
            checksum: U32::new(self.checksum),
            birth: U40::new(self.birth.0),
        }
    }

    /// The entry of a raw one that has passed [`from_raw`](Entry::from_raw): kinds that it refuses do not come here.
    #[inline]
    pub(super) fn from_checked(raw: &RawEntry) -> Self {
        Self {
            kind: match raw.kind_and_flags & KIND_BITS {
                BLOCK => EntryKind::Block,
                NODE => EntryKind::Node,
                _ => EntryKind::Hole,
            },
            mirrored: raw.kind_and_flags & MIRRORED != 0,
            address: PoolBlock(raw.address.get()),
            checksum: raw.checksum.get(),
            birth: Clock(raw.birth.get()),
        }
    }

    pub(super) fn from_raw(raw: &RawEntry) -> Result<Self, Check> {
        let kind = raw.kind_and_flags & KIND_BITS;
        if kind > NODE {
            return Err(Check::Undefined { field: "kind", value: kind.into() });
        }
        if raw.kind_and_flags & !(KIND_BITS | MIRRORED) != 0 {
            return Err(Check::Undefined { field: "flags", value: (raw.kind_and_flags >> 4).into() });
        }
        let entry = Self::from_checked(raw);
        if entry.kind != EntryKind::Node {
            // A data block's checksum, where it has one, belongs to the pool block: see the checksum pages.
            if entry.mirrored {
                return Err(Check::Reserved("mirrored"));
            }
            zero(bytemuck::bytes_of(&raw.checksum), "checksum")?;
        }
        match (entry.kind, entry.address.0) {
            (EntryKind::Hole, 0) => Ok(entry),
            (EntryKind::Hole, _) => Err(Check::Reserved("address")),
            // Block 0 is the superblock's.
            (_, 0) => Err(Check::OutOfBounds { field: "address", value: 0 }),
            _ => Ok(entry),
        }
    }

    /// Refuses an address, or that of the second block of a pair, outside a pool of `pool_blocks`.
    ///
    /// # Errors
    /// [`Check::OutOfBounds`].
    #[inline]
    pub fn check_address(&self, pool_blocks: u64) -> Result<(), Check> {
        // At most 2^48 each: no overflow.
        if self.kind == EntryKind::Hole || self.address.0 + u64::from(self.mirrored) < pool_blocks {
            Ok(())
        } else {
            Err(Check::OutOfBounds { field: "address", value: self.address.0 })
        }
    }
}

/// The top of a tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Root {
    /// Its root node, or a hole for an empty tree.
    pub entry: Entry,
    /// Level of the root node; 0 is a leaf. An empty tree has level 0.
    pub level: u8,
}

impl Root {
    /// A tree that maps nothing, since `birth`.
    pub const fn empty(birth: Clock) -> Self {
        Self { entry: Entry::hole(birth), level: 0 }
    }

    pub(super) fn to_raw(self) -> RawRoot {
        RawRoot { entry: self.entry.to_raw(), level: self.level, reserved: [0; 7] }
    }

    pub(super) fn from_raw(raw: &RawRoot) -> Result<Self, Check> {
        zero(&raw.reserved, "root.reserved")?;
        let entry = Entry::from_raw(&raw.entry)?;
        let level = raw.level;
        at_most(level.into(), LEVEL_MAX.into(), "root.level")?;
        match entry.kind {
            EntryKind::Node => {}
            EntryKind::Hole if level == 0 => {}
            EntryKind::Hole => return Err(Check::Inconsistent("an empty tree has a height")),
            EntryKind::Block => return Err(Check::Inconsistent("a root is a data block")),
        }
        Ok(Self { entry, level })
    }
}

//! Where everything stands in the pool file: superblocks, the journal ring, groups and what each group begins with.
//!
//! All of it follows from two numbers, the pool's size and the ring's. Nothing here looks at the file.

use std::ops::Range;

use super::node::ENTRIES_PER_NODE;
use crate::error::{Check, Error};
use crate::units::{BLOCK_BYTES, PoolBlock};

/// Blocks of a group, 128 MiB.
pub const GROUP_BLOCKS: u64 = 32768;
/// Fewest blocks of the last group; a shorter rest of the file is not used.
pub const GROUP_BLOCKS_MIN: u64 = 1024;
/// Pages of reference counts of a group.
pub const PAGES_PER_GROUP: u32 = 32;
/// Counts of a page, 4 bytes each.
pub const COUNTS_PER_PAGE: u64 = 1024;
/// Pages of data checksums of a group: 32 of checksums, then one of "has one" bits.
pub const CHECKSUM_PAGES_PER_GROUP: u32 = 33;
/// Groups of one group-index block.
pub const GROUPS_PER_INDEX: u64 = 512;
/// Most group-index blocks that the superblock has room for: 19 TiB of groups.
pub const GROUP_INDEXES_MAX: usize = 304;
/// First block of the journal ring.
pub const JOURNAL_FIRST: PoolBlock = PoolBlock(512);
/// Fewest blocks of the ring: it must take the largest batch.
pub const JOURNAL_BLOCKS_MIN: u64 = 256;
/// The copies of the superblock: first and mirror of slot A, then of slot B.
pub const SUPERBLOCK_COPIES: [[PoolBlock; 2]; 2] = [[PoolBlock(0), PoolBlock(256)], [PoolBlock(128), PoolBlock(384)]];

const GROUPS_MAX: u64 = GROUP_INDEXES_MAX as u64 * GROUPS_PER_INDEX;
/// Blocks of a pair, and of both slots of what is written as pairs.
const PAIR: u64 = 2;
const BOTH_PAIRS: u64 = 4;
const PAGE_SLOTS: u64 = PAGES_PER_GROUP as u64 * 2;
const CHECKSUM_PAGE_SLOTS: u64 = CHECKSUM_PAGES_PER_GROUP as u64 * 2;

const _: () = assert!(GROUP_BLOCKS == PAGES_PER_GROUP as u64 * COUNTS_PER_PAGE);
const _: () = assert!(BOTH_PAIRS * 2 + PAGE_SLOTS + CHECKSUM_PAGE_SLOTS < GROUP_BLOCKS_MIN);
const _: () = assert!(ENTRIES_PER_NODE * size_of::<super::entry::RawEntry>() == BLOCK_BYTES as usize);

/// One of the two places of a structure that is written anew by turns. Its parent says which one is current.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Slot {
    /// The first.
    A,
    /// The second.
    B,
}

impl Slot {
    /// Where the next version goes.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// 0 or 1.
    pub const fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }

    const fn offset(self, blocks: u64) -> u64 {
        match self {
            Self::A => 0,
            Self::B => blocks,
        }
    }
}

/// The layout of a pool of a certain size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Blocks of the whole file.
    pub pool_blocks: u64,
    /// Blocks of the journal ring.
    pub journal_blocks: u64,
}

impl Geometry {
    /// The layout of a new pool of `size_bytes` with a ring of `journal_bytes`, both multiples of the block size.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] when a size is not a multiple of 4096, the ring is smaller than the largest batch, or the
    /// pool is too small for one group or too large for the group indexes.
    pub fn new(size_bytes: u64, journal_bytes: u64) -> Result<Self, Error> {
        for (what, bytes) in [("pool size", size_bytes), ("journal size", journal_bytes)] {
            if bytes % BLOCK_BYTES != 0 {
                return Err(Error::InvalidInput(format!("{what} {bytes} is not a multiple of {BLOCK_BYTES} bytes")));
            }
        }
        let geometry = Self { pool_blocks: size_bytes / BLOCK_BYTES, journal_blocks: journal_bytes / BLOCK_BYTES };
        geometry.check().map_err(|_| {
            Error::InvalidInput(if geometry.journal_blocks < JOURNAL_BLOCKS_MIN {
                format!("journal size {journal_bytes} is below {} bytes (1 MiB)", JOURNAL_BLOCKS_MIN * BLOCK_BYTES)
            } else if geometry.group_count() == 0 {
                let least = (JOURNAL_FIRST.0 + GROUP_BLOCKS_MIN).saturating_add(geometry.journal_blocks);
                let least_bytes = least.saturating_mul(BLOCK_BYTES);
                format!(
                    "pool size {size_bytes} is too small: with a journal of {journal_bytes} bytes it needs at least \
                     {least_bytes} bytes"
                )
            } else {
                format!("pool size {size_bytes} is too large: at most 19 TiB ({GROUPS_MAX} groups of 128 MiB)")
            })
        })?;
        Ok(geometry)
    }

    /// Refuses what no pool can have.
    pub(super) fn check(&self) -> Result<(), Check> {
        if self.journal_blocks < JOURNAL_BLOCKS_MIN {
            return Err(Check::OutOfBounds { field: "journal_blocks", value: self.journal_blocks });
        }
        if !(1..=GROUPS_MAX).contains(&self.group_count()) {
            return Err(Check::OutOfBounds { field: "pool_blocks", value: self.pool_blocks });
        }
        Ok(())
    }

    /// First block of group 0: what follows the ring.
    pub fn first_group(&self) -> PoolBlock {
        PoolBlock(JOURNAL_FIRST.0.saturating_add(self.journal_blocks))
    }

    /// Groups: whole ones, and a last one of at least [`GROUP_BLOCKS_MIN`] blocks.
    pub fn group_count(&self) -> u64 {
        let blocks = self.pool_blocks.saturating_sub(self.first_group().0);
        blocks / GROUP_BLOCKS + u64::from(blocks % GROUP_BLOCKS >= GROUP_BLOCKS_MIN)
    }

    /// First block of `group`.
    pub fn group_start(&self, group: u64) -> PoolBlock {
        debug_assert!(group <= GROUPS_MAX);
        self.first_group().plus(group * GROUP_BLOCKS)
    }

    /// Blocks of `group` that exist: fewer than [`GROUP_BLOCKS`] only in the last. Its pages cover the rest as taken.
    pub fn group_blocks(&self, group: u64) -> u64 {
        self.pool_blocks.saturating_sub(self.group_start(group).0).min(GROUP_BLOCKS)
    }

    /// The group of `block` and its index there; none for superblocks, the ring, an unused rest, and beyond the end.
    pub fn group_of(&self, block: PoolBlock) -> Option<(u64, u32)> {
        if block.0 >= self.pool_blocks {
            return None;
        }
        let index = block.0.checked_sub(self.first_group().0)?;
        let group = index / GROUP_BLOCKS;
        (group < self.group_count()).then_some((group, (index % GROUP_BLOCKS) as u32))
    }

    /// Blocks at the head of `group` that the layout takes; their count is 1 for ever.
    ///
    /// In this order: group index A and B, each a pair, in the first group of every 512; descriptor A and B, each a
    /// pair; 32 pages of counts, A and B; 33 pages of data checksums, A and B.
    pub fn layout_blocks(&self, group: u64) -> u64 {
        Self::index_blocks(group) + BOTH_PAIRS + PAGE_SLOTS + CHECKSUM_PAGE_SLOTS
    }

    /// Those of them that every group in use needs on the host: all but the pages of data checksums, which come last and
    /// are wanted from the first seal on.
    pub fn layout_blocks_unsealed(&self, group: u64) -> u64 {
        self.layout_blocks(group) - CHECKSUM_PAGE_SLOTS
    }

    const fn index_blocks(group: u64) -> u64 {
        if group.is_multiple_of(GROUPS_PER_INDEX) { BOTH_PAIRS } else { 0 }
    }

    /// First block of the pair of group-index block `index` in `slot`.
    pub fn index_block(&self, index: u64, slot: Slot) -> PoolBlock {
        self.group_start(index * GROUPS_PER_INDEX).plus(slot.offset(PAIR))
    }

    /// Group-index blocks of this pool.
    pub fn index_count(&self) -> u64 {
        self.group_count().div_ceil(GROUPS_PER_INDEX)
    }

    /// First block of the pair of the descriptor of `group` in `slot`.
    pub fn descriptor_block(&self, group: u64, slot: Slot) -> PoolBlock {
        self.group_start(group).plus(Self::index_blocks(group) + slot.offset(PAIR))
    }

    /// Block of page `page` of the counts of `group` in `slot`.
    pub fn page_block(&self, group: u64, page: u32, slot: Slot) -> PoolBlock {
        debug_assert!(page < PAGES_PER_GROUP);
        PoolBlock(self.pages_range(group).start + u64::from(page) * 2 + slot.offset(1))
    }

    /// All page blocks of the counts of `group`, both slots, as numbers of blocks: A0 B0 A1 B1 and so on.
    pub fn pages_range(&self, group: u64) -> Range<u64> {
        let first = self.descriptor_block(group, Slot::A).0 + BOTH_PAIRS;
        first..first + PAGE_SLOTS
    }

    /// All page blocks of the data checksums of `group`, both slots, as numbers of blocks.
    pub fn checksum_pages_range(&self, group: u64) -> Range<u64> {
        let first = self.pages_range(group).end;
        first..first + CHECKSUM_PAGE_SLOTS
    }

    /// Block of page `page` of the data checksums of `group` in `slot`; page 32 is that of the "has one" bits.
    pub fn checksum_page_block(&self, group: u64, page: u32, slot: Slot) -> PoolBlock {
        debug_assert!(page < CHECKSUM_PAGES_PER_GROUP);
        PoolBlock(self.pages_range(group).end + u64::from(page) * 2 + slot.offset(1))
    }
}

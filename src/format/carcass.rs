//! Pages of the carcass table: subtrees that nobody names any more and that wait to be taken apart.

use bytemuck::Zeroable;

use super::entry::{Entry, EntryKind, RawEntry};
use super::layout::{at_most, raw, raw_struct, zero};
use super::little_endian::{U32, U40, U64};
use super::node::{LEVEL_MAX, VOLUME_BLOCKS_MAX, span_blocks};
use super::volume_record::volume_id;
use crate::error::Check;
use crate::units::{BLOCK_SIZE, Clock, VirtualBlock, VolumeId};

/// Carcasses of one page.
pub const CARCASSES_PER_PAGE: usize = 63;

const MAGIC: [u8; 8] = *b"plywcar\0";
const ACCOUNT: u8 = 1;
const COUNTING: u8 = 2;

raw_struct! {
    /// A carcass as it stands in its page.
    RawCarcass: 64 {
        0 id: U64,
        8 entry: RawEntry,
        24 first: U64,
        32 cursor: U64,
        40 volume: U64,
        48 created_at: U40,
        53 level: u8,
        54 flags: u8,
        55 reserved: u8,
        56 cut: U64,
    }
}

raw_struct! {
    /// A page of the carcass table as it stands in its block.
    RawCarcassPage: 4096 {
        0 magic: [u8; 8],
        8 count: U32,
        12 reserved: [u8; 52],
        64 carcasses: [RawCarcass; CARCASSES_PER_PAGE],
    }
}

/// An unlinked subtree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Carcass {
    /// Its id, never reused.
    pub id: u64,
    /// The entry that was unlinked: a node.
    pub entry: Entry,
    /// Level of that node.
    pub level: u8,
    /// First virtual block that it covers; the checksums of its nodes are seeded with their places.
    pub first: VirtualBlock,
    /// How far it has been eaten: the next virtual block, counted from [`first`](Carcass::first).
    pub cursor: u64,
    /// The volume it was cut out of, which may be gone.
    pub volume: VolumeId,
    /// That volume's `created_at`: what was born before it was not its own.
    pub created_at: Clock,
    /// Whether the volume's own and mapped blocks go down with it: a discard or a shrink, not a deletion.
    pub account: bool,
    /// Whether others hold the subtree too: it is walked to be counted only, and let go at the end.
    pub counting: bool,
    /// The id of the carcass as which its blocks were cut out of the volume: its own, unless it is part of another.
    pub cut: u64,
}

/// The block of a page of carcasses.
///
/// # Panics
/// When there are more than [`CARCASSES_PER_PAGE`].
pub fn encode_carcasses(carcasses: &[Carcass]) -> Box<[u8; BLOCK_SIZE]> {
    let mut raw = RawCarcassPage {
        magic: MAGIC,
        count: U32::new(carcasses.len() as u32),
        reserved: [0; 52],
        carcasses: [RawCarcass::zeroed(); CARCASSES_PER_PAGE],
    };
    for (place, carcass) in raw.carcasses[..carcasses.len()].iter_mut().zip(carcasses) {
        *place = RawCarcass {
            id: U64::new(carcass.id),
            entry: carcass.entry.to_raw(),
            first: U64::new(carcass.first.0),
            cursor: U64::new(carcass.cursor),
            volume: U64::new(carcass.volume.0),
            created_at: U40::new(carcass.created_at.0),
            level: carcass.level,
            flags: if carcass.account { ACCOUNT } else { 0 } | if carcass.counting { COUNTING } else { 0 },
            reserved: 0,
            cut: U64::new(carcass.cut),
        };
    }
    Box::new(bytemuck::cast(raw))
}

/// Reads a page of carcasses of a pool of `pool_blocks`.
///
/// # Errors
/// A wrong length or magic; a carcass that is not a node of the pool, does not stand where a node of its level can, or
/// whose cursor is at or beyond its end, or that is part of a later one; reserved fields that are not zero.
pub fn decode_carcasses(bytes: &[u8], pool_blocks: u64) -> Result<Vec<Carcass>, Check> {
    let raw: &RawCarcassPage = raw(bytes)?;
    if raw.magic != MAGIC {
        return Err(Check::Magic);
    }
    zero(&raw.reserved, "reserved")?;
    let count = raw.count.get();
    let (used, unused) = raw
        .carcasses
        .split_at_checked(count as usize)
        .ok_or(Check::OutOfBounds { field: "count", value: count.into() })?;
    zero(bytemuck::cast_slice(unused), "carcasses")?;
    used.iter().map(|raw| decode_carcass(raw, pool_blocks)).collect()
}

fn decode_carcass(raw: &RawCarcass, pool_blocks: u64) -> Result<Carcass, Check> {
    zero(&[raw.reserved], "carcass.reserved")?;
    if raw.flags & !(ACCOUNT | COUNTING) != 0 {
        return Err(Check::Undefined { field: "carcass.flags", value: raw.flags.into() });
    }
    let entry = Entry::from_raw(&raw.entry)?;
    if entry.kind != EntryKind::Node {
        return Err(Check::Inconsistent("a carcass is not a node"));
    }
    entry.check_address(pool_blocks)?;
    at_most(raw.level.into(), LEVEL_MAX.into(), "carcass.level")?;
    let span = span_blocks(raw.level);
    let first = at_most(raw.first.get(), VOLUME_BLOCKS_MAX - span, "carcass.first")?;
    if !first.is_multiple_of(span) {
        return Err(Check::OutOfBounds { field: "carcass.first", value: first });
    }
    Ok(Carcass {
        id: raw.id.get(),
        entry,
        level: raw.level,
        first: VirtualBlock(first),
        cursor: at_most(raw.cursor.get(), span - 1, "carcass.cursor")?,
        volume: volume_id(raw.volume, "carcass.volume")?,
        created_at: Clock(raw.created_at.get()),
        account: raw.flags & ACCOUNT != 0,
        counting: raw.flags & COUNTING != 0,
        cut: at_most(raw.cut.get(), raw.id.get(), "carcass.cut")?,
    })
}

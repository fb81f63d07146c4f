//! A record: one change, as the journal and the pending log carry it.
//!
//! Records are logical where they can be: they name volumes, ranges and data blocks, never the address of a node. Types 3
//! (zero) and 10 (carcass) are reserved.

use crate::error::Check;
use crate::format::entry::{ADDRESS_MAX, CLOCK_MAX};
use crate::format::layout::{at_most, raw_prefix, raw_struct, zero};
use crate::format::little_endian::{U16, U32, U64};
use crate::format::node::VOLUME_BLOCKS_MAX;
use crate::format::volume_record::{VolumeRecord, volume_id};
use crate::units::{BLOCK_SIZE, Clock, PoolBlock, VirtualBlock, VolumeId};

const MAP: u8 = 1;
const UNMAP: u8 = 2;
const VOLUME_CREATED: u8 = 4;
const VOLUME_CHANGED: u8 = 5;
const VOLUME_DELETED: u8 = 6;
const VOLUME_SHARED: u8 = 7;
const VOLUME_ROLLED_BACK: u8 = 8;
const POOL_GROWN: u8 = 9;

/// Records are padded to this, so that each starts aligned within the stream.
const ALIGNMENT: usize = 8;

/// The raw forms. Each begins with the common header.
pub(in crate::format) mod raw {
    use super::{U16, U32, U64, raw_struct};

    raw_struct! {
        /// What every record begins with.
        RawRecordHeader: 8 {
            0 kind: u8,
            1 flags: u8,
            2 length: U16,
            4 count: U32,
        }
    }

    raw_struct! {
        /// Body of a map record.
        RawMap: 24 {
            0 volume: U64,
            8 virtual_block: U64,
            16 pool_block: U64,
        }
    }

    raw_struct! {
        /// Body of an unmap record.
        RawUnmap: 24 {
            0 volume: U64,
            8 virtual_block: U64,
            16 count: U64,
        }
    }

    raw_struct! {
        /// Body of a volume-deleted record.
        RawVolumeDeleted: 8 {
            0 volume: U64,
        }
    }

    raw_struct! {
        /// Head of the body of a volume-shared record; the new volume's record follows.
        RawVolumeShared: 16 {
            0 origin: U64,
            8 clock: U64,
        }
    }

    raw_struct! {
        /// Body of a volume-rolled-back record.
        RawVolumeRolledBack: 24 {
            0 volume: U64,
            8 snapshot: U64,
            16 clock: U64,
        }
    }

    raw_struct! {
        /// Body of a pool-grown record.
        RawPoolGrown: 8 {
            0 groups_in_use: U64,
        }
    }
}
use raw::{RawMap, RawPoolGrown, RawRecordHeader, RawUnmap, RawVolumeDeleted, RawVolumeRolledBack, RawVolumeShared};

/// One change.
#[derive(Clone, PartialEq, Debug)]
pub enum Record {
    /// Virtual blocks now stand in pool blocks, consecutive on both sides.
    Map {
        /// The volume.
        volume: VolumeId,
        /// First virtual block.
        virtual_block: VirtualBlock,
        /// First pool block.
        pool_block: PoolBlock,
        /// How many, from 1.
        count: u32,
    },
    /// Virtual blocks are holes now.
    Unmap {
        /// The volume.
        volume: VolumeId,
        /// First virtual block.
        virtual_block: VirtualBlock,
        /// How many, from 1.
        count: u64,
    },
    /// There is a new, empty volume.
    VolumeCreated(Box<VolumeRecord>),
    /// A volume's properties are others. Root, own and mapped blocks of the record here mean nothing.
    VolumeChanged(Box<VolumeRecord>),
    /// A volume is gone.
    VolumeDeleted {
        /// The volume.
        volume: VolumeId,
    },
    /// A new volume shares all mappings of another: a snapshot if it is read-only, else a clone.
    VolumeShared {
        /// What it was made from.
        origin: VolumeId,
        /// The clock's new value.
        clock: Clock,
        /// The new volume.
        created: Box<VolumeRecord>,
    },
    /// A volume has the mappings of one of its snapshots again.
    VolumeRolledBack {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: VolumeId,
        /// The clock's new value.
        clock: Clock,
    },
    /// Blocks may be handed out from more groups.
    PoolGrown {
        /// All groups in use now.
        groups_in_use: u64,
    },
}

impl Record {
    /// Appends its bytes, a multiple of eight.
    ///
    /// # Panics
    /// When a volume's record cannot be encoded.
    pub fn encode(&self, into: &mut Vec<u8>) {
        match self {
            Self::Map { volume, virtual_block, pool_block, count } => {
                let (volume, virtual_block) = (U64::new(volume.0), U64::new(virtual_block.0));
                let body = RawMap { volume, virtual_block, pool_block: U64::new(pool_block.0) };
                append(into, MAP, *count, bytemuck::bytes_of(&body), None);
            }
            Self::Unmap { volume, virtual_block, count } => {
                let (volume, virtual_block) = (U64::new(volume.0), U64::new(virtual_block.0));
                let body = RawUnmap { volume, virtual_block, count: U64::new(*count) };
                append(into, UNMAP, 0, bytemuck::bytes_of(&body), None);
            }
            Self::VolumeCreated(record) => append(into, VOLUME_CREATED, 0, &[], Some(record)),
            Self::VolumeChanged(record) => append(into, VOLUME_CHANGED, 0, &[], Some(record)),
            Self::VolumeDeleted { volume } => {
                let body = RawVolumeDeleted { volume: U64::new(volume.0) };
                append(into, VOLUME_DELETED, 0, bytemuck::bytes_of(&body), None);
            }
            Self::VolumeShared { origin, clock, created } => {
                let body = RawVolumeShared { origin: U64::new(origin.0), clock: U64::new(clock.0) };
                append(into, VOLUME_SHARED, 0, bytemuck::bytes_of(&body), Some(created));
            }
            Self::VolumeRolledBack { volume, snapshot, clock } => {
                let (volume, snapshot) = (U64::new(volume.0), U64::new(snapshot.0));
                let body = RawVolumeRolledBack { volume, snapshot, clock: U64::new(clock.0) };
                append(into, VOLUME_ROLLED_BACK, 0, bytemuck::bytes_of(&body), None);
            }
            Self::PoolGrown { groups_in_use } => {
                let body = RawPoolGrown { groups_in_use: U64::new(*groups_in_use) };
                append(into, POOL_GROWN, 0, bytemuck::bytes_of(&body), None);
            }
        }
    }

    /// The record at the head of `bytes`, and how many of them it takes. Pool blocks are bounded by their 48 bits only;
    /// whoever replays knows the pool.
    ///
    /// # Errors
    /// An undefined type, a length that is not that of the type, a field outside its bounds, or reserved and not zero.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), Check> {
        let (header, _) = raw_prefix::<RawRecordHeader>(bytes)?;
        if header.flags != 0 {
            return Err(Check::Reserved("record.flags"));
        }
        let length = usize::from(header.length.get());
        if length < size_of::<RawRecordHeader>() || !length.is_multiple_of(ALIGNMENT) {
            return Err(Check::OutOfBounds { field: "record.length", value: length as u64 });
        }
        let body = bytes.get(size_of::<RawRecordHeader>()..length).ok_or(Check::Truncated)?;
        let record = match header.kind {
            MAP => return Ok((decode_map(header, body)?, length)),
            UNMAP => decode_unmap(body)?,
            VOLUME_CREATED => Self::VolumeCreated(cut_record(body)?),
            VOLUME_CHANGED => Self::VolumeChanged(cut_record(body)?),
            VOLUME_DELETED => {
                let raw: &RawVolumeDeleted = body_of(body)?;
                Self::VolumeDeleted { volume: volume_id(raw.volume, "volume")? }
            }
            VOLUME_SHARED => {
                let (raw, rest) = raw_prefix::<RawVolumeShared>(body)?;
                let origin = volume_id(raw.origin, "origin")?;
                Self::VolumeShared { origin, clock: clock(raw.clock)?, created: cut_record(rest)? }
            }
            VOLUME_ROLLED_BACK => {
                let raw: &RawVolumeRolledBack = body_of(body)?;
                let (volume, snapshot) = (volume_id(raw.volume, "volume")?, volume_id(raw.snapshot, "snapshot")?);
                Self::VolumeRolledBack { volume, snapshot, clock: clock(raw.clock)? }
            }
            POOL_GROWN => {
                let raw: &RawPoolGrown = body_of(body)?;
                Self::PoolGrown { groups_in_use: raw.groups_in_use.get() }
            }
            other => return Err(Check::Undefined { field: "record.kind", value: other.into() }),
        };
        zero(bytemuck::bytes_of(&header.count), "record.count")?;
        Ok((record, length))
    }

    /// Calls `each` with every run of pool blocks that the record names: first block and count. Replay marks them as
    /// taken before it allocates anything. The root inside a volume's record is not one of them: it means nothing here.
    pub fn named_blocks(&self, mut each: impl FnMut(PoolBlock, u64)) {
        match self {
            Self::Map { pool_block, count, .. } => each(*pool_block, u64::from(*count)),
            Self::VolumeCreated(record) | Self::VolumeChanged(record) | Self::VolumeShared { created: record, .. } => {
                for reference in &record.attributes {
                    each(reference.address, 1);
                }
            }
            Self::Unmap { .. }
            | Self::VolumeDeleted { .. }
            | Self::VolumeRolledBack { .. }
            | Self::PoolGrown { .. } => {}
        }
    }
}

/// Header, body, and the record of a volume without the zeros at its end.
fn append(into: &mut Vec<u8>, kind: u8, count: u32, body: &[u8], record: Option<&VolumeRecord>) {
    let block = record.map(VolumeRecord::encode);
    let record = block.as_ref().map_or(&[][..], |block| {
        let used = block.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        &block[..used.next_multiple_of(ALIGNMENT)]
    });
    let length = size_of::<RawRecordHeader>() + body.len() + record.len();
    // At most a block and 32 bytes.
    let header = RawRecordHeader { kind, flags: 0, length: U16::new(length as u16), count: U32::new(count) };
    into.extend_from_slice(bytemuck::bytes_of(&header));
    into.extend_from_slice(body);
    into.extend_from_slice(record);
}

/// A body of fixed length: a longer one is as wrong as a shorter one.
fn body_of<T: bytemuck::AnyBitPattern>(body: &[u8]) -> Result<&T, Check> {
    match raw_prefix(body)? {
        (raw, []) => Ok(raw),
        (_, rest) => Err(Check::OutOfBounds { field: "record.length", value: rest.len() as u64 }),
    }
}

fn clock(raw: U64) -> Result<Clock, Check> {
    at_most(raw.get(), CLOCK_MAX, "clock").map(Clock)
}

/// A range of `count` virtual blocks, at least one, that some volume can have.
fn check_range(virtual_block: u64, count: u64) -> Result<(), Check> {
    at_most(virtual_block, VOLUME_BLOCKS_MAX - 1, "virtual_block")?;
    if count == 0 {
        return Err(Check::OutOfBounds { field: "count", value: 0 });
    }
    at_most(count, VOLUME_BLOCKS_MAX - virtual_block, "count").map(|_| ())
}

fn decode_map(header: &RawRecordHeader, body: &[u8]) -> Result<Record, Check> {
    let raw: &RawMap = body_of(body)?;
    let (virtual_block, pool_block, count) = (raw.virtual_block.get(), raw.pool_block.get(), header.count.get());
    check_range(virtual_block, count.into())?;
    // A count of at most 2^32 leaves the bound above 0.
    at_most(pool_block, ADDRESS_MAX + 1 - u64::from(count), "pool_block")?;
    if pool_block == 0 {
        return Err(Check::OutOfBounds { field: "pool_block", value: 0 });
    }
    Ok(Record::Map {
        volume: volume_id(raw.volume, "volume")?,
        virtual_block: VirtualBlock(virtual_block),
        pool_block: PoolBlock(pool_block),
        count,
    })
}

fn decode_unmap(body: &[u8]) -> Result<Record, Check> {
    let raw: &RawUnmap = body_of(body)?;
    let (virtual_block, count) = (raw.virtual_block.get(), raw.count.get());
    check_range(virtual_block, count)?;
    Ok(Record::Unmap { volume: volume_id(raw.volume, "volume")?, virtual_block: VirtualBlock(virtual_block), count })
}

/// The record of a volume whose zeros at the end were cut off.
fn cut_record(bytes: &[u8]) -> Result<Box<VolumeRecord>, Check> {
    let mut block = [0; BLOCK_SIZE];
    block
        .get_mut(..bytes.len())
        .ok_or(Check::OutOfBounds { field: "record.length", value: bytes.len() as u64 })?
        .copy_from_slice(bytes);
    // One encoding for one record: zeros that should have been cut are not what was written.
    if bytes.last_chunk() == Some(&[0; ALIGNMENT]) {
        return Err(Check::Inconsistent("a volume's record ends in zeros"));
    }
    VolumeRecord::decode(&block).map(Box::new)
}

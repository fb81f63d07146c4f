//! Checksums of metadata: CRC-32 seeded with the pool and the place.
//!
//! The checksum of a block stands in what points at it, and is computed over a seed that names the pool and the place the
//! block belongs to, then the block. A flipped bit, a write that never landed, and a right block in a wrong place are
//! all found by the one comparison.

use uuid::Uuid;

use super::layout::raw_struct;
use super::little_endian::{U32, U64};
use crate::canary::{Canary, is_broken};
use crate::units::{VirtualBlock, VolumeId};

raw_struct! {
    /// What goes into the checksum before the block's bytes.
    RawSeed: 32 {
        0 pool: [u8; 16],
        16 kind: u8,
        17 level: u8,
        18 reserved: [u8; 2],
        20 index: U32,
        24 number: U64,
    }
}

/// What a block of metadata is and where it belongs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    /// A node of a volume's tree. The volume is not named: volumes share nodes.
    Node {
        /// Its level, 0 for a leaf.
        level: u8,
        /// First virtual block that it covers.
        first: VirtualBlock,
    },
    /// A node of the volume table or the carcass table.
    TableNode {
        /// Its level, 0 for a leaf.
        level: u8,
        /// First index of the table that it covers.
        first: u64,
    },
    /// The record of a volume.
    VolumeRecord(VolumeId),
    /// A block of a volume's attributes.
    Attributes {
        /// Always 0: attributes are written before their volume has an id.
        volume: VolumeId,
        /// Which of its attribute blocks.
        index: u32,
    },
    /// A page of the carcass table, by index.
    CarcassPage(u64),
    /// A group-index block, by index.
    GroupIndex(u64),
    /// The descriptor of a group.
    GroupDescriptor(u64),
    /// A page of a group's counts.
    SpaceMapPage {
        /// The group.
        group: u64,
        /// Which of its pages.
        page: u32,
    },
    /// A page of a group's data checksums.
    ChecksumPage {
        /// The group.
        group: u64,
        /// Which of its pages.
        page: u32,
    },
}

/// The checksum of the metadata block `bytes` of the pool `pool` that belongs at `place`.
pub fn checksum(pool: &Uuid, place: Place, bytes: &[u8]) -> u32 {
    let (kind, level, index, number) = match place {
        Place::Node { level, first } => (1, level, 0, first.0),
        Place::TableNode { level, first } => (2, level, 0, first),
        Place::VolumeRecord(volume) => (3, 0, 0, volume.0),
        Place::Attributes { volume, index } => (4, 0, index, volume.0),
        Place::CarcassPage(number) => (5, 0, 0, number),
        Place::GroupIndex(number) => (6, 0, 0, number),
        Place::GroupDescriptor(group) => (7, 0, 0, group),
        Place::SpaceMapPage { group, page } => (8, 0, page, group),
        Place::ChecksumPage { group, page } => (9, 0, page, group),
    };
    let seed = RawSeed {
        pool: *pool.as_bytes(),
        kind,
        level,
        reserved: [0; 2],
        index: U32::new(index),
        number: U64::new(number),
    };
    if is_broken(Canary::UnseededChecksums) {
        return seeded(&[], &[bytes]);
    }
    seeded(bytemuck::bytes_of(&seed), &[bytes])
}

/// CRC-32 over `seed` and then `parts`.
pub(super) fn seeded(seed: &[u8], parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(seed);
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

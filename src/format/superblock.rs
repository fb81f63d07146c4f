//! The superblock: the one structure that is found without being pointed at, and that everything else hangs under.
//!
//! Four copies, two of each slot; [`choose_superblock`](super::choose_superblock) picks one. Magic, version and checksum
//! keep their place and meaning in every version of the format, so that a damaged superblock is never taken for one of a
//! newer version.

use bytemuck::Zeroable;
use uuid::Uuid;

use super::checksum::seeded;
use super::entry::{CLOCK_MAX, RawRoot, Root};
use super::geometry::{GROUP_INDEXES_MAX, GROUPS_PER_INDEX, Geometry, JOURNAL_FIRST, Slot};
use super::layout::{at_most, padded, raw, raw_struct, text, zero};
use super::little_endian::{U16, U32, U64, U128};
use super::node::VOLUME_BLOCKS_MAX;
use super::unfinished::Unfinished;
use crate::error::{Check, Corrupt, Error, Structure};
use crate::units::{BLOCK_SIZE, Clock, Generation, Lsn, PoolBlock, VolumeId};

/// Version of the format that this build writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Longest name of a pool in bytes.
pub const POOL_NAME_BYTES_MAX: usize = 64;
/// Incompatible features that this build knows. A pool with another is refused.
pub const INCOMPATIBLE_KNOWN: u64 = Unfinished::FEATURES;
/// Features that this build can keep when it writes. A pool with another may only be read.
pub const READ_ONLY_COMPATIBLE_KNOWN: u64 = 0;

const MAGIC: [u8; 8] = *b"plywood\0";
const CHECKSUM_CRC32: u8 = 1;
const DIGEST_BLAKE3: u8 = 1;
const SLOT_B: u8 = 1;
const VERIFY_ON_READ: u64 = 1;
const METADATA_COUNTED: u64 = 2;
/// The one level of group indexes that this version has.
const INDEX_LEVEL_MAX: u64 = 0;
/// Most that a counter says which only grows: far above what any pool reaches, far below where it would overflow.
pub(super) const COUNTER_MAX: u64 = 1 << 62;

raw_struct! {
    /// A reference to a group-index block.
    RawGroupIndexRef: 8 {
        0 checksum: U32,
        4 slot: u8,
        5 level: u8,
        6 reserved: [u8; 2],
    }
}

raw_struct! {
    /// The superblock as it stands in its block.
    RawSuperblock: 4096 {
        0 magic: [u8; 8],
        8 version: U32,
        12 checksum: U32,
        16 incompatible: U64,
        24 read_only_compatible: U64,
        32 compatible: U64,
        40 uuid: [u8; 16],
        56 name: [u8; POOL_NAME_BYTES_MAX],
        120 name_length: U16,
        122 checksum_algorithm: u8,
        123 digest_algorithm: u8,
        124 reserved_algorithms: [u8; 4],
        128 generation: U64,
        136 clock: U64,
        144 lsn: U64,
        152 pool_blocks: U64,
        160 groups_in_use: U64,
        168 journal_first: U64,
        176 journal_blocks: U64,
        184 journal_uuid: [u8; 16],
        200 journal_append: U64,
        208 journal_chain: U32,
        212 group_index_count: U32,
        216 session: U128,
        232 reserved_host: [u8; 24],
        256 volume_table: RawRoot,
        280 carcass_table: RawRoot,
        304 next_volume: U64,
        312 next_carcass: U64,
        320 transaction_id: U64,
        328 volume_count: U64,
        336 used_blocks: U64,
        344 flags: U64,
        352 scrub_next: U64,
        360 scrub_faults: U64,
        368 scrub_begun: U64,
        376 scrub_ended: U64,
        384 size_limit: U64,
        392 metadata_blocks: U64,
        400 reserved: [u8; 1264],
        1664 group_index: [RawGroupIndexRef; GROUP_INDEXES_MAX],
    }
}

/// Which version of a group-index block is current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupIndexRef {
    /// Checksum of the block, seeded with [`Place::GroupIndex`](super::Place::GroupIndex).
    pub checksum: u32,
    /// Where it stands.
    pub slot: Slot,
    /// 0: the block describes groups. Higher levels are reserved.
    pub level: u8,
}

/// Where scrubbing stands.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ScrubState {
    /// The block at which the pass under way goes on; 0 when there is none.
    pub next: PoolBlock,
    /// Faults that this pass, or else the last, has found.
    pub faults: u64,
    /// When this pass, or else the last, began, in nanoseconds since 1970; 0 for never.
    pub begun: u64,
    /// When the last whole pass ended; 0 for never.
    pub ended: u64,
}

/// The state of a pool at a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Identity of the pool.
    pub uuid: Uuid,
    /// Name of the pool, at most [`POOL_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Features that a build which does not know them must not write to.
    pub read_only_compatible: u64,
    /// Features that a build which does not know them may ignore.
    pub compatible: u64,
    /// Features that a build which does not know them must refuse: [`INCOMPATIBLE_KNOWN`].
    pub incompatible: u64,
    /// Number of the checkpoint, from 1.
    pub generation: Generation,
    /// The clock of sharings.
    pub clock: Clock,
    /// The last change that the checkpoint holds. Records up to it are never replayed.
    pub lsn: Lsn,
    /// Size of the file and of the ring.
    pub geometry: Geometry,
    /// Groups from which blocks may have been handed out.
    pub groups_in_use: u64,
    /// Block within the ring where the next batch goes.
    pub journal_append: u64,
    /// Checksum of the batch before it; 0 before the first.
    pub journal_chain: u32,
    /// The life of the pending log that goes with this pool; 0 for none.
    pub session: u128,
    /// The tree of volume records, by id.
    pub volume_table: Root,
    /// The tree of carcass pages, by index.
    pub carcass_table: Root,
    /// Id of the next volume.
    pub next_volume: VolumeId,
    /// Id of the next carcass.
    pub next_carcass: u64,
    /// An orchestrator's number, changed by compare and swap.
    pub transaction_id: u64,
    /// Volumes in the table.
    pub volume_count: u64,
    /// Blocks whose count is not 0, those of the layout included.
    pub used_blocks: u64,
    /// Of these, nodes, records, attributes and tables: neither data nor layout. None where they were never counted.
    pub metadata_blocks: Option<u64>,
    /// Size up to which the pool grows by itself when it is full, in bytes; 0: it does not.
    pub size_limit_bytes: u64,
    /// Reads of sealed blocks are verified, whatever the volume.
    pub verify_on_read: bool,
    /// How far the pool has been scrubbed.
    pub scrub: ScrubState,
    /// The current group-index blocks, by index.
    pub group_index: Vec<GroupIndexRef>,
}

impl Superblock {
    /// Its block, checksum included. All copies of a slot are the same bytes.
    ///
    /// # Panics
    /// When the name or the list of group indexes is longer than its field.
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        let mut group_index = [RawGroupIndexRef::zeroed(); GROUP_INDEXES_MAX];
        for (place, reference) in group_index[..self.group_index.len()].iter_mut().zip(&self.group_index) {
            *place = RawGroupIndexRef {
                checksum: U32::new(reference.checksum),
                slot: if reference.slot == Slot::B { SLOT_B } else { 0 },
                level: reference.level,
                reserved: [0; 2],
            };
        }
        let flag = |flag: u64, is_set: bool| if is_set { flag } else { 0 };
        let flags = flag(VERIFY_ON_READ, self.verify_on_read) | flag(METADATA_COUNTED, self.metadata_blocks.is_some());
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: U32::new(FORMAT_VERSION),
            checksum: U32::new(0),
            incompatible: U64::new(self.incompatible),
            read_only_compatible: U64::new(self.read_only_compatible),
            compatible: U64::new(self.compatible),
            uuid: *self.uuid.as_bytes(),
            name: padded(self.name.as_bytes()),
            name_length: U16::new(self.name.len() as u16),
            checksum_algorithm: CHECKSUM_CRC32,
            digest_algorithm: DIGEST_BLAKE3,
            reserved_algorithms: [0; 4],
            generation: U64::new(self.generation.0),
            clock: U64::new(self.clock.0),
            lsn: U64::new(self.lsn.0),
            pool_blocks: U64::new(self.geometry.pool_blocks),
            groups_in_use: U64::new(self.groups_in_use),
            journal_first: U64::new(JOURNAL_FIRST.0),
            journal_blocks: U64::new(self.geometry.journal_blocks),
            journal_uuid: [0; 16],
            journal_append: U64::new(self.journal_append),
            journal_chain: U32::new(self.journal_chain),
            group_index_count: U32::new(self.group_index.len() as u32),
            session: U128::new(self.session),
            reserved_host: [0; 24],
            volume_table: self.volume_table.to_raw(),
            carcass_table: self.carcass_table.to_raw(),
            next_volume: U64::new(self.next_volume.0),
            next_carcass: U64::new(self.next_carcass),
            transaction_id: U64::new(self.transaction_id),
            volume_count: U64::new(self.volume_count),
            used_blocks: U64::new(self.used_blocks),
            flags: U64::new(flags),
            scrub_next: U64::new(self.scrub.next.0),
            scrub_faults: U64::new(self.scrub.faults),
            scrub_begun: U64::new(self.scrub.begun),
            scrub_ended: U64::new(self.scrub.ended),
            size_limit: U64::new(self.size_limit_bytes),
            metadata_blocks: U64::new(self.metadata_blocks.unwrap_or(0)),
            reserved: [0; 1264],
            group_index,
        };
        raw.checksum = U32::new(own_checksum(&raw));
        bytemuck::cast(raw)
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the address left at block 0 for the caller to set ([`Check::Magic`] for a block that is
    /// no superblock at all); [`Error::Incompatible`] for a sound one of a newer version or with an unknown feature;
    /// [`Error::Unfinished`] for one that stands for work cut short.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let superblock = Self::decode_any(bytes)?;
        match Unfinished::of(superblock.incompatible) {
            Some(what) => Err(what.into()),
            None => Ok(superblock),
        }
    }

    /// Reads a copy that says that work was begun: which, and what the pool is.
    pub fn decode_unfinished(bytes: &[u8]) -> Option<(Unfinished, Self)> {
        let superblock = Self::decode_any(bytes).ok()?;
        Unfinished::of(superblock.incompatible).map(|what| (what, superblock))
    }

    fn decode_any(bytes: &[u8]) -> Result<Self, Error> {
        let corrupt = |check| Corrupt { structure: Structure::Superblock, address: PoolBlock(0), check };
        let raw: &RawSuperblock = raw(bytes).map_err(corrupt)?;
        check_envelope(raw).map_err(corrupt)?;
        check_compatible(raw)?;
        Ok(Self::from_raw(raw).map_err(corrupt)?)
    }

    /// Whether a feature forbids this build to write.
    pub fn is_read_only(&self) -> bool {
        self.read_only_compatible & !READ_ONLY_COMPATIBLE_KNOWN != 0
    }

    fn from_raw(raw: &RawSuperblock) -> Result<Self, Check> {
        zero(&raw.reserved_algorithms, "reserved_algorithms")?;
        zero(&raw.reserved_host, "reserved_host")?;
        zero(&raw.journal_uuid, "journal_uuid")?;
        zero(&raw.reserved, "reserved")?;
        let geometry = Geometry { pool_blocks: raw.pool_blocks.get(), journal_blocks: raw.journal_blocks.get() };
        geometry.check()?;
        let flags = raw.flags.get();
        if flags & !(VERIFY_ON_READ | METADATA_COUNTED) != 0 {
            return Err(Check::Undefined { field: "flags", value: flags });
        }
        if raw.journal_first.get() != JOURNAL_FIRST.0 {
            return Err(Check::OutOfBounds { field: "journal_first", value: raw.journal_first.get() });
        }
        if raw.generation.get() == 0 {
            return Err(Check::OutOfBounds { field: "generation", value: 0 });
        }
        let metadata_blocks = at_most(raw.metadata_blocks.get(), geometry.pool_blocks, "metadata_blocks")?;
        let is_counted = flags & METADATA_COUNTED != 0;
        if !is_counted && metadata_blocks != 0 {
            return Err(Check::Inconsistent("metadata blocks are told and were not counted"));
        }
        let groups_in_use = at_most(raw.groups_in_use.get(), geometry.group_count(), "groups_in_use")?;
        let volume_table = Root::from_raw(&raw.volume_table)?;
        let carcass_table = Root::from_raw(&raw.carcass_table)?;
        volume_table.entry.check_address(geometry.pool_blocks)?;
        carcass_table.entry.check_address(geometry.pool_blocks)?;
        Ok(Self {
            uuid: Uuid::from_bytes(raw.uuid),
            name: text(&raw.name, raw.name_length.get().into(), "name")?,
            read_only_compatible: raw.read_only_compatible.get(),
            compatible: raw.compatible.get(),
            incompatible: raw.incompatible.get(),
            generation: Generation(at_most(raw.generation.get(), COUNTER_MAX, "generation")?),
            clock: Clock(at_most(raw.clock.get(), CLOCK_MAX, "clock")?),
            lsn: Lsn(at_most(raw.lsn.get(), COUNTER_MAX, "lsn")?),
            geometry,
            groups_in_use,
            // The end of the ring is a place, too: the next batch then goes to its head.
            journal_append: at_most(raw.journal_append.get(), geometry.journal_blocks, "journal_append")?,
            journal_chain: raw.journal_chain.get(),
            session: raw.session.get(),
            volume_table,
            carcass_table,
            next_volume: VolumeId(at_most(raw.next_volume.get(), VOLUME_BLOCKS_MAX, "next_volume")?),
            next_carcass: at_most(raw.next_carcass.get(), COUNTER_MAX, "next_carcass")?,
            transaction_id: raw.transaction_id.get(),
            volume_count: at_most(raw.volume_count.get(), VOLUME_BLOCKS_MAX, "volume_count")?,
            used_blocks: at_most(raw.used_blocks.get(), geometry.pool_blocks, "used_blocks")?,
            metadata_blocks: is_counted.then_some(metadata_blocks),
            size_limit_bytes: raw.size_limit.get(),
            verify_on_read: flags & VERIFY_ON_READ != 0,
            scrub: ScrubState {
                next: PoolBlock(at_most(raw.scrub_next.get(), geometry.pool_blocks, "scrub_next")?),
                faults: at_most(raw.scrub_faults.get(), COUNTER_MAX, "scrub_faults")?,
                begun: raw.scrub_begun.get(),
                ended: raw.scrub_ended.get(),
            },
            group_index: group_index(raw, &geometry, groups_in_use)?,
        })
    }
}

/// What holds in every version: the magic, the checksum's place and how it is computed.
fn check_envelope(raw: &RawSuperblock) -> Result<(), Check> {
    if raw.magic != MAGIC {
        return Err(Check::Magic);
    }
    let (expected, found) = (raw.checksum.get(), own_checksum(raw));
    if expected != found {
        return Err(Check::Checksum { expected, found });
    }
    if raw.version.get() == 0 {
        return Err(Check::Undefined { field: "version", value: 0 });
    }
    Ok(())
}

/// Comes after the checksum: a flipped bit in a version is damage, not a reason to look for a newer build.
fn check_compatible(raw: &RawSuperblock) -> Result<(), Error> {
    let version = raw.version.get();
    if version > FORMAT_VERSION {
        return Err(Error::Incompatible(format!(
            "pool has format version {version}, this build knows up to {FORMAT_VERSION}; use a newer plywood"
        )));
    }
    let unknown = raw.incompatible.get() & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        return Err(Error::Incompatible(format!(
            "pool uses features {unknown:#x} that this build does not know; use a newer plywood"
        )));
    }
    if raw.checksum_algorithm != CHECKSUM_CRC32 || raw.digest_algorithm != DIGEST_BLAKE3 {
        return Err(Error::Incompatible(format!(
            "pool uses checksum {} and digest {}, this build knows {CHECKSUM_CRC32} and {DIGEST_BLAKE3}; use a newer \
             plywood",
            raw.checksum_algorithm, raw.digest_algorithm
        )));
    }
    Ok(())
}

fn group_index(raw: &RawSuperblock, geometry: &Geometry, groups_in_use: u64) -> Result<Vec<GroupIndexRef>, Check> {
    let count = at_most(raw.group_index_count.get().into(), geometry.index_count(), "group_index_count")?;
    if count < groups_in_use.div_ceil(GROUPS_PER_INDEX) {
        return Err(Check::Inconsistent("a group in use has no group index"));
    }
    // The geometry bounds the count by the length of the array.
    let (used, unused) = raw
        .group_index
        .split_at_checked(count as usize)
        .ok_or(Check::OutOfBounds { field: "group_index_count", value: count })?;
    zero(bytemuck::cast_slice(unused), "group_index")?;
    used.iter().map(group_index_ref).collect()
}

fn group_index_ref(raw: &RawGroupIndexRef) -> Result<GroupIndexRef, Check> {
    zero(&raw.reserved, "group_index.reserved")?;
    let slot = match raw.slot {
        0 => Slot::A,
        SLOT_B => Slot::B,
        other => return Err(Check::Undefined { field: "group_index.slot", value: other.into() }),
    };
    if u64::from(raw.level) > INDEX_LEVEL_MAX {
        return Err(Check::Undefined { field: "group_index.level", value: raw.level.into() });
    }
    Ok(GroupIndexRef { checksum: raw.checksum.get(), slot, level: raw.level })
}

/// The checksum of the block with its own field zero.
fn own_checksum(raw: &RawSuperblock) -> u32 {
    seeded(&[], &[bytemuck::bytes_of(&RawSuperblock { checksum: U32::new(0), ..*raw })])
}

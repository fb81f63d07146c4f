//! The record of a volume, one block: the value of the volume table, and the content of journal records.

use bytemuck::Zeroable;
use uuid::Uuid;

use super::attributes::ATTRIBUTES_BYTES_MAX;
use super::entry::{ADDRESS_MAX, CLOCK_MAX, RawRoot, Root};
use super::layout::{at_most, padded, raw, raw_struct, text, zero};
use super::little_endian::{U32, U64};
use super::node::VOLUME_BLOCKS_MAX;
use super::volume_name::VOLUME_NAME_BYTES_MAX;
use crate::error::Check;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Clock, PoolBlock, SECTOR_SIZE, VolumeId};

/// Most blocks of attributes of a volume, 256 KiB.
pub const ATTRIBUTE_BLOCKS_MAX: usize = 64;

/// Most spans of carcasses that a record keeps.
pub const ACCOUNT_SPANS_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"plywvol\0";
const DIGEST_NONE: u8 = 0;
const DIGEST_BLAKE3: u8 = 1;
const HAS_ORIGIN: u8 = 1;
const HAS_RECEIVED_FROM: u8 = 2;

raw_struct! {
    /// A reference to a block of attributes.
    RawAttributeBlockRef: 16 {
        0 address: U64,
        8 checksum: U32,
        12 reserved: U32,
    }
}

raw_struct! {
    /// Carcasses of another volume that concern this one's accounts.
    RawAccountSpan: 24 {
        0 volume: U64,
        8 first: U64,
        16 end: U64,
    }
}

raw_struct! {
    /// A volume's record as it stands in its block.
    RawVolumeRecord: 4096 {
        0 magic: [u8; 8],
        8 id: U64,
        16 uuid: [u8; 16],
        32 size_bytes: U64,
        40 sector_size: U32,
        44 flags: U32,
        48 root: RawRoot,
        72 created_at: U64,
        80 shared_at: U64,
        88 rolled_at: U64,
        96 rolled_to: U64,
        104 origin_id: U64,
        112 origin_uuid: [u8; 16],
        128 origin_clock: U64,
        136 received_uuid: [u8; 16],
        152 received_clock: U64,
        160 own_blocks: U64,
        168 mapped_blocks: U64,
        176 quota_bytes: U64,
        184 reservation_bytes: U64,
        192 created_time: U64,
        200 depth: U32,
        204 on_full: u8,
        205 presence: u8,
        206 digest_algorithm: u8,
        207 name_length: u8,
        208 digest: [u8; 32],
        240 external_source: U64,
        248 encryption_key: U64,
        256 compression: U32,
        260 attributes_bytes: U32,
        264 attribute_count: U32,
        268 account_span_count: U32,
        272 name: [u8; 256],
        528 attributes: [RawAttributeBlockRef; ATTRIBUTE_BLOCKS_MAX],
        1552 accounts_from: U64,
        1560 account_spans: [RawAccountSpan; ACCOUNT_SPANS_MAX],
        3096 in_place_blocks: U64,
        3104 reserved: [u8; 992],
    }
}

/// Properties of a volume that are on or off.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VolumeFlags {
    /// A snapshot: never written.
    pub read_only: bool,
    /// Every block has a recorded checksum.
    pub sealed: bool,
    /// Not to be deleted.
    pub protected: bool,
    /// Not attached by "attach all".
    pub skip_activation: bool,
    /// Reads compare with the recorded checksums.
    pub verify_on_read: bool,
    /// Deleted when detached.
    pub ephemeral: bool,
    /// Blocks written as zeros are unmapped.
    pub detect_zeroes: bool,
}

impl VolumeFlags {
    fn bits(self) -> u32 {
        let flags = [
            self.read_only,
            self.sealed,
            self.protected,
            self.skip_activation,
            self.verify_on_read,
            self.ephemeral,
            self.detect_zeroes,
        ];
        flags.iter().enumerate().map(|(bit, on)| u32::from(*on) << bit).sum()
    }

    fn from_bits(bits: u32) -> Result<Self, Check> {
        let flags = Self {
            read_only: bits & 1 != 0,
            sealed: bits & 2 != 0,
            protected: bits & 4 != 0,
            skip_activation: bits & 8 != 0,
            verify_on_read: bits & 16 != 0,
            ephemeral: bits & 32 != 0,
            detect_zeroes: bits & 64 != 0,
        };
        if flags.bits() == bits { Ok(flags) } else { Err(Check::Undefined { field: "flags", value: bits.into() }) }
    }
}

/// What a write does that needs a block when none is left.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum OnFull {
    /// It fails with ENOSPC at once.
    #[default]
    Error,
    /// It waits for space, up to a limit.
    Wait,
}

/// What a volume was made from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OriginRef {
    /// Its id, which may be gone by now.
    pub id: VolumeId,
    /// Its uuid.
    pub uuid: Uuid,
    /// The clock when they shared.
    pub clock: Clock,
}

/// Carcasses `first..end` of `volume`, by id, that were cut out before this volume took its tree over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccountSpan {
    /// The volume that they were cut out of, which may be gone.
    pub volume: VolumeId,
    /// The first of them.
    pub first: u64,
    /// The one after the last.
    pub end: u64,
}

/// A block of attributes, named with its checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttributeBlockRef {
    /// Where it stands.
    pub address: PoolBlock,
    /// Its checksum, seeded with [`Place::Attributes`](super::Place::Attributes).
    pub checksum: u32,
}

/// Everything a pool knows of a volume.
#[derive(Clone, PartialEq, Debug)]
pub struct VolumeRecord {
    /// Its id, never reused.
    pub id: VolumeId,
    /// Its uuid, by which a repeated command finds that it was done.
    pub uuid: Uuid,
    /// Its name, 1 to 255 bytes.
    pub name: String,
    /// Its virtual size: above 0, a multiple of the sector size, at most 16 TiB.
    pub size_bytes: u64,
    /// 512 or 4096, fixed at creation.
    pub sector_size: u32,
    /// Its properties.
    pub flags: VolumeFlags,
    /// Its mapping tree.
    pub root: Root,
    /// The clock when it began to count its own blocks; a snapshot has its origin's.
    pub created_at: Clock,
    /// The clock when its root was last shared. What was born at or after it is exclusive.
    pub shared_at: Clock,
    /// The clock when it was last rolled back, 0 for never.
    pub rolled_at: Clock,
    /// The clock of the snapshot it was rolled back to.
    pub rolled_to: Clock,
    /// What it was made from.
    pub origin: Option<OriginRef>,
    /// The volume of another pool that it was received from, and its clock there.
    pub received_from: Option<(Uuid, Clock)>,
    /// Blocks born in it since its creation and still mapped.
    pub own_blocks: u64,
    /// Blocks mapped.
    pub mapped_blocks: u64,
    /// Blocks mapped that were born at or after `shared_at`: overwriting them takes no block.
    pub in_place_blocks: u64,
    /// Most own bytes, 0 for no limit.
    pub quota_bytes: u64,
    /// Bytes always there for it, 0 for none: whole blocks, and no more than its size.
    pub reservation_bytes: u64,
    /// What a write does when the pool is full.
    pub on_full: OnFull,
    /// BLAKE3 over size and content, when it is known.
    pub digest: Option<[u8; 32]>,
    /// When it was created, nanoseconds since 1970.
    pub created_time: u64,
    /// Length of its line of origins.
    pub depth: u32,
    /// Blocks of its attributes, in order.
    pub attributes: Vec<AttributeBlockRef>,
    /// Length of the encoded attributes: all those blocks, or less by the zeros at the end of the last one.
    pub attributes_bytes: u32,
    /// Carcasses of its origins, and of what it was rolled back to, that its own and mapped blocks still wait for.
    pub account_spans: Vec<AccountSpan>,
    /// Of the carcasses cut out of itself, its own and mapped blocks wait for those from this id on: a rollback undoes
    /// the others.
    pub accounts_from: u64,
}

impl VolumeRecord {
    /// Its block.
    ///
    /// # Panics
    /// When the name, the list of attribute blocks or that of spans is longer than its field, or the root's address or birth too wide.
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        assert!(self.name.len() <= VOLUME_NAME_BYTES_MAX, "the name was checked when it was given");
        let mut attributes = [RawAttributeBlockRef::zeroed(); ATTRIBUTE_BLOCKS_MAX];
        for (place, reference) in attributes[..self.attributes.len()].iter_mut().zip(&self.attributes) {
            place.address = U64::new(reference.address.0);
            place.checksum = U32::new(reference.checksum);
        }
        let mut account_spans = [RawAccountSpan::zeroed(); ACCOUNT_SPANS_MAX];
        for (place, span) in account_spans[..self.account_spans.len()].iter_mut().zip(&self.account_spans) {
            place.volume = U64::new(span.volume.0);
            place.first = U64::new(span.first);
            place.end = U64::new(span.end);
        }
        let origin = self.origin.unwrap_or(OriginRef { id: VolumeId(0), uuid: Uuid::nil(), clock: Clock(0) });
        let received = self.received_from.unwrap_or((Uuid::nil(), Clock(0)));
        let presence = if self.origin.is_some() { HAS_ORIGIN } else { 0 }
            | if self.received_from.is_some() { HAS_RECEIVED_FROM } else { 0 };
        bytemuck::cast(RawVolumeRecord {
            magic: MAGIC,
            id: U64::new(self.id.0),
            uuid: *self.uuid.as_bytes(),
            size_bytes: U64::new(self.size_bytes),
            sector_size: U32::new(self.sector_size),
            flags: U32::new(self.flags.bits()),
            root: self.root.to_raw(),
            created_at: U64::new(self.created_at.0),
            shared_at: U64::new(self.shared_at.0),
            rolled_at: U64::new(self.rolled_at.0),
            rolled_to: U64::new(self.rolled_to.0),
            origin_id: U64::new(origin.id.0),
            origin_uuid: *origin.uuid.as_bytes(),
            origin_clock: U64::new(origin.clock.0),
            received_uuid: *received.0.as_bytes(),
            received_clock: U64::new(received.1.0),
            own_blocks: U64::new(self.own_blocks),
            mapped_blocks: U64::new(self.mapped_blocks),
            quota_bytes: U64::new(self.quota_bytes),
            reservation_bytes: U64::new(self.reservation_bytes),
            created_time: U64::new(self.created_time),
            depth: U32::new(self.depth),
            on_full: match self.on_full {
                OnFull::Error => 0,
                OnFull::Wait => 1,
            },
            presence,
            digest_algorithm: if self.digest.is_some() { DIGEST_BLAKE3 } else { DIGEST_NONE },
            name_length: self.name.len() as u8,
            digest: self.digest.unwrap_or_default(),
            external_source: U64::new(0),
            encryption_key: U64::new(0),
            compression: U32::new(0),
            attributes_bytes: U32::new(self.attributes_bytes),
            attribute_count: U32::new(self.attributes.len() as u32),
            account_span_count: U32::new(self.account_spans.len() as u32),
            name: padded(self.name.as_bytes()),
            attributes,
            account_spans,
            accounts_from: U64::new(self.accounts_from),
            in_place_blocks: U64::new(self.in_place_blocks),
            reserved: [0; 992],
        })
    }

    /// Reads a record. Its addresses are bounded by their 48 bits only, because a journal record is decoded before the
    /// pool is known; see [`check_addresses`](VolumeRecord::check_addresses).
    ///
    /// # Errors
    /// A field outside its bounds, undefined, or reserved and not zero; a name that is not UTF-8.
    pub fn decode(bytes: &[u8]) -> Result<Self, Check> {
        let raw: &RawVolumeRecord = raw(bytes)?;
        if raw.magic != MAGIC {
            return Err(Check::Magic);
        }
        check_reserved(raw)?;
        let clock = |value: U64, field| at_most(value.get(), CLOCK_MAX, field).map(Clock);
        let blocks = |value: U64, field| at_most(value.get(), VOLUME_BLOCKS_MAX, field);
        Ok(Self {
            id: volume_id(raw.id, "id")?,
            uuid: Uuid::from_bytes(raw.uuid),
            name: name(raw)?,
            size_bytes: size_bytes(raw)?,
            sector_size: raw.sector_size.get(),
            flags: VolumeFlags::from_bits(raw.flags.get())?,
            root: Root::from_raw(&raw.root)?,
            created_at: clock(raw.created_at, "created_at")?,
            shared_at: clock(raw.shared_at, "shared_at")?,
            rolled_at: clock(raw.rolled_at, "rolled_at")?,
            rolled_to: clock(raw.rolled_to, "rolled_to")?,
            origin: origin(raw)?,
            received_from: received_from(raw)?,
            own_blocks: blocks(raw.own_blocks, "own_blocks")?,
            mapped_blocks: blocks(raw.mapped_blocks, "mapped_blocks")?,
            in_place_blocks: blocks(raw.in_place_blocks, "in_place_blocks")?,
            quota_bytes: raw.quota_bytes.get(),
            reservation_bytes: raw.reservation_bytes.get(),
            on_full: match raw.on_full {
                0 => OnFull::Error,
                1 => OnFull::Wait,
                other => return Err(Check::Undefined { field: "on_full", value: other.into() }),
            },
            digest: digest(raw)?,
            created_time: raw.created_time.get(),
            depth: raw.depth.get(),
            attributes: attributes(raw)?,
            attributes_bytes: raw.attributes_bytes.get(),
            account_spans: account_spans(raw)?,
            accounts_from: raw.accounts_from.get(),
        })
    }

    /// Refuses addresses outside a pool of `pool_blocks`: of the root and of attribute blocks.
    ///
    /// # Errors
    /// [`Check::OutOfBounds`].
    pub fn check_addresses(&self, pool_blocks: u64) -> Result<(), Check> {
        self.root.entry.check_address(pool_blocks)?;
        for reference in &self.attributes {
            at_most(reference.address.0, pool_blocks.saturating_sub(1), "attributes.address")?;
        }
        Ok(())
    }
}

/// The id of a volume that can exist.
pub(super) fn volume_id(raw: U64, field: &'static str) -> Result<VolumeId, Check> {
    match raw.get() {
        0 => Err(Check::OutOfBounds { field, value: 0 }),
        id => at_most(id, VOLUME_BLOCKS_MAX - 1, field).map(VolumeId),
    }
}

fn check_reserved(raw: &RawVolumeRecord) -> Result<(), Check> {
    zero(bytemuck::bytes_of(&raw.external_source), "external_source")?;
    zero(bytemuck::bytes_of(&raw.encryption_key), "encryption_key")?;
    zero(bytemuck::bytes_of(&raw.compression), "compression")?;
    zero(&raw.reserved, "reserved")?;
    if raw.presence & !(HAS_ORIGIN | HAS_RECEIVED_FROM) != 0 {
        return Err(Check::Undefined { field: "presence", value: raw.presence.into() });
    }
    Ok(())
}

fn name(raw: &RawVolumeRecord) -> Result<String, Check> {
    match raw.name_length {
        0 => Err(Check::OutOfBounds { field: "name_length", value: 0 }),
        length => text(&raw.name, length.into(), "name"),
    }
}

fn size_bytes(raw: &RawVolumeRecord) -> Result<u64, Check> {
    let sector_size = u64::from(raw.sector_size.get());
    if sector_size != SECTOR_SIZE as u64 && sector_size != BLOCK_BYTES {
        return Err(Check::OutOfBounds { field: "sector_size", value: sector_size });
    }
    let size_bytes = at_most(raw.size_bytes.get(), VOLUME_BLOCKS_MAX * BLOCK_BYTES, "size_bytes")?;
    if size_bytes == 0 || !size_bytes.is_multiple_of(sector_size) {
        return Err(Check::OutOfBounds { field: "size_bytes", value: size_bytes });
    }
    Ok(size_bytes)
}

fn origin(raw: &RawVolumeRecord) -> Result<Option<OriginRef>, Check> {
    if raw.presence & HAS_ORIGIN == 0 {
        zero(bytemuck::bytes_of(&raw.origin_id), "origin_id")?;
        zero(&raw.origin_uuid, "origin_uuid")?;
        zero(bytemuck::bytes_of(&raw.origin_clock), "origin_clock")?;
        return Ok(None);
    }
    Ok(Some(OriginRef {
        id: volume_id(raw.origin_id, "origin_id")?,
        uuid: Uuid::from_bytes(raw.origin_uuid),
        clock: Clock(at_most(raw.origin_clock.get(), CLOCK_MAX, "origin_clock")?),
    }))
}

fn received_from(raw: &RawVolumeRecord) -> Result<Option<(Uuid, Clock)>, Check> {
    if raw.presence & HAS_RECEIVED_FROM == 0 {
        zero(&raw.received_uuid, "received_uuid")?;
        zero(bytemuck::bytes_of(&raw.received_clock), "received_clock")?;
        return Ok(None);
    }
    let clock = at_most(raw.received_clock.get(), CLOCK_MAX, "received_clock")?;
    Ok(Some((Uuid::from_bytes(raw.received_uuid), Clock(clock))))
}

fn digest(raw: &RawVolumeRecord) -> Result<Option<[u8; 32]>, Check> {
    match raw.digest_algorithm {
        DIGEST_NONE => zero(&raw.digest, "digest").map(|()| None),
        DIGEST_BLAKE3 => Ok(Some(raw.digest)),
        other => Err(Check::Undefined { field: "digest_algorithm", value: other.into() }),
    }
}

fn attributes(raw: &RawVolumeRecord) -> Result<Vec<AttributeBlockRef>, Check> {
    let bytes = at_most(raw.attributes_bytes.get().into(), ATTRIBUTES_BYTES_MAX as u64, "attributes_bytes")?;
    let count = at_most(raw.attribute_count.get().into(), ATTRIBUTE_BLOCKS_MAX as u64, "attribute_count")?;
    if count != bytes.div_ceil(BLOCK_BYTES) {
        return Err(Check::Inconsistent("attributes do not fill their blocks"));
    }
    let (used, unused) = raw.attributes.split_at(count as usize);
    zero(bytemuck::cast_slice(unused), "attributes")?;
    used.iter()
        .map(|raw| {
            zero(bytemuck::bytes_of(&raw.reserved), "attributes.reserved")?;
            match at_most(raw.address.get(), ADDRESS_MAX, "attributes.address")? {
                0 => Err(Check::OutOfBounds { field: "attributes.address", value: 0 }),
                address => Ok(AttributeBlockRef { address: PoolBlock(address), checksum: raw.checksum.get() }),
            }
        })
        .collect()
}

fn account_spans(raw: &RawVolumeRecord) -> Result<Vec<AccountSpan>, Check> {
    let count = at_most(raw.account_span_count.get().into(), ACCOUNT_SPANS_MAX as u64, "account_span_count")?;
    let (used, unused) = raw.account_spans.split_at(count as usize);
    zero(bytemuck::cast_slice(unused), "account_spans")?;
    used.iter()
        .map(|raw| {
            let (first, end) = (raw.first.get(), raw.end.get());
            if first >= end {
                return Err(Check::OutOfBounds { field: "account_spans.end", value: end });
            }
            Ok(AccountSpan { volume: volume_id(raw.volume, "account_spans.volume")?, first, end })
        })
        .collect()
}

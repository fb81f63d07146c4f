//! The lines of a dump, and how volumes, carcasses and changes become lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::format::{
    AccountSpan, AttributeBlockRef, Carcass, Entry, OnFull, OriginRef, Record, Root, VolumeFlags, VolumeRecord,
};
use crate::units::{Clock, Lsn, PoolBlock, VirtualBlock, VolumeId};

/// Version of what a dump looks like.
pub(super) const VERSION: u32 = 1;
/// What every dump says of itself.
pub(super) const NOTE: &str = "metadata only: where each block stands, not what it holds. This is no backup.";

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Line {
    Pool(PoolLine),
    Node(NodeLine),
    Volume(Box<VolumeLine>),
    Carcass(CarcassLine),
    Checksums(ChecksumsLine),
    Change(ChangeLine),
    Fault(FaultLine),
    End(EndLine),
}

/// The pool, first of all.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolLine {
    pub(super) dump_version: u32,
    pub(super) note: String,
    pub(super) uuid: Uuid,
    pub(super) name: String,
    pub(super) pool_blocks: u64,
    pub(super) journal_blocks: u64,
    pub(super) groups_in_use: u64,
    pub(super) clock: u64,
    pub(super) lsn: u64,
    pub(super) next_volume: u64,
    pub(super) next_carcass: u64,
    pub(super) transaction_id: u64,
    #[serde(default)]
    pub(super) size_limit_bytes: u64,
    #[serde(default)]
    pub(super) verify_on_read: bool,
    pub(super) compatible: u64,
    pub(super) read_only_compatible: u64,
}

/// Checksums of data blocks that follow each other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChecksumsLine {
    pub(super) block: u64,
    pub(super) checksums: Vec<u32>,
}

/// A run of entries: how many, their birth, and the first one's block, 0 for holes.
pub(super) type Run = (u64, u64, u64);

/// A node.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NodeLine {
    pub(super) block: u64,
    pub(super) mirrored: bool,
    pub(super) level: u8,
    pub(super) first: u64,
    pub(super) entries: Vec<Run>,
}

/// A root: the node's block, 0 for an empty tree, and the birth of the entry.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RootLine {
    pub(super) node: u64,
    pub(super) level: u8,
    pub(super) birth: u64,
}

/// A volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VolumeLine {
    id: u64,
    uuid: Uuid,
    name: String,
    size_bytes: u64,
    sector_size: u32,
    flags: Vec<String>,
    pub(super) root: RootLine,
    created_at: u64,
    shared_at: u64,
    rolled_at: u64,
    rolled_to: u64,
    origin: Option<(u64, Uuid, u64)>,
    received_from: Option<(Uuid, u64)>,
    own_blocks: u64,
    mapped_blocks: u64,
    in_place_blocks: u64,
    quota_bytes: u64,
    reservation_bytes: u64,
    on_full: String,
    digest: Option<String>,
    created_time: u64,
    depth: u32,
    /// Keys, and values in hexadecimal.
    pub(super) attributes: BTreeMap<String, String>,
    pub(super) attribute_blocks: Vec<u64>,
    account_spans: Vec<(u64, u64, u64)>,
    accounts_from: u64,
}

/// An unlinked subtree.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CarcassLine {
    id: u64,
    pub(super) node: u64,
    pub(super) level: u8,
    birth: u64,
    pub(super) first: u64,
    cursor: u64,
    volume: u64,
    created_at: u64,
    account: bool,
    counting: bool,
    cut: u64,
}

/// A change that no checkpoint holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeLine {
    lsn: u64,
    kind: String,
    /// The record as it stands in the journal, in hexadecimal.
    record: String,
}

/// Something that could not be dumped.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FaultLine {
    pub(super) block: u64,
    pub(super) blocks: u64,
    pub(super) structure: String,
    pub(super) check: String,
    pub(super) has_copy: bool,
}

/// The last line: what is missing before it was cut off.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EndLine {
    pub(super) nodes: u64,
    pub(super) volumes: u64,
    pub(super) carcasses: u64,
    /// Blocks with a checksum.
    #[serde(default)]
    pub(super) checksums: u64,
    pub(super) changes: u64,
    pub(super) faults: u64,
}

const FLAGS: [&str; 7] =
    ["read-only", "sealed", "protected", "skip-activation", "verify-on-read", "ephemeral", "detect-zeroes"];

fn flag_bits(flags: &mut VolumeFlags) -> [&mut bool; 7] {
    [
        &mut flags.read_only,
        &mut flags.sealed,
        &mut flags.protected,
        &mut flags.skip_activation,
        &mut flags.verify_on_read,
        &mut flags.ephemeral,
        &mut flags.detect_zeroes,
    ]
}

impl VolumeLine {
    pub(super) fn of(record: &VolumeRecord, attributes: Option<&BTreeMap<String, Vec<u8>>>) -> Self {
        let mut flags = record.flags;
        let flags = flag_bits(&mut flags).into_iter().zip(FLAGS).filter(|(on, _)| **on);
        Self {
            id: record.id.0,
            uuid: record.uuid,
            name: record.name.clone(),
            size_bytes: record.size_bytes,
            sector_size: record.sector_size,
            flags: flags.map(|(_, name)| name.to_owned()).collect(),
            root: RootLine {
                node: record.root.entry.address.0,
                level: record.root.level,
                birth: record.root.entry.birth.0,
            },
            created_at: record.created_at.0,
            shared_at: record.shared_at.0,
            rolled_at: record.rolled_at.0,
            rolled_to: record.rolled_to.0,
            origin: record.origin.map(|origin| (origin.id.0, origin.uuid, origin.clock.0)),
            received_from: record.received_from.map(|(uuid, clock)| (uuid, clock.0)),
            own_blocks: record.own_blocks,
            mapped_blocks: record.mapped_blocks,
            in_place_blocks: record.in_place_blocks,
            quota_bytes: record.quota_bytes,
            reservation_bytes: record.reservation_bytes,
            on_full: match record.on_full {
                OnFull::Error => "error".into(),
                OnFull::Wait => "wait".into(),
            },
            digest: record.digest.map(hex::encode),
            created_time: record.created_time,
            depth: record.depth,
            attributes: attributes
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.clone(), hex::encode(value)))
                .collect(),
            attribute_blocks: attributes
                .map_or(Vec::new(), |_| record.attributes.iter().map(|block| block.address.0).collect()),
            account_spans: record.account_spans.iter().map(|span| (span.volume.0, span.first, span.end)).collect(),
            accounts_from: record.accounts_from,
        }
    }

    /// The record, with `root` and attribute blocks as they are written. What it holds is as unchecked as the line.
    pub(super) fn record(&self, root: Root, attributes: Vec<AttributeBlockRef>, bytes: u32) -> Result<VolumeRecord> {
        let mut flags = VolumeFlags::default();
        for name in &self.flags {
            let known = flag_bits(&mut flags).into_iter().zip(FLAGS).find(|(_, known)| known == name);
            *known.ok_or_else(|| wrong(format!("volume {} has the unknown flag {name:?}", self.name)))?.0 = true;
        }
        let on_full = match self.on_full.as_str() {
            "error" => OnFull::Error,
            "wait" => OnFull::Wait,
            other => return Err(wrong(format!("volume {}: on_full is {other:?}", self.name))),
        };
        let digest = match &self.digest {
            None => None,
            Some(text) => {
                let bytes = hex::decode(text).ok().and_then(|bytes| bytes.try_into().ok());
                Some(bytes.ok_or_else(|| wrong(format!("volume {}: the digest is not 32 bytes", self.name)))?)
            }
        };
        Ok(VolumeRecord {
            id: VolumeId(self.id),
            uuid: self.uuid,
            name: self.name.clone(),
            size_bytes: self.size_bytes,
            sector_size: self.sector_size,
            flags,
            root,
            created_at: Clock(self.created_at),
            shared_at: Clock(self.shared_at),
            rolled_at: Clock(self.rolled_at),
            rolled_to: Clock(self.rolled_to),
            origin: self.origin.map(|(id, uuid, clock)| OriginRef { id: VolumeId(id), uuid, clock: Clock(clock) }),
            received_from: self.received_from.map(|(uuid, clock)| (uuid, Clock(clock))),
            own_blocks: self.own_blocks,
            mapped_blocks: self.mapped_blocks,
            in_place_blocks: self.in_place_blocks,
            quota_bytes: self.quota_bytes,
            reservation_bytes: self.reservation_bytes,
            on_full,
            digest,
            created_time: self.created_time,
            depth: self.depth,
            attributes,
            attributes_bytes: bytes,
            account_spans: self
                .account_spans
                .iter()
                .map(|(volume, first, end)| AccountSpan { volume: VolumeId(*volume), first: *first, end: *end })
                .collect(),
            accounts_from: self.accounts_from,
        })
    }

    /// Its keys and values.
    pub(super) fn attributes(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let decoded = self.attributes.iter().map(|(key, value)| Ok((key.clone(), hex::decode(value)?)));
        decoded
            .collect::<Result<_, hex::FromHexError>>()
            .map_err(|error| wrong(format!("volume {}: an attribute is not hexadecimal: {error}", self.name)))
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl CarcassLine {
    pub(super) fn of(carcass: &Carcass) -> Self {
        Self {
            id: carcass.id,
            node: carcass.entry.address.0,
            level: carcass.level,
            birth: carcass.entry.birth.0,
            first: carcass.first.0,
            cursor: carcass.cursor,
            volume: carcass.volume.0,
            created_at: carcass.created_at.0,
            account: carcass.account,
            counting: carcass.counting,
            cut: carcass.cut,
        }
    }

    pub(super) fn carcass(&self, mirrored: bool, checksum: u32) -> Carcass {
        Carcass {
            id: self.id,
            entry: Entry::node(PoolBlock(self.node), mirrored, checksum, Clock(self.birth)),
            level: self.level,
            first: VirtualBlock(self.first),
            cursor: self.cursor,
            volume: VolumeId(self.volume),
            created_at: Clock(self.created_at),
            account: self.account,
            counting: self.counting,
            cut: self.cut,
        }
    }
}

impl ChangeLine {
    pub(super) fn of(lsn: Lsn, record: &Record) -> Self {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        Self { lsn: lsn.0, kind: kind(record).into(), record: hex::encode(bytes) }
    }

    pub(super) fn change(&self) -> Result<(Lsn, Record)> {
        let what = |why: String| wrong(format!("change {}: {why}", self.lsn));
        let bytes = hex::decode(&self.record).map_err(|error| what(error.to_string()))?;
        let (record, used) = Record::decode(&bytes).map_err(|check| what(check.to_string()))?;
        if used != bytes.len() || kind(&record) != self.kind {
            return Err(what("its record is another".into()));
        }
        Ok((Lsn(self.lsn), record))
    }
}

fn kind(record: &Record) -> &'static str {
    match record {
        Record::Map { .. } => "map",
        Record::Unmap { .. } => "unmap",
        Record::VolumeCreated(_) => "volume-created",
        Record::VolumeChanged(_) => "volume-changed",
        Record::VolumeDeleted { .. } => "volume-deleted",
        Record::VolumeShared { .. } => "volume-shared",
        Record::VolumeRolledBack { .. } => "volume-rolled-back",
        Record::PoolGrown { .. } => "pool-grown",
    }
}

/// A dump that cannot be restored.
pub(super) fn wrong(what: impl std::fmt::Display) -> Error {
    Error::InvalidInput(format!("the dump is no good: {what}"))
}

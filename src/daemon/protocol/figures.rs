//! What a pool says of itself: its figures, and what checks and scrubs found.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Attachment;
use crate::engine::{self, Touched};

/// A pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// The pool file.
    pub path: PathBuf,
    /// Size of the pool file.
    pub size_bytes: u64,
    /// Data, metadata and layout of the groups, as of the last checkpoint, as the parts that follow: own, kept and metadata
    /// are parts of it, and so is the layout without the head.
    pub used_bytes: u64,
    /// Data that volumes own.
    #[serde(default)]
    pub own_bytes: u64,
    /// Data that no volume owns any more: what snapshots keep, and what came from volumes that are gone. None while metadata
    /// has not been counted: a check of the pool in use does that, once.
    #[serde(default)]
    pub kept_bytes: Option<u64>,
    /// Live data: own and kept.
    #[serde(default)]
    pub live_bytes: Option<u64>,
    /// Maps, records and attributes of volumes, and tables.
    #[serde(default)]
    pub metadata_bytes: Option<u64>,
    /// Neither used nor head.
    pub free_bytes: u64,
    /// Superblocks and journal, before the first group.
    #[serde(default)]
    pub head_bytes: u64,
    /// The head, and the space map of the groups in use.
    pub layout_bytes: u64,
    /// The journal ring.
    pub journal_bytes: u64,
    /// Part of the journal that is in use.
    pub journal_used_bytes: u64,
    /// Part of what is free that is kept back for metadata.
    pub reserve_bytes: u64,
    /// Taken of the host's file system by the pool file.
    pub host_bytes: u64,
    /// Sum of the virtual sizes.
    pub virtual_bytes: u64,
    /// Sum of what is reserved for volumes.
    #[serde(default)]
    pub reserved_bytes: u64,
    /// Part of what is free that only these volumes can have, with room for their maps.
    #[serde(default)]
    pub owed_bytes: u64,
    /// Size up to which it grows by itself when it is full; 0: it does not.
    #[serde(default)]
    pub size_limit_bytes: u64,
    /// Requests that wait for space.
    #[serde(default)]
    pub waiting: u64,
    /// Free on the host's file system for the pool file; none when the pool is a device.
    #[serde(default)]
    pub host_free_bytes: Option<u64>,
    /// Percent of all space that the pool may have, and that the host can give, that is used.
    #[serde(default)]
    pub filled_percent: u64,
    /// The thresholds, ascending.
    #[serde(default)]
    pub thresholds: Vec<Threshold>,
    /// What was done over again when the pool was opened last; none after a clean end.
    #[serde(default)]
    pub recovered: Option<Recovered>,
    /// Volumes that are block devices.
    #[serde(default)]
    pub attached: Vec<Attachment>,
    /// What goes on beside the requests.
    #[serde(default)]
    pub background: Vec<Work>,
    /// Number of the last checkpoint.
    pub generation: u64,
    /// Counter of sharings.
    pub clock: u64,
    /// Volumes, without snapshots.
    pub volumes: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Deleted volumes whose blocks are still being given back.
    pub carcasses: u64,
    /// What was deleted has not all come free yet: blocks of the deleted trees do with the next checkpoint.
    #[serde(default)]
    pub freeing: bool,
    /// Snapshots that are sealed.
    #[serde(default)]
    pub sealed: u64,
    /// Whether sealed blocks are verified on every read, whatever the volume.
    #[serde(default)]
    pub verify_on_read: bool,
    /// The scrub under way, or the last one; none when there never was one.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// Why the pool takes no more writes, when it does not.
    pub poisoned: Option<String>,
    /// Transport of the block devices, with the reason where it is not the fastest. None without a daemon.
    pub transport: Option<String>,
    /// Process id of the front. None without a daemon.
    pub front_pid: Option<u32>,
    /// Process id of the engine process. None without a daemon.
    pub engine_pid: Option<u32>,
    /// How often the engine process was started again. None without a daemon.
    pub engine_restarts: Option<u64>,
}

/// A part of the pool's space from which on people are warned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threshold {
    /// The part, in percent.
    pub percent: u8,
    /// Whether it is reached. It stays so until the pool is a little emptier again.
    pub reached: bool,
}

/// What the engine found to be done over again when it opened the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// When, in nanoseconds since 1970 UTC.
    pub at_ns: u64,
    /// Changes taken from the journal and from the memory of a predecessor.
    pub changes: u64,
    /// Of these, those from the memory of a predecessor.
    pub changes_from_memory: u64,
}

/// Work that goes on beside the requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// What is done.
    pub what: String,
    /// How much of it is done, where that is known.
    pub done: Option<u64>,
    /// Of how much, where that is known.
    pub of: Option<u64>,
}

/// The scrub under way, or the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether it is still to be gone on with.
    pub under_way: bool,
    /// Part of the pool that it has passed, in bytes.
    pub position_bytes: u64,
    /// Faults found that could not be mended.
    pub fault_count: u64,
    /// When it began, in nanoseconds since 1970 UTC.
    pub begun_ns: u64,
    /// When the last whole one ended; 0 for never.
    pub ended_ns: u64,
}

/// What a part of a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrub {
    /// Of the beginning: what the check of the metadata found, mended faults included.
    pub check: Option<Check>,
    /// Bad copies that were mended.
    pub mended: u64,
    /// Blocks of data read and held against their checksums.
    pub blocks: u64,
    /// Blocks of data that are damaged: the first of them.
    pub damaged: Vec<Damaged>,
    /// Damaged blocks of data in all.
    pub damaged_count: u64,
    /// Part of the pool that has been passed, in bytes.
    pub position_bytes: u64,
    /// Part of the pool that is in use, in bytes.
    pub end_bytes: u64,
    /// Whether more is to be read.
    pub more: bool,
}

/// A damaged block of data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damaged {
    /// The block of the pool.
    pub block: u64,
    /// What was recorded, where it could be read.
    pub expected: u32,
    /// What its content has; none where it could not be read.
    pub found: Option<u32>,
    /// Why it could not be read.
    pub reason: String,
}

/// The result of a check of all metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Blocks in use.
    pub used_blocks: u64,
    /// Data blocks that the walk found.
    pub data_blocks: u64,
    /// Nodes that were walked.
    pub nodes: u64,
    /// Volumes and snapshots that were walked.
    pub volumes: u64,
    /// Blocks that are counted, but by nothing that could be read: what is lost holds them.
    pub unaccounted_blocks: u64,
    /// Changes in the journal that no checkpoint holds yet. 0 of a pool in use, whose journal is in use too.
    pub journal_records: u64,
    /// How much is wrong.
    pub fault_count: u64,
    /// The first faults; empty when nothing is wrong.
    pub faults: Vec<Fault>,
}

/// Something that is wrong with a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What is wrong and where, in words.
    pub message: String,
    /// The damaged structure.
    pub structure: String,
    /// Block of the pool where it stands.
    pub block: u64,
    /// Blocks from there on of which the same is true.
    pub blocks: u64,
    /// Which check failed.
    pub check: String,
    /// Whether the second block of a pair is good, so that nothing is lost.
    pub has_copy: bool,
    /// Volumes and ranges that it concerns.
    pub touches: Vec<Touched>,
    /// Whether it touches more than is listed.
    pub touches_more: bool,
}

impl From<engine::Fault> for Fault {
    fn from(fault: engine::Fault) -> Self {
        Self {
            message: fault.to_string(),
            structure: fault.found.structure.to_string(),
            block: fault.found.address.0,
            blocks: fault.blocks,
            check: fault.found.check.to_string(),
            has_copy: fault.has_copy,
            touches: fault.touched,
            touches_more: fault.touches_more,
        }
    }
}

impl From<engine::CheckReport> for Check {
    fn from(report: engine::CheckReport) -> Self {
        Self {
            used_blocks: report.used_blocks,
            data_blocks: report.data_blocks,
            nodes: report.nodes,
            volumes: report.volumes,
            unaccounted_blocks: report.unaccounted_blocks,
            journal_records: report.journal_records,
            fault_count: report.fault_count,
            faults: report.faults.into_iter().map(Fault::from).collect(),
        }
    }
}

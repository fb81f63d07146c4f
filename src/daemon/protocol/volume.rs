//! What is told of a volume, and of the device that it is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A volume, clone or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Identity within the pool; never reused.
    pub id: u64,
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Sector size of the device.
    pub sector_size: u32,
    /// Whether it is a snapshot.
    pub snapshot: bool,
    /// Whether deleting it is refused.
    pub protected: bool,
    /// Whether each of its blocks has a recorded checksum.
    #[serde(default)]
    pub sealed: bool,
    /// BLAKE3 over its content in hexadecimal, of a sealed snapshot.
    #[serde(default)]
    pub digest: Option<String>,
    /// Whether its writes wait for space when the pool is full; else they fail at once.
    #[serde(default)]
    pub waits_when_full: bool,
    /// Writes that failed since the engine opened the pool, for want of space or as the medium failed.
    #[serde(default)]
    pub failed_writes: u64,
    /// Whether sealed blocks are verified when they are read through it.
    #[serde(default)]
    pub verify_on_read: bool,
    /// Whether blocks that are written as zeros are unmapped instead of stored.
    #[serde(default)]
    pub detect_zeroes: bool,
    /// Name of the volume or snapshot it was made from; none when it was made empty, or its origin is deleted.
    pub origin: Option<String>,
    /// Identity of its origin, deleted or not.
    pub origin_uuid: Option<Uuid>,
    /// Length of its chain of origins.
    pub depth: u32,
    /// Bytes written since its creation and still mapped.
    pub own_bytes: u64,
    /// Bytes mapped, shared or not.
    pub mapped_bytes: u64,
    /// What deleting it would free, with its map, record and attributes; none while that has not been found.
    #[serde(default)]
    pub exclusive_bytes: Option<u64>,
    /// Seconds ago that this was so; 0: it is.
    #[serde(default)]
    pub exclusive_age_seconds: Option<u64>,
    /// Where it is: seconds for which it has been this.
    #[serde(default)]
    pub exclusive_unchanged_seconds: Option<u64>,
    /// Of what is mapped, what others hold too: deleting it would not free this. As old as what it would.
    #[serde(default)]
    pub shared_bytes: Option<u64>,
    /// Most own bytes; 0: no quota.
    pub quota_bytes: u64,
    /// Bytes of its own that are always there for it; 0: none.
    #[serde(default)]
    pub reservation_bytes: u64,
    /// Of these, bytes that are not its own yet.
    #[serde(default)]
    pub reservation_left_bytes: u64,
    /// Creation, in nanoseconds since 1970 UTC.
    pub created_ns: u64,
    /// Whether it is in use.
    pub open: bool,
    /// Its block device, when attached.
    pub device: Option<PathBuf>,
}

/// A volume that is a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Volume or snapshot.
    pub name: String,
    /// The device, `/dev/loopN`.
    pub device: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What became of `detach --all`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Names of what is not a device any more.
    pub detached: Vec<String>,
    /// What still is, with the reason.
    pub kept: Vec<Kept>,
}

/// A volume that could not be detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Volume or snapshot.
    pub name: String,
    /// Its device.
    pub device: PathBuf,
    /// Where it is mounted, or who has it open.
    pub reason: String,
}

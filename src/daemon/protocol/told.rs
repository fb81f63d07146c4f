//! What people and programs are told of a pool in use: events as they happen, and figures to be looked at again and again.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Pool;
use crate::engine::Counters;
use crate::export::server::counters::IoCounters;
use crate::io::PunchStatistics;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Higher than that of every event before it, also of the engine processes before.
    pub number: u64,
    /// When, in nanoseconds since 1970 UTC.
    pub time_ns: u64,
    /// What.
    pub kind: EventKind,
    /// The volume or snapshot that it concerns, where it is one.
    pub volume: Option<String>,
    /// The rest, in words.
    pub text: String,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum EventKind {
    /// A volume or clone was created.
    Created,
    /// A snapshot was taken.
    Snapshotted,
    /// A volume or snapshot was deleted.
    Deleted,
    /// A volume or snapshot has another name.
    Renamed,
    /// A volume has another size.
    Resized,
    /// A volume has the content of a snapshot again.
    RolledBack,
    /// A volume is a block device.
    Attached,
    /// A volume is no block device any more.
    Detached,
    /// A threshold was crossed, upwards or downwards.
    Threshold,
    /// The pool became larger.
    Grown,
    /// An engine process began to serve, or is about to hand over.
    Engine,
    /// The pool takes no more writes.
    Poisoned,
    /// Damage was found.
    Damage,
    /// Work beside the requests has begun.
    Began,
    /// Work beside the requests has ended.
    Ended,
    /// The daemon stops.
    Stopping,
}

impl EventKind {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Snapshotted => "snapshotted",
            Self::Deleted => "deleted",
            Self::Renamed => "renamed",
            Self::Resized => "resized",
            Self::RolledBack => "rolled-back",
            Self::Attached => "attached",
            Self::Detached => "detached",
            Self::Threshold => "threshold",
            Self::Grown => "grown",
            Self::Engine => "engine",
            Self::Poisoned => "poisoned",
            Self::Damage => "damage",
            Self::Began => "began",
            Self::Ended => "ended",
            Self::Stopping => "stopping",
        }
    }
}

/// A part of what has happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Process id of the engine that tells.
    pub engine_pid: u32,
    /// Whether something behind the number asked for is not known any more.
    pub lost: bool,
    /// Number of the last event that is told or was passed over: what to ask for next.
    pub last: u64,
    /// The events, ascending.
    pub events: Vec<Event>,
}

/// What the volumes of a pool do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// When this was taken, in nanoseconds since 1970 UTC.
    pub taken_ns: u64,
    /// When the engine opened the pool: the counters began then.
    pub since_ns: u64,
    /// The pool.
    pub pool: Pool,
    /// What the engine has done.
    pub counters: Counters,
    /// What giving space back to the host came to.
    #[serde(default)]
    pub punching: PunchStatistics,
    /// The volumes that are in use, or were since then.
    pub volumes: Vec<VolumeFigures>,
}

/// What a volume does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFigures {
    /// Identity within the pool.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Whether it is a snapshot.
    pub snapshot: bool,
    /// Its block device, when attached.
    pub device: Option<PathBuf>,
    /// Virtual size.
    pub size_bytes: u64,
    /// Bytes written since its creation and still mapped.
    pub own_bytes: u64,
    /// Bytes mapped, shared or not.
    pub mapped_bytes: u64,
    /// What deleting it would free; none while that has not been found.
    #[serde(default)]
    pub exclusive_bytes: Option<u64>,
    /// Seconds ago that this was so.
    #[serde(default)]
    pub exclusive_age_seconds: Option<u64>,
    /// Blocks redirected because they were shared.
    pub blocks_redirected: u64,
    /// Its requests.
    pub io: IoCounters,
}

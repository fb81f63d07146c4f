//! What is said on the control socket: one JSON object a line, a [`Request`] in, a [`Response`] out.
//!
//! Both carry [`VERSION`]; another version is answered with [`Kind::Incompatible`] before anything else is looked at.
//! A request line is at most [`REQUEST_BYTES`] long, a response [`RESPONSE_BYTES`]; a longer one ends the connection.
//! Names, sizes and attributes are bounded when a command is executed, whatever a client has checked before.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::engine::Progress;
use crate::error::Error;

mod figures;
mod told;
mod volume;

pub use figures::{Check, Damaged, Fault, Pool, Recovered, Scrub, ScrubStatus, Threshold, Work};
pub use told::{Event, EventKind, Events, Figures, VolumeFigures};
pub use volume::{Attachment, Detached, Kept, Volume};

/// Version of the messages.
pub const VERSION: u32 = 1;
/// Longest request line in bytes: 256 KiB of attributes in hexadecimal, and room.
pub const REQUEST_BYTES: u64 = 1 << 20;
/// Longest response line in bytes.
pub const RESPONSE_BYTES: u64 = 32 << 20;
/// Most changed ranges in one answer to [`Command::Diff`]; the next page starts at [`Diff::next_bytes`].
pub const DIFF_RANGES: usize = 1 << 18;

/// A command and the version it is said in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// What to do.
    pub command: Command,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is done, and durable.
    Done(Reply),
    /// It was refused or failed; a refusal changed nothing.
    Failed(Failure),
}

/// Values of attributes by key. On the wire the values are hexadecimal.
pub type Attributes = BTreeMap<String, Bytes>;

/// Bytes that travel as hexadecimal text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bytes(pub Vec<u8>);

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        hex::encode(bytes.0)
    }
}

impl TryFrom<String> for Bytes {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        hex::decode(text).map(Self)
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

/// What can be asked of a pool. *Volume* and *snapshot* are names in the pool's one name space. Whoever creates something
/// makes its uuid: a creation that is sent again because the answer was lost answers success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Who is there. Answer: [`Reply::Hello`].
    Hello,
    /// Answer: [`Reply::Pool`].
    PoolInfo,
    /// What has happened, waiting for something to happen. Answer: [`Reply::Events`].
    Events {
        /// Only what has a higher number.
        after: u64,
        /// Longest wait when there is nothing; then the answer has no events.
        wait_ms: u64,
    },
    /// Waits until no change of a volume is under way that had begun before: by a client that has died meanwhile, perhaps.
    /// Answer: [`Reply::Done`].
    Settle,
    /// What the volumes do. Answer: [`Reply::Figures`].
    Figures,
    /// The same for programs that collect metrics. Answer: [`Reply::Metrics`].
    Metrics,
    /// Walks all metadata. Answer: [`Reply::Check`].
    PoolCheck,
    /// Asks how far the check is that another connection waits for. Answer: [`Reply::Progress`].
    PoolCheckProgress,
    /// Begins a scrub: checks all metadata, and mends what has a second copy. Answer: [`Reply::Scrub`].
    ScrubBegin,
    /// The next step of the scrub under way, with data. Answer: [`Reply::Scrub`].
    ScrubStep {
        /// Most blocks to read.
        blocks: u64,
    },
    /// The volumes and ranges that map damaged blocks which steps have told. Answer: [`Reply::Faults`].
    ScrubTouched {
        /// The blocks' faults, as they were told.
        damaged: Vec<Damaged>,
    },
    /// Verifies sealed blocks on every read through any volume, or no longer. Answer: [`Reply::Pool`].
    PoolVerify {
        /// Whether to.
        on: bool,
    },
    /// Makes the pool larger. Answer: [`Reply::Pool`].
    PoolGrow {
        /// The new size.
        size_bytes: u64,
    },
    /// Has a full pool grow by itself. Answer: [`Reply::Pool`].
    PoolLimit {
        /// The size up to which it does; 0: it does not.
        limit_bytes: u64,
    },
    /// Gives everything that is free back to the host. Answer: [`Reply::Pool`].
    PoolTrim,
    /// Answer: [`Reply::Volume`].
    VolumeCreate {
        /// Made by the client.
        uuid: Uuid,
        /// Name of the new volume.
        name: String,
        /// Virtual size.
        size_bytes: u64,
        /// 512 or 4096.
        sector_size: u32,
        /// Most own bytes; 0: no quota.
        quota_bytes: u64,
        /// Bytes of its own that are always there for it; 0: none.
        #[serde(default)]
        reservation_bytes: u64,
        /// Attributes from the start.
        #[serde(default)]
        attributes: Attributes,
    },
    /// All volumes and snapshots. Answer: [`Reply::Volumes`].
    VolumeList,
    /// Answer: [`Reply::Volume`].
    VolumeInfo {
        /// Volume or snapshot.
        name: String,
    },
    /// Answer: [`Reply::Volume`].
    VolumeRename {
        /// Volume or snapshot.
        name: String,
        /// The new name.
        to: String,
    },
    /// Grows an attached volume's device too; shrinks a volume that is not attached. Answer: [`Reply::Volume`].
    VolumeResize {
        /// The volume.
        name: String,
        /// The new virtual size.
        size_bytes: u64,
        /// Shrink below the size of the file system on it too.
        force: bool,
    },
    /// Answer: [`Reply::Done`].
    VolumeDelete {
        /// Volume or snapshot.
        name: String,
        /// Take its block device away first, if it has one that nobody uses.
        #[serde(default)]
        detach: bool,
    },
    /// Answer: [`Reply::Volume`].
    VolumeProtect {
        /// Volume or snapshot.
        name: String,
        /// Whether it is refused to delete it from now on.
        protected: bool,
    },
    /// Verifies sealed blocks on every read through this volume, or no longer. Answer: [`Reply::Volume`].
    VolumeVerify {
        /// Volume or snapshot.
        name: String,
        /// Whether to.
        on: bool,
    },
    /// Unmaps blocks that are written as zeros, or no longer. Answer: [`Reply::Volume`].
    VolumeZeroes {
        /// The volume.
        name: String,
        /// Whether to.
        detect: bool,
    },
    /// What writes do when the pool is full. Answer: [`Reply::Volume`].
    VolumeOnFull {
        /// The volume.
        name: String,
        /// They wait for space; else they fail at once.
        wait: bool,
    },
    /// Answer: [`Reply::Volume`].
    VolumeQuota {
        /// The volume.
        name: String,
        /// Most own bytes; 0: no quota.
        quota_bytes: u64,
    },
    /// Answer: [`Reply::Volume`].
    VolumeReserve {
        /// The volume.
        name: String,
        /// Bytes of its own that are always there for it; 0: none.
        reservation_bytes: u64,
    },
    /// Answer: [`Reply::Volume`].
    SnapshotCreate {
        /// The volume to take it of, in use or not.
        volume: String,
        /// Made by the client.
        uuid: Uuid,
        /// Name of the new snapshot.
        name: String,
        /// Attributes from the start.
        #[serde(default)]
        attributes: Attributes,
    },
    /// Takes snapshots of several volumes at one instant, all or none. Answer: [`Reply::Volumes`].
    SnapshotCreateAll {
        /// One of each volume.
        snapshots: Vec<SnapshotOf>,
    },
    /// Records a checksum for each block of a snapshot, and the digest of its content. Answer: [`Reply::Volume`].
    SnapshotSeal {
        /// The snapshot.
        name: String,
    },
    /// Deletes a snapshot, and refuses a volume. Answer: [`Reply::Done`].
    SnapshotDelete {
        /// The snapshot.
        name: String,
    },
    /// Gives a volume that is not attached the content of a snapshot of it. Answer: [`Reply::Volume`].
    SnapshotRollback {
        /// The volume.
        volume: String,
        /// The snapshot.
        snapshot: String,
        /// A new snapshot that keeps what the volume holds now.
        keep: Option<Keep>,
    },
    /// Answer: [`Reply::Volume`].
    CloneCreate {
        /// The snapshot to start from.
        snapshot: String,
        /// Made by the client.
        uuid: Uuid,
        /// Name of the new volume.
        name: String,
        /// Virtual size, when not that of the snapshot; never smaller.
        size_bytes: Option<u64>,
        /// Attributes from the start.
        #[serde(default)]
        attributes: Attributes,
    },
    /// Makes a volume a block device; one that is already is answered again. Answer: [`Reply::Attached`].
    Attach {
        /// Volume or snapshot. A snapshot is always read-only.
        name: String,
        /// Refuse writes.
        read_only: bool,
    },
    /// Attaches what was attached when the daemon stopped. Answer: [`Reply::Attached`].
    AttachAll,
    /// Undoes an attach. Refused while the device is mounted or open. Answer: [`Reply::Done`].
    Detach {
        /// Volume or snapshot.
        name: String,
    },
    /// Detaches everything that can be. Answer: [`Reply::Detached`].
    DetachAll,
    /// What is attached, and where. Answer: [`Reply::Attached`].
    AttachList,
    /// Ranges that differ between two volumes. Answer: [`Reply::Diff`].
    Diff {
        /// One volume or snapshot; none: what differs is all that the other has.
        #[serde(default)]
        from: Option<String>,
        /// Another.
        to: String,
        /// Where to go on; 0 at first.
        start_bytes: u64,
    },
    /// Answer: [`Reply::Attributes`].
    AttributesGet {
        /// Volume or snapshot.
        name: String,
    },
    /// Sets attributes, and deletes those without a value. Answer: [`Reply::Done`].
    AttributesSet {
        /// Volume or snapshot.
        name: String,
        /// New values by key; none: delete.
        changes: BTreeMap<String, Option<Bytes>>,
    },
    /// Has the engine process succeeded, by another build where the program on disk has been replaced. Answer:
    /// [`Reply::Done`] when it is about to be.
    Upgrade,
    /// Stops the daemon. Answer: [`Reply::Done`] when the stop has begun.
    Stop {
        /// Also when something is in use, which then gives errors; refused otherwise.
        force: bool,
    },
}

impl Command {
    /// Whether only a daemon can do it.
    pub fn needs_daemon(&self) -> bool {
        matches!(
            self,
            Self::Attach { .. }
                | Self::AttachAll
                | Self::Detach { .. }
                | Self::Events { .. }
                | Self::Upgrade
                | Self::Stop { .. }
        )
    }

    /// The command's name and the volume it is about, for the log.
    pub fn describe(&self) -> String {
        let pair = |operation: &str, name: &str| format!("{operation} {name}");
        match self {
            Self::Hello => "hello".into(),
            Self::PoolInfo => "pool info".into(),
            Self::Events { .. } => "events".into(),
            Self::Settle => "settle".into(),
            Self::Figures => "figures".into(),
            Self::Metrics => "metrics".into(),
            Self::PoolCheck | Self::PoolCheckProgress => "pool check".into(),
            Self::ScrubBegin => "pool scrub".into(),
            Self::ScrubStep { .. } => "pool scrub, next step".into(),
            Self::ScrubTouched { .. } => "pool scrub, what is touched".into(),
            Self::PoolVerify { .. } => "pool verify-on-read".into(),
            Self::PoolGrow { .. } => "pool grow".into(),
            Self::PoolLimit { .. } => "pool grow --up-to".into(),
            Self::PoolTrim => "pool trim".into(),
            Self::VolumeCreate { name, .. } => pair("volume create", name),
            Self::VolumeList => "volume list".into(),
            Self::VolumeInfo { name } => pair("volume info", name),
            Self::VolumeRename { name, .. } => pair("volume rename", name),
            Self::VolumeResize { name, .. } => pair("volume resize", name),
            Self::VolumeDelete { name, .. } => pair("volume delete", name),
            Self::VolumeProtect { name, .. } => pair("volume protect", name),
            Self::VolumeVerify { name, .. } => pair("volume verify-on-read", name),
            Self::VolumeZeroes { name, .. } => pair("volume detect-zeroes", name),
            Self::VolumeOnFull { name, .. } => pair("volume on-full", name),
            Self::VolumeQuota { name, .. } => pair("volume quota", name),
            Self::VolumeReserve { name, .. } => pair("volume reserve", name),
            Self::SnapshotSeal { name } => pair("snapshot seal", name),
            Self::SnapshotCreate { volume, name, .. } => format!("snapshot create {volume} {name}"),
            Self::SnapshotCreateAll { snapshots } => {
                let pairs: Vec<String> =
                    snapshots.iter().map(|each| format!("{} {}", each.volume, each.name)).collect();
                format!("snapshot create {}", pairs.join(", "))
            }
            Self::SnapshotDelete { name } => pair("snapshot delete", name),
            Self::SnapshotRollback { volume, snapshot, .. } => format!("snapshot rollback {volume} {snapshot}"),
            Self::CloneCreate { snapshot, name, .. } => format!("clone create {snapshot} {name}"),
            Self::Attach { name, .. } => pair("attach", name),
            Self::AttachAll => "attach --all".into(),
            Self::Detach { name } => pair("detach", name),
            Self::DetachAll => "detach --all".into(),
            Self::AttachList => "attach list".into(),
            Self::Diff { from, to, .. } => format!("diff {} {to}", from.as_deref().unwrap_or("nothing")),
            Self::AttributesGet { name } => pair("attributes get", name),
            Self::AttributesSet { name, .. } => pair("attributes set", name),
            Self::Upgrade => "upgrade".into(),
            Self::Stop { .. } => "stop".into(),
        }
    }

    /// Whether it is one of many steps, each of which is not worth a line in the log.
    pub fn is_step(&self) -> bool {
        matches!(self, Self::ScrubStep { .. })
    }

    /// Whether it makes, changes or deletes volumes or snapshots, in few commits.
    pub fn changes_volumes(&self) -> bool {
        matches!(
            self,
            Self::VolumeCreate { .. }
                | Self::VolumeRename { .. }
                | Self::VolumeDelete { .. }
                | Self::VolumeQuota { .. }
                | Self::SnapshotCreate { .. }
                | Self::SnapshotCreateAll { .. }
                | Self::SnapshotDelete { .. }
                | Self::CloneCreate { .. }
                | Self::AttributesSet { .. }
        )
    }

    /// Whether it changes nothing that lasts.
    pub fn is_read_only(&self) -> bool {
        matches!(
            self,
            Self::Hello
                | Self::PoolInfo
                | Self::Events { .. }
                | Self::Settle
                | Self::Figures
                | Self::Metrics
                | Self::PoolCheck
                | Self::PoolCheckProgress
                | Self::VolumeList
                | Self::VolumeInfo { .. }
                | Self::AttachList
                | Self::Diff { .. }
                | Self::AttributesGet { .. }
        )
    }
}

/// A snapshot to be taken with others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotOf {
    /// The volume to take it of, in use or not.
    pub volume: String,
    /// Made by the client.
    pub uuid: Uuid,
    /// Name of the new snapshot.
    pub name: String,
    /// Attributes from the start.
    #[serde(default)]
    pub attributes: Attributes,
}

/// The snapshot that keeps a volume's content when it is rolled back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Made by the client.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
}

/// The answer to a command that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "value", rename_all = "kebab-case")]
pub enum Reply {
    /// Done; there is nothing to tell.
    Done,
    /// Who answers.
    Hello(Hello),
    /// The pool.
    Pool(Box<Pool>),
    /// What has happened.
    Events(Events),
    /// What the volumes do.
    Figures(Box<Figures>),
    /// Metrics in the text form of OpenMetrics.
    Metrics(String),
    /// The result of a check.
    Check(Check),
    /// How far the check is; none when there is none.
    Progress(Option<Progress>),
    /// What a part of a scrub found.
    Scrub(Box<Scrub>),
    /// Faults with what they touch.
    Faults(Vec<Fault>),
    /// One volume, as it is now.
    Volume(Box<Volume>),
    /// All volumes, by id; or those that were asked for, in that order.
    Volumes(Vec<Volume>),
    /// Devices.
    Attached(Vec<Attachment>),
    /// What was detached, and what could not be.
    Detached(Detached),
    /// Changed ranges.
    Diff(Diff),
    /// All attributes.
    Attributes(Attributes),
}

/// Who answers on a control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the program.
    pub build: String,
    /// The pool's uuid.
    pub pool_uuid: Uuid,
    /// The pool's name.
    pub pool_name: String,
    /// The pool file, as the daemon opened it.
    pub pool_path: PathBuf,
    /// Process id of the front.
    pub front_pid: u32,
    /// Process id of the engine process.
    pub engine_pid: u32,
}

/// A page of the ranges that differ between two volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The ranges, ascending.
    pub ranges: Vec<Range>,
    /// Where the next page starts; none after the last.
    pub next_bytes: Option<u64>,
}

/// A changed range: offset and length in bytes, and whether the second volume has data there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range(pub u64, pub u64, pub bool);

/// The kinds of [`Error`], as they travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    /// [`Error::Corrupt`].
    Corrupt,
    /// [`Error::Incompatible`].
    Incompatible,
    /// [`Error::NoSpace`].
    NoSpace,
    /// [`Error::NotFound`].
    NotFound,
    /// [`Error::AlreadyExists`].
    AlreadyExists,
    /// [`Error::Busy`], [`Error::Elsewhere`].
    Busy,
    /// [`Error::ReadOnly`].
    ReadOnly,
    /// [`Error::InvalidInput`].
    InvalidInput,
    /// [`Error::Io`].
    Io,
    /// [`Error::Unfinished`].
    Unfinished,
    /// [`Error::Poisoned`].
    Poisoned,
}

/// An [`Error`] that may have crossed the socket: its kind and its message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of error.
    pub kind: Kind,
    /// What, where, and what to do, on one line.
    pub message: String,
}

impl Failure {
    /// A failure of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Corrupt(_) => Kind::Corrupt,
            Error::Incompatible(_) => Kind::Incompatible,
            Error::NoSpace(_) => Kind::NoSpace,
            Error::NotFound(_) => Kind::NotFound,
            Error::AlreadyExists(_) => Kind::AlreadyExists,
            Error::Busy(_) | Error::Elsewhere(_) => Kind::Busy,
            Error::ReadOnly(_) => Kind::ReadOnly,
            Error::InvalidInput(_) => Kind::InvalidInput,
            Error::Io { .. } => Kind::Io,
            Error::Unfinished(_) => Kind::Unfinished,
            Error::Poisoned(_) => Kind::Poisoned,
        };
        Self { kind, message: error.to_string() }
    }
}

/// Writes one message as a line.
///
/// # Errors
/// Those of `into`.
pub fn send<T: Serialize>(mut into: impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    into.write_all(&line)?;
    into.flush()
}

/// Reads one message of at most `limit_bytes`. `None` at the end of the stream.
///
/// # Errors
/// Those of `from`, and `InvalidData` for a line that is too long, cut short or not this message.
pub fn receive<T: for<'de> Deserialize<'de>>(from: &mut impl BufRead, limit_bytes: u64) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.take(limit_bytes + 1).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        let reason = if line.len() as u64 >= limit_bytes { "message is too long" } else { "message is cut short" };
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests;

//! What can go wrong, as kinds a caller can match.
//!
//! Errors are `Clone`, because one failed commit answers many requests; an `io::Error` is therefore shared, not turned
//! into text.

use std::io;
use std::sync::Arc;

use crate::units::PoolBlock;

/// Result of this library's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation was refused or failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A structure in the pool is not what it was when it was written.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The pool is sound, but of a version or with a feature that this build does not know.
    #[error("{0}")]
    Incompatible(String),
    /// No block, quota or host space is left for what was asked.
    #[error("{0}")]
    NoSpace(String),
    /// The named thing does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The name or the thing is there already.
    #[error("{0}")]
    AlreadyExists(String),
    /// In use by somebody else, or in a state that forbids the operation for now.
    #[error("{0}")]
    Busy(String),
    /// Another host has the pool. Waiting does not help.
    #[error("{0}")]
    Elsewhere(String),
    /// A change to something that is read-only or protected.
    #[error("{0}")]
    ReadOnly(String),
    /// An argument that can never be right.
    #[error("{0}")]
    InvalidInput(String),
    /// The medium or the host refused an operation.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done, with the file and offset where there is one.
        operation: String,
        /// The host's answer.
        source: Arc<io::Error>,
    },
    /// Restoring or repairing the pool was cut short.
    #[error("{0}")]
    Unfinished(String),
    /// A metadata write or an fsync failed earlier: nothing is written any more until the pool is opened anew.
    #[error(
        "pool is poisoned since a write of its metadata failed ({0}); when its disk works again, stop the daemon (plywood stop --force) and start it anew"
    )]
    Poisoned(String),
}

impl Error {
    /// Wraps a host error with the operation that met it. `ENOSPC` and `EDQUOT` become [`Error::NoSpace`].
    pub fn io(operation: impl Into<String>, source: io::Error) -> Self {
        let operation = operation.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace(format!("{operation}: {source}")),
            _ => Self::Io { operation, source: Arc::new(source) },
        }
    }

    /// The errno that an export answers for this error.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Corrupt(_) | Self::Poisoned(_) | Self::Incompatible(_) | Self::Unfinished(_) => libc::EIO,
            Self::NoSpace(_) => libc::ENOSPC,
            Self::NotFound(_) => libc::ENOENT,
            Self::AlreadyExists(_) => libc::EEXIST,
            Self::Busy(_) | Self::Elsewhere(_) => libc::EBUSY,
            Self::ReadOnly(_) => libc::EROFS,
            Self::InvalidInput(_) => libc::EINVAL,
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Damage: which structure, where, and which check found it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pool is damaged: {structure} at block {address}: {check}; run `plywood pool check`")]
pub struct Corrupt {
    /// The damaged structure.
    pub structure: Structure,
    /// Where it stands.
    pub address: PoolBlock,
    /// Which check failed.
    pub check: Check,
}

/// The structures of a pool file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Structure {
    /// One of the four copies of the superblock.
    Superblock,
    /// A group-index block.
    GroupIndex,
    /// A group's descriptor.
    GroupDescriptor,
    /// A page of reference counts.
    SpaceMapPage,
    /// A page of data checksums.
    ChecksumPage,
    /// A node of a mapping tree.
    Node,
    /// A volume's record.
    VolumeRecord,
    /// A block of a volume's attributes.
    Attributes,
    /// A page of the carcass table.
    CarcassPage,
    /// A batch of the journal.
    Batch,
    /// A record of the journal.
    Record,
    /// A block of a sealed snapshot.
    Data,
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Superblock => "superblock",
            Self::GroupIndex => "group index",
            Self::GroupDescriptor => "group descriptor",
            Self::SpaceMapPage => "space-map page",
            Self::ChecksumPage => "checksum page",
            Self::Node => "mapping node",
            Self::VolumeRecord => "volume record",
            Self::Attributes => "attribute block",
            Self::CarcassPage => "carcass page",
            Self::Batch => "journal batch",
            Self::Record => "journal record",
            Self::Data => "data block",
        })
    }
}

/// The check that found damage, one variant a check.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Check {
    /// The checksum differs from the one recorded by the parent or in the block.
    #[error("checksum is {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Recorded.
        expected: u32,
        /// Computed.
        found: u32,
    },
    /// The magic number is another.
    #[error("magic number is wrong")]
    Magic,
    /// The block names another pool.
    #[error("it belongs to another pool")]
    Uuid,
    /// A reserved field is not zero.
    #[error("reserved field {0} is not zero")]
    Reserved(&'static str),
    /// A field is outside its bounds.
    #[error("field {field} is {value}, out of bounds")]
    OutOfBounds {
        /// Name of the field.
        field: &'static str,
        /// Value found.
        value: u64,
    },
    /// A kind or type number that is not defined.
    #[error("{field} has the undefined value {value}")]
    Undefined {
        /// Name of the field.
        field: &'static str,
        /// Value found.
        value: u64,
    },
    /// The structure ends before its content does.
    #[error("it is cut short")]
    Truncated,
    /// A 512-byte sector carries the stamp of another write.
    #[error("sector {0} is damaged or was never written")]
    Stamp(usize),
    /// Text that must be UTF-8 is not.
    #[error("{0} is not valid UTF-8")]
    Text(&'static str),
    /// The journal breaks off although a later batch proves that it went on.
    #[error("the journal breaks off before change {0}, which was durable")]
    JournalGap(u64),
    /// A batch was written under a newer superblock than the one found.
    #[error("it was written under generation {0}, newer than the superblock found")]
    NewerGeneration(u64),
    /// A count differs from what a walk finds.
    #[error("count is {recorded}, a walk finds {found}")]
    Count {
        /// In the space map.
        recorded: u64,
        /// By walking.
        found: u64,
    },
    /// A number that a structure keeps about others differs from what they say.
    #[error("{field} is {recorded}, a walk finds {found}")]
    Total {
        /// Name of the field.
        field: &'static str,
        /// In the structure.
        recorded: u64,
        /// By walking.
        found: u64,
    },
    /// The medium does not deliver the block.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// Two facts contradict each other.
    #[error("{0}")]
    Inconsistent(&'static str),
}

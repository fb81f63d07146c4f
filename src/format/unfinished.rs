//! What was begun on a pool's metadata outside of a checkpoint, and must be ended before the pool is used.
//!
//! Restoring and repairing write metadata where it may still be needed. Before they do, they put a superblock with one of
//! these incompatible features into the slot that is not current, where the new one goes at the end: a sound copy that
//! says so makes the pool unfinished, whatever the others are.

use crate::error::Error;

/// Work on a pool's metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unfinished {
    /// A dump is being restored.
    Restore,
    /// The pool is being repaired.
    Repair,
}

impl Unfinished {
    /// Its incompatible feature.
    pub const fn feature(self) -> u64 {
        match self {
            Self::Restore => 1 << 0,
            Self::Repair => 1 << 1,
        }
    }

    /// All features of this kind.
    pub const FEATURES: u64 = Self::Restore.feature() | Self::Repair.feature();

    /// What incompatible features say, if one of them is of this kind. Of both, restoring: it writes everything.
    pub(super) const fn of(incompatible: u64) -> Option<Self> {
        if incompatible & Self::Restore.feature() != 0 {
            Some(Self::Restore)
        } else if incompatible & Self::Repair.feature() != 0 {
            Some(Self::Repair)
        } else {
            None
        }
    }
}

impl From<Unfinished> for Error {
    fn from(what: Unfinished) -> Self {
        Self::Unfinished(
            match what {
                Unfinished::Restore => "restoring this pool was not finished; run plywood pool restore again",
                Unfinished::Repair => {
                    "repairing this pool was not finished; run plywood pool repair again, or put back what it wrote over \
                     with plywood pool repair --undo SAVED"
                }
            }
            .into(),
        )
    }
}

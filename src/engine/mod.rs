//! What a pool, a volume and a snapshot are, and how each change of them becomes durable.
//!
//! The engine is asynchronous and single-threaded. It makes no system call and reads no clock and no random numbers: the
//! same calls with the same completions give the same bytes. [`Storage`] and [`PendingLog`] are its only ways out. What
//! the design does "under the lock" is done here between two awaits.

#![forbid(unsafe_code)]

mod accounts;
mod background;
mod bounds;
mod cache;
mod carcass;
mod carcass_table;
#[cfg(test)]
mod carcass_tests;
mod check;
mod checkpoint;
mod checksums;
mod commit;
mod control;
mod counters;
#[cfg(test)]
mod crash_tests;
mod create;
mod diff;
mod discard;
mod dump;
mod durable;
mod enlarge;
mod epoch;
mod exclusive;
mod gather;
#[cfg(test)]
mod gather_tests;
mod groups;
mod growth;
#[cfg(test)]
mod growth_tests;
mod info;
mod inspect;
mod journal;
mod open;
#[cfg(test)]
mod open_tests;
mod patience;
#[cfg(test)]
mod patience_tests;
mod pending_log;
mod pool;
mod promise;
mod punch;
mod ranges;
mod rebuild;
mod repair;
mod reservation;
#[cfg(test)]
mod reservation_tests;
mod scrub;
#[cfg(test)]
mod scrub_tests;
mod seal;
#[cfg(test)]
mod seal_tests;
mod share;
mod space;
mod state;
mod storage;
mod tail;
#[cfg(test)]
mod tests;
mod tree;
mod verify;
mod volume;
mod work;
mod write;
mod zeroes;

pub use control::NewVolume;
pub use counters::{Activity, Counters};
pub use create::{CreateOptions, JOURNAL_BYTES};
pub use diff::{ChangedPage, ChangedRange};
pub use dump::{DumpReport, RestoreReport, dump_metadata, restore_metadata};
pub use info::{ExclusiveBytes, Origin, PoolInfo, VolumeInfo};
pub use inspect::{CheckReport, Fault, Progress, Touched, TouchedRange, check_metadata};
pub use open::OpenOptions;
pub use pending_log::{PENDING_LOG_BYTES, PendingLog, PrivateLog};
pub use pool::Pool;
pub use rebuild::{SaveBlocks, SavedBlock};
pub use repair::{LostRanges, RepairReport, repair_metadata};
pub use scrub::{ScrubbedData, ScrubbedMetadata};
pub use seal::{DIGEST_STATE_ATTRIBUTE, Pace, SealReport};
pub use share::{NewClone, NewSnapshot};
pub use storage::{Memory, Storage};
pub use volume::{Held, VolumeHandle};
pub use work::{NoBoard, Underway, Work, WorkBoard};

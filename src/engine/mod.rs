//! What a pool, a volume and a snapshot are, and how each change of them becomes durable.
//!
//! The engine is asynchronous and single-threaded. It makes no system call and reads no clock and no random numbers: the
//! same calls with the same completions give the same bytes. [`Storage`] and [`PendingLog`] are its only ways out.

mod pending_log;
mod storage;

pub use pending_log::{PENDING_LOG_BYTES, PendingLog, PrivateLog};
pub use storage::{Memory, Storage};

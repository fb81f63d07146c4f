//! A pool on a regular file or a block device of the host.
//!
//! A [`PoolFile`] is the file opened, locked and found fit: on a host file system that keeps its promises, with direct
//! I/O that works. A [`FileStorage`] is one on a reactor, as the engine's [`Storage`](crate::engine::Storage).
//!
//! **Never buffered.** Everything goes around the host's page cache (O_DIRECT): the cache would hold each block a second
//! time, and writing it back later would lose errors that the engine has to see. A host that refuses direct I/O is told
//! so by name, and nothing falls back.
//!
//! **Two locks** keep others out, because two processes work for a pool in use:
//!
//! | lock | kind | held by | says |
//! |---|---|---|---|
//! | claim | open file description lock (`F_OFD_SETLK`) over the whole file | the front, or whoever works alone | only an engine that this front starts may open the pool |
//! | fence | `flock` on the description that does the pool's I/O | the engine | a predecessor's last I/O has not ended while this is held |
//!
//! They are of two kinds because a process would otherwise shut itself out. The fence is on the I/O's own description so
//! that the kernel keeps it for an engine that was killed until its ring has let go of the last operation: the ring holds
//! a reference to the description, not the process. A block device is opened with O_EXCL as well, which keeps mounts away; and because other hosts may see it, it
//! carries a [claim](host_claim) of the host.

mod content;
mod host;
mod host_claim;
mod lock;
mod pool_file;
mod storage;
#[cfg(test)]
mod tests;

pub use host_claim::leave_host;
pub(in crate::io) use host_claim::refuse_another_host;
pub use lock::PoolClaim;
pub(in crate::io) use lock::{take, try_claim, try_fence};
pub(in crate::io) use pool_file::open_existing;
pub use pool_file::{OpenOptions, PoolFile};
pub use storage::FileStorage;

//! Files, memory and io_uring: the engine's way out, made real.
//!
//! | module | what it is |
//! |---|---|
//! | `memory` | [`IoMemory`]: what I/O is done on, a buffer of the engine's own or a client's payload in shared memory |
//! | `mapping` | [`Mapping`]: shared memory, copied in and out and synchronised by atomics, never borrowed |
//! | `ring` | [`Reactor`]: one io_uring for a thread; [`block_on`]: the thread's loop; [`Wakeup`] and timers |
//! | `file` | [`PoolFile`], [`FileStorage`]: a pool on a file or device, with direct I/O and its two locks |
//! | `memory_storage` | [`MemoryStorage`]: a pool in memory, at once or in a seeded random order, for tests |
//! | `freeze` | [`Frozen`]: a mounted file system held still while a snapshot is taken |
//! | `grow` | [`grow_mounted`]: a mounted xfs or btrfs made as large as its device |
//! | `mapped` | [`MappedStorage`]: a pool not in use, for reading, where a bad page is an error and no signal |
//!
//! **A read or write on its way.** The engine calls [`Storage::read`](crate::engine::Storage::read) with an [`IoMemory`].
//! The storage checks range and alignment, puts a request that owns memory and file into a slot of its reactor, and
//! queues an entry: with registered file and, for payloads, registered buffer, so that the kernel takes no reference and
//! pins no page. Nothing is submitted yet. When no task can go on, the thread's loop enters the kernel once: that submits
//! all entries, runs what the kernel has put off for this thread, and waits for a completion. Reaping finishes short
//! transfers, and wakes the task that waits.
//!
//! **One thread.** Nothing here is `Send` but [`Mapping`] and [`PoolFile`]; there are no locks. Whoever wants something
//! done on the thread writes to an eventfd that is posted in its ring.

mod file;
mod freeze;
mod grow;
mod mapped;
mod mapping;
mod memory;
mod memory_storage;
mod ring;

pub use file::{FileStorage, OpenOptions, PoolClaim, PoolFile, leave_host};
pub use freeze::Frozen;
pub use grow::grow_mounted;
pub use mapped::MappedStorage;
pub use mapping::{Mapping, shared_memory};
pub use memory::{IoMemory, MEMORY_ALIGNMENT, PayloadArea};
#[doc(hidden)]
pub use memory_storage::holes_between;
pub use memory_storage::{MemoryCompletion, MemoryImage, MemoryStatistics, MemoryStorage};
pub use ring::{
    Driver, Operation, PUNCH_BOUNDS_US, Poller, PunchStatistics, Reactor, ReactorOptions, Sleep, Wakeup, block_on,
    submit_and_look,
};

//! Files, memory and io_uring: the engine's way out, made real.

mod mapping;
mod memory;
mod memory_storage;
mod ring;

pub use mapping::{Mapping, shared_memory};
pub use memory::{IoMemory, MEMORY_ALIGNMENT, PayloadArea};
pub use memory_storage::{MemoryCompletion, MemoryImage, MemoryStatistics, MemoryStorage};
pub use ring::{Driver, Operation, Poller, Reactor, ReactorOptions, Sleep, Wakeup, block_on};

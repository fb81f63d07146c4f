//! What front and engine share: queues, payloads, the table of open files, the pending log. All of it outlives an engine.
//!
//! Everything read from here is bounded before it is used. The life of a slot: the front fills it and marks it *sent*, the
//! engine answers and marks it *answered*, the front gives the answer to the kernel and takes the slot back.

mod board;
mod channel;
mod engine_queues;
mod front_queue;
mod geometry;
mod layout;
mod memory;
mod opens;
mod pending;

pub use board::{Plight, SharedBoard};
pub use engine_queues::{EngineQueues, RawRequest, Reply};
pub(crate) use front_queue::{Answer, FrontQueue, ring};
pub use geometry::{Arrangement, DEFAULT_BUDGET_BYTES, Geometry, possible_processors};
pub(crate) use layout::HEADER_BYTES;
pub use layout::{INLINE_BYTES, LAYOUT_VERSION, SessionMemory};
pub use memory::SharedMemory;
pub use opens::{OpenFile, OpenTable};
pub use pending::{PENDING_LOG_VERSION, SharedPendingLog};

//! One io_uring for a thread, and futures for its operations.
//!
//! A [`Reactor`] belongs to the thread that made it. A call queues an operation at once and answers a future; the
//! thread's loop, [`block_on`], runs tasks until none can go on, then submits what they queued in one system call that
//! also waits for a completion, then wakes the tasks that waited for what completed.
//!
//! **Ownership.** The kernel reads and writes memory behind Rust's back until it has posted the completion. So memory and
//! file belong to a slot of the reactor, not to the future: dropping the future only gives up the answer. The reactor
//! itself, when dropped, cancels what can be cancelled and waits for the rest.
//!
//! **What wakes the thread.** Only completions do. Another thread or process that wants something done writes an eventfd
//! that is kept polled by the ring ([`Wakeup`]); a task that waits for time uses [`Reactor::sleep`], one that waits for a
//! socket [`Reactor::readable`]. Waking a task from another thread in any other way does not end the wait.

mod drive;
mod operation;
mod punch;
mod reactor;
#[cfg(test)]
mod tests;
mod wakeup;

pub use drive::{Driver, Poller, block_on};
pub(in crate::io) use operation::{Request, RingFile, Transfer};
pub use punch::{PUNCH_BOUNDS_US, PunchStatistics};
pub(in crate::io) use punch::{Punch, PunchPace};
pub use reactor::{Operation, Reactor, ReactorOptions, submit_and_look};
pub use wakeup::{Sleep, Wakeup};

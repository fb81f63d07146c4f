//! A volume as a block device.
//!
//! Two processes. The front owns the FUSE session and moves requests between the kernel and queues in shared memory; the
//! engine process serves the queues and may die at any instant.

pub mod device;
pub mod front;
pub mod fuse;
pub mod link;
pub mod loopdev;
pub mod server;
pub mod shared;
mod volumes;

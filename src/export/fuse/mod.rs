//! Our own small FUSE layer: two transports, one file a volume.
//!
//! The front negotiates and moves requests (`session`); what they mean is the engine's business ([`request`]).

pub mod abi;
mod classic;
mod init;
mod mount;
pub mod request;
mod self_test;
mod session;
mod switch;
mod uring;

pub(crate) use session::{Session, SessionOptions};
pub use session::{Transport, TransportChoice};

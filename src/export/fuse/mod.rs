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

/// A queue cannot go on, for a reason that none should have. Its devices would hang for ever; the end of the process turns
/// that into errors.
fn give_out(queue: usize, error: &std::io::Error) -> ! {
    tracing::error!(queue, %error, "a FUSE queue of the front failed: the front ends, and its devices give errors");
    std::process::exit(1)
}

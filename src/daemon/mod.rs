//! One front and one engine process for a pool in use, and the commands both understand.
//!
//! [`protocol`] is what is said on the control socket, [`execute`] does it on an open pool, [`Client`] is the caller's
//! side: it reaches the engine process of a pool in use, or opens the pool file itself when nobody holds it. The same
//! commands run through the same code either way.
#![forbid(unsafe_code)]

mod client;
pub mod filesystem;
pub mod mounts;
pub mod protocol;

pub use client::Client;

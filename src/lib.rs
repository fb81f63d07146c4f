//! plywood: block-level copy-on-write snapshots in one sparse file.
//!
//! A *pool* holds any number of thin volumes, snapshots and clones. The floors, each using only those below it:
//! [`cli`] -> [`mod@containerd`] -> [`daemon`] -> [`export`] -> [`io`] -> [`engine`] -> [`mod@format`], with [`units`] and [`error`] beneath all (and `canary`, which is empty outside of tests).
//! `ARCHITECTURE.md` tells how a request travels through them.

#[doc(hidden)]
pub mod canary;
pub mod cli;
pub mod containerd;
pub mod daemon;
pub mod engine;
pub mod error;
pub mod export;
pub mod format;
pub mod io;
pub mod units;

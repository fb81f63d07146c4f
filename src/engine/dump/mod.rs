//! A pool's metadata as text, and back: one JSON object a line, described in `docs/dump.md`.
//!
//! A dump holds the mappings, not the data: it is no backup. Each node is written once, below what it points at and before
//! what points at it, at the block where it stands; so both directions run through the text once or twice and keep a few
//! words for each node in memory.

mod lines;
mod restore;
mod write;

pub use restore::{RestoreReport, restore_metadata};
pub use write::{DumpReport, dump_metadata};

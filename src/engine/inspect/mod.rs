//! A pool's metadata as it stands on the medium, read without an engine: what check, dump and repair have in common.
//!
//! Nothing here trusts what it reads. A structure that fails a check is a [`Fault`], and the walk goes on without it. Each
//! node is walked once, however many volumes share it, and a tree has at most four levels, so the walk ends whatever
//! the pool holds.
//!
//! **Memory.** One byte for each block of the groups that hold something ([`Counts`]), 256 MiB for 1 TiB in
//! use; a few words for each inner node (one for 256 MiB mapped) and for each block that more than 126 entries point at
//! (which takes as many entries, so no more than one for each node); the volumes' records.

mod attribution;
mod check;
mod checksums;
mod counts;
mod fault;
mod reader;
mod space;
mod superblocks;
mod tables;
mod walk;

pub(super) use attribution::attribute;
pub use check::{CheckReport, Progress, check_metadata};
pub(super) use check::{Shown, attribute_data, carcass_tree, check_journal, check_pinned, read_pinned, walk_trees};
pub(super) use checksums::{Checksummed, GroupChecksums, Sealed, read_checksums};
pub(super) use counts::{Counts, Reached};
pub(super) use fault::Faults;
pub use fault::{Fault, Touched, TouchedRange};
pub(super) use reader::Reader;
pub(super) use space::{GroupFacts, Space, compare, compare_total, implied, read_descriptor, read_index, read_space};
pub(super) use superblocks::{Passed, UNFINISHED, pass_unfinished, read_superblocks};
pub(super) use tables::{Tables, add_stubs, read_tables};
pub(super) use walk::{LATE_BIRTH, Tree, Visited, Visitor, Walker};

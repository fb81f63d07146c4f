//! A pool's metadata as it stands on the medium, read without an engine: what check, dump and repair have in common.
//!
//! Nothing here trusts what it reads. A structure that fails a check is a [`Fault`], and the walk goes on without it. Each
//! node is walked once, however many volumes share it, and a tree has at most four levels, so the walk ends whatever
//! the pool holds.
//!
//! **Memory.** One byte for each block of the groups that hold something ([`Counts`](counts::Counts)), 256 MiB for 1 TiB in
//! use; a few words for each inner node (one for 256 MiB mapped) and for each block that more than 126 entries point at
//! (which takes as many entries, so no more than one for each node); the volumes' records.

mod attribution;
mod check;
mod counts;
mod fault;
mod reader;
mod space;
mod superblocks;
mod tables;
mod walk;

pub use check::{CheckReport, Progress, check_metadata};
pub(super) use check::{carcass_tree, check_pinned, named_volumes, read_pinned, walk_trees};
pub(super) use counts::{Counts, Reached};
pub(super) use fault::Faults;
pub use fault::{Fault, Touched, TouchedRange};
pub(super) use reader::Reader;
pub(super) use space::{implied, read_descriptor, read_index};
pub(super) use superblocks::read_superblocks;
pub(super) use tables::{FoundVolume, Tables, add_stubs, read_tables};
pub(super) use walk::{Missing, Subtree, Tree, Visited, Visitor, Walker};

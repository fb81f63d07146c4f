//! Writing a pool's metadata anew, without an engine: what restore and repair have in common.
//!
//! Everything goes where nothing stands that the present superblock leads to: to blocks that nothing holds, and to the slots
//! that are not current. (Restore also writes nodes where the dump says that they stood.) From the first write to the last
//! the pool says that it is unfinished and is refused.

mod blocks;
mod journal;
mod space;
mod superblock;
mod tables;
mod writer;

pub(super) use blocks::FreeBlocks;
pub(super) use journal::{check_fits, find_place, write_batches, write_journal};
pub(super) use space::{KnownSpace, read_group_checksums, read_known_space, write_space};
pub(super) use superblock::begin_unfinished;
pub(super) use tables::{NewTables, write_tables};
pub(super) use writer::Writer;
pub use writer::{SaveBlocks, SavedBlock};

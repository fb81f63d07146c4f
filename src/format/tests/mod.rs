//! Tests of the format as a whole: `docs/format.md` against the structs, what every decoder owes its callers, and the
//! choice among superblocks. Randomness is seeded: a failure repeats.

mod bounds;
mod document;
mod geometry;
mod hostile;
mod pinned;
mod reserved;
pub(super) mod samples;
mod superblock;

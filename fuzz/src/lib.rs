//! What the fuzz targets share: pools in memory and how they are damaged, a model of their content, bounds on memory,
//! and seeds.
//!
//! The targets stand in `fuzz_targets/`, each with its invariants at its top. `tools/fuzz-smoke` runs all of them,
//! `docs/fuzzing.md` tells how to run one for longer and what to do with what it finds.

pub mod fields;
pub mod image;
pub mod imports;
pub mod layout;
pub mod memory;
pub mod model;
pub mod patches;
pub mod samples;
pub mod seeds;
pub mod session;
pub mod storage;

//! What the engine's work costs, in things that can be counted: nodes loaded and written, blocks taken, bytes.
//!
//! Never a time: those belong to `benches` and `tools/bench`.

mod amplification;
mod blank_storage;
mod depth;
mod sharing;
mod world;

//! The command line on pools that nobody holds: exit codes, help, JSON, and bad input that takes no device to give. Needs
//! io_uring and a folder with direct I/O, and no root.
//!
//! `PLYWOOD_PIN=1` writes the pinned help anew.

mod bad_pools;
mod bad_volumes;
mod documents;
mod help;
mod install;
mod json;
mod prune;
mod scratch;
mod scrub;
#[path = "../support/mod.rs"]
mod support;
mod told;
mod tools;
mod work;

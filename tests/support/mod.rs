//! What tests that run real programs share: commands with a time limit, a pool that cleans up after itself whatever
//! happens, what this machine can do, and digests of file trees.

#![allow(dead_code, reason = "each test binary uses its part")]

pub mod changes;
pub mod command;
pub mod kernel_log;
pub mod machine;
pub mod mounted;
pub mod pool;
pub mod tree;
pub mod trial;

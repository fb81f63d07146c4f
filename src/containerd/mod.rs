//! A snapshotter for containerd: the gRPC service `containerd.services.snapshots.v1` on a pool.
//!
//! `serve` is the process, `service` what comes over the wire, `store` what it means, `record` what of it stands in
//! the pool. There is no other data: a process that starts reads all of it from the pool (`index`). `docs/containerd.md`
//! tells users how containerd is told of it.
#![forbid(unsafe_code)]

pub mod api;
mod base;
mod error;
pub mod filter;
mod imported;
mod index;
mod link;
mod reaper;
mod record;
mod serve;
mod service;
mod settle;
mod store;

pub use base::{GrowFileSystem, MakeFileSystem};
pub use error::{Error, Result};
pub use record::{Kind, RECORD, REFERENCE, Record};
pub use serve::{default_socket, serve};
pub use store::Settings;

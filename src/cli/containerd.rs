//! `plywood containerd`: serves a pool to containerd as a snapshotter.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum as _};

use super::doctor::linux_version;
use super::image::Filesystem;
use super::{Context, size};
use crate::containerd;

/// Serves a pool to containerd.
#[derive(Debug, Args)]
pub struct ContainerdArguments {
    /// Where to listen; /run/plywood/containerd-POOL.sock unless told
    #[arg(long, env = "PLYWOOD_CONTAINERD_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// File system of snapshots without a parent; the others have their parent's
    #[arg(long = "fs", default_value = "ext4", env = "PLYWOOD_CONTAINERD_FS", value_name = "FS")]
    filesystem: Filesystem,
    /// Virtual size of snapshots without a parent; the others have their parent's
    #[arg(long, default_value = "10GiB", value_parser = size::parse, env = "PLYWOOD_CONTAINERD_SIZE", value_name = "SIZE")]
    size: u64,
}

/// Serves until a signal ends it.
///
/// # Errors
/// What keeps it from serving.
pub fn serve(context: &Context, arguments: &ContainerdArguments) -> Result<()> {
    let pool = context.find_pool()?;
    let socket = arguments.socket.clone().unwrap_or_else(|| containerd::default_socket(&pool));
    let filesystem = arguments.filesystem;
    // A clone has its origin's identity, and an older btrfs takes the two for one.
    ensure!(
        filesystem != Filesystem::Btrfs || linux_version().is_none_or(|version| version >= (6, 7)),
        "btrfs mounts clones side by side from Linux 6.7 on; use ext4 or xfs"
    );
    let make =
        move |_: &str, device: &std::path::Path| filesystem.make_empty(device).map_err(|error| format!("{error:#}"));
    // A parent may be of another kind than what is made today.
    let grow = |kind: &str, device: &std::path::Path| {
        Filesystem::from_str(kind, false)
            .and_then(|filesystem| filesystem.grow(device).map_err(|error| format!("{error:#}")))
    };
    let settings = containerd::Settings {
        filesystem: filesystem.to_string(),
        size_bytes: arguments.size,
        least_bytes: filesystem.least_bytes(),
        make: Box::new(make),
        grow: Box::new(grow),
    };
    Ok(containerd::serve(&pool, &socket, settings)?)
}

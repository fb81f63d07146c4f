//! `plywood docker-plugin`: volumes for Docker and Podman, by the volume plugin protocol (version 1).
//!
//! The plugin keeps nothing of its own: what a volume was asked for and which mounts it has stand in its attributes in the
//! pool, so it may be restarted, killed and upgraded at any time. Whether a volume is mounted, the kernel says.

mod answer;
mod connection;
mod mounting;
mod names;
mod options;
mod record;
mod socket;
mod volumes;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use clap::Args;

use super::{Context, output, size};
use crate::daemon::{self, making};
use socket::Socket;
use volumes::Volumes;

/// Virtual size of a volume that nobody gave one.
const DEFAULT_SIZE: &str = "10G";

/// Serves volumes to Docker and Podman.
#[derive(Debug, Args)]
pub struct DockerArguments {
    /// Where to listen; a socket that systemd gives (.socket units) comes before it
    #[arg(long, default_value = "/run/docker/plugins/plywood.sock", value_name = "PATH")]
    socket: PathBuf,
    /// Write a file that leads Docker to the socket, as /etc/docker/plugins/NAME.spec; the driver is called NAME then
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// Size of volumes that are created without size=
    #[arg(long, default_value = DEFAULT_SIZE, value_parser = size::parse, value_name = "SIZE")]
    default_size: u64,
}

/// Answers Docker and Podman until SIGTERM or SIGINT. Volumes that are mounted then stay mounted.
///
/// # Errors
/// When the pool's daemon does not start, another plugin serves the pool, or nobody can listen on the socket.
pub fn serve(context: &Context, arguments: &DockerArguments) -> Result<()> {
    let found = context.find_pool()?;
    daemon::start(&found)?;
    let Some(_only) = making::only(found.uuid, "docker")? else {
        bail!("another docker-plugin serves pool {} already; stop that one first", found.name);
    };
    let socket = match daemon::given_listener()? {
        Some(listener) => Socket::given(listener),
        None => Socket::bind(&arguments.socket, arguments.spec.as_deref())?,
    };
    let name = found.name.clone();
    let volumes = Arc::new(Volumes::new(found, arguments.default_size));
    volumes.clean_up()?;
    daemon::service_manager_ready(&name);
    if !context.json {
        output::line(&format!("volumes of pool {name} for Docker and Podman on {}", socket.describe()))?;
    }
    connection::serve(&socket, &volumes)?;
    daemon::service_manager_stopping();
    Ok(())
}

//! `plywood clone`: create.

use anyhow::Result;
use clap::Subcommand;
use uuid::Uuid;

use super::{Context, Name, size, volume};
use crate::daemon::protocol::Command;

/// Clones.
#[derive(Debug, Subcommand)]
pub enum CloneCommand {
    /// Make a writable volume from a snapshot
    Create {
        /// The snapshot
        snapshot: Name,
        /// Name of the clone
        name: Name,
        /// Size of the device, when it shall be larger than the snapshot
        #[arg(long, value_parser = size::parse)]
        size: Option<u64>,
    },
}

/// Does a clone command.
///
/// # Errors
/// What the pool answers, and what keeps it from being printed.
pub fn run(context: &Context, command: CloneCommand) -> Result<()> {
    let CloneCommand::Create { snapshot, name, size } = command;
    let clone = context.client()?.for_volume(Command::CloneCreate {
        snapshot: snapshot.text()?,
        uuid: Uuid::new_v4(),
        name: name.text()?,
        size_bytes: size,
        attributes: Default::default(),
    })?;
    volume::changed(context, &clone)
}

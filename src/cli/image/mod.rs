//! Images: reading them in all their forms, unpacking them onto thin volumes, listing them.

mod apply;
mod archive;
mod directory;
mod disk;
mod docker;
mod filesystem;
mod import;
pub mod labels;
mod layout;
mod list;
mod source;
mod stream;
mod tree;

use anyhow::Result;
use clap::Subcommand;

pub use apply::{Summary, apply_archive};
pub use directory::copy_directory;
pub use disk::Disk;
pub(crate) use filesystem::run as run_program;
pub use filesystem::{Detached, Filesystem};
pub use import::{ImportArguments, Imported, Order, import_image};
pub(crate) use import::{chain_id, detach, progress_over, watch_signals};
pub use list::{ImageInfo, images};
pub use source::Source;
pub use stream::{Interrupt, interrupted};
pub use tree::open_root;

use super::Context;

/// `plywood image ...`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Unpack an image into snapshots, one a layer
    Import(ImportArguments),
    /// List images
    List,
}

/// Runs one of them.
///
/// # Errors
///
/// Those of the command.
pub fn run(context: &Context, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Import(arguments) => import::import(context, &arguments),
        ImageCommand::List => list::list(context),
    }
}

//! Images: reading them in all their forms, unpacking them onto thin volumes, listing, exporting and deleting them.

mod apply;
mod archive;
mod delete;
mod directory;
mod disk;
mod docker;
mod export;
mod filesystem;
mod import;
pub mod labels;
pub mod layers;
mod layout;
mod list;
mod source;
mod stream;
mod tree;
mod workshop;

use anyhow::Result;
use clap::Subcommand;

pub use apply::{Summary, apply_archive};
pub use delete::DeleteArguments;
pub use directory::copy_directory;
pub use disk::Disk;
pub use export::ExportArguments;
pub(crate) use filesystem::run as run_program;
pub use filesystem::{Detached, Filesystem};
pub use import::{ImportArguments, Imported, Order, import_image};
pub(crate) use import::{heed_signals, progress_over, watch_signals};
pub use list::{ImageInfo, images};
pub use source::Source;
pub use stream::{Interrupt, interrupted};
pub use tree::{open_root, tree_at};

use super::Context;

/// `plywood image ...`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Unpack an image into snapshots, one a layer
    Import(ImportArguments),
    /// Write an image, a layer for each that it was made of, for containerd, Docker and registries
    Export(ExportArguments),
    /// List images
    List,
    /// Delete images, and the layers that were theirs alone
    Delete(DeleteArguments),
}

/// Runs one of them.
///
/// # Errors
///
/// Those of the command.
pub fn run(context: &Context, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Import(arguments) => import::import(context, &arguments),
        ImageCommand::Export(arguments) => export::export(context, &arguments),
        ImageCommand::List => list::list(context),
        ImageCommand::Delete(arguments) => delete::delete(context, &arguments),
    }
}

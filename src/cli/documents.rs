//! Man pages and shell completions from the definition of the command line, so that they cannot say anything else than it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, Command};
use clap_complete::Shell;

/// Where they are written.
#[derive(Debug, Args)]
pub struct DocumentsArguments {
    /// A directory, which is made
    directory: PathBuf,
}

/// Writes a man page for every command that is shown (`plywood-volume-create.1`), and a file of completions for each
/// shell (`plywood.bash`, `_plywood`, `plywood.fish`).
///
/// # Errors
/// What the host says.
pub fn write(arguments: &DocumentsArguments, command: Command) -> Result<()> {
    let directory = &arguments.directory;
    let failed = || directory.display().to_string();
    fs::create_dir_all(directory).with_context(failed)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut shown(&command), "plywood", directory).with_context(failed)?;
    }
    clap_mangen::generate_to(command, directory).with_context(failed)
}

/// The command line without what is hidden, which completions would offer. clap wants names that stay; this process ends
/// when they are written.
fn shown(command: &Command) -> Command {
    let name: &'static str = command.get_name().to_owned().leak();
    let aliases = command.get_visible_aliases().map(|alias| &*alias.to_owned().leak());
    let mut kept = Command::new(name).args(command.get_arguments().cloned()).visible_aliases(aliases);
    if let Some(about) = command.get_about() {
        kept = kept.about(about.clone());
    }
    kept.subcommands(command.get_subcommands().filter(|command| !command.is_hide_set()).map(shown))
}

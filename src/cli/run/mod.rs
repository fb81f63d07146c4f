//! `plywood run`: a container on a clone of an image.

mod bundle;
mod conduct;
mod container;
mod detached;
pub mod logs;
mod manage;
mod mounts;
mod runtime;
mod user;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

pub use bundle::{Network, Settings, write as write_bundle};
pub use container::{CONTAINERS, Container};
pub use manage::{
    KillArguments, LogsArguments, RmArguments, StartArguments, kill, logs as print_logs, remove, runs, start,
};
pub use runtime::{check as check_runtime, remove as remove_container, run_in_background};

use conduct::{Terms, conduct};
use mounts::Wanted;

use super::image::labels;
use super::{Context, Name, size};

/// Runs a command in a container.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// The image, or any snapshot that holds a root file system
    image: Name,
    /// Delete the container's volume when the command has ended
    #[arg(long)]
    rm: bool,
    /// Leave it running in the background, and print its name; what it says goes to a log
    #[arg(long, short)]
    detach: bool,
    /// When a file of that log is full; it and two before it are kept
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "10MiB", requires = "detach")]
    log_size: u64,
    /// Pass standard input on, as is done in the foreground anyway
    #[arg(long, short, conflicts_with = "detach")]
    interactive: bool,
    /// Give the command a terminal; without -i and -t it has one when standard input and output are one
    #[arg(long, short, conflicts_with = "detach")]
    tty: bool,
    /// Name of the container's volume [default: IMAGE.ID]
    #[arg(long)]
    name: Option<Name>,
    /// Set a variable; NAME alone takes the caller's
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory of the command
    #[arg(long, short, value_name = "DIRECTORY", value_parser = absolute)]
    workdir: Option<String>,
    /// Who runs the command, by name or number
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Mount the container's root read-only
    #[arg(long)]
    read_only: bool,
    /// Show a volume, or a path of the host, in the container; what is missing is made
    #[arg(long, short, value_name = "SOURCE:DIRECTORY[:ro]", value_parser = Wanted::volume)]
    volume: Vec<Wanted>,
    /// The same; what is missing is refused: `type=bind|volume|tmpfs,source=...,target=...[,readonly]`
    #[arg(long, value_name = "OPTIONS", value_parser = Wanted::mount)]
    mount: Vec<Wanted>,
    /// Memory for files at a directory
    #[arg(long, value_name = "DIRECTORY[:size=SIZE]", value_parser = Wanted::tmpfs)]
    tmpfs: Vec<Wanted>,
    /// What the container sees of the network
    #[arg(long, value_enum, default_value_t)]
    network: Network,
    /// The command; the image's own when none is given
    #[arg(last = true)]
    command: Vec<String>,
}

/// `plywood run`. Answers the command's exit code; 128 and the signal's number when a signal ended it.
///
/// # Errors
///
/// The container cannot be set up, or not be taken down.
pub fn run(context: &Context, arguments: &RunArguments) -> Result<ExitCode> {
    runtime::check()?;
    if arguments.detach && !detached::looks_after() {
        return detached::start(context);
    }
    if arguments.detach {
        detached::leave()?;
    }
    let terminal = terminal(arguments)?;
    let image = arguments.image.text()?;
    let name = arguments.name.as_ref().map(Name::text).transpose()?;
    let client = context.daemon_client_for(&image)?;
    let snapshot = client.volume(&image)?;
    ensure!(snapshot.snapshot, "{image} is a volume, not an image; make a snapshot of it first");
    let found = client.attributes(&image)?;
    let configuration = match found.get(labels::CONFIGURATION) {
        Some(_) => labels::configuration(&found, &image)?,
        None => oci_spec::image::ImageConfiguration::default(),
    };
    let settings = Settings {
        command: arguments.command.clone(),
        hostname: hostname(name.as_deref()).unwrap_or_default(),
        network: arguments.network,
        terminal,
        environment: arguments.env.iter().filter_map(|typed| variable(typed)).collect(),
        directory: arguments.workdir.clone(),
        user: arguments.user.clone(),
        read_only: arguments.read_only,
        mounts: Vec::new(),
    };
    let terms = Terms {
        settings: settings.on(&configuration).with_context(|| image.clone())?,
        wanted: [&arguments.volume[..], &arguments.mount, &arguments.tmpfs].concat(),
        log_bytes: arguments.log_size,
        thrown_away: arguments.rm,
    };
    if !terms.thrown_away {
        mounts::refuse_copies(&client, &terms.wanted)?;
    }
    // A signal while it is set up must not leave half of it behind; it ends it all the same.
    let interrupt = super::image::watch_signals()?;
    let attributes = container::attributes(&image, &arguments.command, &terms);
    let container = Container::open(&client, &image, name.as_deref(), attributes)?;
    conduct(&client, container, terms, arguments.detach, &interrupt)
}

/// Whether the command has a terminal.
fn terminal(arguments: &RunArguments) -> Result<bool> {
    let there_is = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    ensure!(!arguments.tty || there_is, "--tty: standard input and output are no terminal");
    Ok(!arguments.detach && there_is && (arguments.tty || !arguments.interactive))
}

/// `NAME=VALUE`. A name alone stands for what the caller has, and for nothing where it has nothing.
fn variable(typed: &str) -> Option<String> {
    if typed.contains('=') {
        return Some(typed.to_owned());
    }
    std::env::var(typed).ok().map(|value| format!("{typed}={value}"))
}

fn absolute(typed: &str) -> Result<String> {
    ensure!(typed.starts_with('/'), "{typed}: give an absolute path");
    Ok(typed.to_owned())
}

/// A name that can stand for a host: at most 63 letters, digits and hyphens.
fn hostname(name: Option<&str>) -> Option<String> {
    let name: String =
        name?.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).take(63).collect();
    let name = name.trim_matches('-').to_owned();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostnames_have_only_what_hosts_may_have() {
        assert_eq!(hostname(Some("web_1.prod")).unwrap(), "web-1-prod");
        assert_eq!(hostname(Some(&"é".repeat(9))), None);
        assert_eq!(hostname(Some(&"x".repeat(100))).unwrap().len(), 63);
        assert_eq!(hostname(None), None);
    }
}

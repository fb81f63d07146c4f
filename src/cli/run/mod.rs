//! `plywood run`: a container on a clone of an image.

mod bundle;
mod container;
mod mounts;
mod runtime;
mod user;

use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

pub use bundle::{Network, Settings, write as write_bundle};
pub use container::{CONTAINERS, Container};
pub use runtime::{check as check_runtime, remove as remove_container, run_in_background};

use mounts::{Volumes, Wanted};

use super::image::labels;
use super::{Context, Name};

/// Runs a command in a container.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// The image, or any snapshot that holds a root file system
    image: Name,
    /// Delete the container's volume when the command has ended
    #[arg(long)]
    rm: bool,
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
    // A signal while it is set up must not leave half of it behind; it ends it all the same.
    let interrupt = super::image::watch_signals()?;
    let command = &arguments.command;
    let mut container =
        Container::open(&client, &image, name.as_deref(), container::attributes(&image, command, arguments.rm))?;
    let wanted = [&arguments.volume[..], &arguments.mount, &arguments.tmpfs].concat();
    let (volumes, mounts) = Volumes::mount(&client, &container.id, &container.root(), &wanted, &interrupt)?;
    let settings = Settings {
        command: command.clone(),
        hostname: hostname(name.as_deref()).unwrap_or_else(|| container.id.clone()),
        network: arguments.network,
        terminal: std::io::stdin().is_terminal() && std::io::stdout().is_terminal(),
        environment: arguments.env.iter().filter_map(|typed| variable(typed)).collect(),
        directory: arguments.workdir.clone(),
        user: arguments.user.clone(),
        read_only: arguments.read_only,
        mounts,
    };
    bundle::write(&container.bundle, &configuration, &settings).with_context(|| image.clone())?;
    ensure!(!interrupt.load(std::sync::atomic::Ordering::Relaxed), "interrupted by a signal");
    let status = runtime::run(&container.bundle, &container.id);
    runtime::remove(&container.id);
    // From here on it is a container that has run: it stays unless it was said otherwise.
    container.keep(!arguments.rm);
    let closed = volumes.close().and(container.close());
    let status = status?;
    closed?;
    Ok(exit_code(status))
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

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))
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

    #[test]
    fn exit_codes_pass_through_and_signals_are_told() {
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), ExitCode::from(7));
        assert_eq!(exit_code(ExitStatus::from_raw(9)), ExitCode::from(137));
    }
}

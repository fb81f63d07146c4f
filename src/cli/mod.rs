//! The command line: parse, call, print.
//!
//! One file a noun. Errors end on one line of standard error: what, where, and what to do. Exit 0: done; 1: failed; 2:
//! the command line makes no sense.
#![forbid(unsafe_code)]

mod attach;
mod clone;
mod commit;
mod containerd;
mod context;
mod demo;
mod device_name;
mod diff;
mod docker;
mod doctor;
mod documents;
mod events;
mod hold;
pub mod image;
mod memory;
mod metrics;
pub mod mount;
mod mount_helper;
mod name;
pub mod output;
mod pool;
mod prune;
mod ps;
pub mod run;
mod scrub;
mod serve;
pub mod size;
mod snapshot;
mod tools;
mod top;
pub mod transfer;
mod unit;
mod volume;
mod working;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

pub use context::Context;
pub use name::Name;

use crate::daemon::{self, EngineArguments, logging};
use crate::export::loopdev::helper;

/// Thin volumes, snapshots and clones in one sparse file, as block devices
#[derive(Debug, Parser)]
#[command(name = "plywood", version, propagate_version = true, max_term_width = 100)]
struct Arguments {
    #[command(flatten)]
    context: Context,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pools: the files that hold everything
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// Volumes: thin block devices
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Snapshots: read-only volumes that share what their origin held
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Clones: writable volumes made from snapshots
    #[command(subcommand)]
    Clone(clone::CloneCommand),
    /// Make a volume a block device, and print which
    Attach(attach::AttachArguments),
    /// Take a volume's block device away
    Detach(attach::DetachArguments),
    /// Mount a volume, attaching it if need be
    Mount(mount::MountArguments),
    /// Unmount a volume, and undo what mount did besides
    #[command(visible_alias = "umount")]
    Unmount(mount::UnmountArguments),
    /// Images: root file systems as chains of snapshots
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Run a command in a container on a clone of an image
    Run(run::RunArguments),
    /// Run a container again that has ended
    Start(run::StartArguments),
    /// List the containers that run has made
    Ps(ps::PsArguments),
    /// Print what a container in the background has said
    Logs(run::LogsArguments),
    /// Send a signal to a container
    Kill(run::KillArguments),
    /// Remove containers, with what they wrote and said
    Rm(run::RmArguments),
    /// Make an image of a container, running or not
    Commit(commit::CommitArguments),
    /// Serve volumes to Docker and Podman: their volume plugin
    DockerPlugin(docker::DockerArguments),
    /// Show the whole story on one screen, with overlayfs beside it
    Demo(demo::DemoArguments),
    /// Show the ranges that differ between two volumes of one family
    Diff(diff::DiffArguments),
    /// Write a snapshot, or what changed since another, as a stream for another pool
    Send(transfer::SendArguments),
    /// Make a snapshot of a stream that plywood send has written
    Receive(transfer::ReceiveArguments),
    /// Delete what nothing refers to any more, and tell the bytes that frees
    Prune(prune::PruneArguments),
    /// Follow what happens to a pool in use
    Events(events::EventsArguments),
    /// Print the metrics of a pool in the text form that Prometheus collects
    Metrics,
    /// Watch what the volumes of a pool in use do
    Top(top::TopArguments),
    /// Look over this machine, what dead daemons left, and the pools that are found
    Doctor(doctor::DoctorArguments),
    /// Run a pool's daemon in the foreground
    Serve(serve::ServeArguments),
    /// Serve a pool to containerd as a snapshotter, in the foreground
    Containerd(containerd::ContainerdArguments),
    /// Have a daemon's engine process succeeded by the program on disk, under mounted volumes
    Upgrade(serve::UpgradeArguments),
    /// Stop a pool's daemon
    Stop(serve::StopArguments),
    /// The engine process; started by the front
    #[command(hide = true)]
    Engine(EngineArguments),
    /// Writes man pages and shell completions; for those who install
    #[command(hide = true)]
    Documents(documents::DocumentsArguments),
    /// What systemd does first when it stops or restarts the unit; see its file
    #[command(hide = true)]
    UnitStop,
    /// Thaws file systems when the process that froze them has died
    #[command(hide = true)]
    ThawGuard(hold::GuardArguments),
    /// Says which volume a loop device is, in the words of udev; for its rules
    #[command(hide = true)]
    DeviceName(device_name::DeviceNameArguments),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    if let Some(helper) = mount_helper::called_as() {
        return helper.main();
    }
    // Does one thing with a loop device, for the engine process. Whoever attaches waits for it, and it needs nothing of what
    // follows.
    if std::env::args_os().nth(1).is_some_and(|word| word == daemon::LOOP_HELPER) {
        logging::start(logging::COMMAND);
        return ended(helper::serve().map(|()| ExitCode::SUCCESS).map_err(Into::into));
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help goes to standard output, everything else to standard error; a closed pipe is no failure of ours.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    ended(run(&arguments.context, arguments.command))
}

fn ended(outcome: Result<ExitCode>) -> ExitCode {
    match outcome {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "plywood: {}", one_line(&error));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(context: &Context, command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve(_) | Command::Engine(_) => {}
        Command::DockerPlugin(_) | Command::Containerd(_) => logging::start(logging::DAEMON),
        _ => logging::start(logging::COMMAND),
    }
    match command {
        Command::Pool(command) => pool::run(context, command),
        Command::Volume(command) => volume::run(context, command),
        Command::Snapshot(command) => snapshot::run(context, command),
        Command::Clone(command) => clone::run(context, command),
        Command::Attach(arguments) => attach::attach(context, arguments),
        Command::Detach(arguments) => attach::detach(context, arguments),
        Command::Mount(arguments) => mount::mount(context, &arguments),
        Command::Unmount(arguments) => mount::unmount(context, &arguments),
        Command::Image(command) => image::run(context, command),
        Command::Run(arguments) => return run::run(context, &arguments),
        Command::Start(arguments) => return run::start(context, &arguments),
        Command::Ps(arguments) => ps::ps(context, &arguments),
        Command::Logs(arguments) => run::print_logs(context, &arguments),
        Command::Kill(arguments) => run::kill(context, &arguments),
        Command::Rm(arguments) => run::remove(context, &arguments),
        Command::Commit(arguments) => commit::commit(context, &arguments),
        Command::DockerPlugin(arguments) => docker::serve(context, &arguments),
        Command::Demo(arguments) => return demo::demo(context, &arguments),
        Command::Diff(arguments) => diff::run(context, &arguments),
        Command::Send(arguments) => transfer::send(context, &arguments),
        Command::Receive(arguments) => transfer::receive(context, &arguments),
        Command::Prune(arguments) => prune::prune(context, &arguments),
        Command::Events(arguments) => events::run(context, &arguments),
        Command::Metrics => metrics::run(context),
        Command::Top(arguments) => top::run(context, &arguments),
        Command::Doctor(arguments) => return doctor::run(context, &arguments),
        Command::Serve(arguments) => serve::serve(context, &arguments),
        Command::Containerd(arguments) => containerd::serve(context, &arguments),
        Command::Upgrade(arguments) => serve::upgrade(context, &arguments),
        Command::Stop(arguments) => serve::stop(context, &arguments),
        Command::Engine(arguments) => return serve::engine(context, &arguments),
        Command::Documents(arguments) => documents::write(&arguments, Arguments::command()),
        Command::DeviceName(arguments) => device_name::print(&arguments),
        Command::ThawGuard(arguments) => hold::guard(&arguments),
        Command::UnitStop => unit::stop(context),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// A command line that cannot be understood, found after parsing: exit 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub &'static str);

/// An error and its causes on one line. A cause that its error has told already is not told again.
fn one_line(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told.replace('\n', " ")
}

/// Whoever reads our output has seen enough: `plywood volume list | head -1`.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref::<io::Error>().is_some_and(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cause_is_told_once_and_on_one_line() {
        let cause = || io::Error::from_raw_os_error(13);
        let told = crate::error::Error::io("opening x", cause());
        assert_eq!(one_line(&told.into()), "opening x: Permission denied (os error 13)");
        let untold = anyhow::Error::new(cause()).context("opening\nx");
        assert_eq!(one_line(&untold), "opening x: Permission denied (os error 13)");
    }

    #[test]
    fn definitions_are_consistent() {
        Arguments::command().debug_assert();
    }
}

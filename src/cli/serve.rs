//! `plywood serve`, `plywood stop`, and the hidden command of the engine process.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use super::output::Waiting;
use super::{Context, size, unit, volume};
use crate::daemon::protocol::Command;
use crate::daemon::{self, Client, EngineArguments, ServeOptions, wait_until_gone};
use crate::export::fuse::TransportChoice;

/// How long a successor may take.
const SUCCESSION: Duration = Duration::from_secs(60);

/// Runs a pool's daemon.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Started by a command: leave its session
    #[arg(long, hide = true)]
    background: bool,
    /// How requests come from the kernel: auto takes the fastest that works, uring, classic
    #[arg(long, default_value = "auto", env = "PLYWOOD_TRANSPORT")]
    transport: TransportChoice,
    /// Attach what was attached when the daemon stopped
    #[arg(long)]
    attach_all: bool,
    /// What may be read a second to seal snapshots that have lasted a minute; 0 for none
    #[arg(long, default_value = "64MiB", value_parser = size::parse, env = "PLYWOOD_SEAL_RATE", value_name = "SIZE")]
    seal_rate: u64,
    /// Memory for requests under way and the mapping, half each; more for more processors, and at most an eighth of the
    /// machine's unless told
    #[arg(long, value_parser = size::parse, env = "PLYWOOD_MEMORY", value_name = "SIZE")]
    memory: Option<u64>,
    /// A line for the shell, run when 80, 90 or 95 % of the space are reached, and when they are left again; it finds
    /// PLYWOOD_POOL, PLYWOOD_POOL_NAME, PLYWOOD_THRESHOLD_PERCENT and PLYWOOD_THRESHOLD_DIRECTION (up, down)
    #[arg(long, env = "PLYWOOD_ON_THRESHOLD", value_name = "COMMAND")]
    on_threshold: Option<String>,
    /// Serve metrics over HTTP at /metrics on this address, which must be one of this machine's own
    #[arg(long, value_parser = loopback, value_name = "127.0.0.1:PORT")]
    metrics: Option<SocketAddr>,
}

/// An address that others cannot reach.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| "give an address and a port, as 127.0.0.1:9100".to_owned())?;
    if !address.ip().is_loopback() {
        return Err("only an address of this machine's own is served, as 127.0.0.1 or [::1]".into());
    }
    Ok(address)
}

/// Stops a pool's daemon.
#[derive(Debug, Args)]
pub struct StopArguments {
    /// Also when something is mounted, which then gives errors
    #[arg(long)]
    force: bool,
    // No conflict with --pool, which PLYWOOD_POOL may give.
    /// Every daemon of this machine
    #[arg(long)]
    all: bool,
}

/// Replaces running programs.
#[derive(Debug, Args)]
pub struct UpgradeArguments {
    // No conflict with --pool, which PLYWOOD_POOL may give.
    /// Every daemon of this machine
    #[arg(long)]
    all: bool,
}

/// Serves until a signal or `plywood stop` ends it.
///
/// # Errors
/// When the daemon cannot start, and when something stays attached at the end.
pub fn serve(context: &Context, arguments: &ServeArguments) -> Result<()> {
    let found = context.find_pool()?;
    if unit::goes_on(context, &found)? {
        return Ok(());
    }
    let options = ServeOptions {
        background: arguments.background,
        transport: arguments.transport,
        attach_all: arguments.attach_all,
        seal_bytes: arguments.seal_rate,
        memory_bytes: arguments.memory,
        on_threshold: arguments.on_threshold.clone().filter(|command| !command.trim().is_empty()),
        metrics: arguments.metrics,
    };
    Ok(daemon::serve(&found, &options)?)
}

/// Stops the daemon of a pool, or all of them, and waits until they have gone.
///
/// # Errors
/// When it does not run, or something is in use.
pub fn stop(context: &Context, arguments: &StopArguments) -> Result<()> {
    if arguments.all {
        return each_daemon(|client| stop_daemon(context, client, arguments.force));
    }
    let found = context.find_pool()?;
    match daemon::running(&found)? {
        Some(client) => stop_daemon(context, &client, arguments.force),
        None => bail!("no daemon serves pool {}; nothing to stop", found.name),
    }
}

fn stop_daemon(context: &Context, client: &Client, force: bool) -> Result<()> {
    let hello = client.hello()?;
    client.call(Command::Stop { force })?;
    let waiting = Waiting::begin("stopping the pool's daemon");
    let gone = wait_until_gone(hello.front_pid);
    drop(waiting);
    gone?;
    volume::done(context, "stopped", &hello.pool_name)
}

/// Has the engine process of a pool's daemon, or of all of them, succeeded, and waits for the successor.
///
/// # Errors
/// When no daemon runs, or the program on disk cannot succeed it.
pub fn upgrade(context: &Context, arguments: &UpgradeArguments) -> Result<()> {
    if arguments.all {
        return each_daemon(|client| upgrade_daemon(context, client));
    }
    let found = context.find_pool()?;
    match daemon::running(&found)? {
        Some(client) => upgrade_daemon(context, &client),
        None => bail!("no daemon serves pool {}; whatever is started next is the program on disk", found.name),
    }
}

/// See [`upgrade`].
pub(super) fn upgrade_daemon(context: &Context, client: &Client) -> Result<()> {
    let old = client.hello()?;
    client.call(Command::Upgrade)?;
    let began = Instant::now();
    let waiting = Waiting::begin("waiting for the successor");
    let new = loop {
        let new = client.hello()?;
        if new.engine_pid != old.engine_pid {
            break new;
        }
        if began.elapsed() > SUCCESSION {
            bail!("the engine process {} does not hand over; its log says why", old.engine_pid);
        }
        sleep(Duration::from_millis(5));
    };
    drop(waiting);
    let change = if new.build == old.build { new.build } else { format!("{} -> {}", old.build, new.build) };
    let front = if is_same_program(new.front_pid, new.engine_pid) {
        String::new()
    } else {
        format!("; the front, process {}, stays the former program while volumes are attached", new.front_pid)
    };
    let what = format!("{} (engine {change}, process {}{front})", new.pool_name, new.engine_pid);
    volume::done(context, "upgraded", &what)
}

/// Whether two processes run the same file.
fn is_same_program(one: u32, other: u32) -> bool {
    let file = |process| fs::metadata(format!("/proc/{process}/exe")).map(|file| (file.dev(), file.ino())).ok();
    file(one) == file(other)
}

/// Does something with every daemon of this machine. One that refuses does not keep it from the others.
fn each_daemon(mut with: impl FnMut(&Client) -> Result<()>) -> Result<()> {
    let mut refused = Vec::new();
    for client in daemon::running_daemons() {
        if let Err(error) = with(&client) {
            let pool = client.hello().map_or_else(|_| "a pool".to_owned(), |hello| format!("pool {}", hello.pool_name));
            refused.push(format!("{pool}: {error:#}"));
        }
    }
    if refused.is_empty() { Ok(()) } else { bail!("{}", refused.join("; ")) }
}

/// The engine process.
///
/// # Errors
/// What keeps it from serving.
pub fn engine(context: &Context, arguments: &EngineArguments) -> Result<ExitCode> {
    match arguments.can_succeed() {
        Some(answer) => Ok(answer),
        None => Ok(daemon::run_engine(&context.find_pool()?.path, arguments)?),
    }
}

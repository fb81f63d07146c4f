//! `plywood start`, `plywood logs`, `plywood kill` and `plywood rm`: containers that were run before.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::conduct::{Terms, conduct};
use super::container::{CONTAINERS, Container, is_attended};
use super::detached;
use super::logs::{self, Line, Reader};
use super::mounts::VOLUMES;
use super::runtime;
use crate::cli::attach::detach_when_idle;
use crate::cli::image::{labels, watch_signals};
use crate::cli::mount::unmount_below;
use crate::cli::{Context, Name, output, volume};
use crate::daemon::Client;
use crate::daemon::protocol::{Kind, Volume};

/// How long the process that looks after a container may take to clean up behind it.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often a log that is followed, or a container that ends, is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Starts a container that has ended, as it was run.
#[derive(Debug, Args)]
pub struct StartArguments {
    /// The container
    container: Name,
    /// In the foreground, as plywood run has it; otherwise it is left running in the background, and its name is printed
    #[arg(long, short)]
    attach: bool,
}

/// Prints what a container in the background has said.
#[derive(Debug, Args)]
pub struct LogsArguments {
    /// The container
    container: Name,
    /// Go on until it ends
    #[arg(long, short)]
    follow: bool,
    /// When each line was said
    #[arg(long, short)]
    timestamps: bool,
    /// The last lines only
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<usize>,
}

/// Sends a signal to a container.
#[derive(Debug, Args)]
pub struct KillArguments {
    /// The container
    container: Name,
    /// The signal, by name or number
    #[arg(long, short, default_value = "TERM")]
    signal: String,
}

/// Removes containers, with what they wrote and said.
#[derive(Debug, Args)]
pub struct RmArguments {
    /// The containers
    #[arg(required = true)]
    containers: Vec<Name>,
    /// End them first if they run
    #[arg(long, short)]
    force: bool,
}

/// A container by its name.
fn find(client: &Client, name: &Name) -> Result<(Volume, String)> {
    let name = name.text()?;
    let found = client.volume(&name)?;
    let held = client.attributes(&name)?;
    let id = labels::text(&held, labels::CONTAINER_ID).filter(|_| !found.snapshot);
    let id = id.with_context(|| format!("{name} is no container; plywood ps lists them"))?;
    // It becomes part of paths.
    ensure!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{name}: its {} is damaged", labels::CONTAINER_ID);
    Ok((found, id))
}

/// Does `plywood logs`.
///
/// # Errors
/// What is no container, or has no log.
pub fn logs(context: &Context, arguments: &LogsArguments) -> Result<()> {
    let client = context.client()?;
    let (container, id) = find(&client, &arguments.container)?;
    let name = &container.name;
    let pool = client.pool_uuid()?;
    let open = || Reader::open(pool, container.uuid);
    let mut reader =
        open().with_context(|| format!("{name} has no log: only what was started with --detach keeps one"))?;
    let skipped = match arguments.tail {
        None => 0,
        Some(tail) => {
            let mut counted = open().context("the log is gone")?;
            let mut lines = 0_usize;
            while counted.next_line()?.is_some() {
                lines += 1;
            }
            lines.saturating_sub(tail)
        }
    };
    for _ in 0..skipped {
        reader.next_line()?;
    }
    loop {
        // Asked before the last look: what it said last was written before it was let go of.
        let is_over = !arguments.follow || is_attended(&id)? != Some(true);
        while let Some(line) = reader.next_line()? {
            if context.json {
                output::json_line("line", &line)?;
            } else {
                print(line, arguments.timestamps)?;
            }
        }
        io::stdout().flush()?;
        if is_over {
            return Ok(());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn print(line: Line<'_>, timestamps: bool) -> io::Result<()> {
    let mut text = Vec::new();
    if timestamps {
        text.extend_from_slice(line.time.as_bytes());
        text.push(b' ');
    }
    text.extend_from_slice(line.text);
    if !line.is_part {
        text.push(b'\n');
    }
    if line.error { io::stderr().write_all(&text) } else { io::stdout().write_all(&text) }
}

/// Does `plywood start`. Answers as `plywood run` does.
///
/// # Errors
/// What is no container; one that runs or is in use; and as `plywood run`.
pub fn start(context: &Context, arguments: &StartArguments) -> Result<ExitCode> {
    runtime::check()?;
    let detached = !arguments.attach;
    if detached && !detached::looks_after() {
        return detached::start(context);
    }
    if detached {
        detached::leave()?;
    }
    let client = context.daemon_client_for(&arguments.container.text()?)?;
    let (mut container, id) = find(&client, &arguments.container)?;
    let name = container.name.clone();
    ensure!(!is_alive(&id)?, "{name} runs already");
    if is_attended(&id)? == Some(false) {
        // Whoever looked after it has died.
        take_down(&client, &container, &id)?;
        container = client.volume(&name)?;
    }
    let attributes = client.attributes(&name)?;
    let terms = labels::text(&attributes, labels::CONTAINER_TERMS);
    let terms = terms.with_context(|| format!("{name} does not say how it was run; run its image anew"))?;
    let mut terms: Terms = serde_json::from_str(&terms).with_context(|| format!("{name}: how it was run"))?;
    terms.settings.terminal = !detached && io::stdin().is_terminal() && io::stdout().is_terminal();
    let interrupt = watch_signals()?;
    let container = Container::reopen(&client, container, id)?;
    conduct(&client, container, terms, detached, &interrupt)
}

/// Does `plywood kill`.
///
/// # Errors
/// What is no container, or does not run.
pub fn kill(context: &Context, arguments: &KillArguments) -> Result<()> {
    let client = context.client()?;
    let (container, id) = find(&client, &arguments.container)?;
    ensure!(is_alive(&id)?, "{} does not run", container.name);
    runtime::kill(&id, &arguments.signal)
}

/// Whether a container's process runs. One that has ended is known to the runtime until somebody takes it down, which nobody
/// does where the runtime died, too.
fn is_alive(id: &str) -> Result<bool> {
    Ok(runtime::knows(id) && (is_attended(id)? == Some(true) || !runtime::has_stopped(id)))
}

/// Whether a container runs, or is being taken down.
///
/// # Errors
/// What the host says.
pub fn runs(container: &Volume, id: &str) -> Result<bool> {
    Ok(container.device.is_some() && (is_attended(id)? == Some(true) || is_alive(id)?))
}

/// Does `plywood rm`.
///
/// # Errors
/// What is no container; one that runs, without `force`; and what the pool answers.
pub fn remove(context: &Context, arguments: &RmArguments) -> Result<()> {
    let client = context.client()?;
    let pool = client.pool_uuid()?;
    for name in &arguments.containers {
        let (container, id) = find(&client, name)?;
        let name = &container.name;
        let runs = is_alive(&id)?;
        ensure!(!runs || arguments.force, "{name} runs; end it with plywood kill {name}, or give --force");
        if runtime::knows(&id) || is_attended(&id)?.is_some() {
            end(&client, &container, &id, arguments.force)?;
        }
        // Attached alone it may be: by plywood attach --all after a power cut. What is mounted by hand or open is refused.
        // One of --rm is removed by whoever looks after it, and another may have its name by now.
        if let Some(now) = client.name_of(container.uuid, name)? {
            match client.detach_and_delete(&now) {
                Err(failure) if failure.kind == Kind::NotFound => {}
                deleted => deleted?,
            }
        }
        logs::remove(pool, container.uuid)?;
        volume::done(context, "removed", name)?;
    }
    Ok(())
}

/// Waits until a container has been taken down; where nobody looks after it any more it is taken down here. One that runs is
/// ended with `force`, and refused without: one that is about to start looks like one that is about to go.
fn end(client: &Client, container: &Volume, id: &str, force: bool) -> Result<()> {
    let name = &container.name;
    let _waiting = output::Waiting::begin(format!("ending {name}"));
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        // It may have ended by itself meanwhile, or not have begun.
        if force && runtime::knows(id) {
            let _ = runtime::kill(id, "KILL");
        }
        let now = client.volumes()?.into_iter().find(|volume| volume.uuid == container.uuid);
        if now.is_none_or(|volume| volume.device.is_none()) {
            return Ok(());
        }
        if is_attended(id)? == Some(false) {
            break;
        }
        thread::sleep(LOOK_AGAIN);
    }
    ensure!(force || is_attended(id)? != Some(true), "{name} is starting, or runs; give --force to end it");
    take_down(client, container, id)
}

/// Does what the process would have done that looked after it.
fn take_down(client: &Client, container: &Volume, id: &str) -> Result<()> {
    runtime::remove(id);
    let directories = [CONTAINERS, VOLUMES].map(|directory| Path::new(directory).join(id));
    for directory in &directories {
        unmount_below(client, directory)?;
    }
    if let Some(now) = client.name_of(container.uuid, &container.name)? {
        detach_when_idle(client, &now).with_context(|| now.clone())?;
    }
    for directory in directories {
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| directory.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

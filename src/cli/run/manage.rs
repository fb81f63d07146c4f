//! `plywood logs`, `plywood kill` and `plywood rm`: containers after they were started.

use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use super::container::{CONTAINERS, is_attended, unmount};
use super::logs::{self, Line, Reader};
use super::mounts::VOLUMES;
use super::runtime;
use crate::cli::image::{detach, labels};
use crate::cli::{Context, Name, output, volume};
use crate::daemon::Client;
use crate::daemon::mounts::own_mounts;
use crate::daemon::protocol::Volume;

/// How long the process that looks after a container may take to clean up behind it.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often a log that is followed is looked at, and how often its container.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const LOOKS_TO_A_QUESTION: u32 = 10;

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
    let (container, _) = find(&client, &arguments.container)?;
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
    let mut looks = 0;
    let mut is_over = !arguments.follow;
    loop {
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
        looks += 1;
        if looks % LOOKS_TO_A_QUESTION == 0 {
            // What it said last was written before it was detached.
            is_over = client.volumes()?.iter().all(|volume| volume.uuid != container.uuid || volume.device.is_none());
        }
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

/// Does `plywood kill`.
///
/// # Errors
/// What is no container, or does not run.
pub fn kill(context: &Context, arguments: &KillArguments) -> Result<()> {
    let client = context.client()?;
    let (container, id) = find(&client, &arguments.container)?;
    ensure!(runtime::knows(&id), "{} does not run", container.name);
    runtime::kill(&id, &arguments.signal)
}

/// Whether a container runs, or is being taken down.
///
/// # Errors
/// What the host says.
pub fn runs(container: &Volume, id: &str) -> Result<bool> {
    Ok(container.device.is_some() && (runtime::knows(id) || is_attended(id)? == Some(true)))
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
        // What is mounted by hand does not run; the pool refuses to delete it, and says why.
        let runs = container.device.is_some() && runtime::knows(&id);
        ensure!(!runs || arguments.force, "{name} runs; end it with plywood kill {name}, or give --force");
        if container.device.is_some() && (arguments.force || is_attended(&id)? == Some(true)) {
            end(&client, &container, &id)?;
        }
        match client.delete(name) {
            // One of --rm is removed by whoever looks after it.
            Err(failure) if failure.kind == crate::daemon::protocol::Kind::NotFound => {}
            deleted => deleted?,
        }
        logs::remove(pool, container.uuid)?;
        volume::done(context, "removed", name)?;
    }
    Ok(())
}

/// Ends a container that runs, and waits until it has been taken down; where nobody looks after it any more it is taken
/// down here.
fn end(client: &Client, container: &Volume, id: &str) -> Result<()> {
    let _waiting = output::Waiting::begin(format!("ending {}", container.name));
    // It may have ended by itself meanwhile.
    let _ = runtime::kill(id, "KILL");
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let now = client.volumes()?.into_iter().find(|volume| volume.uuid == container.uuid);
        if now.is_none_or(|volume| volume.device.is_none()) {
            return Ok(());
        }
        if is_attended(id)? == Some(false) {
            break;
        }
        thread::sleep(LOOK_AGAIN);
    }
    take_down(client, container, id)
}

/// Does what the process would have done that looked after it.
fn take_down(client: &Client, container: &Volume, id: &str) -> Result<()> {
    runtime::remove(id);
    let (bundle, volumes) = (Path::new(CONTAINERS).join(id), Path::new(VOLUMES).join(id));
    for mount in own_mounts().context("/proc/self/mountinfo")?.into_iter().rev() {
        let point = mount.mount_point;
        if point.starts_with(&bundle) || point.starts_with(&volumes) {
            unmount(&point)?;
        }
    }
    let all = client.volumes()?;
    let held = client.attributes(&container.name)?;
    let mounted: Vec<uuid::Uuid> = labels::text(&held, labels::CONTAINER_VOLUMES)
        .and_then(|listed| serde_json::from_str(&listed).ok())
        .unwrap_or_default();
    for volume in all.iter().filter(|volume| mounted.contains(&volume.uuid) && volume.device.is_some()) {
        // Another container may have it.
        if let Err(error) = detach(client, &volume.name) {
            tracing::info!(%error, "{} stays attached", volume.name);
        }
    }
    if let Err(error) = detach(client, &container.name) {
        bail!("{}: {error:#}", container.name);
    }
    for directory in [bundle, volumes] {
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| directory.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

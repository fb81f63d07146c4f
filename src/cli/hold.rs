//! Holding the file systems of attached volumes still while snapshots are taken.
//!
//! A process that dies while it holds one leaves it frozen: all who write there wait, without end and without a word. So a
//! process beside it, which no signal of a terminal reaches, waits for its word that all go on, and has them go on when it ends
//! without that word.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::daemon::mounts::mount_of;
use crate::daemon::protocol::Volume;
use crate::io::Frozen;

/// Name of the guard's command.
const GUARD: &str = "thaw-guard";
/// What the guard is told when nothing is frozen any more.
const DONE: &[u8] = b"done";

/// The guard: thaws file systems when its starter has died.
#[derive(Debug, Args)]
pub struct GuardArguments {
    /// Where they are mounted
    #[arg(required = true)]
    points: Vec<PathBuf>,
}

/// File systems that take no writes until [`let_go`](Held::let_go); dropping does it too.
#[derive(Debug)]
#[must_use]
pub struct Held {
    // Dropped in this order: the guard is told when all is thawed.
    frozen: Vec<Frozen>,
    _guard: Option<Guard>,
}

/// Freezes the file systems of the attached ones of `volumes`, where they are mounted in this namespace. `instead` is what to
/// do where one is mounted elsewhere only.
///
/// # Errors
/// One is not mounted here, or cannot be frozen. None is then.
pub fn hold_still(volumes: &[Volume], instead: &str) -> Result<Held> {
    let mut points = Vec::new();
    for device in volumes.iter().filter_map(|volume| volume.device.as_ref()) {
        let shown = device.display();
        let Some(mount) = mount_of(device).with_context(|| shown.to_string())? else {
            bail!("{shown} is not mounted in this mount namespace; run this where it is mounted, {instead}");
        };
        points.push(mount.mount_point);
    }
    let guard = if points.is_empty() { None } else { Some(Guard::start(&points)?) };
    let mut held = Held { frozen: Vec::new(), _guard: guard };
    for point in points {
        let frozen = Frozen::freeze(&point);
        held.frozen.push(frozen.with_context(|| format!("{}: freezing the file system", point.display()))?);
    }
    Ok(held)
}

impl Held {
    /// Lets all of them go on.
    ///
    /// # Errors
    /// What the kernel says; a file system may be frozen still.
    pub fn let_go(self) -> Result<()> {
        // All of them, whatever becomes of one.
        let thawed: Vec<_> = self.frozen.into_iter().rev().map(Frozen::thaw).collect();
        thawed.into_iter().collect::<io::Result<()>>().context("file system stays frozen; thaw it with fsfreeze -u")
    }
}

/// The process that thaws when we have died.
#[derive(Debug)]
struct Guard(Child);

impl Guard {
    /// Starts it, and waits until it is ready.
    fn start(points: &[PathBuf]) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(GUARD).args(points).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guard = Self(command.spawn().context("starting the process that thaws should this one die")?);
        let mut ready = [0];
        let said = guard.0.stdout.take().map(|mut stdout| stdout.read_exact(&mut ready));
        said.transpose().context("the process that thaws should this one die is not ready; nothing was frozen")?;
        Ok(guard)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            let _ = stdin.write_all(DONE);
        }
        let _ = self.0.wait();
    }
}

/// What the guard does.
///
/// # Errors
/// A mount point that cannot be opened, and what the kernel says to thawing.
pub fn guard(arguments: &GuardArguments) -> Result<()> {
    let deaf = Arc::default();
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&deaf))?;
    }
    let open = |point: &PathBuf| File::open(point).with_context(|| point.display().to_string());
    let opened = arguments.points.iter().map(open).collect::<Result<Vec<_>>>()?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(b"\n")?;
    stdout.flush()?;
    let mut said = Vec::new();
    let heard = io::stdin().lock().take(DONE.len() as u64).read_to_end(&mut said);
    if heard.is_ok() && said == DONE {
        return Ok(());
    }
    let thawed: Vec<_> = opened.iter().rev().map(Frozen::thaw_left).collect();
    thawed.into_iter().collect::<io::Result<()>>().context("file system stays frozen; thaw it with fsfreeze -u")
}

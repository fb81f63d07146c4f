//! Containers in the background: `plywood run --detach` starts itself anew, in a session of its own, as the process that
//! looks after the container until it ends.
//!
//! That process prints the container's name when the container runs, and lets go of its starter's streams; one that cannot
//! start its container says why on them, and ends.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result};
use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::cli::{Context, output};

/// Set for the process that looks after a container: who started it. What that process starts inherits it, and is another's
/// child.
const LOOKS_AFTER: &str = "PLYWOOD_LOOKS_AFTER_CONTAINER";

/// Whether this process is the one that looks after the container.
pub fn looks_after() -> bool {
    let starter = std::env::var(LOOKS_AFTER).ok().and_then(|starter| starter.parse().ok());
    starter.is_some() && starter == rustix::process::getppid().map(|parent| parent.as_raw_nonzero().get())
}

/// Starts that process, and waits until the container runs or does not.
///
/// # Errors
/// It cannot be started.
pub fn start(context: &Context) -> Result<ExitCode> {
    let mut child = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env(LOOKS_AFTER, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the process that looks after the container")?;
    let mut name = String::new();
    if let Some(mut said) = child.stdout.take() {
        said.read_to_string(&mut name)?;
    }
    let name = name.trim_end();
    if !name.is_empty() {
        if context.json {
            output::json("container", &serde_json::json!({ "name": name }))?;
        } else {
            output::line(name)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    // It has told why.
    let status = child.wait()?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1)))
}

/// Leaves the starter's session and its signals; before anything is set up.
///
/// # Errors
/// What setsid(2) says.
pub fn leave() -> Result<()> {
    rustix::process::setsid().context("a session of its own")?;
    Ok(())
}

/// Tells the starter that the container runs, and lets go of its streams.
pub fn started(name: &str) {
    let told = writeln!(std::io::stdout(), "{name}").and_then(|()| std::io::stdout().flush());
    let silent = File::options().write(true).open("/dev/null").and_then(|null| {
        dup2_stdout(null.as_fd())?;
        dup2_stderr(null.as_fd())?;
        Ok(())
    });
    if let Err(error) = told.and(silent) {
        tracing::warn!(%error, "the starter is not told that the container runs");
    }
}

//! A restart of the systemd unit under mounted volumes: the front goes on, and its engine is replaced.
//!
//! systemd knows no restart of its own for a service: it stops the unit and starts it again. A front that is in use must not
//! stop. So before the stop (`ExecStop=`) another process takes its place as the unit's main process, which systemd ends, and
//! at the start (`ExecStart=`) the front, which lives on in the unit's control group, becomes the main process again
//! (`MAINPID=`, sd_notify(3)). A plain stop is as it was: the front is told, and ends when nothing is in use any more.

use std::fs;
use std::process::{Command as Process, Stdio};

use anyhow::{Context as _, Result};

use super::Context;
use super::serve::upgrade_daemon;
use crate::daemon::protocol::{Command, Kind};
use crate::daemon::{self, FoundPool, wait_until_gone};

/// Longest that the stand-in lives, if systemd forgets it.
const STAND_IN_SECONDS: &str = "60";

/// `ExecStop=`: nothing, unless the unit is being restarted. Then a daemon that is not in use ends; for one that is, a
/// process that does nothing stands in.
///
/// # Errors
/// When the daemon does not answer; systemd goes on with the stop.
pub fn stop(context: &Context) -> Result<()> {
    let found = context.find_pool()?;
    let Some(client) = daemon::running(&found)? else { return Ok(()) };
    if !is_restart() {
        return Ok(());
    }
    let front = client.hello()?.front_pid;
    match client.call(Command::Stop { force: false }) {
        Ok(_) => Ok(wait_until_gone(front)?),
        Err(failure) if failure.kind == Kind::Busy => {
            let mut stand_in = Process::new("sleep");
            stand_in.arg(STAND_IN_SECONDS).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let stand_in = stand_in.spawn().context("starting a process to stand in for the front")?;
            daemon::stands_in(stand_in.id());
            Ok(())
        }
        Err(failure) => Err(failure.into()),
    }
}

/// `ExecStart=`: whether a front of this very unit lives. Then its engine is replaced, and it is the main process again.
///
/// # Errors
/// When it cannot be upgraded: it serves on, and the unit fails.
pub fn goes_on(context: &Context, pool: &FoundPool) -> Result<bool> {
    if !daemon::service_manager_is_there() {
        return Ok(false);
    }
    let Some(client) = daemon::running(pool)? else { return Ok(false) };
    // An engine whose front has died takes connections to its very end, and answers none.
    let Ok(hello) = client.hello() else { return Ok(false) };
    let front = hello.front_pid;
    let group = |process: &str| fs::read_to_string(format!("/proc/{process}/cgroup")).ok();
    if front == std::process::id() || group("self").is_none() || group("self") != group(&front.to_string()) {
        return Ok(false);
    }
    upgrade_daemon(context, &client)?;
    daemon::goes_on(&pool.name, front);
    Ok(true)
}

/// Whether the job that systemd does with our unit is a restart.
fn is_restart() -> bool {
    // 0::/system.slice/plywood.slice/plywood@main.service
    let group = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let unit =
        group.lines().find_map(|line| line.strip_prefix("0::")?.split('/').find(|part| part.ends_with(".service")));
    let Some(unit) = unit else { return false };
    let jobs = Process::new("systemctl").args(["list-jobs", "--no-legend", "--plain", "--full"]).output();
    let jobs = jobs.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    jobs.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(unit) && words.next() == Some("restart")
    })
}

//! A restart of the systemd unit under mounted volumes: the front goes on, and its engine is replaced.
//!
//! systemd knows no restart of its own for a service: it stops the unit and starts it again. A front that is in use must not
//! stop, so the unit leaves stopping to `ExecStop=`, which knows a restart by its job, and kills nothing itself
//! (`KillMode=none`): it would wait for its main process, and tell it to stop a second time when it has waited long enough. At
//! the start the front, which lives on in the unit's control group, becomes the main process again (`MAINPID=`, sd_notify(3)).

use std::fs;
use std::process::Command as Process;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::Context;
use super::serve::upgrade_daemon;
use crate::daemon::protocol::{Command, Kind};
use crate::daemon::{self, FoundPool, wait_until_gone};

/// `ExecStop=`: tells the front to stop, and waits for that, as long as systemd lets it. A restart leaves a front alone that
/// is in use.
///
/// # Errors
/// When it cannot be told.
pub fn stop(context: &Context) -> Result<()> {
    // None where the front has ended already.
    let front = std::env::var("MAINPID").ok().and_then(|process| process.parse::<i32>().ok()).and_then(Pid::from_raw);
    let Some(front) = front else { return Ok(()) };
    let asked = match daemon::running(&context.find_pool()?)? {
        Some(client) if is_restart() => Some(client.call(Command::Stop { force: false })),
        _ => None,
    };
    match asked {
        Some(Err(failure)) if failure.kind == Kind::Busy => return Ok(()),
        // Told twice it would stop whatever is in use.
        Some(Ok(_)) => {}
        _ => kill_process(front, Signal::TERM).context("telling the front to stop")?,
    }
    while wait_until_gone(front.as_raw_nonzero().get().unsigned_abs()).is_err() {}
    Ok(())
}

/// `ExecStart=`: whether a front of this very unit lives. Then its engine is replaced, and it is the main process again.
///
/// # Errors
/// When it cannot be upgraded: it serves on, and the unit fails.
pub fn goes_on(context: &Context, pool: &FoundPool) -> Result<bool> {
    // The socket of a front that has just become this program is this process's own.
    if !daemon::service_manager_is_there() || daemon::is_successor() {
        return Ok(false);
    }
    let Some(client) = daemon::running(pool)? else { return Ok(false) };
    // An engine whose front has died takes connections to its very end, and answers none.
    let Ok(hello) = client.hello() else { return Ok(false) };
    let front = hello.front_pid;
    let group = |process: &str| fs::read_to_string(format!("/proc/{process}/cgroup")).ok();
    if group("self").is_none() || group("self") != group(&front.to_string()) {
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

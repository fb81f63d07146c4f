//! What the processes of a daemon ask of the kernel for themselves before they do anything else: a daemon under mounted
//! file systems must not wait for them, be swapped onto them, or be killed for their memory.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{mounts, places};
use crate::error::{Error, Result};
use crate::export::front;

/// The major number of loop devices (`Documentation/admin-guide/devices.txt`).
const LOOP_MAJOR: u32 = 7;

/// Refuses everybody but root, for whom the devices are.
///
/// # Errors
/// [`Error::Io`] with `EPERM`.
pub fn require_root(what: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::io(format!("{what} needs root; run it with sudo"), Errno::PERM.into()))
}

/// Comes first in a process, before it makes threads or rings: the mark is a task's own and inherited from here on. With
/// it no allocation waits for writeback to our own devices.
pub fn become_io_flusher() {
    if let Err(error) = front::become_io_flusher() {
        tracing::warn!("{error}; under memory pressure the daemon may wait for its own devices");
    }
}

/// Keeps what is touched in memory.
pub fn stay_in_memory() {
    if let Err(error) = front::lock_memory() {
        tracing::warn!("{error}; swap on one of its own devices would stop the daemon");
    }
}

/// Keeps this process and its children alive when memory is short.
pub fn outlive_others() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(%error, "oom_score_adj cannot be set; the daemon may be killed when memory is short");
    }
}

/// Waits until every thread of a process has ended. False: one has not, after all that patience. A child of the caller
/// that nobody has waited for has ended, too.
///
/// # Errors
/// What pidfd_open(2) and poll(2) say.
pub fn wait_for_end(process: u32, patience: Duration) -> io::Result<bool> {
    let Some(pid) = i32::try_from(process).ok().and_then(Pid::from_raw) else { return Ok(true) };
    let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
        // One reaped meanwhile is an invalid argument before Linux 6.16, no such entry since.
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(true),
        descriptor => descriptor?,
    };
    let began = Instant::now();
    loop {
        let left = patience.saturating_sub(began.elapsed());
        let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            ended => return Ok(ended? > 0),
        }
    }
}

/// Processes that were started with `arguments`, these and no others, by somebody else than this one.
///
/// # Errors
/// When /proc cannot be read.
pub fn strangers_with(arguments: &[OsString]) -> io::Result<Vec<u32>> {
    let own = std::process::id().to_string();
    let is_stranger = |id: u32| {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let words = line.strip_suffix(&[0]).unwrap_or_default().split(|byte| *byte == 0);
        // Behind the name: state, parent.
        let stat = || fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        words.skip(1).eq(arguments.iter().map(|argument| argument.as_bytes()))
            && stat().rsplit_once(") ").is_some_and(|(_, rest)| rest.split(' ').nth(1) != Some(&own))
    };
    let ids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(ids.filter(|id| is_stranger(*id)).collect())
}

/// Whether the first thread of a process has ended. Where it never ends by itself, the process has been killed, and the
/// others follow.
pub fn is_ending(process: u32) -> bool {
    match fs::read_to_string(format!("/proc/{process}/stat")) {
        Ok(stat) => stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Leaves the mount namespace of those who use the devices: a process that shares it can wait for itself when it ends.
/// Comes before threads are made.
///
/// The copy would hold every file system of a loop device mounted at this moment, of this pool's former life or of
/// another pool, and the memory of pools in memory, so those are let go of, except the one that the pool's own file stands
/// on.
///
/// # Errors
/// What unshare(2) and mount(2) say.
pub fn enter_own_mount_namespace(pool_device: (u32, u32)) -> Result<()> {
    front::enter_own_mount_namespace()?;
    let mounted = mounts::own_mounts().map_err(|error| Error::io("/proc/self/mountinfo", error))?;
    for mount in mounted.iter().rev() {
        let of_loop = mount.device.0 == LOOP_MAJOR || mount.source.starts_with("/dev") && is_loop(&mount.source);
        let in_memory = mount.mount_point.starts_with(places::MEMORY_DIRECTORY);
        if (of_loop || in_memory) && mount.device != pool_device && mount.mount_point.as_os_str() != "/" {
            // Somebody may be in the way of one; then it stays, as it would have without us.
            if let Err(error) = unmount(&mount.mount_point, UnmountFlags::DETACH) {
                tracing::warn!(%error, "{} stays mounted in the daemon's namespace", mount.mount_point.display());
            }
        }
    }
    Ok(())
}

fn is_loop(path: &std::path::Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("loop"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Signal, kill_process};

    use super::*;

    #[test]
    fn process_that_lives_has_not_ended() {
        let patience = Duration::from_millis(10);
        assert!(!is_ending(std::process::id()));
        assert!(!wait_for_end(std::process::id(), patience).unwrap());
        assert!(is_ending(u32::MAX));
        assert!(wait_for_end(u32::MAX, patience).unwrap());
    }

    #[test]
    fn child_that_nobody_has_waited_for_has_ended() {
        let mut child = Command::new("true").spawn().unwrap();
        assert!(wait_for_end(child.id(), Duration::from_secs(60)).unwrap());
        assert!(is_ending(child.id()));
        child.wait().unwrap();
        assert!(wait_for_end(child.id(), Duration::ZERO).unwrap());
    }

    #[test]
    fn strangers_are_found_by_their_arguments_and_waited_for() {
        let arguments = [OsString::from(format!("600.{}", std::process::id()))];
        let named = arguments[0].to_str().unwrap();
        let mut own = Command::new("sleep").args(&arguments).spawn().unwrap();
        assert!(strangers_with(&arguments).unwrap().is_empty(), "a child is none");
        // The shell does not wait for what it starts.
        let line = format!("sleep {named} >/dev/null 2>&1 & echo $!");
        let said = Command::new("sh").args(["-c", &line]).output().unwrap().stdout;
        let stranger: u32 = String::from_utf8(said).unwrap().trim().parse().unwrap();
        let began = Instant::now();
        while strangers_with(&arguments).unwrap() != [stranger] {
            assert!(began.elapsed() < Duration::from_secs(60), "not found");
        }
        assert!(!strangers_with(&[]).unwrap().contains(&stranger));
        assert!(!wait_for_end(stranger, Duration::ZERO).unwrap());
        kill_process(Pid::from_raw(stranger.cast_signed()).unwrap(), Signal::KILL).unwrap();
        assert!(wait_for_end(stranger, Duration::from_secs(60)).unwrap());
        assert!(strangers_with(&arguments).unwrap().is_empty());
        own.kill().unwrap();
        own.wait().unwrap();
    }
}

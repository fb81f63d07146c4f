//! `runc`, the program that starts a bundle's process in its namespaces.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::iterator::Signals;

use super::logs::Log;
use crate::daemon::mounts::own_mounts;

/// Where runc keeps what it knows about our containers.
const STATE: &str = "/run/plywood/runc";
/// From the first signal to SIGKILL. The first process of a namespace is deaf to signals it has no handler for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether a container has started.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Looks whether containers can be run here.
///
/// # Errors
///
/// runc is not installed.
pub fn check() -> Result<()> {
    // Only looked for, not run: starting it takes longer than making the container's root.
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|directory| directory.join("runc").is_file()) {
        return Ok(());
    }
    Err(not_installed(io::ErrorKind::NotFound.into()))
}

fn not_installed(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::NotFound {
        return anyhow!("containers are started by runc, which is not installed: apt-get install runc");
    }
    anyhow::Error::from(error).context("runc")
}

fn runc() -> Command {
    let mut command = Command::new("runc");
    command.args(["--root", STATE]);
    command
}

fn start(bundle: &Path, id: &str, pid_file: &Path) -> Command {
    let mut command = runc();
    command.arg("run").arg("--pid-file").arg(pid_file).arg("--bundle").arg(bundle);
    // An initial RAM file system cannot be pivoted away from.
    let on_rootfs = own_mounts().is_ok_and(|mounts| {
        mounts
            .iter()
            .rfind(|mount| mount.mount_point == Path::new("/"))
            .is_some_and(|root| root.file_system == "rootfs")
    });
    if on_rootfs {
        command.arg("--no-pivot");
    }
    command.arg(id);
    command
}

/// Where a container's standard streams lead.
#[derive(Clone, Copy)]
pub enum Streams<'a> {
    /// They are our own.
    Own,
    /// Nothing is read, and what is printed goes to a log.
    Log(&'a Log),
}

/// Runs a bundle until it ends, passing signals on. `started` is called when its first process runs, if it ever does.
///
/// # Errors
///
/// runc is not installed, or cannot be waited for.
pub fn run(bundle: &Path, id: &str, streams: Streams<'_>, started: impl FnOnce()) -> Result<ExitStatus> {
    // Handlers first: a signal from now on is for the container, and we go on to clean up.
    let mut signals =
        Signals::new([libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2])?;
    let handle = signals.handle();
    let pid_file = bundle.join("pid");
    let mut command = start(bundle, id, &pid_file);
    if let Streams::Log(_) = streams {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let mut child = command.spawn().map_err(not_installed)?;
    let ended = Arc::new(AtomicBool::new(false));
    let forwarder =
        Forwarder { child: pid(&child), id: id.to_owned(), ended: Arc::clone(&ended), had_terminal: has_terminal() };
    let thread = thread::spawn(move || {
        for signal in signals.forever() {
            forwarder.pass_on(signal);
        }
    });
    let status = match streams {
        Streams::Own => {
            started();
            child.wait()
        }
        Streams::Log(log) => logged(&mut child, log, &pid_file, started),
    };
    ended.store(true, Ordering::Release);
    handle.close();
    thread.join().ok();
    status.context("waiting for runc")
}

/// Waits for its end, and for the end of what it prints.
fn logged(child: &mut Child, log: &Log, pid_file: &Path, started: impl FnOnce()) -> io::Result<ExitStatus> {
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| output.map(|output| log.copy(output, "stdout")));
        scope.spawn(|| errors.map(|errors| log.copy(errors, "stderr")));
        loop {
            // Looked for in this order: one that has ended at once has started all the same.
            let has_ended = child.try_wait()?.is_some();
            if pid_file.exists() {
                started();
                return child.wait();
            }
            if has_ended {
                return child.wait();
            }
            thread::sleep(LOOK_AGAIN);
        }
    })
}

/// Starts a bundle in the background. Answers the process id of its first process.
///
/// # Errors
///
/// runc is not installed, or refuses.
pub fn run_in_background(bundle: &Path, id: &str) -> Result<u32> {
    let pid_file = bundle.join("pid");
    let mut command = runc();
    command.args(["run", "--detach", "--pid-file"]).arg(&pid_file).arg("--bundle").arg(bundle).arg(id);
    // The container inherits the streams: pipes would keep us waiting for their end.
    let log = bundle.join("log");
    let log_file = fs::File::create(&log)?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
    let status = command.status().map_err(not_installed)?;
    let said = || fs::read_to_string(&log).unwrap_or_default().trim().replace('\n', "; ");
    ensure!(status.success(), "runc: {}", said());
    let pid = fs::read_to_string(&pid_file).context("runc wrote no process id")?;
    pid.trim().parse().with_context(|| format!("runc wrote the process id {pid}"))
}

/// Sends a signal to a container's first process.
///
/// # Errors
///
/// runc is not installed, or refuses: it knows no such signal, or no such container.
pub fn kill(id: &str, signal: &str) -> Result<()> {
    let output = runc().args(["kill", id, signal]).stdin(Stdio::null()).output().map_err(not_installed)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "runc: {}", said.trim());
    Ok(())
}

/// Whether runc knows a container: it runs, or has ended a moment ago.
pub fn knows(id: &str) -> bool {
    Path::new(STATE).join(id).exists()
}

/// Whether runc says of a container that it has ended. What it does not answer is no such word.
pub fn has_stopped(id: &str) -> bool {
    let answer = runc().args(["state", id]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let state: Option<serde_json::Value> = answer.ok().and_then(|answer| serde_json::from_slice(&answer.stdout).ok());
    state.is_some_and(|state| state["status"] == "stopped")
}

/// Ends a container, whatever it does, and lets runc forget it.
pub fn remove(id: &str) {
    let quietly = |command: &mut Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().ok();
    };
    if knows(id) {
        quietly(runc().args(["delete", "--force", id]));
    }
}

fn pid(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

struct Forwarder {
    child: Option<Pid>,
    id: String,
    ended: Arc<AtomicBool>,
    had_terminal: bool,
}

/// Whether there is a terminal that this process belongs to.
fn has_terminal() -> bool {
    fs::File::open("/dev/tty").is_ok()
}

impl Forwarder {
    fn pass_on(&self, signal: i32) {
        let asks_to_end = match signal {
            libc::SIGINT | libc::SIGTERM => true,
            // The terminal's end. From anybody else it is a word to the container, such as to read its configuration anew.
            libc::SIGHUP => self.had_terminal && !has_terminal(),
            _ => false,
        };
        // From a terminal runc got it too, being in the foreground with us.
        let from_terminal = matches!(signal, libc::SIGINT | libc::SIGQUIT) && io::IsTerminal::is_terminal(&io::stdin());
        if !from_terminal
            && let (Some(child), Some(signal)) = (self.child, Signal::from_named_raw(signal))
            && !self.ended.load(Ordering::Acquire)
        {
            kill_process(child, signal).ok();
        }
        if asks_to_end {
            let (id, ended) = (self.id.clone(), Arc::clone(&self.ended));
            thread::spawn(move || {
                thread::sleep(PATIENCE);
                if !ended.load(Ordering::Acquire) {
                    runc().args(["kill", &id, "KILL"]).stderr(Stdio::null()).status().ok();
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::cli::run::{Network, Settings, write_bundle};

    /// A bundle whose root holds nothing but a static shell; `None`, with the reason, where that cannot be run.
    fn bundle(command: &str, network: Network) -> Option<tempfile::TempDir> {
        let shell = Path::new("/usr/bin/busybox");
        if !rustix::process::geteuid().is_root() || check().is_err() || !shell.exists() {
            io::stdout().write_all(b"skipped: needs root, runc and busybox\n").unwrap();
            return None;
        }
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(place.path().join("rootfs/bin")).unwrap();
        fs::copy(shell, place.path().join("rootfs/bin/sh")).unwrap();
        let settings = Settings {
            command: ["/bin/sh", "-c", command].map(String::from).to_vec(),
            hostname: "inside".into(),
            network,
            ..Settings::default()
        };
        write_bundle(place.path(), &settings).unwrap();
        Some(place)
    }

    fn id(test: &str) -> String {
        format!("test-{test}-{}", std::process::id())
    }

    #[test]
    fn command_runs_in_namespaces_of_its_own_and_its_exit_code_comes_back() {
        for (network, devices) in [(Network::None, "lo"), (Network::Host, "")] {
            let command = format!(
                "test $$ = 1 && test $(hostname) = inside && test $(cat /etc/hostname) = inside \
                 && grep -q inside /etc/hosts && test -e /etc/resolv.conf && test -c /dev/null && test -d /proc/1 \
                 && echo hello > /written && if test -n '{devices}'; then test \"$(ls /sys/class/net)\" = '{devices}'; fi \
                 && exit 7"
            );
            let Some(bundle) = bundle(&command, network) else { return };
            let id = id("runs");
            let status = run(bundle.path(), &id, Streams::Own, || {}).unwrap();
            assert_eq!(status.code(), Some(7), "{network:?}");
            assert_eq!(fs::read(bundle.path().join("rootfs/written")).unwrap(), b"hello\n");
            assert!(!Path::new(STATE).join(&id).exists());
        }
    }

    #[test]
    fn container_in_the_background_is_removed_whatever_it_does() {
        let Some(bundle) = bundle("trap '' TERM INT; sleep 1000", Network::None) else { return };
        let id = id("background");
        let process = run_in_background(bundle.path(), &id).unwrap();
        assert!(Path::new(&format!("/proc/{process}")).exists());
        remove(&id);
        // Gone, or waiting for its parent to notice.
        let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
        assert!(!Path::new(STATE).join(&id).exists());
    }
}

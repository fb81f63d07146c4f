//! A pool of a test's own in a folder of its own. When it is dropped, everything that stands on it is taken down:
//! what is mounted, what is attached, the daemon, the folder; also when the test has panicked.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

use super::command::{self, Outcome, binary, prepare, run, run_command, wait_until};
use super::machine::scratch;
use super::mounted::mounts_below;

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Auto,
    Uring,
    Classic,
}

impl Transport {
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Classic => "classic",
        }
    }
}

/// A pool, its folder, and the commands on it.
pub struct TestPool {
    folder: tempfile::TempDir,
    file: PathBuf,
    transport: Transport,
    /// What is run as `plywood`.
    program: PathBuf,
}

impl TestPool {
    /// A new pool in the scratch folder.
    pub fn create(size: &str, transport: Transport) -> Self {
        Self::create_in(&scratch(), size, transport)
    }

    /// A new pool in a new folder of `parent`.
    pub fn create_in(parent: &Path, size: &str, transport: Transport) -> Self {
        let folder = new_folder(parent);
        let file = folder.path().join("pool");
        Self::create_at(folder, file, size, transport)
    }

    /// A new pool on a block device.
    pub fn create_on(device: &Path, size: &str, transport: Transport) -> Self {
        Self::create_at(new_folder(&scratch()), device.to_owned(), size, transport)
    }

    /// The pool in `file`, which somebody else has made.
    pub fn adopt(file: &Path) -> Self {
        Self { folder: new_folder(&scratch()), file: file.to_owned(), transport: Transport::Auto, program: binary() }
    }

    fn create_at(folder: tempfile::TempDir, file: PathBuf, size: &str, transport: Transport) -> Self {
        // The name is the folder's: names of pools in use are of the whole machine.
        let name = folder.path().file_name().expect("a name").to_string_lossy().into_owned();
        let pool = Self { folder, file, transport, program: binary() };
        let file = pool.file.clone().into_os_string();
        pool.plywood([
            "pool".into(),
            "create".into(),
            file,
            "--size".into(),
            size.into(),
            "--name".into(),
            name.into(),
        ])
        .expect();
        pool
    }

    /// From now on runs another program, which starts the daemon, too.
    pub fn use_program(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A new empty folder to mount on.
    pub fn mount_point(&self, name: &str) -> PathBuf {
        let point = self.folder.path().join("mounts").join(name);
        fs::create_dir_all(&point).expect("a mount point");
        point
    }

    /// Runs `plywood` on this pool.
    #[track_caller]
    pub fn plywood<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Outcome {
        run_command(self.prepare(arguments))
    }

    /// The same, not started yet.
    pub fn prepare<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> std::process::Command {
        let mut command = prepare(&self.program.to_string_lossy(), arguments);
        command.env("PLYWOOD_POOL", &self.file).env("PLYWOOD_TRANSPORT", self.transport.name());
        command
    }

    /// Runs `plywood` with the words of `line`.
    ///
    /// # Panics
    /// When it does not succeed.
    #[track_caller]
    pub fn done(&self, line: &str) -> String {
        self.plywood(line.split_whitespace()).expect()
    }

    /// Runs `plywood` with the words of `line`, which it must refuse with exit status 1 and one line that has all of
    /// `named`.
    #[track_caller]
    pub fn refused(&self, line: &str, named: &[&str]) -> String {
        self.plywood(line.split_whitespace()).expect_refusal(named)
    }

    /// What `plywood LINE --json` prints under `key`.
    #[track_caller]
    pub fn json(&self, line: &str, key: &str) -> Value {
        let text = self.done(&format!("{line} --json"));
        let value: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("`{line} --json`: {error}: {text}"));
        assert!(value["version"].is_u64(), "`{line} --json` has no version: {text}");
        assert!(!value[key].is_null(), "`{line} --json` has no {key}: {text}");
        value[key].clone()
    }

    #[track_caller]
    pub fn info(&self) -> Value {
        self.json("pool info", "pool")
    }

    #[track_caller]
    pub fn volume(&self, name: &str) -> Value {
        self.json(&format!("volume info {name}"), "volume")
    }

    /// Names of all volumes and snapshots.
    #[track_caller]
    pub fn names(&self) -> Vec<String> {
        let listed = self.json("volume list --all", "volumes");
        let names = listed.as_array().expect("a list").iter();
        let mut names: Vec<String> = names.map(|volume| volume["name"].as_str().expect("a name").to_owned()).collect();
        names.sort();
        names
    }

    /// Attaches and returns the device.
    #[track_caller]
    pub fn attach(&self, name: &str) -> String {
        let device = self.done(&format!("attach {name}"));
        assert!(device.starts_with("/dev/loop"), "attach printed {device:?}");
        device
    }

    /// Mounts on a folder of this pool's and returns it.
    #[track_caller]
    pub fn mount(&self, name: &str) -> PathBuf {
        let point = self.mount_point(name);
        self.plywood(["mount".into(), name.into(), point.clone().into_os_string()] as [OsString; 3]).expect();
        point
    }

    #[track_caller]
    pub fn unmount(&self, point: &Path) {
        self.plywood(["unmount".into(), point.as_os_str().to_owned()]).expect();
    }

    /// The process id under `key` of `pool info`, when a daemon runs.
    pub fn process(&self, key: &str) -> Option<u32> {
        let outcome = self.plywood(["pool", "info", "--json"]);
        let value: Value = serde_json::from_str(&outcome.stdout).ok()?;
        value["pool"][key].as_u64().map(|id| id as u32)
    }

    /// Kills the engine process (-9) and waits until another has taken over.
    pub fn kill_engine(&self) {
        let old = self.process("engine_pid").expect("an engine process");
        run("kill", ["-9".to_owned(), old.to_string()]).expect();
        wait_until("a new engine process", Duration::from_secs(60), || {
            self.process("engine_pid").is_some_and(|id| id != old)
        });
    }

    /// Stops the daemon and waits for its end.
    #[track_caller]
    pub fn stop(&self) {
        let front = self.process("front_pid");
        self.done("stop");
        if let Some(front) = front {
            wait_until("the end of the front", Duration::from_secs(60), || !is_alive(front));
        }
    }

    /// The same, when a daemon runs at all.
    #[track_caller]
    pub fn stop_if_running(&self) {
        if let Some(front) = self.process("front_pid") {
            let _ = self.plywood(["stop"]);
            wait_until("the end of the front", Duration::from_secs(60), || !is_alive(front));
        }
    }

    /// Checks the whole pool.
    #[track_caller]
    pub fn check(&self) {
        self.done("pool check");
    }

    /// Bytes that the pool file takes on the host.
    pub fn host_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(&self.file).expect("the pool file").blocks() * 512
    }
}

fn new_folder(parent: &Path) -> tempfile::TempDir {
    tempfile::Builder::new().prefix("plywood-test-").tempdir_in(parent).expect("a folder")
}

impl Drop for TestPool {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell_state();
        }
        let front = self.process("front_pid");
        for point in mounts_below(self.folder.path()) {
            let ended = command::run("umount", [point.as_os_str()]).succeeded();
            if !ended {
                let _ = command::run("umount", ["-l".as_ref(), point.as_os_str()]);
            }
        }
        let _ = self.plywood(["detach", "--all"]);
        let _ = self.plywood(["stop"]);
        if let Some(front) = front {
            for _ in 0..200 {
                if !is_alive(front) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            if is_alive(front) {
                println!("the front {front} does not end by itself; killing it");
                let _ = command::run("kill", ["-9".to_owned(), front.to_string()]);
            }
        }
        if !std::thread::panicking() {
            let _ = fs::remove_file(self.log());
        }
    }
}

impl TestPool {
    /// The daemon's log, by the pool's name, which is the folder's.
    pub fn log(&self) -> PathBuf {
        Path::new("/var/log/plywood").join(self.folder.path().file_name().expect("a name")).with_extension("log")
    }

    /// For the message of a failed test: the end of the daemon's log, and what the kernel said.
    fn tell_state(&self) {
        for line in [format!("tail -n 40 {}", self.log().display()), "dmesg | tail -n 15".to_owned()] {
            let outcome = command::shell(&line);
            println!("--- {line}\n{}{}", outcome.stdout, outcome.stderr);
        }
    }
}

/// Whether a process lives. A zombie has ended; whoever started it has not looked yet. One whose first thread alone has
/// ended has not: the others still hold what it has open.
pub fn is_alive(process: u32) -> bool {
    let process = Pid::from_raw(process.try_into().expect("a process id")).expect("a process id");
    match pidfd_open(process, PidfdFlags::empty()) {
        Ok(descriptor) => {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&now)).expect("poll") == 0
        }
        // One reaped meanwhile is an invalid argument before Linux 6.16, no such entry since.
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => false,
        Err(error) => panic!("process {process:?}: {error}"),
    }
}

/// Living children of a process that have `word` among their arguments: those of a front that are engines, and others.
pub fn children(process: u32, word: &str) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it lives");
    let lines = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let ids: Vec<u32> =
        lines.flat_map(|line| line.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    ids.into_iter()
        .filter(|id| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|found| found == word.as_bytes())
        })
        .collect()
}

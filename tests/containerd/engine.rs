//! A containerd of a test's own: its root, state and socket in the pool's folder, and our snapshotter in its configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::command::{Background, Outcome, prepare, run, run_command, wait_until};
use crate::support::mounted::mounts_below;
use crate::support::pool::TestPool;

/// It is killed when this is dropped, and what its containers have left is unmounted.
pub struct Engine {
    process: Option<Background>,
    folder: PathBuf,
}

impl Engine {
    #[track_caller]
    pub fn start(pool: &TestPool, snapshotter: &Path) -> Self {
        Self::configured(pool, snapshotter, &["io.containerd.grpc.v1.cri"], "")
    }

    /// One that a kubelet could talk to, whose images are unpacked by our snapshotter.
    #[track_caller]
    pub fn start_for_kubelets(pool: &TestPool, snapshotter: &Path) -> Self {
        let folder = pool.folder().join("cni");
        let shown = folder.display();
        let kubelets = format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\n  stream_server_address = \"127.0.0.1\"\n  stream_server_port = \"0\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"plywood\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"{shown}\"\n  conf_dir = \"{shown}\"\n"
        );
        Self::configured(pool, snapshotter, &[], &kubelets)
    }

    #[track_caller]
    fn configured(pool: &TestPool, snapshotter: &Path, without: &[&str], more: &str) -> Self {
        let folder = pool.folder().join("containerd");
        fs::create_dir_all(&folder).expect("a folder");
        let shown = folder.display();
        let mut disabled = vec![
            "io.containerd.internal.v1.opt",
            "io.containerd.snapshotter.v1.btrfs",
            "io.containerd.snapshotter.v1.zfs",
            "io.containerd.snapshotter.v1.devmapper",
            "io.containerd.snapshotter.v1.aufs",
        ];
        disabled.extend(without);
        let configuration = format!(
            "version = 2\nroot = \"{shown}/root\"\nstate = \"{shown}/state\"\n\
             disabled_plugins = {disabled:?}\n\
             [grpc]\n  address = \"{shown}/sock\"\n\
             [proxy_plugins.plywood]\n  type = \"snapshot\"\n  address = \"{}\"\n\
             # On a slow disk a shim is not dead after the five seconds that are meant for one.\n\
             [timeouts]\n  \"io.containerd.timeout.shim.load\" = \"60s\"\n  \"io.containerd.timeout.shim.cleanup\" = \"60s\"\n  \
             \"io.containerd.timeout.shim.shutdown\" = \"60s\"\n  \"io.containerd.timeout.task.state\" = \"60s\"\n{more}",
            snapshotter.display()
        );
        fs::write(folder.join("config.toml"), configuration).expect("a file");
        let mut engine = Self { process: None, folder };
        engine.restart();
        engine
    }

    /// Kills it (-9) if it runs, and starts it again.
    #[track_caller]
    pub fn restart(&mut self) {
        self.process = None;
        let configuration = self.folder.join("config.toml");
        let log = self.folder.join("log").to_string_lossy().into_owned();
        // Its log would fill a pipe that nobody reads.
        let line = format!("exec containerd --config '{}' >>'{log}' 2>&1", configuration.display());
        self.process = Some(Background::start("sh", ["-c".to_owned(), line]));
        wait_until("containerd", Duration::from_secs(60), || self.ctr("version").succeeded());
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("sock")
    }

    /// Kills it (-9). What its clients are told is that nobody is there.
    #[track_caller]
    pub fn kill(&self) {
        let process = self.process.as_ref().expect("running").id();
        kill_process(Pid::from_raw(process as i32).expect("a process id"), Signal::KILL).expect("it lives");
    }

    /// Whether a layer is mounted to be unpacked, by itself or by one that has died.
    pub fn is_unpacking(&self) -> bool {
        !mounts_below(&self.folder.join("root/tmpmounts")).is_empty()
    }

    /// Runs `ctr` with the words of `line`.
    #[track_caller]
    pub fn ctr(&self, line: &str) -> Outcome {
        self.ctr_with(line, &[])
    }

    /// The same, with further arguments that are not split.
    #[track_caller]
    pub fn ctr_with(&self, line: &str, more: &[&str]) -> Outcome {
        let socket = self.socket().to_string_lossy().into_owned();
        let words = line.split_whitespace().chain(more.iter().copied());
        let arguments = ["--address".to_owned(), socket].into_iter().chain(words.map(str::to_owned));
        run_command(prepare("ctr", arguments))
    }

    /// The end of its log, for the message of a failed test.
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- containerd's log\n{}", self.log());
        }
        for namespace in ["default", "other"] {
            let tasks = self.ctr(&format!("--namespace {namespace} task ls -q")).stdout;
            for task in tasks.split_whitespace() {
                let _ = self.ctr(&format!("--namespace {namespace} task rm -f {task}"));
            }
        }
        self.process = None;
        for point in mounts_below(&self.folder) {
            let _ = run("umount", ["-l".as_ref(), point.as_os_str()]);
        }
    }
}

//! What this machine can do, and the reasons why a device test cannot run on it.

use std::fs;
use std::path::{Path, PathBuf};

use super::command::run;

/// What a device test needs beyond root, FUSE and loop devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// FUSE over io_uring in the kernel.
    FuseUring,
    /// A program.
    Program(&'static str),
    /// A file system that the kernel mounts.
    FileSystem(&'static str),
    /// A kernel of this version at least.
    Linux(u32, u32),
}

/// Why a test does not run.
#[derive(Clone, Debug)]
pub struct Skip {
    pub reason: String,
    /// Whether the kernel lacks it, so that no set-up of this machine could help.
    pub excusable: bool,
}

impl Skip {
    fn machine(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), excusable: false }
    }

    fn kernel(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), excusable: true }
    }
}

/// The first of `needs`, or of what every device test needs, that this machine does not have.
pub fn missing(needs: &[Need]) -> Option<Skip> {
    if !rustix::process::geteuid().is_root() {
        return Some(Skip::machine("not root"));
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            return Some(Skip::machine(format!("no {device}")));
        }
    }
    needs.iter().find_map(|need| lacks(*need))
}

fn lacks(need: Need) -> Option<Skip> {
    match need {
        Need::FuseUring => (!Path::new("/sys/module/fuse/parameters/enable_uring").exists())
            .then(|| Skip::kernel("this kernel has no FUSE over io_uring (6.14)")),
        Need::Program(program) => (!in_path(program)).then(|| Skip::machine(format!("no {program} on PATH"))),
        Need::Linux(major, minor) => {
            let release = rustix::system::uname().release().to_string_lossy().into_owned();
            let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
            let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
            (version < (major, minor)).then(|| Skip::kernel(format!("Linux {release} is older than {major}.{minor}")))
        }
        Need::FileSystem(name) => {
            let _ = run("modprobe", ["-q", name]);
            let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
            (!known.split_whitespace().any(|word| word == name))
                .then(|| Skip::kernel(format!("this kernel has no {name}")))
        }
    }
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// A folder for pools on a real file system: `TMPDIR`, or /var/tmp, because /tmp may be memory.
pub fn scratch() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// A Debian root file system as a tar: `PLYWOOD_TEST_ROOTFS`, or made by mmdebstrap once and kept in target/.
pub fn rootfs() -> PathBuf {
    if let Some(path) = std::env::var_os("PLYWOOD_TEST_ROOTFS") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("target/test-rootfs.tar");
    run("bash", [root.join("tools/test-rootfs"), path.clone()]).expect();
    path
}

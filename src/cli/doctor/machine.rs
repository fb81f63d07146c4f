//! What plywood needs of the machine: the kernel, its modules and switches, limits, and programs.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::Finding;

/// The oldest kernel that the tests run on.
const TESTED: (u32, u32) = (6, 1);
/// The oldest kernel with FUSE over io_uring.
const FUSE_URING: (u32, u32) = (6, 14);
/// What a daemon keeps in memory for sure.
const LOCKED_BYTES: u64 = 256 << 20;

/// Looks at all of it.
pub(super) fn look() -> Vec<Finding> {
    let release = release();
    let version = version_of(&release);
    let mut findings = vec![kernel(&release, version), fuse(), fuse_uring(version)];
    findings.extend(loop_devices());
    findings.extend([io_uring(), locked_memory()]);
    findings.extend(programs());
    findings
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Major and minor number of the kernel that runs; none when they are not understood.
pub fn linux_version() -> Option<(u32, u32)> {
    version_of(&release())
}

/// Major and minor number of a kernel's release, as `6.18.3-amd64`.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(release: &str, version: Option<(u32, u32)>) -> Finding {
    match version {
        Some(version) if version >= TESTED => Finding::ok("kernel", release),
        Some(_) => {
            let (major, minor) = TESTED;
            Finding::warning("kernel", release, format!("plywood is tested on {major}.{minor} and newer"))
        }
        None => Finding::warning("kernel", release, "its version is not understood"),
    }
}

fn fuse() -> Finding {
    if Path::new("/dev/fuse").exists() {
        return Finding::ok("fuse", "/dev/fuse is there");
    }
    Finding::bad("fuse", "/dev/fuse is missing", "modprobe fuse, or give the container the device")
}

fn fuse_uring(version: Option<(u32, u32)>) -> Finding {
    let what = "fuse over io_uring";
    match fs::read_to_string("/sys/module/fuse/parameters/enable_uring") {
        Ok(value) if value.trim() == "Y" => Finding::ok(what, "switched on"),
        Ok(_) => Finding::ok(what, "there; a daemon switches it on while it starts"),
        Err(_) if version.is_some_and(|version| version >= FUSE_URING) && !Path::new("/sys/module/fuse").exists() => {
            Finding::warning(what, "the module is not loaded", "modprobe fuse")
        }
        Err(_) => Finding::warning(
            what,
            "this kernel has none",
            "the classic transport is used, which is slower; Linux 6.14 has it",
        ),
    }
}

fn loop_devices() -> Vec<Finding> {
    let mut findings = Vec::new();
    if Path::new("/dev/loop-control").exists() {
        findings.push(Finding::ok("loop", "/dev/loop-control is there"));
    } else {
        let advice = "modprobe loop, or give the container the device";
        findings.push(Finding::bad("loop", "/dev/loop-control is missing", advice));
    }
    let most = fs::read_to_string("/sys/module/loop/parameters/max_loop").ok();
    let most: u64 = most.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let used = entries.filter(|entry| entry.path().join("loop/backing_file").exists()).count() as u64;
    findings.push(loop_count(used, most));
    findings
}

/// `max_loop` is the number of devices made at the start; since Linux 3.1 others are made when they are asked for.
fn loop_count(used: u64, most: u64) -> Finding {
    let made = if most == 0 { String::new() } else { format!(", {most} made beforehand") };
    Finding::ok("loop devices", format!("{used} in use{made}; more are made when they are needed"))
}

fn io_uring() -> Finding {
    let what = "io_uring";
    // Linux 6.6; before that there is no such switch.
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default().trim() {
        "" | "0" => Finding::ok(what, "not disabled"),
        "1" if rustix::process::geteuid().is_root() => Finding::ok(what, "disabled for users without privilege only"),
        "1" => Finding::warning(what, "disabled for users without privilege", "run plywood as root"),
        _ => Finding::bad(what, "disabled", "sysctl kernel.io_uring_disabled=0"),
    }
}

fn locked_memory() -> Finding {
    let what = "locked memory";
    let limit = getrlimit(Resource::Memlock).current;
    match limit {
        _ if rustix::process::geteuid().is_root() => Finding::ok(what, "no limit for root"),
        None => Finding::ok(what, "no limit"),
        Some(bytes) if bytes >= LOCKED_BYTES => Finding::ok(what, crate::cli::size::show(bytes)),
        Some(bytes) => {
            let advice = "a daemon wants to stay in memory: run it as root, or raise LimitMEMLOCK";
            Finding::warning(what, format!("at most {}", crate::cli::size::show(bytes)), advice)
        }
    }
}

/// Programs that some commands start.
fn programs() -> Vec<Finding> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |name: &str| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(name).is_file())
    };
    let wanted = [
        ("mkfs.ext4", "plywood image import makes file systems with it"),
        ("runc", "plywood run starts containers with it"),
    ];
    wanted
        .into_iter()
        .map(|(name, why)| match has(name) {
            true => Finding::ok(name, "installed"),
            false => Finding::warning(name, "not installed", why),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn kernel_releases_are_understood() {
        for (release, version) in [
            ("6.18.3-amd64", Some((6, 18))),
            ("6.1.0", Some((6, 1))),
            ("5.10-rc1", Some((5, 10))),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(version_of(release), version, "{release}");
        }
        assert_eq!(kernel("6.1.0-30-amd64", Some((6, 1))).verdict, Verdict::Ok);
        assert_eq!(kernel("5.15.0", Some((5, 15))).verdict, Verdict::Warning);
    }
}

//! Who uses a loop device: mounts in any namespace, and processes that have it open.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One use of a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Mounted.
    Mounted {
        /// Where, as the process sees it.
        directory: String,
        /// A process in the mount's namespace.
        pid: u32,
        /// Its name.
        command: String,
    },
    /// Open in a process.
    Open {
        /// The process.
        pid: u32,
        /// Its name.
        command: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { directory, pid, command } => {
                write!(f, "mounted on {directory} (as process {pid}, {command}, sees it)")
            }
            Self::Open { pid, command } => write!(f, "open in process {pid} ({command})"),
        }
    }
}

/// All users of loop device `number`, each mount point once for each namespace.
pub fn users(number: u32) -> Vec<Use> {
    let device = format!("/dev/loop{number}");
    let mut found = BTreeSet::new();
    let mut namespaces = BTreeSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let own = std::process::id();
    // Our own namespace is described by our own process: it is the one that the reader knows.
    let mut pids: Vec<u32> = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_by_key(|&pid| (pid != own, pid));
    for pid in pids {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let command = || fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
        let namespace = fs::metadata(process.join("ns/mnt")).map(|namespace| namespace.ino());
        if let Ok(namespace) = namespace
            && namespaces.insert(namespace)
        {
            let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
            for directory in mounts_of(&mounts, number, &device) {
                found.insert(Use::Mounted { directory, pid, command: command() });
            }
        }
        if pid != own && has_open(&process, &device) {
            found.insert(Use::Open { pid, command: command() });
        }
    }
    found.into_iter().collect()
}

fn has_open(process: &Path, device: &str) -> bool {
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target.as_os_str() == device)
}

/// Mount points of a device in a mountinfo. File systems with device numbers of their own, as btrfs, show it as the
/// mount's source only.
fn mounts_of(mountinfo: &str, number: u32, device: &str) -> Vec<String> {
    let device_number = format!("7:{number}");
    let mount = |line: &str| {
        // 36 35 98:0 /root /mount/point options [tags] - type source super-options
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(2);
        let (major_minor, _root, directory) = (before.next()?, before.next()?, before.next()?);
        let source = after.split(' ').nth(1)?;
        (major_minor == device_number || source == device).then(|| unescaped(directory))
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if byte == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 7:3 / /mnt/with\\040space rw - ext4 /dev/loop3 rw
41 22 7:31 / /mnt/other rw - ext4 /dev/loop31 rw
42 22 0:50 /@ /mnt/btrfs rw master:2 - btrfs /dev/loop3 rw,space_cache
garbage
";

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        assert_eq!(mounts_of(MOUNTINFO, 3, "/dev/loop3"), ["/mnt/with space", "/mnt/btrfs"]);
        assert!(mounts_of(MOUNTINFO, 4, "/dev/loop4").is_empty());
    }

    #[test]
    fn escapes_are_undone_and_other_backslashes_kept() {
        assert_eq!(unescaped("a\\011b\\134c\\9d\\"), "a\tb\\c\\9d\\");
    }
}

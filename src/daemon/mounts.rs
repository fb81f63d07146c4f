//! Where a block device is mounted, and who holds it: read from `/proc`, in all mount namespaces.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A line of a process's `mountinfo`, as `proc(5)` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of what is mounted.
    pub device: (u32, u32),
    /// Where, as the process sees it.
    pub mount_point: PathBuf,
    /// Type of the file system.
    pub file_system: String,
    /// What was given as source.
    pub source: PathBuf,
}

impl Mount {
    /// Whether it is the block device at `path` with this number that is mounted. The source counts too: btrfs shows a
    /// number of its own.
    pub fn is_of(&self, path: &Path, number: (u32, u32)) -> bool {
        self.device == number || self.source == path
    }
}

/// The mounts that this process sees, in the order of mounting.
///
/// # Errors
/// When `/proc` is not there.
pub fn own_mounts() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Splits `mountinfo`. A line that does not look like one is left out.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mount_point = path(fields.nth(1)?);
    // A variable number of optional fields stands before a lone hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let file_system = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = path(fields.next()?);
    Some(Mount { device: (major.parse().ok()?, minor.parse().ok()?), mount_point, file_system, source })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\').then(|| after.get(..3)).flatten();
        let escaped = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        if let Some(byte) = escaped {
            bytes.push(byte);
            rest = &after[3..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Major and minor number of the block device at `path`.
///
/// # Errors
/// When it is not there or no block device.
pub fn device_number(path: &Path) -> io::Result<(u32, u32)> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = fs::metadata(path)?;
    if !metadata.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a block device"));
    }
    Ok((rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())))
}

/// One use of a block device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The process that was met first with it.
    pub process: u32,
    /// Its command name.
    pub command: String,
    /// The mount point; none when the process has the device itself open.
    pub mount_point: Option<PathBuf>,
    /// Whether the process lives in another mount namespace than the first one met on this machine.
    pub other_namespace: bool,
}

impl std::fmt::Display for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { process, command, .. } = self;
        match &self.mount_point {
            Some(point) if self.other_namespace => {
                write!(f, "mounted on {} in the mount namespace of process {process} ({command})", point.display())
            }
            Some(point) => write!(f, "mounted on {}", point.display()),
            None => write!(f, "open in process {process} ({command})"),
        }
    }
}

/// Who uses the block device at `path`: mounts in every mount namespace, and open descriptors. `except` are processes that
/// do not count (our own). Processes that end meanwhile are skipped. A device that is not there has no users.
pub fn users(path: &Path, except: &[u32]) -> Vec<Use> {
    let mut found = Vec::new();
    let Ok(device) = device_number(path) else { return found };
    let mut namespaces = BTreeSet::new();
    let home = fs::read_link("/proc/1/ns/mnt").ok();
    for process in processes() {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let command = fs::read_to_string(folder.join("comm")).unwrap_or_default().trim().to_owned();
        let namespace = fs::read_link(folder.join("ns/mnt")).ok();
        if namespace.is_some() && namespaces.insert(namespace.clone()) {
            let mounts = fs::read(folder.join("mountinfo")).map(|text| parse(&text)).unwrap_or_default();
            let points = mounts.into_iter().filter(|mount| mount.is_of(path, device)).map(|mount| mount.mount_point);
            found.extend(points.map(|point| Use {
                process,
                command: command.clone(),
                mount_point: Some(point),
                other_namespace: namespace != home,
            }));
        }
        if !except.contains(&process) && holds_open(&folder, device) {
            found.push(Use { process, command, mount_point: None, other_namespace: namespace != home });
        }
    }
    found
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers.into_iter()
}

fn holds_open(folder: &Path, device: (u32, u32)) -> bool {
    let entries = fs::read_dir(folder.join("fd")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|link| {
        // Only device files are worth a stat: it would wait for a dead network file system.
        fs::read_link(&link).is_ok_and(|target| target.starts_with("/dev"))
            && device_number(&link).is_ok_and(|number| number == device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_line_with_escapes_and_optional_fields_is_split() {
        let text =
            b"36 35 98:0 /mnt1 /mnt/with\\040space rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
                     22 27 0:21 / /proc rw - proc proc rw\nnonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].device, (98, 0));
        assert_eq!(mounts[0].mount_point, Path::new("/mnt/with space"));
        assert_eq!(mounts[0].file_system, "ext3");
        assert_eq!(mounts[0].source, Path::new("/dev/root"));
        assert_eq!(mounts[1].mount_point, Path::new("/proc"));
    }

    #[test]
    fn own_root_is_among_the_mounts() {
        assert!(own_mounts().unwrap().iter().any(|mount| mount.mount_point == Path::new("/")));
    }

    #[test]
    fn damaged_escape_is_kept_as_it_is() {
        assert_eq!(path(b"a\\04"), Path::new("a\\04"));
        assert_eq!(path(b"\\999"), Path::new("\\999"));
    }
}

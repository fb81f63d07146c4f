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

/// Where this process sees a block device mounted first. None: nowhere.
///
/// # Errors
/// What the host says of the device, and when `/proc` is not there.
pub fn mount_of(device: &Path) -> io::Result<Option<Mount>> {
    let number = device_number(device)?;
    Ok(own_mounts()?.into_iter().find(|mount| mount.is_of(device, number)))
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
pub enum Use {
    /// It is mounted.
    Mounted {
        /// Where, as the processes of that namespace see it.
        directory: PathBuf,
        /// A process of that mount namespace, with its command name, when the namespace is not the machine's first.
        elsewhere: Option<(u32, String)>,
        /// Processes that work in it: current directory, root, program or an open file.
        workers: Vec<(u32, String)>,
    },
    /// A process has the device itself open.
    Open(u32, String),
}

impl std::fmt::Display for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open(process, command) => write!(f, "open in process {process} ({command})"),
            Self::Mounted { directory, elsewhere, workers } => {
                write!(f, "mounted on {}", directory.display())?;
                if let Some((process, command)) = elsewhere {
                    write!(f, " in the mount namespace of process {process} ({command})")?;
                }
                for (index, (process, command)) in workers.iter().take(WORKERS_NAMED).enumerate() {
                    let before = if index == 0 { ", used by process" } else { "," };
                    write!(f, "{before} {process} ({command})")?;
                }
                match workers.len().saturating_sub(WORKERS_NAMED) {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
        }
    }
}

/// Processes named in a message; the rest is counted.
const WORKERS_NAMED: usize = 5;

/// Who uses the block device at `path`: mounts in every mount namespace, and open descriptors. `except` are processes that
/// do not count (our own). Processes that end meanwhile are skipped. A device that is not there has no users.
pub fn users(path: &Path, except: &[u32]) -> Vec<Use> {
    let Ok(device) = device_number(path) else { return Vec::new() };
    // That of the first process; a sandbox may hide process 1 itself.
    let home = processes().find_map(|process| fs::read_link(format!("/proc/{process}/ns/mnt")).ok());
    let mut mounted: Vec<(PathBuf, Use)> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for process in processes().filter(|process| !except.contains(process)) {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let command = fs::read_to_string(folder.join("comm")).unwrap_or_default().trim().to_owned();
        let Ok(namespace) = fs::read_link(folder.join("ns/mnt")) else { continue };
        if seen.insert(namespace.clone()) {
            let mounts = fs::read(folder.join("mountinfo")).map(|text| parse(&text)).unwrap_or_default();
            for Mount { mount_point: directory, .. } in mounts.into_iter().filter(|mount| mount.is_of(path, device)) {
                let elsewhere = (Some(&namespace) != home.as_ref()).then(|| (process, command.clone()));
                mounted.push((namespace.clone(), Use::Mounted { directory, elsewhere, workers: Vec::new() }));
            }
        }
        let links = links_of(&folder);
        if links.iter().any(|link| link == path) {
            found.push(Use::Open(process, command.clone()));
        }
        for (_, used) in mounted.iter_mut().filter(|(of, _)| *of == namespace) {
            if let Use::Mounted { directory, workers, .. } = used
                && links.iter().any(|link| link.starts_with(&directory))
            {
                workers.push((process, command.clone()));
            }
        }
    }
    mounted.into_iter().map(|(_, used)| used).chain(found).collect()
}

/// Where a process is, and what it has open, as paths. Links are read and never followed: a stat would wait for a file
/// system that does not answer.
fn links_of(folder: &Path) -> Vec<PathBuf> {
    let places = ["cwd", "root", "exe"].map(|name| folder.join(name));
    let descriptors = fs::read_dir(folder.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    places.into_iter().chain(descriptors).filter_map(|link| fs::read_link(link).ok()).collect()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers.into_iter()
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
    fn words_name_the_place_the_namespace_and_a_few_workers() {
        let workers = (1..=7).map(|process| (process, "sh".to_owned())).collect();
        let used = Use::Mounted { directory: "/mnt".into(), elsewhere: Some((9, "bash".into())), workers };
        assert_eq!(
            used.to_string(),
            "mounted on /mnt in the mount namespace of process 9 (bash), used by process 1 (sh), 2 (sh), 3 (sh), 4 (sh), \
             5 (sh) and 2 more"
        );
        assert_eq!(Use::Open(3, "fio".into()).to_string(), "open in process 3 (fio)");
    }

    #[test]
    fn damaged_escape_is_kept_as_it_is() {
        assert_eq!(path(b"a\\04"), Path::new("a\\04"));
        assert_eq!(path(b"\\999"), Path::new("\\999"));
    }
}

//! A directory of the host as a layer: a copy with owners, modes, times, attributes, devices and hard links.
//!
//! Stays on the directory's own file system, as `cp -x` does: a root file system's `/proc` and its like are left out,
//! their empty mount points are not.

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use walkdir::WalkDir;

use super::apply::{Applier, Summary, Whiteouts};
use super::archive::{Entry, Kind, Time};
use super::stream::{Interrupt, interrupted};

/// Copies `from` into the directory `root`. `progress` counts the bytes of content.
///
/// # Errors
///
/// Something cannot be read, or the file system at `root` refuses it.
pub fn copy_directory(root: OwnedFd, from: &Path, progress: &ProgressBar, interrupt: &Interrupt) -> Result<Summary> {
    let mut applier = Applier::new(root, Whiteouts::Literal);
    let mut linked: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    for found in walk(from) {
        let found = found?;
        let metadata = found.metadata()?;
        let name = found.path().strip_prefix(from)?.as_os_str().as_bytes().to_vec();
        let shown = || found.path().display().to_string();
        let Some(kind) = kind(&metadata) else { continue };
        let mut entry = describe(name, kind, &metadata);
        if kind == Kind::Symlink {
            entry.link = std::fs::read_link(found.path()).with_context(shown)?.into_os_string().into_vec();
        }
        if kind != Kind::Directory && metadata.nlink() > 1 {
            let file = (metadata.dev(), metadata.ino());
            if let Some(first) = linked.get(&file) {
                (entry.kind, entry.link) = (Kind::HardLink, first.clone());
            } else {
                linked.insert(file, entry.path.clone());
            }
        }
        if entry.kind != Kind::HardLink {
            for attribute in xattr::list(found.path()).into_iter().flatten() {
                if let Some(value) = xattr::get(found.path(), &attribute).with_context(shown)? {
                    entry.xattrs.push((attribute.as_bytes().to_vec(), value));
                }
            }
        }
        let content: Option<File> = match entry.kind {
            Kind::File => {
                let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
                Some(OpenOptions::new().read(true).custom_flags(flags).open(found.path()).with_context(shown)?)
            }
            _ => None,
        };
        let mut content = Watched { content, progress, interrupt };
        content.check()?;
        applier.apply(&entry, &mut content).with_context(|| format!("cannot copy {}", shown()))?;
    }
    applier.finish()
}

/// Bytes of content that [`copy_directory`] will count.
///
/// # Errors
///
/// A directory cannot be read.
pub fn content_bytes(from: &Path) -> Result<u64> {
    let mut total = 0;
    for found in walk(from) {
        let metadata = found?.metadata()?;
        if metadata.is_file() {
            total += metadata.len();
        }
    }
    Ok(total)
}

fn walk(from: &Path) -> walkdir::IntoIter {
    WalkDir::new(from).min_depth(1).same_file_system(true).sort_by_file_name().into_iter()
}

/// `None` for a socket, which no archive holds either.
fn kind(metadata: &Metadata) -> Option<Kind> {
    let kind = metadata.file_type();
    Some(match () {
        () if kind.is_file() => Kind::File,
        () if kind.is_dir() => Kind::Directory,
        () if kind.is_symlink() => Kind::Symlink,
        () if kind.is_char_device() => Kind::Character,
        () if kind.is_block_device() => Kind::Block,
        () if kind.is_fifo() => Kind::Fifo,
        () => return None,
    })
}

fn describe(path: Vec<u8>, kind: Kind, metadata: &Metadata) -> Entry {
    Entry {
        path,
        link: Vec::new(),
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified: Time { seconds: metadata.mtime(), nanoseconds: metadata.mtime_nsec() },
        accessed: Some(Time { seconds: metadata.atime(), nanoseconds: metadata.atime_nsec() }),
        xattrs: Vec::new(),
        device: (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
        size_bytes: if kind == Kind::File { metadata.len() } else { 0 },
    }
}

/// The content of a file, or of what has none, as it is read for a layer.
pub(super) struct Watched<'a> {
    pub(super) content: Option<File>,
    pub(super) progress: &'a ProgressBar,
    pub(super) interrupt: &'a Interrupt,
}

impl Watched<'_> {
    fn check(&self) -> io::Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(interrupted()) } else { Ok(()) }
    }
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        let Some(content) = &mut self.content else { return Ok(0) };
        let count = content.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "became shorter while it was read"));
        }
        self.progress.inc(count as u64);
        Ok(count)
    }
}

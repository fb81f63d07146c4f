//! A directory that names from an archive are resolved in, and never out of.
//!
//! Every path is resolved by the kernel (`openat2`, Linux 5.6) with the tree's root as the boundary, to a descriptor of
//! its parent directory; all work is then done on that descriptor and one last name, which is never followed. A name
//! that an archive turns into a symbolic link between two of its entries therefore leads nowhere else.
//!
//! Links are followed as a program inside the tree would see them (`bin -> usr/bin`, `run -> /run`), except where one
//! climbs above the root: inside, `..` of the root is the root, so nothing could escape, but no honest archive says it.

use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// Most symbolic links that one name may lead through; the kernel's own bound.
const LINKS_LIMIT: usize = 40;
const WALK: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// What an entry's name says, `.`, `..` and doubled slashes worked out: names from the root downwards. Empty is the
/// root itself.
///
/// # Errors
///
/// The name climbs out of the root, or holds a byte 0.
pub fn components(path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut components: Vec<Vec<u8>> = Vec::new();
    ensure!(!path.contains(&0), "{}: name holds a byte 0", show(path));
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                ensure!(components.pop().is_some(), "{}: name climbs out of the root", show(path));
            }
            name => components.push(name.to_vec()),
        }
    }
    Ok(components)
}

/// A name for messages: bytes that are not UTF-8 are replaced.
pub fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).escape_debug().to_string()
}

/// What to do about directories that are not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Answer `None`.
    Leave,
    /// Make them, mode 0755.
    Create,
}

/// A directory tree, by a descriptor of its root.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// The tree below `root`, which is a directory.
    pub const fn new(root: OwnedFd) -> Self {
        Self { root }
    }

    /// Opens (O_PATH) the directory that `components` lead to.
    ///
    /// # Errors
    ///
    /// A component is no directory, a link leads nowhere or climbs out of the root, or the host refuses.
    pub fn open_directory(&self, components: &[Vec<u8>], missing: Missing) -> Result<Option<OwnedFd>> {
        let path = components.join(&b'/');
        match self.open(&path, ResolveFlags::BENEATH) {
            Ok(directory) => return Ok(Some(directory)),
            Err(Errno::NOENT) if missing == Missing::Leave => return Ok(None),
            // XDEV: an absolute link, or one that climbs; the walk tells them apart.
            Err(Errno::NOENT | Errno::XDEV) => {}
            Err(error) => return Err(error).with_context(|| show(&path)),
        }
        self.walk(components, missing).with_context(|| show(&path))
    }

    fn open(&self, path: &[u8], resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b".".as_slice() } else { path };
        let resolve = resolve | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            match rustix::fs::openat2(&self.root, path, WALK, Mode::empty(), resolve) {
                // A rename somewhere on the host made the kernel unsure about a `..`.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Component by component: makes what is missing, and finds links that climb. `done` holds no links.
    fn walk(&self, components: &[Vec<u8>], missing: Missing) -> Result<Option<OwnedFd>> {
        let mut pending: VecDeque<(Vec<u8>, bool)> = components.iter().map(|name| (name.clone(), false)).collect();
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut here = self.open(b".", ResolveFlags::BENEATH)?;
        let mut links = 0;
        while let Some((name, from_link)) = pending.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    ensure!(done.pop().is_some(), "leads through a symbolic link that climbs out of the root");
                    here = self.open(&done.join(&b'/'), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?;
                    continue;
                }
                _ => {}
            }
            match stat(here.as_fd(), &name)?.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Some(FileType::Directory) => {}
                Some(FileType::Symlink) => {
                    links += 1;
                    ensure!(links <= LINKS_LIMIT, "leads through too many symbolic links");
                    let target = rustix::fs::readlinkat(&here, name.as_slice(), Vec::new())?.into_bytes();
                    if target.starts_with(b"/") {
                        done.clear();
                        here = self.open(b".", ResolveFlags::BENEATH)?;
                    }
                    for part in target.split(|byte| *byte == b'/').rev() {
                        pending.push_front((part.to_vec(), true));
                    }
                    continue;
                }
                Some(_) => bail!("{} is not a directory", show(&name)),
                None if missing == Missing::Leave => return Ok(None),
                None if from_link => bail!("leads through a symbolic link to {}, which does not exist", show(&name)),
                None => rustix::fs::mkdirat(&here, name.as_slice(), Mode::from_raw_mode(0o755))?,
            }
            here = rustix::fs::openat(&here, name.as_slice(), WALK | OFlags::NOFOLLOW, Mode::empty())?;
            done.push(name);
        }
        Ok(Some(here))
    }
}

/// What stands at `name` in `directory`, itself, not what it points to.
pub fn stat(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error).with_context(|| show(name)),
    }
}

/// Removes what stands at `name` in `directory`, with everything below it, except what `keep` tells to keep (and the
/// directories above that). `keep` is asked about (inode of the directory, name).
///
/// Uses a constant number of descriptors at any depth: an archive may nest deeper than a process may open files.
pub fn remove(directory: BorrowedFd<'_>, name: &[u8], keep: &dyn Fn(u64, &[u8]) -> bool) -> Result<()> {
    let Some(found) = stat(directory, name)? else { return Ok(()) };
    let directory_inode = rustix::fs::fstat(directory)?.st_ino;
    let kept = keep(directory_inode, name);
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
        if !kept {
            rustix::fs::unlinkat(directory, name, AtFlags::empty()).with_context(|| show(name))?;
        }
        return Ok(());
    }
    let mut here = enter(directory, name)?;
    let mut frames = vec![Frame { name: name.to_vec(), inode: found.st_ino, kept, names: names(here.as_fd())? }];
    while let Some(frame) = frames.last_mut() {
        let Some(child) = frame.names.pop() else {
            let done = frames.pop().context("a directory being removed has no parent")?;
            let Some(parent) = frames.last_mut() else {
                drop(here);
                return remove_directory(directory, &done);
            };
            // Nobody else works in this tree, so `..` is where we came from; looked at all the same.
            here = enter(here.as_fd(), b"..")?;
            ensure!(rustix::fs::fstat(&here)?.st_ino == parent.inode, "the tree changed while it was being removed");
            parent.kept |= done.kept;
            remove_directory(here.as_fd(), &done)?;
            continue;
        };
        let kept = keep(frame.inode, &child);
        let Some(found) = stat(here.as_fd(), &child)? else { continue };
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            here = enter(here.as_fd(), &child)?;
            frames.push(Frame { name: child, inode: found.st_ino, kept, names: names(here.as_fd())? });
        } else if kept {
            frame.kept = true;
        } else {
            rustix::fs::unlinkat(&here, child.as_slice(), AtFlags::empty()).with_context(|| show(&child))?;
        }
    }
    Ok(())
}

struct Frame {
    name: Vec<u8>,
    inode: u64,
    /// It, or something below it, stays.
    kept: bool,
    /// Names in it that have not been looked at.
    names: Vec<Vec<u8>>,
}

fn remove_directory(parent: BorrowedFd<'_>, frame: &Frame) -> Result<()> {
    if !frame.kept {
        rustix::fs::unlinkat(parent, frame.name.as_slice(), AtFlags::REMOVEDIR).with_context(|| show(&frame.name))?;
    }
    Ok(())
}

pub(super) fn enter(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty()).with_context(|| show(name))
}

/// The names in a directory, which may be an O_PATH descriptor.
pub fn names(directory: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::new(enter(directory, b".")?)? {
        let name: CString = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name.into_bytes());
        }
    }
    Ok(names)
}

/// Opens the directory that an absolute path leads to inside a tree. None where there is none.
///
/// # Errors
/// A link leads nowhere or climbs out of the tree, or the host refuses.
pub fn tree_at(root: OwnedFd, path: &std::path::Path) -> Result<Option<OwnedFd>> {
    let path = components(path.as_os_str().as_encoded_bytes())?;
    let Some(found) = Tree::new(root).open_directory(&path, Missing::Leave).ok().flatten() else { return Ok(None) };
    // To be read: what is opened as a place only cannot be.
    Ok(Some(enter(found.as_fd(), b".")?))
}

/// Opens a directory of the host, following links, as the root of a tree.
pub fn open_root(path: &std::path::Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| path.display().to_string())
}

//! What a layer says, by name; and finding it by walking two mounted trees.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};

use super::super::tree::{Missing, Tree, components, enter, names, show, stat};
use super::trace::join;

/// What is said of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    /// There is something new or something else; of a directory, it itself.
    Entry,
    /// There is a directory that was not there, or another one: all of it is looked at.
    Tree,
    /// It has gone.
    Gone,
}

/// What a layer says, by the path: names joined by slashes, without one at the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes(BTreeMap<Vec<u8>, Change>);

impl Changes {
    /// Adds one; of two of the same name the one that says more stays.
    pub(super) fn add(&mut self, path: Vec<u8>, change: Change) {
        let said = self.0.entry(path).or_insert(change);
        *said = (*said).max(change);
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> Vec<(String, Change)> {
        self.0.iter().map(|(path, change)| (String::from_utf8_lossy(path).into_owned(), *change)).collect()
    }
}

/// What is met on the way.
#[derive(Clone, Copy)]
pub(super) enum Met<'a> {
    /// Something to be told of, by its directory and name.
    Entry { directory: BorrowedFd<'a>, name: &'a [u8], path: &'a [u8], stat: &'a Stat },
    /// A name that has gone.
    Gone { path: &'a [u8] },
}

/// Takes what is met.
pub(super) type Each<'a> = &'a mut dyn FnMut(Met<'_>) -> Result<()>;

/// Whether a name of both trees is to be told of.
pub(super) type Differs<'a> = &'a dyn Fn(&Stat, &Stat) -> bool;

/// Two states of one file system that changed in between. A write sets the time of change, whose grain is up to ten
/// milliseconds; what was written in the grain in which the older state was taken, at `taken_ns`, is told of to be sure.
pub(super) fn differs_since(taken_ns: u64) -> impl Fn(&Stat, &Stat) -> bool {
    let sure_seconds = i64::try_from(taken_ns.saturating_sub(20_000_000) / 1_000_000_000).unwrap_or(i64::MAX);
    let sure_nanoseconds = taken_ns.saturating_sub(20_000_000) % 1_000_000_000;
    move |old, new| {
        let of = |stat: &Stat| (stat.st_ino, stat.st_mode, stat.st_uid, stat.st_gid, stat.st_size, stat.st_rdev);
        let times = |stat: &Stat| (stat.st_ctime, stat.st_ctime_nsec, stat.st_mtime, stat.st_mtime_nsec);
        let (seconds, nanoseconds, ..) = times(new);
        of(old) != of(new) || times(old) != times(new) || (seconds, nanoseconds) >= (sure_seconds, sure_nanoseconds)
    }
}

/// Tells of all that `changes` says, in the order of the names. `old` is opened where a tree has to be compared.
pub(super) fn tell(
    changes: &Changes,
    new: &Tree,
    old: &mut dyn FnMut() -> Result<OwnedFd>,
    each: Each<'_>,
) -> Result<()> {
    let mut trees: HashSet<&[u8]> = HashSet::new();
    let mut parent: Option<(Vec<u8>, OwnedFd)> = None;
    for (path, change) in &changes.0 {
        let mut slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        if slashes.any(|(slash, _)| trees.contains(&path[..slash])) {
            continue;
        }
        if *change == Change::Gone {
            each(Met::Gone { path })?;
            continue;
        }
        let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], &path[..]),
        };
        if parent.as_ref().is_none_or(|(known, _)| known != above) {
            let opened = new.open_directory(&components(above)?, Missing::Leave)?;
            parent = Some((above.to_vec(), opened.with_context(|| format!("{}: has gone", show(above)))?));
        }
        let (_, directory) = parent.as_ref().context("no directory")?;
        let stat = stat(directory.as_fd(), name)?.with_context(|| format!("{}: has gone", show(path)))?;
        each(Met::Entry { directory: directory.as_fd(), name, path, stat: &stat })?;
        if *change == Change::Tree && is_directory(&stat) {
            let was = directory_at(&old()?, path);
            let differs = differs_since(0);
            compare(was, enter(directory.as_fd(), name)?, path.clone(), &differs, each)?;
            trees.insert(path);
        }
    }
    Ok(())
}

/// The directory that stands at a path; none where a link leads there.
fn directory_at(root: &OwnedFd, path: &[u8]) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), resolve).ok()
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// A directory under way.
struct Frame {
    /// Names that were not looked at, the next one last.
    names: Vec<Vec<u8>>,
    /// Length of the directory's path.
    path_bytes: usize,
    inode: u64,
    /// The older state of the directory above, where this one has none.
    above: Option<OwnedFd>,
}

/// Walks a directory and its older state, and tells of what `differs`, is new, or has gone. Without an older state that is
/// everything.
///
/// A constant number of descriptors at any depth: an archive may nest deeper than a process may open files.
pub(super) fn compare(
    old: Option<OwnedFd>,
    new: OwnedFd,
    mut path: Vec<u8>,
    differs: Differs<'_>,
    each: Each<'_>,
) -> Result<()> {
    let (mut here, mut was) = (new, old);
    let mut frames = vec![frame(&here, was.as_ref(), &path, None, each)?];
    while let Some(frame) = frames.last_mut() {
        path.truncate(frame.path_bytes);
        let Some(name) = frame.names.pop() else {
            let done = frames.pop();
            let Some(up) = frames.last() else { break };
            here = enter(here.as_fd(), b"..")?;
            ensure!(rustix::fs::fstat(&here)?.st_ino == up.inode, "the tree changed while it was read");
            was = match (was, done.and_then(|frame| frame.above)) {
                (_, Some(above)) => Some(above),
                (Some(below), None) => Some(enter(below.as_fd(), b"..")?),
                (None, None) => None,
            };
            continue;
        };
        let Some(found) = stat(here.as_fd(), &name)? else { continue };
        let before = was.as_ref().map(|was| stat(was.as_fd(), &name)).transpose()?.flatten();
        path = join(&path, &name);
        if before.as_ref().is_none_or(|before| differs(before, &found)) {
            each(Met::Entry { directory: here.as_fd(), name: &name, path: &path, stat: &found })?;
        }
        if is_directory(&found) {
            let mut above = None;
            was = match (was, before) {
                (Some(was), Some(before)) if is_directory(&before) => Some(enter(was.as_fd(), &name)?),
                (was, _) => {
                    above = was;
                    None
                }
            };
            here = enter(here.as_fd(), &name)?;
            frames.push(self::frame(&here, was.as_ref(), &path, above, each)?);
        }
    }
    Ok(())
}

/// Begins a directory: tells of the names that have gone from it.
fn frame(here: &OwnedFd, was: Option<&OwnedFd>, path: &[u8], above: Option<OwnedFd>, each: Each<'_>) -> Result<Frame> {
    let mut held = names(here.as_fd())?;
    held.sort_unstable();
    if let Some(was) = was {
        let mut before = names(was.as_fd())?;
        before.sort_unstable();
        for gone in before.iter().filter(|name| held.binary_search(name).is_err()) {
            each(Met::Gone { path: &join(path, gone) })?;
        }
    }
    held.reverse();
    Ok(Frame { names: held, path_bytes: path.len(), inode: rustix::fs::fstat(here)?.st_ino, above })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::super::tree::open_root;
    use super::*;

    fn met(old: Option<&Path>, new: &Path) -> Vec<String> {
        let mut met = Vec::new();
        let differs = |old: &Stat, new: &Stat| !is_directory(new) && old.st_size != new.st_size;
        compare(old.map(|old| open_root(old).unwrap()), open_root(new).unwrap(), Vec::new(), &differs, &mut |one| {
            met.push(match one {
                Met::Entry { path, directory, name, .. } => {
                    assert!(stat(directory, name).unwrap().is_some());
                    format!("+{}", String::from_utf8_lossy(path))
                }
                Met::Gone { path } => format!("-{}", String::from_utf8_lossy(path)),
            });
            Ok(())
        })
        .unwrap();
        met
    }

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        folder
    }

    #[test]
    fn everything_is_told_of_without_an_older_state() {
        let new = tree(&["a/b/c", "a/d", "e", "f/g/h/i"]);
        assert_eq!(met(None, new.path()), ["+a", "+a/b", "+a/b/c", "+a/d", "+e", "+f", "+f/g", "+f/g/h", "+f/g/h/i"]);
    }

    #[test]
    fn what_is_new_other_or_gone_is_told_of() {
        let old = tree(&["a/b/c", "a/d", "e", "f/g/h/i", "k/l", "same/deep/er"]);
        let new = tree(&["a/b/z", "a/d", "e/now/a/directory", "f/g/h/i", "k", "same/deep/er"]);
        fs::write(new.path().join("f/g/h/i"), "another length").unwrap();
        let told = met(Some(old.path()), new.path());
        let expected = ["-a/b/c", "+a/b/z", "+e/now", "+e/now/a", "+e/now/a/directory", "+f/g/h/i", "+k"];
        // What takes the place of a file: here only its size would tell.
        let told: Vec<_> = told.iter().filter(|one| *one != "+e").map(String::as_str).collect();
        assert_eq!(told, expected);
        assert_eq!(met(Some(old.path()), old.path()), [] as [&str; 0]);
    }

    #[test]
    fn trees_deeper_than_a_process_may_open_files_are_walked() {
        let folder = tempfile::tempdir().unwrap();
        let mut here = open_root(folder.path()).unwrap();
        for _ in 0..1500 {
            rustix::fs::mkdirat(&here, "d", rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
            here = enter(here.as_fd(), b"d").unwrap();
        }
        drop(here);
        assert_eq!(met(None, folder.path()).len(), 1500);
        assert_eq!(met(Some(folder.path()), folder.path()).len(), 0);
        super::super::super::tree::remove(open_root(folder.path()).unwrap().as_fd(), b"d", &|_, _| false).unwrap();
    }
}

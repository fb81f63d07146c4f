//! Unpacks a layer onto a directory tree, by the rules of the OCI image specification (layer.md) as containerd reads
//! them.
//!
//! * A directory over a directory merges and takes the new metadata; anything else replaces what stood there.
//! * `.wh.NAME` removes NAME of the layers below, `.wh..wh..opq` all that the layers below have in its directory; what
//!   this layer itself unpacked stays, whatever the order of the entries.
//! * A file is always a new inode: nothing is written through a hard link of a layer below.
//! * Owner, then attributes, then mode, then times: changing the owner drops `security.capability` and the
//!   set-user-id bit. Times of directories come last of all, because unpacking into them changes them.
//!
//! Names are resolved by [`super::tree`]. Memory: 8 bytes for each entry, and the path of each directory of the layer.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::archive::{Archive, End, Entry, Kind, Time};
use super::tree::{self, Missing, Tree, components, show};

const COPY_BYTES: usize = 256 << 10;
/// Runs of zeros of this size become holes.
const HOLE_BYTES: usize = 4096;

/// What unpacking a layer did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Entries unpacked, whiteouts not counted.
    pub entries: u64,
    /// Whiteouts and opaque marks obeyed.
    pub whiteouts: u64,
    /// Bytes of file content.
    pub content_bytes: u64,
    /// Extended attributes that the file system does not take (`user.*` on a link or device, say).
    pub attributes_dropped: u64,
}

/// Whether names that begin with `.wh.` are whiteouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// They are: a layer.
    Obey,
    /// They are names like others: a copy of a directory.
    Literal,
}

/// Unpacks the tar stream `reader` onto the directory `root`.
///
/// # Errors
///
/// The archive is damaged, climbs out of the root, or the file system refuses something. Part of the layer has been
/// unpacked then.
pub fn apply_archive<R: Read>(root: OwnedFd, reader: R) -> Result<(Summary, End)> {
    let mut applier = Applier::new(root, Whiteouts::Obey);
    let mut archive = Archive::new(reader);
    while let Some(entry) = archive.next_entry()? {
        applier.apply(&entry, &mut archive).with_context(|| format!("cannot unpack {}", show(&entry.path)))?;
    }
    let end = archive.finish()?;
    Ok((applier.finish()?, end))
}

/// Unpacks one layer, entry by entry.
#[derive(Debug)]
pub struct Applier {
    tree: Tree,
    whiteouts: Whiteouts,
    hasher: RandomState,
    /// Keyed hashes of (inode of the directory, name) of all that this layer unpacked. A name is not known by its
    /// path, which may lead through links, nor by its inode, which a hard link of this layer shares with a file below.
    unpacked: HashSet<u64>,
    /// Directories of this layer by inode: their path, and the times they get at the end.
    directories: HashMap<u64, (Vec<Vec<u8>>, Timestamps)>,
    /// The last parent directory: archives go through a directory's files in a row.
    parent: Option<(Vec<Vec<u8>>, OwnedFd, u64)>,
    buffer: Vec<u8>,
    summary: Summary,
}

impl Applier {
    /// A layer that is to be unpacked onto the directory `root`.
    pub fn new(root: OwnedFd, whiteouts: Whiteouts) -> Self {
        Self {
            tree: Tree::new(root),
            whiteouts,
            hasher: RandomState::new(),
            unpacked: HashSet::new(),
            directories: HashMap::new(),
            parent: None,
            buffer: vec![0; COPY_BYTES],
            summary: Summary::default(),
        }
    }

    /// Unpacks `entry`; a file's content comes from `content`.
    ///
    /// # Errors
    ///
    /// See [`apply_archive`].
    pub fn apply(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<()> {
        let mut path = components(&entry.path)?;
        // The root itself keeps what the file system gave it, as with containerd.
        let Some(name) = path.pop() else { return Ok(()) };
        if self.whiteouts == Whiteouts::Obey
            && let Some(hidden) = name.strip_prefix(b".wh.")
        {
            return self.whiteout(&path, hidden);
        }
        let (parent, inode) = self.parent(&path)?;
        let parent = parent.as_fd();
        let key = self.key(inode, &name);
        let existing = tree::stat(parent, &name)?;
        let is_directory = existing.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if entry.kind == Kind::HardLink {
            self.link(entry, parent, &name, existing.is_some())?;
        } else {
            if existing.is_some() && !(is_directory && entry.kind == Kind::Directory) {
                self.forget_parents();
                tree::remove(parent, &name, &|_, _| false)?;
            }
            match entry.kind {
                Kind::File => self.create_file(entry, parent, &name, content)?,
                kind => {
                    create_special(entry, kind, parent, &name, is_directory)?;
                    self.set_metadata(entry, parent, &name, &path)?;
                }
            }
        }
        self.unpacked.insert(key);
        self.summary.entries += 1;
        Ok(())
    }

    /// Sets the directories' times.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn finish(self) -> Result<Summary> {
        for (inode, (path, times)) in &self.directories {
            let Some(directory) = self.tree.open_directory(path, Missing::Leave).unwrap_or(None) else { continue };
            // Replaced by something else later in the layer.
            if rustix::fs::fstat(&directory)?.st_ino == *inode {
                rustix::fs::utimensat(&directory, c".", times, AtFlags::SYMLINK_NOFOLLOW)
                    .with_context(|| show(&path.join(&b'/')))?;
            }
        }
        Ok(self.summary)
    }

    fn key(&self, parent_inode: u64, name: &[u8]) -> u64 {
        self.hasher.hash_one((parent_inode, name))
    }

    fn forget_parents(&mut self) {
        self.parent = None;
    }

    /// The directory that an entry goes into, made where it is missing, and its inode.
    fn parent(&mut self, path: &[Vec<u8>]) -> Result<(OwnedFd, u64)> {
        if let Some((cached, directory, inode)) = &self.parent
            && cached == path
        {
            return Ok((directory.try_clone()?, *inode));
        }
        let directory = self.tree.open_directory(path, Missing::Create)?.context("its directory is gone")?;
        let inode = rustix::fs::fstat(&directory)?.st_ino;
        self.parent = Some((path.to_vec(), directory.try_clone()?, inode));
        Ok((directory, inode))
    }

    fn whiteout(&mut self, path: &[Vec<u8>], hidden: &[u8]) -> Result<()> {
        // `.wh..wh.plnk` and others are aufs's own book-keeping.
        if hidden.starts_with(b".wh.") && hidden != b".wh..opq" {
            return Ok(());
        }
        ensure!(!matches!(hidden, b"" | b"." | b".."), "a whiteout that names nothing");
        self.summary.whiteouts += 1;
        self.forget_parents();
        let Some(directory) = self.tree.open_directory(path, Missing::Leave)? else { return Ok(()) };
        let keep = |inode: u64, name: &[u8]| self.unpacked.contains(&self.key(inode, name));
        if hidden == b".wh..opq" {
            for name in tree::names(directory.as_fd())? {
                tree::remove(directory.as_fd(), &name, &keep)?;
            }
            Ok(())
        } else {
            tree::remove(directory.as_fd(), hidden, &keep)
        }
    }

    fn link(&mut self, entry: &Entry, parent: BorrowedFd<'_>, name: &[u8], exists: bool) -> Result<()> {
        let mut target = components(&entry.link).context("target of the hard link")?;
        let target_name = target.pop().context("a hard link to the root")?;
        let missing = || format!("target of the hard link, {}, does not exist", show(&entry.link));
        let directory = self.tree.open_directory(&target, Missing::Leave)?.with_context(missing)?;
        let found = tree::stat(directory.as_fd(), &target_name)?.with_context(missing)?;
        ensure!(
            FileType::from_raw_mode(found.st_mode) != FileType::Directory,
            "a hard link to a directory, {}",
            show(&entry.link)
        );
        if let Some(present) = tree::stat(parent, name)?
            && (present.st_dev, present.st_ino) == (found.st_dev, found.st_ino)
        {
            // It has that name already. Removing first would lose a file that is linked to itself.
            return Ok(());
        }
        if exists {
            self.forget_parents();
            tree::remove(parent, name, &|_, _| false)?;
        }
        // Owner, mode and attributes are the file's, which has them from its own entry.
        rustix::fs::linkat(&directory, target_name.as_slice(), parent, name, AtFlags::empty())
            .with_context(|| format!("target of the hard link, {}", show(&entry.link)))
    }

    fn create_file(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
        content: &mut dyn Read,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = std::fs::File::from(rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?);
        self.copy(entry.size_bytes, &file, content)?;
        let file = file.as_fd();
        rustix::fs::fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
        for (attribute, value) in &entry.xattrs {
            let result = rustix::fs::fsetxattr(file, attribute.as_slice(), value, XattrFlags::empty());
            self.attribute_set(attribute, result)?;
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode))?;
        rustix::fs::futimens(file, &timestamps(entry))?;
        Ok(())
    }

    fn copy(&mut self, size_bytes: u64, mut file: &std::fs::File, content: &mut dyn Read) -> Result<()> {
        let mut left = size_bytes;
        let mut ends_in_hole = false;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(COPY_BYTES);
            content.read_exact(&mut self.buffer[..want])?;
            let is_hole = |run: &[u8]| run.len() == HOLE_BYTES && run.iter().all(|byte| *byte == 0);
            let mut buffer = &self.buffer[..want];
            while !buffer.is_empty() {
                let holes = buffer.chunks(HOLE_BYTES).take_while(|run| is_hole(run)).count() * HOLE_BYTES;
                if holes > 0 {
                    rustix::fs::seek(file, SeekFrom::Current(holes as i64))?;
                }
                buffer = &buffer[holes..];
                let data: usize = buffer.chunks(HOLE_BYTES).take_while(|run| !is_hole(run)).map(<[u8]>::len).sum();
                file.write_all(&buffer[..data])?;
                buffer = &buffer[data..];
                ends_in_hole = data == 0;
            }
            left -= want as u64;
        }
        if ends_in_hole {
            rustix::fs::ftruncate(file, size_bytes)?;
        }
        self.summary.content_bytes += size_bytes;
        Ok(())
    }

    /// Metadata of everything but files, by an O_PATH descriptor: devices and pipes must not be opened, links not
    /// followed.
    fn set_metadata(&mut self, entry: &Entry, parent: BorrowedFd<'_>, name: &[u8], path: &[Vec<u8>]) -> Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(&node, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        // The one way to an O_PATH descriptor's attributes and mode before Linux 6.13; it ends at the node itself,
        // also at a link.
        let by_descriptor = format!("/proc/self/fd/{}", node.as_raw_fd());
        for (attribute, value) in &entry.xattrs {
            let result = rustix::fs::setxattr(by_descriptor.as_str(), attribute.as_slice(), value, XattrFlags::empty());
            self.attribute_set(attribute, result)?;
        }
        if entry.kind != Kind::Symlink {
            rustix::fs::chmod(by_descriptor.as_str(), Mode::from_raw_mode(entry.mode))?;
        }
        let times = timestamps(entry);
        if entry.kind == Kind::Directory {
            let inode = rustix::fs::fstat(&node)?.st_ino;
            let path = [path, &[name.to_vec()]].concat();
            self.directories.insert(inode, (path, times));
        } else {
            rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    fn attribute_set(&mut self, attribute: &[u8], result: rustix::io::Result<()>) -> Result<()> {
        match result {
            Ok(()) => Ok(()),
            // `user.*` is for files and directories only; other kinds depend on the file system.
            Err(Errno::NOTSUP) => {
                self.summary.attributes_dropped += 1;
                Ok(())
            }
            Err(Errno::PERM) if attribute.starts_with(b"user.") => {
                self.summary.attributes_dropped += 1;
                Ok(())
            }
            Err(error) => Err(error).with_context(|| format!("attribute {}", show(attribute))),
        }
    }
}

fn create_special(entry: &Entry, kind: Kind, parent: BorrowedFd<'_>, name: &[u8], is_directory: bool) -> Result<()> {
    let mode = Mode::RUSR | Mode::WUSR;
    match kind {
        Kind::Directory if is_directory => {}
        Kind::Directory => rustix::fs::mkdirat(parent, name, Mode::RWXU)?,
        Kind::Symlink => {
            ensure!(!entry.link.is_empty(), "a symbolic link without a target");
            rustix::fs::symlinkat(entry.link.as_slice(), parent, name)?;
        }
        Kind::Fifo => rustix::fs::mknodat(parent, name, FileType::Fifo, mode, 0)?,
        Kind::Character | Kind::Block => {
            let (major, minor) = entry.device;
            // What the kernel's 32-bit device number holds.
            ensure!(major < 1 << 12 && minor < 1 << 20, "device number {major}:{minor} is out of range");
            let kind = if kind == Kind::Block { FileType::BlockDevice } else { FileType::CharacterDevice };
            rustix::fs::mknodat(parent, name, kind, mode, rustix::fs::makedev(major, minor))?;
        }
        Kind::File | Kind::HardLink => bail!("not a special file"),
    }
    Ok(())
}

fn timestamps(entry: &Entry) -> Timestamps {
    let convert = |time: Time| Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds };
    Timestamps {
        last_access: convert(entry.accessed.unwrap_or(entry.modified)),
        last_modification: convert(entry.modified),
    }
}

#[cfg(test)]
mod tests;

//! Writes a layer: a tar with PAX records where the old header does not hold something (long names, large numbers, parts of
//! seconds, extended attributes).

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};
use indicatif::ProgressBar;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use serde::Serialize;
use tar::{EntryType, Header};

use super::super::directory::Watched;
use super::super::stream::{Interrupt, interrupted};
use super::super::tree::show;
use super::changes::Met;
use super::trace::join;

/// Largest numbers of 7 and 11 octal digits.
const ID_MAX: u64 = 0o7_777_777;
const SIZE_MAX: u64 = 0o77_777_777_777;
/// What a name of a layer begins with that says that something has gone.
const WHITEOUT: &[u8] = b".wh.";

/// What a layer holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Written {
    /// Names with something new.
    pub(super) entries: u64,
    /// Names that have gone.
    pub(super) whiteouts: u64,
    /// Bytes of files.
    pub(super) content_bytes: u64,
    /// Sockets, which an archive does not hold.
    pub(super) sockets_left_out: u64,
}

/// A layer that is being written.
pub(super) struct Tarball<'a, W: Write> {
    builder: tar::Builder<W>,
    /// Where a file with several names was written, by its inode.
    linked: HashMap<u64, Vec<u8>>,
    /// Directories that were written.
    directories: HashSet<Vec<u8>>,
    progress: &'a ProgressBar,
    interrupt: &'a Interrupt,
    /// Something stands below this layer.
    covers: bool,
    written: Written,
}

impl<'a, W: Write> Tarball<'a, W> {
    /// A layer, which `covers` another or is the lowest.
    pub(super) fn new(to: W, covers: bool, progress: &'a ProgressBar, interrupt: &'a Interrupt) -> Self {
        let written = Written::default();
        let (linked, directories) = (HashMap::new(), HashSet::new());
        Self { builder: tar::Builder::new(to), linked, directories, progress, interrupt, covers, written }
    }

    /// Writes what there is to be said of a name.
    ///
    /// # Errors
    /// It cannot be read or written, or the layer cannot hold it.
    pub(super) fn take(&mut self, met: Met<'_>) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(interrupted().into());
        }
        match met {
            Met::Entry { directory, name, path, stat } => {
                let above = &path[..path.len().saturating_sub(name.len() + 1)];
                // Whoever unpacks something into a directory changes its times: they are said again.
                if !above.is_empty() && !self.directories.contains(above) {
                    let stat = rustix::fs::fstat(directory)?;
                    self.add(directory, b".", above, &stat)
                        .with_context(|| format!("cannot export {}", show(above)))?;
                }
                self.add(directory, name, path, stat).with_context(|| format!("cannot export {}", show(path)))
            }
            Met::Gone { path } => self.whiteout(path).with_context(|| format!("cannot export {}", show(path))),
        }
    }

    /// Writes the end. Answers what was written, and what it was written to.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn finish(self) -> Result<(Written, W)> {
        Ok((self.written, self.builder.into_inner()?))
    }

    fn add(&mut self, directory: BorrowedFd<'_>, name: &[u8], path: &[u8], stat: &Stat) -> Result<()> {
        ensure!(!name.starts_with(WHITEOUT), "in a layer, its name would say that something has gone");
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut head = Head::new(path, stat);
        let mut content = None;
        match kind {
            FileType::Directory => {
                self.directories.insert(path.to_vec());
                head.kind(EntryType::Directory);
                head.path.push(b'/');
            }
            FileType::Socket => {
                self.written.sockets_left_out += 1;
                // What was there before it has gone all the same.
                return if self.covers { self.whiteout(path) } else { Ok(()) };
            }
            _ => {
                if stat.st_nlink > 1 {
                    if let Some(first) = self.linked.get(&stat.st_ino) {
                        head.kind(EntryType::Link);
                        head.link(first);
                        self.written.entries += 1;
                        return head.write(&mut self.builder, io::empty());
                    }
                    self.linked.insert(stat.st_ino, path.to_vec());
                }
                match kind {
                    FileType::RegularFile => {
                        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                        let file = File::from(rustix::fs::openat(directory, name, flags, Mode::empty())?);
                        let size_bytes = u64::try_from(stat.st_size).context("its size is negative")?;
                        head.size(size_bytes);
                        content = Some((file, size_bytes));
                    }
                    FileType::Symlink => {
                        head.kind(EntryType::Symlink);
                        head.link(rustix::fs::readlinkat(directory, name, Vec::new())?.as_bytes());
                    }
                    FileType::CharacterDevice => head.device(EntryType::Char, stat)?,
                    FileType::BlockDevice => head.device(EntryType::Block, stat)?,
                    FileType::Fifo => head.kind(EntryType::Fifo),
                    _ => anyhow::bail!("is of a type that is not known"),
                }
            }
        }
        // The path leads to the directory by its descriptor; its last name is not followed.
        let mut place = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        place.push(std::ffi::OsStr::from_bytes(name));
        for attribute in xattr::list(&place).context("extended attributes")? {
            let Some(value) = xattr::get(&place, &attribute).context("extended attributes")? else { continue };
            let key = attribute.to_str().context("the name of an extended attribute is not UTF-8")?;
            head.pax.push((format!("SCHILY.xattr.{key}"), value));
        }
        self.written.entries += 1;
        let Some((file, size_bytes)) = content else { return head.write(&mut self.builder, io::empty()) };
        self.written.content_bytes += size_bytes;
        let content = Watched { content: Some(file), progress: self.progress, interrupt: self.interrupt };
        head.write(&mut self.builder, content.take(size_bytes))
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        let mut head = Head::empty(&join(above, &[WHITEOUT, name].concat()));
        head.header.set_mode(0o600);
        self.written.whiteouts += 1;
        head.write(&mut self.builder, io::empty())
    }
}

/// A header and the records before it.
struct Head {
    header: Header,
    path: Vec<u8>,
    link: Vec<u8>,
    pax: Vec<(String, Vec<u8>)>,
}

impl Head {
    /// Of an empty file.
    fn empty(path: &[u8]) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        for set in [Header::set_uid, Header::set_gid, Header::set_mtime, Header::set_size] {
            set(&mut header, 0);
        }
        Self { header, path: path.to_vec(), link: Vec::new(), pax: Vec::new() }
    }

    fn new(path: &[u8], stat: &Stat) -> Self {
        let mut head = Self::empty(path);
        head.header.set_mode(stat.st_mode & 0o7777);
        head.number("uid", stat.st_uid.into(), ID_MAX, Header::set_uid);
        head.number("gid", stat.st_gid.into(), ID_MAX, Header::set_gid);
        let (seconds, nanoseconds) = (stat.st_mtime, stat.st_mtime_nsec);
        if let Ok(positive) = u64::try_from(seconds)
            && positive <= SIZE_MAX
        {
            head.header.set_mtime(positive);
        }
        if nanoseconds != 0 || !(0..=SIZE_MAX as i64).contains(&seconds) {
            head.pax.push(("mtime".into(), time(seconds, nanoseconds).into_bytes()));
        }
        head
    }

    fn kind(&mut self, kind: EntryType) {
        self.header.set_entry_type(kind);
    }

    fn link(&mut self, target: &[u8]) {
        self.link = target.to_vec();
    }

    fn size(&mut self, size_bytes: u64) {
        self.number("size", size_bytes, SIZE_MAX, Header::set_size);
    }

    fn device(&mut self, kind: EntryType, stat: &Stat) -> Result<()> {
        self.kind(kind);
        self.header.set_device_major(rustix::fs::major(stat.st_rdev))?;
        self.header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
        Ok(())
    }

    fn number(&mut self, key: &str, value: u64, most: u64, set: fn(&mut Header, u64)) {
        if value <= most {
            set(&mut self.header, value);
        } else {
            self.pax.push((key.into(), value.to_string().into_bytes()));
        }
    }

    fn write(mut self, builder: &mut tar::Builder<impl Write>, content: impl Read) -> Result<()> {
        let old = self.header.as_old_mut();
        for (field, value, key) in [(&mut old.name, &self.path, "path"), (&mut old.linkname, &self.link, "linkpath")] {
            let fitting = value.len().min(field.len());
            field[..fitting].copy_from_slice(&value[..fitting]);
            if fitting < value.len() {
                self.pax.push((key.into(), value.clone()));
            }
        }
        self.header.set_cksum();
        builder.append_pax_extensions(self.pax.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
        builder.append(&self.header, content)?;
        Ok(())
    }
}

/// `-1.5` is half a second after two before 1970, as everybody who reads it has it.
fn time(seconds: i64, nanoseconds: u64) -> String {
    let (sign, seconds, nanoseconds) = match (seconds, nanoseconds) {
        (..0, 1..) => ("-", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds),
        (..0, 0) => ("-", seconds.unsigned_abs(), 0),
        _ => ("", seconds.unsigned_abs(), nanoseconds),
    };
    let fraction = format!("{nanoseconds:09}");
    match fraction.trim_end_matches('0') {
        "" => format!("{sign}{seconds}"),
        digits => format!("{sign}{seconds}.{digits}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::super::super::archive::{Archive, Kind, Time};
    use super::super::super::tree::open_root;
    use super::super::changes::compare;
    use super::*;

    #[test]
    fn times_are_written_as_they_are_read() {
        assert_eq!(time(12, 0), "12");
        assert_eq!(time(12, 250_000_000), "12.25");
        assert_eq!(time(-13, 750_000_000), "-12.25");
        assert_eq!(time(-1, 500_000_000), "-0.5");
        assert_eq!(time(-2, 0), "-2");
        assert_eq!(time(0, 1), "0.000000001");
    }

    /// What is read again is what stood there: names and links that are long or no text, times, attributes, holes.
    #[test]
    fn archive_says_what_the_tree_does() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let long = "long ".repeat(40);
        fs::create_dir(at(&long)).unwrap();
        fs::write(at(&long).join("ö\n"), "content").unwrap();
        fs::hard_link(at(&long).join("ö\n"), at("z hard link")).unwrap();
        symlink("t".repeat(300), at("link")).unwrap();
        fs::set_permissions(at(&long).join("ö\n"), fs::Permissions::from_mode(0o4755)).unwrap();
        let has_xattrs = xattr::set(at("z hard link"), "user.key", b"a\nb=\0").is_ok();
        let modified = rustix::fs::Timespec { tv_sec: -5, tv_nsec: 250_000_000 };
        let times = rustix::fs::Timestamps { last_access: modified, last_modification: modified };
        rustix::fs::utimensat(rustix::fs::CWD, at("z hard link"), &times, rustix::fs::AtFlags::empty()).unwrap();
        let (progress, interrupt) = (ProgressBar::hidden(), Interrupt::default());
        let mut tarball = Tarball::new(Vec::new(), false, &progress, &interrupt);
        let differs = |_: &Stat, _: &Stat| true;
        compare(None, open_root(folder.path()).unwrap(), Vec::new(), &differs, &mut |met| tarball.take(met)).unwrap();
        tarball.take(Met::Gone { path: b"some/where" }).unwrap();
        let (written, bytes) = tarball.finish().unwrap();
        assert_eq!(written, Written { entries: 4, whiteouts: 1, content_bytes: 7, sockets_left_out: 0 });
        let mut archive = Archive::new(&bytes[..]);
        let mut read = Vec::new();
        while let Some(entry) = archive.next_entry().unwrap() {
            let mut content = String::new();
            archive.read_to_string(&mut content).unwrap();
            read.push((entry, content));
        }
        let path = |index: usize| String::from_utf8(read[index].0.path.clone()).unwrap();
        assert_eq!((path(0), read[0].0.kind), ("link".into(), Kind::Symlink));
        assert_eq!(read[0].0.link, "t".repeat(300).as_bytes());
        assert_eq!((path(1), read[1].0.kind), (format!("{long}/"), Kind::Directory));
        let file = &read[2].0;
        assert_eq!((path(2), file.kind, file.mode), (format!("{long}/ö\n"), Kind::File, 0o4755));
        assert_eq!(file.modified, Time { seconds: -5, nanoseconds: 250_000_000 });
        assert_eq!(file.uid, fs::metadata(at("link").parent().unwrap()).unwrap().uid());
        assert_eq!(read[2].1, "content");
        let held: Vec<_> = file.xattrs.iter().filter(|(name, _)| name == b"user.key").collect();
        assert_eq!(held.len(), usize::from(has_xattrs));
        assert!(held.iter().all(|(_, value)| value == b"a\nb=\0"));
        assert_eq!((path(3), read[3].0.kind), ("z hard link".into(), Kind::HardLink));
        assert_eq!(read[3].0.link, file.path);
        assert_eq!(path(4), "some/.wh.where");
    }

    #[test]
    fn name_that_would_be_a_whiteout_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".wh.x"), "").unwrap();
        let (progress, interrupt) = (ProgressBar::hidden(), Interrupt::default());
        let mut tarball = Tarball::new(Vec::new(), false, &progress, &interrupt);
        let differs = |_: &Stat, _: &Stat| true;
        let root = open_root(folder.path()).unwrap();
        let refused = compare(None, root, Vec::new(), &differs, &mut |met| tarball.take(met)).unwrap_err();
        assert!(format!("{refused:#}").contains(".wh.x"), "{refused:#}");
    }
}

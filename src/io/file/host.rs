//! The host file system under a pool: whether it keeps what a pool needs, and how it wants direct I/O aligned.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, IFlags, StatxFlags};

/// Largest alignment that owned memory and blocks give.
const MOST_ALIGNMENT: usize = 4096;

/// Extents looked at for sharing. A copy made by reflink shares nearly all its extents, so the first few tell; a walk
/// over the millions of an old pool would hold up its opening.
const EXTENTS_LOOKED_AT: usize = 4096;

const BTRFS: u64 = 0x9123_683e;
const XFS: u64 = 0x5846_5342;

/// File systems by their magic number (statfs(2), linux/magic.h); true for those that are refused: data on another
/// machine, where neither the lock nor an fsync means what it should, or on another file system in disguise.
const FILE_SYSTEMS: &[(u64, &str, bool)] = &[
    (0xef53, "ext4", false),
    (XFS, "xfs", false),
    (BTRFS, "btrfs", false),
    (0xf2f5_2010, "f2fs", false),
    (0xca45_1a4e, "bcachefs", false),
    (0x2fc1_2fc1, "zfs", false),
    (0x0102_1994, "tmpfs", false),
    (0x8584_58f6, "ramfs", false),
    (0x6969, "nfs", true),
    (0x517b, "smb", true),
    (0xfe53_4d42, "smb", true),
    (0xff53_4d42, "cifs", true),
    (0x0102_1997, "9p", true),
    (0x00c3_6400, "ceph", true),
    (0x5346_414f, "afs", true),
    (0x7375_7245, "coda", true),
    (0x0bd0_0bd0, "lustre", true),
    (0x0116_1970, "gfs2", true),
    (0x7461_636f, "ocfs2", true),
    (0x6573_5546, "fuse", true),
    (0x794c_7630, "overlayfs", true),
];

/// What a pool's file stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// Name of the file system, or "block device".
    pub name: String,
    magic: u64,
    refused: bool,
}

impl Host {
    pub(super) fn of(file: &File, block_device: bool) -> io::Result<Self> {
        if block_device {
            return Ok(Self { name: "block device".into(), magic: 0, refused: false });
        }
        // The type is a signed word on some architectures; the magic numbers are 32 bits wide.
        let magic = rustix::fs::fstatfs(file)?.f_type as u64 & 0xffff_ffff;
        Ok(Self::from_magic(magic))
    }

    fn from_magic(magic: u64) -> Self {
        match FILE_SYSTEMS.iter().find(|&&(known, ..)| known == magic) {
            Some(&(_, name, refused)) => Self { name: name.into(), magic, refused },
            None => Self { name: format!("file system of type {magic:#x}"), magic, refused: false },
        }
    }

    /// Why no pool should stand here unless that is forced.
    pub(super) fn objection(&self) -> Option<String> {
        self.refused.then(|| {
            format!(
                "{} keeps neither locks nor flushes as a pool needs them; use ext4, xfs or a block device",
                self.name
            )
        })
    }

    /// Why this particular file should not be used as a pool unless that is forced.
    pub(super) fn objection_to(&self, file: &File) -> io::Result<Option<String>> {
        if let Some(objection) = self.objection() {
            return Ok(Some(objection));
        }
        if self.magic == BTRFS && !rustix::fs::ioctl_getflags(file)?.contains(IFlags::NOCOW) {
            return Ok(Some("on btrfs a pool must be a NOCOW file (chattr +C on it while it is empty)".into()));
        }
        if self.shares_extents() && has_shared_extents(file)? {
            return Ok(Some(
                "its blocks are shared with another file (a reflink copy): each write would move them; copy it in full"
                    .into(),
            ));
        }
        Ok(None)
    }

    /// Whether files here can share extents at all.
    pub(super) fn shares_extents(&self) -> bool {
        self.magic == BTRFS || self.magic == XFS
    }

    /// Prepares an empty file: on btrfs, copy-on-write below ours would make each small write a new extent.
    pub(super) fn prepare_empty(&self, file: &File) -> io::Result<()> {
        if self.magic == BTRFS {
            let flags = rustix::fs::ioctl_getflags(file)?;
            rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW)?;
        }
        Ok(())
    }
}

/// What direct I/O on `file` must be aligned to: offset, length and memory address, in bytes. None when the host says
/// that it does none on this file.
pub(super) fn direct_alignment(file: &File, block_device: bool) -> io::Result<Option<usize>> {
    if block_device {
        return Ok(Some(rustix::fs::ioctl_blksszget(file)? as usize).filter(|&size| size <= MOST_ALIGNMENT));
    }
    // Linux 6.1; a file system that does not fill it in leaves the mask's bit clear.
    if let Ok(answer) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && answer.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let alignment = answer.stx_dio_offset_align.max(answer.stx_dio_mem_align) as usize;
        return Ok((answer.stx_dio_offset_align != 0 && alignment <= MOST_ALIGNMENT).then_some(alignment.max(512)));
    }
    Ok(Some(sector_size_of_device(file.metadata()?.dev()).unwrap_or(MOST_ALIGNMENT)))
}

/// Logical sector size of the disk that a file system is on, if it is on one of its own.
fn sector_size_of_device(device: u64) -> Option<usize> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // A partition has no queue of its own; its disk is the folder above.
    let size = [format!("/sys/dev/block/{major}:{minor}/queue"), format!("/sys/dev/block/{major}:{minor}/../queue")]
        .iter()
        .find_map(|queue| std::fs::read_to_string(format!("{queue}/logical_block_size")).ok())?
        .trim()
        .parse()
        .ok()?;
    (512..=MOST_ALIGNMENT).contains(&size).then_some(size)
}

/// linux/fiemap.h, with room for a batch of extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; Self::BATCH],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

impl Fiemap {
    const BATCH: usize = 128;
    /// `_IOWR('f', 11, struct fiemap)`
    const REQUEST: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;
    const EXTENT_LAST: u32 = 0x0001;
    const EXTENT_SHARED: u32 = 0x2000;
}

const _: () = assert!(std::mem::offset_of!(Fiemap, extents) == 32 && size_of::<FiemapExtent>() == 56);

/// Whether one of the file's first extents is shared with another file.
pub(super) fn has_shared_extents(file: &File) -> io::Result<bool> {
    let mut start = 0;
    for _ in 0..EXTENTS_LOOKED_AT / Fiemap::BATCH {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: Fiemap::BATCH as u32,
            reserved: 0,
            extents: [FiemapExtent::default(); Fiemap::BATCH],
        };
        // SAFETY: the kernel writes at most `extent_count` extents behind the header, and there is room for them.
        if unsafe { libc::ioctl(file.as_raw_fd(), Fiemap::REQUEST, &raw mut map) } < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(false) } else { Err(error) };
        }
        let found = &map.extents[..(map.mapped_extents as usize).min(Fiemap::BATCH)];
        if found.iter().any(|extent| extent.flags & Fiemap::EXTENT_SHARED != 0) {
            return Ok(true);
        }
        match found.last() {
            Some(last) if last.flags & Fiemap::EXTENT_LAST == 0 => start = last.logical.saturating_add(last.length),
            _ => return Ok(false),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_objected_to_and_local_ones_are_not() {
        for name in ["nfs", "cifs", "9p", "ceph", "fuse", "overlayfs"] {
            let &(magic, ..) = FILE_SYSTEMS.iter().find(|&&(_, known, _)| known == name).unwrap();
            assert!(Host::from_magic(magic).objection().unwrap().contains(name));
        }
        for name in ["ext4", "xfs", "btrfs", "tmpfs"] {
            let &(magic, ..) = FILE_SYSTEMS.iter().find(|&&(_, known, _)| known == name).unwrap();
            assert_eq!(Host::from_magic(magic).objection(), None);
        }
        assert_eq!(Host::from_magic(0x1234).name, "file system of type 0x1234");
    }

    #[test]
    fn plain_file_has_no_shared_extents() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        for block in 0..300 {
            file.write_all_at(&[1; 4096], block * 16384).unwrap();
        }
        file.sync_all().unwrap();
        assert!(!has_shared_extents(&file).unwrap());
    }
}

//! Growing a mounted file system to the size of its device, by its own kernel: the ioctls of `fs/xfs/libxfs/xfs_fs.h` and
//! `linux/btrfs.h` (Linux 3.0). ext4's is not among them: it wants `CAP_SYS_RESOURCE`, which root of a container often has
//! not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

// _IOR('X', 100, XfsGeometry), _IOW('X', 110, XfsGrow)
const XFS_IOC_FSGEOMETRY_V1: libc::Ioctl = 0x8070_5864_u32 as libc::Ioctl;
const XFS_IOC_FSGROWFSDATA: libc::Ioctl = 0x4010_586e_u32 as libc::Ioctl;
// _IOW(0x94, 3, BtrfsArguments)
const BTRFS_IOC_RESIZE: libc::Ioctl = 0x5000_9403_u32 as libc::Ioctl;

// `f_type` of statfs(2): linux/magic.h.
const XFS_SUPER_MAGIC: i64 = 0x5846_5342;
const BTRFS_SUPER_MAGIC: i64 = 0x9123_683e;

/// `struct xfs_fsop_geom_v1`, as far as it is wanted here.
#[repr(C)]
struct XfsGeometry {
    block_size: u32,
    _sizes: [u32; 6],
    /// Most percent of the space that inodes may take.
    inode_percent: u32,
    data_blocks: u64,
    _rest: [u64; 9],
}

/// `struct xfs_growfs_data`.
#[repr(C)]
struct XfsGrow {
    blocks: u64,
    inode_percent: u32,
    _padding: u32,
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct BtrfsArguments {
    _descriptor: i64,
    name: [u8; 4088],
}

/// Grows the file system that `root` is in to `size_bytes`, which is the size of its device. What has that size already
/// stays as it is.
///
/// # Errors
/// What the kernel says; `Unsupported` for other file systems than xfs and btrfs.
pub fn grow_mounted(root: impl AsFd, size_bytes: u64) -> io::Result<()> {
    let root = root.as_fd();
    let found = rustix::fs::fstatfs(root)?;
    #[allow(clippy::unnecessary_cast, clippy::cast_lossless, reason = "another type on other processors")]
    let kind = found.f_type as i64;
    match kind {
        XFS_SUPER_MAGIC => {
            let mut geometry =
                XfsGeometry { block_size: 0, _sizes: [0; 6], inode_percent: 0, data_blocks: 0, _rest: [0; 9] };
            request(root, XFS_IOC_FSGEOMETRY_V1, &mut geometry)?;
            let blocks = size_bytes / u64::from(geometry.block_size.max(512));
            if blocks <= geometry.data_blocks {
                return Ok(());
            }
            let mut grow = XfsGrow { blocks, inode_percent: geometry.inode_percent, _padding: 0 };
            request(root, XFS_IOC_FSGROWFSDATA, &mut grow)
        }
        BTRFS_SUPER_MAGIC => {
            let mut arguments = BtrfsArguments { _descriptor: 0, name: [0; 4088] };
            arguments.name[..3].copy_from_slice(b"max");
            request(root, BTRFS_IOC_RESIZE, &mut arguments)
        }
        _ => Err(io::Error::from(io::ErrorKind::Unsupported)),
    }
}

/// One of the requests above, with the argument that it takes.
fn request<T>(root: BorrowedFd<'_>, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    const {
        assert!(size_of::<XfsGeometry>() == 112);
        assert!(size_of::<XfsGrow>() == 16);
        assert!(size_of::<BtrfsArguments>() == 4096);
    }
    // SAFETY: each request reads or writes a structure of the size in its number, which is that of the argument that
    // the callers give with it (asserted above); it is exclusively borrowed for the call, and the descriptor is open.
    if unsafe { libc::ioctl(root.as_raw_fd(), number, std::ptr::from_mut(argument)) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_file_systems_are_refused() {
        let proc = std::fs::File::open("/proc").unwrap();
        assert_eq!(grow_mounted(&proc, 1 << 30).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
}

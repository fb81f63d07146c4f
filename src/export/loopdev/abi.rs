//! The loop driver's ioctls that `loopdev-3` has not: include/uapi/linux/loop.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use bytemuck::{Pod, Zeroable};

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_SET_STATUS64: libc::Ioctl = 0x4C04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;

/// Writes are refused.
pub(super) const FLAG_READ_ONLY: u32 = 1;
/// It is detached when its last user has closed it.
const FLAG_AUTOCLEAR: u32 = 4;
/// Past the page cache.
pub(super) const FLAG_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Info {
    /// The file system of the backing file.
    pub device: u64,
    /// That file's number in it.
    pub inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    pub flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(size_of::<Info>() == 232);

/// `struct loop_config`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Config {
    file: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}
const _: () = assert!(size_of::<Config>() == 304);

impl Info {
    /// The name that the device was given.
    pub(super) fn name(&self) -> String {
        let len = self.file_name.iter().position(|&byte| byte == 0).unwrap_or(self.file_name.len());
        String::from_utf8_lossy(&self.file_name[..len]).into_owned()
    }
}

/// Attaches `file` with all settings in one step (kernel 5.8). EBUSY: the device has a file already.
pub(super) fn configure(
    device: BorrowedFd<'_>,
    file: &File,
    block_size: u32,
    read_only: bool,
    label: &[u8],
) -> io::Result<()> {
    let mut config = Config::zeroed();
    config.file = file.as_raw_fd().cast_unsigned();
    config.block_size = block_size;
    config.info.flags = FLAG_DIRECT_IO | if read_only { FLAG_READ_ONLY } else { 0 };
    let len = label.len().min(63);
    config.info.file_name[..len].copy_from_slice(&label[..len]);
    // SAFETY: the ioctl reads one struct loop_config, which lives through the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Detaches, on a descriptor of the caller's choice: `loopdev-3` opens its own without O_EXCL. The driver sets
/// FLAG_AUTOCLEAR, so that it happens when the last descriptor is closed.
pub(super) fn clear(device: &File) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes FLAG_AUTOCLEAR back.
pub(super) fn stay_attached(device: &File) -> io::Result<()> {
    let mut info = status_of(device)?;
    info.flags &= !FLAG_AUTOCLEAR;
    // SAFETY: the ioctl reads one struct loop_info64, which lives through the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Status of an attached device; ENXIO when nothing is attached.
pub(super) fn status(device: BorrowedFd<'_>) -> io::Result<Info> {
    let mut info = Info::zeroed();
    // SAFETY: the ioctl writes one struct loop_info64, which lives through the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info)
}

/// Status of an opened device.
pub(super) fn status_of(device: &File) -> io::Result<Info> {
    status(device.as_fd())
}

//! Writing out a file system that is mounted while it is committed.
//!
//! What a container has written stands in the kernel's memory until it is written out; a snapshot of the device would not
//! have it. The file system is not frozen: a process that dies would leave it so for ever. A snapshot taken a moment later
//! holds all that was written before, and its journal is replayed when a clone of it is mounted.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::daemon::mounts::{Use, device_number, mount_of, users};

/// Writes out what is mounted from `device`, in whichever mount namespace; nothing when it is not mounted. Answers whether it
/// is.
///
/// # Errors
/// When it cannot be written.
pub fn settle(device: &Path) -> io::Result<bool> {
    if !is_mounted(device)? {
        return Ok(false);
    }
    let number = device_number(device)?;
    let own = mount_of(device)?.map(|mount| mount.mount_point);
    let directory = own.or_else(|| users(device, &[]).iter().find_map(directory_of));
    match directory.map(|directory| File::open(&directory)) {
        Some(Ok(directory)) if file_system_of(&directory)? == number => rustix::fs::syncfs(&directory)?,
        // It hangs in no namespace that can be looked into, or has just moved: all file systems are written then.
        _ => rustix::fs::sync(),
    }
    Ok(true)
}

/// Only what is not mounted can be opened for oneself alone.
fn is_mounted(device: &Path) -> io::Result<bool> {
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(true),
        Err(error) => Err(error),
    }
}

fn directory_of(used: &Use) -> Option<PathBuf> {
    match used {
        Use::Mounted { directory, elsewhere: None, .. } => Some(directory.clone()),
        Use::Mounted { directory, elsewhere: Some((process, _)), .. } => {
            let within = directory.strip_prefix("/").unwrap_or(directory);
            Some(Path::new("/proc").join(process.to_string()).join("root").join(within))
        }
        Use::Open(..) => None,
    }
}

/// Another may be mounted over it. Btrfs has a number of its own, and is written with all others.
fn file_system_of(directory: &File) -> io::Result<(u32, u32)> {
    let device = rustix::fs::fstat(directory)?.st_dev;
    Ok((rustix::fs::major(device), rustix::fs::minor(device)))
}

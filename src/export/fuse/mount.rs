//! The FUSE mount: a directory that only root can enter, seen by the loop driver and nobody else.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::error::{Error, Result};

/// A mounted file system of ours and the descriptor that serves it.
#[derive(Debug)]
#[must_use = "an unmount tells whether somebody still uses it"]
pub(crate) struct Mount {
    fuse: File,
    directory: PathBuf,
    /// The kernel's name of the connection: the minor number of the file system's device.
    connection: Option<u32>,
    mounted: bool,
}

/// Minor number of what is mounted on `directory`. Not from stat, which would ask a server that does not run yet.
fn connection_of(mountinfo: &str, directory: &Path) -> Option<u32> {
    let mount = mountinfo.lines().rev().find(|line| line.split(' ').nth(4).map(Path::new) == Some(directory))?;
    mount.split(' ').nth(2)?.strip_prefix("0:")?.parse().ok()
}

/// A front that was killed leaves a mount that answers nothing but ENOTCONN, not even to being made again.
fn detach_dead(directory: &Path) {
    while matches!(fs::metadata(directory), Err(error) if error.raw_os_error() == Some(libc::ENOTCONN)) {
        if rustix::mount::unmount(directory, UnmountFlags::DETACH).is_err() {
            break;
        }
        tracing::info!(directory = %directory.display(), "removed the mount of a front that died");
    }
}

impl Mount {
    /// Mounts on `directory`, which is made, and made private, when need be. The kernel's INIT can be read afterwards.
    ///
    /// # Errors
    /// What the host answers; [`Error::NotFound`] where there is no FUSE.
    pub(crate) fn new(name: &str, directory: &Path, transfer_bytes: usize) -> Result<Self> {
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::NotFound("/dev/fuse does not exist: this kernel has no FUSE, or its module is not loaded".into())
            }
            _ => Error::io("opening /dev/fuse", error),
        })?;
        let at = |what: &str| format!("{what} {}", directory.display());
        detach_dead(directory);
        fs::create_dir_all(directory).map_err(|error| Error::io(at("making directory"), error))?;
        fs::set_permissions(directory, Permissions::from_mode(0o700))
            .map_err(|error| Error::io(at("making private"), error))?;
        let options = format!(
            "fd={},rootmode=40700,user_id=0,group_id=0,default_permissions,max_read={transfer_bytes}",
            fuse.as_raw_fd()
        );
        let options = CString::new(options).map_err(|error| Error::InvalidInput(error.to_string()))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
        rustix::mount::mount(name, directory, "fuse.plywood", flags, &*options)
            .map_err(|errno| Error::io(at("mounting"), errno.into()))?;
        let connection = fs::canonicalize(directory.parent().unwrap_or(directory))
            .and_then(|parent| Ok((parent, fs::read_to_string("/proc/self/mountinfo")?)))
            .ok()
            .and_then(|(parent, mountinfo)| connection_of(&mountinfo, &parent.join(directory.file_name()?)));
        Ok(Self { fuse, directory: directory.to_owned(), connection, mounted: true })
    }

    /// /dev/fuse, of this mount.
    pub(crate) fn fuse(&self) -> BorrowedFd<'_> {
        self.fuse.as_fd()
    }

    /// Where it is mounted.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends the session for those who still hold it, in another mount namespace. Needs /sys/fs/fuse/connections.
    pub(crate) fn abort(&self) {
        if let Some(connection) = self.connection {
            let path = format!("/sys/fs/fuse/connections/{connection}/abort");
            if let Err(error) = fs::write(&path, "1") {
                tracing::debug!(path, %error, "cannot abort the FUSE connection");
            }
        }
    }

    /// Unmounts.
    ///
    /// # Errors
    /// [`Error::Busy`] while a file in it is open, as it is under each attached device.
    pub(crate) fn unmount(&mut self) -> Result<()> {
        if self.mounted {
            rustix::mount::unmount(&self.directory, UnmountFlags::empty()).map_err(|errno| match errno {
                rustix::io::Errno::BUSY => {
                    Error::Busy(format!("{} is in use: a volume is still attached", self.directory.display()))
                }
                _ => Error::io(format!("unmounting {}", self.directory.display()), errno.into()),
            })?;
            self.mounted = false;
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            // Whoever has a file open keeps it until the descriptor is closed, and gets errors then.
            if let Err(error) = rustix::mount::unmount(&self.directory, UnmountFlags::DETACH) {
                tracing::warn!(directory = %self.directory.display(), %error, "cannot unmount");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_is_that_of_the_last_mount_on_the_directory() {
        let mountinfo = "\
36 22 0:38 / /run/p rw - fuse.plywood plywood:a rw
37 22 0:39 / /run/p rw - fuse.plywood plywood:a rw
38 22 0:40 / /run/other rw - fuse.plywood plywood:b rw
";
        assert_eq!(connection_of(mountinfo, Path::new("/run/p")), Some(39));
        assert_eq!(connection_of(mountinfo, Path::new("/run")), None);
    }
}

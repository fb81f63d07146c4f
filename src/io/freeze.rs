//! Holding a mounted file system still: `FIFREEZE` and `FITHAW` of `linux/fs.h`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

// _IOWR('X', 119, int) and _IOWR('X', 120, int); libc does not have them.
const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;

/// A file system that takes no writes until [`thaw`](Frozen::thaw); dropping thaws it too.
#[derive(Debug)]
#[must_use]
pub struct Frozen(Option<File>);

impl Frozen {
    /// Writes out the file system mounted on `mount_point` and holds it still.
    ///
    /// # Errors
    /// What the kernel says: not root, not supported, or frozen already (`EBUSY`).
    pub fn freeze(mount_point: &Path) -> io::Result<Self> {
        let directory = File::open(mount_point)?;
        freeze_ioctl(&directory, FIFREEZE)?;
        Ok(Self(Some(directory)))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// What the kernel says; the file system may be frozen still.
    pub fn thaw(mut self) -> io::Result<()> {
        self.0.take().map_or(Ok(()), |directory| freeze_ioctl(&directory, FITHAW))
    }

    /// Lets the file system of `directory` go on if somebody has frozen it, who has died since.
    ///
    /// # Errors
    /// What the kernel says; the file system may be frozen still.
    pub fn thaw_left(directory: &File) -> io::Result<()> {
        match freeze_ioctl(directory, FITHAW) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            answer => answer,
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(directory) = self.0.take()
            && let Err(error) = freeze_ioctl(&directory, FITHAW)
        {
            tracing::error!(%error, "file system stays frozen; thaw it with fsfreeze -u");
        }
    }
}

fn freeze_ioctl(directory: &File, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: both requests ignore their argument (0), and touch no memory of this process; the descriptor is open.
    if unsafe { libc::ioctl(directory.as_raw_fd(), request, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freezing_what_cannot_be_frozen_is_refused() {
        let error = Frozen::freeze(Path::new("/proc/self")).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }

    #[test]
    fn what_is_not_frozen_is_thawed_already() {
        let thawed = Frozen::thaw_left(&File::open("/proc/self").unwrap());
        // EINVAL to root, EPERM to others.
        assert!(thawed.is_ok() || thawed.unwrap_err().raw_os_error() == Some(libc::EPERM));
    }
}

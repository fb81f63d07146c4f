//! The second lock of rule O9: an open-file-description lock on the pool's first byte.
//!
//! `flock` on the description that does the pool's I/O says that an engine is at work, and io_uring keeps it until the
//! last operation has ended. This lock, on a description of its own that does no I/O, says *who may start an engine*:
//! a front holds it for its whole life, a command that works on the file directly while it does. The two kinds of lock
//! do not see each other (`fcntl(2)`, "Open file description locks").

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The right to start an engine on a pool, held until dropped. Children inherit it only with the descriptor.
#[derive(Debug)]
#[must_use]
pub struct RangeLock(File);

impl RangeLock {
    /// Takes the lock with `file`, which must be open for writing, or says [`io::ErrorKind::WouldBlock`] at once.
    ///
    /// # Errors
    /// `WouldBlock` when somebody has it; and what fcntl(2) says.
    pub fn try_take(file: File) -> io::Result<Self> {
        lock(file.as_fd(), libc::F_OFD_SETLK).map(|_| Self(file))
    }

    /// Whether somebody has the lock on the file that `file` is open on.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn is_taken(file: BorrowedFd<'_>) -> io::Result<bool> {
        lock(file, libc::F_OFD_GETLK).map(|found| i32::from(found.l_type) != libc::F_UNLCK)
    }

    /// The file the lock was taken with.
    pub fn file(&self) -> &File {
        &self.0
    }
}

fn lock(file: BorrowedFd<'_>, operation: libc::c_int) -> io::Result<libc::flock> {
    // SAFETY: `flock` is plain integers, for which zeros are valid; fcntl asks for l_pid 0.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::F_WRLCK as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    range.l_start = 0;
    range.l_len = 1;
    // SAFETY: the descriptor is borrowed for the call, and `range` is a `flock` that outlives it, as both operations want.
    if unsafe { libc::fcntl(file.as_raw_fd(), operation, &mut range) } == -1 {
        let error = io::Error::last_os_error();
        // fcntl may say either for a lock that somebody has.
        let taken = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
        return Err(if taken { io::ErrorKind::WouldBlock.into() } else { error });
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_description_has_the_lock_until_it_is_dropped() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(path.path()).unwrap();
        let held = RangeLock::try_take(open()).unwrap();
        assert_eq!(RangeLock::try_take(open()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(RangeLock::is_taken(open().as_fd()).unwrap());
        drop(held);
        assert!(!RangeLock::is_taken(open().as_fd()).unwrap());
        assert!(RangeLock::try_take(open()).is_ok());
    }

    #[test]
    fn flock_on_the_same_file_is_another_lock() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(path.path()).unwrap();
        let engine = open();
        rustix::fs::flock(&engine, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(RangeLock::try_take(open()).is_ok());
    }
}

//! The two locks of a pool's file; see the [module](super) for what each is for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::error::{Error, Result};

/// Time between two tries of a lock that is waited for. A successor must resume I/O in far less than a second.
const RETRY: Duration = Duration::from_millis(1);

/// The claim on a pool, held by its front on a description of its own: while it lives, only an engine that knows of it
/// opens the pool. It does no I/O.
#[derive(Debug)]
pub struct PoolClaim {
    file: File,
}

impl PoolClaim {
    /// Takes the claim on the pool at `path`, waiting at most `wait` for another holder to go.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody else has it; [`Error::NotFound`]; what opening answers.
    pub fn acquire(path: &Path, wait: Duration) -> Result<Self> {
        let file = super::pool_file::open_existing(path, libc::O_RDWR)?;
        take(path, wait, || try_claim(&file, true))?;
        Ok(Self { file })
    }

    /// Another handle to the same claim: it lasts as long as one of them.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.file.try_clone().map(|file| Self { file })
    }

    /// The description that holds it, for a program that this process becomes.
    pub fn into_descriptor(self) -> OwnedFd {
        self.file.into()
    }

    /// Goes on with a claim that this process held before it became another program.
    ///
    /// # Errors
    /// [`Error::Io`] when it is not held.
    pub fn inherit(descriptor: OwnedFd) -> Result<Self> {
        let file = File::from(descriptor);
        // On the same description this changes nothing.
        try_claim(&file, true).map_err(|error| Error::io("the claim on the pool is not held", error))?;
        Ok(Self { file })
    }
}

/// Tries `attempt` until it succeeds or `wait` has passed.
pub(in crate::io) fn take(path: &Path, wait: Duration, mut attempt: impl FnMut() -> io::Result<()>) -> Result<()> {
    let deadline = Instant::now() + wait;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if is_held(&error) => {
                if Instant::now() >= deadline {
                    return Err(Error::Busy(format!("pool {} is in use", path.display())));
                }
                std::thread::sleep(RETRY);
            }
            Err(error) => return Err(Error::io(format!("locking pool {}", path.display()), error)),
        }
    }
}

/// Whether an error says that somebody else has the lock, or the device.
pub(super) fn is_held(error: &io::Error) -> bool {
    // EWOULDBLOCK is EAGAIN on Linux; fcntl locks may answer EACCES instead (POSIX).
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES | libc::EBUSY))
}

/// Takes the claim on `file`'s description: alone, or together with others that only read.
pub(in crate::io) fn try_claim(file: &File, exclusive: bool) -> io::Result<()> {
    ofd_lock(file.as_raw_fd(), if exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Takes the fence on `file`'s description: alone, or together with others that only read.
pub(in crate::io) fn try_fence(file: &File, exclusive: bool) -> io::Result<()> {
    let operation =
        if exclusive { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
    Ok(rustix::fs::flock(file, operation)?)
}

/// Lets go of both locks. To be called when the last operation on the description has ended: closing the descriptor is
/// not enough, because a ring may keep the description for a while.
pub(in crate::io) fn release(fd: BorrowedFd<'_>) {
    if let Err(error) = rustix::fs::flock(fd, FlockOperation::Unlock) {
        tracing::warn!(%error, "cannot unlock the pool's file");
    }
    if let Err(error) = ofd_lock(fd.as_raw_fd(), libc::F_UNLCK) {
        tracing::warn!(%error, "cannot give up the claim on the pool's file");
    }
}

fn ofd_lock(fd: i32, kind: i32) -> io::Result<()> {
    // SAFETY: `flock` is a struct of integers, for which zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // Start and length 0 mean the whole file, however long it grows.
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the kernel reads one `flock`, which lives until the call returns.
    if unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

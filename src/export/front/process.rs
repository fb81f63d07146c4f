//! What a process that serves block devices owes the kernel, before it makes its first thread.

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::error::{Error, Result};

/// Tells the kernel that this process is in the path of writeback (`PR_SET_IO_FLUSHER`): its allocations never wait for
/// writeback to the devices that it serves. Inherited by threads and children that are made later, and kept by exec.
///
/// # Errors
/// Without CAP_SYS_RESOURCE.
pub fn become_io_flusher() -> Result<()> {
    rustix::process::configure_io_flusher_behavior(true)
        .map_err(|errno| Error::io("becoming an I/O flusher (needs CAP_SYS_RESOURCE)", errno.into()))
}

/// Keeps every page in memory that is touched from now on, or has been: none may have to be read back from a device that
/// waits for this very process.
///
/// # Errors
/// Without CAP_IPC_LOCK.
pub fn lock_memory() -> Result<()> {
    // ONFAULT: the payloads' memory is locked piece by piece, as it is used, instead of all at once.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        .map_err(|errno| Error::io("locking memory (needs CAP_IPC_LOCK)", errno.into()))
}

/// Enters a mount namespace of its own, into which no mount made later outside comes: a process that shares the namespace
/// with mounts of its own devices can deadlock with itself at exit. To be called before the first thread is made.
///
/// # Errors
/// Without CAP_SYS_ADMIN.
pub fn enter_own_mount_namespace() -> Result<()> {
    // SAFETY: only the namespace changes; the descriptor table and the working directory stay shared as they are.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(|errno| Error::io("entering a mount namespace (needs CAP_SYS_ADMIN)", errno.into()))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|errno| Error::io("making mounts private", errno.into()))
}

//! What the service manager that started a daemon is told, where one did (`NOTIFY_SOCKET`, sd_notify(3)).
//!
//! The front says it, which is the unit's main process and stays so through every upgrade; engine processes say nothing.
//! A manager that cannot be told is no reason to stop serving.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use sd_notify::NotifyState;

use crate::error::{Error, Result};
use crate::export::link;

/// Under this name it keeps the memory of pending changes.
const PENDING: &str = "plywood-pending";

/// The pool is served: what is ordered after the unit may begin.
pub fn ready(pool: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("serving pool {pool}"))]);
}

/// A signal to stop has come. The end may take as long as something is in use.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping when nothing is in use any more")]);
}

/// For `systemctl status`: this daemon ends, and its devices give errors.
pub fn gave_up() {
    tell(&[NotifyState::Status("engine processes died one after the other; given up")]);
}

/// Another process, which goes on from before a restart of the unit, is its main process, and serves.
pub fn goes_on(pool: &str, main_process: u32) {
    let status = format!("serving pool {pool}");
    tell(&[NotifyState::MainPid(main_process), NotifyState::Ready, NotifyState::Status(&status)]);
}

/// The socket that a manager listens on for this process (`.socket` units), where there is one; to be called once.
///
/// # Errors
/// When what it gave is no unix socket.
pub fn given_listener() -> Result<Option<UnixListener>> {
    let failed = |error| Error::io("the service manager's socket", error);
    let Some(descriptor) = sd_notify::listen_fds().map_err(failed)?.next() else { return Ok(None) };
    let listener = UnixListener::from(link::adopt(descriptor)?);
    listener.local_addr().map_err(failed)?;
    Ok(Some(listener))
}

/// Whether a manager started this process.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty())
}

/// The manager keeps `memory`, and nothing else under its name, until the unit has ended for good: beyond the death of all
/// its processes.
pub fn keep_instead(memory: BorrowedFd<'_>) {
    tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(PENDING)]);
    if let Err(error) = sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(PENDING)], &[memory]) {
        tracing::warn!(%error, "the service manager cannot keep the memory of pending changes");
    }
}

/// What it kept, handed to this process; to be called once.
pub fn handed_back() -> Option<OwnedFd> {
    let given = sd_notify::listen_fds_with_names();
    let given = given.inspect_err(|error| tracing::warn!(%error, "descriptors of the service manager")).ok()?;
    // Others are closed: nobody asked for them.
    let taken = given.filter_map(|(descriptor, name)| Some((link::adopt(descriptor).ok()?, name))).collect::<Vec<_>>();
    taken.into_iter().find(|(_, name)| name == PENDING).map(|(descriptor, _)| descriptor)
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

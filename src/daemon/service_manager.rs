//! What the service manager that started a daemon is told, where one did (`NOTIFY_SOCKET`, sd_notify(3)).
//!
//! The front says it, which is the unit's main process and stays so through every upgrade; engine processes say nothing.
//! A manager that cannot be told is no reason to stop serving.

use sd_notify::NotifyState;

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

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

//! Loop devices that are ready before anybody wants them.
//!
//! A device that was never used has to be set up as volumes want it, and each of two settings freezes its queue: some 50 ms
//! on Linux 6.18, against 5 ms for everything else that attaching takes. So after every attach a few free ones are made ready,
//! beside everything else.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;

use crate::error::{Error, Result};

/// Free devices that are kept ready: what a burst may take until more are.
pub(super) const SPARES: usize = 4;

/// The way to the thread that sees to it.
#[derive(Debug)]
pub(super) struct Spares(SyncSender<()>);

impl Spares {
    /// Starts the thread; `prepare` has free devices ready.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn start(prepare: impl Fn() -> Result<()> + Send + 'static) -> Result<Self> {
        // One that waits stands for all that were taken since.
        let (taken, wanted) = sync_channel(1);
        let run = move || {
            for () in wanted {
                if let Err(error) = prepare() {
                    tracing::warn!("no loop devices are made ready ahead: {error}");
                }
            }
        };
        let spawned = thread::Builder::new().name("spares".into()).spawn(run);
        spawned.map(|_| Self(taken)).map_err(|error| Error::io("starting a thread", error))
    }

    /// Devices were taken, or there may be none yet. Never waits.
    pub(super) fn see(&self) {
        if let Err(TrySendError::Disconnected(())) = self.0.try_send(()) {
            tracing::debug!("nobody makes loop devices ready");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn devices_are_made_ready_once_for_all_that_were_taken_meanwhile() {
        let (begun, seen) = channel();
        let (go_on, wait) = sync_channel::<()>(0);
        let spares = Spares::start(move || {
            begun.send(()).unwrap();
            wait.recv().unwrap();
            Ok(())
        })
        .unwrap();
        spares.see();
        seen.recv().unwrap();
        (0..10).for_each(|_| spares.see());
        go_on.send(()).unwrap();
        seen.recv().unwrap();
        go_on.send(()).unwrap();
        assert!(seen.recv_timeout(Duration::from_millis(100)).is_err(), "ten are one");
    }
}

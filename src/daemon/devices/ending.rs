//! How an engine process ends: by a signal, by a client's stop, with its front, or by a successor.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

use super::{Daemon, LOOK_AGAIN, number, spawn};
use crate::daemon::events::Draft;
use crate::daemon::process;
use crate::daemon::protocol::{Detached, EventKind, Kept};
use crate::error::{Error, Result};
use crate::export::link::{EXIT_FINISHED, EXIT_INCOMPATIBLE, EXIT_REPLACE_FRONT, versions};
use crate::export::loopdev::helper::LoopCommand;

impl Daemon {
    /// SIGTERM stops, a second one whatever is in use. SIGINT is the front's: the terminal sends it to both.
    pub(super) fn watch(self: &Arc<Self>, mut signals: Signals) {
        for signal in signals.forever() {
            if signal == SIGINT {
                continue;
            }
            if !self.front_lives() {
                tracing::error!("the front has died, and its devices with it");
                self.finish(EXIT_FINISHED);
                return;
            }
            let force = self.stopping.load(Ordering::Acquire);
            let daemon = Arc::clone(self);
            let begun = spawn("stop", move || {
                if force {
                    daemon.forced.store(true, Ordering::Release);
                } else {
                    daemon.stop_when_free();
                }
            });
            if let Err(error) = begun {
                tracing::error!("stop: {error}");
            }
        }
    }

    pub(super) fn front_lives(&self) -> bool {
        let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().get().unsigned_abs());
        parent == Some(self.front_pid) && !process::is_ending(self.front_pid)
    }

    /// Has this process succeeded, when the program on disk can.
    pub(super) fn upgrade(self: &Arc<Self>) -> Result<()> {
        let program = std::env::args_os().next().unwrap_or_default();
        let said = std::process::Command::new(&program)
            .args(["engine", "--succeeds", &versions()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        match said {
            Ok(status) if status.success() => {}
            // Nothing of the memory is kept where the front is replaced as well.
            Ok(status) if status.code() == Some(EXIT_INCOMPATIBLE) && self.is_unused()? => {}
            Ok(status) if status.code() == Some(EXIT_INCOMPATIBLE) => {
                return Err(Error::Incompatible(format!(
                    "{} does not read what this daemon keeps in memory; detach its volumes, then upgrade again",
                    program.display()
                )));
            }
            Ok(status) => {
                return Err(Error::InvalidInput(format!("{} cannot serve: it ended with {status}", program.display())));
            }
            Err(error) => return Err(Error::io(format!("starting {}", program.display()), error)),
        }
        let daemon = Arc::clone(self);
        spawn("upgrade", move || {
            // Attaching and detaching are not cut in half.
            let _devices = daemon.devices.all();
            if daemon.is_unused().unwrap_or(false) {
                tracing::info!("nothing is attached: the front is replaced as well");
                daemon.replacing.store(true, Ordering::Release);
                daemon.finish(EXIT_REPLACE_FRONT);
                return;
            }
            tracing::info!("handing over to a successor; the front stays, for the devices that are attached");
            match daemon.remote.call(|engine| async move { engine.hand_over().await }) {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => tracing::error!("handing over: {error}"),
            }
        })
    }

    /// Whether the front can be replaced: it takes its devices with it.
    fn is_unused(&self) -> Result<bool> {
        Ok(self.replaceable && self.attachments()?.is_empty())
    }

    /// A client's stop. Refused while something is in use, unless forced: the client can see to that.
    pub(super) fn stop(self: &Arc<Self>, force: bool) -> Result<()> {
        if force {
            self.forced.store(true, Ordering::Release);
        } else {
            for attachment in self.attachments()?.into_values() {
                let users = self.users(&attachment);
                let (name, device) = (&attachment.name, attachment.device.display());
                if !users.is_empty() {
                    return Err(Error::Busy(format!(
                        "{name} ({device}) is {users}; unmount it first, or lose it with --force"
                    )));
                }
                self.helpers.run(&LoopCommand::CheckFree { number: number(&attachment.device)? }).map_err(|error| match error {
                    Error::Busy(_) => Error::Busy(format!(
                        "{name} ({device}) is mounted where it cannot be seen, by an import under way perhaps; let it end, or \
                         lose it with --force"
                    )),
                    error => error,
                })?;
            }
        }
        let daemon = Arc::clone(self);
        spawn("stop", move || daemon.stop_when_free())
    }

    /// Takes no new work, detaches what is free, says what is not and where, until nothing is left.
    fn stop_when_free(&self) {
        if self.stopping.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::info!("stopping");
        self.events.post(Draft::new(EventKind::Stopping, "the daemon stops when nothing is in use any more"));
        let mut said = Vec::new();
        loop {
            match self.detach_all(false) {
                Ok(Detached { kept, .. }) if kept.is_empty() => break,
                Ok(Detached { kept, .. }) => {
                    if said != kept {
                        for Kept { name, device, reason } in &kept {
                            tracing::warn!(volume = %name, "{} stays until it is free: {reason}", device.display());
                        }
                    }
                    said = kept;
                }
                Err(error) => tracing::error!("detaching: {error}"),
            }
            if self.forced.load(Ordering::Acquire) {
                tracing::error!("stopping with {} devices in use; they give errors from now on", said.len());
                break;
            }
            thread::sleep(LOOK_AGAIN);
        }
        self.finish(EXIT_FINISHED);
    }

    fn finish(&self, status: i32) {
        match self.remote.call(move |engine| async move { engine.finish(status).await }) {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => tracing::error!("closing the pool: {error}"),
        }
    }
}

//! The kernel's switch for FUSE over io_uring, `fuse.enable_uring`: off by default, and of the whole machine.
//!
//! A session needs it only while it negotiates: the kernel asks a session's own flag afterwards. So it is set back as soon
//! as the session's rings are registered, not at the session's end: a front that is killed leaves nothing behind.
//! Fronts that start at the same time take turns, by a lock on the parameter's file.

use std::fs::{self, File};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// Holds the switch on, and sets it back when dropped.
#[derive(Debug)]
pub(crate) struct UringSwitch {
    _turn: File,
    was_off: bool,
}

impl UringSwitch {
    /// Switches it on where it is off.
    ///
    /// # Errors
    /// [`Error::Incompatible`] on kernels without FUSE over io_uring (before 6.14), or what the host answers.
    pub(crate) fn on() -> Result<Self> {
        let turn = File::open(PARAMETER).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Incompatible("this kernel has no FUSE over io_uring".into()),
            _ => Error::io(format!("opening {PARAMETER}"), error),
        })?;
        flock(&turn, FlockOperation::LockExclusive)
            .map_err(|errno| Error::io(format!("locking {PARAMETER}"), errno.into()))?;
        let value = fs::read_to_string(PARAMETER).map_err(|error| Error::io(format!("reading {PARAMETER}"), error))?;
        let was_off = value.trim() != "Y";
        if was_off {
            tracing::info!("switching fuse.enable_uring on for the negotiation");
            fs::write(PARAMETER, "Y").map_err(|error| Error::io(format!("writing {PARAMETER}"), error))?;
        }
        Ok(Self { _turn: turn, was_off })
    }
}

impl Drop for UringSwitch {
    fn drop(&mut self) {
        if self.was_off {
            match fs::write(PARAMETER, "N") {
                Ok(()) => tracing::info!("fuse.enable_uring is off again"),
                Err(error) => tracing::warn!(%error, "cannot switch fuse.enable_uring off again"),
            }
        }
    }
}

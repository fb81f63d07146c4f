//! A front that becomes the program on disk: exec in place, with nothing attached.
//!
//! The process stays the same, for the service manager as for those who wait, and the two things that must not be let go of
//! meanwhile stay open: the claim on the pool, so that nobody opens it in between, and the listening socket, so that commands
//! wait instead of failing. Everything else is made anew.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use command_fds::CommandFdExt;
use serde::{Deserialize, Serialize};

use super::front_process::ControlSocket;
use super::lookup::FoundPool;
use crate::error::{Error, Result};
use crate::export::link;
use crate::io::PoolClaim;

/// The environment variable that says which descriptor is which.
const VARIABLE: &str = "PLYWOOD_FRONT_BECOMES";

/// What the former program leaves open.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Inherited {
    /// The process that is meant; children inherit the variable, too.
    process: u32,
    claim: RawFd,
    listener: RawFd,
}

/// Whether this process was a front already, as another program.
pub fn is_successor() -> bool {
    matches!(Inherited::take(), Ok(Some(_)))
}

impl Inherited {
    /// What was left for this process, if anything.
    ///
    /// # Errors
    /// When it cannot be understood.
    pub(super) fn take() -> Result<Option<Self>> {
        let Some(text) = std::env::var_os(VARIABLE) else { return Ok(None) };
        let inherited: Self = serde_json::from_str(&text.to_string_lossy())
            .map_err(|error| Error::Incompatible(format!("{VARIABLE}: {error}")))?;
        Ok(Some(inherited).filter(|inherited| inherited.process == std::process::id()))
    }

    /// The claim and the socket; to be called once.
    ///
    /// # Errors
    /// When they are not what they are said to be.
    pub(super) fn into_parts(self, pool: &FoundPool) -> Result<(PoolClaim, ControlSocket)> {
        let claim = PoolClaim::inherit(link::adopt(self.claim)?)?;
        Ok((claim, ControlSocket::inherit(pool, link::adopt(self.listener)?)))
    }

    /// Becomes `program`, with the arguments of this one. Comes back with an error only.
    pub(super) fn pass_on(program: &Path, claim: PoolClaim, control: &ControlSocket) -> Error {
        let failed = |error| Error::io(format!("becoming {}", program.display()), error);
        let listener = match control.listener.try_clone() {
            Ok(listener) => listener,
            Err(error) => return failed(error),
        };
        let claim = claim.into_descriptor();
        let (process, claim_number) = (std::process::id(), claim.as_raw_fd());
        let inherited = Self { process, claim: claim_number, listener: listener.as_raw_fd() };
        let text = serde_json::to_string(&inherited).expect("numbers become JSON");
        let mut command = Command::new(program);
        // What was to be taken over is this host's by now, and whether it is cannot be asked of oneself.
        let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--take-over");
        command.args(arguments).env(VARIABLE, text).preserved_fds(vec![claim, listener]);
        // These descriptors are taken and closed; their numbers are others' by now.
        for taken in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(taken);
        }
        failed(command.exec())
    }
}

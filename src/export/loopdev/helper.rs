//! Loop devices by way of a short-lived process.
//!
//! The engine process asks for attach and detach, but must not do them itself: it would wait in the kernel for an answer
//! that only it can give, and if it were killed then, it could neither die nor be succeeded. The helper belongs to
//! nobody's request path. It goes on when the engine dies, and what it has attached is found by [`list`](super::list).

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{AttachRequest, Attached, WaitingWrites};
use crate::error::{Error, Result};
use crate::export::link::LINK_VARIABLE;

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoopCommand {
    /// [`attach`](super::attach).
    Attach(AttachRequest),
    /// [`detach`](super::detach).
    Detach {
        /// N of /dev/loopN.
        number: u32,
    },
    /// [`check_free`](super::check_free).
    CheckFree {
        /// N of /dev/loopN.
        number: u32,
    },
    /// [`grow`](super::grow).
    Grow {
        /// N of /dev/loopN.
        number: u32,
        /// The volume's file.
        file: PathBuf,
        /// Its new size.
        size_bytes: u64,
    },
    /// [`prepare`](super::prepare).
    Prepare {
        /// Free devices that are to be ready.
        spares: usize,
    },
    /// Sets the queue of a device as is best for its volume.
    Tune {
        /// N of /dev/loopN.
        number: u32,
        /// Set where its writes wait when the pool is full.
        waiting: Option<WaitingWrites>,
    },
    /// [`list`](super::list).
    List {
        /// The pool.
        pool: Uuid,
        /// The front's directory.
        directory: PathBuf,
    },
}

/// What came of it: the devices that the command was about, or why not.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LoopAnswer {
    Done(Vec<Attached>),
    Failed { kind: Kind, message: String, errno: Option<i32> },
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Busy,
    NotFound,
    InvalidInput,
    Incompatible,
    NoSpace,
    Io,
}

/// Does a command in this process.
///
/// # Errors
/// Those of the command.
pub fn execute(command: &LoopCommand) -> Result<Vec<Attached>> {
    match command {
        LoopCommand::Attach(request) => super::attach(request).map(|attached| vec![attached]),
        LoopCommand::Detach { number } => super::detach(*number).map(|()| Vec::new()),
        LoopCommand::CheckFree { number } => super::check_free(*number).map(|()| Vec::new()),
        LoopCommand::Grow { number, file, size_bytes } => super::grow(*number, file, *size_bytes).map(|()| Vec::new()),
        LoopCommand::Prepare { spares } => super::prepare(*spares).map(|()| Vec::new()),
        LoopCommand::Tune { number, waiting } => {
            super::tune(*number, *waiting);
            Ok(Vec::new())
        }
        LoopCommand::List { pool, directory } => super::list(*pool, directory),
    }
}

/// The helper's main: one command as JSON on standard input, its answer on standard output.
///
/// # Errors
/// When it cannot read or write those; what the command itself meets is in the answer.
pub fn serve_one() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| Error::io("reading the command", error))?;
    let command = serde_json::from_str(&text).map_err(|error| Error::InvalidInput(error.to_string()))?;
    let answer = match execute(&command) {
        Ok(devices) => LoopAnswer::Done(devices),
        Err(error) => failure(&error),
    };
    let text = serde_json::to_string(&answer).map_err(|error| Error::InvalidInput(error.to_string()))?;
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| Error::io("writing the answer", error))
}

/// Does a command in a process of `program`, whose `subcommand` calls [`serve_one`]. Blocks: for a control thread.
///
/// # Errors
/// Those of the command, and those of starting a process.
pub fn run(program: &Path, subcommand: &[&OsStr], command: &LoopCommand) -> Result<Vec<Attached>> {
    let failed = |error| Error::io("running the loop helper", error);
    let text = serde_json::to_string(command).map_err(|error| Error::InvalidInput(error.to_string()))?;
    let mut child = Command::new(program)
        .args(subcommand)
        .env_remove(LINK_VARIABLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    match serde_json::from_slice(&output.stdout) {
        Ok(LoopAnswer::Done(devices)) => Ok(devices),
        Ok(LoopAnswer::Failed { kind, message, errno }) => Err(error_of(kind, message, errno)),
        Err(_) => Err(Error::io("running the loop helper", std::io::Error::other(output.status.to_string()))),
    }
}

fn failure(error: &Error) -> LoopAnswer {
    let (kind, errno) = match error {
        Error::Busy(_) => (Kind::Busy, None),
        Error::NotFound(_) => (Kind::NotFound, None),
        Error::InvalidInput(_) => (Kind::InvalidInput, None),
        Error::Incompatible(_) => (Kind::Incompatible, None),
        Error::NoSpace(_) => (Kind::NoSpace, None),
        other => (Kind::Io, Some(other.errno())),
    };
    let message = match error {
        // The cause is carried as a number and named again on the other side.
        Error::Io { operation, .. } => operation.clone(),
        other => other.to_string(),
    };
    LoopAnswer::Failed { kind, message, errno }
}

fn error_of(kind: Kind, message: String, errno: Option<i32>) -> Error {
    match kind {
        Kind::Busy => Error::Busy(message),
        Kind::NotFound => Error::NotFound(message),
        Kind::InvalidInput => Error::InvalidInput(message),
        Kind::Incompatible => Error::Incompatible(message),
        Kind::NoSpace => Error::NoSpace(message),
        Kind::Io => Error::io(message, std::io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn travelled(error: &Error) -> Error {
        let text = serde_json::to_string(&failure(error)).unwrap();
        let LoopAnswer::Failed { kind, message, errno } = serde_json::from_str(&text).unwrap() else {
            panic!("a failure became a success")
        };
        error_of(kind, message, errno)
    }

    #[test]
    fn errors_keep_their_kind_and_words_on_the_way() {
        let busy = Error::Busy("mounted on /mnt".into());
        assert!(matches!(travelled(&busy), Error::Busy(message) if message == "mounted on /mnt"));
        let io = Error::io("opening /dev/loop7", std::io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(travelled(&io).to_string(), io.to_string());
        assert_eq!(travelled(&io).errno(), libc::EACCES);
    }

    #[test]
    fn commands_survive_json() {
        let command = LoopCommand::Grow { number: 3, file: "/a b".into(), size_bytes: 4096 };
        let text = serde_json::to_string(&command).unwrap();
        assert!(matches!(serde_json::from_str(&text).unwrap(), LoopCommand::Grow { number: 3, .. }));
    }
}

//! Loop devices by way of helper processes.
//!
//! The engine process asks for attach and detach, but must not do them itself: it would wait in the kernel for an answer
//! that only it can give, and if it were killed then, it could neither die nor be succeeded. A helper belongs to
//! nobody's request path. It does what it has begun when the engine dies, then it ends, since nobody asks any
//! more; a successor waits for that, and finds what it has attached by [`list`](super::list). Some are kept for the next
//! command: starting one takes as much of the processor as what it does.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

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

/// The helper's main: commands as lines of JSON on standard input, each answered by a line on standard output, until there
/// are no more.
///
/// # Errors
/// When it cannot read or write those; what a command itself meets is in the answer.
pub fn serve() -> Result<()> {
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| Error::io("reading a command", error))?;
        let command = serde_json::from_str(&line).map_err(|error| Error::InvalidInput(error.to_string()))?;
        let answer = match execute(&command) {
            Ok(devices) => LoopAnswer::Done(devices),
            Err(error) => failure(&error),
        };
        let text = serde_json::to_string(&answer).map_err(|error| Error::InvalidInput(error.to_string()))?;
        let written = writeln!(output, "{text}").and_then(|()| output.flush());
        written.map_err(|error| Error::io("writing the answer", error))?;
    }
    Ok(())
}

/// Helpers at a time: what the kernel does for one takes milliseconds, and more than some processors gain nothing.
const MOST: usize = 16;
/// Idle helpers that are kept.
const KEPT: usize = 2;

/// The helper processes of an engine process.
#[derive(Debug)]
pub struct Helpers {
    program: PathBuf,
    arguments: Vec<OsString>,
    state: Mutex<HelpersState>,
    /// A helper is idle, or there may be one more.
    available: Condvar,
}

#[derive(Debug, Default)]
struct HelpersState {
    idle: Vec<Helper>,
    count: usize,
    waiting: usize,
}

/// A process that waits for a command.
#[derive(Debug)]
struct Helper {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Helpers {
    /// Helpers are processes of `program`, which calls [`serve`] when it is given `arguments`.
    pub fn new(program: PathBuf, arguments: Vec<OsString>) -> Self {
        Self { program, arguments, state: Mutex::default(), available: Condvar::new() }
    }

    /// Has a command done. Blocks: for a control thread.
    ///
    /// # Errors
    /// Those of the command, and those of starting a process.
    pub fn run(&self, command: &LoopCommand) -> Result<Vec<Attached>> {
        let failed = |error| Error::io("running the loop helper", error);
        let mut text = serde_json::to_string(command).map_err(|error| failed(error.into()))?;
        text.push('\n');
        loop {
            let kept = self.take();
            let is_kept = kept.is_some();
            let helper = match kept {
                Some(helper) => Ok(helper),
                None => Helper::start(&self.program, &self.arguments).map_err(failed),
            };
            let sent = helper.and_then(|mut helper| match helper.send(&text) {
                Ok(()) => Ok(Some(helper)),
                // One that was kept and has died since has not read it.
                Err(_) if is_kept => Ok(None),
                Err(error) => Err(failed(error)),
            });
            let answer = match sent {
                Ok(Some(mut helper)) => helper.receive().map(|answer| (helper, answer)).map_err(failed),
                Ok(None) => {
                    self.give_back(None);
                    continue;
                }
                Err(error) => Err(error),
            };
            return match answer {
                Ok((helper, answer)) => {
                    self.give_back(Some(helper));
                    match answer {
                        LoopAnswer::Done(devices) => Ok(devices),
                        LoopAnswer::Failed { kind, message, errno } => Err(error_of(kind, message, errno)),
                    }
                }
                Err(error) => {
                    self.give_back(None);
                    Err(error)
                }
            };
        }
    }

    /// An idle helper; none where another is to be started, for which there is room then.
    fn take(&self) -> Option<Helper> {
        let mut state = self.state();
        loop {
            if let Some(helper) = state.idle.pop() {
                return Some(helper);
            }
            if state.count < MOST {
                state.count += 1;
                return None;
            }
            state.waiting += 1;
            state = self.available.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    /// Gives back a helper that was taken, or only its room when it is no more.
    fn give_back(&self, helper: Option<Helper>) {
        let mut state = self.state();
        let surplus = match helper {
            Some(helper) if state.waiting > 0 || state.idle.len() < KEPT => {
                state.idle.push(helper);
                None
            }
            gone => {
                state.count -= 1;
                gone
            }
        };
        drop(state);
        self.available.notify_one();
        // It waits for the process to end.
        drop(surplus);
    }

    fn state(&self) -> MutexGuard<'_, HelpersState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Helper {
    fn start(program: &Path, arguments: &[OsString]) -> io::Result<Self> {
        let mut child = Command::new(program)
            .args(arguments)
            .env_remove(LINK_VARIABLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().map(BufReader::new).ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { input: child.stdin.take(), output, child })
    }

    fn send(&mut self, text: &str) -> io::Result<()> {
        self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(text.as_bytes())
    }

    fn receive(&mut self) -> io::Result<LoopAnswer> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            let status = self.child.wait()?;
            return Err(io::Error::other(format!("it has ended: {status}")));
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.input.take());
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "a loop helper is not waited for");
        }
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
    fn helpers_are_kept_and_one_that_has_died_is_replaced() {
        // Answers each line, whatever it says.
        let script = r#"while read -r line; do echo '{"done":[]}'; done"#;
        let helpers = Helpers::new("/bin/sh".into(), ["-c", script].map(OsString::from).into());
        let command = LoopCommand::CheckFree { number: 1 };
        let pids = || helpers.state().idle.iter().map(|helper| helper.child.id()).collect::<Vec<_>>();
        assert_eq!(helpers.run(&command).unwrap(), []);
        let first = pids();
        assert_eq!(first.len(), 1);
        assert_eq!(helpers.run(&command).unwrap(), []);
        assert_eq!(pids(), first, "the same does the next");
        {
            let child = &mut helpers.state().idle[0].child;
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(helpers.run(&command).unwrap(), []);
        assert_ne!(pids(), first);
        std::thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| assert_eq!(helpers.run(&command).unwrap(), []));
            }
        });
        let state = helpers.state();
        assert!(state.idle.len() <= MOST && state.count == state.idle.len(), "{} of {}", state.idle.len(), state.count);
    }

    #[test]
    fn helper_that_ends_without_an_answer_is_an_error() {
        let helpers = Helpers::new("/bin/true".into(), Vec::new());
        for _ in 0..2 * MOST {
            assert!(matches!(helpers.run(&LoopCommand::CheckFree { number: 1 }), Err(Error::Io { .. })));
        }
    }

    #[test]
    fn commands_survive_json() {
        let command = LoopCommand::Grow { number: 3, file: "/a b".into(), size_bytes: 4096 };
        let text = serde_json::to_string(&command).unwrap();
        assert!(matches!(serde_json::from_str(&text).unwrap(), LoopCommand::Grow { number: 3, .. }));
    }
}

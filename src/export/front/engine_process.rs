//! The engine as a child process: prepared once, started again and again.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use command_fds::CommandFdExt;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, pidfd_send_signal};

use super::EngineCommand;
use crate::error::{Error, Result};
use crate::export::fuse::Session;
use crate::export::link::{Description, LINK_VARIABLE};

/// Our own build, also after its file was replaced or deleted.
const OWN_BUILD: &str = "/proc/self/exe";

/// Starts engines.
#[derive(Debug)]
pub(super) struct Launcher {
    /// The program on disk, and our own build.
    commands: [Command; 2],
    own_build: bool,
}

/// A running engine.
#[derive(Debug)]
pub(super) struct Engine {
    child: Child,
    pidfd: OwnedFd,
}

impl Launcher {
    pub(super) fn new(
        engine: EngineCommand,
        session: &Session,
        pending: BorrowedFd<'_>,
        supervisor: BorrowedFd<'_>,
    ) -> Result<Self> {
        let EngineCommand { program, arguments, descriptors } = engine;
        let command = |program: &Path| -> Result<Command> {
            let mut given = Vec::new();
            // Each command owns duplicates; a child inherits them under the same numbers.
            let mut give = |descriptor: BorrowedFd<'_>| -> Result<RawFd> {
                let own = descriptor.try_clone_to_owned();
                let own = own.map_err(|error| Error::io("duplicating a descriptor for the engine", error))?;
                let number = own.as_raw_fd();
                given.push(own);
                Ok(number)
            };
            let description = Description {
                version: Description::current_version(),
                front_pid: std::process::id(),
                control: give(session.memory().control().descriptor())?,
                payloads: give(session.memory().payloads().descriptor())?,
                pending: give(pending)?,
                engine_doorbell: give(session.engine_doorbell())?,
                supervisor: give(supervisor)?,
                doorbells: session.doorbells().map(&mut give).collect::<Result<_>>()?,
                extra: descriptors
                    .iter()
                    .map(|(name, descriptor)| Ok((name.clone(), give(descriptor.as_fd())?)))
                    .collect::<Result<BTreeMap<_, _>>>()?,
                transport: session.transport(),
                fallback: session.fallback().map(str::to_owned),
                replaceable: true,
            };
            let mut command = Command::new(program);
            command.args(&arguments).env(LINK_VARIABLE, description.to_variable()).stdin(Stdio::null());
            command.preserved_fds(given);
            let front = getpid();
            // SAFETY: runs in the child between fork and exec: two system calls, no allocation, no lock.
            unsafe { command.pre_exec(move || die_with(front)) };
            Ok(command)
        };
        Ok(Self { commands: [command(&program)?, command(Path::new(OWN_BUILD))?], own_build: false })
    }

    pub(super) fn launch(&mut self) -> Result<Engine> {
        let mut launched = self.commands[usize::from(self.own_build)].spawn();
        if let Err(error) = &launched
            && self.use_own_build()
        {
            tracing::warn!(%error, "the program on disk cannot be started; the front's own build is");
            launched = self.commands[1].spawn();
        }
        let child = launched.map_err(|error| Error::io("starting the engine", error))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .map_err(|errno| Error::io("watching the engine", errno.into()))?;
        Ok(Engine { child, pidfd })
    }

    pub(super) fn uses_own_build(&self) -> bool {
        self.own_build
    }

    /// From now on starts the program on disk again: it is another one, perhaps.
    pub(super) fn use_program(&mut self) {
        self.own_build = false;
    }

    /// From now on starts our own build. False when it did so already.
    pub(super) fn use_own_build(&mut self) -> bool {
        !std::mem::replace(&mut self.own_build, true)
    }
}

/// The engine shall not outlive its front: SIGTERM lets it make durable what it has answered.
fn die_with(front: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
    // The front may have died before the call.
    if getppid() == Some(front) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
}

impl Engine {
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub(super) fn terminate(&self) {
        // It may have ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
    }

    pub(super) fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().map_err(|error| Error::io("waiting for the engine", error))
    }
}

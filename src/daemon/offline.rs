//! Work on a pool that nobody holds: its file is opened right here, and commands are done by the same code as in the
//! engine process.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use async_executor::LocalExecutor;

use super::execute::{Control, execute};
use super::protocol::{Command, Failure, Reply};
use crate::engine::{OpenOptions, Pool, PrivateLog};
use crate::error::{Error, Result};
use crate::io::{self, FileStorage, Reactor, ReactorOptions, block_on};

/// A pool file opened by the caller alone.
pub(super) struct Offline {
    control: Rc<Control<FileStorage>>,
    executor: LocalExecutor<'static>,
    reactor: Reactor,
    /// Whether a command changed something since the pool was opened.
    changed: Cell<bool>,
}

/// A ring for the calling thread.
pub(super) fn reactor() -> Result<Reactor> {
    Reactor::new(ReactorOptions::default())
        .map_err(|error| Error::io("io_uring (is kernel.io_uring_disabled set?)", error))
}

impl Offline {
    /// Opens the pool and replays what its last user left.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody has it, and what the engine says.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let reactor = reactor()?;
        let executor = LocalExecutor::new();
        let storage = FileStorage::open(&reactor, path, io::OpenOptions::default())?;
        let log = Box::new(PrivateLog::new(0));
        let opened = block_on(&executor, &reactor, &(), Pool::open(storage.clone(), log, OpenOptions::default()));
        let pool = opened.map_err(broken)??;
        let medium = storage.clone();
        pool.enlarge_with(move |size_bytes| medium.grow(size_bytes));
        let background = pool.clone();
        executor.spawn(async move { background.run().await }).detach();
        let control = Control {
            pool,
            medium: storage,
            path: path.to_owned(),
            devices: RefCell::new(BTreeMap::new()),
            daemon: None,
        };
        Ok(Self { control: Rc::new(control), executor, reactor, changed: Cell::new(false) })
    }

    /// Does one command.
    pub(super) fn call(&self, command: Command) -> Result<Reply, Failure> {
        if command.needs_daemon() {
            let name = self.control.pool.info().name;
            return Err(no_daemon(&command, &name).into());
        }
        let changes = !command.is_read_only();
        let outcome = block_on(&self.executor, &self.reactor, &(), execute(&self.control, command));
        let outcome = outcome.map_err(broken)?;
        // A refused command has changed nothing; any other failure may have.
        let refused = matches!(
            &outcome,
            Err(Error::NotFound(_)
                | Error::AlreadyExists(_)
                | Error::Busy(_)
                | Error::ReadOnly(_)
                | Error::InvalidInput(_))
        );
        if changes && !refused {
            self.changed.set(true);
        }
        Ok(outcome?)
    }

    /// Gives back what was deleted, which is nobody else's work now, and ends with a checkpoint.
    fn close(&self) -> Result<()> {
        let pool = &self.control.pool;
        let reactor = &self.reactor;
        let closing = async {
            pool.settle().await?;
            pool.close().await
        };
        block_on(&self.executor, reactor, &(), closing).map_err(broken)?
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        // Every command was durable when it was answered; a pool that nothing changed is left as it was, byte for byte.
        if self.changed.get()
            && let Err(error) = self.close()
        {
            tracing::error!("{}: closing the pool: {error}", self.control.path.display());
        }
    }
}

fn broken(error: std::io::Error) -> Error {
    Error::io("io_uring", error)
}

fn no_daemon(command: &Command, pool: &str) -> Error {
    let what = command.describe();
    match command {
        Command::Detach { name } => Error::NotFound(format!("{name} is not attached: no daemon serves pool {pool}")),
        _ => Error::NotFound(format!("{what}: no daemon serves pool {pool}; start one with plywood serve")),
    }
}

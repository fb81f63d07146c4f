//! Work on a pool that nobody holds: its file is opened right here, and commands are done by the same code as in the
//! engine process.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::rc::Rc;

use async_executor::{LocalExecutor, Task};
use futures_lite::FutureExt as _;

use super::execute::{Control, execute};
use super::protocol::{Command, Failure, Reply};
use super::watch::Told;
use crate::engine::{OpenOptions, Pool, PrivateLog};
use crate::error::{Error, Result};
use crate::io::{self, Driver, FileStorage, Reactor, ReactorOptions, block_on};

/// A pool file opened by the caller alone.
pub(super) struct Offline {
    control: Rc<Control<FileStorage>>,
    executor: LocalExecutor<'static>,
    reactor: Reactor,
    background: RefCell<Background>,
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
        let background = RefCell::new(Background::spawn(&executor, async move { background.run().await }));
        let control = Control {
            pool,
            medium: storage,
            path: path.to_owned(),
            devices: RefCell::new(BTreeMap::new()),
            checking: Cell::new(None),
            told: Told::new(0),
            daemon: None,
        };
        Ok(Self { control: Rc::new(control), executor, reactor, background, changed: Cell::new(false) })
    }

    /// Does one command.
    pub(super) fn call(&self, command: Command) -> Result<Reply, Failure> {
        if command.needs_daemon() {
            let name = self.control.pool.info().name;
            return Err(no_daemon(&command, &name).into());
        }
        let changes = !command.is_read_only();
        let outcome = self.run(execute(&self.control, command))?;
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
        let closing = async {
            pool.settle().await?;
            pool.close().await
        };
        self.run(closing)?
    }

    fn run<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        run_beside(&self.executor, &self.reactor, &mut self.background.borrow_mut(), work)
    }
}

/// The engine's own work, which commands wait for: it may panic, and they shall not wait for ever.
enum Background {
    Running(Task<Result<(), ()>>),
    Ended,
    Panicked,
}

impl Background {
    fn spawn(executor: &LocalExecutor<'static>, work: impl Future<Output = ()> + 'static) -> Self {
        // What it leaves half done is never looked at again.
        let work = AssertUnwindSafe(work).catch_unwind();
        Self::Running(executor.spawn(async { work.await.map_err(|_| ()) }))
    }
}

/// Does `work` beside the background work.
///
/// # Errors
/// When the driver fails, and when the background work panics or has done so before.
fn run_beside<T>(
    executor: &LocalExecutor<'static>,
    driver: &impl Driver,
    background: &mut Background,
    work: impl Future<Output = T>,
) -> Result<T> {
    let panicked = async {
        if let Background::Running(task) = background {
            *background = if task.await.is_ok() { Background::Ended } else { Background::Panicked };
        }
        if matches!(background, Background::Ended) {
            std::future::pending::<()>().await;
        }
    };
    let either = async { Some(work.await) }.or(async {
        panicked.await;
        None
    });
    block_on(executor, driver, &(), either).map_err(broken)?.ok_or_else(|| {
        broken_by("the engine's background work panicked, which is a bug of plywood; what was done is in the journal")
    })
}

fn broken_by(what: &'static str) -> Error {
    Error::io("work on the pool", std::io::Error::other(what))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryStorage;

    /// A panic in a task that nobody awaits is kept for whoever does, and what waits for that task would wait for ever.
    #[test]
    fn panic_in_the_background_ends_the_command_with_an_error() {
        let (executor, driver) = (LocalExecutor::new(), MemoryStorage::scrambled(1 << 20, 1));
        let mut background = Background::spawn(&executor, async { panic!("on purpose") });
        for _ in 0..2 {
            let outcome = run_beside(&executor, &driver, &mut background, std::future::pending::<()>());
            assert!(outcome.unwrap_err().to_string().contains("panicked"));
        }
        let mut background = Background::spawn(&executor, async {});
        for _ in 0..2 {
            assert_eq!(run_beside(&executor, &driver, &mut background, async { 7 }).unwrap(), 7);
        }
    }
}

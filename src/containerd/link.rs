//! The way to the pool's daemon, which is started when it does not run.
//!
//! Each thread that works for callers has a connection of its own. An engine process that dies is waited for by the client
//! itself; when the front has died as well, a new daemon is started here, once, and the command is sent again: every command
//! carries the uuid of what it makes, or is about a name.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::error::{Error, Result};
use crate::daemon::protocol::{Attributes, Bytes, Command, Kind, Reply, Volume};
use crate::daemon::{self, Client, FoundPool};

thread_local! {
    /// This thread's connection, and the process id of the front that it leads to. A thread works for one pool only: a process has one.
    static CLIENT: RefCell<Option<(u32, Client)>> = const { RefCell::new(None) };
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    pool: FoundPool,
    /// One thread at a time starts a daemon; the others find it running.
    starting: Mutex<()>,
    /// A command that changes something ended without an answer.
    in_doubt: AtomicBool,
}

impl Link {
    /// The way to this pool.
    pub const fn new(pool: FoundPool) -> Self {
        Self { pool, starting: Mutex::new(()), in_doubt: AtomicBool::new(false) }
    }

    /// Does a command.
    ///
    /// # Errors
    /// What the engine answers, and [`Error::Unavailable`] when no daemon can be had.
    pub fn call(&self, command: Command) -> Result<Reply> {
        let changes = !command.is_read_only();
        let outcome = self.ask(command);
        let unanswered = match &outcome {
            Err(Error::Unavailable(_)) => true,
            Err(Error::Pool(failure)) => matches!(failure.kind, Kind::Io | Kind::Poisoned),
            _ => false,
        };
        if changes && unanswered {
            self.doubt();
        }
        outcome
    }

    /// It is not known what the pool holds.
    pub fn doubt(&self) {
        self.in_doubt.store(true, Ordering::Release);
    }

    /// Whether the pool may hold something else than the answers told.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt.load(Ordering::Acquire)
    }

    /// What is read from the pool from now on is certain, unless another command ends without an answer.
    pub fn begin_certainty(&self) {
        self.in_doubt.store(false, Ordering::Release);
    }

    fn ask(&self, command: Command) -> Result<Reply> {
        let deletes = matches!(command, Command::VolumeDelete { .. });
        let (front, outcome) = self.with_client(|client| client.call(command.clone()))?;
        match outcome {
            // No answer, perhaps because nobody is there any more. Another daemon has not been asked yet.
            Err(failure) if failure.kind == Kind::Io => {
                CLIENT.set(None);
                if self.with_client(|_| ())?.0 == front {
                    return Err(failure.into());
                }
                match self.with_client(|client| client.call(command))?.1 {
                    // Done before the daemon died.
                    Err(failure) if deletes && failure.kind == Kind::NotFound => Ok(Reply::Done),
                    again => Ok(again?),
                }
            }
            outcome => Ok(outcome?),
        }
    }

    /// Does a command that answers a volume.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn for_volume(&self, command: Command) -> Result<Volume> {
        Ok(self.call(command)?.volume()?)
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn volume(&self, name: &str) -> Result<Volume> {
        self.for_volume(Command::VolumeInfo { name: name.into() })
    }

    /// All volumes, by id.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        Ok(self.call(Command::VolumeList)?.volumes()?)
    }

    /// The attributes of a volume.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn attributes(&self, name: &str) -> Result<Attributes> {
        Ok(self.call(Command::AttributesGet { name: name.into() })?.attributes()?)
    }

    /// Sets one attribute.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn set_attribute(&self, name: &str, key: &str, value: Vec<u8>) -> Result<()> {
        let changes = [(key.to_owned(), Some(Bytes(value)))].into();
        self.call(Command::AttributesSet { name: name.into(), changes }).map(drop)
    }

    /// Gives a volume another name, which nobody else gives.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn rename(&self, name: &str, to: &str) -> Result<()> {
        match self.call(Command::VolumeRename { name: name.into(), to: to.into() }) {
            // Perhaps by this very command, whose first answer was lost.
            Err(Error::Pool(failure)) if failure.kind == Kind::NotFound => self.volume(to).map(drop),
            outcome => outcome.map(drop),
        }
    }

    /// Deletes a volume, and takes its block device away first if nobody uses it.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn delete(&self, name: &str) -> Result<()> {
        self.call(Command::VolumeDelete { name: name.into(), detach: true }).map(drop)
    }

    /// Makes a volume a block device, or finds the one that it is.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn attach(&self, name: &str) -> Result<String> {
        let attached = self.call(Command::Attach { name: name.into(), read_only: false })?.attachment()?;
        Ok(attached.device.to_string_lossy().into_owned())
    }

    /// Does something with this thread's connection, and says which front is at its other end.
    fn with_client<T>(&self, with: impl FnOnce(&Client) -> T) -> Result<(u32, T)> {
        CLIENT.with_borrow_mut(|connection| {
            let (front, client) = match connection {
                Some(connection) => connection,
                empty => empty.insert(self.connect()?),
            };
            Ok((*front, with(client)))
        })
    }

    fn connect(&self) -> Result<(u32, Client)> {
        let _one = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        let unavailable =
            |error: &dyn std::fmt::Display| Error::Unavailable(format!("pool {}: {error}", self.pool.name));
        let client = daemon::start(&self.pool).map_err(|error| unavailable(&error))?;
        let front = client.hello().map_err(|error| unavailable(&error))?.front_pid;
        Ok((front, client))
    }
}

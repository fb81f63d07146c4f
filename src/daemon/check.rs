//! Checking a pool: through its engine when it is in use, on the mapped file otherwise. Either way nothing is changed but,
//! in a pool in use, that a checkpoint is written.

use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::block_on;

use super::lookup::FoundPool;
use super::protocol::{Check, Command, Failure, Kind, Reply};
use super::start::running;
use crate::engine::{Progress, check_metadata};
use crate::error::Error;
use crate::io::MappedStorage;

/// How long a command that works on the file right now is waited for.
const TURN: Duration = Duration::from_secs(10);

/// Checks a pool. `show` is told how far it is, where that is known.
///
/// # Errors
/// When it cannot be read at all, and when somebody has it who is no daemon.
pub fn check_pool(pool: &FoundPool, show: &mut dyn FnMut(Progress)) -> Result<Check, Failure> {
    if let Some(client) = running(pool)? {
        return match client.call(Command::PoolCheck)? {
            Reply::Check(check) => Ok(check),
            _ => Err(Failure::new(Kind::InvalidInput, "unexpected answer")),
        };
    }
    let storage = map(pool)?;
    // Reads of a mapping are done when they return: nothing is ever waited for.
    Ok(block_on(check_metadata(&storage, show))?.into())
}

/// Maps a pool that nobody uses. Whoever has it for a moment is waited for.
pub(super) fn map(pool: &FoundPool) -> Result<MappedStorage, Error> {
    let began = Instant::now();
    loop {
        match MappedStorage::open(&pool.path) {
            Err(Error::Busy(_)) if began.elapsed() < TURN => thread::sleep(Duration::from_millis(10)),
            opened => return opened,
        }
    }
}

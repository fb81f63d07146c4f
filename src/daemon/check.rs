//! Checking a pool: through its engine when it is in use, on the mapped file otherwise. Either way nothing is changed but,
//! in a pool in use, that a checkpoint is written.

use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::block_on;

use super::Client;
use super::lookup::FoundPool;
use super::protocol::{Check, Command, Failure, Kind, Reply};
use super::start::running;
use crate::engine::{Progress, check_metadata};
use crate::error::Error;
use crate::io::MappedStorage;

/// How long a command that works on the file right now is waited for.
const TURN: Duration = Duration::from_secs(10);
/// How often it is looked whether a check has ended, and after how many looks it is asked how far it is.
const STEP: Duration = Duration::from_millis(10);
const STEPS_A_QUESTION: u32 = 20;

/// Checks a pool. `show` is told how far it is, where that is known.
///
/// # Errors
/// When it cannot be read at all, and when somebody has it who is no daemon.
pub fn check_pool(pool: &FoundPool, show: &mut dyn FnMut(Progress)) -> Result<Check, Failure> {
    if let Some(client) = running(pool)? {
        return check_in_use(pool, &client, show);
    }
    let storage = map(pool)?;
    // Reads of a mapping are done when they return: nothing is ever waited for.
    Ok(block_on(check_metadata(&storage, show))?.into())
}

/// Has the engine check its pool, and asks it meanwhile, over another connection, how far it is.
fn check_in_use(pool: &FoundPool, asking: &Client, show: &mut dyn FnMut(Progress)) -> Result<Check, Failure> {
    thread::scope(|scope| {
        let checking = scope.spawn(|| {
            let client =
                running(pool)?.ok_or_else(|| Failure::new(Kind::Busy, "the daemon has just stopped; try again"))?;
            match client.call(Command::PoolCheck)? {
                Reply::Check(check) => Ok(check),
                _ => Err(Failure::new(Kind::InvalidInput, "unexpected answer")),
            }
        });
        let mut waited = 0;
        while !checking.is_finished() {
            thread::sleep(STEP);
            waited += 1;
            // A daemon of an older build does not know the question.
            if waited % STEPS_A_QUESTION == 0
                && let Ok(Reply::Progress(Some(at))) = asking.call(Command::PoolCheckProgress)
            {
                show(at);
            }
        }
        checking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
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

//! Takes away the volumes that are no snapshots any more: removed or committed ones, and what was never finished.
//!
//! One that is mounted still is tried again and again, so whoever removed it does not wait, and is not told `EBUSY`. What is
//! not taken away when this process ends is found by its name when it starts again.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::error::{Error, Result};
use super::link::Link;
use super::record::GONE;
use crate::daemon::protocol::Kind;
use uuid::Uuid;

/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// See the module.
#[derive(Debug)]
pub struct Reaper {
    link: Arc<Link>,
    /// Names of volumes.
    waiting: Mutex<Vec<String>>,
    woken: Condvar,
}

impl Reaper {
    /// Begins to work, on a thread of its own.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(link: Arc<Link>) -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self { link, waiting: Mutex::default(), woken: Condvar::new() });
        let own = Arc::clone(&reaper);
        thread::Builder::new().name("reaper".into()).spawn(move || own.work())?;
        Ok(reaper)
    }

    /// Ends a snapshot, in one change of the pool: its volume gets a name that means nothing, and is taken away soon.
    ///
    /// # Errors
    /// What the pool answers; a volume that is not there is an error, too.
    pub fn put_aside(&self, volume: &str) -> Result<()> {
        let gone = format!("{GONE}{}", Uuid::new_v4().simple());
        self.link.rename(volume, &gone)?;
        self.take_away(gone);
        Ok(())
    }

    /// Takes a volume away that has such a name already.
    pub fn take_away(&self, volume: String) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(volume);
        self.woken.notify_one();
    }

    /// Tries all once, and answers how many are left.
    pub fn pass(&self) -> usize {
        let volumes = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let mut left: Vec<String> = volumes.into_iter().filter(|volume| !self.is_taken(volume)).collect();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.append(&mut left);
        waiting.len()
    }

    fn is_taken(&self, volume: &str) -> bool {
        match self.link.delete(volume) {
            Ok(()) => true,
            Err(Error::Pool(failure)) if failure.kind == Kind::NotFound => true,
            Err(error) => {
                tracing::debug!(%volume, "not taken away yet: {error}");
                false
            }
        }
    }

    fn work(&self) {
        let mut pause = PAUSES.0;
        loop {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            while waiting.is_empty() {
                pause = PAUSES.0;
                waiting = self.woken.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            let before = waiting.len();
            drop(waiting);
            if self.pass() == 0 {
                continue;
            }
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let (waiting, timed) = self.woken.wait_timeout(waiting, pause).unwrap_or_else(PoisonError::into_inner);
            // Somebody new is tried soon, and so are those before.
            pause = if timed.timed_out() && waiting.len() >= before { (pause * 2).min(PAUSES.1) } else { PAUSES.0 };
        }
    }
}

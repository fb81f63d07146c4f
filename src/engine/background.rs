//! The engine's own work: commits, checkpoints, space and carcasses, and the orderly end of it.

use futures_lite::future::zip;

use super::Storage;
use super::pool::{Pool, until};
use super::work::Work;
use crate::error::{Error, Result};

/// Seconds between checkpoints of a pool in which something has changed.
const IDLE_TICKS: u64 = 30;
/// Seconds between checkpoints while deleted trees give blocks back, which come free with the next one.
const FREEING_TICKS: u64 = 3;

impl<S: Storage> Pool<S> {
    /// Does the background work until the pool is closed or poisoned. Spawn it once, beside the requests.
    pub async fn run(&self) {
        let commits = zip(self.run_commits(), self.run_checkpoints());
        let space = zip(self.run_space(), self.run_carcasses());
        let reading = zip(zip(self.run_seals(), self.run_exclusive()), self.run_gatherers());
        zip(zip(commits, space), reading).await;
    }

    /// To be called once a second: the engine has no clock. Changes are committed within a second, and an idle pool is
    /// checkpointed.
    pub fn tick(&self) {
        let inner = &self.inner;
        inner.ticks.set(inner.ticks.get() + 1);
        let (pending, checkpointable, freeing) = {
            let state = inner.state.borrow();
            let journal = &state.journal;
            let changed = journal.used() > 0 || state.cache.dirty() > 0 || state.scrub != state.scrub_saved;
            (journal.durable() < journal.last(), changed, state.counters.leaves_eaten > state.eaten_in_image)
        };
        if pending {
            self.want_commit();
        }
        if freeing && inner.ticks.get().is_multiple_of(FREEING_TICKS) {
            self.want_checkpoint();
        }
        if checkpointable && inner.ticks.get().is_multiple_of(IDLE_TICKS) {
            self.want_checkpoint();
        }
        inner.signals.work.notify(usize::MAX);
        inner.signals.carcass.notify(usize::MAX);
    }

    /// Waits until the next second begins, or nothing is to be done any more.
    pub(super) async fn wait_for_tick(&self, seen: &mut u64) {
        let inner = &self.inner;
        until(&inner.signals.work, || {
            let state = inner.state.borrow();
            inner.ticks.get() != *seen || inner.stopped.get() || state.closing || state.poisoned.is_some()
        })
        .await;
        *seen = inner.ticks.get();
    }

    /// Refuses further changes, waits for what is in flight, commits, writes a checkpoint and ends the background work.
    pub async fn close(&self) -> Result<()> {
        let _work = self.at(Work::Close);
        let inner = &self.inner;
        let epoch = {
            let mut state = inner.state.borrow_mut();
            state.closing = true;
            state.epochs.advance()
        };
        self.wait_for_epoch(epoch).await;
        let done = match self.commit().await {
            Ok(()) => self.checkpoint().await,
            Err(error) => Err(error),
        };
        inner.stopped.set(true);
        let signals = &inner.signals;
        for event in [&signals.work, &signals.carcass, &signals.space, &signals.checkpointed, &signals.durable] {
            event.notify(usize::MAX);
        }
        done
    }

    /// Waits until the pool is poisoned or closed.
    pub async fn ended(&self) -> Option<Error> {
        let inner = &self.inner;
        until(&inner.signals.durable, || inner.stopped.get() || inner.state.borrow().poisoned.is_some()).await;
        self.poison_error()
    }
}

//! Group commit: making changes durable, in order, for everybody who waits at a time (rules O1 and O2).
//!
//! A commit *cuts* (takes the pending records up to LSN n), then starts an fdatasync, then appends exactly the cut. So the
//! data of every record in a batch was durable before the batch. FLUSHes that arrive meanwhile share the next commit.

use super::pool::{Pool, until};
use super::work::Work;
use super::{Memory, Storage};
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{self, BATCH_RECORD_BYTES_MAX, JOURNAL_FIRST};
use crate::units::{BLOCK_SIZE, Lsn, PoolBlock};

impl<S: Storage> Pool<S> {
    /// Makes every change made so far durable.
    pub async fn commit(&self) -> Result<()> {
        let lsn = self.inner.state.borrow().journal.last();
        self.flush_through(lsn).await
    }

    /// Waits until what was written before is on the medium and all changes up to `lsn` are recorded or checkpointed.
    pub(super) async fn flush_through(&self, lsn: Lsn) -> Result<()> {
        // A flush of the medium that begins from now on covers every write that has completed.
        let ticket = self.inner.flushes_begun.get() + 1;
        let inner = &self.inner;
        self.want_commit();
        until(&inner.signals.durable, || {
            let state = inner.state.borrow();
            state.poisoned.is_some() || (inner.flushes_ended.get() >= ticket && state.journal.durable() >= lsn)
        })
        .await;
        let state = inner.state.borrow();
        if inner.flushes_ended.get() >= ticket && state.journal.durable() >= lsn {
            return Ok(());
        }
        Err(Error::Poisoned(state.poisoned.clone().unwrap_or_default()))
    }

    /// Asks the background task for a commit.
    pub(super) fn want_commit(&self) {
        self.inner.commit_wanted.set(true);
        self.inner.signals.work.notify(usize::MAX);
    }

    /// The committing task: one commit after the other, as long as somebody wants one.
    pub(super) async fn run_commits(&self) {
        let inner = &self.inner;
        loop {
            until(&inner.signals.work, || {
                inner.commit_wanted.get() || inner.stopped.get() || inner.state.borrow().poisoned.is_some()
            })
            .await;
            if inner.stopped.get() || inner.state.borrow().poisoned.is_some() {
                return;
            }
            inner.commit_wanted.set(false);
            inner.committing.set(true);
            let committed = self.commit_once().await;
            inner.committing.set(false);
            if let Err(error) = committed {
                self.poison(&error);
                return;
            }
        }
    }

    async fn commit_once(&self) -> Result<()> {
        let inner = &self.inner;
        let mut cut = inner.state.borrow().journal.last();
        if is_broken(Canary::ReleasedBeforeRecorded) {
            inner.state.borrow_mut().log.release(cut);
        }
        inner.flushes_begun.set(inner.flushes_begun.get() + 1);
        let flush = self.at(Work::Flush);
        let flushed = inner.storage.flush().await.map_err(|error| Error::io("flush of the pool", error));
        drop(flush);
        if !is_broken(Canary::FailedFlushIgnored) {
            flushed?;
        }
        if is_broken(Canary::CutAfterFlush) {
            cut = inner.state.borrow().journal.last();
        }
        inner.flushes_ended.set(inner.flushes_ended.get() + 1);
        inner.signals.durable.notify(usize::MAX);
        while inner.state.borrow().journal.durable() < cut {
            if let Some(error) = self.poison_error() {
                return Err(error);
            }
            self.append_batch(cut).await?;
        }
        Ok(())
    }

    /// Appends one batch of the records up to `cut`, waiting for the ring to have room.
    async fn append_batch(&self, cut: Lsn) -> Result<()> {
        let inner = &self.inner;
        let prepared = {
            let state = inner.state.borrow();
            let Some(records) = state.journal.cut(cut, BATCH_RECORD_BYTES_MAX) else { return Ok(()) };
            let (bytes, chain) = format::encode_batch(
                &state.uuid,
                state.generation,
                records.first,
                records.last,
                state.journal.position().chain,
                &records.records,
            );
            let blocks = (bytes.len() / BLOCK_SIZE) as u64;
            state.journal.room(blocks).map(|(at, skipped)| (bytes, chain, records.last, at, skipped, blocks))
        };
        let Some((bytes, chain, last, at, skipped, blocks)) = prepared else {
            // Full: mapping changes wait until the checkpoint has ended; reads and in-place writes go on.
            return self.checkpoint().await;
        };
        let _work = self.at(Work::Commit);
        let memory = super::pool::to_memory(&inner.storage, &bytes);
        let address = PoolBlock(JOURNAL_FIRST.0 + at);
        inner
            .storage
            .write_durable(address.offset_bytes(), &memory)
            .await
            .map_err(|error| Error::io(format!("append to the journal at pool block {address}"), error))?;
        {
            let mut state = inner.state.borrow_mut();
            state.journal.recorded(last, at, skipped, blocks, chain);
            state.counters.batches += 1;
            state.counters.metadata_bytes_written += memory.len() as u64;
            self.after_durable(&mut state);
        }
        self.announce_durable();
        let state = inner.state.borrow();
        if state.journal.used() * 2 > state.journal.ring_blocks() {
            drop(state);
            self.want_checkpoint();
        }
        Ok(())
    }

    /// What follows, in memory, from more changes being durable.
    pub(super) fn after_durable(&self, state: &mut super::state::State) {
        let durable = state.journal.durable();
        state.log.release(durable);
        state.release_frees();
    }

    pub(super) fn announce_durable(&self) {
        let signals = &self.inner.signals;
        for event in [&signals.durable, &signals.space, &signals.carcass] {
            event.notify(usize::MAX);
        }
    }
}

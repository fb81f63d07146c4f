//! Group commit: making changes durable, in order, for everybody who waits at a time (rules O1 and O2).
//!
//! A commit *cuts* (takes the pending records up to LSN n), then starts an fdatasync, then appends exactly the cut. So the
//! data of every record in a batch was durable before the batch. FLUSHes that arrive meanwhile share the next commit.
//!
//! Where somebody waits for that next one already, the batch is only written: the fdatasync with which the next commit
//! begins makes it durable beside the data of its own cut, so a busy pool pays one flush of the medium for each commit
//! instead of two. Until then nothing is answered, let go or appended by it: of two batches that are not durable a power
//! cut could leave the second alone. Where nobody waits it is a durable write of its own.

use super::Storage;
use super::journal::Batch;
use super::pool::{Pool, until};
use super::work::Work;
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{self, BATCH_RECORD_BYTES_MAX};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Lsn};

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
        inner.flush_awaited.set(ticket);
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
        let mut written = None;
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
            let committed = self.commit_once(written.take()).await;
            inner.committing.set(false);
            match committed {
                Ok(batch) => written = batch,
                Err(error) => {
                    self.poison(&error);
                    return;
                }
            }
        }
    }

    /// One commit. `written` is the batch of the one before, where its flush is still to come; answered is its own, likewise:
    /// then somebody waits for another commit.
    async fn commit_once(&self, written: Option<Batch>) -> Result<Option<Batch>> {
        let inner = &self.inner;
        let mut cut = inner.state.borrow().journal.last();
        if is_broken(Canary::ReleasedBeforeRecorded) {
            inner.state.borrow_mut().log.release(cut);
        }
        inner.flushes_begun.set(inner.flushes_begun.get() + 1);
        let flush = self.at(Work::Flush);
        self.flush_medium("flush of the pool").await?;
        drop(flush);
        if let Some(batch) = written {
            self.recorded(&batch);
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
            let Some((batch, memory)) = self.next_batch(cut) else {
                // Full: mapping changes wait until the checkpoint has ended; reads and in-place writes go on.
                self.checkpoint().await?;
                continue;
            };
            let _work = self.at(Work::Commit);
            if batch.last == cut && inner.flush_awaited.get() > inner.flushes_begun.get() {
                let to = batch.address();
                let landed = inner.storage.write(to.offset_bytes(), &memory).await;
                landed.map_err(|error| Error::io(format!("append to the journal at pool block {to}"), error))?;
                if is_broken(Canary::AnsweredWhenWritten) {
                    self.recorded(&batch);
                    continue;
                }
                return Ok(Some(batch));
            }
            self.write_durable(batch.address(), &memory, "append to the journal").await?;
            self.recorded(&batch);
        }
        Ok(None)
    }

    /// The next batch of the records up to `cut`, and its bytes; `None` while the ring has no room for it.
    fn next_batch(&self, cut: Lsn) -> Option<(Batch, S::Memory)> {
        let inner = &self.inner;
        let state = inner.state.borrow();
        let records = state.journal.cut(cut, BATCH_RECORD_BYTES_MAX)?;
        let (bytes, chain) = format::encode_batch(
            &state.uuid,
            state.generation,
            records.first,
            records.last,
            state.journal.position().chain,
            &records.records,
        );
        let blocks = (bytes.len() / BLOCK_SIZE) as u64;
        let (at, skipped) = state.journal.room(blocks)?;
        let batch = Batch { last: records.last, at, skipped, blocks, chain };
        Some((batch, super::pool::to_memory(&inner.storage, &bytes)))
    }

    /// A batch is durable.
    fn recorded(&self, batch: &Batch) {
        let inner = &self.inner;
        let is_half_full = {
            let mut state = inner.state.borrow_mut();
            state.journal.recorded(batch);
            state.counters.batches += 1;
            state.counters.metadata_bytes_written += batch.blocks * BLOCK_BYTES;
            self.after_durable(&mut state);
            state.journal.used() * 2 > state.journal.ring_blocks()
        };
        self.announce_durable();
        if is_half_full {
            self.want_checkpoint();
        }
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

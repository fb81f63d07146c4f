//! Promises: room for what a change does to the map and its records, made sure of before the change takes hold of anything.
//!
//! A change that found half way that the pending log or the metadata reserve is full would have to wait while it holds a range
//! and an epoch, and what it waits for may wait for these (rules O7, O8).

use super::Storage;
use super::growth::Use;
use super::pool::Pool;
use crate::error::Result;
use crate::format::ENTRIES_PER_NODE;
use crate::units::VolumeId;

/// What a change may need besides data blocks, promised before it takes hold of anything.
pub(super) struct Promise<S: Storage> {
    pool: Pool<S>,
    log_bytes: usize,
    metadata_blocks: u64,
}

impl<S: Storage> Drop for Promise<S> {
    fn drop(&mut self) {
        let mut state = self.pool.inner.state.borrow_mut();
        state.log_promised -= self.log_bytes;
        state.metadata_promised -= self.metadata_blocks;
        drop(state);
        self.pool.inner.signals.space.notify(usize::MAX);
    }
}

impl<S: Storage> Pool<S> {
    /// Waits until the pending log and the metadata reserve have room for a change of up to `blocks` blocks, and the
    /// dirty nodes are within their bound. Nothing may be held.
    pub(super) async fn promise(&self, blocks: u64, records_bytes: usize) -> Result<Promise<S>> {
        self.promise_for(Use::Metadata, None, blocks, records_bytes).await
    }

    /// The same for a change of which it is known whether it gives room back, and the map of which volume it is about.
    pub(super) async fn promise_for(
        &self,
        wanted: Use,
        whose: Option<VolumeId>,
        blocks: u64,
        records_bytes: usize,
    ) -> Result<Promise<S>> {
        loop {
            if let Some(promise) = self.try_promise_for(wanted, whose, blocks, records_bytes)? {
                return Ok(promise);
            }
            let listener = self.inner.signals.space.listen();
            let wanting = {
                let state = self.inner.state.borrow();
                if state.log_free() < records_bytes {
                    Wanting::Commit
                } else if state.cache.is_full() {
                    Wanting::Checkpoint { due: state.is_checkpoint_due() }
                } else {
                    Wanting::Metadata
                }
            };
            match wanting {
                Wanting::Commit => self.want_commit(),
                Wanting::Checkpoint { due: true } => self.want_checkpoint(),
                // The one that is running will do.
                Wanting::Checkpoint { due: false } => {}
                Wanting::Metadata => {
                    self.make_room(metadata_blocks(blocks), wanted, whose, 0).await?;
                    continue;
                }
            }
            if self.try_promise_for(wanted, whose, blocks, records_bytes)?.is_none() {
                listener.await;
            }
        }
    }

    /// The promise for a write, if there is room at the moment.
    pub(super) fn try_promise(&self, id: VolumeId, blocks: u64, records_bytes: usize) -> Result<Option<Promise<S>>> {
        self.try_promise_for(Use::Metadata, Some(id), blocks, records_bytes)
    }

    /// The same for a change of which it is known whether it gives room back.
    pub(super) fn try_promise_for(
        &self,
        wanted: Use,
        whose: Option<VolumeId>,
        blocks: u64,
        records_bytes: usize,
    ) -> Result<Option<Promise<S>>> {
        let metadata_blocks = metadata_blocks(blocks);
        let mut state = self.inner.state.borrow_mut();
        state.check_writable()?;
        let fits = state.log_free() >= records_bytes
            && !state.cache.is_full()
            && state.has_metadata(metadata_blocks, wanted, whose);
        if !fits {
            return Ok(None);
        }
        state.log_promised += records_bytes;
        state.metadata_promised += metadata_blocks;
        let much = state.is_checkpoint_due();
        let low = state.is_low();
        drop(state);
        if much {
            self.want_checkpoint();
        }
        if low {
            self.inner.growth_wanted.set(true);
            self.inner.signals.work.notify(usize::MAX);
        }
        Ok(Some(Promise { pool: self.clone(), log_bytes: records_bytes, metadata_blocks }))
    }
}

/// What a change waits for before it may begin.
enum Wanting {
    Commit,
    Checkpoint { due: bool },
    Metadata,
}

/// Metadata blocks that a change of `blocks` consecutive blocks dirties at most.
pub(super) fn metadata_blocks(blocks: u64) -> u64 {
    let leaves = blocks.div_ceil(ENTRIES_PER_NODE as u64) + 1;
    8 + 3 * leaves
}

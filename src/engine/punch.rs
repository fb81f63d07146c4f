//! Giving free space back to the host: by and by, and all of it at once.
//!
//! Invariants: a run under punch is held, the holes in it as well, so that nobody is handed its blocks and nobody makes them
//! ready (O7); what has been punched is unready until the host has its space again (`growth.rs`); as many blocks stay as are
//! kept ready, or they would be taken back at once.

use super::Storage;
use super::pool::Pool;
use super::space::PREPARED_BLOCKS;
use super::work::Work;
use crate::canary::{Canary, is_broken};
use crate::error::Result;

/// Runs punched before somebody else has a look.
const RUNS: usize = 64;
/// Fewest free blocks that are worth punching (64 KiB), and the longest run that is punched at once (32 MiB).
const PUNCH_BLOCKS: (u32, u32) = (16, 8192);
/// The same where everything is to go: no longer ones, so that little is left for the sake of metadata.
const TRIM_BLOCKS: (u32, u32) = (1, 256);

impl<S: Storage> Pool<S> {
    /// A tick's share of punching; as long as nobody wants anything meanwhile, another.
    pub(super) async fn punch_in_idle_moments(&self) {
        loop {
            let seen = self.inner.requests.get();
            let keep = self.inner.state.borrow().ready_blocks();
            let is_done = self.punch_some(RUNS, PUNCH_BLOCKS, keep).await < RUNS;
            if is_done || self.inner.requests.get() != seen || self.inner.state.borrow().closing {
                return;
            }
        }
    }

    /// Gives everything that is free back to the host now, in runs of whatever length.
    pub async fn trim(&self) -> Result<()> {
        self.commit().await?;
        self.checkpoint().await?;
        let epoch = self.inner.state.borrow_mut().epochs.advance();
        self.wait_for_epoch(epoch).await;
        self.inner.state.borrow_mut().release_frees();
        let groups = self.inner.state.borrow().groups_in_use;
        for group in 0..groups {
            let is_loaded = {
                let state = self.inner.state.borrow();
                state.allocator.has_group(group) || state.index_entry(group).free_blocks == 0
            };
            if !is_loaded {
                self.load_group(group).await?;
            }
        }
        // It stays with the host until somebody writes. No more is punched than is free now: who writes meanwhile has blocks made
        // ready again.
        self.inner.growth_wanted.set(false);
        let free = self.inner.state.borrow().allocator.free();
        let mut punched = 0;
        while punched < free {
            let before = self.counters().blocks_punched;
            if self.punch_some(RUNS, TRIM_BLOCKS, 0).await < RUNS {
                break;
            }
            punched += self.counters().blocks_punched - before;
            futures_lite::future::yield_now().await;
        }
        self.flush_medium("flush after punching").await
    }

    /// Gives up to `runs` runs of up to `most` blocks, `least` of them free and not yet holes, back to the host, and answers
    /// how many; `keep_free` free blocks stay. A run under punch is claimed: nobody is handed its blocks.
    pub(super) async fn punch_some(&self, runs: usize, (least, most): (u32, u32), keep_free: u64) -> usize {
        let inner = &self.inner;
        for done in 0..runs {
            if inner.cannot_punch.get() {
                return done;
            }
            let punchable = inner.state.borrow_mut().allocator.take_punchable(least, most, PREPARED_BLOCKS, keep_free);
            let Some(run) = punchable else { return done };
            if is_broken(Canary::PunchUnclaimed) {
                inner.state.borrow_mut().allocator.release_run(run);
            }
            let work = self.at(Work::Punch);
            let punched = inner.storage.punch(run.bytes()).await;
            drop(work);
            {
                let mut state = inner.state.borrow_mut();
                match &punched {
                    _ if is_broken(Canary::PunchUnclaimed) => state.counters.blocks_punched += run.count,
                    Ok(()) => state.counters.blocks_punched += state.allocator.give_back(run),
                    Err(_) => state.allocator.release_run(run),
                }
            }
            match punched {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    tracing::info!("the host keeps what is free: it cannot punch holes");
                    inner.cannot_punch.set(true);
                }
                Err(error) => tracing::warn!("punch of {} blocks at pool block {}: {error}", run.count, run.start),
                Ok(()) => {}
            }
            inner.signals.space.notify(usize::MAX);
        }
        runs
    }
}

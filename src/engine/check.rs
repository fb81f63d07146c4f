//! Checking a pool in use: the state of one checkpoint is pinned and checked on the medium, while I/O goes on.
//!
//! A checkpoint is written, and no other begins until superblock and space map have been read (their slots are written over
//! by the next but one; a second or two for a TiB). From before that checkpoint's instant until the end of the check, nothing
//! that a checkpoint frees is handed out again: so nodes and records of the pinned state stay as they are. Data blocks are
//! not read, so those that a record frees are reused as ever.
//!
//! **A pool that gets full meanwhile** comes first: before a change is refused for want of space, and when more than
//! [`PINNED_MAX`] blocks wait, the pin is given up; the blocks go back, and the check ends with `Busy`.

use std::rc::Rc;

use super::Storage;
use super::inspect::{self, CheckReport, Progress};
use super::pool::Pool;
use super::state::State;
use crate::error::{Error, Result};
use crate::units::PoolBlock;

/// Freed blocks that are kept back for checks at most: 32 MiB of memory.
const PINNED_MAX: usize = 4 << 20;

/// Blocks that checkpoints freed while a check needs them as they were.
#[derive(Default)]
pub(super) struct Pinned {
    checks: u32,
    freed: Vec<PoolBlock>,
    /// How often pins were given up.
    given_up: u64,
    /// A bad copy is being written anew: no pin is given up while that write may still land.
    mending: bool,
}

impl Pinned {
    /// Whether freed blocks are kept back.
    pub(super) fn is_held(&self) -> bool {
        self.checks > 0
    }

    /// Blocks kept back.
    pub(super) fn blocks(&self) -> impl Iterator<Item = PoolBlock> + '_ {
        self.freed.iter().copied()
    }
}

impl State {
    /// Keeps a block back that a durable checkpoint freed.
    pub(super) fn keep_back(&mut self, block: PoolBlock) {
        self.pinned.freed.push(block);
        if self.pinned.freed.len() > PINNED_MAX {
            self.give_up_pins();
        }
    }

    /// Ends the checks under way where that gives blocks back. Answers whether it did.
    pub(super) fn give_up_pins(&mut self) -> bool {
        let given = !self.pinned.freed.is_empty() && !self.pinned.mending;
        if given {
            self.pinned.checks = 0;
            self.pinned.given_up += 1;
            self.release_pinned();
        }
        given
    }

    fn release_pinned(&mut self) {
        for block in std::mem::take(&mut self.pinned.freed) {
            self.allocator.release_fresh(block);
        }
    }
}

/// While one lives, what checkpoints free stays as it is.
pub(super) struct Pin<S: Storage> {
    pool: Pool<S>,
    given_up: u64,
}

impl<S: Storage> Pin<S> {
    pub(super) fn new(pool: &Pool<S>) -> Self {
        let mut state = pool.inner.state.borrow_mut();
        state.pinned.checks += 1;
        Self { pool: pool.clone(), given_up: state.pinned.given_up }
    }

    fn is_given_up(&self) -> bool {
        self.pool.inner.state.borrow().pinned.given_up != self.given_up
    }
}

impl<S: Storage> Drop for Pin<S> {
    fn drop(&mut self) {
        if self.is_given_up() {
            return;
        }
        let mut state = self.pool.inner.state.borrow_mut();
        state.pinned.checks -= 1;
        if state.pinned.checks == 0 {
            state.release_pinned();
            drop(state);
            self.pool.inner.signals.space.notify(usize::MAX);
        }
    }
}

/// While one lives, no checkpoint begins after that of its number.
struct Hold<S: Storage>(Pool<S>);

impl<S: Storage> Drop for Hold<S> {
    fn drop(&mut self) {
        self.0.inner.last_checkpoint.set(None);
        self.0.inner.signals.work.notify(usize::MAX);
    }
}

impl<S: Storage> Pool<S> {
    /// Writes a checkpoint and checks that state on the medium: every checksum and both copies of pairs, every count
    /// against a walk. I/O goes on meanwhile.
    ///
    /// # Errors
    /// `Busy` when another check begins or the pool needs the blocks that the check keeps back; what keeps a checkpoint
    /// from being written. What is damaged is reported, not an error.
    pub async fn check(&self) -> Result<CheckReport> {
        self.check_showing(&mut |_| ()).await
    }

    /// As [`check`](Self::check). `show` is told how far the walk is.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub async fn check_showing(&self, show: &mut dyn FnMut(Progress)) -> Result<CheckReport> {
        self.check_pinned(false, show).await.map(|(report, _)| report)
    }

    /// Checks as [`check`](Self::check) does; with `mend`, what is bad of a pair is written anew from the other block. Answers
    /// how many were.
    pub(super) async fn check_pinned(&self, mend: bool, show: &mut dyn FnMut(Progress)) -> Result<(CheckReport, u64)> {
        let inner = &self.inner;
        self.commit().await?;
        let pin = Pin::new(self);
        if inner.last_checkpoint.get().is_some() {
            return Err(Error::Busy("another check of the pool begins; try again".into()));
        }
        inner.last_checkpoint.set(Some(inner.checkpoints_begun.get() + 1));
        let hold = Hold(self.clone());
        self.checkpoint().await?;
        let (durable, instant) = {
            let state = inner.state.borrow();
            (state.journal.durable(), state.accounts.last())
        };
        let pinned = inspect::read_pinned(&inner.storage, durable).await;
        let mut mended = 0;
        if let (true, Ok(pinned)) = (mend, &pinned) {
            // Slots are written over by the next checkpoint but one: while it is held back.
            mended += self.mend(&pin, pinned.copies()).await?;
        }
        drop(hold);
        let report = inspect::check_pinned(&inner.storage, pinned?, show).await?;
        if mend && let Some(rest) = report.copies.get(mended as usize..) {
            mended += self.mend(&pin, rest).await?;
        }
        if pin.is_given_up() {
            return Err(Error::Busy("the pool needed the blocks that the check kept back; try again".into()));
        }
        if let Some(metadata_blocks) = report.metadata_blocks {
            inner.state.borrow_mut().accounts.counted(instant, metadata_blocks);
        }
        Ok((report, mended))
    }

    /// Writes bad blocks of pairs anew from the good ones, both of which the pin keeps as they are. Answers how many.
    async fn mend(&self, pin: &Pin<S>, copies: &[(PoolBlock, PoolBlock)]) -> Result<u64> {
        if copies.is_empty() || pin.is_given_up() {
            return Ok(0);
        }
        self.inner.state.borrow_mut().pinned.mending = true;
        let done = self.copy_blocks(copies).await;
        self.inner.state.borrow_mut().pinned.mending = false;
        done.map(|()| copies.len() as u64)
    }

    async fn copy_blocks(&self, copies: &[(PoolBlock, PoolBlock)]) -> Result<()> {
        for (bad, good) in copies {
            let bytes = self.read_block(*good).await?;
            self.write_blocks([(*bad, Rc::from(bytes))].into()).await?;
            tracing::warn!("block {bad} was bad and is what block {good} beside it is again");
        }
        self.flush_medium("flush of mended blocks").await
    }
}

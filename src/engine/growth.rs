//! Room: waiting for it, and preparing blocks on the host ahead of need.

use std::ops::Range;

use super::Storage;
use super::pool::{Pool, until};
use super::space::{PREPARED_BLOCKS, Unprepared};
use super::state::State;
use super::work::Work;
use crate::error::{Error, Result};
use crate::units::{BLOCK_BYTES, VolumeId};

/// Free blocks that the background task keeps ready (32 MiB), and of a small pool this part.
const READY_BLOCKS: u64 = 8192;
const READY_PART: u64 = 16;
/// Runs tried to be prepared while the host refuses: those of a former session's reserve are among them. Of holes fewer: what
/// the host refuses of one it has rarely for another.
const PREPARE_TRIES: usize = 4096;
const READY_TRIES: usize = 64;
/// Shorter runs are made ready when there is nothing else (64 KiB).
const FAIR_BLOCKS: u32 = 16;
/// Blocks prepared in one step (8 MiB).
const STEP_BLOCKS: u32 = 2048;
/// Metadata blocks that only such changes may take as give room back. Others leave them, or a full pool could come to
/// refuse the very deletion that would help; what these take comes back with the next checkpoint.
pub(super) const RELEASE_BLOCKS: u64 = 48;
/// Checkpoints after which who lacks room for what it is owed is refused: others may take what each gives back for a moment.
const OWED_TRIES: u32 = 64;
/// What blocks are wanted for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    Metadata,
    /// Metadata of a change that gives back no less than it takes: deleting, and discarding what is not shared.
    Release,
    Data,
    /// Data whose old blocks come free by it.
    Redirect,
    /// Nothing yet: as many are to be there later.
    Reservation,
}

/// New blocks that writes have asked for lately.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Demand {
    writes: u64,
    blocks: u64,
    was_long: bool,
}

impl Demand {
    /// A write takes `blocks` new blocks.
    pub(super) fn note(&mut self, blocks: u64) {
        self.writes += u64::from(blocks > 0);
        self.blocks += blocks;
    }

    /// Whether the writes since it was last called took 64 KiB each or more; without any, as before.
    fn is_long(&mut self) -> bool {
        const LONG_BLOCKS: u64 = 16;
        let Self { writes, blocks, was_long } = std::mem::take(self);
        self.was_long = if writes == 0 { was_long } else { blocks >= LONG_BLOCKS * writes };
        self.was_long
    }
}

fn not_allocated(range: &Range<u64>, error: std::io::Error) -> Error {
    Error::io(format!("allocation of {} bytes at byte {} of the pool", range.end - range.start, range.start), error)
}

impl<S: Storage> Pool<S> {
    /// Makes room for `blocks` data or metadata blocks: takes windows back, prepares host space, waits for what has been
    /// freed, and at last forces a checkpoint. The caller tries again after `Ok`. Nothing may be held.
    ///
    /// `whose` are the blocks of the volume that may take them out of what it is owed (`reservation.rs`).
    ///
    /// `alongside` are the metadata blocks that the caller will have been promised when it takes its data blocks: they
    /// count as taken here already, or a plan that misses by a few would be told again and again that there is room.
    ///
    /// # Errors
    /// `NoSpace` when nothing helps.
    pub(super) async fn make_room(
        &self,
        blocks: u64,
        wanted: Use,
        whose: Option<VolumeId>,
        alongside: u64,
    ) -> Result<()> {
        let inner = &self.inner;
        let has_room = |state: &State| state.has_room(blocks, wanted, whose, alongside);
        let mut tries = 0;
        let metadata = matches!(wanted, Use::Metadata | Use::Release);
        loop {
            {
                let mut state = inner.state.borrow_mut();
                state.check_writable()?;
                if has_room(&state) {
                    return Ok(());
                }
                state.give_back_windows();
                if has_room(&state) {
                    return Ok(());
                }
            }
            // Where what is left is owed to others, more of it that is ready is of no use.
            let is_reserved = inner.state.borrow().is_left_to_others(blocks, wanted, whose, alongside);
            if !is_reserved && self.grow(metadata).await? {
                continue;
            }
            let (unrecorded, draining, free) = {
                let state = inner.state.borrow();
                (
                    !state.unrecorded_frees.is_empty(),
                    state.draining_frees.front().map(|(epoch, ..)| *epoch),
                    state.allocator.free(),
                )
            };
            if unrecorded && !metadata {
                self.commit().await?;
                continue;
            }
            if let Some(epoch) = draining
                && !metadata
            {
                until(&inner.signals.epoch, || {
                    let state = inner.state.borrow();
                    state.epochs.is_over(epoch) || state.poisoned.is_some()
                })
                .await;
                inner.state.borrow_mut().release_frees();
                continue;
            }
            let (fresh, eaten) = {
                let state = inner.state.borrow();
                (state.allocator.fresh(), state.counters.leaves_eaten)
            };
            self.checkpoint().await?;
            // What it freed passes on when the plans of before have left (O7).
            let epoch = inner.state.borrow_mut().epochs.advance();
            self.wait_for_epoch(epoch).await;
            inner.state.borrow_mut().release_frees();
            {
                // What was eaten while the checkpoint ran comes free with the next one.
                let state = inner.state.borrow();
                if state.allocator.free() > free
                    || state.allocator.fresh() > fresh
                    || state.counters.leaves_eaten > eaten
                {
                    continue;
                }
            }
            if self.eat_something().await? {
                continue;
            }
            {
                let mut state = inner.state.borrow_mut();
                if has_room(&state) {
                    return Ok(());
                }
                // What a check keeps back is given to who needs it.
                if state.give_up_pins() {
                    continue;
                }
            }
            if self.grow_by_itself().await? {
                continue;
            }
            if tries < OWED_TRIES && !inner.host_full.get() && self.is_owed_room(blocks, wanted, whose) {
                tries += 1;
                self.wait_for_promises(has_room).await;
                continue;
            }
            let mut state = inner.state.borrow_mut();
            state.counters.space_refusals += u64::from(wanted != Use::Reservation);
            tracing::debug!(
                free = state.allocator.free(),
                fresh = state.allocator.fresh(),
                promised = state.metadata_promised,
                administration = state.administration_blocks(),
                ?wanted,
                blocks,
                "no room"
            );
            let reason = match (inner.host_full.get(), is_reserved) {
                (true, false) => "the host has no space left for the pool",
                (_, true) => "the pool is full: what is left is reserved for other volumes",
                (false, false) => "the pool is full",
            };
            return Err(Error::NoSpace(reason.into()));
        }
    }

    /// Whether blocks are wanted that a volume is owed: then what is missing comes back.
    fn is_owed_room(&self, blocks: u64, wanted: Use, whose: Option<VolumeId>) -> bool {
        let state = self.inner.state.borrow();
        whose.is_some_and(|id| match wanted {
            Use::Metadata => state.is_owed(id, 0),
            Use::Data | Use::Redirect => state.is_owed(id, blocks),
            Use::Release | Use::Reservation => false,
        })
    }

    /// Waits until a change under way ends, which gives back what it was promised and did not take.
    async fn wait_for_promises(&self, has_room: impl Fn(&State) -> bool) {
        let listener = self.inner.signals.space.listen();
        let waits = {
            let state = self.inner.state.borrow();
            state.metadata_promised > 0 && !has_room(&state)
        };
        if waits { listener.await } else { futures_lite::future::yield_now().await }
    }

    /// Gets more blocks ready, such as metadata can use if it is `for_metadata`; answers whether there are more now. One task at
    /// a time does it, others wait for it.
    pub(super) async fn grow(&self, for_metadata: bool) -> Result<bool> {
        let inner = &self.inner;
        if inner.growing.get() {
            until(&inner.signals.space, || !inner.growing.get()).await;
            return Ok(true);
        }
        inner.growing.set(true);
        let grown = self.grow_step(for_metadata).await;
        inner.growing.set(false);
        inner.signals.space.notify(usize::MAX);
        match grown {
            Err(Error::NoSpace(reason)) => {
                if !inner.host_full.replace(true) {
                    tracing::warn!("the host has no space for the pool: {reason}");
                }
                Ok(false)
            }
            other => other,
        }
    }

    async fn grow_step(&self, for_metadata: bool) -> Result<bool> {
        let inner = &self.inner;
        let is_short = for_metadata || inner.state.borrow().allocator.fresh() < PREPARED_BLOCKS;
        let ways = [Unprepared::Unknown, Unprepared::Unready(FAIR_BLOCKS)];
        if self.get_ready(if is_short { &ways } else { &ways[1..] }, for_metadata).await? {
            return Ok(true);
        }
        let next = {
            let state = inner.state.borrow();
            (state.groups_in_use < state.geometry.group_count()).then_some(state.groups_in_use)
        };
        match next {
            Some(group) => self.append_group(group).await.map(|()| true),
            // At last what is in pieces.
            None => self.prepare(Unprepared::Unready(1), for_metadata).await,
        }
    }

    /// Prepares a run in one of these ways, or reads a group: what the host refuses here it may have there. Answers whether
    /// there is more now.
    ///
    /// # Errors
    /// `NoSpace` when the host has refused something and there is no more to be had.
    pub(super) async fn get_ready(&self, ways: &[Unprepared], for_metadata: bool) -> Result<bool> {
        let mut refusal = None;
        for which in ways {
            match self.prepare(*which, for_metadata).await {
                Ok(false) => {}
                Err(error @ Error::NoSpace(_)) => refusal = Some(error),
                other => return other,
            }
        }
        let Some(group) = self.group_to_load() else { return refusal.map_or(Ok(false), Err) };
        self.load_group(group).await.map(|()| true)
    }

    /// A group that is not in memory and has free blocks.
    fn group_to_load(&self) -> Option<u64> {
        let state = self.inner.state.borrow();
        (0..state.groups_in_use)
            .find(|group| !state.allocator.has_group(*group) && state.index_entry(*group).free_blocks > 0)
    }

    /// Makes sure of the host's space for a run of unprepared blocks. A full host refuses some and not others: those that a
    /// former session had prepared are there; so less is asked for, and then elsewhere. Answers whether there was a run.
    ///
    /// The run is written, since a short first write to a hole costs several times as much; unless writes have been long
    /// lately, which would have everything written twice. Metadata wants what is written.
    ///
    /// # Errors
    /// `NoSpace` when the host has refused all that was tried.
    async fn prepare(&self, which: Unprepared, for_metadata: bool) -> Result<bool> {
        let inner = &self.inner;
        let (mut most, tries, written) = match which {
            Unprepared::Unknown => (256, PREPARE_TRIES, true),
            Unprepared::Unready(_) => {
                let mut state = inner.state.borrow_mut();
                let step = (state.ready_blocks() as u32).clamp(FAIR_BLOCKS, STEP_BLOCKS);
                (step, READY_TRIES, for_metadata || !state.demand.is_long())
            }
        };
        let mut from = inner.state.borrow().geometry.first_group();
        let mut refusal = None;
        for _ in 0..tries {
            let Some(run) = inner.state.borrow_mut().allocator.take_unprepared(which, most, from) else { break };
            let made = if written { self.extend(run.bytes()).await } else { self.reserve(run.bytes()).await };
            let mut state = inner.state.borrow_mut();
            if made.is_ok() {
                state.allocator.made_ready(run, written);
            }
            state.allocator.release_run(run);
            match made {
                Ok(()) => return Ok(true),
                Err(error @ Error::NoSpace(_)) => refusal = Some(error),
                Err(error) => return Err(error),
            }
            if most > FAIR_BLOCKS {
                most = if most > 256 { 256 } else { FAIR_BLOCKS };
            } else {
                from = run.start.plus(run.count);
            }
        }
        refusal.map_or(Ok(false), Err)
    }

    pub(super) async fn extend(&self, range: Range<u64>) -> Result<()> {
        let blocks = (range.end - range.start) / BLOCK_BYTES;
        let _work = self.at(Work::Extend);
        self.inner.storage.extend(range.clone()).await.map_err(|error| not_allocated(&range, error))?;
        self.inner.state.borrow_mut().counters.blocks_extended += blocks;
        Ok(())
    }

    async fn reserve(&self, range: Range<u64>) -> Result<()> {
        let _work = self.at(Work::Extend);
        self.inner.storage.reserve(range.clone()).await.map_err(|error| not_allocated(&range, error))
    }

    /// The background task for space: keeps blocks ready, and punches what is free when there is little to do.
    pub(super) async fn run_space(&self) {
        let inner = &self.inner;
        let mut seen = inner.ticks.get();
        let (mut grew, mut is_filling) = (true, true);
        loop {
            until(&inner.signals.work, || {
                let state = inner.state.borrow();
                let wants_more =
                    || inner.growth_wanted.get() && if is_filling { !state.is_full() } else { state.is_low() };
                inner.stopped.get()
                    || state.poisoned.is_some()
                    || inner.ticks.get() != seen
                    || (grew && !state.closing && wants_more())
            })
            .await;
            if inner.stopped.get() || inner.state.borrow().poisoned.is_some() {
                return;
            }
            if inner.ticks.get() != seen {
                seen = inner.ticks.get();
                grew = true;
                inner.host_full.set(false);
                if let Err(error) = self.load_freed_groups().await {
                    tracing::error!("background work on space: {error}");
                }
                self.punch_in_idle_moments().await;
                continue;
            }
            match self.grow(false).await {
                Ok(more) => grew = more,
                Err(error) => {
                    grew = false;
                    tracing::error!("background work on space: {error}");
                }
            }
            is_filling = !inner.state.borrow().is_full();
        }
    }
}

impl State {
    /// Free blocks that are kept ready: no fewer are left when space is given back, or it would be taken again at once.
    pub(super) fn ready_blocks(&self) -> u64 {
        READY_BLOCKS.min(self.geometry.pool_blocks / READY_PART)
    }

    /// Whether as many blocks are ready as are kept.
    fn is_full(&self) -> bool {
        self.allocator.free() >= self.ready_blocks()
    }

    /// Whether more blocks should be made ready. Not at once: zeros that are written because of one small write would be in the
    /// way of the flush after it.
    pub(super) fn is_low(&self) -> bool {
        self.allocator.free() < self.ready_blocks() / 2
    }

    /// Whether `blocks` metadata blocks may be promised for a change.
    pub(super) fn has_metadata(&self, blocks: u64, wanted: Use, whose: Option<VolumeId>) -> bool {
        let kept = if wanted == Use::Release { 0 } else { RELEASE_BLOCKS };
        self.allocator.fresh() >= self.administration_blocks() + self.metadata_promised + kept + blocks
            && (wanted == Use::Release || self.leaves_owed_metadata(blocks, whose))
    }

    fn has_room(&self, blocks: u64, wanted: Use, whose: Option<VolumeId>, alongside: u64) -> bool {
        if matches!(wanted, Use::Metadata | Use::Release) {
            return self.has_metadata(blocks, wanted, whose);
        }
        if self.is_left_to_others(blocks, wanted, whose, alongside) {
            return false;
        }
        let (free, fresh) = (self.allocator.free(), self.allocator.fresh());
        let recycled = free.saturating_sub(fresh);
        let reserve = self.reserve_for(blocks, wanted, whose);
        wanted == Use::Reservation || recycled + fresh.saturating_sub(reserve + alongside) >= blocks
    }

    /// Blocks that must be left for metadata by who takes `blocks` of data.
    pub(super) fn reserve_for(&self, blocks: u64, wanted: Use, whose: Option<VolumeId>) -> u64 {
        match wanted {
            Use::Data | Use::Redirect if whose.is_some_and(|id| self.is_owed(id, blocks)) => self.owed_reserve_blocks(),
            Use::Redirect => self.lending_reserve_blocks(),
            _ => self.data_reserve_blocks(),
        }
    }

    /// Whether others are owed so much of all that can be had that too little is left.
    fn is_left_to_others(&self, blocks: u64, wanted: Use, whose: Option<VolumeId>, alongside: u64) -> bool {
        let others = match wanted {
            Use::Release => return false,
            Use::Metadata => return !self.leaves_owed_metadata(blocks, whose),
            Use::Reservation => whose,
            Use::Data | Use::Redirect => whose.filter(|id| self.is_owed(*id, blocks)),
        };
        if self.owed_blocks == 0 && wanted != Use::Reservation {
            return false;
        }
        let reserve = self.reserve_for(blocks, wanted, whose);
        self.obtainable_blocks() < reserve + alongside + self.owed_to_others(others) + blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_only_reserved_for_who_writes_much_at_a_time() {
        let mut demand = Demand::default();
        assert!(!demand.is_long(), "nothing is known yet");
        for _ in 0..9 {
            demand.note(64);
        }
        assert!(demand.is_long());
        assert!(demand.is_long(), "nobody has written since");
        demand.note(0);
        assert!(demand.is_long(), "a write in place says nothing");
        for _ in 0..9 {
            demand.note(1);
        }
        demand.note(64);
        assert!(!demand.is_long());
    }
}

//! Space: bringing groups into memory and into use, preparing blocks on the host ahead of need, and giving back.

use super::pool::{Pool, until};
use super::space::{GroupSpace, PREPARED_BLOCKS};
use super::state::State;
use super::work::Work;
use super::{Memory, Storage};
use crate::canary::{Canary, is_broken};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{self, COUNTS_PER_PAGE, Place, Record};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, PoolBlock, VolumeId};

/// Free blocks that the background task keeps ready (32 MiB), and of a small pool this part.
const READY_BLOCKS: u64 = 8192;
const READY_PART: u64 = 16;
/// Runs tried to be prepared while the host refuses: those of a former session's reserve are among them.
const PREPARE_TRIES: usize = 4096;
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

/// Shortest run that is worth punching (64 KiB), and the longest that is punched at once (32 MiB).
const PUNCH_BLOCKS: (u32, u32) = (16, 8192);
/// The same where everything is to go: no longer ones, so that little is left for the sake of metadata.
const TRIM_BLOCKS: (u32, u32) = (1, 256);

/// How blocks were made ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Readiness {
    Written,
    /// The host has the space and has not written it: not for metadata.
    Reserved,
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
            if !is_reserved && self.grow().await? {
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

    /// Gets more blocks ready; answers whether there are more now. One task at a time does it, others wait for it.
    pub(super) async fn grow(&self) -> Result<bool> {
        let inner = &self.inner;
        if inner.growing.get() {
            until(&inner.signals.space, || !inner.growing.get()).await;
            return Ok(true);
        }
        inner.growing.set(true);
        let grown = self.grow_step().await;
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

    async fn grow_step(&self) -> Result<bool> {
        let inner = &self.inner;
        if inner.state.borrow().allocator.fresh() < PREPARED_BLOCKS && self.prepare().await? {
            return Ok(true);
        }
        if self.take_back().await? {
            return Ok(true);
        }
        let (unready, unloaded, next) = {
            let state = inner.state.borrow();
            let unready = (0..state.groups_in_use).rev().find_map(|group| {
                state.allocator.readiness(group).filter(|(ready, all)| ready < all).map(|(ready, _)| (group, ready))
            });
            let unloaded = (0..state.groups_in_use)
                .find(|group| !state.allocator.has_group(*group) && state.index_entry(*group).free_blocks > 0);
            let next = (state.groups_in_use < state.geometry.group_count()).then_some(state.groups_in_use);
            (unready, unloaded, next)
        };
        if let Some((group, ready)) = unready {
            let start = inner.state.borrow().geometry.group_start(group);
            let range = start.plus(u64::from(ready)).offset_bytes()
                ..start
                    .plus(u64::from(ready + STEP_BLOCKS).min(inner.state.borrow().geometry.group_blocks(group)))
                    .offset_bytes();
            let readiness = self.make_ready(range).await?;
            let is_written = readiness == Readiness::Written;
            inner.state.borrow_mut().allocator.make_ready(group, ready + STEP_BLOCKS, is_written);
            return Ok(true);
        }
        if let Some(group) = unloaded {
            self.load_group(group).await?;
            return Ok(true);
        }
        let Some(group) = next else { return Ok(false) };
        self.append_group(group).await?;
        Ok(true)
    }

    /// Makes sure of the host's space for a run of fresh blocks of which it is not known: whether a block is allocated there
    /// is not kept. A full host refuses some and not others: those that a former session had prepared are there.
    pub(super) async fn prepare(&self) -> Result<bool> {
        const RUN_BLOCKS: u32 = 256;
        let inner = &self.inner;
        let mut from = inner.state.borrow().geometry.first_group();
        let mut refusal = None;
        for _ in 0..PREPARE_TRIES {
            let most = if refusal.is_some() { 16 } else { RUN_BLOCKS };
            let Some(run) = inner.state.borrow_mut().allocator.take_unprepared(most, from) else { break };
            let extended = self.extend(run.start.offset_bytes()..run.start.plus(run.count).offset_bytes()).await;
            let mut state = inner.state.borrow_mut();
            if extended.is_ok() {
                state.allocator.prepared(run);
            }
            for offset in 0..run.count {
                state.allocator.release(run.start.plus(offset));
            }
            match extended {
                Ok(()) => return Ok(true),
                Err(error @ Error::NoSpace(_)) => refusal = Some(error),
                Err(error) => return Err(error),
            }
            from = run.start.plus(run.count);
        }
        refusal.map_or(Ok(false), Err)
    }

    /// Prepares blocks that were given back to the host, so that they are free again. Answers whether there were any.
    pub(super) async fn take_back(&self) -> Result<bool> {
        let inner = &self.inner;
        let Some(run) = inner.state.borrow_mut().allocator.take_given_back(STEP_BLOCKS) else { return Ok(false) };
        let made = self.make_ready(run.start.offset_bytes()..run.start.plus(run.count).offset_bytes()).await;
        let mut state = inner.state.borrow_mut();
        match made {
            Ok(Readiness::Written) => state.allocator.prepared(run),
            Ok(Readiness::Reserved) => state.allocator.reserved(run),
            Err(error) => {
                state.allocator.give_back(run);
                // A full host may have parts of it, or of others: they are tried one by one, as what is not known.
                if matches!(error, Error::NoSpace(_)) {
                    state.allocator.release_given_back();
                    return Ok(true);
                }
                return Err(error);
            }
        }
        for offset in 0..run.count {
            state.allocator.release(run.start.plus(offset));
        }
        Ok(true)
    }

    /// Makes sure of the host's space for a range from which blocks will be handed out: written where writes are short, since a
    /// short first write to a block that the host has not written costs several times as much; and only reserved where
    /// they have been long lately, which would have everything written twice.
    async fn make_ready(&self, range: std::ops::Range<u64>) -> Result<Readiness> {
        let must_be_written = {
            let mut state = self.inner.state.borrow_mut();
            // What is only reserved cannot become metadata.
            let needed = state.administration_blocks() + state.metadata_promised + RELEASE_BLOCKS + PREPARED_BLOCKS / 2;
            !state.demand.is_long() || state.allocator.fresh() < needed
        };
        if must_be_written {
            self.extend(range).await?;
            return Ok(Readiness::Written);
        }
        let what = format!("allocation of {} bytes at byte {} of the pool", range.end - range.start, range.start);
        let _work = self.at(Work::Extend);
        self.inner.storage.reserve(range).await.map_err(|error| Error::io(what, error))?;
        Ok(Readiness::Reserved)
    }

    pub(super) async fn extend(&self, range: std::ops::Range<u64>) -> Result<()> {
        let what = format!("allocation of {} bytes at byte {} of the pool", range.end - range.start, range.start);
        let _work = self.at(Work::Extend);
        let blocks = (range.end - range.start) / BLOCK_BYTES;
        self.inner.storage.extend(range).await.map_err(|error| Error::io(what, error))?;
        self.inner.state.borrow_mut().counters.blocks_extended += blocks;
        Ok(())
    }

    /// Takes the next group into use: its descriptors and both slots of its pages of counts are allocated on the host and
    /// flushed, then the change is recorded, and only then a block of it is handed out. No checkpoint can fail for host
    /// space. (Its pages of checksums: `checksums.rs`.)
    async fn append_group(&self, group: u64) -> Result<()> {
        let inner = &self.inner;
        let geometry = inner.state.borrow().geometry;
        let start = geometry.group_start(group);
        let layout = geometry.layout_blocks(group);
        let at_once = geometry.layout_blocks_unsealed(group);
        self.extend(start.offset_bytes()..start.plus(at_once).offset_bytes()).await?;
        inner.storage.flush().await.map_err(|error| self.poison(&Error::io("flush of a new group", error)))?;
        let mut state = inner.state.borrow_mut();
        state.groups_in_use = group + 1;
        let record = Record::PoolGrown { groups_in_use: group + 1 };
        state.publish(None, &record);
        state.add_group(group, GroupSpace::new(geometry.group_blocks(group) as u32, layout as u32));
        state.counters.groups_appended += 1;
        Ok(())
    }

    /// Reads a group's counts and learns which of its blocks are free.
    pub(super) async fn load_group(&self, group: u64) -> Result<()> {
        let inner = &self.inner;
        loop {
            until(&inner.signals.checkpointed, || {
                let state = inner.state.borrow();
                !state.checkpointing || state.poisoned.is_some()
            })
            .await;
            if let Some(error) = self.poison_error() {
                return Err(error);
            }
            // What a checkpoint freed in a group that was not in memory is found free here: rule O7 holds for it, too.
            let epoch = inner.state.borrow_mut().epochs.advance();
            self.wait_for_epoch(epoch).await;
            let begun = inner.checkpoints_begun.get();
            let counts = self.read_group(group).await?;
            let range = {
                let geometry = inner.state.borrow().geometry;
                let start = geometry.group_start(group);
                start.offset_bytes()..start.plus(geometry.group_blocks(group)).offset_bytes()
            };
            let holes = inner.storage.holes(range);
            let mut state = inner.state.borrow_mut();
            // A checkpoint meanwhile may have written other slots than those that were read.
            if begun == inner.checkpoints_begun.get() && !state.checkpointing {
                if !state.allocator.has_group(group) {
                    state.add_loaded_group(group, &counts, &holes);
                }
                return Ok(());
            }
        }
    }

    async fn read_group(&self, group: u64) -> Result<Vec<u32>> {
        self.load_descriptor(group).await?;
        let (descriptor, range, uuid, geometry) = {
            let state = self.inner.state.borrow();
            let descriptor =
                state.descriptors.get(&group).cloned().unwrap_or_else(|| format::GroupDescriptor::new(group));
            (descriptor, state.geometry.pages_range(group), state.uuid, state.geometry)
        };
        let count = (range.end - range.start) as usize;
        let bytes = if descriptor.pages.iter().any(|page| page.present) {
            let memory = self.inner.storage.allocate(count * BLOCK_SIZE);
            let read = self.inner.storage.read(range.start * BLOCK_BYTES, &memory).await;
            read.map_err(|error| Error::io(format!("read of the counts of group {group}"), error))?;
            let mut bytes = vec![0; count * BLOCK_SIZE];
            memory.read(0, &mut bytes);
            bytes
        } else {
            Vec::new()
        };
        let mut counts = Vec::with_capacity(format::GROUP_BLOCKS as usize);
        for (page, reference) in descriptor.pages.iter().enumerate() {
            let page = page as u32;
            if !reference.present {
                counts.extend_from_slice(&super::pool::implied_counts(&self.inner.state.borrow(), group, page)[..]);
                continue;
            }
            let address = geometry.page_block(group, page, reference.slot);
            let at = (address.0 - range.start) as usize * BLOCK_SIZE;
            let structure = Structure::SpaceMapPage;
            let Some(block) = bytes.get(at..at + BLOCK_SIZE) else {
                return Err(Corrupt { structure, address, check: Check::Truncated }.into());
            };
            let found = format::checksum(&uuid, Place::SpaceMapPage { group, page }, block);
            if found != reference.checksum {
                let check = Check::Checksum { expected: reference.checksum, found };
                return Err(Corrupt { structure, address, check }.into());
            }
            let page = format::decode_counts(block).map_err(|check| Corrupt { structure, address, check })?;
            counts.extend_from_slice(&page[..]);
        }
        Ok(counts)
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
            match self.grow().await {
                Ok(more) => grew = more,
                Err(error) => {
                    grew = false;
                    tracing::error!("background work on space: {error}");
                }
            }
            is_filling = !inner.state.borrow().is_full();
        }
    }

    /// A tick's share of punching; as long as nobody wants anything meanwhile, another.
    async fn punch_in_idle_moments(&self) {
        const RUNS: usize = 64;
        loop {
            let seen = self.inner.requests.get();
            let keep = self.inner.state.borrow().ready_blocks();
            let is_done = self.punch_some(RUNS, PUNCH_BLOCKS, keep).await < RUNS;
            if is_done || self.inner.requests.get() != seen || self.inner.state.borrow().closing {
                return;
            }
        }
    }

    /// Groups in which a checkpoint freed blocks are read, so that these are used again or given back.
    async fn load_freed_groups(&self) -> Result<()> {
        let groups = std::mem::take(&mut self.inner.state.borrow_mut().groups_freed_in);
        for group in groups {
            if !self.inner.state.borrow().allocator.has_group(group) {
                self.load_group(group).await?;
            }
        }
        Ok(())
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
        // It stays with the host until somebody writes; who writes meanwhile does not have it taken back as fast as it is given.
        self.inner.growth_wanted.set(false);
        while self.punch_some(64, TRIM_BLOCKS, 0).await == 64 {
            self.inner.growth_wanted.set(false);
            futures_lite::future::yield_now().await;
        }
        self.inner.storage.flush().await.map_err(|error| self.poison(&Error::io("flush after punching", error)))
    }

    /// Gives up to `runs` free runs of `least` to `most` blocks back to the host, and answers how many; `keep_free` free blocks
    /// stay. A run under punch is claimed: nobody is handed its blocks.
    pub(super) async fn punch_some(&self, runs: usize, (least, most): (u32, u32), keep_free: u64) -> usize {
        let inner = &self.inner;
        for done in 0..runs {
            let punchable = inner.state.borrow_mut().allocator.take_punchable(least, most, PREPARED_BLOCKS, keep_free);
            let Some(run) = punchable else { return done };
            let range = run.start.offset_bytes()..run.start.plus(run.count).offset_bytes();
            let release = || {
                let mut state = inner.state.borrow_mut();
                for offset in 0..run.count {
                    state.allocator.release(run.start.plus(offset));
                }
            };
            if is_broken(Canary::PunchUnclaimed) {
                release();
            }
            let work = self.at(Work::Punch);
            let punched = inner.storage.punch(range).await;
            drop(work);
            if punched.is_err() && !is_broken(Canary::PunchUnclaimed) {
                release();
            }
            {
                let mut state = inner.state.borrow_mut();
                match punched {
                    Ok(()) => {
                        state.counters.blocks_punched += run.count;
                        if !is_broken(Canary::PunchUnclaimed) {
                            state.allocator.give_back(run);
                        }
                    }
                    Err(error) => tracing::warn!("punch of {} blocks at pool block {}: {error}", run.count, run.start),
                }
            }
            inner.signals.space.notify(usize::MAX);
        }
        runs
    }
}

impl State {
    /// Free blocks that are kept ready: no fewer are left when space is given back, or it would be taken again at once.
    fn ready_blocks(&self) -> u64 {
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

    /// Adds a group that was in use before: free is what the durable counts say, nothing has touched since, and no freed
    /// block waits for. What of that is in `holes` (bytes of the pool) is prepared before it is used.
    fn add_loaded_group(&mut self, group: u64, counts: &[u32], holes: &[std::ops::Range<u64>]) {
        let blocks = self.geometry.group_blocks(group) as u32;
        let mut space = GroupSpace::new(blocks, blocks);
        let start = self.geometry.group_start(group);
        let waiting: rustc_hash::FxHashSet<PoolBlock> = self
            .unrecorded_frees
            .iter()
            .map(|(_, block)| *block)
            .chain(self.draining_frees.iter().map(|(_, block, _)| *block))
            .chain(self.pinned.blocks())
            .collect();
        let mut holes = holes.iter().peekable();
        for (index, count) in counts.iter().enumerate().take(blocks as usize) {
            let page = (group, (index as u64 / COUNTS_PER_PAGE) as u32);
            let in_page = (index as u64 % COUNTS_PER_PAGE) as u16;
            let block = start.plus(index as u64);
            while holes.next_if(|hole| hole.end <= block.offset_bytes()).is_some() {}
            if *count == 0 && self.deltas.get(page, in_page).is_none() && !waiting.contains(&block) {
                let in_hole = |hole: &&std::ops::Range<u64>| {
                    hole.start <= block.offset_bytes() && block.plus(1).offset_bytes() <= hole.end
                };
                if holes.peek().copied().is_some_and(|hole| in_hole(&hole)) {
                    space.set_given_back(index as u32);
                } else {
                    space.set_fresh(index as u32);
                }
            } else if *count > 0 {
                space.set_used(index as u32);
            }
        }
        self.add_group(group, space);
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

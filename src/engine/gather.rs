//! Blocks that are read or written together are brought together.
//!
//! Random writes leave neighbouring blocks of a volume all over the pool, and a long read of them is many short ones. Where one
//! was, its blocks are written once more, in few runs, so that the next one is short: no more is written by this than was read.
//! A long write to such blocks goes to new ones, in as few pieces.
//!
//! Invariant: the content is the same at every instant, and nobody gets less room. Only blocks that the volume may overwrite in
//! place are moved, since a copy of what is shared would take room for good; only where there is plenty of room; and nothing
//! while somebody is owed some. The order is that of a write (rules O5, O7, O8): the range held, an epoch entered, read,
//! written to new blocks, mapped. A volume that nobody has open is left alone, so that whoever changes it as a whole has
//! waited for the last of this when no range is held any more.

use futures_lite::future::zip;
use smallvec::SmallVec;

use super::growth::Use;
use super::pool::{Pool, until};
use super::space::Run;
use super::state::{State, TreeKey, Try};
use super::tree::entry_index;
use super::write::{MAP_RECORD_BYTES, Step, TakenBlocks};
use super::{Memory, Storage};
use crate::error::{Error, Result};
use crate::format::{ENTRIES_PER_NODE, EntryKind, GROUP_BLOCKS};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, PoolBlock, VolumeId};

/// Shortest read that makes blocks worth moving.
const LEAST_BLOCKS: u64 = 16;
/// A read whose runs have as many blocks on average is left as it is.
const FAIR_RUN_BLOCKS: u64 = 4;
/// Shortest run that blocks are moved to, where all of them have no room in one.
const LEAST_RUN_BLOCKS: u64 = 16;
/// Reads that wait for their turn; others are seen when they come again.
const NOTED_MOST: usize = 256;
/// The part of the pool that stays free: one in so many.
const FREE_PART: u64 = 32;

/// Blocks that were read together and do not stand together.
#[derive(Clone, Copy)]
pub(super) struct Scattered {
    volume: VolumeId,
    first: u64,
    count: u64,
}

/// What is to be moved where.
struct Gathering {
    /// Where the blocks are, in the order of their new places.
    old: Vec<PoolBlock>,
    steps: SmallVec<[Step; 4]>,
}

/// Whether so many blocks in so many runs are worth moving.
pub(super) fn is_scattered(runs: u64, blocks: u64) -> bool {
    blocks >= LEAST_BLOCKS && runs * FAIR_RUN_BLOCKS > blocks
}

impl<S: Storage> Pool<S> {
    /// Takes note of a read that was in `parts` pieces.
    pub(super) fn note_read(&self, volume: VolumeId, offset: u64, length: u64, parts: usize) {
        let first = offset.div_ceil(BLOCK_BYTES);
        let count = ((offset + length) / BLOCK_BYTES).saturating_sub(first);
        if !is_scattered(parts as u64, count) {
            return;
        }
        let mut scattered = self.inner.scattered.borrow_mut();
        if scattered.len() < NOTED_MOST {
            scattered.push_back(Scattered { volume, first, count });
            drop(scattered);
            self.inner.signals.work.notify(usize::MAX);
        }
    }

    /// The tasks that bring blocks together: one alone would wait behind whole queues of the reads that it is to make short.
    pub(super) async fn run_gatherers(&self) {
        let two = || zip(self.run_gathering(), self.run_gathering());
        zip(zip(two(), two()), zip(two(), two())).await;
    }

    async fn run_gathering(&self) {
        let inner = &self.inner;
        let mut seen = inner.ticks.get();
        loop {
            until(&inner.signals.work, || {
                inner.stopped.get() || inner.state.borrow().poisoned.is_some() || !inner.scattered.borrow().is_empty()
            })
            .await;
            if inner.stopped.get() || inner.state.borrow().poisoned.is_some() {
                return;
            }
            let next = inner.scattered.borrow_mut().pop_front();
            let Some(scattered) = next else { continue };
            if let Err(error) = self.gather(scattered).await {
                tracing::debug!("blocks are not brought together: {error}");
                inner.scattered.borrow_mut().clear();
                self.wait_for_tick(&mut seen).await;
            }
        }
    }

    async fn gather(&self, scattered: Scattered) -> Result<()> {
        let Scattered { volume, first, count } = scattered;
        let records_bytes = count as usize * MAP_RECORD_BYTES;
        let Some(_promise) = self.try_promise(volume, count, records_bytes)? else {
            return Err(Error::NoSpace("no room for a change of the mapping".into()));
        };
        let _held = self.hold_range(volume, first, first + count).await?;
        let _stay = self.enter();
        let Some(Gathering { old, steps }) = self.attempt(|state| state.plan_gathering(scattered)).await?? else {
            return Ok(());
        };
        let memory = self.inner.storage.allocate(old.len() * BLOCK_SIZE);
        if let Err(error) = self.read_all(&old, &memory).await {
            self.inner.state.borrow_mut().give_up(volume, &steps);
            return Err(Error::io(format!("read of {} at block {first}", self.volume_name(volume)), error));
        }
        self.carry_out(volume, &steps, &memory, first * BLOCK_BYTES).await?;
        self.inner.state.borrow_mut().counters.blocks_gathered += old.len() as u64;
        Ok(())
    }

    /// Fills `memory` from single blocks, neighbours in one read.
    async fn read_all(&self, blocks: &[PoolBlock], memory: &S::Memory) -> std::io::Result<()> {
        let mut reads = Vec::new();
        let mut start = 0;
        for position in 1..=blocks.len() {
            if blocks.get(position).is_some_and(|next| *next == blocks[position - 1].plus(1)) {
                continue;
            }
            let into = memory.slice(start * BLOCK_SIZE..position * BLOCK_SIZE);
            reads.push(self.inner.storage.read(blocks[start].offset_bytes(), &into));
            start = position;
        }
        let mut outcome = Ok(());
        for read in reads {
            outcome = outcome.and(read.await);
        }
        outcome
    }
}

impl State {
    /// What is to be moved, with its new blocks taken; nothing where it is not worth it. The inner error is want of room.
    fn plan_gathering(&mut self, scattered: Scattered) -> Try<Result<Option<Gathering>>> {
        let Scattered { volume: id, first, count } = scattered;
        let Some(volume) = self.volumes.get(&id) else { return Ok(Ok(None)) };
        let is_left_alone = volume.open == 0 || volume.unready || volume.record.flags.read_only;
        if is_left_alone || self.closing || self.check_writable().is_err() {
            return Ok(Ok(None));
        }
        let (virtual_blocks, old) = self.own_blocks_of(id, first, first + count)?;
        let joined = |position: &usize| {
            old[*position] == old[position - 1].plus(1) && virtual_blocks[*position] == virtual_blocks[position - 1] + 1
        };
        let runs = old.len() - (1..old.len()).filter(joined).count();
        let blocks = old.len() as u64;
        if !is_scattered(runs as u64, blocks) {
            return Ok(Ok(None));
        }
        let Some(taken) = self.take_together(id, blocks) else {
            return Ok(Err(Error::NoSpace(format!("no {blocks} free blocks stand together"))));
        };
        let mut steps: SmallVec<[Step; 4]> = SmallVec::new();
        for (position, (block, new)) in virtual_blocks.into_iter().zip(taken).enumerate() {
            match steps.last_mut() {
                Some(Step::Redirect { block: first, run, .. })
                    if *first + run.count == block && run.start.plus(run.count) == new =>
                {
                    run.count += 1;
                }
                _ => {
                    let run = Run { start: new, count: 1 };
                    steps.push(Step::Redirect { block, run, from: position * BLOCK_SIZE });
                }
            }
        }
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.planned_blocks += blocks;
        }
        Ok(Ok(Some(Gathering { old, steps })))
    }

    /// New blocks in few runs for as many that do not stand together; none while room is short or somebody is owed some.
    pub(super) fn take_together(&mut self, id: VolumeId, blocks: u64) -> Option<TakenBlocks> {
        // Looking through a large pool in vain takes time, and what would help comes with checkpoints, or as fresh groups.
        let free = self.allocator.free();
        let is_in_vain = self
            .no_run_of
            .is_some_and(|(at, was_free, refused)| at == self.generation && free <= was_free && blocks >= refused);
        let reserve = self.reserve_for(blocks, Use::Data, Some(id));
        let untouched = (self.geometry.group_count() - self.groups_in_use) * GROUP_BLOCKS;
        let is_plenty =
            free + self.allocator.unready() + untouched > reserve + blocks + self.geometry.pool_blocks / FREE_PART;
        if is_in_vain || self.owed_blocks > 0 || !is_plenty {
            return None;
        }
        let mut runs: SmallVec<[Run; 2]> = SmallVec::new();
        let mut missing = blocks;
        while missing > 0 {
            match self.allocator.take_run(missing.min(LEAST_RUN_BLOCKS), missing, reserve) {
                Some(run) => {
                    missing -= run.count;
                    runs.push(run);
                }
                None => {
                    self.no_run_of = Some((self.generation, free, blocks));
                    self.release_runs(&runs);
                    return None;
                }
            }
        }
        Some(TakenBlocks::new(runs))
    }

    /// Of the blocks `first..end`, those that are the volume's own, and where they are.
    fn own_blocks_of(&mut self, id: VolumeId, first: u64, end: u64) -> Try<(Vec<u64>, Vec<PoolBlock>)> {
        let key = TreeKey::Volume(id);
        let shared_at = self.shared_at(key);
        let (mut virtual_blocks, mut blocks) = (Vec::new(), Vec::new());
        let mut at = first;
        while at < end {
            let leaf_end = ((at | (ENTRIES_PER_NODE as u64 - 1)) + 1).min(end);
            if let Some(leaf) = self.leaf(key, at)? {
                for block in at..leaf_end {
                    let entry = leaf.entry(entry_index(block, 0));
                    if entry.kind == EntryKind::Block && entry.birth >= shared_at {
                        virtual_blocks.push(block);
                        blocks.push(entry.address);
                    }
                }
            }
            at = leaf_end;
        }
        Ok((virtual_blocks, blocks))
    }
}

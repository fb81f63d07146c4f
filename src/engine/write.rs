//! Writing: in place where the block is the volume's own, else to a new block that is mapped when the data has landed.
//!
//! Order (rules O5, O7, O8): take nothing and wait for room; hold the range; enter an epoch; plan; write; change the
//! mapping and publish the change; answer. A plan that finds no space lets go of range and epoch and is made again.

use smallvec::SmallVec;

use super::gather::is_scattered;
use super::growth::Use;
use super::patience::Waited;
use super::pool::{Pool, until};
use super::promise::{Promise, metadata_blocks};
use super::space::Run;
use super::state::{Freed, Need, State, TreeKey, Try};
use super::tree::entry_index;
use super::volume::{Held, VolumeHandle};
use super::{Memory, Storage};
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{ENTRIES_PER_NODE, Entry, EntryKind, Record};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Clock, PoolBlock, VirtualBlock, VolumeId};

/// Bytes of one map record.
pub(super) const MAP_RECORD_BYTES: usize = 32;

/// Bytes of records that set off a commit by themselves.
const COMMIT_BYTES: usize = 1 << 20;

/// A step of a planned write.
pub(super) enum Step {
    /// Overwrite the volume's own blocks: bytes `skip..` of the run.
    InPlace { at: PoolBlock, skip: u64, from: usize, length: usize },
    /// Write whole blocks to a new run.
    Redirect { block: u64, run: Run, from: usize },
    /// Write part of a block: its old content (or zeros) merged with the new. `in_place` when it is the volume's own and
    /// the host cannot write so small a part.
    Merge {
        block: u64,
        old: Option<PoolBlock>,
        new: PoolBlock,
        in_place: bool,
        skip: usize,
        from: usize,
        length: usize,
    },
}

/// Most writes are one block: what is kept of one stands in the future itself and not on the heap.
type Steps = SmallVec<[Step; 1]>;

/// What a write finds in the map.
struct Survey {
    /// Data blocks that it will take.
    missing: u64,
    /// By how many the volume's own blocks will grow.
    more_own: u64,
    /// The entry of each block that it touches.
    entries: SmallVec<[Entry; 2]>,
}

/// A planned write.
struct Plan {
    steps: Steps,
    /// Own blocks that it will add.
    more_own: u64,
}

/// Why a plan could not be made.
enum Unplanned {
    Need(Need),
    /// Data blocks are missing.
    Space {
        missing: u64,
        /// As many come free by the write.
        refills: bool,
    },
    /// The mapping changes, and no room was promised for that.
    Promise,
    Refused(Error),
}

/// What a change that let go again must wait for.
pub(super) enum Lacking {
    /// Data blocks.
    Space {
        missing: u64,
        /// As many come free by the write.
        refills: bool,
    },
    /// Room for a change of the mapping; for what it may be taken.
    Promise(Use),
    /// Space of the host, which refused it under a block that the pool has: whether one is backed is not kept over a restart.
    Host(Error),
}

/// How a write is to be planned.
#[derive(Clone, Copy)]
struct Manner {
    /// Only blocks that are mapped are written.
    mapped_only: bool,
    /// Room for a change of the mapping has been promised.
    may_map: bool,
    /// Smallest unit the host writes, in bytes.
    alignment: usize,
}

impl From<Need> for Unplanned {
    fn from(need: Need) -> Self {
        Self::Need(need)
    }
}

impl<S: Storage> VolumeHandle<S> {
    /// Writes all of `from` at `offset` bytes. When this completes the change is made and published: the engine's death
    /// does not lose it. A power cut may, unless `fua` was set or a [`flush`](VolumeHandle::flush) follows.
    ///
    /// # Errors
    /// `NoSpace` when a block is needed and neither pool nor quota has one: nothing has changed then.
    pub async fn write(&self, offset: u64, from: &S::Memory, fua: bool) -> Result<Held<S>> {
        self.check_write(offset, from.len() as u64)?;
        let sparse = if self.detects_zeroes() {
            Box::pin(self.write_sparsely(offset, from)).await.inspect_err(|_| self.note_failed_write())?
        } else {
            None
        };
        let held = match sparse {
            Some(held) => held,
            None => self.write_through(offset, from).await.inspect_err(|_| self.note_failed_write())?,
        };
        if fua {
            self.flush().await?;
        }
        Ok(held.answered())
    }

    /// Whoever wrote may not hear of it: a kernel writes long after it has answered.
    pub(super) fn note_failed_write(&self) {
        if let Some(volume) = self.pool.inner.state.borrow_mut().volumes.get_mut(&self.id) {
            volume.failed_writes += 1;
        }
    }

    pub(super) fn check_write(&self, offset: u64, length: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly(format!("{} is open read-only", self.pool.volume_name(self.id))));
        }
        self.check_range(offset, length)
    }

    async fn write_through(&self, offset: u64, from: &S::Memory) -> Result<Held<S>> {
        let pool = &self.pool;
        let first = offset / BLOCK_BYTES;
        let end = (offset + from.len() as u64).div_ceil(BLOCK_BYTES);
        let mut promised = None;
        let mut waited = Waited::new(true);
        loop {
            // Without room for metadata a write that changes no mapping still goes on.
            let promise = match promised.take() {
                Some(promise) => Some(promise),
                None => pool.try_promise(self.id, end - first, (end - first) as usize * MAP_RECORD_BYTES)?,
            };
            let held = pool.hold_range(self.id, first, end).await?;
            let Some(lacking) = self.write_held(offset, from, false, promise.is_some()).await? else {
                return Ok(held);
            };
            drop((held, promise));
            promised = Box::pin(self.wait_for(lacking, end - first, &mut waited)).await?;
        }
    }

    /// Waits for what a change of `blocks` blocks lacked. Nothing may be held (rule O8).
    pub(super) async fn wait_for(
        &self,
        lacking: Lacking,
        blocks: u64,
        waited: &mut Waited,
    ) -> Result<Option<Promise<S>>> {
        match self.make_room_for(lacking, blocks, waited).await {
            Err(refusal @ Error::NoSpace(_)) => self.pool.wait_out(self.id, refusal, waited).await.map(|()| None),
            made => made,
        }
    }

    async fn make_room_for(&self, lacking: Lacking, blocks: u64, waited: &mut Waited) -> Result<Option<Promise<S>>> {
        match lacking {
            Lacking::Promise(wanted) => {
                let bytes = blocks as usize * MAP_RECORD_BYTES;
                self.pool.promise_for(wanted, Some(self.id), blocks, bytes).await.map(Some)
            }
            Lacking::Host(refusal) => Err(refusal),
            Lacking::Space { missing, refills } => {
                waited.refusals += 1;
                // Room was made each time, and others were faster: under load a large write may lose many times
                // in a row. Whether the pool is full is for `make_room` to say; this bound is for bugs.
                if waited.refusals > 100_000 {
                    return Err(Error::NoSpace("the pool is full".into()));
                }
                let wanted = if refills { Use::Redirect } else { Use::Data };
                self.pool.make_room(missing, wanted, Some(self.id), metadata_blocks(blocks)).await?;
                futures_lite::future::yield_now().await;
                Ok(None)
            }
        }
    }

    /// Writes to a range that the caller holds; with `mapped_only` just those blocks that are mapped, the others stay
    /// holes. Answers what it lacks, if it does: then nothing has been done. `may_map` says that room for a change of the
    /// mapping has been promised.
    pub(super) async fn write_held(
        &self,
        offset: u64,
        from: &S::Memory,
        mapped_only: bool,
        may_map: bool,
    ) -> Result<Option<Lacking>> {
        let pool = &self.pool;
        let stay = pool.enter();
        let planned = loop {
            let outcome = pool.inner.state.borrow_mut().plan_write(
                self.id,
                offset,
                from.len(),
                Manner { mapped_only, may_map, alignment: pool.inner.storage.alignment() },
            );
            match outcome {
                Err(Unplanned::Need(need)) => Box::pin(pool.satisfy(need)).await?,
                other => break other,
            }
        };
        let Plan { steps, more_own } = match planned {
            Ok(plan) => plan,
            Err(Unplanned::Refused(error)) => return Err(error),
            Err(Unplanned::Promise | Unplanned::Need(_)) => return Ok(Some(Lacking::Promise(Use::Metadata))),
            Err(Unplanned::Space { missing, refills }) => return Ok(Some(Lacking::Space { missing, refills })),
        };
        let outcome = pool.carry_out(self.id, &steps, from, offset).await;
        if let Some(volume) = pool.inner.state.borrow_mut().volumes.get_mut(&self.id) {
            volume.planned_own -= more_own;
        }
        drop(stay);
        match outcome {
            Err(refusal @ Error::NoSpace(_)) => return Ok(Some(Lacking::Host(refusal))),
            other => other?,
        }
        // Nothing is acknowledged after a failed write of metadata or a failed flush: a successor refuses the log.
        match pool.poison_error() {
            Some(error) => Err(error),
            None => Ok(None),
        }
    }
}

impl<S: Storage> Pool<S> {
    /// Writes and maps what was planned for volume `id` from byte `offset` on.
    pub(super) async fn carry_out(&self, id: VolumeId, steps: &[Step], from: &S::Memory, offset: u64) -> Result<()> {
        if is_broken(Canary::MappedBeforeLanded) {
            self.map_steps(id, steps).await?;
        }
        if let Err(error) = self.land(steps, from).await {
            self.inner.state.borrow_mut().give_up(id, steps);
            return Err(Error::io(format!("write of {} at byte {offset}", self.volume_name(id)), error));
        }
        if !is_broken(Canary::MappedBeforeLanded) {
            self.map_steps(id, steps).await?;
        }
        if self.inner.state.borrow().journal.pending_bytes() > COMMIT_BYTES {
            self.want_commit();
        }
        Ok(())
    }

    /// Does the I/O of a plan.
    async fn land(&self, steps: &[Step], from: &S::Memory) -> std::io::Result<()> {
        let storage = &self.inner.storage;
        let mut writes = SmallVec::<[_; 1]>::new();
        let mut merges = Vec::new();
        let mut bytes = 0;
        for step in steps {
            match step {
                Step::InPlace { at, skip, from: start, length } => {
                    bytes += *length as u64;
                    writes.push(storage.write(at.offset_bytes() + skip, &from.slice(*start..start + length)));
                }
                Step::Redirect { run, from: start, .. } => {
                    let length = run.count as usize * BLOCK_SIZE;
                    bytes += length as u64;
                    writes.push(storage.write(run.start.offset_bytes(), &from.slice(*start..start + length)));
                }
                Step::Merge { old, .. } => {
                    let whole = storage.allocate(BLOCK_SIZE);
                    let read = old.map(|old| storage.read(old.offset_bytes(), &whole));
                    merges.push((step, whole, read));
                }
            }
        }
        let mut outcome = Ok(());
        for (step, whole, read) in merges {
            if let Some(read) = read {
                outcome = outcome.and(read.await);
            }
            if let (Ok(()), Step::Merge { new, skip, from: start, length, .. }) = (&outcome, step) {
                whole.copy_from(*skip, &from.slice(*start..start + length));
                bytes += BLOCK_BYTES;
                writes.push(storage.write(new.offset_bytes(), &whole));
            }
        }
        for write in writes {
            outcome = outcome.and(write.await);
        }
        self.inner.state.borrow_mut().counters.data_bytes_written += bytes;
        outcome
    }

    /// Maps what was redirected, run by run, each one change.
    async fn map_steps(&self, id: VolumeId, steps: &[Step]) -> Result<()> {
        for (position, step) in steps.iter().enumerate() {
            let (block, run) = match step {
                Step::Redirect { block, run, .. } => (*block, *run),
                Step::Merge { block, new, in_place: false, .. } => (*block, Run { start: *new, count: 1 }),
                _ => continue,
            };
            let mapped = self
                .attempt(|state| {
                    state.check_map(id, VirtualBlock(block), run.count)?;
                    state.map_written(id, block, run);
                    Ok(())
                })
                .await;
            if let Err(error) = mapped {
                if let Some(rest) = steps.get(position..) {
                    self.inner.state.borrow_mut().give_up(id, rest);
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

impl State {
    /// Makes one change of a run that has been written: LSN, map and publication in one step.
    fn map_written(&mut self, volume: VolumeId, block: u64, run: Run) {
        self.allocator.consume(run);
        let virtual_block = VirtualBlock(block);
        let record = Record::Map { volume, virtual_block, pool_block: run.start, count: run.count as u32 };
        let lsn = self.publish(Some(volume), &record);
        self.map(volume, virtual_block, run.start, run.count, lsn);
    }

    /// Plans a write of `length` bytes at `offset`.
    fn plan_write(
        &mut self,
        id: VolumeId,
        offset: u64,
        length: usize,
        manner: Manner,
    ) -> std::result::Result<Plan, Unplanned> {
        let Manner { mapped_only, may_map, alignment } = manner;
        self.check_writable().map_err(Unplanned::Refused)?;
        let end = offset + length as u64;
        let Survey { missing, more_own, entries } = self.survey_write(id, offset, end, mapped_only)?;
        if let Err(error) = self.check_quota(id, more_own) {
            return Err(Unplanned::Refused(error));
        }
        if missing > 0 && !may_map {
            return Err(Unplanned::Promise);
        }
        let shared_at = self.shared_at(TreeKey::Volume(id));
        let together =
            if may_map && !mapped_only { self.take_for_scattered(id, offset, end, shared_at, &entries) } else { None };
        let is_moved = together.is_some();
        let missing = if is_moved { entries.len() as u64 } else { missing };
        self.demand.note(missing);
        let mut runs = match together.or_else(|| self.take_blocks(id, missing, Use::Data)) {
            Some(runs) => runs,
            None => {
                let refills = self.refills(id, offset, &entries, manner)?;
                let lent = if refills { self.take_blocks(id, missing, Use::Redirect) } else { None };
                lent.ok_or(Unplanned::Space { missing, refills })?
            }
        };
        let mut steps = Steps::new();
        let redirected_before = self.counters.blocks_redirected;
        let mut at = offset;
        for entry in entries {
            let block = at / BLOCK_BYTES;
            let skip = at % BLOCK_BYTES;
            let part = ((BLOCK_BYTES - skip).min(end - at)) as usize;
            let from = (at - offset) as usize;
            at += part as u64;
            let mapped = entry.kind == EntryKind::Block;
            if mapped_only && !mapped {
                continue;
            }
            let is_own = mapped && entry.birth >= shared_at;
            let own = is_own && !is_moved;
            let aligned = skip.is_multiple_of(alignment as u64) && part.is_multiple_of(alignment);
            if own && aligned {
                match steps.last_mut() {
                    Some(Step::InPlace { at, skip: first, from: start, length })
                        if at.offset_bytes() + *first + *length as u64 == entry.address.offset_bytes() + skip
                            && *start + *length == from =>
                    {
                        *length += part;
                    }
                    _ => steps.push(Step::InPlace { at: entry.address, skip, from, length: part }),
                }
                continue;
            }
            let old = mapped.then_some(entry.address);
            if own {
                let new = entry.address;
                steps.push(Step::Merge { block, old, new, in_place: true, skip: skip as usize, from, length: part });
                continue;
            }
            self.counters.blocks_gathered += u64::from(is_own);
            self.counters.blocks_redirected += u64::from(mapped && !is_own);
            self.counters.blocks_provisioned += u64::from(!mapped);
            let Some(new) = runs.next() else {
                return Err(Unplanned::Space { missing: 1, refills: false });
            };
            if part < BLOCK_SIZE {
                steps.push(Step::Merge { block, old, new, in_place: false, skip: skip as usize, from, length: part });
                continue;
            }
            match steps.last_mut() {
                Some(Step::Redirect { block: first, run, .. })
                    if *first + run.count == block && run.start.plus(run.count) == new =>
                {
                    run.count += 1;
                }
                _ => steps.push(Step::Redirect { block, run: Run { start: new, count: 1 }, from }),
            }
        }
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.planned_own += more_own;
            volume.planned_blocks += missing;
            volume.reckon(&mut self.owed_blocks);
            volume.redirected += self.counters.blocks_redirected - redirected_before;
        }
        Ok(Plan { steps, more_own })
    }

    /// New blocks in few runs for a write of whole blocks most of which are the volume's own and all over the pool.
    fn take_for_scattered(
        &mut self,
        id: VolumeId,
        offset: u64,
        end: u64,
        shared_at: Clock,
        entries: &[Entry],
    ) -> Option<TakenBlocks> {
        if !offset.is_multiple_of(BLOCK_BYTES) || !end.is_multiple_of(BLOCK_BYTES) {
            return None;
        }
        let is_own = |entry: &Entry| entry.kind == EntryKind::Block && entry.birth >= shared_at;
        let own = entries.iter().filter(|entry| is_own(entry)).count() as u64;
        let joined =
            |pair: &&[Entry]| is_own(&pair[0]) && is_own(&pair[1]) && pair[1].address == pair[0].address.plus(1);
        let runs = own - entries.windows(2).filter(joined).count() as u64;
        if !is_scattered(runs, own) {
            return None;
        }
        self.take_together(id, entries.len() as u64)
    }

    /// Finds every leaf that a write touches in memory, before anything is taken for it.
    fn survey_write(&mut self, id: VolumeId, offset: u64, end: u64, mapped_only: bool) -> Try<Survey> {
        let shared_at = self.shared_at(TreeKey::Volume(id));
        let created_at = self.volumes.get(&id).map_or(Clock(0), |volume| volume.record.created_at);
        let mut survey = Survey { missing: 0, more_own: 0, entries: SmallVec::new() };
        let mut block = offset / BLOCK_BYTES;
        let last = end.div_ceil(BLOCK_BYTES);
        survey.entries.reserve((last - block) as usize);
        while block < last {
            let leaf_end = ((block | (ENTRIES_PER_NODE as u64 - 1)) + 1).min(last);
            let leaf = self.leaf(TreeKey::Volume(id), block)?;
            for at in block..leaf_end {
                let entry = leaf.map_or(Entry::hole(Clock(0)), |leaf| leaf.entry(entry_index(at, 0)));
                let mapped = entry.kind == EntryKind::Block;
                survey.entries.push(entry);
                if mapped_only && !mapped {
                    continue;
                }
                survey.missing += u64::from(!mapped || entry.birth < shared_at);
                survey.more_own += u64::from(!mapped || entry.birth < created_at);
            }
            block = leaf_end;
        }
        if is_broken(Canary::ExclusiveByCount) {
            for index in 0..survey.entries.len() {
                let entry = survey.entries[index];
                let block = offset / BLOCK_BYTES + index as u64;
                let shared = entry.kind == EntryKind::Block && entry.birth < shared_at;
                if shared && self.is_alone_by_count(id, block, entry)? {
                    survey.entries[index].birth = shared_at;
                    survey.missing -= 1;
                }
            }
        }
        Ok(survey)
    }

    fn check_quota(&mut self, id: VolumeId, more_own: u64) -> Result<()> {
        let Some(volume) = self.volumes.get(&id) else {
            return Err(Error::NotFound(format!("no volume with id {id}")));
        };
        let quota = volume.record.quota_bytes;
        if quota > 0
            && more_own > 0
            && (volume.record.own_blocks + volume.planned_own + more_own).saturating_mul(BLOCK_BYTES) > quota
        {
            self.counters.quota_hits += 1;
            return Err(Error::NoSpace(format!("{} has reached its quota of {quota} bytes", volume.record.name)));
        }
        Ok(())
    }

    /// Whether every block that a write replaces comes free by it: nobody else holds it, though it is not the volume's own
    /// by birth. Only a full pool asks, because it takes counts.
    fn refills(&mut self, id: VolumeId, offset: u64, entries: &[Entry], manner: Manner) -> Try<bool> {
        let shared_at = self.shared_at(TreeKey::Volume(id));
        for (block, entry) in (offset / BLOCK_BYTES..).zip(entries) {
            match entry.kind {
                EntryKind::Block if entry.birth >= shared_at => {}
                EntryKind::Block => {
                    if !self.is_alone_by_count(id, block, *entry)? {
                        return Ok(false);
                    }
                }
                _ if manner.mapped_only => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Takes `count` blocks for data from the volume's window, leaving what is kept back for metadata and owed to others; all
    /// or nothing.
    fn take_blocks(&mut self, id: VolumeId, count: u64, wanted: Use) -> Option<TakenBlocks> {
        let mut runs: SmallVec<[Run; 2]> = SmallVec::new();
        let mut missing = count;
        let reserve = self.reserve_for(count, wanted, Some(id));
        let is_owed = self.is_owed(id, count);
        let is_lent = wanted == Use::Redirect;
        while missing > 0 {
            let spare = self.spare_blocks(id, is_owed, reserve);
            let Some(volume) = self.volumes.get_mut(&id) else { break };
            if let Some(run) = volume.window.take(missing) {
                missing -= run.count;
                runs.push(run);
                continue;
            }
            let wanted = if is_lent { missing } else { volume.window.wanted(missing) };
            match self.allocator.take_data(wanted.min(spare), reserve) {
                Some(run) => volume.window.refill(run),
                None => break,
            }
        }
        if missing > 0 {
            self.release_runs(&runs);
            return None;
        }
        Some(TakenBlocks::new(runs))
    }

    /// Lets go of blocks that were taken and are not written.
    pub(super) fn release_runs(&mut self, runs: &[Run]) {
        for run in runs {
            self.allocator.release_run(*run);
        }
    }

    /// Data of a plan did not land, or could not be mapped.
    pub(super) fn give_up(&mut self, id: VolumeId, steps: &[Step]) {
        let runs = steps.iter().filter_map(|step| match step {
            Step::Redirect { run, .. } => Some(*run),
            Step::Merge { new, in_place: false, .. } => Some(Run { start: *new, count: 1 }),
            _ => None,
        });
        self.unplan(id, runs.clone().map(|run| run.count).sum());
        self.abandon(runs.flat_map(|run| (0..run.count).map(move |offset| run.start.plus(offset))));
    }

    /// Held blocks that were written and that no record will name are free again when nothing can write them any more.
    pub(super) fn abandon(&mut self, blocks: impl Iterator<Item = PoolBlock>) {
        let epoch = self.epochs.advance();
        for block in blocks {
            self.allocator.spoil(block);
            self.draining_frees.push_back((epoch, block, Freed::ByRecord));
        }
        self.release_frees();
    }
}

/// Blocks taken for a plan, handed out one by one.
pub(super) struct TakenBlocks {
    runs: SmallVec<[Run; 2]>,
    position: usize,
    offset: u64,
}

impl TakenBlocks {
    pub(super) fn new(runs: SmallVec<[Run; 2]>) -> Self {
        Self { runs, position: 0, offset: 0 }
    }
}

impl Iterator for TakenBlocks {
    type Item = PoolBlock;

    fn next(&mut self) -> Option<PoolBlock> {
        let run = self.runs.get(self.position)?;
        let block = run.start.plus(self.offset);
        self.offset += 1;
        if self.offset == run.count {
            self.position += 1;
            self.offset = 0;
        }
        Some(block)
    }
}

/// Waits until no range of `id` is held: used before a volume is changed as a whole.
pub(super) async fn quiesce<S: Storage>(pool: &Pool<S>, id: VolumeId) {
    let Ok(released) = pool.inner.state.borrow().volume(id).map(|volume| std::rc::Rc::clone(&volume.released)) else {
        return;
    };
    until(&released, || pool.inner.state.borrow().volumes.get(&id).is_none_or(|volume| volume.ranges.is_empty())).await;
}

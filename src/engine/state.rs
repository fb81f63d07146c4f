//! Everything the engine knows in memory. It is changed between two awaits only, so each method here is one instant.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;

use rustc_hash::FxHashMap;
use uuid::Uuid;

use super::accounts::Accounts;
use super::cache::NodeCache;
use super::check::Pinned;
use super::checksums::NewChecksums;
use super::epoch::{EpochId, Epochs};
use super::exclusive::{Families, Family, Figure, Marks};
use super::growth::Demand;
use super::journal::Journal;
use super::ranges::Ranges;
use super::space::{Allocator, Deltas, PageKey, Run, Window};
use super::{Counters, PendingLog};
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{
    CLOCK_MAX, Carcass, ENTRIES_PER_NODE, Entry, EntryKind, Geometry, GroupDescriptor, GroupIndex, GroupIndexRef, Node,
    Place, Record, Root, ScrubState, Slot, VolumeRecord,
};
use crate::units::{Clock, Generation, Lsn, PoolBlock, VirtualBlock, VolumeId};

/// A tree of mapping nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TreeKey {
    Volume(VolumeId),
    Table,
}

/// What must be brought into memory, or made room for, before a step can be taken. The step is then tried again from the
/// start: anything may have changed meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) enum Need {
    Node { address: PoolBlock, mirrored: bool, checksum: u32, place: Place },
    Counts(PageKey),
    Metadata,
}

/// Result of a step that finds all it needs in memory, or says what it misses.
pub(super) type Try<T> = std::result::Result<T, Need>;

/// A volume in memory.
pub(super) struct Volume {
    pub(super) record: VolumeRecord,
    /// Its last change.
    pub(super) last: Lsn,
    /// Whether the record differs from the one in the table.
    pub(super) dirty: bool,
    pub(super) window: Window,
    pub(super) ranges: Ranges,
    pub(super) released: Rc<event_listener::Event>,
    /// Own blocks that writes under way will add: counted against the quota before they are there.
    pub(super) planned_own: u64,
    /// Blocks for data that writes under way have taken for it and not mapped yet.
    pub(super) planned_blocks: u64,
    /// Blocks that it is owed (`reservation.rs`).
    pub(super) owed_blocks: u64,
    /// Blocks that the table has its record in.
    pub(super) record_blocks: u64,
    /// Where its own tree has changed.
    pub(super) changes: Marks,
    /// Where counts have changed of what it may share with others.
    pub(super) family: Family,
    pub(super) figure: Figure,
    /// Blocks redirected since the pool was opened.
    pub(super) redirected: u64,
    /// Writes that failed since the pool was opened.
    pub(super) failed_writes: u64,
    /// Number of handles.
    pub(super) open: u32,
    /// A control operation is under way; others wait or are refused.
    pub(super) unready: bool,
}

impl Volume {
    pub(super) fn new(record: VolumeRecord, last: Lsn, dirty: bool) -> Self {
        Self {
            record,
            last,
            dirty,
            window: Window::default(),
            ranges: Ranges::default(),
            released: Rc::new(event_listener::Event::new()),
            planned_own: 0,
            planned_blocks: 0,
            owed_blocks: 0,
            // What the next checkpoint takes for it, if two blocks stand together.
            record_blocks: 2,
            changes: Marks::default(),
            family: Family::default(),
            figure: Figure::default(),
            redirected: 0,
            failed_writes: 0,
            open: 0,
            unready: false,
        }
    }
}

/// What made a block free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Freed {
    /// A change that is recorded: it may become data.
    ByRecord,
    /// A checkpoint that counts it 0: it may become anything.
    ByCheckpoint,
}

/// The order in which carcasses are eaten: as they were cut out, and of one cut the newest part first, so that few wait.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct CarcassKey {
    pub(super) cut: u64,
    id: Reverse<u64>,
}

impl CarcassKey {
    pub(super) fn of(carcass: &Carcass) -> Self {
        Self { cut: carcass.cut, id: Reverse(carcass.id) }
    }
}

/// A carcass, and the change that made it: it is eaten only when that is durable.
#[derive(Clone, Copy)]
pub(super) struct Waiting {
    pub(super) carcass: Carcass,
    pub(super) made: Lsn,
}

pub(super) struct State {
    pub(super) uuid: Uuid,
    pub(super) name: String,
    pub(super) geometry: Geometry,
    /// The geometry that the next checkpoint shall give the pool.
    pub(super) enlargement: Option<Geometry>,
    pub(super) generation: Generation,
    pub(super) slot: Slot,
    pub(super) clock: Clock,
    pub(super) groups_in_use: u64,
    pub(super) next_volume: VolumeId,
    pub(super) next_carcass: u64,
    pub(super) transaction_id: u64,
    pub(super) size_limit_bytes: u64,
    /// Reads through all volumes are verified.
    pub(super) verify_on_read: bool,
    pub(super) scrub: ScrubState,
    /// What the last checkpoint has of it.
    pub(super) scrub_saved: ScrubState,
    pub(super) table: Root,
    pub(super) volumes: BTreeMap<VolumeId, Volume>,
    /// Blocks that they are owed.
    pub(super) owed_blocks: u64,
    /// How many of them are dirty.
    pub(super) dirty_volumes: u64,
    pub(super) names: HashMap<String, VolumeId>,
    pub(super) families: Families,
    /// Volumes deleted since the last checkpoint's instant: their records go with the next.
    pub(super) deleted: Vec<VolumeId>,
    /// Blocks in use as of the last checkpoint.
    pub(super) used_blocks: u64,
    pub(super) accounts: Accounts,
    pub(super) carcasses: BTreeMap<CarcassKey, Waiting>,
    pub(super) carcass_root: Root,
    /// Blocks of the carcass table as of the last checkpoint: pages and the nodes above them.
    pub(super) carcass_blocks: Vec<PoolBlock>,
    pub(super) carcasses_dirty: bool,
    pub(super) cache: NodeCache,
    pub(super) deltas: Deltas,
    /// Deltas of the running checkpoint that have not been applied to their pages yet.
    pub(super) frozen: Deltas,
    /// Pages of counts, and of checksums behind them (`checksums.rs`).
    pub(super) pages: FxHashMap<PageKey, Rc<[u32; 1024]>>,
    /// Checksums of data since the last checkpoint's instant.
    pub(super) checksums: NewChecksums,
    /// Those of the running checkpoint that have not been put into their pages yet.
    pub(super) frozen_checksums: NewChecksums,
    /// Groups whose checksum pages were allocated on the host since the pool was opened.
    pub(super) checksum_pages_prepared: BTreeSet<u64>,
    pub(super) descriptors: FxHashMap<u64, GroupDescriptor>,
    pub(super) indexes: Vec<GroupIndex>,
    pub(super) index_refs: Vec<GroupIndexRef>,
    pub(super) allocator: Allocator,
    /// Blocks free in groups that are not in memory, or not in use.
    pub(super) outside_blocks: u64,
    /// How long writes to new blocks have been lately.
    pub(super) demand: Demand,
    /// Groups in which checkpoints freed blocks since the background task looked last.
    pub(super) groups_freed_in: std::collections::BTreeSet<u64>,
    pub(super) epochs: Epochs,
    /// Blocks freed by a change that is not durable yet.
    pub(super) unrecorded_frees: VecDeque<(Lsn, PoolBlock)>,
    /// Blocks whose freeing is durable, waiting for the plans that may still use them.
    pub(super) draining_frees: VecDeque<(EpochId, PoolBlock, Freed)>,
    /// Blocks whose freeing is durable, and which a check needs as they were.
    pub(super) pinned: Pinned,
    pub(super) journal: Journal,
    pub(super) log: Box<dyn PendingLog>,
    /// Bytes of the log promised to operations under way.
    pub(super) log_promised: usize,
    /// Metadata blocks promised to operations under way.
    pub(super) metadata_promised: u64,
    pub(super) replaying: bool,
    pub(super) checkpointing: bool,
    /// Steps of the carcass worker that the last checkpoint's image has.
    pub(super) eaten_in_image: u64,
    pub(super) poisoned: Option<String>,
    pub(super) closing: bool,
    pub(super) counters: Counters,
    /// At this generation, with so many free blocks, a run of so many was looked for in vain.
    pub(super) no_run_of: Option<(Generation, u64, u64)>,
}

impl State {
    /// Refuses changes to a pool that is poisoned or being closed.
    pub(super) fn check_writable(&self) -> Result<()> {
        if let Some(reason) = &self.poisoned {
            return Err(Error::Poisoned(reason.clone()));
        }
        if self.closing {
            return Err(Error::Busy("the pool is being closed".into()));
        }
        Ok(())
    }

    pub(super) fn volume(&self, id: VolumeId) -> Result<&Volume> {
        self.volumes.get(&id).ok_or_else(|| Error::NotFound(format!("no volume with id {id}")))
    }

    pub(super) fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume> {
        self.volumes.get_mut(&id).ok_or_else(|| Error::NotFound(format!("no volume with id {id}")))
    }

    /// Takes the LSN of a change, publishes its record and remembers it for `volume`. During replay the change has its
    /// LSN already and only counts.
    pub(super) fn publish(&mut self, volume: Option<VolumeId>, record: &Record) -> Lsn {
        let lsn = if self.replaying { self.journal.next() } else { self.journal.publish(record, &mut *self.log) };
        if let Some(volume) = volume.and_then(|id| self.volumes.get_mut(&id)) {
            volume.last = lsn;
        }
        lsn
    }

    /// A volume's record differs from the one in the table from now on: the next checkpoint needs a pair of blocks for it.
    pub(super) fn mark_dirty(&mut self, id: VolumeId) {
        if let Some(volume) = self.volumes.get_mut(&id)
            && !std::mem::replace(&mut volume.dirty, true)
        {
            self.dirty_volumes += 1;
        }
    }

    /// Ticks the clock: every sharing gets a value of its own.
    ///
    /// # Errors
    /// `NoSpace` when there are no more values: 2^40 are enough for ever, but not when the clock of a pool is damaged.
    pub(super) fn tick_clock(&mut self) -> Result<Clock> {
        if self.clock.0 >= CLOCK_MAX {
            return Err(Error::NoSpace("the pool's clock is at its end; nothing can be shared any more".into()));
        }
        self.clock = Clock(self.clock.0 + 1);
        Ok(self.clock)
    }

    pub(super) fn root(&self, key: TreeKey) -> Root {
        match key {
            TreeKey::Table => self.table,
            TreeKey::Volume(id) => self
                .volumes
                .get(&id)
                .map_or(Root { entry: Entry::hole(Clock(0)), level: 0 }, |volume| volume.record.root),
        }
    }

    pub(super) fn set_root(&mut self, key: TreeKey, root: Root) {
        match key {
            TreeKey::Table => self.table = root,
            TreeKey::Volume(id) => {
                if let Some(volume) = self.volumes.get_mut(&id) {
                    volume.record.root = root;
                }
                self.mark_dirty(id);
            }
        }
    }

    /// Clock at which the tree's root was last shared. The table never is.
    pub(super) fn shared_at(&self, key: TreeKey) -> Clock {
        match key {
            TreeKey::Table => Clock(0),
            TreeKey::Volume(id) => self.volumes.get(&id).map_or(Clock(0), |volume| volume.record.shared_at),
        }
    }

    pub(super) fn place(key: TreeKey, level: u8, first: u64) -> Place {
        match key {
            TreeKey::Table => Place::TableNode { level, first },
            TreeKey::Volume(_) => Place::Node { level, first: VirtualBlock(first) },
        }
    }

    /// Adds to the count of a block.
    pub(super) fn count(&mut self, block: PoolBlock, change: i32) {
        self.deltas.add(&self.geometry, block, change);
    }

    /// Adds to the counts of `count` consecutive blocks.
    pub(super) fn count_run(&mut self, start: PoolBlock, count: u64, change: i32) {
        self.deltas.add_run(&self.geometry, start, count, change);
    }

    /// Adds to the counts of all that a node points at, neighbours together.
    pub(super) fn count_children(&mut self, node: &Node, change: i32) {
        let mut run: Option<Run> = None;
        for index in 0..ENTRIES_PER_NODE {
            let child = node.entry(index);
            if child.kind == EntryKind::Hole {
                continue;
            }
            match &mut run {
                Some(run) if run.start.plus(run.count) == child.address => run.count += 1,
                _ => {
                    if let Some(run) = run.replace(Run { start: child.address, count: 1 }) {
                        self.count_run(run.start, run.count, change);
                    }
                }
            }
        }
        if let Some(run) = run {
            self.count_run(run.start, run.count, change);
        }
    }

    /// Gives up a block that one entry of a volume mapped. An exclusive one may be used again as soon as `lsn` is durable
    /// and nothing planned needs it (O3, O7); of all others the next checkpoint finds out whether anybody holds them.
    pub(super) fn drop_block(&mut self, entry: Entry, shared_at: Clock, lsn: Lsn) {
        debug_assert_eq!(entry.kind, EntryKind::Block);
        self.count(entry.address, -1);
        if entry.birth >= shared_at && !self.replaying {
            self.allocator.hold(entry.address);
            self.unrecorded_frees.push_back((lsn, entry.address));
            if is_broken(Canary::FreedBeforeRecorded) {
                self.release_frees();
            }
        }
    }

    /// A durable checkpoint counts `block` 0, and nothing has happened to it since. Unless it was free already, plans of
    /// before may still use it (O7).
    pub(super) fn free_by_checkpoint(&mut self, block: PoolBlock, epoch: EpochId) {
        if self.allocator.is_unused(block) {
            self.allocator.freed_by_checkpoint(block);
        } else if self.allocator.hold_freed(block) {
            self.draining_frees.push_back((epoch, block, Freed::ByCheckpoint));
        } else if self.pinned.is_held() && !self.allocator.has_block(block) {
            // It is not to be found free when its group is read.
            self.keep_back(block);
        }
    }

    /// Passes on what `durable` changes have freed, and what the epochs that ended have let go.
    pub(super) fn release_frees(&mut self) {
        let mut durable = self.journal.durable();
        if is_broken(Canary::FreedBeforeRecorded) {
            durable = Lsn(u64::MAX);
        }
        if self.unrecorded_frees.front().is_some_and(|(lsn, _)| *lsn <= durable) {
            let epoch = self.epochs.advance();
            while let Some((lsn, block)) = self.unrecorded_frees.front().copied()
                && lsn <= durable
            {
                self.unrecorded_frees.pop_front();
                self.draining_frees.push_back((epoch, block, Freed::ByRecord));
            }
        }
        while let Some((epoch, block, freed)) = self.draining_frees.front().copied()
            && (self.epochs.is_over(epoch) || is_broken(Canary::FreedUnderPlans))
        {
            self.draining_frees.pop_front();
            match freed {
                Freed::ByRecord => {
                    // The next checkpoint looks at it, so that it may become metadata again.
                    self.count(block, 0);
                    self.allocator.release(block);
                }
                Freed::ByCheckpoint if self.pinned.is_held() => self.keep_back(block),
                Freed::ByCheckpoint => self.allocator.release_fresh(block),
            }
        }
    }

    /// Bytes of the pending log that nobody has been promised. A little stays for administration.
    pub(super) fn log_free(&self) -> usize {
        const ADMINISTRATION_BYTES: usize = 64 << 10;
        self.log.free_bytes().saturating_sub(self.log_promised + ADMINISTRATION_BYTES)
    }

    /// Metadata blocks that only administration and the checkpoint's own instant may take: records, their table,
    /// carcasses.
    pub(super) fn administration_blocks(&self) -> u64 {
        const CONSTANT: u64 = 64;
        CONSTANT + self.tables_blocks(self.carcasses.len())
    }

    /// The slot that a checkpoint writes: the one that the parent does not name.
    pub(super) fn next_slot(&self, named: Option<Slot>) -> Slot {
        match named {
            _ if is_broken(Canary::SlotByGeneration) => [Slot::A, Slot::B][self.generation.0 as usize % 2],
            Some(slot) => slot.other(),
            None => Slot::A,
        }
    }

    /// Whether so much waits in memory that a checkpoint should begin.
    pub(super) fn is_checkpoint_due(&self) -> bool {
        // 32 MiB of pages, all of which a checkpoint holds until its end.
        const DELTA_PAGES: usize = 8192;
        !self.checkpointing && (self.cache.is_due() || self.deltas.len() > DELTA_PAGES)
    }

    /// Fresh blocks that data may not take.
    pub(super) fn data_reserve_blocks(&self) -> u64 {
        // 1 MiB of them may be lent to redirects that give a block back.
        const FLOAT: std::ops::RangeInclusive<u64> = 64..=256;
        let float = (self.geometry.pool_blocks / 64).clamp(*FLOAT.start(), *FLOAT.end());
        self.lending_reserve_blocks() + float
    }

    /// Fresh blocks that not even a redirect may take whose old block comes free by it: the next checkpoint gives that one
    /// back, so a full pool never wedges.
    pub(super) fn lending_reserve_blocks(&self) -> u64 {
        const CHANGES: u64 = 192;
        self.administration_blocks() + self.metadata_promised + CHANGES
    }
}

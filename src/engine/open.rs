//! Opening a pool: superblock, indexes, tables, then the journal and what a predecessor left in the pending log.
//!
//! Replay has two passes. The first marks every block that any record names, so that a node is never allocated on data
//! that an acknowledged change maps; the second applies the changes, with nodes allocated afresh. What was read is made
//! durable by one fdatasync before anything acts on it (rule O9).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use rustc_hash::FxHashMap;

use super::accounts::Accounts;
use super::bounds;
use super::cache::NodeCache;
use super::carcass_table::CARCASS_TABLE;
use super::check::Pinned;
use super::checksums::NewChecksums;
use super::epoch::Epochs;
use super::exclusive::Families;
use super::growth::Demand;
use super::journal::{Journal, JournalPosition};
use super::pool::{Pool, read_bytes, to_memory};
use super::space::{Allocator, Deltas, Run, Unprepared};
use super::state::{CarcassKey, State, Volume, Waiting};
use super::tail::{Tail, read_tail};
use super::tree::entry_span;
use super::work::{Underway, Work};
use super::{Counters, PendingLog, Storage};
use crate::canary::{Canary, is_broken};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{
    self, ChosenSuperblock, ENTRIES_PER_NODE, Entry, EntryKind, JOURNAL_FIRST, Node, Place, Record, Root,
    SUPERBLOCK_COPIES, Slot, Superblock, VolumeRecord,
};
use crate::units::{BLOCK_SIZE, Lsn, PoolBlock, VolumeId};

/// How a pool is to be opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Bytes of memory for mapping nodes.
    pub cache_bytes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { cache_bytes: 64 << 20 }
    }
}

impl<S: Storage> Pool<S> {
    /// Opens a pool, replaying its journal and what `log` holds of a predecessor. Nobody else may have it open: the caller
    /// holds the lock.
    ///
    /// # Errors
    /// `InvalidInput` when it is no pool, `Incompatible`, `Corrupt`, `Poisoned` when the log says that a predecessor
    /// poisoned it, `Io`.
    pub async fn open(storage: S, log: Box<dyn PendingLog>, options: OpenOptions) -> Result<Self> {
        let board = log.board();
        let opening = Underway::new(&*board, Work::Opening);
        if log.is_poisoned() {
            return Err(Error::Poisoned("the engine before this one stopped; start the pool anew".into()));
        }
        let ChosenSuperblock { superblock, slot, anew } = read_superblock(&storage).await?;
        if storage.size_bytes() < superblock.geometry.pool_blocks * BLOCK_SIZE as u64 {
            return Err(Error::InvalidInput(format!(
                "the pool is cut short: it has {} bytes of {}",
                storage.size_bytes(),
                superblock.geometry.pool_blocks * BLOCK_SIZE as u64
            )));
        }
        if superblock.is_read_only() {
            return Err(Error::Incompatible("the pool has features that this build cannot write".into()));
        }
        for (address, copy) in anew {
            let memory = to_memory(&storage, &copy.encode());
            let written = storage.write_durable(address.offset_bytes(), &memory).await;
            written.map_err(|error| Error::io("write of a superblock's second copy", error))?;
        }
        let published = log.published();
        if !published.is_empty() && superblock.session != log.session() && !is_broken(Canary::AnySession) {
            return Err(Error::Incompatible("the pending changes are of another session of this pool".into()));
        }
        let session = log.session();
        let state = new_state(&superblock, slot, log, &options);
        let pool = Self::new(storage, state);
        drop(opening);
        let opening = pool.at(Work::Opening);
        pool.load_indexes(&superblock).await?;
        pool.load_tables(&superblock).await?;
        let (tail, ended) = read_tail(&pool.inner.storage, &superblock).await;
        ended?;
        if !is_broken(Canary::ReplayNotFlushed) {
            // The superblock found may stand in a cache only, written by one who died. Replay prepares blocks for its nodes,
            // which makes zeros of what is free in it; the one before it, which a power cut may bring back, still leads there.
            pool.inner.storage.flush().await.map_err(|error| Error::io("flush of what was found", error))?;
        }
        pool.hold_places().await?;
        drop(opening);
        let replay = pool.at(Work::Replay);
        pool.replay(tail, &published).await?;
        drop(replay);
        {
            // What the log holds of changes that are recorded goes now, and not while they stood in a cache perhaps.
            let mut state = pool.inner.state.borrow_mut();
            let durable = state.journal.durable();
            state.log.release(durable);
        }
        if session != superblock.session {
            // Whatever is published from now on must be known to belong to this pool's present life.
            pool.make_replay_room().await?;
            pool.checkpoint_once().await?;
        }
        Ok(pool)
    }

    /// Makes sure that the host has the ring and every group's places, which it may have lost since they were taken: a copy
    /// of the pool keeps zeros as holes perhaps (`cp --sparse=always`). No commit and no checkpoint fails for host space.
    async fn hold_places(&self) -> Result<()> {
        let (geometry, groups) = {
            let state = self.inner.state.borrow();
            (state.geometry, state.groups_in_use)
        };
        let ring = Run { start: JOURNAL_FIRST, count: geometry.journal_blocks };
        let places = (0..groups)
            .map(|group| Run { start: geometry.group_start(group), count: geometry.layout_blocks_unsealed(group) });
        for place in std::iter::once(ring).chain(places) {
            for hole in self.inner.storage.holes(place.bytes()) {
                self.extend(hole).await?;
            }
        }
        Ok(())
    }

    async fn load_indexes(&self, superblock: &Superblock) -> Result<()> {
        for (index, reference) in superblock.group_index.iter().enumerate() {
            let address = superblock.geometry.index_block(index as u64, reference.slot);
            let place = Place::GroupIndex(index as u64);
            let structure = Structure::GroupIndex;
            let bytes = self.read_checked(address, true, reference.checksum, place, structure).await?;
            let damage = |check| Corrupt { structure, address, check };
            let block = format::GroupIndex::decode(&bytes).map_err(damage)?;
            let first = index as u64 * format::GROUPS_PER_INDEX;
            bounds::check_index(&superblock.geometry, first, &block).map_err(damage)?;
            self.inner.state.borrow_mut().indexes.push(block);
        }
        Ok(())
    }

    /// Reads the volume table with every record, and the carcass table.
    async fn load_tables(&self, superblock: &Superblock) -> Result<()> {
        let table = self.read_table(superblock.volume_table, 0, true).await?;
        for (number, entry) in table.leaves {
            let id = VolumeId(number);
            let structure = Structure::VolumeRecord;
            let place = Place::VolumeRecord(id);
            let bytes = self.read_checked(entry.address, entry.mirrored, entry.checksum, place, structure).await?;
            let damage = |check| Corrupt { structure, address: entry.address, check };
            let record = VolumeRecord::decode(&bytes).map_err(damage)?;
            bounds::check_record(&superblock.geometry, &record).map_err(damage)?;
            let mut state = self.inner.state.borrow_mut();
            if record.id != id || id >= state.next_volume || state.names.contains_key(&record.name) {
                return Err(damage(Check::Inconsistent("the record is another volume's")).into());
            }
            state.names.insert(record.name.clone(), id);
            let record_blocks = 1 + u64::from(entry.mirrored);
            state.volumes.insert(id, Volume { record_blocks, ..Volume::new(record, superblock.lsn, false) });
        }
        let table = self.read_table(superblock.carcass_table, CARCASS_TABLE, false).await?;
        let mut blocks = table.blocks;
        for (number, entry) in table.leaves {
            let structure = Structure::CarcassPage;
            let place = Place::CarcassPage(number);
            let bytes = self.read_checked(entry.address, entry.mirrored, entry.checksum, place, structure).await?;
            let damage = |check| Corrupt { structure, address: entry.address, check };
            let carcasses = format::decode_carcasses(&bytes, superblock.geometry.pool_blocks).map_err(damage)?;
            bounds::check_carcasses(&superblock.geometry, &carcasses).map_err(damage)?;
            blocks.extend(blocks_of(entry));
            let mut state = self.inner.state.borrow_mut();
            state.counters.carcasses_resumed += carcasses.len() as u64;
            for carcass in carcasses {
                state.carcasses.insert(CarcassKey::of(&carcass), Waiting { carcass, made: Lsn(0) });
            }
        }
        let mut state = self.inner.state.borrow_mut();
        state.carcass_blocks = blocks;
        state.join_families();
        state.count_outside();
        state.reckon_all();
        let (own, layout) = (state.own_of_volumes(), state.layout_blocks());
        state.accounts.opened(own, layout);
        Ok(())
    }

    /// Reads a table's nodes. With `keep` they stay in memory.
    async fn read_table(&self, root: Root, base: u64, keep: bool) -> Result<Table> {
        let mut table = Table::default();
        // Each node once: a damaged table may else be as good as endless.
        let mut seen = rustc_hash::FxHashSet::default();
        let address = SUPERBLOCK_COPIES[0][0];
        bounds::check_entry(&self.inner.state.borrow().geometry, root.entry).map_err(|check| Corrupt {
            structure: Structure::Superblock,
            address,
            check,
        })?;
        let mut waiting = vec![(root.entry, root.level, 0u64)];
        while let Some((entry, level, first)) = waiting.pop() {
            if entry.kind != EntryKind::Node {
                continue;
            }
            let structure = Structure::Node;
            let place = Place::TableNode { level, first: base + first };
            let bytes = self.read_checked(entry.address, entry.mirrored, entry.checksum, place, structure).await?;
            let mut state = self.inner.state.borrow_mut();
            let damage = |check| Corrupt { structure, address: entry.address, check };
            let node = Node::decode_table(&bytes, level, state.geometry.pool_blocks).map_err(damage)?;
            bounds::check_node(&state.geometry, &node).map_err(damage)?;
            if !seen.insert(entry.address.0) {
                return Err(damage(Check::Inconsistent("a node stands in two places")).into());
            }
            table.blocks.extend(blocks_of(entry));
            for index in (0..ENTRIES_PER_NODE).rev() {
                let child = node.entry(index);
                let at = first + index as u64 * entry_span(level);
                match (child.kind, level) {
                    (EntryKind::Hole, _) => {}
                    (_, 0) => table.leaves.push((at, child)),
                    _ => waiting.push((child, level - 1, at)),
                }
            }
            if keep {
                state.cache.insert_clean(entry.address, node, place, entry.mirrored);
            }
        }
        table.leaves.sort_unstable_by_key(|(number, _)| *number);
        Ok(table)
    }

    async fn replay(&self, tail: Tail, published: &[(Lsn, Vec<u8>)]) -> Result<()> {
        let Tail { mut records, position, last, .. } = tail;
        let durable = last;
        let mut adopted = Vec::new();
        let mut next = durable.next();
        for (lsn, bytes) in published {
            if *lsn <= durable {
                continue;
            }
            let damage = |check| Corrupt { structure: Structure::Record, address: PoolBlock(0), check };
            if *lsn != next {
                return Err(damage(Check::JournalGap(next.0)).into());
            }
            let (record, _) = Record::decode(bytes).map_err(damage)?;
            records.push((*lsn, record));
            adopted.push((*lsn, bytes));
            next = lsn.next();
        }
        let geometry = {
            let mut state = self.inner.state.borrow_mut();
            let ring = state.geometry.journal_blocks;
            state.journal = Journal::new(ring, durable, position);
            state.counters.records_recovered = adopted.len() as u64;
            state.counters.records_replayed = records.len() as u64;
            state.replaying = true;
            state.geometry
        };
        let mut groups = std::collections::BTreeSet::new();
        for (lsn, record) in &records {
            let mut bad = None;
            record.named_blocks(|address, count| {
                if !bounds::holds(&geometry, address, count) {
                    bad = Some(address);
                } else if let Some((group, _)) = geometry.group_of(address) {
                    groups.insert(group);
                }
            });
            if let Some(address) = bad {
                let check = Check::OutOfBounds { field: "pool_block", value: address.0 };
                tracing::error!("change {lsn} names a block outside the groups");
                return Err(Corrupt { structure: Structure::Record, address, check }.into());
            }
        }
        for group in groups {
            if group < self.inner.state.borrow().groups_in_use {
                self.load_group(group).await?;
            }
        }
        if !is_broken(Canary::OnePassReplay) {
            self.claim_named(&records);
        }
        for (lsn, record) in records {
            self.make_replay_room().await?;
            self.inner.state.borrow_mut().journal_reached(lsn);
            self.apply(record, lsn).await?;
        }
        let mut state = self.inner.state.borrow_mut();
        state.replaying = false;
        state.journal = Journal::new(geometry.journal_blocks, durable, position);
        // The head is where the superblock says: all that was read is still in use.
        state.journal.set_used(position.total);
        for (lsn, bytes) in adopted {
            state.journal.adopt(lsn, bytes);
        }
        // A FLUSH must wait for what was taken over, too (rule O2): none of it is recorded yet.
        let last = state.journal.last();
        for volume in state.volumes.values_mut() {
            volume.last = last;
        }
        Ok(())
    }

    /// First pass: no block that a record names is handed out before a checkpoint has looked at it.
    fn claim_named(&self, records: &[(Lsn, Record)]) {
        let mut state = self.inner.state.borrow_mut();
        for (_, record) in records {
            record.named_blocks(|address, count| {
                for offset in 0..count {
                    state.count(address.plus(offset), 0);
                    state.allocator.claim(address.plus(offset));
                }
            });
        }
    }

    /// Replay takes nodes from blocks that were free in the checkpoint.
    async fn make_replay_room(&self) -> Result<()> {
        self.ensure_metadata(128).await
    }

    /// Prepares blocks for metadata, and reads groups, until there are `least` of them or nothing is left to be had.
    pub(super) async fn ensure_metadata(&self, least: u64) -> Result<()> {
        // What a replayed record names in a group that comes in later is not taken for free: it has deltas.
        let ways = [Unprepared::Unknown, Unprepared::Unready(1)];
        while self.inner.state.borrow().allocator.fresh() < least && self.get_ready(&ways, true).await? {}
        Ok(())
    }

    /// Second pass: one change.
    async fn apply(&self, record: Record, lsn: Lsn) -> Result<()> {
        self.inner.state.borrow().check_replayed(&record)?;
        match record {
            Record::Map { volume, virtual_block, pool_block, count } => {
                let count = u64::from(count);
                self.attempt(|state| {
                    state.check_map(volume, virtual_block, count)?;
                    state.map(volume, virtual_block, pool_block, count, lsn);
                    Ok(())
                })
                .await?;
            }
            Record::Unmap { volume, virtual_block, count } => {
                let (start, end) = (virtual_block.0, virtual_block.0.saturating_add(count));
                self.attempt(|state| {
                    state.check_unmap(volume, start, end)?;
                    state.unmap(volume, start, end, lsn);
                    Ok(())
                })
                .await?;
            }
            Record::VolumeCreated(record) => {
                let mut state = self.inner.state.borrow_mut();
                let blocks = record.attributes.clone();
                state.adopt_attributes(&blocks);
                let clock = state.clock;
                state.add_volume(VolumeRecord { root: Root { entry: Entry::hole(clock), level: 0 }, ..*record }, lsn);
            }
            Record::VolumeChanged(record) => {
                let start = record.size_bytes.div_ceil(BLOCK_SIZE as u64);
                self.attempt(|state| {
                    state.check_unmap(record.id, start, format::VOLUME_BLOCKS_MAX)?;
                    state.change_volume(&record, lsn);
                    Ok(())
                })
                .await?;
            }
            Record::VolumeDeleted { volume } => {
                self.inner.state.borrow_mut().remove_volume(volume, lsn);
            }
            Record::VolumeShared { origin, clock, created } => {
                let mut state = self.inner.state.borrow_mut();
                state.clock = state.clock.max(clock);
                let blocks = created.attributes.clone();
                state.adopt_attributes(&blocks);
                state.share_volume(origin, *created, lsn);
            }
            Record::VolumeRolledBack { volume, snapshot, clock } => {
                let mut state = self.inner.state.borrow_mut();
                state.clock = state.clock.max(clock);
                state.roll_back_volume(volume, snapshot, clock, lsn);
            }
            Record::PoolGrown { groups_in_use } => {
                let new = self.inner.state.borrow_mut().grow_to(groups_in_use);
                for group in new {
                    self.load_group(group).await?;
                }
            }
        }
        Ok(())
    }
}

/// A table as read: its nodes' blocks, and its leaves' entries by number.
#[derive(Default)]
struct Table {
    blocks: Vec<PoolBlock>,
    leaves: Vec<(u64, Entry)>,
}

/// What an entry points at: one block, or a pair.
fn blocks_of(entry: Entry) -> impl Iterator<Item = PoolBlock> {
    std::iter::once(entry.address).chain(entry.mirrored.then(|| entry.address.plus(1)))
}

async fn read_superblock<S: Storage>(storage: &S) -> Result<ChosenSuperblock> {
    let too_small = || Error::InvalidInput("not a plywood pool: it is too small".into());
    let least = (SUPERBLOCK_COPIES[1][1].0 + 1) * BLOCK_SIZE as u64;
    if storage.size_bytes() < least {
        return Err(too_small());
    }
    let mut copies = Vec::new();
    for address in SUPERBLOCK_COPIES.into_iter().flatten() {
        copies.push(match read_bytes(storage, address, 1).await {
            Ok(bytes) => Superblock::decode(&bytes),
            Err(error) => Err(error),
        });
    }
    let mut copies = copies.into_iter();
    let mut next = || copies.next().unwrap_or_else(|| Err(too_small()));
    let copies = [[next(), next()], [next(), next()]];
    format::choose_superblock(copies)
}

fn new_state(superblock: &Superblock, slot: Slot, log: Box<dyn PendingLog>, options: &OpenOptions) -> State {
    let geometry = superblock.geometry;
    let position = JournalPosition { append: superblock.journal_append, chain: superblock.journal_chain, total: 0 };
    State {
        uuid: superblock.uuid,
        name: superblock.name.clone(),
        enlargement: None,
        geometry,
        generation: superblock.generation,
        slot,
        clock: superblock.clock,
        groups_in_use: superblock.groups_in_use,
        next_volume: superblock.next_volume,
        next_carcass: superblock.next_carcass,
        transaction_id: superblock.transaction_id,
        size_limit_bytes: superblock.size_limit_bytes,
        verify_on_read: superblock.verify_on_read,
        scrub: superblock.scrub,
        scrub_saved: superblock.scrub,
        no_run_of: None,
        table: superblock.volume_table,
        volumes: BTreeMap::new(),
        owed_blocks: 0,
        dirty_volumes: 0,
        names: HashMap::new(),
        families: Families::default(),
        deleted: Vec::new(),
        used_blocks: superblock.used_blocks,
        accounts: Accounts::new(superblock.metadata_blocks),
        carcasses: BTreeMap::new(),
        carcass_root: superblock.carcass_table,
        carcass_blocks: Vec::new(),
        carcasses_dirty: false,
        cache: NodeCache::new(options.cache_bytes / BLOCK_SIZE),
        deltas: Deltas::default(),
        frozen: Deltas::default(),
        checksums: NewChecksums::default(),
        frozen_checksums: NewChecksums::default(),
        checksum_pages_prepared: BTreeSet::new(),
        pages: FxHashMap::default(),
        descriptors: FxHashMap::default(),
        indexes: Vec::new(),
        index_refs: superblock.group_index.clone(),
        allocator: Allocator::new(geometry),
        outside_blocks: 0,
        demand: Demand::default(),
        groups_freed_in: std::collections::BTreeSet::new(),
        epochs: Epochs::new(),
        unrecorded_frees: VecDeque::new(),
        draining_frees: VecDeque::new(),
        pinned: Pinned::default(),
        journal: Journal::new(geometry.journal_blocks, superblock.lsn, position),
        log,
        log_promised: 0,
        metadata_promised: 0,
        replaying: false,
        checkpointing: false,
        eaten_in_image: 0,
        poisoned: None,
        closing: false,
        counters: Counters::default(),
    }
}

impl State {
    /// During replay: more groups are in use. Answers which.
    fn grow_to(&mut self, groups_in_use: u64) -> std::ops::Range<u64> {
        let before = self.groups_in_use;
        self.groups_in_use = before.max(groups_in_use.min(self.geometry.group_count()));
        before..self.groups_in_use
    }

    /// During replay: the change about to be applied has this LSN.
    fn journal_reached(&mut self, lsn: Lsn) {
        let position = self.journal.position();
        self.journal = Journal::new(self.geometry.journal_blocks, Lsn(lsn.0.saturating_sub(1)), position);
    }
}

//! Checkpoints: an image of all metadata at one instant, written beside the I/O.
//!
//! The *instant* is one step in memory: LSN, clock, roots, counts, carcasses and their cursors, journal position. After
//! it, children are written before parents (each node to a block of its own that nothing else used since the last
//! checkpoint), then pages of counts, descriptors and indexes into the slots that their parents do not name, then a flush,
//! then both copies of the superblock's other slot. Nothing of the former generation is reused before both are durable.

use std::collections::BTreeMap;
use std::rc::Rc;

use futures_lite::future::yield_now;
use rustc_hash::FxHashMap;

use super::accounts::Instant;
use super::cache::{Cached, level_of};
use super::carcass_table::{CarcassImage, widths_above};
use super::epoch::EpochId;
use super::journal::JournalPosition;
use super::pool::{Pool, to_memory, until};
use super::space::{PageKey, Run};
use super::state::{State, TreeKey};
use super::tree::{entry_index, level_for};
use super::work::Work;
use super::{Memory, Storage};
use crate::canary::{Canary, is_broken};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{
    self, CARCASSES_PER_PAGE, COUNTS_PER_PAGE, ENTRIES_PER_NODE, Entry, EntryKind, GROUPS_PER_INDEX, GroupDescriptor,
    GroupIndexEntry, GroupIndexRef, Node, PageRef, Place, SUPERBLOCK_COPIES, Slot, Superblock, VolumeRecord,
};
use crate::units::{BLOCK_SIZE, Lsn, PoolBlock, VolumeId};

/// Blocks written in one operation at most.
const RUN_BLOCKS: usize = 64;
/// Blocks gathered before they are written and requests get their turn: bounds both the memory for them and the delay.
pub(super) const BLOCKS_AT_A_TIME: usize = 256;
/// Freed blocks handed back before requests get their turn.
const FREED_AT_A_TIME: u64 = 8192;
/// Operations under way at a time.
const WRITES_MAX: usize = 16;

/// The image taken at the instant.
struct Image {
    lsn: Lsn,
    position: JournalPosition,
    nodes: Vec<(PoolBlock, Cached)>,
    records: Vec<(PoolBlock, bool, VolumeRecord)>,
    carcasses: Option<CarcassImage>,
    superblock: Superblock,
    instant: Instant,
}

/// What a checkpoint knows of one group after applying the counts.
pub(super) struct GroupImage {
    pub(super) descriptor: GroupDescriptor,
    free_blocks: u32,
}

/// Blocks to be written, by address: each is 4096 bytes.
pub(super) type Blocks = BTreeMap<PoolBlock, Rc<[u8]>>;

impl<S: Storage> Pool<S> {
    /// Writes a checkpoint that begins after this call, and waits for its end.
    pub async fn checkpoint(&self) -> Result<()> {
        let inner = &self.inner;
        let target = inner.checkpoints_begun.get() + 1;
        self.want_checkpoint();
        until(&inner.signals.checkpointed, || {
            inner.checkpoints_ended.get() >= target || inner.state.borrow().poisoned.is_some() || inner.stopped.get()
        })
        .await;
        if inner.checkpoints_ended.get() >= target {
            return Ok(());
        }
        Err(self.poison_error().unwrap_or_else(|| Error::Busy("the pool is closed".into())))
    }

    pub(super) fn want_checkpoint(&self) {
        self.inner.checkpoint_wanted.set(true);
        self.inner.signals.work.notify(usize::MAX);
    }

    /// The checkpointing task.
    pub(super) async fn run_checkpoints(&self) {
        let inner = &self.inner;
        loop {
            until(&inner.signals.work, || {
                let held = inner.last_checkpoint.get().is_some_and(|last| inner.checkpoints_begun.get() >= last);
                (inner.checkpoint_wanted.get() && !held)
                    || inner.stopped.get()
                    || inner.state.borrow().poisoned.is_some()
            })
            .await;
            if inner.stopped.get() || inner.state.borrow().poisoned.is_some() {
                return;
            }
            inner.checkpoint_wanted.set(false);
            if let Err(error) = self.checkpoint_once().await {
                self.poison(&error);
                return;
            }
        }
    }

    /// One checkpoint, from its instant to the durable superblock.
    pub(super) async fn checkpoint_once(&self) -> Result<()> {
        let inner = &self.inner;
        let _work = self.at(Work::Checkpoint);
        // Table nodes stay in memory; should one have been dropped, it is read before the instant.
        let dirty: Vec<VolumeId> = inner.state.borrow().volumes_to_write();
        loop {
            // After opening, nothing may have been prepared for metadata yet.
            let needed = inner.state.borrow().checkpoint_blocks() + 64;
            self.ensure_metadata(needed).await?;
            self.prepare_enlargement().await?;
            for id in &dirty {
                self.attempt(|state| state.check_path(TreeKey::Table, id.0)).await?;
            }
            // From here to the instant nothing waits, so what is in memory stays there.
            if inner.state.borrow().page_missing_for_enlargement().is_none() {
                break;
            }
        }
        inner.checkpoints_begun.set(inner.checkpoints_begun.get() + 1);
        let mut image = inner.state.borrow_mut().take_image()?;
        let checksums = self.write_trees(&mut image).await?;
        let (groups, freed) = self.write_counts().await?;
        let indexes = self.write_indexes(&groups, &mut image.superblock).await?;
        if !is_broken(Canary::SuperblockFirst) {
            let _flush = self.at(Work::Flush);
            self.flush_medium("flush of a checkpoint").await?;
        }
        let slot = inner.state.borrow().slot.other();
        self.write_superblock(&image.superblock, slot).await?;
        {
            let mut state = inner.state.borrow_mut();
            let state = &mut *state;
            state.generation = image.superblock.generation;
            state.slot = slot;
            state.index_refs.clone_from(&image.superblock.group_index);
            state.carcass_root = image.superblock.carcass_table;
            state.used_blocks = image.superblock.used_blocks;
            state.accounts.checkpointed(image.instant);
            for (index, block) in indexes {
                if index as usize == state.indexes.len() {
                    state.indexes.push(block);
                } else if let Some(known) = state.indexes.get_mut(index as usize) {
                    *known = block;
                }
            }
            for (group, image) in groups {
                state.descriptors.insert(group, image.descriptor);
            }
            state.settle(&checksums, image.nodes);
            state.journal.checkpointed(image.lsn, image.position);
            state.allocator.enlarge(state.geometry);
            if state.owed_blocks > 0 {
                state.count_outside();
            }
            state.counters.checkpoints += 1;
            self.after_durable(state);
        }
        self.announce_durable();
        // Rule O7: plans of before may still use what nobody counts any more.
        let epoch = inner.state.borrow_mut().epochs.advance();
        self.hand_back(freed, epoch).await;
        inner.state.borrow_mut().checkpointing = false;
        inner.checkpoints_ended.set(inner.checkpoints_ended.get() + 1);
        inner.signals.checkpointed.notify(usize::MAX);
        self.announce_durable();
        Ok(())
    }

    /// Makes what the checkpoint freed free, in steps that hold up nobody: a deleted volume has millions of blocks. The
    /// checkpoint is not over before, so what happens to a block meanwhile is seen in its deltas.
    async fn hand_back(&self, freed: Vec<Run>, epoch: EpochId) {
        let mut done = 0;
        for run in freed {
            self.inner.state.borrow_mut().free_run(run, epoch);
            done += run.count;
            if done >= FREED_AT_A_TIME {
                done = 0;
                self.inner.state.borrow_mut().release_frees();
                yield_now().await;
            }
        }
        // Nobody else might come by: a pool at rest gives its space back, too.
        self.inner.state.borrow_mut().release_frees();
    }

    /// Writes nodes, records and carcasses, from the leaves up, filling in the checksums of children. Answers the
    /// checksum of each node written.
    async fn write_trees(&self, image: &mut Image) -> Result<FxHashMap<u64, u32>> {
        let uuid = self.inner.state.borrow().uuid;
        let mut checksums = FxHashMap::default();
        let mut blocks = Blocks::new();
        let is_table = |place: Place| matches!(place, Place::TableNode { .. });
        image.nodes.sort_by_key(|(address, cached)| (is_table(cached.place), level_of(cached.place), *address));
        let table_from = image.nodes.partition_point(|(_, cached)| !is_table(cached.place));
        let (volume_nodes, table_nodes) = image.nodes.split_at_mut(table_from);
        let mut done = 0;
        for (address, cached) in volume_nodes {
            finish_node(&uuid, *address, cached, &mut checksums, &mut blocks);
            done += 1;
            if done % BLOCKS_AT_A_TIME == 0 {
                self.write_blocks(std::mem::take(&mut blocks)).await?;
                yield_now().await;
            }
        }
        for (address, mirrored, record) in &mut image.records {
            if let Some(checksum) = checksums.get(&record.root.entry.address.0)
                && record.root.entry.kind == EntryKind::Node
            {
                record.root.entry.checksum = *checksum;
            }
            let bytes: Rc<[u8]> = Rc::from(&record.encode()[..]);
            checksums.insert(address.0, format::checksum(&uuid, Place::VolumeRecord(record.id), &bytes));
            put(&mut blocks, *address, *mirrored, &bytes);
        }
        if let Some(carcasses) = &mut image.carcasses {
            image.superblock.carcass_table = carcasses.finish(&uuid, &mut checksums, &mut blocks);
        }
        for (address, cached) in table_nodes {
            finish_node(&uuid, *address, cached, &mut checksums, &mut blocks);
        }
        if let Some(checksum) = checksums.get(&image.superblock.volume_table.entry.address.0)
            && image.superblock.volume_table.entry.kind == EntryKind::Node
        {
            image.superblock.volume_table.entry.checksum = *checksum;
        }
        self.inner.state.borrow_mut().counters.nodes_written += image.nodes.len() as u64;
        self.write_blocks(blocks).await?;
        Ok(checksums)
    }

    /// Applies the frozen deltas to the pages of counts and writes these to their other slots. Answers the groups'
    /// new descriptors and the blocks whose count is 0 now.
    async fn write_counts(&self) -> Result<(BTreeMap<u64, GroupImage>, Vec<Run>)> {
        let inner = &self.inner;
        let uuid = inner.state.borrow().uuid;
        let keys = inner.state.borrow().frozen.pages();
        let mut groups: BTreeMap<u64, GroupImage> = BTreeMap::new();
        let mut freed = Vec::new();
        let mut freed_sealed: BTreeMap<PageKey, Vec<Run>> = BTreeMap::new();
        let mut blocks = Blocks::new();
        for key in keys {
            let (group, page) = key;
            self.load_descriptor(group).await?;
            self.attempt(
                |state| if state.pages.contains_key(&key) { Ok(()) } else { Err(super::state::Need::Counts(key)) },
            )
            .await?;
            {
                let mut state = inner.state.borrow_mut();
                let geometry = state.geometry;
                let image = groups.entry(group).or_insert_with(|| state.group_image(group));
                let before = freed.len();
                let applied = state.apply_deltas(key, image, &mut freed)?;
                if freed.len() > before && state.may_have_checksums(&image.descriptor) {
                    freed_sealed.insert(key, freed[before..].to_vec());
                }
                let Some(reference) = image.descriptor.pages.get_mut(page as usize) else { continue };
                let slot = state.next_slot(reference.present.then_some(reference.slot));
                let bytes: Rc<[u8]> = Rc::from(&format::encode_counts(&applied)[..]);
                let checksum = format::checksum(&uuid, Place::SpaceMapPage { group, page }, &bytes);
                *reference = PageRef { checksum, slot, present: true };
                state.counters.pages_written += 1;
                blocks.insert(geometry.page_block(group, page, slot), bytes);
            }
            if blocks.len() == BLOCKS_AT_A_TIME {
                self.write_blocks(std::mem::take(&mut blocks)).await?;
                yield_now().await;
            }
        }
        self.write_blocks(blocks).await?;
        self.write_checksums(&mut groups, freed_sealed).await?;
        Ok((groups, freed))
    }

    /// Writes the descriptors and the indexes above them, and names the latter in the superblock.
    async fn write_indexes(
        &self,
        groups: &BTreeMap<u64, GroupImage>,
        superblock: &mut Superblock,
    ) -> Result<BTreeMap<u64, format::GroupIndex>> {
        let mut indexes: BTreeMap<u64, format::GroupIndex> = BTreeMap::new();
        let mut blocks = Blocks::new();
        {
            let state = self.inner.state.borrow();
            for (group, image) in groups {
                let index = group / GROUPS_PER_INDEX;
                let mut entry = state.index_entry(*group);
                entry.slot = state.next_slot((!entry.empty).then_some(entry.slot));
                entry.empty = false;
                entry.free_blocks = image.free_blocks;
                let bytes: Rc<[u8]> = Rc::from(&image.descriptor.encode()[..]);
                entry.checksum = format::checksum(&state.uuid, Place::GroupDescriptor(*group), &bytes);
                put(&mut blocks, state.geometry.descriptor_block(*group, entry.slot), true, &bytes);
                let block = indexes.entry(index).or_insert_with(|| {
                    state.indexes.get(index as usize).cloned().unwrap_or_else(format::GroupIndex::new)
                });
                if let Some(known) = block.entries.get_mut((group % GROUPS_PER_INDEX) as usize) {
                    *known = entry;
                }
            }
            // Indexes come into use in order: one that is skipped would have no entry in the superblock.
            for index in superblock.group_index.len() as u64..superblock.groups_in_use.div_ceil(GROUPS_PER_INDEX) {
                indexes.entry(index).or_default();
            }
            for (index, block) in &indexes {
                let known = superblock.group_index.get(*index as usize).copied();
                let slot = known.map_or(Slot::A, |known| known.slot.other());
                let bytes: Rc<[u8]> = Rc::from(&block.encode()[..]);
                let checksum = format::checksum(&state.uuid, Place::GroupIndex(*index), &bytes);
                put(&mut blocks, state.geometry.index_block(*index, slot), true, &bytes);
                let reference = GroupIndexRef { checksum, slot, level: 0 };
                match superblock.group_index.get_mut(*index as usize) {
                    Some(known) => *known = reference,
                    None => superblock.group_index.push(reference),
                }
            }
        }
        self.write_blocks(blocks).await?;
        let mut used = 0;
        let state = self.inner.state.borrow();
        for group in 0..superblock.groups_in_use {
            let free = match indexes.get(&(group / GROUPS_PER_INDEX)) {
                Some(block) => block.entries[(group % GROUPS_PER_INDEX) as usize],
                None => state.index_entry(group),
            };
            let all = state.geometry.group_blocks(group);
            let free = if free.empty { all - state.geometry.layout_blocks(group) } else { u64::from(free.free_blocks) };
            used += all - free;
        }
        superblock.used_blocks = used;
        Ok(indexes)
    }

    /// Writes both copies of a slot and waits until both are durable.
    pub(super) async fn write_superblock(&self, superblock: &Superblock, slot: Slot) -> Result<()> {
        let memory = to_memory(&self.inner.storage, &superblock.encode());
        let [first, second] = SUPERBLOCK_COPIES[slot.index()];
        if is_broken(Canary::OneSuperblockCopy) {
            let storage = &self.inner.storage;
            let [first, _] = [first, second].map(|copy| storage.write_durable(copy.offset_bytes(), &memory));
            first.await.map_err(|error| Error::io("write of the superblock", error))?;
        } else {
            let [first, second] =
                [first, second].map(|copy| self.write_durable(copy, &memory, "write of the superblock"));
            let (first, second) = futures_lite::future::zip(first, second).await;
            first.and(second)?;
        }
        self.inner.state.borrow_mut().counters.metadata_bytes_written += 2 * BLOCK_SIZE as u64;
        Ok(())
    }

    /// Writes blocks, neighbours together.
    pub(super) async fn write_blocks(&self, blocks: Blocks) -> Result<()> {
        let mut under_way = std::collections::VecDeque::new();
        let mut blocks = blocks.into_iter().peekable();
        while let Some((start, bytes)) = blocks.next() {
            let mut run = vec![bytes];
            while run.len() < RUN_BLOCKS
                && let Some((_, next)) = blocks.next_if(|(address, _)| *address == start.plus(run.len() as u64))
            {
                run.push(next);
            }
            let memory = self.inner.storage.allocate(run.len() * BLOCK_SIZE);
            for (position, bytes) in run.iter().enumerate() {
                memory.write(position * BLOCK_SIZE, bytes);
            }
            self.inner.state.borrow_mut().counters.metadata_bytes_written += memory.len() as u64;
            under_way.push_back(self.inner.storage.write(start.offset_bytes(), &memory));
            if under_way.len() >= WRITES_MAX
                && let Some(oldest) = under_way.pop_front()
            {
                oldest.await.map_err(|error| Error::io("write of metadata", error))?;
            }
        }
        for write in under_way {
            write.await.map_err(|error| Error::io("write of metadata", error))?;
        }
        Ok(())
    }
}

/// Fills in the checksums of a node's children and computes its own.
fn finish_node(
    uuid: &uuid::Uuid,
    address: PoolBlock,
    cached: &mut Cached,
    checksums: &mut FxHashMap<u64, u32>,
    blocks: &mut Blocks,
) {
    fill_checksums(&mut cached.node, checksums, cached.place);
    let bytes: Rc<[u8]> = Rc::from(&cached.node.bytes()[..]);
    checksums.insert(address.0, format::checksum(uuid, cached.place, &bytes));
    put(blocks, address, cached.mirrored, &bytes);
}

/// Sets the checksum of every child that `checksums` knows.
fn fill_checksums(node: &mut Rc<Node>, checksums: &FxHashMap<u64, u32>, place: Place) {
    if level_of(place) == 0 && !matches!(place, Place::TableNode { .. }) {
        return;
    }
    for index in 0..ENTRIES_PER_NODE {
        let entry = node.entry(index);
        if entry.kind != EntryKind::Hole
            && let Some(checksum) = checksums.get(&entry.address.0)
            && entry.checksum != *checksum
        {
            Rc::make_mut(node).set(index, Entry { checksum: *checksum, ..entry });
        }
    }
}

pub(super) fn put(blocks: &mut Blocks, address: PoolBlock, mirrored: bool, bytes: &Rc<[u8]>) {
    blocks.insert(address, Rc::clone(bytes));
    if mirrored {
        blocks.insert(address.plus(1), Rc::clone(bytes));
    }
}

impl State {
    /// Volumes whose records the next checkpoint writes or removes.
    pub(super) fn volumes_to_write(&self) -> Vec<VolumeId> {
        let dirty = self.volumes.iter().filter(|(_, volume)| volume.dirty).map(|(id, _)| *id);
        dirty.chain(self.deleted.iter().copied()).collect()
    }

    /// The instant: everything that the checkpoint will hold is fixed here.
    fn take_image(&mut self) -> Result<Image> {
        self.checkpointing = true;
        self.give_back_windows();
        self.eaten_in_image = self.counters.leaves_eaten;
        let needed = self.checkpoint_blocks();
        let to_write = self.volumes_to_write();
        if self.allocator.fresh() < needed {
            return Err(Error::NoSpace(format!(
                "a checkpoint needs {needed} blocks for metadata and {} are left",
                self.allocator.fresh()
            )));
        }
        let before = self.allocator.fresh();
        let mut records = Vec::new();
        for id in to_write {
            let leaf = self.own_path(TreeKey::Table, id.0);
            let index = entry_index(id.0, 0);
            let old = self.cache.dirty_node(leaf).entry(index);
            if old.kind == EntryKind::Node {
                self.count(old.address, -1);
                if old.mirrored {
                    self.count(old.address.plus(1), -1);
                }
                self.accounts.gave(1 + u64::from(old.mirrored));
            }
            let new = if let Some(record) = self.volumes.get(&id).map(|volume| volume.record.clone()) {
                let (address, mirrored) = self.take_meta(2);
                if let Some(volume) = self.volumes.get_mut(&id) {
                    volume.record_blocks = 1 + u64::from(mirrored);
                }
                records.push((address, mirrored, record));
                Entry::node(address, mirrored, 0, self.clock)
            } else {
                Entry::hole(self.clock)
            };
            self.cache.dirty_node(leaf).set(index, new);
            if let Some(volume) = self.volumes.get_mut(&id) {
                volume.dirty = false;
            }
        }
        self.dirty_volumes = 0;
        self.deleted.clear();
        let carcasses = self.take_carcass_image();
        debug_assert!(before - self.allocator.fresh() <= needed, "more than {needed} blocks were taken");
        let nodes = self.cache.freeze();
        debug_assert!(self.frozen.is_empty());
        self.begin_enlargement();
        self.frozen = std::mem::take(&mut self.deltas);
        debug_assert!(self.frozen_checksums.is_empty());
        self.frozen_checksums = std::mem::take(&mut self.checksums);
        let position = self.journal.position();
        self.scrub_saved = self.scrub;
        let superblock = Superblock {
            uuid: self.uuid,
            name: self.name.clone(),
            read_only_compatible: 0,
            compatible: 0,
            incompatible: 0,
            generation: crate::units::Generation(self.generation.0 + 1),
            clock: self.clock,
            lsn: self.journal.last(),
            geometry: self.geometry,
            groups_in_use: self.groups_in_use,
            journal_append: position.append,
            journal_chain: position.chain,
            session: self.log.session(),
            volume_table: self.table,
            carcass_table: self.carcass_root,
            next_volume: self.next_volume,
            next_carcass: self.next_carcass,
            transaction_id: self.transaction_id,
            size_limit_bytes: self.size_limit_bytes,
            verify_on_read: self.verify_on_read,
            scrub: self.scrub,
            volume_count: self.volumes.len() as u64,
            used_blocks: 0,
            metadata_blocks: self.accounts.metadata_blocks(),
            group_index: self.index_refs.clone(),
        };
        let instant = self.accounts.instant(self.own_of_volumes(), self.layout_blocks());
        Ok(Image { lsn: superblock.lsn, position, nodes, records, carcasses, superblock, instant })
    }

    /// Applies the frozen deltas of one page. Blocks whose count becomes 0 are added to `freed`.
    fn apply_deltas(&mut self, key: PageKey, image: &mut GroupImage, freed: &mut Vec<Run>) -> Result<Rc<[u32; 1024]>> {
        let (group, page) = key;
        let deltas = self.frozen.take(key).unwrap_or_default();
        let counts = self.pages.get_mut(&key).expect("loaded by the caller");
        let first = self.geometry.group_start(group).plus(u64::from(page) * COUNTS_PER_PAGE);
        let changed = Rc::make_mut(counts);
        let mut damage = None;
        deltas.for_each(|index, change| {
            let count = &mut changed[usize::from(index)];
            let block = first.plus(u64::from(index));
            let Some(new) = count.checked_add_signed(change) else {
                let found = i64::from(*count) + i64::from(change);
                let check = Check::Count { recorded: u64::from(*count), found: found.unsigned_abs() };
                damage.get_or_insert(Corrupt { structure: Structure::SpaceMapPage, address: block, check });
                return;
            };
            match (*count, new) {
                (0, 1..) => image.free_blocks = image.free_blocks.saturating_sub(1),
                // One too many is found when the group is read; an index that says more than a group has is none.
                (1.., 0) => image.free_blocks = (image.free_blocks + 1).min(format::GROUP_BLOCKS as u32),
                _ => {}
            }
            *count = new;
            if new == 0 {
                match freed.last_mut() {
                    Some(run) if index > 0 && run.start.plus(run.count) == block => run.count += 1,
                    _ => freed.push(Run { start: block, count: 1 }),
                }
            }
        });
        if let Some(damage) = damage {
            return Err(damage.into());
        }
        Ok(Rc::clone(counts))
    }

    /// A group as the last checkpoint has it.
    pub(super) fn group_image(&self, group: u64) -> GroupImage {
        let descriptor = self.descriptors.get(&group).cloned().unwrap_or_else(|| GroupDescriptor::new(group));
        GroupImage { descriptor, free_blocks: self.index_entry(group).free_blocks }
    }

    /// Frees those blocks of a run whose count a durable checkpoint has as 0, and to which nothing has happened since.
    fn free_run(&mut self, run: Run, epoch: EpochId) {
        for offset in 0..run.count {
            let block = run.start.plus(offset);
            if self.untouched(block) {
                self.free_by_checkpoint(block, epoch);
            }
        }
        // A run lies in one page, so in one group.
        if let Some((group, _)) = self.geometry.group_of(run.start) {
            self.groups_freed_in.insert(group);
        }
    }

    /// Whether nothing has happened to a block since the running checkpoint's instant.
    fn untouched(&self, block: PoolBlock) -> bool {
        let Some((group, index)) = self.geometry.group_of(block) else { return false };
        let page = (group, index / COUNTS_PER_PAGE as u32);
        self.deltas.get(page, (index % COUNTS_PER_PAGE as u32) as u16).is_none()
    }

    /// The checkpoint is durable: its nodes are clean, and whatever was copied from them meanwhile learns their checksums.
    fn settle(&mut self, checksums: &FxHashMap<u64, u32>, nodes: Vec<(PoolBlock, Cached)>) {
        for (address, cached) in nodes {
            self.cache.thaw(address, cached.node);
        }
        self.cache.end_freeze();
        for address in self.cache.dirty_inner() {
            self.cache.refill(address, |node, place| fill_checksums(node, checksums, place));
        }
        let fill = |entry: &mut Entry| {
            if entry.kind == EntryKind::Node
                && let Some(checksum) = checksums.get(&entry.address.0)
            {
                entry.checksum = *checksum;
            }
        };
        for volume in self.volumes.values_mut() {
            fill(&mut volume.record.root.entry);
        }
        for waiting in self.carcasses.values_mut() {
            fill(&mut waiting.carcass.entry);
        }
        fill(&mut self.table.entry);
    }

    /// Takes all windows back: their blocks are free in the image.
    pub(super) fn give_back_windows(&mut self) {
        for volume in self.volumes.values_mut() {
            if let Some(run) = volume.window.give_back() {
                self.allocator.release_run(run);
            }
        }
    }

    /// The index entry of a group; of one beyond the indexes in use, an empty one.
    pub(super) fn index_entry(&self, group: u64) -> format::GroupIndexEntry {
        let known = self.indexes.get((group / GROUPS_PER_INDEX) as usize);
        let mut entry = known.map_or(GroupIndexEntry::EMPTY, |index| {
            index.entries.get((group % GROUPS_PER_INDEX) as usize).copied().unwrap_or(GroupIndexEntry::EMPTY)
        });
        if entry.empty {
            let free = self.geometry.group_blocks(group).saturating_sub(self.geometry.layout_blocks(group));
            entry.free_blocks = free as u32;
        }
        entry
    }

    /// Metadata blocks that a checkpoint takes for itself at its instant: records, their table, carcasses.
    fn checkpoint_blocks(&self) -> u64 {
        debug_assert_eq!(self.dirty_volumes, self.volumes.values().filter(|volume| volume.dirty).count() as u64);
        self.tables_blocks(if self.carcasses_dirty { self.carcasses.len() } else { 0 })
    }

    /// The most that the tables take when the next checkpoint writes `carcasses`: each record and each node is a pair.
    pub(super) fn tables_blocks(&self, carcasses: usize) -> u64 {
        let records = self.dirty_volumes + self.deleted.len() as u64;
        // The nodes on the way to each record move; of a level there are no more than the ids so far need.
        let all = |level: u8| self.next_volume.0.checked_shr(8 * (u32::from(level) + 1)).unwrap_or(0) + 1;
        let nodes: u64 = (0..=level_for(self.next_volume.0)).map(|level| records.min(all(level))).sum();
        let pages = carcasses.div_ceil(CARCASSES_PER_PAGE);
        let carcass_nodes: usize = widths_above(pages).sum();
        2 * (records + nodes + (pages + carcass_nodes) as u64)
    }
}

//! Walking and changing mapping trees: lookup, making a path a volume's own, mapping and unmapping.
//!
//! Each change is two passes: one that changes nothing and finds all nodes and counts in memory (or says what it
//! [`Need`]s), and one that cannot fail. Who may change a node in place is decided by birth; of a node that is not
//! exclusive by birth the exact count is read: with 1 it moves, with more it is shadowed.

use std::rc::Rc;

use smallvec::SmallVec;

use super::cache::NodeState;
use super::space::PageKey;
use super::state::{Need, State, TreeKey, Try};
use crate::canary::{Canary, is_broken};
use crate::format::{
    COUNTS_PER_PAGE, Carcass, ENTRIES_PER_NODE, Entry, EntryKind, Node, Place, Root, VOLUME_BLOCKS_MAX, span_blocks,
};
use crate::units::{Clock, Lsn, PoolBlock, VirtualBlock, VolumeId};

/// A change of what a volume's record says of its blocks.
#[derive(Clone, Copy, Default)]
pub(super) struct Accounted {
    pub(super) own: i64,
    pub(super) mapped: i64,
    /// Those that may be overwritten in place.
    pub(super) in_place: i64,
    /// Of those that were planned, how many are mapped now.
    pub(super) planned: u64,
}

/// Index of the entry for `block` in a node of `level`.
#[inline]
pub(super) fn entry_index(block: u64, level: u8) -> usize {
    (block >> (8 * u32::from(level))) as usize & (ENTRIES_PER_NODE - 1)
}

/// Blocks that one entry of a node of `level` covers.
#[inline]
pub(super) fn entry_span(level: u8) -> u64 {
    1 << (8 * u32::from(level))
}

/// Blocks of metadata that a node of `level` takes: leaves of volumes are written once, all others as pairs.
fn node_blocks(key: TreeKey, level: u8) -> u64 {
    match (key, level) {
        (TreeKey::Volume(_), 0) => 1,
        _ => 2,
    }
}

/// Lowest level of a tree that reaches `block`.
pub(super) fn level_for(block: u64) -> u8 {
    let mut level = 0;
    while block >= span_blocks(level) {
        level += 1;
    }
    level
}

impl State {
    /// The place of the node of `level` on the way to `block`.
    fn place_of(key: TreeKey, level: u8, block: u64) -> Place {
        Self::place(key, level, block & !(span_blocks(level) - 1))
    }

    fn need_node(entry: Entry, key: TreeKey, level: u8, block: u64) -> Need {
        Need::Node {
            address: entry.address,
            mirrored: entry.mirrored,
            checksum: entry.checksum,
            place: Self::place_of(key, level, block),
        }
    }

    /// The leaf that maps `block`, or the hole in its place: the caller reads neighbouring entries from it.
    pub(super) fn leaf(&mut self, key: TreeKey, block: u64) -> Try<Option<&Node>> {
        let root = self.root(key);
        let mut entry = root.entry;
        if block >= span_blocks(root.level) {
            return Ok(None);
        }
        let mut level = root.level;
        loop {
            if entry.kind == EntryKind::Hole {
                return Ok(None);
            }
            if level == 0 {
                let place = Self::place_of(key, 0, block);
                return match self.cache.node_at(entry.address, place) {
                    Some(node) => Ok(Some(node)),
                    None => Err(Self::need_node(entry, key, 0, block)),
                };
            }
            let Some(node) = self.cache.node_at(entry.address, Self::place_of(key, level, block)) else {
                return Err(Self::need_node(entry, key, level, block));
            };
            entry = node.entry(entry_index(block, level));
            level -= 1;
        }
    }

    /// The first block behind the hole that [`leaf`](Self::leaf) found in the place of `block`'s leaf: where a whole subtree
    /// is missing, its end. Going on leaf by leaf would take a large and empty volume seconds.
    pub(super) fn after_hole(&self, key: TreeKey, block: u64) -> u64 {
        let root = self.root(key);
        if root.entry.kind == EntryKind::Hole || block >= span_blocks(root.level) {
            return VOLUME_BLOCKS_MAX;
        }
        let (mut entry, mut level) = (root.entry, root.level);
        while level > 0
            && let Some(cached) = self.cache.get(entry.address)
        {
            entry = cached.node.entry(entry_index(block, level));
            if entry.kind == EntryKind::Hole {
                return (block | (entry_span(level) - 1)) + 1;
            }
            level -= 1;
        }
        (block | (ENTRIES_PER_NODE as u64 - 1)) + 1
    }

    /// The exact number of entries that point at `block`.
    pub(super) fn exact_count(&self, block: PoolBlock) -> Try<i64> {
        let Some((group, index)) = self.geometry.group_of(block) else { return Ok(1) };
        let page: PageKey = (group, index / COUNTS_PER_PAGE as u32);
        let index = (index % COUNTS_PER_PAGE as u32) as u16;
        let Some(counts) = self.pages.get(&page) else { return Err(Need::Counts(page)) };
        let base = counts.get(usize::from(index)).copied().unwrap_or(0);
        let frozen = self.frozen.get(page, index).unwrap_or(0);
        let live = self.deltas.get(page, index).unwrap_or(0);
        Ok(i64::from(base) + i64::from(frozen) + i64::from(live))
    }

    /// Whether nobody else reaches `block`, and `entry` that maps it, by the counts of this moment.
    pub(super) fn is_alone_by_count(&mut self, volume: VolumeId, block: u64, entry: Entry) -> Try<bool> {
        let key = TreeKey::Volume(volume);
        let Root { entry: mut node, mut level } = self.root(key);
        let shared_at = self.shared_at(key);
        loop {
            if node.birth < shared_at && self.exact_count(node.address)? > 1 {
                return Ok(false);
            }
            if level == 0 {
                return Ok(self.exact_count(entry.address)? == 1);
            }
            let place = Self::place_of(key, level, block);
            let Some(cached) = self.cache.get(node.address).filter(|cached| cached.place == place) else {
                return Err(Self::need_node(node, key, level, block));
            };
            node = cached.node.entry(entry_index(block, level));
            level -= 1;
        }
    }

    /// First pass of [`own`](Self::own): the metadata blocks it will take. `inherited` says that the parent is to be
    /// shadowed, which makes every child shared.
    fn check_own(&mut self, entry: Entry, key: TreeKey, level: u8, block: u64, inherited: bool) -> Try<(u64, bool)> {
        let shared_at = self.shared_at(key);
        let place = Self::place_of(key, level, block);
        let Some(cached) = self.cache.get(entry.address).filter(|cached| cached.place == place) else {
            return Err(Self::need_node(entry, key, level, block));
        };
        let dirty = cached.state == NodeState::Dirty;
        let shared = inherited || (entry.birth < shared_at && self.exact_count(entry.address)? > 1);
        Ok((if dirty && !shared { 0 } else { node_blocks(key, level) }, shared))
    }

    /// Makes a node the volume's own to change, and answers the entry that points at it now. Second pass: everything is
    /// in memory and there is room.
    fn own(&mut self, entry: Entry, key: TreeKey, level: u8, block: u64) -> Entry {
        let shared_at = self.shared_at(key);
        let clock = self.clock;
        let exclusive = entry.birth >= shared_at || self.exact_count(entry.address).unwrap_or(2) == 1;
        let cached = self.cache.get(entry.address).expect("checked by the first pass");
        if exclusive && cached.state == NodeState::Dirty {
            return Entry { birth: clock, ..entry };
        }
        let node = Rc::clone(&cached.node);
        if is_broken(Canary::NodesInPlace) && exclusive && cached.state == NodeState::Clean {
            let (place, mirrored) = (cached.place, cached.mirrored);
            self.cache.insert_dirty(entry.address, node, place, mirrored);
            return Entry { birth: clock, ..entry };
        }
        if exclusive {
            // It moves: the children keep their counts, the old block is freed by the next checkpoint.
            self.count(entry.address, -1);
            if entry.mirrored {
                self.count(entry.address.plus(1), -1);
            }
            self.accounts.gave(1 + u64::from(entry.mirrored));
            self.cache.remove(entry.address);
        } else {
            self.count_children(&node, 1);
            self.count(entry.address, -1);
            self.counters.nodes_shadowed += 1;
            if let TreeKey::Volume(id) = key {
                self.mark_family(id, block);
            }
        }
        self.place_node(node, key, level, block)
    }

    /// Gives a new or copied node its block and makes it dirty.
    fn place_node(&mut self, node: Rc<Node>, key: TreeKey, level: u8, block: u64) -> Entry {
        let (address, mirrored) = self.take_meta(node_blocks(key, level));
        let first = block & !(span_blocks(level) - 1);
        self.cache.insert_dirty(address, node, Self::place(key, level, first), mirrored);
        Entry::node(address, mirrored, 0, self.clock)
    }

    /// A block, or a pair of them, for metadata, counted once.
    pub(super) fn take_meta(&mut self, blocks: u64) -> (PoolBlock, bool) {
        let pair = if blocks == 2 { self.allocator.take_meta(2) } else { None };
        let mirrored = pair.is_some();
        self.counters.pairs_missed += u64::from(blocks == 2 && !mirrored);
        if self.allocator.fresh() < self.data_reserve_blocks() {
            self.counters.reserve_used += 1 + u64::from(mirrored);
        }
        let address = pair.or_else(|| self.allocator.take_meta(1)).expect("the reserve was checked by the first pass");
        self.count(address, 1);
        if mirrored {
            self.count(address.plus(1), 1);
        }
        self.accounts.took(1 + u64::from(mirrored));
        (address, mirrored)
    }

    /// Frees a node that only its parent held.
    fn free_node(&mut self, entry: Entry) {
        self.count(entry.address, -1);
        if entry.mirrored {
            self.count(entry.address.plus(1), -1);
        }
        self.accounts.gave(1 + u64::from(entry.mirrored));
        self.cache.remove(entry.address);
    }

    /// First pass of [`own_path`](Self::own_path): metadata blocks it will take.
    pub(super) fn check_path(&mut self, key: TreeKey, block: u64) -> Try<u64> {
        let root = self.root(key);
        // A new branch from a node of that level down.
        let blocks_to = |level: u8| (0..=level).map(|level| node_blocks(key, level)).sum::<u64>();
        if root.entry.kind == EntryKind::Hole {
            return Ok(blocks_to(level_for(block).max(root.level)));
        }
        if block >= span_blocks(root.level) {
            // New nodes above the root, and a new branch below them.
            let above = 2 * u64::from(level_for(block) - root.level);
            return Ok(above + blocks_to(level_for(block) - 1));
        }
        let mut needed = 0;
        let mut entry = root.entry;
        let mut shared = false;
        for level in (0..=root.level).rev() {
            if entry.kind == EntryKind::Hole {
                return Ok(needed + blocks_to(level));
            }
            let (blocks, now_shared) = self.check_own(entry, key, level, block, shared)?;
            needed += blocks;
            shared = now_shared;
            if level > 0
                && let Some(node) = self.cache.node(entry.address)
            {
                entry = node.entry(entry_index(block, level));
            }
        }
        Ok(needed)
    }

    /// Refuses when there are not `blocks` free for metadata.
    pub(super) fn check_metadata(&self, blocks: u64) -> Try<()> {
        // A pair may not be found on a fragmented pool; then the node is written single, which takes no more.
        if self.allocator.fresh() < blocks { Err(Need::Metadata) } else { Ok(()) }
    }

    /// Makes every node from the root to the leaf of `block` the volume's own, and answers the leaf's block.
    pub(super) fn own_path(&mut self, key: TreeKey, block: u64) -> PoolBlock {
        let mut root = self.root(key);
        if root.entry.kind == EntryKind::Hole {
            root.level = root.level.max(level_for(block));
        }
        while block >= span_blocks(root.level) {
            let level = root.level + 1;
            let mut node = Node::new(root.entry.birth);
            node.set(0, root.entry);
            root = Root { entry: self.place_node(Rc::new(node), key, level, 0), level };
        }
        let mut parent: Option<(PoolBlock, usize)> = None;
        let mut entry = root.entry;
        let mut level = root.level;
        loop {
            let own = if entry.kind == EntryKind::Hole {
                self.place_node(Rc::new(Node::new(entry.birth)), key, level, block)
            } else {
                self.own(entry, key, level, block)
            };
            match parent {
                None => root.entry = own,
                Some((above, index)) => self.cache.dirty_node(above).set(index, own),
            }
            if level == 0 {
                self.set_root(key, root);
                return own.address;
            }
            let index = entry_index(block, level);
            entry = self.cache.dirty_node(own.address).entry(index);
            parent = Some((own.address, index));
            level -= 1;
        }
    }

    /// First pass of [`map`](Self::map).
    pub(super) fn check_map(&mut self, volume: VolumeId, block: VirtualBlock, count: u64) -> Try<()> {
        let mut needed = 0;
        let mut at = block.0;
        while at < block.0 + count {
            needed += self.check_path(TreeKey::Volume(volume), at)?;
            at = (at | (ENTRIES_PER_NODE as u64 - 1)) + 1;
        }
        self.check_metadata(needed)
    }

    /// Maps `count` consecutive blocks of a volume to as many of the pool, which are counted once more.
    pub(super) fn map(&mut self, volume: VolumeId, block: VirtualBlock, pool_block: PoolBlock, count: u64, lsn: Lsn) {
        let key = TreeKey::Volume(volume);
        let shared_at = self.shared_at(key);
        let clock = self.clock;
        let created_at = self.volumes.get(&volume).map_or(Clock(0), |volume| volume.record.created_at);
        let mut change = Accounted { planned: count, ..Accounted::default() };
        let mut replaced: SmallVec<[Entry; 4]> = SmallVec::new();
        let mut done = 0;
        while done < count {
            let first = block.0 + done;
            let part = (ENTRIES_PER_NODE as u64 - first % ENTRIES_PER_NODE as u64).min(count - done);
            let leaf = self.own_path(key, first);
            let node = self.cache.dirty_node(leaf);
            for at in first..first + part {
                let index = entry_index(at, 0);
                let old = node.entry(index);
                node.set(index, Entry::block(pool_block.plus(at - block.0), clock));
                if old.kind == EntryKind::Block {
                    change.own += i64::from(old.birth < created_at);
                    change.in_place += i64::from(old.birth < shared_at);
                    replaced.push(old);
                } else {
                    change.own += 1;
                    change.mapped += 1;
                    change.in_place += 1;
                }
            }
            done += part;
        }
        self.count_run(pool_block, count, 1);
        if replaced.iter().any(|old| old.birth < shared_at) {
            self.family(volume).borrow_mut().mark_range(block.0, block.0 + count);
        }
        for old in replaced {
            self.drop_block(old, shared_at, lsn);
        }
        if let Some(volume) = self.volumes.get_mut(&volume) {
            volume.changes.mark_range(block.0, block.0 + count);
        }
        self.account(volume, change);
    }

    /// Changes what a volume's record says of its blocks, and what it is owed with that.
    pub(super) fn account(&mut self, id: VolumeId, change: Accounted) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            let record = &mut volume.record;
            record.own_blocks = record.own_blocks.saturating_add_signed(change.own);
            record.mapped_blocks = record.mapped_blocks.saturating_add_signed(change.mapped);
            record.in_place_blocks = record.in_place_blocks.saturating_add_signed(change.in_place);
            volume.planned_blocks = volume.planned_blocks.saturating_sub(change.planned);
            volume.reckon(&mut self.owed_blocks);
        }
        self.mark_dirty(id);
    }

    /// First pass of [`unmap`](Self::unmap).
    pub(super) fn check_unmap(&mut self, volume: VolumeId, start: u64, end: u64) -> Try<()> {
        let key = TreeKey::Volume(volume);
        let root = self.root(key);
        let end = end.min(span_blocks(root.level));
        if root.entry.kind == EntryKind::Hole || start >= end || (start == 0 && end == span_blocks(root.level)) {
            return Ok(());
        }
        let needed = self.check_unmap_in(root.entry, key, root.level, 0, start, end, false)?;
        self.check_metadata(needed)
    }

    /// Whether unmapping `start..end` copies a node that others hold too: then it takes room for good.
    pub(super) fn unmap_copies(&mut self, volume: VolumeId, start: u64, end: u64) -> Try<bool> {
        let key = TreeKey::Volume(volume);
        for block in [start, end - 1] {
            let Root { mut entry, mut level } = self.root(key);
            if block >= span_blocks(level) {
                continue;
            }
            loop {
                let first = block & !(span_blocks(level) - 1);
                let goes_whole = start <= first && first + span_blocks(level) <= end;
                if entry.kind != EntryKind::Node || goes_whole {
                    break;
                }
                if self.check_own(entry, key, level, block, false)?.1 {
                    return Ok(true);
                }
                if level == 0 {
                    break;
                }
                let Some(node) = self.cache.node(entry.address) else {
                    return Err(Self::need_node(entry, key, level, block));
                };
                entry = node.entry(entry_index(block, level));
                level -= 1;
            }
        }
        Ok(false)
    }

    #[expect(clippy::too_many_arguments, reason = "one recursive step: a node, where it is, and what of it goes")]
    fn check_unmap_in(
        &mut self,
        entry: Entry,
        key: TreeKey,
        level: u8,
        first: u64,
        start: u64,
        end: u64,
        inherited: bool,
    ) -> Try<u64> {
        let (mut needed, shared) = self.check_own(entry, key, level, first, inherited)?;
        if level == 0 {
            return Ok(needed);
        }
        let span = entry_span(level);
        // Only the first and the last entry can be covered in part.
        let mut edges =
            [start.max(first), end.min(first + span * ENTRIES_PER_NODE as u64) - 1].map(|at| (at - first) / span);
        if edges[0] == edges[1] {
            edges[1] = u64::MAX;
        }
        for edge in edges.into_iter().filter(|edge| *edge != u64::MAX) {
            let child_first = first + edge * span;
            if start <= child_first && child_first + span <= end {
                continue;
            }
            let Some(node) = self.cache.node(entry.address) else {
                return Err(Self::need_node(entry, key, level, first));
            };
            let child = node.entry(edge as usize);
            if child.kind == EntryKind::Node {
                needed += self.check_unmap_in(child, key, level - 1, child_first, start, end, shared)?;
            }
        }
        Ok(needed)
    }

    /// Unmaps the blocks `start..end` of a volume. What is covered whole above a leaf becomes a carcass, in O(1).
    pub(super) fn unmap(&mut self, volume: VolumeId, start: u64, end: u64, lsn: Lsn) {
        let key = TreeKey::Volume(volume);
        let root = self.root(key);
        let end = end.min(span_blocks(root.level));
        if root.entry.kind == EntryKind::Hole || start >= end {
            return;
        }
        if let Some(volume) = self.volumes.get_mut(&volume) {
            volume.changes.mark_range(start, end);
        }
        let entry = if start == 0 && end == span_blocks(root.level) {
            self.add_carcass(volume, root.entry, root.level, 0, true, lsn);
            Entry::hole(self.clock)
        } else {
            self.unmap_in(volume, root.entry, root.level, 0, start, end, lsn)
        };
        // A tree that became empty has no height: the format refuses one.
        let level = if entry.kind == EntryKind::Hole { 0 } else { root.level };
        self.set_root(key, Root { entry, level });
    }

    #[expect(clippy::too_many_arguments, reason = "one recursive step: a node, where it is, and what of it goes")]
    fn unmap_in(
        &mut self,
        volume: VolumeId,
        entry: Entry,
        level: u8,
        first: u64,
        start: u64,
        end: u64,
        lsn: Lsn,
    ) -> Entry {
        let key = TreeKey::Volume(volume);
        let span = entry_span(level);
        let from = (start.max(first) - first) / span;
        let to = (end.min(first + span * ENTRIES_PER_NODE as u64) - first).div_ceil(span);
        let Some(node) = self.cache.node(entry.address) else { return entry };
        if (from..to).all(|index| node.entry(index as usize).kind == EntryKind::Hole) {
            return entry;
        }
        let shared_at = self.shared_at(key);
        let created_at = self.volumes.get(&volume).map_or(Clock(0), |volume| volume.record.created_at);
        let own = self.own(entry, key, level, first);
        let hole = Entry::hole(self.clock);
        let mut change = Accounted::default();
        for index in from..to {
            let child = self.cache.dirty_node(own.address).entry(index as usize);
            let child_first = first + index * span;
            let covered = start <= child_first && child_first + span <= end;
            let new = match child.kind {
                EntryKind::Hole => continue,
                EntryKind::Block => {
                    change.own -= i64::from(child.birth >= created_at);
                    change.mapped -= 1;
                    change.in_place -= i64::from(child.birth >= shared_at);
                    if child.birth < shared_at {
                        self.mark_family(volume, child_first);
                    }
                    self.drop_block(child, shared_at, lsn);
                    hole
                }
                EntryKind::Node if covered => {
                    self.add_carcass(volume, child, level - 1, child_first, true, lsn);
                    hole
                }
                EntryKind::Node => self.unmap_in(volume, child, level - 1, child_first, start, end, lsn),
            };
            self.cache.dirty_node(own.address).set(index as usize, new);
        }
        self.account(volume, change);
        if self.cache.dirty_node(own.address).is_empty() {
            // An empty node is a hole: it takes no space and a lookup ends here.
            self.free_node(own);
            return hole;
        }
        own
    }

    /// Moves an entry from a tree to the carcass table; its count does not change.
    pub(super) fn add_carcass(
        &mut self,
        volume: VolumeId,
        entry: Entry,
        level: u8,
        first: u64,
        account: bool,
        lsn: Lsn,
    ) {
        if entry.kind != EntryKind::Node {
            return;
        }
        let id = self.next_carcass;
        self.next_carcass += 1;
        let created_at = self.volumes.get(&volume).map_or(Clock(0), |volume| volume.record.created_at);
        let carcass = Carcass {
            id,
            entry,
            level,
            first: VirtualBlock(first),
            cursor: 0,
            volume,
            created_at,
            account,
            counting: false,
            cut: id,
        };
        self.insert_carcass(carcass, lsn);
        self.counters.carcasses += 1;
    }
}

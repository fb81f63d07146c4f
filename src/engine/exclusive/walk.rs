//! The walk over what a volume holds alone, in steps of a leaf.

use rustc_hash::FxHashMap;

use super::marks::part_blocks;
use crate::engine::state::{Need, State, TreeKey, Try, Volume};
use crate::engine::tree::{entry_index, entry_span};
use crate::format::{ENTRIES_PER_NODE, Entry, EntryKind, Root, span_blocks};
use crate::units::{Clock, VolumeId};

/// What was found, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) data: u64,
    pub(super) nodes: u64,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.data += other.data;
        self.nodes += other.nodes;
    }
}

/// The versions of the marks of a volume and of its family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Versions {
    pub(super) own: u64,
    pub(super) family: u64,
}

/// What is known of a volume's exclusive blocks.
#[derive(Debug, Default)]
pub(in crate::engine) struct Figure {
    /// The last whole walk.
    pub(super) last: Option<Walked>,
    /// What was found of each part that the volume holds alone, leaves and what they map.
    parts: FxHashMap<u64, (Sum, Versions)>,
    /// The versions when the worker looked last.
    pub(super) seen: Option<Versions>,
    /// Of these it could not be found.
    pub(super) failed: Option<Versions>,
}

/// A walk that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walked {
    pub(super) sum: Sum,
    pub(super) versions: Versions,
    /// Ticks when it began, and how many it took.
    pub(super) begun: u64,
    pub(super) took: u64,
}

/// A part being walked.
struct Part {
    index: u64,
    sum: Sum,
    versions: Versions,
}

/// A walk under way.
pub(super) struct Walk {
    id: VolumeId,
    cursor: u64,
    sum: Sum,
    part: Option<Part>,
    pub(super) versions: Versions,
    /// No other volume ever held a block of this one: leaves need not be read.
    is_alone: bool,
}

/// What a step finds at the cursor.
struct Step {
    /// Nodes above the leaves that it came into.
    above: u64,
    found: Sum,
    next: u64,
    /// A part that is known already.
    known: bool,
}

impl State {
    /// The versions of now; none of a volume that is gone.
    pub(super) fn versions(&self, id: VolumeId) -> Option<Versions> {
        self.volumes.get(&id).map(Volume::versions)
    }

    pub(super) fn begin_walk(&self, id: VolumeId) -> Option<Walk> {
        let versions = self.versions(id)?;
        let record = &self.volumes.get(&id)?.record;
        let is_alone = record.origin.is_none() && record.shared_at == record.created_at && record.rolled_at == Clock(0);
        Some(Walk { id, cursor: 0, sum: Sum::default(), part: None, versions, is_alone })
    }

    /// One step: at most one leaf. Answers whether the end is reached.
    pub(super) fn walk_on(&mut self, walk: &mut Walk) -> Try<bool> {
        let key = TreeKey::Volume(walk.id);
        let root = self.root(key);
        let end = span_blocks(root.level);
        if root.entry.kind == EntryKind::Hole || walk.cursor >= end {
            self.leave_part(walk);
            return Ok(true);
        }
        let part = walk.cursor / part_blocks();
        if walk.part.as_ref().is_none_or(|open| open.index != part) {
            self.leave_part(walk);
            let versions = self.versions(walk.id).unwrap_or_default();
            walk.part = Some(Part { index: part, sum: Sum::default(), versions });
        }
        let step = self.look(walk, key, root)?;
        walk.sum.nodes += step.above;
        walk.sum.add(step.found);
        match &mut walk.part {
            // Not to be kept: it is, as it was.
            Some(_) if step.known => walk.part = None,
            Some(part) => part.sum.add(step.found),
            None => {}
        }
        walk.cursor = step.next;
        Ok(false)
    }

    /// Goes down from the root to the leaf at the cursor, or to what ends the way there.
    fn look(&mut self, walk: &Walk, key: TreeKey, root: Root) -> Try<Step> {
        let shared_at = self.shared_at(key);
        let (mut entry, mut level) = (root.entry, root.level);
        let mut above = 0;
        loop {
            let first = walk.cursor & !(span_blocks(level) - 1);
            let next = first + span_blocks(level);
            let enters = walk.cursor == first;
            let skipped = |above| Step { above, found: Sum::default(), next, known: false };
            if enters && !self.is_exclusive(entry, shared_at)? {
                return Ok(skipped(above));
            }
            if level == 0 {
                let found = if walk.is_alone { Sum { data: 0, nodes: 1 } } else { self.leaf_sum(entry, key, first)? };
                return Ok(Step { above, found, next, known: false });
            }
            above += if enters { 1 + u64::from(entry.mirrored) } else { 0 };
            if level == 1
                && enters
                && let Some(found) = self.known_part(walk.id, first / part_blocks())
            {
                return Ok(Step { above, found, next, known: true });
            }
            let place = Self::place(key, level, first);
            let Some(node) = self.cache.node_at(entry.address, place) else {
                return Err(need(entry, key, level, first));
            };
            if level == 1 && walk.is_alone {
                let leaves = (0..ENTRIES_PER_NODE).filter(|index| node.entry(*index).kind == EntryKind::Node).count();
                return Ok(Step { above, found: Sum { data: 0, nodes: leaves as u64 }, next, known: false });
            }
            let index = entry_index(walk.cursor, level);
            let there = (index..ENTRIES_PER_NODE).find(|index| node.entry(*index).kind == EntryKind::Node);
            let Some(there) = there else { return Ok(skipped(above)) };
            if there != index {
                let next = first + there as u64 * entry_span(level);
                return Ok(Step { above, found: Sum::default(), next, known: false });
            }
            entry = node.entry(index);
            level -= 1;
        }
    }

    /// Whether nobody else holds what an entry of a node points at that is the volume's alone.
    fn is_exclusive(&self, entry: Entry, shared_at: Clock) -> Try<bool> {
        Ok(entry.birth >= shared_at || self.exact_count(entry.address)? == 1)
    }

    fn leaf_sum(&mut self, entry: Entry, key: TreeKey, first: u64) -> Try<Sum> {
        let shared_at = self.shared_at(key);
        let Some(leaf) = self.cache.get(entry.address).filter(|leaf| leaf.place == Self::place(key, 0, first)) else {
            return Err(need(entry, key, 0, first));
        };
        let mut sum = Sum { data: 0, nodes: 1 };
        for index in 0..ENTRIES_PER_NODE {
            let block = leaf.node.entry(index);
            if block.kind == EntryKind::Block && self.is_exclusive(block, shared_at)? {
                sum.data += 1;
            }
        }
        Ok(sum)
    }

    /// What was found of a part in which nothing has changed since.
    fn known_part(&self, id: VolumeId, part: u64) -> Option<Sum> {
        let volume = self.volumes.get(&id)?;
        let (sum, versions) = volume.figure.parts.get(&part)?;
        let fresh = volume.changes.of(part) <= versions.own && volume.family.borrow().of(part) <= versions.family;
        fresh.then_some(*sum)
    }

    fn leave_part(&mut self, walk: &mut Walk) {
        let Some(part) = walk.part.take() else { return };
        let Some(volume) = self.volumes.get_mut(&walk.id) else { return };
        // Of a volume that is alone the data is not counted part by part.
        if walk.is_alone || part.sum == Sum::default() {
            volume.figure.parts.remove(&part.index);
        } else {
            volume.figure.parts.insert(part.index, (part.sum, part.versions));
        }
    }

    /// The walk has ended.
    pub(super) fn end_walk(&mut self, walk: &Walk, begun: u64, now: u64) {
        let Some(volume) = self.volumes.get_mut(&walk.id) else { return };
        let data = if walk.is_alone { volume.record.mapped_blocks } else { walk.sum.data };
        let sum = Sum { data, ..walk.sum };
        volume.figure.last = Some(Walked { sum, versions: walk.versions, begun, took: now - begun });
    }
}

fn need(entry: Entry, key: TreeKey, level: u8, first: u64) -> Need {
    let Entry { address, mirrored, checksum, .. } = entry;
    Need::Node { address, mirrored, checksum, place: State::place(key, level, first) }
}

//! Changed ranges between two volumes, found by comparing their trees.
//!
//! Subtrees that both share stand at the same block and are skipped without being read, so the cost follows the change.

use super::Storage;
use super::pool::Pool;
use super::state::{Need, State, Try};
use super::tree::entry_span;
use crate::error::Result;
use crate::format::{ENTRIES_PER_NODE, Entry, EntryKind, Place, Root};
use crate::units::{BLOCK_BYTES, Clock, VirtualBlock, VolumeId};

/// A range that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ChangedRange {
    /// Start in bytes.
    pub offset_bytes: u64,
    /// Length in bytes.
    pub length_bytes: u64,
    /// Whether the second volume has data there; else it reads as zeros.
    pub mapped: bool,
}

/// A part of the ranges that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedPage {
    /// In order.
    pub ranges: Vec<ChangedRange>,
    /// Where the next ones begin to be looked for. None: there are no more.
    pub next_bytes: Option<u64>,
}

/// Pairs of nodes that are compared for one page: of dense data, 1 GiB.
const NODES_PER_PAGE: usize = 1024;

/// One side of a comparison: a subtree and its own level, which may be lower than the place it is compared at.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub(super) entry: Entry,
    level: u8,
}

/// A pair of subtrees still to be compared at one place.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    pub(super) from: Side,
    pub(super) to: Side,
    pub(super) level: u8,
    pub(super) first: u64,
}

impl Pair {
    /// Two whole trees; the first may be none.
    pub(super) fn of(from: Option<Root>, to: Root) -> Self {
        let from = from.unwrap_or(Root { entry: Entry::hole(Clock(0)), level: 0 });
        let side = |root: Root| Side { entry: root.entry, level: root.level };
        Self { from: side(from), to: side(to), level: from.level.max(to.level), first: 0 }
    }

    /// The block behind the last one of the place.
    fn end(&self) -> u64 {
        self.first.saturating_add((ENTRIES_PER_NODE as u64).saturating_mul(entry_span(self.level)))
    }
}

impl<S: Storage> Pool<S> {
    /// The ranges in which `to` differs from `from`, in order; from nothing in all that it maps. Content is not compared: a
    /// block that was written anew counts as changed.
    pub async fn changed_ranges(&self, from: impl Into<Option<VolumeId>>, to: VolumeId) -> Result<Vec<ChangedRange>> {
        let from = from.into();
        let mut all: Vec<ChangedRange> = Vec::new();
        let mut next_bytes = Some(0);
        while let Some(start_bytes) = next_bytes {
            let page = self.changed_page(from, to, start_bytes, usize::MAX).await?;
            page.ranges.into_iter().for_each(|range| append(&mut all, range));
            next_bytes = page.next_bytes;
        }
        Ok(all)
    }

    /// Some of them from `start_bytes` on: those that 1024 pairs of nodes say, or a leaf more than `most`. Two
    /// pages may each have a part of one range. Between them nothing is held: what waits for readers to leave, as snapshots and
    /// freed blocks do, waits for one page.
    pub async fn changed_page(
        &self,
        from: Option<VolumeId>,
        to: VolumeId,
        start_bytes: u64,
        most: usize,
    ) -> Result<ChangedPage> {
        let _stay = self.enter();
        let start = start_bytes / BLOCK_BYTES;
        let mut ranges: Vec<ChangedRange> = Vec::new();
        let mut nodes = 0;
        let (mut waiting, end) = {
            let state = self.inner.state.borrow();
            let to = &state.volume(to)?.record;
            let from = from.map(|from| state.volume(from)).transpose()?.map(|from| &from.record);
            let end = from.map_or(0, |from| from.size_bytes).max(to.size_bytes).div_ceil(BLOCK_BYTES);
            (vec![Pair::of(from.map(|from| from.root), to.root)], end)
        };
        while let Some(pair) = waiting.pop() {
            if same(pair.from, pair.to) || pair.first >= end || pair.end() <= start {
                continue;
            }
            if nodes == NODES_PER_PAGE || ranges.len() >= most {
                return Ok(ChangedPage { ranges, next_bytes: Some(pair.first * BLOCK_BYTES) });
            }
            nodes += 1;
            let children = self.attempt(|state| state.compare(pair)).await?;
            if pair.level > 0 {
                waiting.extend(children.into_iter().rev());
                continue;
            }
            for child in children.into_iter().filter(|child| (start..end).contains(&child.first)) {
                let mapped = child.to.entry.kind == EntryKind::Block;
                let offset_bytes = child.first * BLOCK_BYTES;
                append(&mut ranges, ChangedRange { offset_bytes, length_bytes: BLOCK_BYTES, mapped });
            }
        }
        Ok(ChangedPage { ranges, next_bytes: None })
    }
}

/// Adds a range behind the others; to the last one where it goes on.
fn append(ranges: &mut Vec<ChangedRange>, range: ChangedRange) {
    match ranges.last_mut() {
        Some(last) if last.mapped == range.mapped && last.offset_bytes + last.length_bytes == range.offset_bytes => {
            last.length_bytes += range.length_bytes;
        }
        _ => ranges.push(range),
    }
}

pub(super) fn same(from: Side, to: Side) -> bool {
    let (one, other) = (from.entry, to.entry);
    one.kind == other.kind && (one.kind == EntryKind::Hole || (one.address == other.address && from.level == to.level))
}

impl State {
    /// The children of two nodes of one place that differ.
    pub(super) fn compare(&mut self, pair: Pair) -> Try<Vec<Pair>> {
        let from = self.children(pair.from, pair.level, pair.first)?;
        let to = self.children(pair.to, pair.level, pair.first)?;
        let span = entry_span(pair.level);
        let pairs = from.into_iter().zip(to).enumerate().map(|(index, (from, to))| Pair {
            from,
            to,
            level: pair.level.saturating_sub(1),
            first: pair.first + index as u64 * span,
        });
        Ok(pairs.filter(|child| !same(child.from, child.to)).collect())
    }

    /// What a subtree has below one place of `level`. A lower tree is the first child of what would be above it.
    fn children(&mut self, side: Side, level: u8, first: u64) -> Try<Vec<Side>> {
        let below = level.saturating_sub(1);
        let mut children = vec![Side { entry: Entry::hole(Clock(0)), level: below }; ENTRIES_PER_NODE];
        let entry = side.entry;
        if entry.kind != EntryKind::Node {
            return Ok(children);
        }
        if side.level < level {
            if let Some(child) = children.first_mut() {
                *child = side;
            }
            return Ok(children);
        }
        let place = Place::Node { level, first: VirtualBlock(first) };
        let need = Need::Node { address: entry.address, mirrored: entry.mirrored, checksum: entry.checksum, place };
        let node = self.cache.node_at(entry.address, place).ok_or(need)?;
        for (index, child) in children.iter_mut().enumerate() {
            child.entry = node.entry(index);
        }
        Ok(children)
    }
}

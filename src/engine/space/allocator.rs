//! Which blocks may be handed out.
//!
//! Three sets for each group in memory. *Free*: may be handed out. *Fresh*: free in the last durable checkpoint and not
//! handed out since; only these may become nodes and records, so that the metadata of one life never stands on blocks that
//! its journal names (replay then fits in what it finds). *Held*: in a window, under a write that has not changed its
//! mapping yet, freed but not yet reusable, or being punched; a checkpoint that finds the count 0 leaves such a block alone.
//! A fourth, *backed*, remembers what the host has allocated and is worth punching.

use std::collections::BTreeMap;

use super::bitmap::Bitmap;
use crate::format::{GROUP_BLOCKS, Geometry};
use crate::units::PoolBlock;

/// Consecutive blocks of one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    pub(crate) start: PoolBlock,
    pub(crate) count: u64,
}

/// The sets of one group.
pub(crate) struct GroupSpace {
    free: Bitmap,
    fresh: Bitmap,
    held: Bitmap,
    backed: Bitmap,
    free_count: u32,
    /// Blocks from the group's start that have been prepared on the host; those behind are not free yet.
    ready: u32,
    blocks: u32,
}

impl GroupSpace {
    /// A group of `blocks` blocks, none free yet, the first `ready` of them prepared.
    pub(crate) fn new(blocks: u32, ready: u32) -> Self {
        Self {
            free: Bitmap::new(),
            fresh: Bitmap::new(),
            held: Bitmap::new(),
            backed: Bitmap::new(),
            free_count: 0,
            ready,
            blocks,
        }
    }

    /// Marks a block as free in the last durable checkpoint and now.
    pub(crate) fn set_fresh(&mut self, index: u32, backed: bool) {
        self.fresh.insert(index);
        if backed {
            self.backed.insert(index);
        }
        if self.free.insert(index) {
            self.free_count += 1;
        }
    }
}

/// The groups in memory and where the next blocks come from.
pub(crate) struct Allocator {
    geometry: Geometry,
    groups: BTreeMap<u64, GroupSpace>,
    free: u64,
    fresh: u64,
    data_next: (u64, u32),
    meta_next: (u64, u32),
}

impl Allocator {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, groups: BTreeMap::new(), free: 0, fresh: 0, data_next: (0, 0), meta_next: (0, 0) }
    }

    /// Blocks free in the groups in memory.
    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// Of these, blocks that may become metadata.
    pub(crate) fn fresh(&self) -> u64 {
        self.fresh
    }

    pub(crate) fn has_group(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    pub(crate) fn add_group(&mut self, group: u64, space: GroupSpace) {
        self.free += u64::from(space.free_count);
        self.fresh += u64::from(space.free_count);
        self.groups.insert(group, space);
    }

    /// How far the group has been prepared: blocks ready, blocks in all.
    pub(crate) fn readiness(&self, group: u64) -> Option<(u32, u32)> {
        self.groups.get(&group).map(|space| (space.ready, space.blocks))
    }

    /// The blocks of `group` up to `ready` have been prepared on the host and may be handed out.
    pub(crate) fn make_ready(&mut self, group: u64, ready: u32) {
        let Some(space) = self.groups.get_mut(&group) else { return };
        for index in space.ready..ready.min(space.blocks) {
            if space.free.insert(index) {
                space.free_count += 1;
                self.free += 1;
            }
            if space.fresh.insert(index) {
                self.fresh += 1;
            }
        }
        space.ready = ready.min(space.blocks);
    }

    /// The pool has become larger, and a durable checkpoint says so. Of a group that was short, what is new has to be
    /// prepared on the host before it may be handed out.
    pub(crate) fn enlarge(&mut self, geometry: Geometry) {
        let last = self.geometry.group_count() - 1;
        self.geometry = geometry;
        if let Some(space) = self.groups.get_mut(&last) {
            space.blocks = geometry.group_blocks(last) as u32;
        }
    }

    /// Takes up to `want` consecutive blocks for data and holds them, leaving at least `reserve` blocks for metadata.
    pub(crate) fn take_data(&mut self, want: u64, reserve: u64) -> Option<Run> {
        let spare = self.fresh.saturating_sub(reserve);
        if self.free == 0 {
            return None;
        }
        // First a run worth having, then whatever there is.
        let fair = want.clamp(1, 16) as u32;
        let run = self.find_data(fair, want, spare).or_else(|| self.find_data(1, want, spare))?;
        let (group, first) = self.geometry.group_of(run.start)?;
        self.data_next = (group, first + run.count as u32);
        let space = self.groups.get_mut(&group)?;
        for index in first..first + run.count as u32 {
            space.free.remove(index);
            space.held.insert(index);
            self.fresh -= u64::from(space.fresh.contains(index));
        }
        space.free_count -= run.count as u32;
        self.free -= run.count;
        Some(run)
    }

    fn find_data(&self, least: u32, want: u64, spare: u64) -> Option<Run> {
        let (next_group, next_index) = self.data_next;
        let after = self.groups.range(next_group..).map(|(group, space)| (*group, space));
        let before = self.groups.range(..=next_group).map(|(group, space)| (*group, space));
        for (round, (group, space)) in after.chain(before).enumerate() {
            if space.free_count < least {
                continue;
            }
            let mut from = if round == 0 && group == next_group { next_index } else { 0 };
            while let Some(start) = space.free.next_set(from) {
                let end = space.free.next_clear(start);
                let mut count = u64::from(end - start).min(want);
                // Within the run, no more fresh blocks than can be spared.
                let fresh = (start..start + count as u32).filter(|index| space.fresh.contains(*index)).count() as u64;
                if fresh > spare {
                    let mut left = spare;
                    count = (start..start + count as u32)
                        .take_while(|index| {
                            let is_fresh = space.fresh.contains(*index);
                            let goes = !is_fresh || left > 0;
                            left -= u64::from(is_fresh && goes);
                            goes
                        })
                        .count() as u64;
                }
                if count >= u64::from(least) {
                    return Some(Run { start: self.geometry.group_start(group).plus(u64::from(start)), count });
                }
                from = start + (count as u32).max(1);
                if count == 0 {
                    // A fresh block that cannot be spared: go on behind it.
                    continue;
                }
            }
        }
        None
    }

    /// Takes one fresh block, or a pair of consecutive ones, for metadata.
    pub(crate) fn take_meta(&mut self, count: u32) -> Option<PoolBlock> {
        let (next_group, next_index) = self.meta_next;
        let groups: Vec<u64> =
            self.groups.range(next_group..).chain(self.groups.range(..=next_group)).map(|(group, _)| *group).collect();
        for (round, group) in groups.into_iter().enumerate() {
            let space = self.groups.get_mut(&group)?;
            let mut from = if round == 0 && group == next_group { next_index } else { 0 };
            while let Some(start) = space.free.next_set(from) {
                let fits = start + count <= space.blocks
                    && (start..start + count).all(|index| space.free.contains(index) && space.fresh.contains(index));
                if !fits {
                    from = start + 1;
                    continue;
                }
                for index in start..start + count {
                    space.free.remove(index);
                    space.fresh.remove(index);
                    space.backed.insert(index);
                }
                space.free_count -= count;
                self.free -= u64::from(count);
                self.fresh -= u64::from(count);
                self.meta_next = (group, start + count);
                return Some(self.geometry.group_start(group).plus(u64::from(start)));
            }
        }
        None
    }

    /// A held block has been written and mapped: it is in use, and no longer fresh.
    pub(crate) fn consume(&mut self, block: PoolBlock) {
        self.with(block, |space, index, _| {
            space.held.remove(index);
            space.fresh.remove(index);
            space.backed.insert(index);
        });
    }

    /// A block in use was freed by a change; it stays held until nothing needs it any more.
    pub(crate) fn hold(&mut self, block: PoolBlock) {
        self.with(block, |space, index, _| {
            space.held.insert(index);
        });
    }

    /// Every use of a block named in the journal: it is neither free nor fresh until a checkpoint looks at it.
    pub(crate) fn claim(&mut self, block: PoolBlock) {
        self.with(block, |space, index, totals| {
            if space.free.remove(index) {
                space.free_count -= 1;
                totals.0 -= 1;
                totals.1 -= i64::from(space.fresh.contains(index));
            }
            space.fresh.remove(index);
        });
    }

    /// A held block may be handed out again. It is fresh when it was before it was taken and was never used.
    pub(crate) fn release(&mut self, block: PoolBlock) {
        self.with(block, |space, index, totals| {
            space.held.remove(index);
            if index < space.ready && space.free.insert(index) {
                space.free_count += 1;
                totals.0 += 1;
                totals.1 += i64::from(space.fresh.contains(index));
            }
        });
    }

    /// A block that was written to but never mapped: as [`release`](Self::release), no longer fresh.
    pub(crate) fn spoil(&mut self, block: PoolBlock) {
        self.with(block, |space, index, _| {
            space.fresh.remove(index);
            space.backed.insert(index);
        });
    }

    /// Whether nobody has the block: it may be handed out.
    pub(crate) fn is_unused(&self, block: PoolBlock) -> bool {
        let Some((group, index)) = self.geometry.group_of(block) else { return false };
        self.groups.get(&group).is_some_and(|space| space.free.contains(index))
    }

    /// Holds a block that a checkpoint has freed. Answers false when it is held for something else, or not in memory.
    pub(crate) fn hold_freed(&mut self, block: PoolBlock) -> bool {
        let mut held = false;
        self.with(block, |space, index, _| held = index < space.ready && space.held.insert(index));
        held
    }

    /// A block that a checkpoint has freed, and that nothing planned before needs any more, may become anything.
    pub(crate) fn release_fresh(&mut self, block: PoolBlock) {
        self.with(block, |space, index, _| {
            space.held.remove(index);
        });
        self.freed_by_checkpoint(block);
    }

    /// A durable checkpoint says that the count is 0, and nothing has happened to the block since.
    pub(crate) fn freed_by_checkpoint(&mut self, block: PoolBlock) {
        self.with(block, |space, index, totals| {
            if space.held.contains(index) || index >= space.ready {
                return;
            }
            let fresh = space.fresh.insert(index);
            if space.free.insert(index) {
                space.free_count += 1;
                totals.0 += 1;
                totals.1 += 1;
            } else {
                totals.1 += i64::from(fresh);
            }
        });
    }

    /// Takes a run of at least `least` free blocks that the host has allocated, to be punched; they are held meanwhile.
    pub(crate) fn take_punchable(&mut self, least: u32, most: u32) -> Option<Run> {
        for (group, space) in &mut self.groups {
            if space.free_count < least {
                continue;
            }
            let mut from = 0;
            while let Some(start) = space.free.next_set(from) {
                let free_end = space.free.next_clear(start).min(start + most);
                let Some(backed) = space.backed.next_set(start) else { break };
                let end = space.backed.next_clear(backed).min(free_end);
                if backed >= free_end {
                    from = free_end;
                    continue;
                }
                if end - backed < least {
                    from = end;
                    continue;
                }
                for index in backed..end {
                    space.free.remove(index);
                    space.held.insert(index);
                    space.backed.remove(index);
                    self.fresh -= u64::from(space.fresh.contains(index));
                }
                space.free_count -= end - backed;
                self.free -= u64::from(end - backed);
                let start = self.geometry.group_start(*group).plus(u64::from(backed));
                return Some(Run { start, count: u64::from(end - backed) });
            }
        }
        None
    }

    fn with(&mut self, block: PoolBlock, change: impl FnOnce(&mut GroupSpace, u32, &mut (i64, i64))) {
        let Some((group, index)) = self.geometry.group_of(block) else { return };
        let Some(space) = self.groups.get_mut(&group) else { return };
        debug_assert!(u64::from(index) < GROUP_BLOCKS);
        let mut totals = (0, 0);
        change(space, index, &mut totals);
        self.free = self.free.saturating_add_signed(totals.0);
        self.fresh = self.fresh.saturating_add_signed(totals.1);
    }
}

//! Which blocks may be handed out.
//!
//! Three sets for each group in memory. *Free*: may be handed out. *Fresh*: free in the last durable checkpoint and not
//! handed out since; only these may become nodes and records, so that the metadata of one life never stands on blocks that
//! its journal names (replay then fits in what it finds). *Held*: in a window, under a write that has not changed its
//! mapping yet, freed but not yet reusable, or being punched; a checkpoint that finds the count 0 leaves such a block alone.
//!
//! Three more are about the host. *Prepared*: known to be allocated there, since it was extended or written in this session
//! or was in use when the pool was opened; metadata goes nowhere else, so that no checkpoint meets a full host. *Backed*:
//! the host may have allocated it and it is worth punching. *Given back*: punched, and nobody's; it is prepared before it is
//! free again, as what no one has used yet is, because a first write to a hole costs the host several times as much.

use std::collections::BTreeMap;

use super::bitmap::Bitmap;
use crate::format::{GROUP_BLOCKS, Geometry};
use crate::units::PoolBlock;

/// Blocks known to the host that are kept for metadata (8 MiB): never punched.
pub(crate) const PREPARED_BLOCKS: u64 = 2048;

/// Fewer blocks beyond what is kept for metadata are not worth punching (1 MiB).
const SPARE_LEAST: u32 = 256;

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
    prepared: Bitmap,
    backed: Bitmap,
    /// Most groups have none.
    given_back: Option<Bitmap>,
    free_count: u32,
    given_back_count: u32,
    /// Blocks from the group's start that may be handed out; those behind have never been.
    ready: u32,
    blocks: u32,
}

impl GroupSpace {
    /// A group of `blocks` blocks, none free yet, the first `ready` of which may be handed out when they are.
    pub(crate) fn new(blocks: u32, ready: u32) -> Self {
        Self {
            free: Bitmap::new(),
            fresh: Bitmap::new(),
            held: Bitmap::new(),
            prepared: Bitmap::new(),
            backed: Bitmap::new(),
            given_back: None,
            free_count: 0,
            given_back_count: 0,
            ready,
            blocks,
        }
    }

    /// While a group is read: a block that is free in the last durable checkpoint and now. Whether the host has it is not
    /// known.
    pub(crate) fn set_fresh(&mut self, index: u32) {
        self.fresh.insert(index);
        self.backed.insert(index);
        self.free_count += u32::from(self.free.insert(index));
    }

    /// While a group is read: such a block that the host does not have.
    pub(crate) fn set_given_back(&mut self, index: u32) {
        self.fresh.insert(index);
        self.given_back_count += u32::from(self.given_back.get_or_insert_with(Bitmap::new).insert(index));
    }

    /// While a group is read: a block in use, so that the host has it.
    pub(crate) fn set_used(&mut self, index: u32) {
        self.prepared.insert(index);
        self.backed.insert(index);
    }

    fn is_given_back(&self, index: u32) -> bool {
        self.given_back.as_ref().is_some_and(|blocks| blocks.contains(index))
    }

    fn no_longer_given_back(&mut self, index: u32) {
        if let Some(blocks) = &mut self.given_back {
            blocks.remove(index);
        }
    }

    /// Whether the block may become metadata.
    fn is_for_metadata(&self, index: u32) -> bool {
        self.free.contains(index) && self.fresh.contains(index) && self.prepared.contains(index)
    }
}

/// Takes `count` consecutive blocks for metadata from the first of `groups` that has them, from an index in each on.
fn find_meta<'a>(
    groups: impl Iterator<Item = (&'a u64, &'a mut GroupSpace)>,
    from: impl Fn(u64) -> u32,
    count: u32,
) -> Option<(u64, u32)> {
    for (group, space) in groups {
        let mut from = from(*group);
        while let Some(start) = space.free.next_set(from) {
            let fits =
                start + count <= space.blocks && (start..start + count).all(|index| space.is_for_metadata(index));
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
            return Some((*group, start));
        }
    }
    None
}

/// The groups in memory and where the next blocks come from.
pub(crate) struct Allocator {
    geometry: Geometry,
    groups: BTreeMap<u64, GroupSpace>,
    free: u64,
    fresh: u64,
    unready: u64,
    data_next: (u64, u32),
    meta_next: (u64, u32),
}

impl Allocator {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, groups: BTreeMap::new(), free: 0, fresh: 0, unready: 0, data_next: (0, 0), meta_next: (0, 0) }
    }

    /// Blocks free in the groups in memory.
    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// Of these, blocks that may become metadata: fresh, and prepared on the host.
    pub(crate) fn fresh(&self) -> u64 {
        self.fresh
    }

    /// Blocks of the groups in memory that have to be prepared before they are free: never used, or given back.
    pub(crate) fn unready(&self) -> u64 {
        self.unready
    }

    pub(crate) fn has_group(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    pub(crate) fn add_group(&mut self, group: u64, space: GroupSpace) {
        self.free += u64::from(space.free_count);
        self.unready += u64::from(space.blocks - space.ready + space.given_back_count);
        self.fresh += (0..space.blocks).filter(|index| space.is_for_metadata(*index)).count() as u64;
        self.groups.insert(group, space);
    }

    /// The pool has become larger, and a durable checkpoint says so. Of a group that was short, what is new has to be
    /// prepared on the host before it may be handed out.
    pub(crate) fn enlarge(&mut self, geometry: Geometry) {
        let last = self.geometry.group_count() - 1;
        self.geometry = geometry;
        if let Some(space) = self.groups.get_mut(&last) {
            let before = space.blocks;
            space.blocks = geometry.group_blocks(last) as u32;
            self.unready += u64::from(space.blocks - before);
        }
    }

    /// How far the group has been prepared: blocks ready, blocks in all.
    pub(crate) fn readiness(&self, group: u64) -> Option<(u32, u32)> {
        self.groups.get(&group).map(|space| (space.ready, space.blocks))
    }

    /// The blocks of `group` up to `ready` may be handed out; `prepared` when the host has written them.
    pub(crate) fn make_ready(&mut self, group: u64, ready: u32, prepared: bool) {
        let Some(space) = self.groups.get_mut(&group) else { return };
        let ready = ready.min(space.blocks);
        let new = space.ready..ready;
        space.ready = ready;
        self.unready -= u64::from(new.end.saturating_sub(new.start));
        let start = self.geometry.group_start(group);
        for index in new {
            self.with(start.plus(u64::from(index)), |space, index| {
                if prepared {
                    space.prepared.insert(index);
                } else {
                    space.backed.insert(index);
                }
                space.fresh.insert(index);
                space.free.insert(index);
            });
        }
    }

    /// Takes up to `want` consecutive blocks for data and holds them, leaving at least `reserve` blocks for metadata.
    pub(crate) fn take_data(&mut self, want: u64, reserve: u64) -> Option<Run> {
        if self.free == 0 || want == 0 {
            return None;
        }
        // First a run worth having, then whatever there is.
        let fair = want.clamp(1, 16) as u32;
        let run = self.find_sparing(fair, want, reserve).or_else(|| self.find_sparing(1, want, reserve))?;
        self.hold_data(run)
    }

    /// Takes `least` to `want` consecutive blocks for data and holds them, leaving at least `reserve` blocks for metadata.
    pub(crate) fn take_run(&mut self, least: u64, want: u64, reserve: u64) -> Option<Run> {
        let run = self.find_sparing(u32::try_from(least).ok()?, want, reserve)?;
        self.hold_data(run)
    }

    /// A run for data: where there is enough that metadata cannot use, what has been prepared for it stays.
    fn find_sparing(&self, least: u32, want: u64, reserve: u64) -> Option<Run> {
        let spare = |reserve| self.fresh.saturating_sub(reserve);
        let is_enough = self.free - self.fresh >= want && reserve < PREPARED_BLOCKS;
        let sparing = if is_enough { self.find_data(least, want, spare(PREPARED_BLOCKS)) } else { None };
        sparing.or_else(|| self.find_data(least, want, spare(reserve)))
    }

    fn hold_data(&mut self, run: Run) -> Option<Run> {
        let (group, first) = self.geometry.group_of(run.start)?;
        self.data_next = (group, first + run.count as u32);
        let space = self.groups.get_mut(&group)?;
        for index in first..first + run.count as u32 {
            self.fresh -= u64::from(space.is_for_metadata(index));
            space.free.remove(index);
            space.held.insert(index);
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
                // Within the run, no more blocks for metadata than can be spared.
                let fresh = (start..start + count as u32).filter(|index| space.is_for_metadata(*index)).count() as u64;
                if fresh > spare {
                    let mut left = spare;
                    count = (start..start + count as u32)
                        .take_while(|index| {
                            let is_fresh = space.is_for_metadata(*index);
                            let goes = !is_fresh || left > 0;
                            left -= u64::from(is_fresh && goes);
                            goes
                        })
                        .count() as u64;
                }
                if count >= u64::from(least) {
                    return Some(Run { start: self.geometry.group_start(group).plus(u64::from(start)), count });
                }
                from = start + count as u32;
                if count == 0 {
                    // Fresh blocks that cannot be spared: go on behind them.
                    from = (start..end).find(|index| !space.is_for_metadata(*index)).unwrap_or(end);
                }
            }
        }
        None
    }

    /// Takes one fresh block, or a pair of consecutive ones, for metadata.
    pub(crate) fn take_meta(&mut self, count: u32) -> Option<PoolBlock> {
        if self.fresh < u64::from(count) {
            return None;
        }
        let (next, index) = self.meta_next;
        let after = self.groups.range_mut(next..);
        let (group, start) = find_meta(after, |group| if group == next { index } else { 0 }, count)
            .or_else(|| find_meta(self.groups.range_mut(..=next), |_| 0, count))?;
        self.free -= u64::from(count);
        self.fresh -= u64::from(count);
        self.meta_next = (group, start + count);
        Some(self.geometry.group_start(group).plus(u64::from(start)))
    }

    /// Held blocks have been written and mapped: they are in use, and no longer fresh.
    pub(crate) fn consume(&mut self, run: Run) {
        let mut done = 0;
        while done < run.count {
            let Some((group, first)) = self.geometry.group_of(run.start.plus(done)) else { return };
            let part = (GROUP_BLOCKS - u64::from(first)).min(run.count - done);
            done += part;
            let Some(space) = self.groups.get_mut(&group) else { continue };
            for index in first..first + part as u32 {
                space.held.remove(index);
                space.fresh.remove(index);
                space.prepared.insert(index);
                space.backed.insert(index);
            }
        }
    }

    /// A block in use was freed by a change; it stays held until nothing needs it any more.
    pub(crate) fn hold(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            space.held.insert(index);
        });
    }

    /// A block that a record of the journal names: it is neither free nor fresh until a checkpoint looks at it.
    pub(crate) fn claim(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            space.free.remove(index);
            space.fresh.remove(index);
            space.no_longer_given_back(index);
            space.prepared.insert(index);
            space.backed.insert(index);
        });
    }

    /// A held block may be handed out again. It is fresh when it was before it was taken and was never used.
    pub(crate) fn release(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            space.held.remove(index);
            if index < space.ready {
                space.free.insert(index);
            }
        });
    }

    /// A held block was written to, perhaps in vain, and will not be mapped: it is no longer fresh. A host that refused the
    /// write has no space for it.
    pub(crate) fn spoil(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            space.fresh.remove(index);
            space.backed.insert(index);
        });
    }

    /// Whether the group of the block is in memory.
    pub(crate) fn has_block(&self, block: PoolBlock) -> bool {
        self.geometry.group_of(block).is_some_and(|(group, _)| self.has_group(group))
    }

    /// Whether nobody has the block: it may be handed out, or prepared for that.
    pub(crate) fn is_unused(&self, block: PoolBlock) -> bool {
        let Some((group, index)) = self.geometry.group_of(block) else { return false };
        let space = self.groups.get(&group);
        space.is_some_and(|space| space.free.contains(index) || space.is_given_back(index))
    }

    /// Holds a block that a checkpoint has freed. Answers false when it is held for something else, or not in memory.
    pub(crate) fn hold_freed(&mut self, block: PoolBlock) -> bool {
        let mut held = false;
        self.with(block, |space, index| held = index < space.ready && space.held.insert(index));
        held
    }

    /// A block that a checkpoint has freed, and that nothing planned before needs any more, may become anything.
    pub(crate) fn release_fresh(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            space.held.remove(index);
        });
        self.freed_by_checkpoint(block);
    }

    /// A durable checkpoint says that the count is 0, and nothing has happened to the block since.
    pub(crate) fn freed_by_checkpoint(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            if !space.held.contains(index) && index < space.ready {
                space.fresh.insert(index);
                if !space.is_given_back(index) {
                    space.free.insert(index);
                }
            }
        });
    }

    /// Takes a run of at least `least` free blocks that the host may have allocated, to be punched; they are held
    /// meanwhile. Blocks for metadata are left when no more than `keep` of them are there, and `keep_free` blocks whatever
    /// they are for.
    pub(crate) fn take_punchable(&mut self, least: u32, most: u32, keep: u64, keep_free: u64) -> Option<Run> {
        let most = u64::from(most).min(self.free.saturating_sub(keep_free)) as u32;
        if most < least {
            return None;
        }
        let spare = self.fresh.saturating_sub(keep);
        let backed = |space: &GroupSpace, index| space.backed.contains(index);
        let of_no_use = |space: &GroupSpace, index| backed(space, index) && !space.is_for_metadata(index);
        let found = if spare >= u64::from(most) {
            self.find_run(least, most, backed)
        } else {
            let rest = spare as u32;
            let few = || if rest >= least.max(SPARE_LEAST) { self.find_run(least, rest, backed) } else { None };
            self.find_run(least, most, of_no_use).or_else(few)
        }?;
        self.hold_run(found, |space, index| {
            space.backed.remove(index);
            space.prepared.remove(index);
        });
        Some(found)
    }

    /// A held run has been punched.
    pub(crate) fn give_back(&mut self, run: Run) {
        for offset in 0..run.count {
            self.with(run.start.plus(offset), |space, index| {
                space.held.remove(index);
                space.given_back.get_or_insert_with(Bitmap::new).insert(index);
            });
        }
    }

    /// What was given back is free again as it is: whether the host has it is not known.
    pub(crate) fn release_given_back(&mut self) {
        while let Some(run) = self.take_given_back(GROUP_BLOCKS as u32) {
            for offset in 0..run.count {
                self.with(run.start.plus(offset), |space, index| {
                    space.backed.insert(index);
                });
                self.release(run.start.plus(offset));
            }
        }
    }

    /// Takes up to `most` consecutive blocks that were given back, to be prepared; they are held meanwhile.
    pub(crate) fn take_given_back(&mut self, most: u32) -> Option<Run> {
        let (group, space) = self.groups.iter().find(|(_, space)| space.given_back_count > 0)?;
        let blocks = space.given_back.as_ref()?;
        let start = blocks.next_set(0)?;
        let end = blocks.next_clear(start).min(start + most);
        let run =
            Run { start: self.geometry.group_start(*group).plus(u64::from(start)), count: u64::from(end - start) };
        self.hold_run(run, GroupSpace::no_longer_given_back);
        Some(run)
    }

    /// Takes a run of up to `most` fresh blocks of which it is not known whether the host has them, at or after `from`,
    /// to be prepared; they are held meanwhile.
    pub(crate) fn take_unprepared(&mut self, most: u32, from: PoolBlock) -> Option<Run> {
        let found = self.find_unprepared(most, from)?;
        self.hold_run(found, |_, _| {});
        Some(found)
    }

    fn find_unprepared(&self, most: u32, from: PoolBlock) -> Option<Run> {
        let (first_group, first_index) = self.geometry.group_of(from)?;
        for (group, space) in self.groups.range(first_group..) {
            let begin = if *group == first_group { first_index } else { 0 };
            if space.free_count == 0 {
                continue;
            }
            let wanted = |index| index < space.blocks && space.fresh.contains(index) && !space.prepared.contains(index);
            let mut from = begin;
            while let Some(start) = space.free.next_set(from) {
                let end = space.free.next_clear(start);
                if let Some(start) = (start..end).find(|index| wanted(*index)) {
                    let count = (start..end.min(start + most)).take_while(|index| wanted(*index)).count() as u64;
                    return Some(Run { start: self.geometry.group_start(*group).plus(u64::from(start)), count });
                }
                from = end;
            }
        }
        None
    }

    /// A run that was being prepared is known to the host now.
    pub(crate) fn prepared(&mut self, run: Run) {
        for offset in 0..run.count {
            self.with(run.start.plus(offset), |space, index| {
                space.prepared.insert(index);
                space.backed.insert(index);
            });
        }
    }

    /// The host has the space of a run that was given back, and has not written it.
    pub(crate) fn reserved(&mut self, run: Run) {
        for offset in 0..run.count {
            self.with(run.start.plus(offset), |space, index| {
                space.backed.insert(index);
            });
        }
    }

    /// The first run of `least` to `most` free blocks that are all `wanted`.
    fn find_run(&self, least: u32, most: u32, wanted: impl Fn(&GroupSpace, u32) -> bool) -> Option<Run> {
        for (group, space) in &self.groups {
            if space.free_count < least {
                continue;
            }
            let mut from = 0;
            while let Some(start) = space.free.next_set(from) {
                let end = space.free.next_clear(start);
                let mut at = start;
                while at < end {
                    let count = (at..end.min(at + most)).take_while(|index| wanted(space, *index)).count() as u32;
                    if count >= least {
                        let start = self.geometry.group_start(*group).plus(u64::from(at));
                        return Some(Run { start, count: u64::from(count) });
                    }
                    at += count + 1;
                }
                from = end;
            }
        }
        None
    }

    fn hold_run(&mut self, run: Run, change: impl Fn(&mut GroupSpace, u32)) {
        for offset in 0..run.count {
            self.with(run.start.plus(offset), |space, index| {
                space.free.remove(index);
                space.held.insert(index);
                change(space, index);
            });
        }
    }

    /// Changes one block's sets and keeps the sums right.
    fn with(&mut self, block: PoolBlock, change: impl FnOnce(&mut GroupSpace, u32)) {
        let Some((group, index)) = self.geometry.group_of(block) else { return };
        let Some(space) = self.groups.get_mut(&group) else { return };
        debug_assert!(u64::from(index) < GROUP_BLOCKS);
        let before = (space.free.contains(index), space.is_for_metadata(index), space.is_given_back(index));
        change(space, index);
        let after = (space.free.contains(index), space.is_for_metadata(index), space.is_given_back(index));
        space.free_count = space.free_count + u32::from(after.0) - u32::from(before.0);
        space.given_back_count = space.given_back_count + u32::from(after.2) - u32::from(before.2);
        self.unready = self.unready + u64::from(after.2) - u64::from(before.2);
        self.free = self.free + u64::from(after.0) - u64::from(before.0);
        self.fresh = self.fresh + u64::from(after.1) - u64::from(before.1);
    }
}

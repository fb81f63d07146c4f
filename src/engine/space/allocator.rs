//! Which blocks may be handed out.
//!
//! Three sets for each group in memory. *Free*: may be handed out. *Fresh*: free in the last durable checkpoint and not
//! handed out since; only these may become nodes and records, so that the metadata of one life never stands on blocks that
//! its journal names (replay then fits in what it finds). *Held*: in a window, under a write that has not changed its
//! mapping yet, freed but not yet reusable, or being punched; a checkpoint that finds the count 0 leaves such a block alone.
//!
//! Three more are about the host. *Prepared*: known to be allocated there, since it was extended or written in this session
//! or was in use when the pool was opened; metadata goes nowhere else, so that no checkpoint meets a full host. *Backed*:
//! the host may have allocated it and it is worth punching. *Unready*: nobody's, and a hole on the host, since it was never
//! used or was punched; it is made ready before it is free, because a first write to a hole costs the host several times as
//! much. While that goes on it is held, and unready still.

use std::collections::BTreeMap;
use std::ops::Range;

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

impl Run {
    /// Where it stands, in bytes of the pool.
    pub(crate) fn bytes(self) -> Range<u64> {
        self.start.offset_bytes()..self.start.plus(self.count).offset_bytes()
    }
}

/// The sets of one group.
pub(crate) struct GroupSpace {
    free: Bitmap,
    fresh: Bitmap,
    held: Bitmap,
    prepared: Bitmap,
    backed: Bitmap,
    /// Most groups have none.
    unready: Option<Bitmap>,
    free_count: u32,
    unready_count: u32,
    blocks: u32,
}

/// Blocks that are nobody's and have to be prepared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unprepared {
    /// Free and fresh, and it is not known whether the host has them.
    Unknown,
    /// Unready, in runs of this length and more.
    Unready(u32),
}

impl GroupSpace {
    /// A group of `blocks` blocks of which nothing is known yet.
    pub(crate) fn new(blocks: u32) -> Self {
        Self {
            free: Bitmap::new(),
            fresh: Bitmap::new(),
            held: Bitmap::new(),
            prepared: Bitmap::new(),
            backed: Bitmap::new(),
            unready: None,
            free_count: 0,
            unready_count: 0,
            blocks,
        }
    }

    /// A group that comes into use: all blocks behind its layout are nobody's.
    pub(crate) fn untouched(blocks: u32, layout: u32) -> Self {
        let mut space = Self::new(blocks);
        (layout..blocks).for_each(|index| space.set_unready(index));
        space
    }

    /// While a group is read: a block that is free in the last durable checkpoint and now. Whether the host has it is not
    /// known.
    pub(crate) fn set_fresh(&mut self, index: u32) {
        self.fresh.insert(index);
        self.backed.insert(index);
        self.free_count += u32::from(self.free.insert(index));
    }

    /// The same of a block that the host does not have.
    pub(crate) fn set_unready(&mut self, index: u32) {
        self.fresh.insert(index);
        self.unready_count += u32::from(self.unready.get_or_insert_with(Bitmap::new).insert(index));
    }

    /// While a group is read: a block in use, so that the host has it.
    pub(crate) fn set_used(&mut self, index: u32) {
        self.prepared.insert(index);
        self.backed.insert(index);
    }

    fn is_unready(&self, index: u32) -> bool {
        self.unready.as_ref().is_some_and(|blocks| blocks.contains(index))
    }

    /// Whether all of them are nobody's holes, and nobody is making them ready.
    fn are_holes(&self, blocks: Range<u32>) -> bool {
        let none_is = |set: &Bitmap| set.next_set(blocks.start).is_none_or(|index| index >= blocks.end);
        let unready = |set: &Bitmap| set.next_clear(blocks.start) >= blocks.end;
        blocks.is_empty() || none_is(&self.held) && self.unready.as_ref().is_some_and(unready)
    }

    fn set_ready(&mut self, index: u32) {
        if let Some(blocks) = &mut self.unready {
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

/// The first run at or after `from` of `least` to `most` indexes that are in the set and all `wanted`: start and count.
fn find_in(set: &Bitmap, from: u32, least: u32, most: u32, wanted: impl Fn(u32) -> bool) -> Option<(u32, u32)> {
    let mut from = from;
    while let Some(start) = set.next_set(from) {
        let end = set.next_clear(start);
        let mut at = start;
        while at < end {
            let count = (at..end.min(at + most)).take_while(|index| wanted(*index)).count() as u32;
            if count >= least {
                return Some((at, count));
            }
            at += count + 1;
        }
        from = end;
    }
    None
}

/// The first run of up to `most` blocks that has `least` free ones that are `wanted`, begins and ends with one, and has
/// nothing but holes between them: start and count.
fn find_among_holes(space: &GroupSpace, least: u32, most: u32, wanted: impl Fn(u32) -> bool) -> Option<(u32, u32)> {
    let mut from = 0;
    while let Some(start) = space.free.next_set(from) {
        let limit = space.blocks.min(start.saturating_add(most));
        let (mut at, mut end, mut found) = (start, start, 0);
        while at < limit && wanted(at) {
            let free = space.free.next_clear(at).min(limit);
            end = (at..free).find(|index| !wanted(*index)).unwrap_or(free);
            found += end - at;
            match space.free.next_set(end) {
                Some(next) if space.are_holes(end..next) => at = next,
                _ => break,
            }
        }
        if found >= least && found > 0 {
            return Some((start, end - start));
        }
        from = end.max(start + 1);
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

    /// Blocks of the groups in memory that have to be made ready before they are free.
    pub(crate) fn unready(&self) -> u64 {
        self.unready
    }

    pub(crate) fn has_group(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    pub(crate) fn add_group(&mut self, group: u64, space: GroupSpace) {
        self.free += u64::from(space.free_count);
        self.unready += u64::from(space.unready_count);
        self.fresh += (0..space.blocks).filter(|index| space.is_for_metadata(*index)).count() as u64;
        self.groups.insert(group, space);
    }

    /// The pool has become larger, and a durable checkpoint says so. Of a group that was short, what is new is nobody's.
    pub(crate) fn enlarge(&mut self, geometry: Geometry) {
        let last = self.geometry.group_count() - 1;
        self.geometry = geometry;
        if let Some(space) = self.groups.get_mut(&last) {
            let before = space.unready_count;
            let blocks = geometry.group_blocks(last) as u32;
            (space.blocks..blocks).for_each(|index| space.set_unready(index));
            space.blocks = blocks;
            self.unready += u64::from(space.unready_count - before);
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
            space.set_ready(index);
            space.prepared.insert(index);
            space.backed.insert(index);
        });
    }

    /// A held block may be handed out again, unless it is not ready. It is fresh when it was before it was taken and was never
    /// used.
    pub(crate) fn release(&mut self, block: PoolBlock) {
        self.with(block, |space, index| {
            space.held.remove(index);
            if !space.is_unready(index) {
                space.free.insert(index);
            }
        });
    }

    /// The same for all blocks of a run.
    pub(crate) fn release_run(&mut self, run: Run) {
        for offset in 0..run.count {
            self.release(run.start.plus(offset));
        }
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
        space.is_some_and(|space| space.free.contains(index) || space.is_unready(index))
    }

    /// Holds a block that a checkpoint has freed. Answers false when it is held for something else, or not in memory.
    pub(crate) fn hold_freed(&mut self, block: PoolBlock) -> bool {
        let mut held = false;
        self.with(block, |space, index| held = space.held.insert(index));
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
            if space.is_unready(index) {
                space.fresh.insert(index);
            } else if !space.held.contains(index) {
                space.fresh.insert(index);
                space.free.insert(index);
            }
        });
    }

    /// Takes a run with at least `least` free blocks that the host may have allocated, to be punched; it is held meanwhile.
    /// What stands between them may be holes, punched before or never used: what was given back block by block would keep the
    /// rest from ever being a run. Those come last, since each piece of them costs the host as much as a long run. Blocks for
    /// metadata are left when no more than `keep` of them are there, and `keep_free` blocks whatever they are for.
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

    /// A held run has been punched. Answers how many of its blocks were no holes before.
    pub(crate) fn give_back(&mut self, run: Run) -> u64 {
        let before = self.unready;
        self.with_each(run, |space, index| {
            space.held.remove(index);
            space.unready.get_or_insert_with(Bitmap::new).insert(index);
        });
        self.unready - before
    }

    /// Takes a run of up to `most` unprepared blocks at or after `from`; they are held meanwhile.
    pub(crate) fn take_unprepared(&mut self, which: Unprepared, most: u32, from: PoolBlock) -> Option<Run> {
        let found = self.find_unprepared(which, most, from)?;
        self.hold_run(found, |_, _| {});
        Some(found)
    }

    fn find_unprepared(&self, which: Unprepared, most: u32, from: PoolBlock) -> Option<Run> {
        let (first_group, first_index) = self.geometry.group_of(from)?;
        for (group, space) in self.groups.range(first_group..) {
            let begin = if *group == first_group { first_index } else { 0 };
            let run = match (which, &space.unready) {
                (Unprepared::Unknown, _) if space.free_count > 0 => find_in(&space.free, begin, 1, most, |index| {
                    index < space.blocks && space.fresh.contains(index) && !space.prepared.contains(index)
                }),
                (Unprepared::Unready(least), Some(unready)) if space.unready_count >= least => {
                    find_in(unready, begin, least, most, |index| !space.held.contains(index))
                }
                _ => None,
            };
            if let Some((start, count)) = run {
                return Some(Run {
                    start: self.geometry.group_start(*group).plus(u64::from(start)),
                    count: u64::from(count),
                });
            }
        }
        None
    }

    /// The host has the space of a held run, and has `written` it or not. It is free when it is released.
    pub(crate) fn made_ready(&mut self, run: Run, written: bool) {
        self.with_each(run, |space, index| {
            space.set_ready(index);
            space.backed.insert(index);
            if written {
                space.prepared.insert(index);
            }
        });
    }

    /// The first run of up to `most` blocks with `least` free ones that are `wanted`, and if need be holes between them.
    fn find_run(&self, least: u32, most: u32, wanted: impl Fn(&GroupSpace, u32) -> bool) -> Option<Run> {
        let whole = |space: &GroupSpace| find_in(&space.free, 0, least, most, |index| wanted(space, index));
        let among_holes = |space: &GroupSpace| find_among_holes(space, least, most, |index| wanted(space, index));
        self.find_group(least, whole).or_else(|| self.find_group(least, among_holes))
    }

    fn find_group(&self, least: u32, find: impl Fn(&GroupSpace) -> Option<(u32, u32)>) -> Option<Run> {
        let found = self
            .groups
            .iter()
            .filter(|(_, space)| space.free_count >= least)
            .find_map(|(group, space)| Some((*group, find(space)?)));
        found.map(|(group, (start, count))| Run {
            start: self.geometry.group_start(group).plus(u64::from(start)),
            count: u64::from(count),
        })
    }

    fn hold_run(&mut self, run: Run, change: impl Fn(&mut GroupSpace, u32)) {
        self.with_each(run, |space, index| {
            space.free.remove(index);
            space.held.insert(index);
            change(space, index);
        });
    }

    fn with_each(&mut self, run: Run, change: impl Fn(&mut GroupSpace, u32)) {
        for offset in 0..run.count {
            self.with(run.start.plus(offset), &change);
        }
    }

    /// Changes one block's sets and keeps the sums right.
    fn with(&mut self, block: PoolBlock, change: impl FnOnce(&mut GroupSpace, u32)) {
        let Some((group, index)) = self.geometry.group_of(block) else { return };
        let Some(space) = self.groups.get_mut(&group) else { return };
        debug_assert!(u64::from(index) < GROUP_BLOCKS);
        let before = (space.free.contains(index), space.is_for_metadata(index), space.is_unready(index));
        change(space, index);
        let after = (space.free.contains(index), space.is_for_metadata(index), space.is_unready(index));
        space.free_count = space.free_count + u32::from(after.0) - u32::from(before.0);
        space.unready_count = space.unready_count + u32::from(after.2) - u32::from(before.2);
        if space.unready_count == 0 {
            space.unready = None;
        }
        self.unready = self.unready + u64::from(after.2) - u64::from(before.2);
        self.free = self.free + u64::from(after.0) - u64::from(before.0);
        self.fresh = self.fresh + u64::from(after.1) - u64::from(before.1);
    }
}

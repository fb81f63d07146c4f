//! Groups: taking the next into use, and reading one that was in use before.

use std::ops::Range;

use super::pool::{Pool, until};
use super::space::{GroupSpace, Run};
use super::state::State;
use super::{Memory, Storage};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{self, COUNTS_PER_PAGE, Place, Record};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, PoolBlock};

impl<S: Storage> Pool<S> {
    /// Takes the next group into use: its descriptors and both slots of its pages of counts are allocated on the host and
    /// flushed, then the change is recorded, and only then a block of it is handed out. No checkpoint can fail for host
    /// space. (Its pages of checksums: `checksums.rs`.)
    pub(super) async fn append_group(&self, group: u64) -> Result<()> {
        let inner = &self.inner;
        let geometry = inner.state.borrow().geometry;
        let start = geometry.group_start(group);
        let layout = geometry.layout_blocks(group);
        let at_once = geometry.layout_blocks_unsealed(group);
        self.extend(start.offset_bytes()..start.plus(at_once).offset_bytes()).await?;
        self.flush_medium("flush of a new group").await?;
        let mut state = inner.state.borrow_mut();
        state.groups_in_use = group + 1;
        let record = Record::PoolGrown { groups_in_use: group + 1 };
        state.publish(None, &record);
        state.add_group(group, GroupSpace::untouched(geometry.group_blocks(group) as u32, layout as u32));
        state.counters.groups_appended += 1;
        Ok(())
    }

    /// Reads a group's counts and learns which of its blocks are free.
    pub(super) async fn load_group(&self, group: u64) -> Result<()> {
        let inner = &self.inner;
        loop {
            until(&inner.signals.checkpointed, || {
                let state = inner.state.borrow();
                !state.checkpointing || state.poisoned.is_some()
            })
            .await;
            if let Some(error) = self.poison_error() {
                return Err(error);
            }
            // What a checkpoint freed in a group that was not in memory is found free here: rule O7 holds for it, too.
            let epoch = inner.state.borrow_mut().epochs.advance();
            self.wait_for_epoch(epoch).await;
            let begun = inner.checkpoints_begun.get();
            let counts = self.read_group(group).await?;
            let geometry = inner.state.borrow().geometry;
            let whole = Run { start: geometry.group_start(group), count: geometry.group_blocks(group) };
            let holes = inner.storage.holes(whole.bytes());
            let mut state = inner.state.borrow_mut();
            // A checkpoint meanwhile may have written other slots than those that were read.
            if begun == inner.checkpoints_begun.get() && !state.checkpointing {
                if !state.allocator.has_group(group) {
                    state.add_loaded_group(group, &counts, &holes);
                }
                return Ok(());
            }
        }
    }

    async fn read_group(&self, group: u64) -> Result<Vec<u32>> {
        self.load_descriptor(group).await?;
        let (descriptor, range, uuid, geometry) = {
            let state = self.inner.state.borrow();
            let descriptor =
                state.descriptors.get(&group).cloned().unwrap_or_else(|| format::GroupDescriptor::new(group));
            (descriptor, state.geometry.pages_range(group), state.uuid, state.geometry)
        };
        let count = (range.end - range.start) as usize;
        let bytes = if descriptor.pages.iter().any(|page| page.present) {
            let memory = self.inner.storage.allocate(count * BLOCK_SIZE);
            let read = self.inner.storage.read(range.start * BLOCK_BYTES, &memory).await;
            read.map_err(|error| Error::io(format!("read of the counts of group {group}"), error))?;
            let mut bytes = vec![0; count * BLOCK_SIZE];
            memory.read(0, &mut bytes);
            bytes
        } else {
            Vec::new()
        };
        let mut counts = Vec::with_capacity(format::GROUP_BLOCKS as usize);
        for (page, reference) in descriptor.pages.iter().enumerate() {
            let page = page as u32;
            if !reference.present {
                counts.extend_from_slice(&super::pool::implied_counts(&self.inner.state.borrow(), group, page)[..]);
                continue;
            }
            let address = geometry.page_block(group, page, reference.slot);
            let at = (address.0 - range.start) as usize * BLOCK_SIZE;
            let structure = Structure::SpaceMapPage;
            let Some(block) = bytes.get(at..at + BLOCK_SIZE) else {
                return Err(Corrupt { structure, address, check: Check::Truncated }.into());
            };
            let found = format::checksum(&uuid, Place::SpaceMapPage { group, page }, block);
            if found != reference.checksum {
                let check = Check::Checksum { expected: reference.checksum, found };
                return Err(Corrupt { structure, address, check }.into());
            }
            let page = format::decode_counts(block).map_err(|check| Corrupt { structure, address, check })?;
            counts.extend_from_slice(&page[..]);
        }
        Ok(counts)
    }

    /// Groups in which a checkpoint freed blocks are read, so that these are used again or given back.
    pub(super) async fn load_freed_groups(&self) -> Result<()> {
        let groups = std::mem::take(&mut self.inner.state.borrow_mut().groups_freed_in);
        for group in groups {
            if !self.inner.state.borrow().allocator.has_group(group) {
                self.load_group(group).await?;
            }
        }
        Ok(())
    }
}

impl State {
    /// Adds a group that was in use before: free is what the durable counts say, nothing has touched since, and no freed
    /// block waits for. What of that is in `holes` (bytes of the pool) is prepared before it is used.
    fn add_loaded_group(&mut self, group: u64, counts: &[u32], holes: &[Range<u64>]) {
        let blocks = self.geometry.group_blocks(group) as u32;
        let mut space = GroupSpace::new(blocks);
        let start = self.geometry.group_start(group);
        let waiting: rustc_hash::FxHashSet<PoolBlock> = self
            .unrecorded_frees
            .iter()
            .map(|(_, block)| *block)
            .chain(self.draining_frees.iter().map(|(_, block, _)| *block))
            .chain(self.pinned.blocks())
            .collect();
        let mut holes = holes.iter().peekable();
        for (index, count) in counts.iter().enumerate().take(blocks as usize) {
            let page = (group, (index as u64 / COUNTS_PER_PAGE) as u32);
            let in_page = (index as u64 % COUNTS_PER_PAGE) as u16;
            let block = start.plus(index as u64);
            while holes.next_if(|hole| hole.end <= block.offset_bytes()).is_some() {}
            if *count == 0 && self.deltas.get(page, in_page).is_none() && !waiting.contains(&block) {
                let is_hole = holes
                    .peek()
                    .is_some_and(|hole| hole.start <= block.offset_bytes() && block.plus(1).offset_bytes() <= hole.end);
                if is_hole { space.set_unready(index as u32) } else { space.set_fresh(index as u32) }
            } else if *count > 0 {
                space.set_used(index as u32);
            }
        }
        self.add_group(group, space);
    }
}

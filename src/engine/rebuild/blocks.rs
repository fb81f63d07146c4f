//! Blocks that nothing holds, handed out in ascending order.

use crate::engine::inspect::Counts;
use crate::error::{Error, Result};
use crate::format::Geometry;
use crate::units::PoolBlock;

/// Free blocks of the groups in use.
pub(in crate::engine) struct FreeBlocks {
    geometry: Geometry,
    groups_in_use: u64,
    group: u64,
    index: u64,
}

impl FreeBlocks {
    pub(in crate::engine) fn new(geometry: Geometry, groups_in_use: u64) -> Self {
        Self { geometry, groups_in_use, group: 0, index: 0 }
    }

    /// Groups in use: more than there were, when their blocks were not enough.
    pub(in crate::engine) fn groups_in_use(&self) -> u64 {
        self.groups_in_use
    }

    /// A pair where two neighbours are free, else a single block, counted as metadata. `is_free` says which blocks nothing
    /// but the walk's counts may know of.
    ///
    /// # Errors
    /// [`Error::NoSpace`].
    pub(in crate::engine) fn take(
        &mut self,
        pair: bool,
        counts: &mut Counts,
        is_free: impl Fn(PoolBlock) -> bool,
    ) -> Result<(PoolBlock, bool)> {
        loop {
            if self.group >= self.groups_in_use {
                if self.groups_in_use >= self.geometry.group_count() {
                    return Err(Error::NoSpace("no block is free for the metadata; make the pool larger".into()));
                }
                self.groups_in_use += 1;
                counts.grow(self.groups_in_use);
            }
            let (start, blocks) = (self.geometry.group_start(self.group), self.geometry.group_blocks(self.group));
            self.index = self.index.max(self.geometry.layout_blocks(self.group));
            if self.index >= blocks {
                (self.group, self.index) = (self.group + 1, 0);
                continue;
            }
            let block = start.plus(self.index);
            self.index += 1;
            if counts.get(block) > 0 || !is_free(block) {
                continue;
            }
            counts.add(block, true);
            let second = block.plus(1);
            let mirrored = pair && self.index < blocks && counts.get(second) == 0 && is_free(second);
            if mirrored {
                self.index += 1;
                counts.add(second, true);
            }
            return Ok((block, mirrored));
        }
    }
}

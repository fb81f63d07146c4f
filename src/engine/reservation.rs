//! Reservations: bytes that are always there for a volume.
//!
//! Invariant: *a volume with a reservation of R can have R bytes of its own, at any offsets, whatever others have written.*
//! Of the R bytes those are there already that a write overwrites in place (`in_place_blocks`: mapped, and born at or after
//! `shared_at`). So a volume is *owed*
//!
//! > R / 4096 - `in_place_blocks`, and not below 0, for data
//! >
//! > every node that its map can have at its size: a leaf for each MiB, a pair for each node above (0.4 % of the size)
//! >
//! > 64 blocks for nodes that its changes move, which come back with the next checkpoint
//!
//! and nobody else takes a block unless as many are left as all others are owed, and the pool's own reserve. What is left
//! counts all that can be had without waiting for anybody: what is free, what has not been prepared yet, and groups that are
//! not in use yet. The volume itself may take what it is owed; beyond that it is as any other.
//!
//! Why that is enough. Data: a write that takes a block makes the volume's `in_place_blocks` one more, and owes one less; a
//! discard the reverse, and gives the block back; what a carcass holds still counts as there until it is eaten, and a write
//! that lacks room waits for that. The map: nodes that are the volume's alone never number more than the map can have, so
//! what is kept for it, less those, is what it can still need. Nodes are kept for the whole map and not for what R bytes
//! touch at most, because a discard leaves its nodes standing: what was written, discarded and written elsewhere, over and
//! over, needs a leaf at each place. A sharing makes `in_place_blocks` 0, and all is owed anew: so a snapshot is refused
//! when that much is not there. A rollback gives back what it makes owed.
//!
//! Releases (deletions, discards of what is not shared) are held up by nothing: they take nodes until the next checkpoint
//! only. The reservation is one of the pool's space. A sparse file's host may be full all the same.

use super::Storage;
use super::growth::{RELEASE_BLOCKS, Use};
use super::pool::Pool;
use super::space::GroupSpace;
use super::state::{State, Volume};
use crate::error::{Error, Result};
use crate::format::{ENTRIES_PER_NODE, LEVEL_MAX, VolumeRecord};
use crate::units::{BLOCK_BYTES, VolumeId};

/// Blocks for nodes that the changes of a volume with a reservation move between two checkpoints.
const MOVED_BLOCKS: u64 = 64;

/// Blocks that the map of a volume can take at most: leaves are single, all others pairs.
pub(super) fn map_blocks(size_bytes: u64) -> u64 {
    let mut nodes = size_bytes.div_ceil(BLOCK_BYTES).div_ceil(ENTRIES_PER_NODE as u64);
    let mut blocks = nodes;
    for _ in 1..=LEVEL_MAX {
        nodes = nodes.div_ceil(ENTRIES_PER_NODE as u64);
        blocks += 2 * nodes;
    }
    blocks
}

/// Blocks that a volume with this record is owed for data, when so many more are about to be its own.
fn owed_data(record: &VolumeRecord, planned_blocks: u64) -> u64 {
    let reserved = record.reservation_bytes.min(record.size_bytes) / BLOCK_BYTES;
    reserved.saturating_sub(record.in_place_blocks.saturating_add(planned_blocks))
}

/// Blocks that a volume with this record is owed in all.
fn owed(record: &VolumeRecord, planned_blocks: u64) -> u64 {
    if record.reservation_bytes == 0 {
        return 0;
    }
    owed_data(record, planned_blocks) + map_blocks(record.size_bytes) + MOVED_BLOCKS
}

impl Volume {
    /// Blocks for data that it is owed.
    pub(super) fn owed_data(&self) -> u64 {
        owed_data(&self.record, self.planned_blocks)
    }

    /// Finds anew what it is owed, after a change; `all` is what all volumes are.
    pub(super) fn reckon(&mut self, all: &mut u64) {
        let owed = owed(&self.record, self.planned_blocks);
        *all = *all - self.owed_blocks + owed;
        self.owed_blocks = owed;
    }
}

/// Refuses a reservation that no volume can have.
pub(super) fn check_reservation(reservation_bytes: u64, size_bytes: u64, quota_bytes: u64) -> Result<()> {
    if !reservation_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(Error::InvalidInput(format!("a reservation of {reservation_bytes} is no multiple of 4096 bytes")));
    }
    if reservation_bytes > size_bytes {
        return Err(Error::InvalidInput(format!(
            "a reservation of {reservation_bytes} bytes is more than the volume's size, {size_bytes}"
        )));
    }
    if quota_bytes > 0 && reservation_bytes > quota_bytes {
        return Err(Error::InvalidInput(format!(
            "a reservation of {reservation_bytes} bytes is more than the quota, {quota_bytes}"
        )));
    }
    Ok(())
}

impl<S: Storage> Pool<S> {
    /// Has so many bytes of its own always there for a volume; 0 for none.
    ///
    /// # Errors
    /// `NoSpace` when the pool cannot promise that now, `InvalidInput` for more than its size or quota, `ReadOnly` for a
    /// snapshot. Nothing has changed then.
    pub async fn set_reservation(&self, id: VolumeId, reservation_bytes: u64) -> Result<()> {
        let wanted = |state: &State| {
            let record = &state.volume(id)?.record;
            if record.flags.read_only {
                return Err(Error::ReadOnly(format!("{} is a snapshot: nothing is written to it", record.name)));
            }
            check_reservation(reservation_bytes, record.size_bytes, record.quota_bytes)?;
            Ok(VolumeRecord { reservation_bytes, ..record.clone() })
        };
        self.make_room_to_owe(Some(id), wanted).await?;
        let edit = |state: &mut State, record: &mut VolumeRecord| {
            let wanted = wanted(state)?;
            state.check_owing(Some(id), &wanted)?;
            record.reservation_bytes = reservation_bytes;
            Ok(())
        };
        // To ask for less must work on a full pool.
        let is_less = self.inner.state.borrow().volume(id)?.record.reservation_bytes >= reservation_bytes;
        if is_less { self.change_releasing(id, edit).await } else { self.change(id, edit).await }
    }

    /// Waits for what comes free until the pool can owe what a volume is owed whose record becomes that of `wanted`, if it
    /// has a reservation. The caller looks again in the step that makes the change. Nothing may be held.
    pub(super) async fn make_room_to_owe(
        &self,
        id: Option<VolumeId>,
        wanted: impl Fn(&State) -> Result<VolumeRecord>,
    ) -> Result<()> {
        let missing = {
            let mut state = self.inner.state.borrow_mut();
            let wanted = wanted(&state)?;
            if state.owed_blocks == 0 {
                // Kept up to date only where somebody is owed something.
                state.count_outside();
            }
            if state.missing_to_owe(id, &wanted) == 0 {
                return Ok(());
            }
            let owed = owed(&wanted, state.planned_of(id));
            let most = state.geometry.pool_blocks.max(state.size_limit_bytes / BLOCK_BYTES);
            if owed.saturating_add(state.owed_to_others(id)) > most {
                // Waiting is of no use.
                return state.check_owing(id, &wanted);
            }
            owed
        };
        match self.make_room(missing, Use::Reservation, id, 0).await {
            // Said better below, where it is known what is missing.
            Ok(()) | Err(Error::NoSpace(_)) => {}
            Err(error) => return Err(error),
        }
        let state = self.inner.state.borrow();
        let wanted = wanted(&state)?;
        state.check_owing(id, &wanted)
    }
}

impl State {
    fn planned_of(&self, id: Option<VolumeId>) -> u64 {
        id.and_then(|id| self.volumes.get(&id)).map_or(0, |volume| volume.planned_blocks)
    }

    /// Blocks that all volumes but `id` are owed.
    pub(super) fn owed_to_others(&self, id: Option<VolumeId>) -> u64 {
        self.owed_blocks - id.and_then(|id| self.volumes.get(&id)).map_or(0, |volume| volume.owed_blocks)
    }

    /// Blocks that can be had without waiting for anybody: free ones, those that are not prepared yet, and those of groups
    /// that are not in memory or not in use.
    pub(super) fn obtainable_blocks(&self) -> u64 {
        self.allocator.free() + self.allocator.unready() + self.outside_blocks
    }

    /// Counts the free blocks of groups that are not in memory, after what the indexes say of them has changed: while
    /// nobody is owed anything, nobody asks.
    pub(super) fn count_outside(&mut self) {
        let groups = (0..self.geometry.group_count()).filter(|group| !self.allocator.has_group(*group));
        self.outside_blocks = groups.map(|group| u64::from(self.index_entry(group).free_blocks)).sum();
    }

    /// A group is in memory from now on.
    pub(super) fn add_group(&mut self, group: u64, space: GroupSpace) {
        let free = u64::from(self.index_entry(group).free_blocks);
        self.outside_blocks = self.outside_blocks.saturating_sub(free);
        self.allocator.add_group(group, space);
    }

    /// Finds what is owed anew for every volume: after opening.
    pub(super) fn reckon_all(&mut self) {
        for volume in self.volumes.values_mut() {
            volume.reckon(&mut self.owed_blocks);
        }
    }

    /// The same after a change of one.
    pub(super) fn reckon(&mut self, id: VolumeId) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.reckon(&mut self.owed_blocks);
        }
    }

    /// Blocks planned for a volume will not be mapped.
    pub(super) fn unplan(&mut self, id: VolumeId, blocks: u64) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.planned_blocks = volume.planned_blocks.saturating_sub(blocks);
            volume.reckon(&mut self.owed_blocks);
        }
    }

    /// Whether `id` takes `blocks` for data out of what it is owed.
    pub(super) fn is_owed(&self, id: VolumeId, blocks: u64) -> bool {
        let volume = self.volumes.get(&id);
        volume.is_some_and(|volume| volume.record.reservation_bytes > 0 && blocks <= volume.owed_data())
    }

    /// Blocks that must be left when `id` takes some for `wanted`, beside what it leaves to others: the least that any
    /// change needs, for who takes what it is owed.
    pub(super) fn owed_reserve_blocks(&self) -> u64 {
        self.administration_blocks() + self.metadata_promised + RELEASE_BLOCKS
    }

    /// Most blocks that `id` may take for data, when `reserve` are to be left to the pool and others have reservations.
    pub(super) fn spare_blocks(&self, id: VolumeId, is_owed: bool, reserve: u64) -> u64 {
        if self.owed_blocks == 0 {
            return u64::MAX;
        }
        let others = self.owed_to_others(is_owed.then_some(id));
        self.obtainable_blocks().saturating_sub(reserve + others)
    }

    /// Whether `blocks` for metadata of `id`, or of nobody's, leave what others are owed. A volume's own map is part of what
    /// it is owed.
    pub(super) fn leaves_owed_metadata(&self, blocks: u64, whose: Option<VolumeId>) -> bool {
        if self.owed_blocks == 0 {
            return true;
        }
        self.obtainable_blocks() >= self.owed_reserve_blocks() + self.owed_to_others(whose) + blocks
    }

    /// Blocks that are missing for the pool to owe what the record of a volume, a new one without `id`, says.
    fn missing_to_owe(&self, id: Option<VolumeId>, wanted: &VolumeRecord) -> u64 {
        let present = id.and_then(|id| self.volumes.get(&id)).map_or(0, |volume| volume.owed_blocks);
        self.missing(owed(wanted, self.planned_of(id)), present)
    }

    /// Blocks that are missing for the pool to owe some volumes `wanted`, who are owed `present` now.
    fn missing(&self, wanted: u64, present: u64) -> u64 {
        if wanted <= present {
            return 0;
        }
        let others = self.owed_blocks - present;
        (wanted + others + self.data_reserve_blocks()).saturating_sub(self.obtainable_blocks())
    }

    /// Refuses a change after which a volume were owed more than there is.
    ///
    /// # Errors
    /// `NoSpace`, with what is missing.
    pub(super) fn check_owing(&self, id: Option<VolumeId>, wanted: &VolumeRecord) -> Result<()> {
        check_missing(self.missing_to_owe(id, wanted), wanted)
    }

    /// The same for several that change together.
    ///
    /// # Errors
    /// `NoSpace`, with what is missing.
    pub(super) fn check_owing_all(&self, wanted: &[(VolumeId, VolumeRecord)]) -> Result<()> {
        let (mut together, mut present) = (0, 0);
        for (id, wanted) in wanted {
            together += owed(wanted, self.planned_of(Some(*id)));
            present += self.volumes.get(id).map_or(0, |volume| volume.owed_blocks);
        }
        let most = wanted.iter().max_by_key(|(_, record)| record.reservation_bytes);
        most.map_or(Ok(()), |(_, record)| check_missing(self.missing(together, present), record))
    }
}

fn check_missing(blocks: u64, wanted: &VolumeRecord) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    let (missing, name, reserved) = (blocks * BLOCK_BYTES, &wanted.name, wanted.reservation_bytes);
    Err(Error::NoSpace(format!(
        "the pool cannot hold {reserved} bytes ready for {name}: {missing} bytes are missing; delete something, make the \
         pool larger (`plywood pool grow`), or reserve less (`plywood volume resize {name} --reserve SIZE`)"
    )))
}

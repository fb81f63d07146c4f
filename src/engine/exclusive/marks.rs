//! Where something has changed, by parts of a volume's map.

use std::cell::RefCell;
use std::rc::Rc;

use rustc_hash::FxHashMap;

use crate::engine::state::State;
use crate::format::span_blocks;
use crate::units::{Clock, VolumeId};

/// Blocks of a part: what a node above the leaves maps, 256 MiB.
pub(super) fn part_blocks() -> u64 {
    span_blocks(1)
}

/// Parts that are marked one by one; of a longer range everything is.
const PARTS_MAX: u64 = 64;

/// Numbers that go up with every change, for the whole and for its parts.
#[derive(Debug, Default)]
pub(in crate::engine) struct Marks {
    version: u64,
    /// Everything has changed then.
    all: u64,
    parts: Vec<u64>,
}

impl Marks {
    /// Goes up with every change.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// The version at which the part changed last.
    pub(super) fn of(&self, part: u64) -> u64 {
        self.parts.get(part as usize).copied().unwrap_or(0).max(self.all)
    }

    /// Something has changed above the parts: whether a node there is shared is looked at in every walk.
    pub(in crate::engine) fn touch(&mut self) {
        self.version += 1;
    }

    /// Something has changed at a virtual block.
    pub(in crate::engine) fn mark(&mut self, block: u64) {
        self.version += 1;
        let part = (block / part_blocks()) as usize;
        if part >= self.parts.len() {
            self.parts.resize(part + 1, 0);
        }
        self.parts[part] = self.version;
    }

    /// The same for a range.
    pub(in crate::engine) fn mark_range(&mut self, start: u64, end: u64) {
        let parts = start / part_blocks()..end.div_ceil(part_blocks());
        if parts.end - parts.start > PARTS_MAX {
            self.mark_all();
            return;
        }
        for part in parts {
            self.mark(part * part_blocks());
        }
    }

    /// Everything has changed.
    pub(in crate::engine) fn mark_all(&mut self) {
        self.version += 1;
        self.all = self.version;
        self.parts = Vec::new();
    }
}

/// The marks that volumes share which may hold the same blocks.
pub(in crate::engine) type Family = Rc<RefCell<Marks>>;

/// What is known of families beside the volumes.
#[derive(Default)]
pub(in crate::engine) struct Families {
    /// Of volumes that are gone and of which carcasses wait.
    gone: FxHashMap<VolumeId, Family>,
    /// Of those of which it is not known.
    unknown: Family,
}

impl State {
    /// After opening: puts volumes that may hold the same blocks into one family. Records name origins, deleted ones too,
    /// but not the origins of these: where one is gone, all that was ever shared is taken for one family.
    pub(in crate::engine) fn join_families(&mut self) {
        let is_gone = |id: &VolumeId| !self.volumes.contains_key(id);
        let origins = self.volumes.values().filter_map(|volume| volume.record.origin.map(|origin| origin.id));
        let carcasses = self.carcasses.values().map(|waiting| waiting.carcass.volume);
        let is_unknown = origins.chain(carcasses).any(|id| is_gone(&id));
        let mut families: FxHashMap<VolumeId, Family> = FxHashMap::default();
        // Origins are older than what was made from them, and ids are given in order.
        for (id, volume) in &mut self.volumes {
            let record = &volume.record;
            let was_shared =
                record.origin.is_some() || record.shared_at > record.created_at || record.rolled_at > Clock(0);
            let of_origin = record.origin.and_then(|origin| families.get(&origin.id).cloned());
            volume.family = match of_origin {
                _ if is_unknown && was_shared => Rc::clone(&self.families.unknown),
                Some(family) => family,
                None => Family::default(),
            };
            families.insert(*id, Rc::clone(&volume.family));
        }
    }

    /// A volume is deleted; its carcass will change the counts of what its relatives hold.
    pub(in crate::engine) fn remember_family(&mut self, id: VolumeId, family: Family) {
        self.families.gone.insert(id, family);
    }

    /// No carcass waits.
    pub(in crate::engine) fn forget_families(&mut self) {
        self.families.gone.clear();
    }

    /// The family of a volume that there is, or was.
    pub(in crate::engine) fn family(&self, id: VolumeId) -> &Family {
        let known = self.volumes.get(&id).map(|volume| &volume.family).or_else(|| self.families.gone.get(&id));
        known.unwrap_or(&self.families.unknown)
    }

    /// A count has changed of something at that block that relatives of the volume may hold.
    pub(in crate::engine) fn mark_family(&mut self, id: VolumeId, block: u64) {
        self.family(id).borrow_mut().mark(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_that_did_not_change_keeps_its_version() {
        let mut marks = Marks::default();
        marks.mark(5);
        let before = marks.version();
        marks.mark(3 * part_blocks());
        marks.touch();
        assert!(marks.version() > before && marks.of(0) <= before);
        assert!(marks.of(3) > before && marks.of(2) <= before && marks.of(1000) <= before);
    }

    #[test]
    fn long_range_marks_everything_and_a_short_one_its_parts() {
        let mut marks = Marks::default();
        marks.mark_range(part_blocks() - 1, part_blocks() + 1);
        let before = marks.version();
        assert!(marks.of(0) > 0 && marks.of(1) > 0 && marks.of(2) == 0);
        marks.mark_range(0, part_blocks() * 1000);
        assert!(marks.of(5000) > before);
    }
}

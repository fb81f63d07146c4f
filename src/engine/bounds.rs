//! What a structure must keep to that only the whole pool tells: decoding knows the number of the pool's blocks, not
//! where its groups lie, nor what else has been read.
//!
//! A checksum says that bytes are those that were written, not that a sound engine wrote them. What is refused here would
//! else be counted where there are no counts, or free the blocks that counts stand in.

use super::state::State;
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{
    AttributeBlockRef, Carcass, ENTRIES_PER_NODE, Entry, EntryKind, Geometry, GroupIndex, Node, Record,
    VOLUME_BLOCKS_MAX, VolumeRecord,
};
use crate::units::{PoolBlock, VolumeId};

/// Whether `count` blocks from `start` on lie in one group, none of them in its layout: data, nodes and records do.
pub(super) fn holds(geometry: &Geometry, start: PoolBlock, count: u64) -> bool {
    let Some(last) = start.0.checked_add(count.saturating_sub(1)).map(PoolBlock) else { return false };
    match (geometry.group_of(start), geometry.group_of(last)) {
        (Some((group, index)), Some((same, _))) => group == same && u64::from(index) >= geometry.layout_blocks(group),
        _ => false,
    }
}

/// An entry's block, and the second of a pair.
pub(super) fn check_entry(geometry: &Geometry, entry: Entry) -> Result<(), Check> {
    if entry.kind == EntryKind::Hole || holds(geometry, entry.address, 1 + u64::from(entry.mirrored)) {
        return Ok(());
    }
    Err(Check::OutOfBounds { field: "address", value: entry.address.0 })
}

/// All that a node points at.
pub(super) fn check_node(geometry: &Geometry, node: &Node) -> Result<(), Check> {
    (0..ENTRIES_PER_NODE).try_for_each(|index| check_entry(geometry, node.entry(index)))
}

/// All that a volume's record points at.
pub(super) fn check_record(geometry: &Geometry, record: &VolumeRecord) -> Result<(), Check> {
    check_entry(geometry, record.root.entry)?;
    check_attributes(geometry, &record.attributes)
}

fn check_attributes(geometry: &Geometry, attributes: &[AttributeBlockRef]) -> Result<(), Check> {
    match attributes.iter().find(|reference| !holds(geometry, reference.address, 1)) {
        Some(bad) => Err(Check::OutOfBounds { field: "attributes.address", value: bad.address.0 }),
        None => Ok(()),
    }
}

/// The subtrees of a page of carcasses.
pub(super) fn check_carcasses(geometry: &Geometry, carcasses: &[Carcass]) -> Result<(), Check> {
    carcasses.iter().try_for_each(|carcass| check_entry(geometry, carcass.entry))
}

/// No group has more free blocks than it has blocks beside its layout.
pub(super) fn check_index(geometry: &Geometry, first_group: u64, index: &GroupIndex) -> Result<(), Check> {
    for (group, entry) in (first_group..geometry.group_count()).zip(index.entries.iter()) {
        let most = geometry.group_blocks(group) - geometry.layout_blocks(group);
        if u64::from(entry.free_blocks) > most {
            return Err(Check::OutOfBounds { field: "group.free_blocks", value: entry.free_blocks.into() });
        }
    }
    Ok(())
}

impl State {
    /// Refuses a record of the journal that cannot follow what was replayed before it.
    pub(super) fn check_replayed(&self, record: &Record) -> Result<()> {
        let damage = |check| Error::from(Corrupt { structure: Structure::Record, address: PoolBlock(0), check });
        let known = |id| {
            let check = Check::OutOfBounds { field: "volume", value: id };
            if self.volumes.contains_key(&VolumeId(id)) { Ok(()) } else { Err(damage(check)) }
        };
        let is_new = |record: &VolumeRecord| {
            let taken = self.volumes.contains_key(&record.id) || self.names.contains_key(&record.name);
            if taken { Err(damage(Check::Inconsistent("a new volume is there already"))) } else { Ok(()) }
        };
        match record {
            Record::Map { volume, .. } | Record::Unmap { volume, .. } | Record::VolumeDeleted { volume } => {
                known(volume.0)
            }
            Record::VolumeCreated(created) => is_new(created),
            Record::VolumeChanged(changed) => {
                known(changed.id.0)?;
                match self.names.get(&changed.name) {
                    Some(other) if *other != changed.id => {
                        Err(damage(Check::Inconsistent("two volumes have one name")))
                    }
                    _ => Ok(()),
                }
            }
            Record::VolumeShared { origin, created, .. } => known(origin.0).and_then(|()| is_new(created)),
            Record::VolumeRolledBack { volume, snapshot, .. } => {
                known(volume.0)?;
                known(snapshot.0)?;
                let check = Check::Inconsistent("a volume is rolled back to itself");
                if volume == snapshot { Err(damage(check)) } else { Ok(()) }
            }
            Record::PoolGrown { .. } => Ok(()),
        }
    }

    /// Refuses to make a volume when all ids have been given.
    pub(super) fn check_ids_left(&self, wanted: u64) -> Result<()> {
        if self.next_volume.0.saturating_add(wanted) <= VOLUME_BLOCKS_MAX {
            return Ok(());
        }
        Err(Error::NoSpace("the pool has given all ids that volumes can have".into()))
    }
}

/// Each of these a fuzzer found behind right checksums, as a panic of whoever counted the block.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::GROUP_BLOCKS;
    use crate::units::Clock;

    fn geometry() -> Geometry {
        Geometry::new(300 << 20, 1 << 20).expect("a layout of two groups and a short one")
    }

    #[test]
    fn blocks_outside_of_groups_and_in_their_layout_are_not_pointed_at() {
        let geometry = geometry();
        let first = geometry.first_group();
        let data = first.plus(geometry.layout_blocks(0));
        for (start, count) in [(PoolBlock(1), 1), (PoolBlock(512), 1), (first, 1), (data, GROUP_BLOCKS)] {
            assert!(!holds(&geometry, start, count), "{start} {count}");
        }
        let last = first.plus(GROUP_BLOCKS - 1);
        assert!(holds(&geometry, data, GROUP_BLOCKS - geometry.layout_blocks(0)));
        assert!(holds(&geometry, last, 1) && !holds(&geometry, last, 2), "the next group begins with its layout");
        assert!(!holds(&geometry, PoolBlock(u64::MAX), 2) && !holds(&geometry, PoolBlock(geometry.pool_blocks - 1), 2));
    }

    #[test]
    fn second_of_a_pair_lies_in_the_group_too() {
        let geometry = geometry();
        let last = geometry.first_group().plus(GROUP_BLOCKS - 1);
        let mut node = Node::new(Clock(1));
        node.set(7, Entry::node(last, false, 0, Clock(1)));
        assert_eq!(check_node(&geometry, &node), Ok(()));
        node.set(7, Entry::node(last, true, 0, Clock(1)));
        assert_eq!(check_node(&geometry, &node), Err(Check::OutOfBounds { field: "address", value: last.0 }));
    }

    #[test]
    fn free_blocks_are_no_more_than_a_group_has() {
        let geometry = geometry();
        let short = geometry.group_count() - 1;
        let most = geometry.group_blocks(short) - geometry.layout_blocks(short);
        let mut index = GroupIndex::new();
        index.entries[short as usize].free_blocks = most as u32;
        assert_eq!(check_index(&geometry, 0, &index), Ok(()));
        index.entries[short as usize].free_blocks += 1;
        assert!(check_index(&geometry, 0, &index).is_err());
    }
}

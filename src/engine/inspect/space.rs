//! The space map: group indexes, descriptors and pages, each held against its checksum, and the counts against a walk.

use rustc_hash::FxHashMap;

use super::checksums::{FREE_WITH_CHECKSUM, GroupChecksummed, read_checksums};
use super::counts::Counts;
use super::fault::Faults;
use super::reader::{Reader, Target};
use crate::engine::Storage;
use crate::error::{Check, Structure};
use crate::format::{
    self, COUNTS_PER_PAGE, GROUP_BLOCKS, GROUPS_PER_INDEX, GroupDescriptor, GroupIndex, GroupIndexEntry, Place,
    SUPERBLOCK_COPIES, Slot, Superblock,
};
use crate::units::PoolBlock;

/// What the space map says in all.
#[derive(Default)]
pub(in crate::engine) struct Space {
    /// Blocks whose count is not 0.
    pub(super) used_blocks: u64,
    /// Blocks that are counted and were not reached, in a walk that could not reach everything.
    pub(super) unaccounted_blocks: u64,
    /// Whether some of it could not be read.
    damaged: bool,
}

/// What the space map says of one group.
pub(in crate::engine) struct GroupFacts {
    group: u64,
    entry: GroupIndexEntry,
    /// The index block that has the entry.
    index: PoolBlock,
    /// Counts that fit a byte; none where the group is empty.
    small: Option<Box<[u8]>>,
    /// The others.
    many: FxHashMap<usize, u32>,
    /// Pages that are damaged.
    bad_pages: u32,
    /// Which blocks have a checksum, where any has.
    pub(super) checksummed: Option<GroupChecksummed>,
    /// The first block that has a checksum though it is counted by nothing.
    free_with_checksum: Option<PoolBlock>,
}

/// In place of a count: it stands among the others.
const MANY: u8 = u8::MAX;

impl GroupFacts {
    /// Whether the group's block `index` is counted by nothing, as far as that is known.
    pub(in crate::engine) fn is_free(&self, geometry: &format::Geometry, index: u32) -> bool {
        self.count(geometry, index as usize) == Some(0)
    }

    fn count(&self, geometry: &format::Geometry, index: usize) -> Option<u32> {
        if self.bad_pages >> (index / COUNTS_PER_PAGE as usize) & 1 == 1 {
            return None;
        }
        let Some(small) = &self.small else {
            let block = index as u64;
            return Some(u32::from(
                block < geometry.layout_blocks(self.group) || block >= geometry.group_blocks(self.group),
            ));
        };
        match small.get(index).copied()? {
            MANY => self.many.get(&index).copied(),
            count => Some(count.into()),
        }
    }
}

/// Reads the space map group by group, calling `each` with what is known of a group.
pub(in crate::engine) async fn read_space<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    faults: &mut Faults,
    mut each: impl FnMut(&mut Faults, Option<GroupFacts>),
) {
    let mut index: Option<GroupIndex> = None;
    for group in 0..superblock.groups_in_use {
        if group.is_multiple_of(GROUPS_PER_INDEX) {
            index = read_index(reader, superblock, group / GROUPS_PER_INDEX, faults).await;
        }
        let entry = index.as_ref().and_then(|index| index.entries.get((group % GROUPS_PER_INDEX) as usize)).copied();
        let facts = match entry {
            Some(entry) => read_group(reader, superblock, group, entry, faults).await,
            None => None,
        };
        each(faults, facts);
    }
}

/// Compares what the space map says of a group with the walk. Where the walk is not `complete`, blocks that it did not reach
/// are not told as faults: what is lost may have held them.
pub(in crate::engine) fn compare(
    geometry: &format::Geometry,
    facts: Option<&GroupFacts>,
    counts: &Counts,
    complete: bool,
    faults: &mut Faults,
    space: &mut Space,
) {
    let Some(facts) = facts else {
        space.damaged = true;
        return;
    };
    let group = facts.group;
    let (start, layout, blocks) =
        (geometry.group_start(group), geometry.layout_blocks(group), geometry.group_blocks(group));
    let mut free = 0;
    for index in 0..GROUP_BLOCKS {
        let block = start.plus(index);
        let Some(recorded) = facts.count(geometry, index as usize).map(u64::from) else { continue };
        let found = u64::from(counts.get(block)) + u64::from(index < layout || index >= blocks);
        free += u64::from(recorded == 0);
        space.used_blocks += u64::from(recorded > 0 && index < blocks);
        if recorded == found {
            continue;
        }
        if !complete && recorded > found {
            space.unaccounted_blocks += 1;
        } else {
            faults.add(Structure::SpaceMapPage, block, Check::Count { recorded, found });
        }
    }
    if let Some(block) = facts.free_with_checksum {
        faults.add(Structure::ChecksumPage, block, FREE_WITH_CHECKSUM);
    }
    space.damaged |= facts.bad_pages != 0;
    let recorded = u64::from(facts.entry.free_blocks);
    if !facts.entry.empty && facts.bad_pages == 0 && recorded != free {
        faults.add(Structure::GroupIndex, facts.index, Check::Total { field: "free_blocks", recorded, found: free });
    }
}

/// What the superblock says of the whole.
pub(in crate::engine) fn compare_total(superblock: &Superblock, slot: Slot, space: &Space, faults: &mut Faults) {
    let (recorded, found) = (superblock.used_blocks, space.used_blocks);
    if !space.damaged && recorded != found {
        let address = SUPERBLOCK_COPIES[slot.index()][0];
        faults.add(Structure::Superblock, address, Check::Total { field: "used_blocks", recorded, found });
    }
}

/// Reads a group-index block.
pub(in crate::engine) async fn read_index<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    number: u64,
    faults: &mut Faults,
) -> Option<GroupIndex> {
    let reference = superblock.group_index.get(number as usize)?;
    let (address, structure) = (superblock.geometry.index_block(number, reference.slot), Structure::GroupIndex);
    let (checksum, place) = (reference.checksum, Place::GroupIndex(number));
    let bytes = reader.verified(&Target { address, mirrored: true, checksum, place, structure }, faults).await?;
    GroupIndex::decode(&bytes).map_err(|check| faults.add(structure, address, check)).ok()
}

/// Reads a group's descriptor; that of an empty group says nothing.
pub(in crate::engine) async fn read_descriptor<S: Storage>(
    reader: &mut Reader<'_, S>,
    group: u64,
    entry: GroupIndexEntry,
    faults: &mut Faults,
) -> Option<GroupDescriptor> {
    if entry.empty {
        return Some(GroupDescriptor::new(group));
    }
    let (address, structure) = (reader.geometry.descriptor_block(group, entry.slot), Structure::GroupDescriptor);
    let (checksum, place) = (entry.checksum, Place::GroupDescriptor(group));
    let bytes = reader.verified(&Target { address, mirrored: true, checksum, place, structure }, faults).await?;
    GroupDescriptor::decode(&bytes, group).map_err(|check| faults.add(structure, address, check)).ok()
}

/// The counts that a page has before anything is in use: only the layout's blocks, and those that do not exist, are taken.
pub(in crate::engine) fn implied(
    geometry: &format::Geometry,
    group: u64,
    page: u32,
) -> [u32; COUNTS_PER_PAGE as usize] {
    let (layout, blocks) = (geometry.layout_blocks(group), geometry.group_blocks(group));
    let first = u64::from(page) * COUNTS_PER_PAGE;
    std::array::from_fn(|index| {
        let block = first + index as u64;
        u32::from(block < layout || block >= blocks)
    })
}

/// Reads a page of counts. None when it is damaged.
pub(in crate::engine) async fn read_counts<S: Storage>(
    reader: &mut Reader<'_, S>,
    descriptor: &GroupDescriptor,
    page: u32,
    faults: &mut Faults,
) -> Option<Box<[u32; COUNTS_PER_PAGE as usize]>> {
    let group = descriptor.group;
    let reference = descriptor.pages.get(page as usize)?;
    if !reference.present {
        return Some(Box::new(implied(&reader.geometry, group, page)));
    }
    let (address, structure) = (reader.geometry.page_block(group, page, reference.slot), Structure::SpaceMapPage);
    let (checksum, place) = (reference.checksum, Place::SpaceMapPage { group, page });
    let bytes = reader.verified(&Target { address, mirrored: false, checksum, place, structure }, faults).await?;
    format::decode_counts(&bytes).map_err(|check| faults.add(structure, address, check)).ok()
}

async fn read_group<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    group: u64,
    entry: GroupIndexEntry,
    faults: &mut Faults,
) -> Option<GroupFacts> {
    let number = group / GROUPS_PER_INDEX;
    let slot = superblock.group_index.get(number as usize)?.slot;
    let index = superblock.geometry.index_block(number, slot);
    let (small, many) = (None, FxHashMap::default());
    let mut facts =
        GroupFacts { group, entry, index, small, many, bad_pages: 0, checksummed: None, free_with_checksum: None };
    if entry.empty {
        return Some(facts);
    }
    let descriptor = read_descriptor(reader, group, entry, faults).await?;
    let mut small = vec![0; GROUP_BLOCKS as usize].into_boxed_slice();
    for (page, small) in small.chunks_mut(COUNTS_PER_PAGE as usize).enumerate() {
        let Some(recorded) = read_counts(reader, &descriptor, page as u32, faults).await else {
            facts.bad_pages |= 1 << page;
            continue;
        };
        for (index, (small, count)) in small.iter_mut().zip(recorded.iter()).enumerate() {
            *small = u8::try_from(*count).unwrap_or(MANY);
            if *small == MANY {
                facts.many.insert(page * COUNTS_PER_PAGE as usize + index, *count);
            }
        }
    }
    facts.small = Some(small);
    if let Some(checksums) = read_checksums(reader, &descriptor, faults).await {
        let geometry = &reader.geometry;
        let mut with_one = (0..GROUP_BLOCKS as usize).filter(|index| checksums.get(*index).is_some());
        facts.free_with_checksum = with_one
            .find(|index| facts.count(geometry, *index) == Some(0) || (*index as u64) < geometry.layout_blocks(group))
            .map(|index| geometry.group_start(group).plus(index as u64));
        facts.checksummed = Some(checksums.checksummed());
    }
    Some(facts)
}

//! The space map, written anew from the counts of a walk into the slots that are not current.

use std::collections::BTreeMap;

use super::Writer;
use crate::engine::Storage;
use crate::engine::inspect::{
    Counts, Faults, GroupChecksums, Reader, implied, read_checksums, read_descriptor, read_index,
};
use crate::error::Result;
use crate::format::{
    self, COUNTS_PER_PAGE, GROUPS_PER_INDEX, Geometry, GroupDescriptor, GroupIndex, GroupIndexEntry, GroupIndexRef,
    PAGES_PER_GROUP, PageRef, Place, Slot, Superblock,
};

/// What of the present space map can be read: it says which slots are current.
#[derive(Default)]
pub(in crate::engine) struct KnownSpace {
    indexes: Vec<GroupIndexRef>,
    groups: BTreeMap<u64, (GroupIndexEntry, Option<GroupDescriptor>)>,
}

impl KnownSpace {
    /// The groups of which something is known.
    pub(in crate::engine) fn groups(&self) -> impl Iterator<Item = u64> + '_ {
        self.groups.keys().copied()
    }
}

/// Reads the checksums of a group, as far as they are good.
pub(in crate::engine) async fn read_group_checksums<S: Storage>(
    reader: &mut Reader<'_, S>,
    known: &KnownSpace,
    group: u64,
    faults: &mut Faults,
) -> Option<GroupChecksums> {
    let (_, descriptor) = known.groups.get(&group)?;
    read_checksums(reader, descriptor.as_ref()?, faults).await
}

/// Reads indexes and descriptors, as far as they are good.
pub(in crate::engine) async fn read_known_space<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    faults: &mut Faults,
) -> KnownSpace {
    let mut known = KnownSpace { indexes: superblock.group_index.clone(), groups: BTreeMap::new() };
    let mut index: Option<GroupIndex> = None;
    for group in 0..superblock.groups_in_use {
        if group.is_multiple_of(GROUPS_PER_INDEX) {
            index = read_index(reader, superblock, group / GROUPS_PER_INDEX, faults).await;
        }
        let entry = index.as_ref().and_then(|index| index.entries.get((group % GROUPS_PER_INDEX) as usize)).copied();
        if let Some(entry) = entry {
            let descriptor = read_descriptor(reader, group, entry, faults).await;
            known.groups.insert(group, (entry, descriptor));
        }
    }
    known
}

/// Writes pages, descriptors and indexes. Blocks that come free lose their checksums; `checksums` says which the others
/// have. Answers what the superblock says of the indexes, and the blocks in use.
pub(in crate::engine) async fn write_space<S: Storage>(
    writer: &mut Writer<'_, S>,
    uuid: &uuid::Uuid,
    geometry: &Geometry,
    groups_in_use: u64,
    known: &KnownSpace,
    counts: &Counts,
    mut checksums: impl AsyncFnMut(u64) -> Option<GroupChecksums>,
) -> Result<(Vec<GroupIndexRef>, u64)> {
    let mut references = Vec::new();
    let mut used = 0;
    for number in 0..groups_in_use.div_ceil(GROUPS_PER_INDEX) {
        let mut index = GroupIndex::new();
        let first = number * GROUPS_PER_INDEX;
        for group in first..groups_in_use.min(first + GROUPS_PER_INDEX) {
            let checksums = checksums(group).await;
            let entry = write_group(writer, uuid, geometry, group, known, counts, checksums).await?;
            used += geometry.group_blocks(group) - u64::from(entry.free_blocks);
            if let Some(place) = index.entries.get_mut((group - first) as usize) {
                *place = entry;
            }
        }
        let slot = known.indexes.get(number as usize).map_or(Slot::A, |known| known.slot.other());
        let bytes = index.encode();
        let checksum = format::checksum(uuid, Place::GroupIndex(number), &bytes[..]);
        writer.put(geometry.index_block(number, slot), true, &bytes[..]).await?;
        references.push(GroupIndexRef { checksum, slot, level: 0 });
    }
    Ok((references, used))
}

async fn write_group<S: Storage>(
    writer: &mut Writer<'_, S>,
    uuid: &uuid::Uuid,
    geometry: &Geometry,
    group: u64,
    known: &KnownSpace,
    counts: &Counts,
    mut checksums: Option<GroupChecksums>,
) -> Result<GroupIndexEntry> {
    let (entry, descriptor) =
        known.groups.get(&group).map_or((None, None), |(entry, known)| (Some(entry), known.clone()));
    let mut descriptor = descriptor.unwrap_or_else(|| GroupDescriptor::new(group));
    let mut free_blocks = 0;
    for page in 0..PAGES_PER_GROUP {
        let start = geometry.group_start(group).plus(u64::from(page) * COUNTS_PER_PAGE);
        let mut numbers = implied(geometry, group, page);
        for (index, number) in numbers.iter_mut().enumerate() {
            *number = number.saturating_add(counts.get(start.plus(index as u64)));
            free_blocks += u32::from(*number == 0);
            if let (0, Some(checksums)) = (*number, &mut checksums) {
                checksums.set(page as usize * COUNTS_PER_PAGE as usize + index, None);
            }
        }
        let Some(reference) = descriptor.pages.get_mut(page as usize) else { continue };
        let slot = if reference.present { reference.slot.other() } else { Slot::A };
        let bytes = format::encode_counts(&numbers);
        let checksum = format::checksum(uuid, Place::SpaceMapPage { group, page }, &bytes[..]);
        *reference = PageRef { checksum, slot, present: true };
        writer.put(geometry.page_block(group, page, slot), false, &bytes[..]).await?;
    }
    for (page, reference) in descriptor.checksum_pages.iter_mut().enumerate() {
        let Some(checksums) = &checksums else {
            *reference = PageRef::ABSENT;
            continue;
        };
        let page = page as u32;
        let slot = if reference.present { reference.slot.other() } else { Slot::A };
        let bytes = format::encode_counts(checksums.page(page));
        let checksum = format::checksum(uuid, Place::ChecksumPage { group, page }, &bytes[..]);
        *reference = PageRef { checksum, slot, present: true };
        writer.put(geometry.checksum_page_block(group, page, slot), false, &bytes[..]).await?;
    }
    let slot = entry.filter(|entry| !entry.empty).map_or(Slot::A, |entry| entry.slot.other());
    let bytes = descriptor.encode();
    let checksum = format::checksum(uuid, Place::GroupDescriptor(group), &bytes[..]);
    writer.put(geometry.descriptor_block(group, slot), true, &bytes[..]).await?;
    Ok(GroupIndexEntry { checksum, slot, empty: false, free_blocks })
}

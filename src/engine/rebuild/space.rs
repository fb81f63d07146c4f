//! The space map, written anew from the counts of a walk into the slots that are not current.

use std::collections::BTreeMap;

use super::Writer;
use crate::engine::Storage;
use crate::engine::inspect::{Counts, Faults, Reader, implied, read_checksum_page, read_descriptor, read_index};
use crate::error::Result;
use crate::format::{
    self, CHECKSUM_PAGES_PER_GROUP, COUNTS_PER_PAGE, GROUPS_PER_INDEX, Geometry, GroupDescriptor, GroupIndex,
    GroupIndexEntry, GroupIndexRef, PAGES_PER_GROUP, PageRef, Place, Slot, Superblock,
};

/// Of the page that says which blocks have a checksum, the bits for one page of these.
const BYTES_OF_BITS: usize = COUNTS_PER_PAGE as usize / 8;

/// What of the present space map can be read: it says which slots are current.
#[derive(Default)]
pub(in crate::engine) struct KnownSpace {
    indexes: Vec<GroupIndexRef>,
    groups: BTreeMap<u64, (GroupIndexEntry, Option<GroupDescriptor>)>,
    /// Of groups with damaged pages of data checksums, the page that says which blocks have one, without those of the pages.
    has_sum: BTreeMap<u64, Vec<u8>>,
}

/// Reads indexes and descriptors, as far as they are good.
pub(in crate::engine) async fn read_known_space<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
) -> KnownSpace {
    let mut known = KnownSpace { indexes: superblock.group_index.clone(), ..KnownSpace::default() };
    let mut faults = Faults::default();
    let mut index: Option<GroupIndex> = None;
    for group in 0..superblock.groups_in_use {
        if group.is_multiple_of(GROUPS_PER_INDEX) {
            index = read_index(reader, superblock, group / GROUPS_PER_INDEX, &mut faults).await;
        }
        let entry = index.as_ref().and_then(|index| index.entries.get((group % GROUPS_PER_INDEX) as usize)).copied();
        if let Some(entry) = entry {
            let mut descriptor = read_descriptor(reader, group, entry, &mut faults).await;
            if let Some(descriptor) = &mut descriptor {
                let has_sum = drop_bad_sums(reader, descriptor).await;
                known.has_sum.extend(has_sum.map(|page| (group, page)));
            }
            known.groups.insert(group, (entry, descriptor));
        }
    }
    known
}

/// Forgets data checksums whose pages are damaged. Answers the page that says which blocks have one, where that changes.
async fn drop_bad_sums<S: Storage>(reader: &mut Reader<'_, S>, descriptor: &mut GroupDescriptor) -> Option<Vec<u8>> {
    let mut bad = Vec::new();
    let mut has_sum = None;
    for page in 0..CHECKSUM_PAGES_PER_GROUP {
        let read = read_checksum_page(reader, descriptor, page, &mut Faults::default()).await;
        match read {
            Some(Ok(bytes)) if page == PAGES_PER_GROUP => has_sum = Some(bytes),
            Some(Err(())) => bad.push(page),
            _ => {}
        }
    }
    let mut has_sum = has_sum.filter(|_| !bad.is_empty());
    if has_sum.is_none() && !bad.is_empty() {
        // Nobody knows which blocks have one.
        descriptor.checksum_pages = GroupDescriptor::new(descriptor.group).checksum_pages;
    }
    for page in bad {
        let bits = page as usize * BYTES_OF_BITS..(page as usize + 1) * BYTES_OF_BITS;
        if let Some(place) = descriptor.checksum_pages.get_mut(page as usize) {
            *place = PageRef::ABSENT;
        }
        if let Some(bits) = has_sum.as_mut().and_then(|bytes| bytes.get_mut(bits)) {
            bits.fill(0);
        }
    }
    has_sum
}

/// Writes pages, descriptors and indexes. Answers what the superblock says of the indexes, and the blocks in use.
pub(in crate::engine) async fn write_space<S: Storage>(
    writer: &mut Writer<'_, S>,
    uuid: &uuid::Uuid,
    geometry: &Geometry,
    groups_in_use: u64,
    known: &KnownSpace,
    counts: &Counts,
) -> Result<(Vec<GroupIndexRef>, u64)> {
    let mut references = Vec::new();
    let mut used = 0;
    for number in 0..groups_in_use.div_ceil(GROUPS_PER_INDEX) {
        let mut index = GroupIndex::new();
        let first = number * GROUPS_PER_INDEX;
        for group in first..groups_in_use.min(first + GROUPS_PER_INDEX) {
            let entry = write_group(writer, uuid, geometry, group, known, counts).await?;
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
        }
        let Some(reference) = descriptor.pages.get_mut(page as usize) else { continue };
        let slot = if reference.present { reference.slot.other() } else { Slot::A };
        let bytes = format::encode_counts(&numbers);
        let checksum = format::checksum(uuid, Place::SpaceMapPage { group, page }, &bytes[..]);
        *reference = PageRef { checksum, slot, present: true };
        writer.put(geometry.page_block(group, page, slot), false, &bytes[..]).await?;
    }
    if let (Some(bytes), Some(reference)) =
        (known.has_sum.get(&group), descriptor.checksum_pages.get_mut(PAGES_PER_GROUP as usize))
    {
        let slot = reference.slot.other();
        let checksum = format::checksum(uuid, Place::ChecksumPage { group, page: PAGES_PER_GROUP }, bytes);
        *reference = PageRef { checksum, slot, present: true };
        writer.put(geometry.checksum_page_block(group, PAGES_PER_GROUP, slot), false, bytes).await?;
    }
    let slot = entry.filter(|entry| !entry.empty).map_or(Slot::A, |entry| entry.slot.other());
    let bytes = descriptor.encode();
    let checksum = format::checksum(uuid, Place::GroupDescriptor(group), &bytes[..]);
    writer.put(geometry.descriptor_block(group, slot), true, &bytes[..]).await?;
    Ok(GroupIndexEntry { checksum, slot, empty: false, free_blocks })
}

//! Checksums of data: which blocks have one, and what they are.

use rustc_hash::FxHashMap;

use super::fault::Faults;
use super::reader::{Reader, Target};
use super::space::{GroupFacts, read_descriptor, read_index};
use super::walk::{Visited, Visitor};
use crate::engine::Storage;
use crate::error::{Check, Result, Structure};
use crate::format::{
    self, COUNTS_PER_PAGE, ENTRIES_PER_NODE, EntryKind, GROUPS_PER_INDEX, Geometry, GroupDescriptor, HAS_CHECKSUM_PAGE,
    Place, Superblock, has_checksum, set_has_checksum,
};
use crate::units::PoolBlock;

const PER_PAGE: usize = COUNTS_PER_PAGE as usize;

/// 1024 numbers.
type Page = Box<[u32; PER_PAGE]>;

/// The checksums of a group's blocks, as far as they can be read.
#[derive(Clone)]
pub(in crate::engine) struct GroupChecksums {
    has_one: Page,
    sums: Vec<Page>,
    /// Pages of checksums that cannot be read, or that nobody knows which of their numbers mean something.
    lost_pages: u32,
}

impl GroupChecksums {
    /// None for any block.
    pub(in crate::engine) fn none() -> Self {
        let page = Box::new([0; PER_PAGE]);
        Self { has_one: page.clone(), sums: vec![page; HAS_CHECKSUM_PAGE as usize], lost_pages: 0 }
    }

    /// The checksum of the group's block `index`.
    pub(in crate::engine) fn get(&self, index: usize) -> Option<u32> {
        let sums = self.sums.get(index / PER_PAGE)?;
        has_checksum(&self.has_one, index).then(|| sums[index % PER_PAGE])
    }

    /// Sets that of block `index`, or takes it away.
    pub(in crate::engine) fn set(&mut self, index: usize, checksum: Option<u32>) {
        let Some(sums) = self.sums.get_mut(index / PER_PAGE) else { return };
        set_has_checksum(&mut self.has_one, index, checksum.is_some());
        sums[index % PER_PAGE] = checksum.unwrap_or(0);
    }

    /// Which blocks have one.
    pub(super) fn checksummed(self) -> GroupChecksummed {
        (self.has_one, self.lost_pages)
    }

    /// Page `page` as it stands on disk: 32 of checksums, then one of "has one" bits.
    pub(in crate::engine) fn page(&self, page: u32) -> &[u32; PER_PAGE] {
        self.sums.get(page as usize).unwrap_or(&self.has_one)
    }
}

/// Reads the checksums of a group; none where it has none. What cannot be read is a fault, and its blocks have none.
pub(in crate::engine) async fn read_checksums<S: Storage>(
    reader: &mut Reader<'_, S>,
    descriptor: &GroupDescriptor,
    faults: &mut Faults,
) -> Option<GroupChecksums> {
    if descriptor.checksum_pages.iter().all(|reference| !reference.present) {
        return None;
    }
    let mut found = GroupChecksums::none();
    match read_page(reader, descriptor, HAS_CHECKSUM_PAGE, faults).await {
        Some(page) => found.has_one = page,
        None => {
            found.lost_pages = u32::MAX;
            return Some(found);
        }
    }
    for page in 0..HAS_CHECKSUM_PAGE {
        let base = page as usize * PER_PAGE;
        let Some(mut sums) = read_page(reader, descriptor, page, faults).await else {
            found.has_one[base / 32..(base + PER_PAGE) / 32].fill(0);
            found.lost_pages |= 1 << page;
            continue;
        };
        let has_one = |index: usize| has_checksum(&found.has_one, base + index);
        if let Some(index) = (0..PER_PAGE).find(|index| sums[*index] != 0 && !has_one(*index)) {
            let block = reader.geometry.group_start(descriptor.group).plus((base + index) as u64);
            faults.add(Structure::ChecksumPage, block, WITHOUT_BIT);
            // Repair writes what is left here.
            for index in (0..PER_PAGE).filter(|index| !has_one(*index)) {
                sums[index] = 0;
            }
        }
        if let Some(place) = found.sums.get_mut(page as usize) {
            *place = sums;
        }
    }
    Some(found)
}

async fn read_page<S: Storage>(
    reader: &mut Reader<'_, S>,
    descriptor: &GroupDescriptor,
    page: u32,
    faults: &mut Faults,
) -> Option<Page> {
    let reference = descriptor.checksum_pages.get(page as usize)?;
    if !reference.present {
        return Some(Box::new([0; PER_PAGE]));
    }
    let group = descriptor.group;
    let (address, structure) =
        (reader.geometry.checksum_page_block(group, page, reference.slot), Structure::ChecksumPage);
    let (checksum, place) = (reference.checksum, Place::ChecksumPage { group, page });
    let bytes = reader.verified(&Target { address, mirrored: false, checksum, place, structure }, faults).await?;
    format::decode_counts(&bytes).map_err(|check| faults.add(structure, address, check)).ok()
}

/// Which blocks of a group have a checksum: a bit for each, and which pages of checksums are lost.
pub(super) type GroupChecksummed = (Page, u32);

/// Which blocks have a checksum, by the groups where any has. None for a group of which nothing is known.
#[derive(Default)]
pub(in crate::engine) struct Checksummed(FxHashMap<u64, Option<GroupChecksummed>>);

/// What is known of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Has {
    /// It has a checksum.
    One,
    /// It has none.
    None,
    /// What would say so is damaged.
    Lost,
}

impl Checksummed {
    /// Takes them from what was read of the space map, group by group.
    pub(in crate::engine) fn take(groups: &mut [Option<GroupFacts>]) -> Self {
        let taken = groups.iter_mut().zip(0..).filter_map(|(facts, group)| match facts {
            None => Some((group, None)),
            Some(facts) => facts.checksummed.take().map(|known| (group, Some(known))),
        });
        Self(taken.collect())
    }

    /// Reads them for all groups, as far as that is possible; what is damaged is told by who reads the space map.
    pub(in crate::engine) async fn read<S: Storage>(reader: &mut Reader<'_, S>, superblock: &Superblock) -> Self {
        let (mut known, mut index) = (Self::default(), None);
        let mut told = Faults::default();
        for group in 0..superblock.groups_in_use {
            if group.is_multiple_of(GROUPS_PER_INDEX) {
                index = read_index(reader, superblock, group / GROUPS_PER_INDEX, &mut told).await;
            }
            let place = (group % GROUPS_PER_INDEX) as usize;
            let entry = index.as_ref().and_then(|index| index.entries.get(place)).copied();
            let descriptor = match entry {
                Some(entry) => read_descriptor(reader, group, entry, &mut told).await,
                None => None,
            };
            let Some(descriptor) = descriptor else {
                known.0.insert(group, None);
                continue;
            };
            if let Some(found) = read_checksums(reader, &descriptor, &mut told).await {
                known.0.insert(group, Some(found.checksummed()));
            }
        }
        known
    }

    fn has(&self, geometry: &Geometry, block: PoolBlock) -> Has {
        let Some((group, index)) = geometry.group_of(block) else { return Has::None };
        match self.0.get(&group) {
            None => Has::None,
            Some(None) => Has::Lost,
            Some(Some((_, lost))) if lost >> (index / COUNTS_PER_PAGE as u32) & 1 == 1 => Has::Lost,
            Some(Some((bits, _))) if has_checksum(bits, index as usize) => Has::One,
            Some(Some(_)) => Has::None,
        }
    }
}

/// Looks for a block without a checksum in what is sealed, and passes everything on.
pub(in crate::engine) struct Sealed<'a, V: Visitor> {
    pub(in crate::engine) geometry: Geometry,
    pub(in crate::engine) known: &'a Checksummed,
    pub(in crate::engine) inner: &'a mut V,
    /// The first that was found.
    pub(in crate::engine) without: Option<PoolBlock>,
    /// Whether there are blocks of which that is not known.
    pub(in crate::engine) lost: bool,
}

impl<V: Visitor> Visitor for Sealed<'_, V> {
    fn node(&mut self, visited: &Visited) -> Result<()> {
        for index in (0..ENTRIES_PER_NODE).filter(|_| visited.level == 0) {
            let entry = visited.node.entry(index);
            // What is lost is told as that.
            if entry.kind == EntryKind::Block && !visited.lost.contains(index) {
                match self.known.has(&self.geometry, entry.address) {
                    Has::One => {}
                    Has::None => self.without = self.without.or(Some(entry.address)),
                    Has::Lost => self.lost = true,
                }
            }
        }
        self.inner.node(visited)
    }

    fn progress(&mut self, blocks: u64) {
        self.inner.progress(blocks);
    }
}

pub(in crate::engine) const WITHOUT_CHECKSUM: Check =
    Check::Inconsistent("a block of a sealed snapshot has no checksum");
pub(in crate::engine) const FREE_WITH_CHECKSUM: Check = Check::Inconsistent("a free block has a checksum");
const WITHOUT_BIT: Check = Check::Inconsistent("a block that has no checksum has a number in place of one");

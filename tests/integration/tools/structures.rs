//! A reader of the sample's structures of its own, for making damage: every live block of metadata, and the sums to be made
//! right again above a block that was changed on purpose.

use std::collections::BTreeMap;

use plywood::error::{Check, Structure};
use plywood::format::{
    self, BATCH_BLOCKS_MAX, Carcass, Entry, EntryKind, GROUPS_PER_INDEX, GroupDescriptor, GroupIndex, JOURNAL_FIRST,
    Node, Place, Root, SUPERBLOCK_COPIES, Superblock, VolumeRecord,
};
use plywood::io::MemoryImage;
use plywood::units::{PoolBlock, VirtualBlock, VolumeId};

use super::sample::{POOL, check, sample};

/// A live block: what it is, and how many of its bytes mean something.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub block: u64,
    pub place: Option<Place>,
    pub used_bytes: usize,
}

pub fn read(image: &MemoryImage, block: PoolBlock) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    image.read(block.offset_bytes(), &mut bytes);
    bytes
}

/// The newest superblock and its two copies.
pub fn superblock(image: &MemoryImage) -> (Superblock, [PoolBlock; 2]) {
    let decoded =
        SUPERBLOCK_COPIES.map(|slot| Superblock::decode(&read(image, slot[0])).ok().map(|found| (found, slot)));
    decoded.into_iter().flatten().max_by_key(|(found, _)| found.generation).expect("a superblock")
}

/// Every live block with what points at it.
struct Live<'a> {
    image: &'a MemoryImage,
    blocks: BTreeMap<u64, Option<Place>>,
}

impl Live<'_> {
    fn add(&mut self, address: PoolBlock, mirrored: bool, place: Place) {
        for copy in 0..=u64::from(mirrored) {
            self.blocks.insert(address.0 + copy, Some(place));
        }
    }

    fn table(&mut self, root: Root, base: u64, pool_blocks: u64) -> Vec<(u64, Entry)> {
        let mut leaves = Vec::new();
        let mut waiting = vec![(root.entry, root.level, 0)];
        while let Some((entry, level, first)) = waiting.pop() {
            if entry.kind != EntryKind::Node {
                continue;
            }
            self.add(entry.address, entry.mirrored, Place::TableNode { level, first: base + first });
            let node = Node::decode_table(&read(self.image, entry.address), level, pool_blocks).unwrap();
            for index in 0..256 {
                let at = first + ((index as u64) << (8 * level));
                match (node.entry(index).kind, level) {
                    (EntryKind::Hole, _) => {}
                    (_, 0) => leaves.push((at, node.entry(index))),
                    _ => waiting.push((node.entry(index), level - 1, at)),
                }
            }
        }
        leaves
    }

    fn tree(&mut self, entry: Entry, level: u8, first: u64, eaten: u64, pool_blocks: u64) {
        let mut waiting = vec![(entry, level, first)];
        while let Some((entry, level, first)) = waiting.pop() {
            if entry.kind != EntryKind::Node || self.blocks.contains_key(&entry.address.0) {
                continue;
            }
            self.add(entry.address, entry.mirrored, Place::Node { level, first: VirtualBlock(first) });
            let node = Node::decode(&read(self.image, entry.address), level, pool_blocks).unwrap();
            for index in (0..256).filter(|_| level > 0) {
                let at = first + ((index as u64) << (8 * level));
                if at + (1 << (8 * level)) > eaten {
                    waiting.push((node.entry(index), level - 1, at));
                }
            }
        }
    }
}

/// The volumes of the pool as the checkpoint has them, with the entries of their records.
pub fn records(image: &MemoryImage) -> Vec<(Entry, VolumeRecord)> {
    let (superblock, _) = superblock(image);
    let mut live = Live { image, blocks: BTreeMap::new() };
    let mut leaves = live.table(superblock.volume_table, 0, superblock.geometry.pool_blocks);
    leaves.sort_by_key(|(number, _)| *number);
    leaves.into_iter().map(|(_, entry)| (entry, VolumeRecord::decode(&read(image, entry.address)).unwrap())).collect()
}

pub fn carcasses(image: &MemoryImage) -> Vec<(Entry, Vec<Carcass>)> {
    let (superblock, _) = superblock(image);
    let mut live = Live { image, blocks: BTreeMap::new() };
    let pool_blocks = superblock.geometry.pool_blocks;
    let pages = live.table(superblock.carcass_table, 1 << 62, pool_blocks);
    pages
        .into_iter()
        .map(|(_, entry)| (entry, format::decode_carcasses(&read(image, entry.address), pool_blocks).unwrap()))
        .collect()
}

/// Every block of metadata that the newest superblock leads to, the journal's batches too.
pub fn live_blocks(image: &MemoryImage) -> Vec<Block> {
    let (superblock, copies) = superblock(image);
    let pool_blocks = superblock.geometry.pool_blocks;
    let mut live = Live { image, blocks: BTreeMap::new() };
    for copy in copies {
        live.blocks.insert(copy.0, None);
    }
    for (number, entry) in live.table(superblock.volume_table, 0, pool_blocks) {
        live.add(entry.address, entry.mirrored, Place::VolumeRecord(VolumeId(number)));
    }
    for (_, record) in records(image) {
        live.tree(record.root.entry, record.root.level, 0, 0, pool_blocks);
        for (index, block) in record.attributes.iter().enumerate() {
            live.add(block.address, false, Place::Attributes { volume: record.id, index: index as u32 });
        }
    }
    for (number, entry) in live.table(superblock.carcass_table, 1 << 62, pool_blocks) {
        live.add(entry.address, entry.mirrored, Place::CarcassPage(number));
    }
    for (_, carcasses) in carcasses(image) {
        for carcass in carcasses {
            let eaten = carcass.first.0 + carcass.cursor;
            live.tree(carcass.entry, carcass.level, carcass.first.0, eaten, pool_blocks);
        }
    }
    for (number, reference) in superblock.group_index.iter().enumerate() {
        let address = superblock.geometry.index_block(number as u64, reference.slot);
        live.add(address, true, Place::GroupIndex(number as u64));
        let index = GroupIndex::decode(&read(image, address)).unwrap();
        for group in number as u64 * GROUPS_PER_INDEX..superblock.groups_in_use {
            let entry = index.entries[(group % GROUPS_PER_INDEX) as usize];
            if entry.empty {
                continue;
            }
            let address = superblock.geometry.descriptor_block(group, entry.slot);
            live.add(address, true, Place::GroupDescriptor(group));
            let descriptor = GroupDescriptor::decode(&read(image, address), group).unwrap();
            for (page, reference) in descriptor.pages.iter().enumerate().filter(|(_, page)| page.present) {
                let page = page as u32;
                let address = superblock.geometry.page_block(group, page, reference.slot);
                live.add(address, false, Place::SpaceMapPage { group, page });
            }
            for (page, reference) in descriptor.checksum_pages.iter().enumerate().filter(|(_, page)| page.present) {
                let page = page as u32;
                let address = superblock.geometry.checksum_page_block(group, page, reference.slot);
                live.add(address, false, Place::ChecksumPage { group, page });
            }
        }
    }
    let mut blocks: Vec<Block> =
        live.blocks.into_iter().map(|(block, place)| Block { block, place, used_bytes: 4096 }).collect();
    let mut at = superblock.journal_append;
    while let Some(header) = format::decode_batch_header(&POOL, &read(image, JOURNAL_FIRST.plus(at))) {
        assert!(header.blocks <= BATCH_BLOCKS_MAX as u64);
        for block in at..at + header.blocks {
            blocks.push(Block { block: JOURNAL_FIRST.0 + block, place: None, used_bytes: 4096 });
        }
        at += header.blocks;
    }
    blocks
}

/// Changes a node of the volume "one" (its root, or a leaf) with `edit` and makes every sum above it right again, as damage in
/// memory before a checkpoint would.
fn edit_one(image: &MemoryImage, level: u8, edit: impl Fn(&mut Node)) -> MemoryImage {
    let mut edited = image.clone();
    let (mut superblock, copies) = superblock(image);
    let (record_entry, mut record) =
        records(image).into_iter().find(|(_, record)| record.name == "one").expect("the volume");
    let pool_blocks = superblock.geometry.pool_blocks;
    let root = record.root;
    assert_eq!(root.level, 1);
    let mut top = Node::decode(&read(image, root.entry.address), 1, pool_blocks).unwrap();
    let mut put = |entry: Entry, place: Place, bytes: &[u8]| {
        for copy in 0..=u64::from(entry.mirrored) {
            edited.write((entry.address.0 + copy) * 4096, bytes);
        }
        Entry { checksum: format::checksum(&POOL, place, bytes), ..entry }
    };
    if level == 0 {
        let child = top.entry(0);
        let mut leaf = Node::decode(&read(image, child.address), 0, pool_blocks).unwrap();
        edit(&mut leaf);
        let child = put(child, Place::Node { level: 0, first: VirtualBlock(0) }, leaf.bytes());
        top.set(0, child);
    } else {
        edit(&mut top);
    }
    record.root.entry = put(root.entry, Place::Node { level: 1, first: VirtualBlock(0) }, top.bytes());
    let entry = put(record_entry, Place::VolumeRecord(record.id), &record.encode());
    let table = superblock.volume_table;
    assert_eq!(table.level, 0);
    let mut leaf = Node::decode_table(&read(image, table.entry.address), 0, pool_blocks).unwrap();
    leaf.set(record.id.0 as usize, entry);
    superblock.volume_table.entry = put(table.entry, Place::TableNode { level: 0, first: 0 }, leaf.bytes());
    for copy in copies {
        edited.write(copy.offset_bytes(), &superblock.encode());
    }
    edited
}

/// What a check finds, as structure and check, without repetitions.
#[track_caller]
fn found(image: &MemoryImage) -> Vec<(Structure, Check)> {
    let mut found: Vec<(Structure, Check)> = Vec::new();
    for fault in check(image).unwrap().faults {
        let of = (fault.found.structure, fault.found.check);
        if !found.contains(&of) {
            found.push(of);
        }
    }
    found
}

#[test]
fn each_structure_is_named_where_its_bit_flips() {
    let image = sample();
    let mut met = BTreeMap::<Structure, u32>::new();
    for Block { block, place, .. } in live_blocks(&image) {
        let report = check(&super::damage::flip(&image, block, 8 * 2000 + 3)).unwrap();
        let expected = match place {
            Some(Place::Node { .. } | Place::TableNode { .. }) => Structure::Node,
            Some(Place::VolumeRecord(_)) => Structure::VolumeRecord,
            Some(Place::Attributes { .. }) => Structure::Attributes,
            Some(Place::CarcassPage(_)) => Structure::CarcassPage,
            Some(Place::GroupIndex(_)) => Structure::GroupIndex,
            Some(Place::GroupDescriptor(_)) => Structure::GroupDescriptor,
            Some(Place::SpaceMapPage { .. }) => Structure::SpaceMapPage,
            Some(Place::ChecksumPage { .. }) => Structure::ChecksumPage,
            None if block < JOURNAL_FIRST.0 => Structure::Superblock,
            None => Structure::Batch,
        };
        let fault = report.faults.first().unwrap_or_else(|| panic!("block {block}, {place:?}: nothing found"));
        assert_eq!(fault.found.structure, expected, "block {block}: {fault}");
        if expected != Structure::Batch {
            assert_eq!(fault.found.address, PoolBlock(block), "{fault}");
            assert!(matches!(fault.found.check, Check::Checksum { .. }), "{fault}");
        }
        // One flipped bit is one fault, where it does not cut off the journal's changes.
        assert!(
            report.fault_count == 1 || expected == Structure::VolumeRecord || expected == Structure::Batch,
            "{:#?}",
            report.faults
        );
        *met.entry(expected).or_default() += 1;
    }
    for structure in [
        Structure::Superblock,
        Structure::GroupIndex,
        Structure::GroupDescriptor,
        Structure::SpaceMapPage,
        Structure::ChecksumPage,
        Structure::Node,
        Structure::VolumeRecord,
        Structure::Attributes,
        Structure::CarcassPage,
        Structure::Batch,
    ] {
        assert!(met.contains_key(&structure), "no {structure} is in the sample: {met:?}");
    }
}

#[test]
fn damaged_leaf_touches_the_volumes_that_share_it_and_no_others() {
    let image = sample();
    let records = records(&image);
    let (_, low) = records.iter().find(|(_, record)| record.name == "low").unwrap();
    let mut broken = image.clone();
    broken.write(low.root.entry.address.offset_bytes(), &[9; 100]);
    let report = check(&broken).unwrap();
    let [fault] = &report.faults[..] else { panic!("{:#?}", report.faults) };
    let names: Vec<&str> = fault.touched.iter().map(|touched| touched.name.as_str()).collect();
    assert_eq!(names, ["low", "low-kept"]);
    assert!(fault.touched.iter().all(|touched| touched.ranges.len() == 1 && touched.ranges[0].length_bytes == 1 << 20));
    assert_eq!(report.unaccounted_blocks, 256, "what only the leaf knew of");
}

#[test]
fn pair_with_one_bad_copy_has_lost_nothing() {
    let image = sample();
    let records = records(&image);
    let (entry, record) = records.iter().find(|(_, record)| record.name == "one").unwrap();
    assert!(entry.mirrored && record.root.entry.mirrored);
    for at in [record.root.entry.address, record.root.entry.address.plus(1)] {
        let mut broken = image.clone();
        broken.write(at.offset_bytes() + 5, &[0xaa; 9]);
        let report = check(&broken).unwrap();
        assert_eq!(report.fault_count, 1);
        assert!(report.faults[0].has_copy && report.faults[0].found.address == at, "{:?}", report.faults);
        let (repaired, repair) = super::damage::repair(&broken);
        assert_eq!((repair.copies_rewritten, repair.lost.len()), (1, 0));
        assert_eq!(super::sample::contents(&repaired), super::sample::contents(&image));
    }
}

#[test]
fn wrong_counts_are_told_with_both_numbers() {
    let image = sample();
    // One mapping of a block that nobody counts, and one block less than is counted.
    let edited = edit_one(&image, 0, |leaf| {
        let entry = leaf.entry(0);
        leaf.set(0, Entry::block(entry.address.plus(7000), entry.birth));
    });
    let found = found(&edited);
    assert!(found.contains(&(Structure::SpaceMapPage, Check::Count { recorded: 0, found: 1 })), "{found:?}");
    assert!(
        found.iter().any(|(_, check)| matches!(check, Check::Count { recorded, found } if recorded > found)),
        "{found:?}"
    );
    let (repaired, report) = super::damage::repair(&edited);
    super::sample::assert_sound(&repaired);
    assert!(report.lost.is_empty());
}

#[test]
fn mappings_to_what_is_no_data_are_told_and_cut_off() {
    let image = sample();
    let (superblock, _) = superblock(&image);
    let layout = superblock.geometry.descriptor_block(0, format::Slot::A);
    for (address, expected) in [
        (PoolBlock(3), Check::OutOfBounds { field: "address", value: 3 }),
        (layout, Check::OutOfBounds { field: "address", value: layout.0 }),
        (records(&image)[0].0.address, Check::Inconsistent("it is both data and metadata")),
    ] {
        let edited = edit_one(&image, 0, |leaf| leaf.set(0, Entry::block(address, leaf.entry(0).birth)));
        let found = found(&edited);
        assert!(found.contains(&(Structure::Data, expected.clone())), "{found:?}");
        let (repaired, report) = super::damage::repair(&edited);
        super::sample::assert_sound(&repaired);
        assert!(report.lost.iter().any(|lost| lost.name == "one"), "{report:?}");
    }
}

#[test]
fn births_and_accounts_are_held_against_the_tree() {
    let image = sample();
    let late = edit_one(&image, 0, |leaf| {
        let entry = leaf.entry(0);
        leaf.set(0, Entry { birth: plywood::units::Clock(entry.birth.0 + 1000), ..entry });
    });
    let found_late = found(&late);
    let expected = (Structure::Data, Check::Inconsistent("it was born later than the node above it"));
    assert!(found_late.contains(&expected), "{found_late:?}");
    let (settled, ()) = super::sample::with_pool(image, true, async |pool| pool.settle().await.unwrap());
    let fewer = edit_one(&settled, 0, |leaf| leaf.set(0, Entry::hole(leaf.entry(0).birth)));
    let found = found(&fewer);
    let is_account = |check: &Check| matches!(check, Check::Total { field: "mapped_blocks", .. });
    assert!(
        found.iter().any(|(structure, check)| *structure == Structure::VolumeRecord && is_account(check)),
        "{found:?}"
    );
}

#[test]
fn node_in_a_wrong_place_is_found_though_it_is_whole() {
    let image = sample();
    // The entry for the second MiB points at the leaf of the first, as it stands there.
    let edited = edit_one(&image, 1, |root| root.set(1, root.entry(0)));
    let found = found(&edited);
    let expected = (Structure::Node, Check::Inconsistent("an entry that points at it says that it is another node"));
    assert!(found.contains(&expected), "{found:?}");
    super::sample::assert_sound(&super::damage::repair(&edited).0);
}

//! Faults of the space map: group indexes, descriptors, pages of counts and of checksums.

use std::collections::BTreeSet;
use std::io;

use plywood::error::Check::{self, Count, Magic, OutOfBounds, Reserved, Total, Undefined};
use plywood::error::Structure::{ChecksumPage, GroupDescriptor, GroupIndex, SpaceMapPage};
use plywood::format::{EntryKind, Place, Slot};
use plywood::units::PoolBlock;

use super::anatomy::{Anatomy, invalid};
use super::tables::put;
use super::{Fault, Made, fault, undecodable, wrong_copy, wrong_sum};

pub const FAULTS: &[Fault] = &[
    fault("group-index-checksum", GroupIndex, "Checksum", |pool| {
        let block = index(pool)?;
        wrong_sum(pool, GroupIndex, block)
    }),
    fault("group-index-checksum-copy", GroupIndex, "Checksum", |pool| {
        let block = index(pool)?;
        wrong_copy(pool, GroupIndex, block)
    }),
    fault("group-index-reserved", GroupIndex, "Reserved", |pool| {
        of_index(pool, Reserved("group.reserved"), |bytes| bytes[7] = 1)
    }),
    fault("group-index-out-of-bounds", GroupIndex, "OutOfBounds", |pool| {
        of_index(pool, OutOfBounds { field: "group.free_blocks", value: 65535 }, |bytes| put(bytes, 4, 65535, 2))
    }),
    fault("group-index-undefined", GroupIndex, "Undefined", |pool| {
        of_index(pool, Undefined { field: "group.flags", value: 0x80 }, |bytes| bytes[6] = 0x80)
    }),
    fault("group-index-total", GroupIndex, "Total", |pool| {
        let block = index(pool)?;
        let bytes = pool.block(block)?;
        let at = (0..512).find(|at| bytes[8 * at + 6] & 2 == 0).ok_or_else(|| invalid("every group is empty"))?;
        let found = u64::from(u16::from_le_bytes([bytes[8 * at + 4], bytes[8 * at + 5]]));
        pool.change(block, |bytes| put(bytes, 8 * at + 4, found - 1, 2))?;
        Ok(Made::one(GroupIndex, block, Total { field: "free_blocks", recorded: found - 1, found }))
    }),
    fault("group-descriptor-checksum", GroupDescriptor, "Checksum", |pool| {
        let block = descriptor(pool)?;
        wrong_sum(pool, GroupDescriptor, block)
    }),
    fault("group-descriptor-checksum-copy", GroupDescriptor, "Checksum", |pool| {
        let block = descriptor(pool)?;
        wrong_copy(pool, GroupDescriptor, block.plus(1))
    }),
    fault("group-descriptor-magic", GroupDescriptor, "Magic", |pool| of_descriptor(pool, Magic, |bytes| bytes[0] = 0)),
    fault("group-descriptor-reserved", GroupDescriptor, "Reserved", |pool| {
        of_descriptor(pool, Reserved("reserved_head"), |bytes| bytes[20] = 1)
    }),
    fault("group-descriptor-out-of-bounds", GroupDescriptor, "OutOfBounds", |pool| {
        of_descriptor(pool, OutOfBounds { field: "group", value: 999 }, |bytes| put(bytes, 8, 999, 8))
    }),
    fault("group-descriptor-undefined", GroupDescriptor, "Undefined", |pool| {
        of_descriptor(pool, Undefined { field: "page.flags", value: 0x40 }, |bytes| bytes[68] = 0x40)
    }),
    fault("space-map-page-checksum", SpaceMapPage, "Checksum", |pool| {
        let page = pool.first(|place| matches!(place, Place::SpaceMapPage { .. }))?;
        wrong_sum(pool, SpaceMapPage, page)
    }),
    fault("space-map-page-count", SpaceMapPage, "Count", |pool| {
        let leaf = pool.first(|place| matches!(place, Place::Node { level: 0, .. }))?;
        let node = pool.node(leaf, 0)?;
        let entries = (0..256).map(|index| node.entry(index));
        let block = entries.into_iter().find(|entry| entry.kind == EntryKind::Block);
        let block = block.ok_or_else(|| invalid("the first leaf maps nothing"))?.address;
        let (page, offset, count) = pool.count(block)?;
        let names = pool.mapped_by(block)?;
        pool.change(page, |bytes| put(bytes, offset, u64::from(count) + 1, 4))?;
        let check = Count { recorded: u64::from(count) + 1, found: count.into() };
        Ok(Made::one(SpaceMapPage, block, check).touching(names))
    }),
    fault("checksum-page-checksum", ChecksumPage, "Checksum", |pool| {
        if let Ok(page) = pool.first(|place| matches!(place, Place::ChecksumPage { .. })) {
            return wrong_sum(pool, ChecksumPage, page);
        }
        // There is none yet: one that nobody has written is said to be there.
        let descriptor = descriptor(pool)?;
        let Some(Place::GroupDescriptor(group)) = pool.parts.get(&descriptor).map(|part| part.place) else {
            return Err(invalid("no descriptor"));
        };
        pool.change(descriptor, |bytes| {
            put(bytes, 320, 0x1234, 4);
            bytes[324] = 2;
        })?;
        let page = pool.superblock.geometry.checksum_page_block(group, 0, Slot::A);
        let place = Place::ChecksumPage { group, page: 0 };
        let found = plywood::format::checksum(&pool.superblock.uuid, place, &pool.block(page)?);
        Ok(Made::one(ChecksumPage, page, Check::Checksum { expected: 0x1234, found }))
    }),
    fault("checksum-page-inconsistent-number", ChecksumPage, "Inconsistent", |pool| {
        let (page, block, index) = without_checksum(pool, |_| true)?;
        pool.change(page, |bytes| put(bytes, index as usize % 1024 * 4, 0x1234, 4))?;
        let check = Check::Inconsistent("a block that has no checksum has a number in place of one");
        Ok(Made::one(ChecksumPage, block, check))
    }),
    fault("checksum-page-inconsistent-free", ChecksumPage, "Inconsistent", |pool| {
        let (_, block, index) = without_checksum(pool, |count| count == 0)?;
        let bits = bits(pool, block)?;
        pool.change(bits, |bytes| bytes[index as usize / 8] |= 1 << (index % 8))?;
        Ok(Made::one(ChecksumPage, block, Check::Inconsistent("a free block has a checksum")))
    }),
    fault("checksum-page-inconsistent-sealed", ChecksumPage, "Inconsistent", |pool| {
        let sealed =
            pool.records.iter().filter(|(_, record)| record.flags.sealed).map(|(_, record)| record.name.clone());
        let sealed: BTreeSet<String> = sealed.collect();
        for block in with_checksum(pool)? {
            let names = pool.mapped_by(block)?;
            let mut touched = names.intersection(&sealed);
            let (Some(name), None) = (touched.next(), touched.next()) else { continue };
            let (group, index) = pool.superblock.geometry.group_of(block).ok_or_else(|| invalid("in no group"))?;
            let wanted = Place::ChecksumPage { group, page: index / 1024 };
            let (page, bits) = (pool.first(|place| *place == wanted)?, bits(pool, block)?);
            pool.change(page, |bytes| put(bytes, index as usize % 1024 * 4, 0, 4))?;
            pool.change(bits, |bytes| bytes[index as usize / 8] &= !(1 << (index % 8)))?;
            let check = Check::Inconsistent("a block of a sealed snapshot has no checksum");
            return Ok(Made::one(ChecksumPage, block, check).touching([name.clone()]));
        }
        Err(invalid("no block is in one sealed snapshot only"))
    }),
];

/// The page that says which blocks of a block's group have a checksum.
fn bits(pool: &Anatomy<'_>, block: PoolBlock) -> io::Result<PoolBlock> {
    let (group, _) = pool.superblock.geometry.group_of(block).ok_or_else(|| invalid("in no group"))?;
    pool.first(|place| *place == Place::ChecksumPage { group, page: 32 })
}

/// Blocks with a checksum, in the first page that has any.
fn with_checksum(pool: &Anatomy<'_>) -> io::Result<Vec<PoolBlock>> {
    let mut found = Vec::new();
    for (address, part) in &pool.parts {
        if let Place::ChecksumPage { group, page } = part.place
            && page < 32
        {
            let (numbers, start) = (pool.block(*address)?, pool.superblock.geometry.group_start(group));
            let has_one = (0..1024).filter(|index| numbers[4 * index..4 * index + 4] != [0; 4]);
            found.extend(has_one.map(|index| start.plus(u64::from(page) * 1024 + index as u64)));
        }
    }
    Ok(found)
}

/// A page of checksums, and a block of it that has none and whose count is `wanted`, with its index in the group.
fn without_checksum(pool: &Anatomy<'_>, wanted: impl Fn(u32) -> bool) -> io::Result<(PoolBlock, PoolBlock, u32)> {
    for (address, part) in &pool.parts {
        if let Place::ChecksumPage { group, page } = part.place
            && page < 32
        {
            let numbers = pool.block(*address)?;
            for at in (0..1024).filter(|at| numbers[4 * at..4 * at + 4] == [0; 4]) {
                let index = page * 1024 + at as u32;
                let block = pool.superblock.geometry.group_start(group).plus(index.into());
                let is_data = u64::from(index) >= pool.superblock.geometry.layout_blocks(group);
                if is_data && pool.count(block).is_ok_and(|(.., count)| wanted(count)) {
                    return Ok((*address, block, index));
                }
            }
        }
    }
    Err(invalid("nothing is sealed in this pool"))
}

fn index(pool: &Anatomy<'_>) -> io::Result<PoolBlock> {
    pool.first(|place| matches!(place, Place::GroupIndex(_)))
}

fn of_index(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let block = index(pool)?;
    undecodable(pool, GroupIndex, block, check, edit)
}

fn descriptor(pool: &Anatomy<'_>) -> io::Result<PoolBlock> {
    pool.first(|place| matches!(place, Place::GroupDescriptor(_)))
}

fn of_descriptor(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let block = descriptor(pool)?;
    undecodable(pool, GroupDescriptor, block, check, edit)
}

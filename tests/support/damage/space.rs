//! Faults of the space map: group indexes, descriptors, pages of counts and of checksums.

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
];

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

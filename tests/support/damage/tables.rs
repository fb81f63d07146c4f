//! Faults of superblocks, volume records, attributes and carcass pages.

use std::io;

use plywood::error::Check::{self, Inconsistent, Magic, OutOfBounds, Reserved, Text, Total, Undefined};
use plywood::error::Structure::{Attributes, CarcassPage, Node, Superblock, VolumeRecord};
use plywood::format::{Entry, Place, SUPERBLOCK_COPIES};
use plywood::units::PoolBlock;

use super::anatomy::{Anatomy, invalid};
use super::{Fault, Made, fault, undecodable, wrong_copy, wrong_sum};

pub const FAULTS: &[Fault] = &[
    fault("superblock-magic", Superblock, "Magic", |pool| superblock(pool, Magic, |bytes| bytes[0] = 0)),
    fault("superblock-checksum", Superblock, "Checksum", |pool| {
        let copy = pool.copies()[1];
        pool.spoil(copy, |bytes| bytes[4000] ^= 1)?;
        let mut bytes = pool.block(copy)?;
        let expected = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        bytes[12..16].fill(0);
        Ok(Made::one(Superblock, copy, Check::Checksum { expected, found: crc32fast::hash(&bytes) }))
    }),
    fault("superblock-reserved", Superblock, "Reserved", |pool| {
        superblock(pool, Reserved("reserved"), |bytes| bytes[400] = 1)
    }),
    fault("superblock-out-of-bounds", Superblock, "OutOfBounds", |pool| {
        superblock(pool, OutOfBounds { field: "journal_first", value: 5 }, |bytes| put(bytes, 168, 5, 8))
    }),
    fault("superblock-undefined", Superblock, "Undefined", |pool| {
        superblock(pool, Undefined { field: "group_index.slot", value: 9 }, |bytes| bytes[1668] = 9)
    }),
    fault("superblock-text", Superblock, "Text", |pool| superblock(pool, Text("name"), |bytes| bytes[56] = 0xff)),
    fault("superblock-inconsistent", Superblock, "Inconsistent", |pool| {
        superblock(pool, Inconsistent("a group in use has no group index"), |bytes| put(bytes, 212, 0, 4))
    }),
    fault("superblock-inconsistent-generations", Superblock, "Inconsistent", |pool| {
        let bytes = pool.block(pool.copies()[0])?;
        for copy in SUPERBLOCK_COPIES[pool.slot.other().index()] {
            pool.spoil(copy, |other| other.copy_from_slice(&bytes))?;
        }
        let check = Inconsistent("both slots have the same generation");
        Ok(Made::one(Superblock, SUPERBLOCK_COPIES[1][0], check))
    }),
    fault("superblock-total", Superblock, "Total", |pool| {
        let (copies, found) = (pool.copies(), pool.superblock.used_blocks);
        for copy in copies {
            pool.change_superblock(copy, |bytes| put(bytes, 336, found + 1, 8))?;
        }
        Ok(Made::one(Superblock, copies[0], Total { field: "used_blocks", recorded: found + 1, found }))
    }),
    fault("table-checksum", Node, "Checksum", |pool| {
        let node = pool.first(|place| matches!(place, Place::TableNode { first, .. } if *first < 1 << 62))?;
        wrong_sum(pool, Node, node)
    }),
    fault("volume-record-checksum", VolumeRecord, "Checksum", |pool| {
        let (entry, id) = record(pool)?;
        Ok(wrong_sum(pool, VolumeRecord, entry.address)?.touching([id]))
    }),
    fault("volume-record-checksum-copy", VolumeRecord, "Checksum", |pool| {
        let (entry, _) = record(pool)?;
        let name = pool.reached_from(entry.address);
        Ok(wrong_copy(pool, VolumeRecord, entry.address.plus(1))?.touching(name))
    }),
    fault("volume-record-magic", VolumeRecord, "Magic", |pool| of_record(pool, Magic, |bytes| bytes[0] = 0)),
    fault("volume-record-reserved", VolumeRecord, "Reserved", |pool| {
        of_record(pool, Reserved("reserved"), |bytes| bytes[4000] = 1)
    }),
    fault("volume-record-out-of-bounds", VolumeRecord, "OutOfBounds", |pool| {
        of_record(pool, OutOfBounds { field: "sector_size", value: 777 }, |bytes| put(bytes, 40, 777, 4))
    }),
    fault("volume-record-undefined", VolumeRecord, "Undefined", |pool| {
        of_record(pool, Undefined { field: "on_full", value: 9 }, |bytes| bytes[204] = 9)
    }),
    fault("volume-record-text", VolumeRecord, "Text", |pool| of_record(pool, Text("name"), |bytes| bytes[272] = 0xff)),
    fault("volume-record-inconsistent", VolumeRecord, "Inconsistent", |pool| {
        of_record(pool, Inconsistent("attributes do not fill their blocks"), |bytes| put(bytes, 264, 60, 4))
    }),
    fault("volume-record-total", VolumeRecord, "Total", |pool| {
        if !pool.carcasses.is_empty() {
            return Err(invalid("while deleted trees wait, nobody says what the numbers are; let the pool settle"));
        }
        let (entry, record) = pool.records.last().cloned().ok_or_else(|| invalid("the pool has no volume"))?;
        let found = record.mapped_blocks;
        pool.change(entry.address, |bytes| put(bytes, 168, found + 1, 8))?;
        let check = Total { field: "mapped_blocks", recorded: found + 1, found };
        Ok(Made::one(VolumeRecord, entry.address, check).touching([record.name]))
    }),
    fault("volume-record-in-place-total", VolumeRecord, "Total", |pool| {
        if !pool.carcasses.is_empty() {
            return Err(invalid("while deleted trees wait, nobody says what the numbers are; let the pool settle"));
        }
        let (entry, record) = pool.records.last().cloned().ok_or_else(|| invalid("the pool has no volume"))?;
        let found = record.in_place_blocks;
        pool.change(entry.address, |bytes| put(bytes, 3096, found + 1, 8))?;
        let check = Total { field: "in_place_blocks", recorded: found + 1, found };
        Ok(Made::one(VolumeRecord, entry.address, check).touching([record.name]))
    }),
    fault("attributes-checksum", Attributes, "Checksum", |pool| {
        let (block, name) = attributes(pool)?;
        Ok(wrong_sum(pool, Attributes, block)?.touching([name]))
    }),
    fault("attributes-magic", Attributes, "Magic", |pool| of_attributes(pool, Magic, |bytes| bytes[0] = 0)),
    fault("attributes-reserved", Attributes, "Reserved", |pool| {
        of_attributes(pool, Reserved("attribute.reserved"), |bytes| bytes[22] = 1)
    }),
    fault("attributes-out-of-bounds", Attributes, "OutOfBounds", |pool| {
        of_attributes(pool, OutOfBounds { field: "count", value: 0 }, |bytes| put(bytes, 12, 0, 4))
    }),
    fault("attributes-text", Attributes, "Text", |pool| of_attributes(pool, Text("key"), |bytes| bytes[24] = 0xff)),
    fault("attributes-truncated", Attributes, "Truncated", |pool| {
        of_attributes(pool, Check::Truncated, |bytes| put(bytes, 8, 1 << 18, 4))
    }),
    fault("attributes-inconsistent", Attributes, "Inconsistent", |pool| {
        of_attributes(pool, Inconsistent("attributes are not in order"), |bytes| {
            // "b" and "a", both empty.
            bytes[8..].fill(0);
            (bytes[8], bytes[12]) = (34, 2);
            (bytes[20], bytes[24], bytes[29], bytes[33]) = (1, b'b', 1, b'a');
        })
    }),
    fault("carcass-page-checksum", CarcassPage, "Checksum", |pool| {
        let page = carcass_page(pool)?;
        wrong_sum(pool, CarcassPage, page)
    }),
    fault("carcass-page-magic", CarcassPage, "Magic", |pool| of_carcasses(pool, Magic, |bytes| bytes[0] = 0)),
    fault("carcass-page-reserved", CarcassPage, "Reserved", |pool| {
        of_carcasses(pool, Reserved("reserved"), |bytes| bytes[20] = 1)
    }),
    fault("carcass-page-out-of-bounds", CarcassPage, "OutOfBounds", |pool| {
        of_carcasses(pool, OutOfBounds { field: "count", value: 1000 }, |bytes| put(bytes, 8, 1000, 4))
    }),
    fault("carcass-page-undefined", CarcassPage, "Undefined", |pool| {
        of_carcasses(pool, Undefined { field: "carcass.flags", value: 0x80 }, |bytes| bytes[64 + 54] = 0x80)
    }),
    fault("carcass-page-inconsistent", CarcassPage, "Inconsistent", |pool| {
        of_carcasses(pool, Inconsistent("a carcass is not a node"), |bytes| bytes[72..88].fill(0))
    }),
];

/// Puts a little-endian number.
pub fn put(bytes: &mut [u8], offset: usize, value: u64, len: usize) {
    bytes[offset..offset + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

/// The second copy of the newest superblock.
fn superblock(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let copy = pool.copies()[1];
    pool.change_superblock(copy, edit)?;
    Ok(Made::one(Superblock, copy, check))
}

/// The record of the last volume, and what a check calls a volume whose name cannot be read.
fn record(pool: &Anatomy<'_>) -> io::Result<(Entry, String)> {
    let (entry, record) = pool.records.last().ok_or_else(|| invalid("the pool has no volume"))?;
    Ok((*entry, format!("(id {})", record.id)))
}

fn of_record(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let (entry, id) = record(pool)?;
    Ok(undecodable(pool, VolumeRecord, entry.address, check, edit)?.touching([id]))
}

/// A volume with one block of attributes.
fn attributes(pool: &Anatomy<'_>) -> io::Result<(PoolBlock, String)> {
    let found = pool.records.iter().find(|(_, record)| record.attributes.len() == 1);
    let (_, record) = found.ok_or_else(|| invalid("no volume has one block of attributes"))?;
    Ok((record.attributes[0].address, record.name.clone()))
}

fn of_attributes(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let (block, name) = attributes(pool)?;
    Ok(undecodable(pool, Attributes, block, check, edit)?.touching([name]))
}

fn carcass_page(pool: &Anatomy<'_>) -> io::Result<PoolBlock> {
    pool.first(|place| matches!(place, Place::CarcassPage(_)))
}

fn of_carcasses(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let page = carcass_page(pool)?;
    undecodable(pool, CarcassPage, page, check, edit)
}

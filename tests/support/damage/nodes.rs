//! Faults of mapping nodes, and of the data that they map.

use std::collections::BTreeSet;
use std::io;

use plywood::error::Check::{self, Count, Inconsistent, OutOfBounds, Reserved, Undefined};
use plywood::error::Structure::{Data, Node, SpaceMapPage};
use plywood::format::{self, Entry, EntryKind, Place, Slot};
use plywood::units::{Clock, PoolBlock, VirtualBlock};

use super::anatomy::{Anatomy, invalid};
use super::tables::put;
use super::{Fault, Made, fault, undecodable, wrong_copy, wrong_sum};

pub const FAULTS: &[Fault] = &[
    fault("node-checksum", Node, "Checksum", |pool| {
        let leaf = leaf(pool)?.0;
        let names = pool.reached_from(leaf);
        Ok(wrong_sum(pool, Node, leaf)?.touching(names))
    }),
    fault("node-checksum-inner", Node, "Checksum", |pool| {
        let (node, ..) = inner(pool, 1..4, |_, _| true)?;
        let names = pool.reached_from(node);
        Ok(wrong_sum(pool, Node, node)?.touching(names))
    }),
    fault("node-checksum-copy", Node, "Checksum", |pool| {
        let (node, ..) = inner(pool, 1..4, |_, _| true)?;
        let names = pool.reached_from(node);
        Ok(wrong_copy(pool, Node, node.plus(1))?.touching(names))
    }),
    fault("node-checksum-place", Node, "Checksum", |pool| {
        // The wrong reference comes before the right one.
        let (child, made) = second_reference(pool, 1, |child, hole| hole < child)?;
        let check = Check::Checksum { expected: child.expected, found: child.found };
        Ok(Made::one(Node, child.address, check).touching(child.names).and(made))
    }),
    fault("node-reserved", Node, "Reserved", |pool| {
        of_leaf(pool, Reserved("address"), |hole, bytes| bytes[16 * hole] = 1)
    }),
    fault("node-undefined", Node, "Undefined", |pool| {
        of_leaf(pool, Undefined { field: "kind", value: 9 }, |hole, bytes| bytes[16 * hole + 6] = 9)
    }),
    fault("node-out-of-bounds", Node, "OutOfBounds", |pool| {
        let value = pool.pool_blocks();
        of_leaf(pool, OutOfBounds { field: "address", value }, |hole, bytes| {
            set(bytes, hole, Entry::block(PoolBlock(value), Clock(0)));
        })
    }),
    fault("node-inconsistent-kind", Node, "Inconsistent", |pool| {
        let check = Inconsistent("an entry's kind does not belong on this level");
        of_leaf(pool, check, |hole, bytes| set(bytes, hole, Entry::node(PoolBlock(9), false, 0, Clock(0))))
    }),
    fault("node-inconsistent-birth", Node, "Inconsistent", |pool| {
        let (node, index, _) = inner(pool, 1..4, |_, _| true)?;
        let level = level_of(pool, node);
        let child = pool.node(node, level)?.entry(index).address;
        let (names, late) = (pool.reached_from(child), pool.birth(node)? + 1000);
        pool.change(node, |bytes| put(bytes, 16 * index + 11, late, 5))?;
        let check = Inconsistent("it was born later than the node above it");
        Ok(Made::one(Node, child, check).touching(names))
    }),
    fault("node-inconsistent-leaf", Node, "Inconsistent", |pool| {
        let (child, made) = second_reference(pool, 1, |child, hole| child < hole)?;
        let check = Inconsistent("an entry that points at it says that it is another node");
        Ok(Made::one(Node, child.address, check).touching(child.names).and(made))
    }),
    fault("node-inconsistent-places", Node, "Inconsistent", |pool| {
        let (child, made) = second_reference(pool, 2, |child, hole| child < hole)?;
        let check = Inconsistent("it is reached at two places");
        Ok(Made::one(Node, child.address, check).touching(child.names).and(made))
    }),
    fault("data-out-of-bounds", Data, "OutOfBounds", |pool| {
        let layout = pool.superblock.geometry.descriptor_block(0, Slot::A);
        map(pool, layout, OutOfBounds { field: "address", value: layout.0 })
    }),
    fault("data-inconsistent-metadata", Data, "Inconsistent", |pool| {
        let record = pool.records.first().ok_or_else(|| invalid("the pool has no volume"))?.0.address;
        let (_, _, count) = pool.count(record)?;
        let made = map(pool, record, Inconsistent("it is both data and metadata"))?;
        let names = made.found[0].1.clone();
        let check = Count { recorded: count.into(), found: u64::from(count) + 1 };
        Ok(made.and(Made::one(SpaceMapPage, record, check).touching(names)))
    }),
    fault("data-inconsistent-birth", Data, "Inconsistent", |pool| {
        let (leaf, _) = leaf(pool)?;
        let node = pool.node(leaf, 0)?;
        let index = (0..256).find(|index| node.entry(*index).kind == EntryKind::Block).unwrap_or(0);
        let (block, late) = (node.entry(index).address, pool.birth(leaf)? + 1000);
        let names = pool.mapped_by(block)?;
        pool.change(leaf, |bytes| put(bytes, 16 * index + 11, late, 5))?;
        Ok(Made::one(Data, block, Inconsistent("it was born later than the node above it")).touching(names))
    }),
];

fn set(bytes: &mut [u8], index: usize, entry: Entry) {
    bytes[16 * index..16 * index + 16].copy_from_slice(&entry.encode());
}

fn level_of(pool: &Anatomy<'_>, node: PoolBlock) -> u8 {
    match pool.parts.get(&node).map(|part| part.place) {
        Some(Place::Node { level, .. }) => level,
        _ => 0,
    }
}

/// Nodes of volumes, of these levels.
fn nodes(pool: &Anatomy<'_>, levels: std::ops::Range<u8>) -> Vec<PoolBlock> {
    let is_wanted = |place: Place| matches!(place, Place::Node { level, .. } if levels.contains(&level));
    let of_level = pool.parts.iter().filter(|(_, part)| is_wanted(part.place)).map(|(block, _)| *block);
    of_level.filter(|block| !pool.reached_from(*block).is_empty()).collect()
}

/// A leaf with a block and a hole, and the hole.
fn leaf(pool: &Anatomy<'_>) -> io::Result<(PoolBlock, usize)> {
    for block in nodes(pool, 0..1) {
        let node = pool.node(block, 0)?;
        let of = |kind| (0..256).find(|index| node.entry(*index).kind == kind);
        if let (Some(_), Some(hole)) = (of(EntryKind::Block), of(EntryKind::Hole)) {
            return Ok((block, hole));
        }
    }
    Err(invalid("no leaf has a block and a hole"))
}

fn of_leaf(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(usize, &mut [u8])) -> io::Result<Made> {
    let (block, hole) = leaf(pool)?;
    let names = pool.reached_from(block);
    Ok(undecodable(pool, Node, block, check, |bytes| edit(hole, bytes))?.touching(names))
}

/// A pair of one of these levels with a child and a hole that are `wanted`, and which they are.
fn inner(
    pool: &Anatomy<'_>,
    levels: std::ops::Range<u8>,
    wanted: impl Fn(usize, usize) -> bool,
) -> io::Result<(PoolBlock, usize, usize)> {
    for block in nodes(pool, levels) {
        let node = pool.node(block, level_of(pool, block))?;
        let of = |kind| (0..256).filter(|index| node.entry(*index).kind == kind).collect::<Vec<_>>();
        let (children, holes) = (of(EntryKind::Node), of(EntryKind::Hole));
        let pairs = children.iter().flat_map(|child| holes.iter().map(|hole| (*child, *hole)));
        if let Some((child, hole)) = pairs.into_iter().find(|(child, hole)| wanted(*child, *hole))
            && pool.parts.get(&block).is_some_and(|part| part.mirrored)
        {
            return Ok((block, child, hole));
        }
    }
    Err(invalid("no node has such children"))
}

/// A node, the checksum that is recorded for it, and the one that it would have at another place.
struct Child {
    address: PoolBlock,
    expected: u32,
    found: u32,
    /// Volumes of the node that points at it wrongly.
    names: BTreeSet<String>,
}

/// Has a hole point at what another entry of its node points at: the volumes of that node are touched, and the count is one
/// too few.
fn second_reference(
    pool: &mut Anatomy<'_>,
    level: u8,
    wanted: impl Fn(usize, usize) -> bool,
) -> io::Result<(Child, Made)> {
    let (block, index, hole) = inner(pool, level..level + 1, wanted)?;
    let entry = pool.node(block, level)?.entry(index);
    let Some(Place::Node { first, .. }) = pool.parts.get(&block).map(|part| part.place) else {
        return Err(invalid("no node"));
    };
    let there = VirtualBlock(first.0 + ((hole as u64) << (8 * level)));
    let place = Place::Node { level: level - 1, first: there };
    let found = format::checksum(&pool.superblock.uuid, place, &pool.block(entry.address)?);
    let (names, wrong) = (pool.reached_from(entry.address), pool.reached_from(block));
    let (_, _, count) = pool.count(entry.address)?;
    pool.change(block, |bytes| set(bytes, hole, entry))?;
    let check = Count { recorded: count.into(), found: u64::from(count) + 1 };
    let mut made = Made::one(SpaceMapPage, entry.address, check).touching(names);
    made.found[0].1.extend(wrong.clone());
    Ok((Child { address: entry.address, expected: entry.checksum, found, names: wrong }, made))
}

/// Maps a block that is no data.
fn map(pool: &mut Anatomy<'_>, block: PoolBlock, check: Check) -> io::Result<Made> {
    let (leaf, hole) = leaf(pool)?;
    let names = pool.reached_from(leaf);
    pool.change(leaf, |bytes| set(bytes, hole, Entry::block(block, Clock(0))))?;
    Ok(Made::one(Data, block, check).touching(names))
}

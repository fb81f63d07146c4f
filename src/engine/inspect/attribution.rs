//! Which volumes, and which ranges of them, a fault touches.
//!
//! A second walk, taken only when there are faults, marks every node that leads to one. Each volume is then followed
//! from its root down through marked nodes only.

use rustc_hash::{FxHashMap, FxHashSet};

use super::counts::Counts;
use super::fault::{Fault, Faults, Touched, TouchedRange};
use super::reader::{Reader, Target};
use super::tables::Tables;
use super::walk::{DATA_AND_METADATA, LATE_BIRTH, Tree, Visited, Visitor, Walker};
use crate::engine::Storage;
use crate::engine::tree::entry_span;
use crate::error::{Result, Structure};
use crate::format::{ENTRIES_PER_NODE, Entry, EntryKind, Node, Place, span_blocks};
use crate::units::{BLOCK_BYTES, Clock, VirtualBlock};

/// Volumes listed for a fault at most.
const VOLUMES_MAX: usize = 64;
/// Ranges listed for a fault and a volume at most.
const RANGES_MAX: usize = 64;
/// Marked nodes followed at most, over all volumes.
const STEPS_MAX: u64 = 1 << 22;

/// Faults by block.
struct Places(Vec<FaultyBlocks>);

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct FaultyBlocks {
    first: u64,
    end: u64,
    /// Its number in the list.
    fault: usize,
    /// Whether a reference that finds a good node there has nothing to do with it.
    spares_good: bool,
}

impl Places {
    fn of(faults: &[Fault]) -> Self {
        let mut places: Vec<_> = faults
            .iter()
            .enumerate()
            .filter(|(_, fault)| fault.touched.is_empty())
            .filter(|(_, fault)| {
                matches!(fault.found.structure, Structure::Node | Structure::Data | Structure::SpaceMapPage)
            })
            .map(|(number, fault)| {
                let first = fault.found.address.0;
                let is_lost = !fault.has_copy && ![LATE_BIRTH, DATA_AND_METADATA].contains(&fault.found.check);
                FaultyBlocks {
                    first,
                    end: first.saturating_add(fault.blocks),
                    fault: number,
                    spares_good: is_lost && fault.found.structure == Structure::Node,
                }
            })
            .collect();
        places.sort_unstable();
        Self(places)
    }

    /// Faults at what `entry` points at.
    fn at(&self, entry: Entry) -> impl Iterator<Item = &FaultyBlocks> + '_ {
        let (first, last) = (entry.address.0, entry.address.0 + u64::from(entry.mirrored));
        // Faults at one block are few, and runs do not overlap: what ends before is passed over by the search.
        let from = self.0.partition_point(|blocks| blocks.end <= first);
        self.0[from..].iter().take_while(move |blocks| blocks.first <= last)
    }

    fn has(&self, entry: Entry) -> bool {
        self.at(entry).next().is_some()
    }
}

/// Marks what leads to a fault.
struct Marker<'a> {
    places: &'a Places,
    marked: FxHashSet<u64>,
}

impl Visitor for Marker<'_> {
    fn node(&mut self, visited: &Visited) -> Result<()> {
        let leads = (0..ENTRIES_PER_NODE).map(|index| visited.node.entry(index)).any(|entry| {
            entry.kind != EntryKind::Hole && (self.marked.contains(&entry.address.0) || self.places.has(entry))
        });
        if leads {
            self.marked.insert(visited.entry.address.0);
        }
        Ok(())
    }
}

/// Fills in what each fault touches.
pub(in crate::engine) async fn attribute<S: Storage>(
    reader: &mut Reader<'_, S>,
    tables: &Tables,
    faults: &mut Faults,
) -> Result<()> {
    let places = Places::of(faults.list_mut());
    if places.0.is_empty() {
        return Ok(());
    }
    let mut counts = Counts::new(reader.geometry, reader.geometry.group_count());
    let mut marker = Marker { places: &places, marked: FxHashSet::default() };
    let mut told_before = Faults::default();
    let mut walker = Walker::new(reader, &mut counts, &mut told_before);
    for volume in &tables.volumes {
        let tree = Tree { created_at: Clock(0), shared_at: Clock(0), ..Tree::of(&volume.record) };
        walker.walk(&tree, &mut marker).await?;
    }
    let marked = marker.marked;
    let mut steps = 0;
    for volume in &tables.volumes {
        let mut found: FxHashMap<usize, Vec<TouchedRange>> = FxHashMap::default();
        let complete = follow(reader, volume.record.root, &places, &marked, &mut steps, &mut found).await;
        for (number, ranges) in found {
            let Some(fault) = faults.list_mut().get_mut(number) else { continue };
            fault.touches_more |= !complete || ranges.len() > RANGES_MAX || fault.touched.len() >= VOLUMES_MAX;
            if fault.touched.len() < VOLUMES_MAX {
                let ranges = ranges.into_iter().take(RANGES_MAX).collect();
                fault.touched.push(Touched { volume: volume.record.id, name: volume.record.name.clone(), ranges });
            }
        }
    }
    Ok(())
}

/// Follows one volume to the faults. Answers whether that was possible to the end.
async fn follow<S: Storage>(
    reader: &mut Reader<'_, S>,
    root: crate::format::Root,
    places: &Places,
    marked: &FxHashSet<u64>,
    steps: &mut u64,
    found: &mut FxHashMap<usize, Vec<TouchedRange>>,
) -> bool {
    let mut waiting = vec![(root.entry, root.level, 0u64, span_blocks(root.level))];
    while let Some((entry, level, first, span)) = waiting.pop() {
        if entry.kind == EntryKind::Hole {
            continue;
        }
        for blocks in places.at(entry) {
            let is_spared = blocks.spares_good
                && entry.kind == EntryKind::Node
                && read_node(reader, entry, level, first).await.is_some();
            if !is_spared {
                add_range(found.entry(blocks.fault).or_default(), first, span);
            }
        }
        if entry.kind != EntryKind::Node || !marked.contains(&entry.address.0) {
            continue;
        }
        *steps += 1;
        if *steps > STEPS_MAX {
            return false;
        }
        let Some(node) = read_node(reader, entry, level, first).await else { continue };
        let below = level.saturating_sub(1);
        // In reverse, so that they are taken in order.
        for index in (0..ENTRIES_PER_NODE).rev() {
            let at = first + index as u64 * entry_span(level);
            waiting.push((node.entry(index), below, at, entry_span(level)));
        }
    }
    true
}

async fn read_node<S: Storage>(reader: &mut Reader<'_, S>, entry: Entry, level: u8, first: u64) -> Option<Node> {
    let place = Place::Node { level, first: VirtualBlock(first) };
    let Entry { address, mirrored, checksum, .. } = entry;
    let target = Target { address, mirrored, checksum, place, structure: Structure::Node };
    let bytes = reader.verified_again(&target).await?;
    Node::decode(&bytes, level, reader.geometry.pool_blocks).ok()
}

fn add_range(ranges: &mut Vec<TouchedRange>, first: u64, blocks: u64) {
    let (offset_bytes, length_bytes) = (first * BLOCK_BYTES, blocks * BLOCK_BYTES);
    // One more than is listed, so that it is known that there are more.
    let full = ranges.len() > RANGES_MAX;
    match ranges.last_mut() {
        Some(last) if last.offset_bytes + last.length_bytes == offset_bytes => last.length_bytes += length_bytes,
        _ if full => {}
        _ => ranges.push(TouchedRange { offset_bytes, length_bytes }),
    }
}

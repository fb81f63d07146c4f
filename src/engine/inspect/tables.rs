//! The volume table with every record, and the carcass table.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use uuid::Uuid;

use super::check::named_volumes;
use super::counts::{Counts, Reached};
use super::fault::Faults;
use super::reader::{Reader, Target};
use crate::engine::Storage;
use crate::engine::carcass_table::CARCASS_TABLE;
use crate::engine::tail::Tail;
use crate::engine::tree::entry_span;
use crate::error::{Check, Structure};
use crate::format::{
    self, Carcass, ENTRIES_PER_NODE, Entry, EntryKind, Node, OnFull, Place, Record, Root, Superblock,
    VOLUME_BLOCKS_MAX, VolumeFlags, VolumeRecord, span_blocks,
};
use crate::units::{BLOCK_BYTES, Clock, PoolBlock, SECTOR_SIZE, VolumeId};

/// A volume whose record could be read.
pub(in crate::engine) struct FoundVolume {
    pub(in crate::engine) record: VolumeRecord,
    /// Where the record stands.
    pub(in crate::engine) address: PoolBlock,
    /// Its keys and values; none when they are damaged.
    pub(in crate::engine) attributes: Option<BTreeMap<String, Vec<u8>>>,
    /// Whether it stands for one whose record is lost.
    pub(in crate::engine) is_stub: bool,
}

/// What the tables hold.
#[derive(Default)]
pub(in crate::engine) struct Tables {
    pub(in crate::engine) volumes: Vec<FoundVolume>,
    /// Ids whose records, if there were any, are lost.
    pub(in crate::engine) lost_ids: Vec<Range<u64>>,
    pub(in crate::engine) carcasses: Vec<Carcass>,
    /// Pages or nodes of the carcass table that are lost: nobody knows what they would have given back.
    pub(in crate::engine) carcasses_lost: u64,
}

impl Tables {
    /// The volumes in the order in which they are walked: what is sealed first, because a node is looked at once, and theirs
    /// must have checksums below.
    pub(in crate::engine) fn sealed_first(&self) -> impl Iterator<Item = &FoundVolume> {
        let is_sealed = |volume: &&FoundVolume| volume.record.flags.sealed;
        self.volumes.iter().filter(is_sealed).chain(self.volumes.iter().filter(move |volume| !is_sealed(volume)))
    }
}

/// Gives volumes whose records are lost, and which changes in the journal are about, an empty record: so the changes can
/// still be made, and what they hold is not lost with the rest.
pub(in crate::engine) fn add_stubs(superblock: &Superblock, tables: &mut Tables, tail: &Tail) {
    let mut known: HashSet<u64> = tables.volumes.iter().map(|found| found.record.id.0).collect();
    let mut names: HashSet<String> = tables.volumes.iter().map(|found| found.record.name.clone()).collect();
    for (_, record) in &tail.records {
        for id in named_volumes(record) {
            let is_lost = tables.lost_ids.iter().any(|range| range.contains(&id)) && id < superblock.next_volume.0;
            if is_lost && known.insert(id) {
                let mut name = format!("lost-{id}");
                while !names.insert(name.clone()) {
                    name.push('x');
                }
                tables.volumes.push(stub(superblock, VolumeId(id), name));
            }
        }
        match record {
            Record::VolumeCreated(created) | Record::VolumeShared { created, .. } => {
                known.insert(created.id.0);
                names.insert(created.name.clone());
            }
            _ => {}
        }
    }
    tables.volumes.sort_unstable_by_key(|found| found.record.id);
}

fn stub(superblock: &Superblock, id: VolumeId, name: String) -> FoundVolume {
    let record = VolumeRecord {
        id,
        // Nobody knows what it was: one that follows from pool and id.
        uuid: Uuid::from_u128(superblock.uuid.as_u128() ^ u128::from(id.0)),
        name,
        // As large as a volume can be: no change is beyond its end.
        size_bytes: VOLUME_BLOCKS_MAX * BLOCK_BYTES,
        sector_size: SECTOR_SIZE as u32,
        flags: VolumeFlags::default(),
        root: Root::empty(superblock.clock),
        created_at: superblock.clock,
        shared_at: superblock.clock,
        rolled_at: Clock(0),
        rolled_to: Clock(0),
        origin: None,
        received_from: None,
        own_blocks: 0,
        mapped_blocks: 0,
        in_place_blocks: 0,
        quota_bytes: 0,
        reservation_bytes: 0,
        on_full: OnFull::Error,
        digest: None,
        created_time: 0,
        depth: 0,
        attributes: Vec::new(),
        attributes_bytes: 0,
        account_spans: Vec::new(),
        accounts_from: 0,
    };
    FoundVolume { record, address: PoolBlock(0), attributes: Some(BTreeMap::new()), is_stub: true }
}

/// Leaves of a table by number, and the ranges that are lost.
#[derive(Default)]
struct Leaves {
    found: Vec<(u64, Entry)>,
    lost: Vec<Range<u64>>,
}

/// Reads both tables.
pub(in crate::engine) async fn read_tables<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    counts: &mut Counts,
    faults: &mut Faults,
) -> Tables {
    let mut tables = Tables::default();
    let leaves = read_leaves(reader, superblock.volume_table, 0, counts, faults).await;
    tables.lost_ids = leaves.lost;
    let mut names = HashSet::new();
    for (number, entry) in leaves.found {
        let id = VolumeId(number);
        let Some(record) = read_record(reader, superblock, id, entry, counts, faults, &mut names).await else {
            tables.lost_ids.push(number..number + 1);
            continue;
        };
        let attributes = read_attributes(reader, &record, counts, faults).await;
        tables.volumes.push(FoundVolume { record, address: entry.address, attributes, is_stub: false });
    }
    if tables.lost_ids.is_empty() && superblock.volume_count != tables.volumes.len() as u64 {
        let (recorded, found) = (superblock.volume_count, tables.volumes.len() as u64);
        faults.add(Structure::Superblock, PoolBlock(0), Check::Total { field: "volume_count", recorded, found });
    }
    let leaves = read_leaves(reader, superblock.carcass_table, CARCASS_TABLE, counts, faults).await;
    tables.carcasses_lost = leaves.lost.len() as u64;
    for (number, entry) in leaves.found {
        match read_carcasses(reader, number, entry, counts, faults).await {
            Some(carcasses) => tables.carcasses.extend(carcasses),
            None => tables.carcasses_lost += 1,
        }
    }
    tables
}

/// Counts a block of metadata, or a pair, and says whether it can be what it is said to be.
fn count(entry: Entry, structure: Structure, counts: &mut Counts, faults: &mut Faults) -> bool {
    let check = match counts.add(entry.address, true) {
        Reached::First => {
            if entry.mirrored {
                counts.add(entry.address.plus(1), true);
            }
            return true;
        }
        Reached::Again => Check::Inconsistent("two entries of a table point at it"),
        Reached::Otherwise => Check::Inconsistent("it is both data and metadata"),
        Reached::Outside => Check::OutOfBounds { field: "address", value: entry.address.0 },
    };
    faults.add(structure, entry.address, check);
    false
}

fn target(entry: Entry, place: Place, structure: Structure) -> Target {
    Target { address: entry.address, mirrored: entry.mirrored, checksum: entry.checksum, place, structure }
}

/// Walks the nodes of a table. Its numbers begin at 0, the places of its nodes at `base`.
async fn read_leaves<S: Storage>(
    reader: &mut Reader<'_, S>,
    root: Root,
    base: u64,
    counts: &mut Counts,
    faults: &mut Faults,
) -> Leaves {
    let mut leaves = Leaves::default();
    let mut waiting = vec![(root.entry, root.level, 0u64)];
    while let Some((entry, level, first)) = waiting.pop() {
        if entry.kind != EntryKind::Node {
            continue;
        }
        let range = first..first + span_blocks(level);
        if !count(entry, Structure::Node, counts, faults) {
            leaves.lost.push(range);
            continue;
        }
        let place = Place::TableNode { level, first: base + first };
        let Some(bytes) = reader.verified(&target(entry, place, Structure::Node), faults).await else {
            leaves.lost.push(range);
            continue;
        };
        let node = match Node::decode_table(&bytes, level, reader.geometry.pool_blocks) {
            Ok(node) => node,
            Err(check) => {
                faults.add(Structure::Node, entry.address, check);
                leaves.lost.push(range);
                continue;
            }
        };
        for index in 0..ENTRIES_PER_NODE {
            let child = node.entry(index);
            let at = first + index as u64 * entry_span(level);
            match (child.kind, level) {
                (EntryKind::Hole, _) => {}
                (_, 0) => leaves.found.push((at, child)),
                _ => waiting.push((child, level - 1, at)),
            }
        }
    }
    leaves.found.sort_unstable_by_key(|(number, _)| *number);
    leaves
}

async fn read_record<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    id: VolumeId,
    entry: Entry,
    counts: &mut Counts,
    faults: &mut Faults,
    names: &mut HashSet<String>,
) -> Option<VolumeRecord> {
    let mut found = Faults::default();
    let record = read_counted_record(reader, superblock, id, entry, counts, &mut found, names).await;
    // Of a record that cannot be read, only the number is known.
    let name = record.as_ref().map_or_else(|| format!("(id {id})"), |record| record.name.clone());
    faults.add_all_of(&(id, name), found);
    record
}

async fn read_counted_record<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    id: VolumeId,
    entry: Entry,
    counts: &mut Counts,
    faults: &mut Faults,
    names: &mut HashSet<String>,
) -> Option<VolumeRecord> {
    let structure = Structure::VolumeRecord;
    if !count(entry, structure, counts, faults) {
        return None;
    }
    let bytes = reader.verified(&target(entry, Place::VolumeRecord(id), structure), faults).await?;
    let decoded = VolumeRecord::decode(&bytes).and_then(|record| {
        record.check_addresses(superblock.geometry.pool_blocks)?;
        if record.id != id || id >= superblock.next_volume || !names.insert(record.name.clone()) {
            return Err(Check::Inconsistent("the record is another volume's"));
        }
        Ok(record)
    });
    decoded.map_err(|check| faults.add(structure, entry.address, check)).ok()
}

async fn read_attributes<S: Storage>(
    reader: &mut Reader<'_, S>,
    record: &VolumeRecord,
    counts: &mut Counts,
    faults: &mut Faults,
) -> Option<BTreeMap<String, Vec<u8>>> {
    let structure = Structure::Attributes;
    let volume = (record.id, record.name.clone());
    let mut bytes = Some(Vec::new());
    for (index, block) in record.attributes.iter().enumerate() {
        let entry = Entry::node(block.address, false, block.checksum, Clock(0));
        if !count(entry, structure, counts, faults) {
            bytes = None;
            continue;
        }
        let place = Place::Attributes { volume: VolumeId(0), index: index as u32 };
        let mut found = Faults::default();
        let read = reader.verified(&target(entry, place, structure), &mut found).await;
        faults.add_all_of(&volume, found);
        bytes = bytes.zip(read).map(|(mut bytes, read)| {
            bytes.extend(read);
            bytes
        });
    }
    let address = record.attributes.first().map_or(PoolBlock(0), |block| block.address);
    format::decode_attributes(&bytes?, record.attributes_bytes as usize)
        .map_err(|check| faults.add_of(&volume, structure, address, check))
        .ok()
}

async fn read_carcasses<S: Storage>(
    reader: &mut Reader<'_, S>,
    number: u64,
    entry: Entry,
    counts: &mut Counts,
    faults: &mut Faults,
) -> Option<Vec<Carcass>> {
    let structure = Structure::CarcassPage;
    if !count(entry, structure, counts, faults) {
        return None;
    }
    let bytes = reader.verified(&target(entry, Place::CarcassPage(number), structure), faults).await?;
    let carcasses = format::decode_carcasses(&bytes, reader.geometry.pool_blocks);
    carcasses.map_err(|check| faults.add(structure, entry.address, check)).ok()
}

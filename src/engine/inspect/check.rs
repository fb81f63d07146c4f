//! The check of a pool: everything read, every checksum held against its block, every count against a walk.

use super::attribution::attribute;
use super::checksums::{Checksummed, Sealed, WITHOUT_CHECKSUM};
use super::counts::Counts;
use super::fault::{Fault, Faults};
use super::reader::Reader;
use super::space::{GroupFacts, Space, compare, compare_total, read_space};
use super::superblocks::read_superblocks;
use super::tables::{Tables, read_tables};
use super::walk::{Tree, Visited, Visitor, Walker};
use crate::engine::tail::{Tail, read_chain, read_tail};
use crate::engine::{Storage, bounds};
use crate::error::{Check, Corrupt, Result, Structure};
use crate::format::{CLOCK_MAX, Carcass, Geometry, JOURNAL_FIRST, Record, SUPERBLOCK_COPIES, Slot, Superblock};
use crate::units::{Clock, Lsn, PoolBlock, VolumeId};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Faults, the first thousand.
    pub faults: Vec<Fault>,
    /// Faults in all.
    pub fault_count: u64,
    /// Mapping nodes walked, each once.
    pub nodes: u64,
    /// Data blocks found, each once.
    pub data_blocks: u64,
    /// Blocks in use, the layout of the groups included.
    pub used_blocks: u64,
    /// Blocks that are counted, but by nothing that could be read: what is lost holds them.
    pub unaccounted_blocks: u64,
    /// Blocks of nodes, records, attributes and tables; none when something is missing or wrong.
    pub metadata_blocks: Option<u64>,
    /// Volumes walked.
    pub volumes: u64,
    /// Changes in the journal that no checkpoint holds yet.
    pub journal_records: u64,
    /// Blocks of pairs that are bad, and the good ones beside them.
    pub copies: Vec<(PoolBlock, PoolBlock)>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.fault_count == 0
    }
}

/// How far a walk has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Blocks reached, data and metadata.
    pub reached_blocks: u64,
    /// Blocks in use as the superblock says, which is about as many.
    pub used_blocks: u64,
}

/// A visitor that only shows how far the walk is.
pub(in crate::engine) struct Shown<'a> {
    used_blocks: u64,
    nodes: u64,
    show: &'a mut dyn FnMut(Progress),
}

impl<'a> Shown<'a> {
    pub(in crate::engine) fn new(used_blocks: u64, show: &'a mut dyn FnMut(Progress)) -> Self {
        Self { used_blocks, nodes: 0, show }
    }
}

impl Visitor for Shown<'_> {
    fn node(&mut self, _: &Visited) -> Result<()> {
        Ok(())
    }

    fn progress(&mut self, reached_blocks: u64) {
        self.nodes += 1;
        if self.nodes.is_multiple_of(256) {
            (self.show)(Progress { reached_blocks, used_blocks: self.used_blocks });
        }
    }
}

/// Checks a pool that nobody uses, reading only.
///
/// # Errors
/// [`InvalidInput`](crate::error::Error::InvalidInput) when it is no pool, [`Incompatible`](crate::error::Error::Incompatible),
/// and [`Corrupt`](crate::error::Error::Corrupt) when no superblock can be chosen. Everything else that is wrong is in the
/// report.
pub async fn check_metadata<S: Storage>(storage: &S, show: &mut dyn FnMut(Progress)) -> Result<CheckReport> {
    let mut faults = Faults::default();
    let (superblock, slot) = read_superblocks(storage, &mut faults).await?;
    let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
    let known = Checksummed::read(&mut reader, &superblock).await;
    let mut walked = walk_all(&mut reader, &superblock, &known, &mut faults, show).await?;
    let mut space = Space::default();
    let (counts, complete) = (&walked.counts, walked.complete);
    read_space(&mut reader, &superblock, &mut faults, |faults, facts| {
        compare(&superblock.geometry, facts.as_ref(), counts, complete, faults, &mut space);
    })
    .await;
    walked.compare_totals(&superblock, slot, &space, &mut faults);
    let (tail, ended) = read_tail(storage, &superblock).await;
    walked.report.journal_records = tail.records.len() as u64;
    check_journal(&superblock, &walked.tables, &tail, ended, &mut faults);
    finish(&mut reader, walked, &space, faults).await
}

/// A state of a pool in use that stays as it is on the medium while it is checked: its superblock, its space map as it was
/// read before the next checkpoint but one writes over it, and the journal as it was then.
pub(in crate::engine) struct PinnedState {
    superblock: Superblock,
    slot: Slot,
    groups: Vec<Option<GroupFacts>>,
    checksummed: Checksummed,
    tail: Tail,
    /// Where the journal breaks off, if it does.
    ended: Result<()>,
    faults: Faults,
}

impl PinnedState {
    /// Bad blocks of pairs found so far, and the good ones beside them.
    pub(in crate::engine) fn copies(&self) -> &[(PoolBlock, PoolBlock)] {
        self.faults.copies()
    }
}

/// Reads superblock, space map and journal. No checkpoint may be written meanwhile. Batches may be appended: up to
/// `durable`, which every change was when this was called, the journal is held to; what follows may be half written.
pub(in crate::engine) async fn read_pinned<S: Storage>(storage: &S, durable: Lsn) -> Result<PinnedState> {
    let mut faults = Faults::default();
    let (superblock, slot) = read_superblocks(storage, &mut faults).await?;
    let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
    let mut groups = Vec::new();
    read_space(&mut reader, &superblock, &mut faults, |_, facts| groups.push(facts)).await;
    let checksummed = Checksummed::take(&mut groups);
    let (tail, mut ended) = read_chain(storage, &superblock).await;
    if tail.last >= durable {
        ended = Ok(());
    } else if ended.is_ok() {
        let check = Check::JournalGap(tail.last.next().0);
        let address = JOURNAL_FIRST.plus(tail.position.append);
        ended = Err(Corrupt { structure: Structure::Batch, address, check }.into());
    }
    Ok(PinnedState { superblock, slot, groups, checksummed, tail, ended, faults })
}

/// Checks a pinned state. Its nodes and records must not be reused meanwhile.
pub(in crate::engine) async fn check_pinned<S: Storage>(
    storage: &S,
    pinned: PinnedState,
    show: &mut dyn FnMut(Progress),
) -> Result<CheckReport> {
    let PinnedState { superblock, slot, groups, checksummed, tail, ended, mut faults } = pinned;
    let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
    let mut walked = walk_all(&mut reader, &superblock, &checksummed, &mut faults, show).await?;
    let mut space = Space::default();
    for facts in groups {
        compare(&superblock.geometry, facts.as_ref(), &walked.counts, walked.complete, &mut faults, &mut space);
    }
    walked.compare_totals(&superblock, slot, &space, &mut faults);
    walked.report.journal_records = tail.records.len() as u64;
    check_journal(&superblock, &walked.tables, &tail, ended, &mut faults);
    finish(&mut reader, walked, &space, faults).await
}

/// Finds the volumes, and the ranges of them, that map damaged blocks of data. Nodes and records of the newest superblock
/// must not be reused meanwhile.
pub(in crate::engine) async fn attribute_data<S: Storage>(storage: &S, damaged: Vec<Corrupt>) -> Result<Vec<Fault>> {
    let (superblock, _) = read_superblocks(storage, &mut Faults::default()).await?;
    let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
    let mut counts = Counts::new(superblock.geometry, superblock.groups_in_use);
    let tables = read_tables(&mut reader, &superblock, &mut counts, &mut Faults::default()).await;
    let mut faults = Faults::default();
    for found in damaged {
        faults.add_found(found, false, None);
    }
    attribute(&mut reader, &tables, &mut faults).await?;
    Ok(faults.into_list())
}

/// What walking everything gave.
struct Walked {
    tables: Tables,
    counts: Counts,
    /// Whether everything could be reached.
    complete: bool,
    report: CheckReport,
}

impl Walked {
    /// What the superblock says of the whole. What metadata there is, is only known where nothing is wrong.
    fn compare_totals(&mut self, superblock: &Superblock, slot: Slot, space: &Space, faults: &mut Faults) {
        compare_total(superblock, slot, space, faults);
        if !self.complete || faults.total() > 0 {
            return;
        }
        let found = self.counts.reached() - self.report.data_blocks;
        self.report.metadata_blocks = Some(found);
        if let Some(recorded) = superblock.metadata_blocks.filter(|recorded| *recorded != found) {
            let address = SUPERBLOCK_COPIES[slot.index()][0];
            faults.add(Structure::Superblock, address, Check::Total { field: "metadata_blocks", recorded, found });
        }
    }
}

async fn walk_all<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    known: &Checksummed,
    faults: &mut Faults,
    show: &mut dyn FnMut(Progress),
) -> Result<Walked> {
    let mut counts = Counts::new(superblock.geometry, superblock.groups_in_use);
    let tables = read_tables(reader, superblock, &mut counts, faults).await;
    let mut complete = tables.lost_ids.is_empty() && tables.carcasses_lost == 0;
    let mut shown = Shown::new(superblock.used_blocks, show);
    let mut walker = Walker::new(reader, &mut counts, faults);
    complete &= walk_trees(&mut walker, &tables, known, &mut shown).await?;
    let report = CheckReport {
        nodes: walker.nodes,
        data_blocks: walker.data_blocks,
        volumes: tables.volumes.len() as u64,
        ..CheckReport::default()
    };
    Ok(Walked { tables, counts, complete, report })
}

async fn finish<S: Storage>(
    reader: &mut Reader<'_, S>,
    walked: Walked,
    space: &Space,
    mut faults: Faults,
) -> Result<CheckReport> {
    attribute(reader, &walked.tables, &mut faults).await?;
    Ok(CheckReport {
        used_blocks: space.used_blocks,
        unaccounted_blocks: space.unaccounted_blocks,
        fault_count: faults.total(),
        copies: faults.copies().to_vec(),
        faults: faults.into_list(),
        ..walked.report
    })
}

/// Walks every volume and every carcass, and compares what the volumes' records say of them. Answers whether everything
/// could be reached.
pub(in crate::engine) async fn walk_trees<S: Storage>(
    walker: &mut Walker<'_, '_, S>,
    tables: &Tables,
    known: &Checksummed,
    visitor: &mut impl Visitor,
) -> Result<bool> {
    let mut complete = true;
    // What carcasses have not given back yet still counts.
    let settled = tables.carcasses.is_empty() && tables.carcasses_lost == 0;
    for volume in tables.sealed_first() {
        let record = &volume.record;
        complete &= volume.attributes.is_some();
        let tree = Tree::of(record);
        let sum = if record.flags.sealed {
            let geometry = walker.reader.geometry;
            let mut sealed = Sealed { geometry, known, inner: &mut *visitor, without: None, lost: false };
            let sum = walker.walk(&tree, &mut sealed).await?;
            if let Some(block) = sealed.without {
                let of = (record.id, record.name.clone());
                walker.faults.add_of(&of, Structure::ChecksumPage, block, WITHOUT_CHECKSUM);
            }
            sum
        } else {
            walker.walk(&tree, visitor).await?
        };
        let Some(sum) = sum.filter(|sum| sum.whole) else {
            complete = false;
            continue;
        };
        for (field, recorded, found) in [
            ("own_blocks", record.own_blocks, sum.own),
            ("mapped_blocks", record.mapped_blocks, sum.mapped),
            ("in_place_blocks", record.in_place_blocks, sum.in_place),
        ] {
            if settled && recorded != found {
                let check = Check::Total { field, recorded, found };
                let of = (record.id, record.name.clone());
                walker.faults.add_of(&of, Structure::VolumeRecord, volume.address, check);
            }
        }
    }
    for carcass in &tables.carcasses {
        let sum = walker.walk(&carcass_tree(carcass), visitor).await?;
        complete &= sum.is_some_and(|sum| sum.whole);
    }
    Ok(complete)
}

/// What a carcass has left. One that is only counted has all of it.
pub(in crate::engine) fn carcass_tree(carcass: &Carcass) -> Tree {
    let first = carcass.first.0;
    let eaten = if carcass.counting { 0 } else { first + carcass.cursor };
    let Carcass { entry, level, created_at, .. } = *carcass;
    // What of it may be overwritten in place is nobody's question.
    Tree { entry, level, first, eaten, created_at, shared_at: Clock(CLOCK_MAX) }
}

/// The journal: its chain, and whether its changes can be made.
///
/// Answers how many of the changes can be made.
pub(in crate::engine) fn check_journal(
    superblock: &Superblock,
    tables: &Tables,
    tail: &Tail,
    ended: Result<()>,
    faults: &mut Faults,
) -> usize {
    faults.add_journal(tail, ended);
    let mut known: FxHashMap<u64, String> =
        tables.volumes.iter().map(|found| (found.record.id.0, found.record.name.clone())).collect();
    let lost = |id: u64| tables.lost_ids.iter().any(|range| range.contains(&id));
    for (position, (lsn, record)) in tail.records.iter().enumerate() {
        if let Some((address, check)) = impossible(&superblock.geometry, &known, &lost, record) {
            tracing::warn!("change {lsn} cannot be made: {check}");
            let ids = named_volumes(record);
            let new_name = match record {
                Record::VolumeCreated(new) | Record::VolumeShared { created: new, .. } => Some(&new.name),
                _ => None,
            };
            let touched = known.iter().find(|(id, name)| ids.contains(id) || Some(*name) == new_name);
            let touched = touched.map(|(id, name)| (VolumeId(*id), name.clone()));
            faults.add_found(Corrupt { structure: Structure::Record, address, check }, false, touched.as_ref());
            return position;
        }
        match record {
            Record::VolumeCreated(new) | Record::VolumeChanged(new) | Record::VolumeShared { created: new, .. } => {
                known.insert(new.id.0, new.name.clone());
            }
            Record::VolumeDeleted { volume } => {
                known.remove(&volume.0);
            }
            _ => {}
        }
    }
    tail.records.len()
}

/// What keeps a change from being made after those before it, and the block that it is about. What opening refuses is all
/// here.
fn impossible(
    geometry: &Geometry,
    known: &FxHashMap<u64, String>,
    lost: &impl Fn(u64) -> bool,
    record: &Record,
) -> Option<(PoolBlock, Check)> {
    let mut outside = None;
    record.named_blocks(|address, count| {
        if !bounds::holds(geometry, address, count) {
            outside = Some((address, Check::OutOfBounds { field: "pool_block", value: address.0 }));
        }
    });
    if outside.is_some() {
        return outside;
    }
    let unknown = named_volumes(record).into_iter().find(|id| !known.contains_key(id) && !lost(*id));
    if let Some(value) = unknown {
        return Some((PoolBlock(0), Check::OutOfBounds { field: "volume", value }));
    }
    let named = |name: &String, own: Option<u64>| known.iter().any(|(id, other)| other == name && Some(*id) != own);
    let why = match record {
        Record::VolumeCreated(new) | Record::VolumeShared { created: new, .. }
            if known.contains_key(&new.id.0) || named(&new.name, None) =>
        {
            "a new volume is there already"
        }
        Record::VolumeChanged(new) if named(&new.name, Some(new.id.0)) => "two volumes have one name",
        Record::VolumeRolledBack { volume, snapshot, .. } if volume == snapshot => "a volume is rolled back to itself",
        _ => return None,
    };
    Some((PoolBlock(0), Check::Inconsistent(why)))
}

/// Volumes that must be there for a change to be made.
pub(in crate::engine) fn named_volumes(record: &Record) -> Vec<u64> {
    match record {
        Record::Map { volume, .. } | Record::Unmap { volume, .. } | Record::VolumeDeleted { volume } => vec![volume.0],
        Record::VolumeChanged(record) => vec![record.id.0],
        Record::VolumeShared { origin, .. } => vec![origin.0],
        Record::VolumeRolledBack { volume, snapshot, .. } => vec![volume.0, snapshot.0],
        Record::VolumeCreated(_) | Record::PoolGrown { .. } => Vec::new(),
    }
}

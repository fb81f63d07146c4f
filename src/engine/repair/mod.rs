//! Repair: keeps everything that can be read, and makes the rest consistent with it.
//!
//! 1. A check finds what is wrong, what is lost, and every block that anything holds.
//! 2. Nodes that have lost children are written anew, with holes in their place, and the nodes above them: to free blocks.
//! 3. What came of it is walked again; it must be whole. That walk gives the counts.
//! 4. Volume table, carcass table and space map are written anew; bad copies of pairs get what the good ones hold; behind a
//!    break in the journal nothing is left that could be taken for more of it.
//! 5. The new superblock.
//!
//! Until the last step the pool's present superblock leads to nothing that was written over, but for blocks that were bad:
//! cut short, a repair has made nothing worse. The pool says then that it is unfinished, and the repair can be begun again.
//! The journal's good changes stay, and are made when the pool is opened. Where changes in it cannot be made, the others are
//! written to another place in the ring (only in a ring without room for them, over the old ones), and what is behind
//! them goes when the new superblock is durable in one copy.

mod rewrite;

use std::collections::BTreeMap;

use self::rewrite::Rewriter;
use super::Storage;
use super::inspect::{
    Checksummed, Counts, Fault, Faults, GroupFacts, LATE_BIRTH, Progress, Reader, Sealed, Shown, Space, Tables,
    TouchedRange, Tree, UNFINISHED, Visited, Visitor, Walker, add_stubs, attribute, carcass_tree, check_journal,
    compare, compare_total, pass_unfinished, read_space, read_tables, walk_trees,
};
use super::rebuild::{
    FreeBlocks, NewTables, SaveBlocks, Writer, begin_unfinished, find_place, read_group_checksums, read_known_space,
    write_batches, write_space, write_tables,
};
use super::tail::{Tail, read_tail};
use crate::error::{Error, Result, Structure};
use crate::format::{
    Carcass, JOURNAL_FIRST, Record, Root, SUPERBLOCK_COPIES, Slot, Superblock, Unfinished, VolumeRecord,
};
use crate::units::{BLOCK_SIZE, Generation, Lsn, PoolBlock, VolumeId};

/// What a repair did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// What was wrong, the first thousand.
    pub faults: Vec<Fault>,
    /// Faults in all; 0: nothing was done.
    pub fault_count: u64,
    /// Volumes that are as they were, bit for bit.
    pub kept: Vec<String>,
    /// Volumes that have lost something.
    pub lost: Vec<LostRanges>,
    /// Volumes that have lost their attributes.
    pub lost_attributes: Vec<String>,
    /// Ids, from the first up to but without the second, of which no volume is left if there was one.
    pub lost_ids: Vec<(u64, u64)>,
    /// Volumes whose records are lost, and which hold what changes in the journal put there.
    pub from_journal: Vec<String>,
    /// Snapshots that are sealed no longer: some of their blocks have lost their checksums.
    pub unsealed: Vec<String>,
    /// Changes in the journal that will be made when the pool is opened.
    pub changes_kept: u64,
    /// The first change that is lost, if any is.
    pub changes_lost_from: Option<u64>,
    /// Nodes written anew.
    pub nodes_rewritten: u64,
    /// Blocks of pairs that were made what their copies are.
    pub copies_rewritten: u64,
    /// Blocks written in all.
    pub blocks_written: u64,
}

/// What a volume has lost: it reads as zeros there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostRanges {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// The ranges, ascending; none where all of it is lost.
    pub ranges: Vec<TouchedRange>,
    /// Whether there are more than are listed.
    pub more: bool,
}

/// What looking at the pool has shown.
struct Found {
    superblock: Superblock,
    slot: Slot,
    tables: Tables,
    tail: Tail,
    /// Whether the journal's chain ends as it should.
    is_journal_whole: bool,
    /// How many of its changes can be made.
    possible: usize,
    /// Every block that anything holds.
    counts: Counts,
    groups: Vec<Option<GroupFacts>>,
    checksummed: Checksummed,
    faults: Faults,
}

/// Repairs the pool on `storage`, which nobody else uses. `save` gets every block that is about to be written over; what it
/// refuses is not written.
///
/// # Errors
/// [`Error::InvalidInput`], [`Error::Incompatible`] and [`Error::Corrupt`] when there is no superblock to begin with;
/// [`Error::NoSpace`] when not enough blocks are free for new nodes; [`Error::Unfinished`] where a restore was not finished;
/// [`Error::Io`].
pub async fn repair_metadata<'a, S: Storage>(
    storage: &'a S,
    save: Option<SaveBlocks<'a>>,
    show: &mut dyn FnMut(Progress),
) -> Result<RepairReport> {
    let found = look(storage, show).await?;
    let mut report = RepairReport { fault_count: found.faults.total(), ..RepairReport::default() };
    if report.fault_count == 0 {
        report.kept = found.tables.volumes.iter().map(|volume| volume.record.name.clone()).collect();
        return Ok(report);
    }
    let mut writer = Writer::new(storage, save);
    rebuild(storage, found, &mut writer, &mut report).await?;
    report.blocks_written = writer.written;
    Ok(report)
}

async fn look<S: Storage>(storage: &S, show: &mut dyn FnMut(Progress)) -> Result<Found> {
    let mut faults = Faults::default();
    let passed = pass_unfinished(storage, &mut faults).await?;
    if passed.unfinished == Some(Unfinished::Restore) {
        return Err(Unfinished::Restore.into());
    }
    let (superblock, slot) = passed.chosen?;
    if passed.unfinished.is_some() && faults.total() == 0 {
        faults.add(Structure::Superblock, SUPERBLOCK_COPIES[slot.other().index()][0], UNFINISHED);
    }
    if superblock.is_read_only() {
        return Err(Error::Incompatible("the pool has features that this build cannot write".into()));
    }
    let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
    let mut counts = Counts::new(superblock.geometry, superblock.groups_in_use);
    let mut tables = read_tables(&mut reader, &superblock, &mut counts, &mut faults).await;
    let mut complete = tables.lost_ids.is_empty() && tables.carcasses_lost == 0;
    let mut groups = Vec::new();
    read_space(&mut reader, &superblock, &mut faults, |_, facts| groups.push(facts)).await;
    let checksummed = Checksummed::take(&mut groups);
    let mut walker = Walker::new(&mut reader, &mut counts, &mut faults);
    let mut shown = Shown::new(superblock.used_blocks, show);
    complete &= walk_trees(&mut walker, &tables, &checksummed, &mut shown).await?;
    let mut space = Space::default();
    for facts in &groups {
        compare(&superblock.geometry, facts.as_ref(), &counts, complete, &mut faults, &mut space);
    }
    compare_total(&superblock, slot, &space, &mut faults);
    let (tail, ended) = read_tail(storage, &superblock).await;
    let is_journal_whole = ended.is_ok();
    let possible = check_journal(&superblock, &tables, &tail, ended, &mut faults);
    attribute(&mut reader, &tables, &mut faults).await?;
    add_stubs(&superblock, &mut tables, &tail);
    Ok(Found { superblock, slot, tables, tail, is_journal_whole, possible, counts, groups, checksummed, faults })
}

async fn rebuild<S: Storage>(
    storage: &S,
    found: Found,
    writer: &mut Writer<'_, S>,
    report: &mut RepairReport,
) -> Result<()> {
    let Found { superblock, slot, tables, tail, is_journal_whole, possible, mut counts, groups, checksummed, faults } =
        found;
    let geometry = superblock.geometry;
    begin_unfinished(storage, writer, &superblock, Some(&superblock), slot.other(), Unfinished::Repair).await?;
    let mut reader = Reader::new(storage, superblock.uuid, geometry);
    let named = named_blocks(&superblock, &tail, possible);
    let is_free = |block: PoolBlock| {
        let Some((group, index)) = geometry.group_of(block) else { return false };
        let recorded = match groups.get(group as usize) {
            Some(Some(facts)) => facts.is_free(&geometry, index),
            // Of a group whose descriptor is lost nothing is known.
            Some(None) => false,
            // It was not in use.
            None => true,
        };
        recorded && named.get(block) == 0
    };
    let mut free = FreeBlocks::new(geometry, superblock.groups_in_use);
    // Second step: nodes without their lost children.
    let mut rewriter = Rewriter::new(superblock.uuid, &mut free, &mut counts, &is_free);
    let (mut records, mut carcasses) = rewrite_trees(&mut reader, &superblock, &tables, &mut rewriter, writer).await?;
    report.nodes_rewritten = rewriter.rewritten();
    writer.flush().await?;
    // Third: the counts of what is there now.
    let mut new_counts = Counts::new(geometry, free.groups_in_use().max(superblock.groups_in_use));
    count_again(&mut reader, &mut records, &mut carcasses, &mut new_counts).await?;
    report.unsealed = unseal(&mut reader, &checksummed, &faults, &mut records).await?;
    for (bad, good) in faults.copies() {
        if let Ok(bytes) = reader.read(*good).await {
            writer.put(*bad, false, &bytes).await?;
            report.copies_rewritten += 1;
        }
    }
    let new = NewTables { uuid: superblock.uuid, clock: superblock.clock, records: &records, carcasses: &carcasses };
    let (volume_table, carcass_table) = write_tables(&new, writer, || {
        let (address, mirrored) = free.take(true, &mut counts, is_free)?;
        new_counts.grow(free.groups_in_use());
        for copy in 0..=u64::from(mirrored) {
            new_counts.add(address.plus(copy), true);
        }
        Ok((address, mirrored))
    })
    .await?;
    let known = read_known_space(&mut reader, &superblock, &mut Faults::default()).await;
    let groups_in_use = free.groups_in_use();
    let mut told = Faults::default();
    let checksums = async |group| read_group_checksums(&mut reader, &known, group, &mut told).await;
    let (group_index, used_blocks) =
        write_space(writer, &superblock.uuid, &geometry, groups_in_use, &known, &new_counts, checksums).await?;
    let generation = superblock.generation.0.checked_add(1).map(Generation);
    let generation = generation.ok_or_else(|| Error::InvalidInput("the pool has no generation left".into()))?;
    let mut new = Superblock {
        generation,
        groups_in_use,
        volume_table,
        carcass_table,
        volume_count: records.len() as u64,
        used_blocks,
        // The next check of the pool in use counts it.
        metadata_blocks: None,
        group_index,
        // What a daemon had published and not recorded does not belong to what is written here.
        session: 0,
        ..superblock.clone()
    };
    let mut kept = tail.batches.clone();
    if possible < tail.records.len() {
        let changes = tail.records.get(..possible).unwrap_or_default();
        let place = find_place(&geometry, changes, &tail.batches).unwrap_or(0);
        kept = write_batches(writer, &new.uuid, generation, place, changes).await?;
        (new.journal_append, new.journal_chain) = (place, 0);
    }
    let [first, second] = SUPERBLOCK_COPIES[slot.other().index()];
    writer.put_durable(first, &new.encode()).await?;
    if possible < tail.records.len() || !is_journal_whole {
        clear_behind(&mut reader, writer, &kept).await?;
    }
    writer.put_durable(second, &new.encode()).await?;
    report.changes_kept = possible as u64;
    let is_cut = possible < tail.records.len() || !is_journal_whole;
    let next = tail.records.get(possible).map_or(tail.last.next(), |(lsn, _)| *lsn);
    report.changes_lost_from = is_cut.then_some(next.0);
    tell(&tables, faults, tail.records.get(..possible).unwrap_or_default(), report);
    Ok(())
}

/// Blocks that the changes to be made name: nothing else may be put there.
fn named_blocks(superblock: &Superblock, tail: &Tail, possible: usize) -> Counts {
    let mut named = Counts::new(superblock.geometry, superblock.geometry.group_count());
    for (_, record) in tail.records.iter().take(possible) {
        record.named_blocks(|address, count| {
            // Those outside the pool are of a change that cannot be made.
            for offset in 0..count.min(superblock.geometry.pool_blocks) {
                named.add(address.plus(offset), false);
            }
        });
    }
    named
}

/// Writes the trees anew where they have lost something. Answers the records and carcasses that are left.
async fn rewrite_trees<S: Storage>(
    reader: &mut Reader<'_, S>,
    superblock: &Superblock,
    tables: &Tables,
    rewriter: &mut Rewriter<'_>,
    writer: &mut Writer<'_, S>,
) -> Result<(Vec<VolumeRecord>, Vec<Carcass>)> {
    // The same walk as before, with the same blocks counted before it: it finds the same to be lost.
    let (mut counts, mut told) = (Counts::new(superblock.geometry, superblock.groups_in_use), Faults::default());
    read_tables(reader, superblock, &mut counts, &mut told).await;
    let mut walker = Walker::new(reader, &mut counts, &mut told);
    let mut records = Vec::new();
    for volume in tables.sealed_first() {
        let mut record = volume.record.clone();
        let Root { entry, level } = record.root;
        let sum = walker.walk(&Tree::of(&record), rewriter).await?;
        record.root = match sum {
            None => Root::empty(entry.birth),
            Some(_) => Root { entry: rewriter.replaced(entry), level },
        };
        if !sum.is_some_and(|sum| sum.whole) {
            // What was sealed was another content.
            record.flags.sealed = false;
            record.digest = None;
        }
        if volume.attributes.is_none() {
            (record.attributes, record.attributes_bytes) = (Vec::new(), 0);
        }
        rewriter.write_out(writer).await?;
        records.push(record);
    }
    records.sort_unstable_by_key(|record| record.id);
    let mut carcasses = Vec::new();
    for carcass in &tables.carcasses {
        if walker.walk(&carcass_tree(carcass), rewriter).await?.is_some() {
            carcasses.push(Carcass { entry: rewriter.replaced(carcass.entry), ..*carcass });
        }
        rewriter.write_out(writer).await?;
    }
    Ok((records, carcasses))
}

/// Takes the seals from volumes of which a block has lost its checksum; those of the other blocks stay. Answers their names.
async fn unseal<S: Storage>(
    reader: &mut Reader<'_, S>,
    known: &Checksummed,
    faults: &Faults,
    records: &mut [VolumeRecord],
) -> Result<Vec<String>> {
    let may_lack = faults.list().iter().any(|fault| {
        let structure = fault.found.structure;
        matches!(structure, Structure::ChecksumPage | Structure::GroupDescriptor | Structure::GroupIndex)
            && !fault.has_copy
    });
    if !may_lack && faults.total() <= faults.list().len() as u64 {
        return Ok(Vec::new());
    }
    let geometry = reader.geometry;
    let mut unsealed = Vec::new();
    for record in records.iter_mut().filter(|record| record.flags.sealed) {
        // Each by itself: what is shared with another is looked at again.
        let (mut counts, mut told) = (Counts::new(geometry, geometry.group_count()), Faults::default());
        let mut sealed = Sealed { geometry, known, inner: &mut Quiet, without: None, lost: false };
        let tree = Tree::of(record);
        Walker::new(reader, &mut counts, &mut told).walk(&tree, &mut sealed).await?;
        if sealed.without.is_some() || sealed.lost {
            record.flags.sealed = false;
            record.digest = None;
            unsealed.push(record.name.clone());
        }
    }
    Ok(unsealed)
}

/// A visitor that wants nothing.
struct Quiet;

impl Visitor for Quiet {
    fn node(&mut self, _: &Visited) -> Result<()> {
        Ok(())
    }
}

/// Walks what is to be the pool, fills in its counts and what the records say of the whole: with what carcasses have not
/// given back yet settled already, since nobody knows it of those that are lost.
async fn count_again<S: Storage>(
    reader: &mut Reader<'_, S>,
    records: &mut [VolumeRecord],
    carcasses: &mut [Carcass],
    counts: &mut Counts,
) -> Result<()> {
    for record in records.iter() {
        for block in &record.attributes {
            counts.add(block.address, true);
        }
    }
    let mut told = Faults::default();
    let mut walker = Walker::new(reader, counts, &mut told);
    let mut whole = true;
    for record in records {
        let sum = walker.walk(&Tree::of(record), &mut Quiet).await?;
        whole &= sum.is_some_and(|sum| sum.whole);
        if let Some(sum) = sum {
            (record.own_blocks, record.mapped_blocks) = (sum.own, sum.mapped);
            record.in_place_blocks = sum.in_place;
        }
    }
    for carcass in carcasses {
        if carcass.account {
            let cursor = if carcass.counting { 0 } else { carcass.cursor };
            *carcass = Carcass { account: false, counting: false, cursor, ..*carcass };
        }
        whole &= walker.walk(&carcass_tree(carcass), &mut Quiet).await?.is_some_and(|sum| sum.whole);
    }
    match told.list().iter().find(|fault| !fault.has_copy && !whole) {
        None => Ok(()),
        // The medium lost more meanwhile; the superblock has not been touched.
        Some(fault) => Err(fault.found.clone().into()),
    }
}

/// Sets what is in the ring outside the good chain to zero.
async fn clear_behind<S: Storage>(
    reader: &mut Reader<'_, S>,
    writer: &mut Writer<'_, S>,
    kept: &[(u64, u64)],
) -> Result<()> {
    for at in 0..reader.geometry.journal_blocks {
        if kept.iter().any(|(first, blocks)| (*first..first + blocks).contains(&at)) {
            continue;
        }
        let address = JOURNAL_FIRST.plus(at);
        if reader.read(address).await.is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0)) {
            continue;
        }
        writer.put(address, false, &[0; BLOCK_SIZE]).await?;
    }
    Ok(())
}

/// Sorts what was wrong into what that means for the volumes, those that the journal's changes make among them.
fn tell(tables: &Tables, faults: Faults, changes: &[(Lsn, Record)], report: &mut RepairReport) {
    report.faults = faults.into_list();
    let mut lost: BTreeMap<VolumeId, LostRanges> = BTreeMap::new();
    for fault in &report.faults {
        let is_loss = !fault.has_copy && fault.found.check != LATE_BIRTH;
        if !is_loss || !matches!(fault.found.structure, Structure::Node | Structure::Data) {
            continue;
        }
        for touched in &fault.touched {
            let entry = lost.entry(touched.volume).or_insert_with(|| LostRanges {
                volume: touched.volume,
                name: touched.name.clone(),
                ranges: Vec::new(),
                more: false,
            });
            entry.ranges.extend(&touched.ranges);
            entry.more |= fault.touches_more;
        }
    }
    let mut names: BTreeMap<VolumeId, String> =
        tables.volumes.iter().map(|volume| (volume.record.id, volume.record.name.clone())).collect();
    let all = |volume: VolumeId, name: &str| LostRanges { volume, name: name.into(), ranges: Vec::new(), more: false };
    for volume in tables.volumes.iter().filter(|volume| volume.is_stub) {
        lost.insert(volume.record.id, all(volume.record.id, &volume.record.name));
    }
    for (_, change) in changes {
        let (from, to) = match change {
            Record::VolumeShared { origin, created, .. } => {
                names.insert(created.id, created.name.clone());
                (origin, created.id)
            }
            Record::VolumeRolledBack { volume, snapshot, .. } => (snapshot, *volume),
            _ => continue,
        };
        if let (Some(known), Some(name)) = (lost.get(from).cloned(), names.get(&to)) {
            lost.insert(to, LostRanges { volume: to, name: name.clone(), ..known });
        }
    }
    for entry in lost.values_mut() {
        entry.ranges.sort_unstable_by_key(|range| range.offset_bytes);
        entry.ranges.dedup();
    }
    for volume in &tables.volumes {
        let name = &volume.record.name;
        if volume.is_stub {
            lost.remove(&volume.record.id);
            report.from_journal.push(name.clone());
        } else if volume.attributes.is_none() {
            report.lost_attributes.push(name.clone());
        } else if !lost.contains_key(&volume.record.id) {
            report.kept.push(name.clone());
        }
    }
    report.lost = lost.into_values().collect();
    report.lost_ids = tables.lost_ids.iter().map(|range| (range.start, range.end)).collect();
}

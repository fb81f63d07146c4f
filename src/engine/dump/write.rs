//! Dumping: a walk over everything, written out as it goes.

use std::io::Write;

use super::lines::{
    CarcassLine, ChangeLine, ChecksumsLine, EndLine, FaultLine, Line, NOTE, NodeLine, PoolLine, Run, VERSION,
    VolumeLine,
};
use crate::engine::Storage;
use crate::engine::inspect::{
    Counts, Fault, Faults, Progress, Reader, Tables, Tree, Visited, Visitor, Walker, add_stubs, carcass_tree,
    read_superblocks, read_tables,
};
use crate::engine::rebuild::{read_group_checksums, read_known_space};
use crate::engine::tail::read_tail;
use crate::error::{Error, Result};
use crate::format::{ENTRIES_PER_NODE, Entry, EntryKind, GROUP_BLOCKS, Root, Superblock, VolumeRecord};
use crate::units::PoolBlock;

/// What a dump has left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DumpReport {
    /// What is damaged, the first thousand.
    pub faults: Vec<Fault>,
    /// Faults in all.
    pub fault_count: u64,
    /// Nodes written.
    pub nodes: u64,
    /// Volumes written.
    pub volumes: u64,
}

/// Writes lines and counts them.
struct Output<'a, W: Write> {
    to: W,
    end: EndLine,
    used_blocks: u64,
    show: &'a mut dyn FnMut(Progress),
}

impl<W: Write> Output<'_, W> {
    fn line(&mut self, line: &Line) -> Result<()> {
        serde_json::to_writer(&mut self.to, line).map_err(std::io::Error::from).map_err(failed)?;
        self.to.write_all(b"\n").map_err(failed)
    }
}

impl<W: Write> Output<'_, W> {
    /// The checksums of a group's blocks, a line for each run of at most 1024.
    fn checksums(&mut self, start: PoolBlock, known: impl Fn(usize) -> Option<u32>) -> Result<()> {
        let mut run: Option<ChecksumsLine> = None;
        for index in 0..GROUP_BLOCKS as usize {
            match (known(index), &mut run) {
                (Some(checksum), Some(run)) if run.checksums.len() < 1024 => run.checksums.push(checksum),
                (found, _) => {
                    let next = found
                        .map(|checksum| ChecksumsLine { block: start.0 + index as u64, checksums: vec![checksum] });
                    self.run(std::mem::replace(&mut run, next))?;
                }
            }
        }
        self.run(run)
    }

    fn run(&mut self, run: Option<ChecksumsLine>) -> Result<()> {
        let Some(run) = run else { return Ok(()) };
        self.end.checksums += run.checksums.len() as u64;
        self.line(&Line::Checksums(run))
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::io("write of the dump", error)
}

impl<W: Write> Visitor for Output<'_, W> {
    fn node(&mut self, visited: &Visited) -> Result<()> {
        let entries = runs(visited);
        let line = NodeLine {
            block: visited.entry.address.0,
            mirrored: visited.entry.mirrored,
            level: visited.level,
            first: visited.first,
            entries,
        };
        self.end.nodes += 1;
        self.line(&Line::Node(line))
    }

    fn progress(&mut self, reached_blocks: u64) {
        if reached_blocks.is_multiple_of(256) {
            (self.show)(Progress { reached_blocks, used_blocks: self.used_blocks });
        }
    }
}

/// The entries of a node, those that are the same or follow each other together. What is not there is a hole.
fn runs(visited: &Visited) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for index in 0..ENTRIES_PER_NODE {
        let entry = visited.node.entry(index);
        let entry = if visited.missing.contains(index) { Entry::hole(entry.birth) } else { entry };
        let (birth, address) = (entry.birth.0, entry.address.0);
        let follows = |(count, last_birth, start): &Run| {
            let next = if *start == 0 { 0 } else { start + count };
            *last_birth == birth && next == address && entry.kind != EntryKind::Node
        };
        match runs.last_mut() {
            Some(run) if follows(run) => run.0 += 1,
            _ => runs.push((1, birth, address)),
        }
    }
    runs
}

/// Dumps a pool that nobody uses, as far as it can be read, to `to`.
///
/// # Errors
/// As a check's, and when `to` takes no more.
pub async fn dump_metadata<S: Storage>(
    storage: &S,
    to: impl Write,
    show: &mut dyn FnMut(Progress),
) -> Result<DumpReport> {
    let mut faults = Faults::default();
    let (superblock, _) = read_superblocks(storage, &mut faults).await?;
    let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
    let mut counts = Counts::new(superblock.geometry, superblock.groups_in_use);
    let mut tables = read_tables(&mut reader, &superblock, &mut counts, &mut faults).await;
    let (tail, ended) = read_tail(storage, &superblock).await;
    add_stubs(&superblock, &mut tables, &tail);
    let mut output = Output { to, end: EndLine::default(), used_blocks: superblock.used_blocks, show };
    output.line(&Line::Pool(pool_line(&superblock)))?;
    let mut told = Faults::default();
    let known = read_known_space(&mut reader, &superblock, &mut told).await;
    for group in known.groups() {
        read_group_checksums(&mut reader, &known, group, &mut told).await;
    }
    if told.total() > 0 {
        // Whose checksums these are is not looked for: nothing is dumped as sealed that may lack some.
        for volume in &mut tables.volumes {
            (volume.record.flags.sealed, volume.record.digest) = (false, None);
        }
    }
    let mut walker = Walker::new(&mut reader, &mut counts, &mut faults);
    dump_trees(&mut walker, &tables, &mut output).await?;
    for group in known.groups() {
        let Some(checksums) = read_group_checksums(&mut reader, &known, group, &mut Faults::default()).await else {
            continue;
        };
        let start = superblock.geometry.group_start(group);
        let held = |index: usize| counts.get(start.plus(index as u64)) > 0;
        let known = |index: usize| checksums.get(index).filter(|_| held(index));
        output.checksums(start, known)?;
    }
    faults.extend(told);
    for (lsn, record) in &tail.records {
        output.end.changes += 1;
        output.line(&Line::Change(ChangeLine::of(*lsn, record)))?;
    }
    faults.add_journal(&tail, ended);
    let fault_count = faults.total();
    let faults = faults.into_list();
    for fault in &faults {
        output.line(&Line::Fault(FaultLine {
            block: fault.found.address.0,
            blocks: fault.blocks,
            structure: fault.found.structure.to_string(),
            check: fault.found.check.to_string(),
            has_copy: fault.has_copy,
        }))?;
    }
    output.end.faults = fault_count;
    let end = std::mem::take(&mut output.end);
    let (nodes, volumes) = (end.nodes, end.volumes);
    output.line(&Line::End(end))?;
    output.to.flush().map_err(failed)?;
    Ok(DumpReport { faults, fault_count, nodes, volumes })
}

fn pool_line(superblock: &Superblock) -> PoolLine {
    PoolLine {
        dump_version: VERSION,
        note: NOTE.into(),
        uuid: superblock.uuid,
        name: superblock.name.clone(),
        pool_blocks: superblock.geometry.pool_blocks,
        journal_blocks: superblock.geometry.journal_blocks,
        groups_in_use: superblock.groups_in_use,
        clock: superblock.clock.0,
        lsn: superblock.lsn.0,
        next_volume: superblock.next_volume.0,
        next_carcass: superblock.next_carcass,
        transaction_id: superblock.transaction_id,
        size_limit_bytes: superblock.size_limit_bytes,
        verify_on_read: superblock.verify_on_read,
        compatible: superblock.compatible,
        read_only_compatible: superblock.read_only_compatible,
    }
}

/// What was sealed was another content than what is left.
fn unsealed(record: &VolumeRecord) -> VolumeRecord {
    let mut record = record.clone();
    (record.flags.sealed, record.digest) = (false, None);
    record
}

/// Each volume's nodes, as far as no volume before has them, and then the volume; then carcasses.
async fn dump_trees<S: Storage, W: Write>(
    walker: &mut Walker<'_, '_, S>,
    tables: &Tables,
    output: &mut Output<'_, W>,
) -> Result<()> {
    for volume in &tables.volumes {
        let record = &volume.record;
        let sum = walker.walk(&Tree::of(record), output).await?;
        let record = match sum {
            Some(sum) if sum.whole => record.clone(),
            Some(sum) => VolumeRecord {
                own_blocks: sum.own,
                mapped_blocks: sum.mapped,
                in_place_blocks: sum.in_place,
                ..unsealed(record)
            },
            None => VolumeRecord {
                own_blocks: 0,
                mapped_blocks: 0,
                in_place_blocks: 0,
                root: Root::empty(record.root.entry.birth),
                ..unsealed(record)
            },
        };
        output.end.volumes += 1;
        output.line(&Line::Volume(Box::new(VolumeLine::of(&record, volume.attributes.as_ref()))))?;
    }
    for carcass in &tables.carcasses {
        // Of one whose root is lost, nothing can be given back.
        if walker.walk(&carcass_tree(carcass), output).await?.is_some() {
            output.end.carcasses += 1;
            output.line(&Line::Carcass(CarcassLine::of(carcass)))?;
        }
    }
    Ok(())
}

//! Restoring: a dump's metadata written over a pool's, the data left where it is.
//!
//! The first pass reads everything and holds it against itself: what it refuses has changed nothing. The second writes the
//! nodes to the blocks that the dump names, then come records, tables and space map, the changes of the journal, and at
//! last the superblock. Cut short between, the pool is neither the old one nor the new one: it says so and is refused until
//! a restore is done again, which may be of another dump.

use std::collections::{BTreeMap, HashSet};
use std::io::BufRead;

use rustc_hash::FxHashMap;
use uuid::Uuid;

use super::lines::{
    CarcassLine, ChecksumsLine, EndLine, Line, NodeLine, PoolLine, RootLine, VERSION, VolumeLine, wrong,
};
use crate::engine::Storage;
use crate::engine::inspect::{Counts, Faults, GroupChecksums, Passed, Reached, Reader, pass_unfinished};
use crate::engine::rebuild::{
    FreeBlocks, KnownSpace, NewTables, Writer, begin_unfinished, check_fits, read_known_space, write_journal,
    write_space, write_tables,
};
use crate::engine::tree::entry_span;
use crate::error::{Error, Result};
use crate::format::{
    self, AttributeBlockRef, Carcass, ENTRIES_PER_NODE, Entry, Geometry, Node, Place, READ_ONLY_COMPATIBLE_KNOWN,
    Record, Root, SUPERBLOCK_COPIES, Slot, Superblock, Unfinished, VolumeRecord, span_blocks,
};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Clock, Generation, Lsn, PoolBlock, VirtualBlock, VolumeId};

/// Longest line of a dump in bytes: a volume with all the attributes it can have.
const LINE_BYTES: u64 = 4 << 20;

/// What was restored.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RestoreReport {
    /// The pool.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Nodes written.
    pub nodes: u64,
    /// Volumes and snapshots.
    pub volumes: u64,
    /// Faults that the dump tells of: what they touch was not dumped.
    pub faults: u64,
}

/// A node that the dump has defined.
struct Known {
    checksum: u32,
    level: u8,
    mirrored: bool,
    first: u64,
}

/// What the first pass has found.
struct Plan {
    pool: PoolLine,
    geometry: Geometry,
    counts: Counts,
    /// Blocks that changes of the journal name: their content is there already.
    named: Counts,
    known: FxHashMap<u64, Known>,
    records: Vec<VolumeRecord>,
    names: HashSet<String>,
    attributes: Vec<(PoolBlock, Vec<u8>)>,
    carcasses: Vec<Carcass>,
    /// Checksums of data, by the first block of a run.
    checksums: BTreeMap<u64, Vec<u32>>,
    changes: Vec<(Lsn, Record)>,
    end: EndLine,
}

/// Restores a dump to `storage`, which is the pool or a copy of it and which nobody else uses. `open` opens the dump from its
/// start, twice.
///
/// # Errors
/// [`Error::InvalidInput`] for what is no dump, contradicts itself, or is of another pool, and [`Error::Incompatible`]; then
/// nothing has changed.
/// [`Error::NoSpace`]; [`Error::Io`].
pub async fn restore_metadata<S: Storage, R: BufRead>(
    storage: &S,
    mut open: impl FnMut() -> Result<R>,
) -> Result<RestoreReport> {
    let mut plan = read_plan(open()?)?;
    if plan.pool.read_only_compatible & !READ_ONLY_COMPATIBLE_KNOWN != 0 {
        return Err(Error::Incompatible("the dump has features that this build cannot write".into()));
    }
    let Present { current, newest } = read_present(storage, &plan).await?;
    let known_space = match &current {
        Some((superblock, _)) => {
            let mut reader = Reader::new(storage, superblock.uuid, superblock.geometry);
            read_known_space(&mut reader, superblock, &mut Faults::default()).await
        }
        None => KnownSpace::default(),
    };
    let current = current.as_ref();
    let slot = current.map_or(Slot::A, |(_, slot)| slot.other());
    let generation = Generation(newest.0 + 1);
    check_fits(&plan.geometry, &plan.changes)?;
    let described = Superblock { generation, ..empty_superblock(&plan.pool, plan.geometry) };
    if Superblock::decode(&described.encode()).is_err() {
        return Err(wrong("the pool has no generation left"));
    }
    let mut writer = Writer::new(storage, None);
    let current = current.map(|(superblock, _)| superblock);
    begin_unfinished(storage, &mut writer, &described, current, slot, Unfinished::Restore).await?;
    write_nodes(&mut writer, &plan, open()?).await?;
    for (address, bytes) in &plan.attributes {
        writer.put(*address, false, bytes).await?;
    }
    let mut free = FreeBlocks::new(plan.geometry, plan.pool.groups_in_use);
    let (uuid, clock, geometry) = (plan.pool.uuid, Clock(plan.pool.clock), plan.geometry);
    let (counts, named) = (&mut plan.counts, &plan.named);
    let new = NewTables { uuid, clock, records: &plan.records, carcasses: &plan.carcasses };
    let take = || free.take(true, counts, |block| named.get(block) == 0);
    let (volume_table, carcass_table) = write_tables(&new, &mut writer, take).await?;
    let groups_in_use = free.groups_in_use();
    let checksums = async |group| plan.group_checksums(group);
    let (group_index, used_blocks) =
        write_space(&mut writer, &uuid, &geometry, groups_in_use, &known_space, &plan.counts, checksums).await?;
    write_journal(&mut writer, &uuid, generation, &geometry, &plan.changes).await?;
    let superblock = Superblock {
        groups_in_use,
        volume_table,
        carcass_table,
        volume_count: plan.records.len() as u64,
        used_blocks,
        group_index,
        ..described
    };
    for address in SUPERBLOCK_COPIES[slot.index()] {
        writer.put_durable(address, &superblock.encode()).await?;
    }
    Ok(RestoreReport {
        uuid,
        name: plan.pool.name,
        nodes: plan.end.nodes,
        volumes: plan.end.volumes,
        faults: plan.end.faults,
    })
}

/// What the file holds.
struct Present {
    /// The superblock that counts and its slot, when there is one.
    current: Option<(Superblock, Slot)>,
    /// The highest generation of any copy.
    newest: Generation,
}

/// Reads the superblocks that are there, as far as they can be read.
async fn read_present<S: Storage>(storage: &S, plan: &Plan) -> Result<Present> {
    if storage.size_bytes() < plan.geometry.pool_blocks.saturating_mul(BLOCK_BYTES) {
        return Err(wrong(format!("the pool has {} blocks, and the file is smaller", plan.geometry.pool_blocks)));
    }
    let Passed { chosen, pools, newest, .. } = pass_unfinished(storage, &mut Faults::default()).await?;
    let uuid = plan.pool.uuid;
    if let Some(other) = pools.first().filter(|_| !pools.contains(&uuid)) {
        return Err(wrong(format!("it is of pool {uuid}, and the file holds pool {other}")));
    }
    match chosen {
        Ok(current) => Ok(Present { current: Some(current), newest }),
        Err(error @ Error::Incompatible(_)) => Err(error),
        Err(_) => Ok(Present { current: None, newest }),
    }
}

/// Reads the lines of a dump, each bounded.
fn lines(mut from: impl BufRead) -> impl Iterator<Item = Result<Line>> {
    let mut number = 0_u64;
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        number += 1;
        let read = std::io::Read::take(&mut from, LINE_BYTES).read_until(b'\n', &mut line);
        match read {
            Ok(0) => None,
            Ok(_) => {
                let parsed = serde_json::from_slice(&line);
                Some(parsed.map_err(|error| wrong(format!("line {number}: {error}"))))
            }
            Err(error) => Some(Err(Error::io("read of the dump", error))),
        }
    })
}

fn read_plan(from: impl BufRead) -> Result<Plan> {
    let mut lines = lines(from);
    let Some(Line::Pool(pool)) = lines.next().transpose()? else {
        return Err(wrong("it does not begin with the pool; is this a file that plywood pool dump wrote?"));
    };
    let geometry = check_pool(&pool)?;
    let groups_in_use = pool.groups_in_use;
    let mut plan = Plan {
        pool,
        geometry,
        counts: Counts::new(geometry, groups_in_use),
        named: Counts::new(geometry, geometry.group_count()),
        known: FxHashMap::default(),
        records: Vec::new(),
        names: HashSet::new(),
        attributes: Vec::new(),
        carcasses: Vec::new(),
        checksums: BTreeMap::new(),
        changes: Vec::new(),
        end: EndLine::default(),
    };
    let mut ended = false;
    for line in lines {
        if ended {
            return Err(wrong("it goes on after its end"));
        }
        match line? {
            Line::Pool(_) => return Err(wrong("it holds two pools")),
            Line::Node(line) => plan.add_node(&line)?,
            Line::Volume(line) => plan.add_volume(&line)?,
            Line::Carcass(line) => plan.add_carcass(&line)?,
            Line::Checksums(line) => plan.add_checksums(line)?,
            Line::Change(line) => plan.add_change(line.change()?)?,
            Line::Fault(_) => {}
            Line::End(end) => {
                plan.end.faults = end.faults;
                ended = end == plan.end;
                if !ended {
                    return Err(wrong("lines are missing"));
                }
            }
        }
    }
    if !ended {
        return Err(wrong("it was cut off: its last line is missing"));
    }
    plan.check()?;
    Ok(plan)
}

/// What a superblock will have to hold.
fn check_pool(pool: &PoolLine) -> Result<Geometry> {
    if pool.dump_version != VERSION {
        return Err(Error::Incompatible(format!(
            "the dump has version {}, this build knows {VERSION}; use a newer plywood",
            pool.dump_version
        )));
    }
    let bytes = |blocks: u64| blocks.checked_mul(BLOCK_BYTES).ok_or_else(|| wrong("a size is too large"));
    let geometry = Geometry::new(bytes(pool.pool_blocks)?, bytes(pool.journal_blocks)?)?;
    if pool.name.len() > format::POOL_NAME_BYTES_MAX || pool.groups_in_use > geometry.group_count() {
        return Err(wrong("a field of the pool is out of bounds"));
    }
    // Whatever its decoder refuses would be damage on disk.
    Superblock::decode(&empty_superblock(pool, geometry).encode())
        .map_err(|error| wrong(format!("the pool: {error}")))?;
    Ok(geometry)
}

/// What the superblock says before anything has been restored.
fn empty_superblock(pool: &PoolLine, geometry: Geometry) -> Superblock {
    Superblock {
        uuid: pool.uuid,
        name: pool.name.clone(),
        read_only_compatible: pool.read_only_compatible,
        compatible: pool.compatible,
        incompatible: 0,
        generation: Generation(1),
        clock: Clock(pool.clock),
        lsn: Lsn(pool.lsn),
        geometry,
        groups_in_use: 0,
        journal_append: 0,
        journal_chain: 0,
        session: 0,
        volume_table: Root::empty(Clock(0)),
        carcass_table: Root::empty(Clock(0)),
        next_volume: VolumeId(pool.next_volume),
        next_carcass: pool.next_carcass,
        transaction_id: pool.transaction_id,
        size_limit_bytes: pool.size_limit_bytes,
        verify_on_read: pool.verify_on_read,
        scrub: format::ScrubState::default(),
        volume_count: 0,
        used_blocks: 0,
        metadata_blocks: None,
        group_index: Vec::new(),
    }
}

impl Plan {
    fn add_checksums(&mut self, line: ChecksumsLine) -> Result<()> {
        let (first, count) = (PoolBlock(line.block), line.checksums.len() as u64);
        let inside = self
            .geometry
            .group_of(first)
            .is_some_and(|(group, index)| count > 0 && u64::from(index) + count <= self.geometry.group_blocks(group));
        let overlaps = self.checksums.range(..line.block.saturating_add(count)).next_back();
        let overlaps = overlaps.is_some_and(|(start, known)| start + known.len() as u64 > line.block);
        if !inside || overlaps {
            return Err(wrong(format!("checksums at block {first}: they are outside of a group, or there twice")));
        }
        self.end.checksums += count;
        self.checksums.insert(line.block, line.checksums);
        Ok(())
    }

    /// The checksums of a group's blocks.
    fn group_checksums(&self, group: u64) -> Option<GroupChecksums> {
        let start = self.geometry.group_start(group).0;
        let runs = self.checksums.range(start..start + self.geometry.group_blocks(group));
        let mut found: Option<GroupChecksums> = None;
        for (first, run) in runs {
            let found = found.get_or_insert_with(GroupChecksums::none);
            for (offset, checksum) in run.iter().enumerate() {
                found.set((first - start) as usize + offset, Some(*checksum));
            }
        }
        found
    }

    /// Builds a node out of its line. Its children have been defined before.
    fn node(&self, line: &NodeLine) -> Result<Node> {
        let what = |why: &str| wrong(format!("node at block {}: {why}", line.block));
        if line.level > format::LEVEL_MAX {
            return Err(what("its level is out of bounds"));
        }
        let mut node = Node::new(Clock(0));
        let mut index = 0;
        for (count, birth, address) in &line.entries {
            if *count == 0 || *count > (ENTRIES_PER_NODE - index) as u64 || *birth >= 1 << 40 {
                return Err(what("its entries are not 256, or a birth is too late"));
            }
            for offset in 0..*count {
                let entry = match (*address, line.level) {
                    (0, _) => Entry::hole(Clock(*birth)),
                    (_, 0) => {
                        let block = address.checked_add(offset).filter(|block| *block < self.geometry.pool_blocks);
                        let block = block.ok_or_else(|| what("it maps a block outside the pool"))?;
                        Entry::block(PoolBlock(block), Clock(*birth))
                    }
                    _ => {
                        let first = line.first.saturating_add(index as u64 * entry_span(line.level));
                        let root = RootLine { node: *address, level: line.level - 1, birth: *birth };
                        self.reference(&root, first).ok_or_else(|| what("a child was not defined before it"))?
                    }
                };
                node.set(index, entry);
                index += 1;
            }
        }
        if index != ENTRIES_PER_NODE {
            return Err(what("it has fewer than 256 entries"));
        }
        Ok(node)
    }

    /// The entry for a node that was defined as what it is referred to.
    fn reference(&self, root: &RootLine, first: u64) -> Option<Entry> {
        let known = self.known.get(&root.node)?;
        let same = known.level == root.level && known.first == first && root.birth < 1 << 40;
        same.then(|| Entry::node(PoolBlock(root.node), known.mirrored, known.checksum, Clock(root.birth)))
    }

    fn count(&mut self, block: PoolBlock, metadata: bool) -> Result<()> {
        match self.counts.add(block, metadata) {
            Reached::First | Reached::Again => Ok(()),
            Reached::Otherwise => Err(wrong(format!("block {block} is both data and metadata"))),
            Reached::Outside => Err(wrong(format!("block {block} is in no group of the pool"))),
        }
    }

    fn add_node(&mut self, line: &NodeLine) -> Result<()> {
        let node = self.node(line)?;
        let what = |why: &str| wrong(format!("node at block {}: {why}", line.block));
        let last = line.block.saturating_add(u64::from(line.mirrored));
        if line.block == 0 || last >= self.geometry.pool_blocks {
            return Err(what("there is no such block"));
        }
        let span = span_blocks(line.level);
        if !line.first.is_multiple_of(span) || line.first > format::VOLUME_BLOCKS_MAX - span {
            return Err(what("it cannot start where it says"));
        }
        for index in 0..ENTRIES_PER_NODE {
            let entry = node.entry(index);
            match entry.kind {
                format::EntryKind::Hole => {}
                format::EntryKind::Block => self.count(entry.address, false)?,
                format::EntryKind::Node => self.count(entry.address, true)?,
            }
        }
        let place = Place::Node { level: line.level, first: VirtualBlock(line.first) };
        let checksum = format::checksum(&self.pool.uuid, place, node.bytes());
        let known = Known { checksum, level: line.level, mirrored: line.mirrored, first: line.first };
        if self.known.insert(line.block, known).is_some() {
            return Err(what("it is defined twice"));
        }
        self.end.nodes += 1;
        Ok(())
    }

    fn root(&mut self, line: &RootLine, what: &str) -> Result<Root> {
        if line.node == 0 && line.level == 0 && line.birth < 1 << 40 {
            return Ok(Root::empty(Clock(line.birth)));
        }
        let entry = self.reference(line, 0).ok_or_else(|| wrong(format!("{what}: its root is not defined")))?;
        self.count(entry.address, true)?;
        Ok(Root { entry, level: line.level })
    }

    fn add_volume(&mut self, line: &VolumeLine) -> Result<()> {
        let what = format!("volume {:?}", line.name());
        let root = self.root(&line.root, &what)?;
        let bytes = format::encode_attributes(&line.attributes()?)?;
        let chunks = bytes.chunks(BLOCK_SIZE);
        if chunks.len() != line.attribute_blocks.len() {
            return Err(wrong(format!("{what}: its attributes take another number of blocks")));
        }
        let mut attributes = Vec::new();
        for (index, (chunk, block)) in chunks.zip(&line.attribute_blocks).enumerate() {
            let address = PoolBlock(*block);
            let place = Place::Attributes { volume: VolumeId(0), index: index as u32 };
            attributes.push(AttributeBlockRef { address, checksum: format::checksum(&self.pool.uuid, place, chunk) });
            if self.counts.get(address) > 0 {
                return Err(wrong(format!("{what}: block {address} holds something else")));
            }
            self.count(address, true)?;
            self.attributes.push((address, chunk.to_vec()));
        }
        // The engine writes whole blocks and says so.
        let record = line.record(root, attributes, bytes.len() as u32)?;
        let too_long =
            record.name.len() > format::VOLUME_NAME_BYTES_MAX || record.account_spans.len() > format::ACCOUNT_SPANS_MAX;
        let checked = if too_long { None } else { VolumeRecord::decode(&record.encode()).ok() };
        // What the decoder refuses, or reads otherwise, would be damage on disk.
        if checked.as_ref() != Some(&record) || record.id.0 >= self.pool.next_volume {
            return Err(wrong(format!("{what}: a field is out of bounds")));
        }
        let after = self.records.last().is_none_or(|last| last.id < record.id);
        if !after || !self.names.insert(record.name.clone()) {
            return Err(wrong(format!("{what}: its id is out of order, or its name is another's")));
        }
        self.records.push(record);
        self.end.volumes += 1;
        Ok(())
    }

    fn add_carcass(&mut self, line: &CarcassLine) -> Result<()> {
        let root = self.known.get(&line.node).filter(|known| known.level == line.level && known.first == line.first);
        let root = root.ok_or_else(|| wrong("a carcass is of a node that is not defined"))?;
        let carcass = line.carcass(root.mirrored, root.checksum);
        if carcass.entry.birth.0 >= 1 << 40 || carcass.created_at.0 >= 1 << 40 || carcass.id >= self.pool.next_carcass {
            return Err(wrong("a carcass has a field out of bounds"));
        }
        let page = format::encode_carcasses(&[carcass]);
        format::decode_carcasses(&page[..], self.geometry.pool_blocks).map_err(wrong)?;
        self.count(carcass.entry.address, true)?;
        self.carcasses.push(carcass);
        self.end.carcasses += 1;
        Ok(())
    }

    fn add_change(&mut self, (lsn, record): (Lsn, Record)) -> Result<()> {
        let last = self.changes.last().map_or(self.pool.lsn, |(lsn, _)| lsn.0);
        if last.checked_add(1) != Some(lsn.0) {
            return Err(wrong(format!("change {lsn} does not follow change {last}")));
        }
        let mut outside = None;
        let (geometry, named) = (self.geometry, &mut self.named);
        record.named_blocks(|address, count| {
            // Bounded before it is walked.
            if address.0.checked_add(count).is_none_or(|end| end > geometry.pool_blocks) {
                outside = Some(address);
                return;
            }
            for offset in 0..count {
                if named.add(address.plus(offset), false) == Reached::Outside {
                    outside = Some(address.plus(offset));
                }
            }
        });
        if let Some(address) = outside {
            return Err(wrong(format!("change {lsn} names block {address}, which is in no group")));
        }
        self.changes.push((lsn, record));
        self.end.changes += 1;
        Ok(())
    }

    /// What can only be said of the whole.
    fn check(&mut self) -> Result<()> {
        let mut pairs = Vec::new();
        for (block, known) in &self.known {
            if self.counts.get(PoolBlock(*block)) == 0 {
                return Err(wrong(format!("nothing points at the node at block {block}")));
            }
            if known.mirrored {
                pairs.push(PoolBlock(block + 1));
            }
        }
        for second in pairs {
            if self.counts.get(second) > 0 {
                return Err(wrong(format!("block {second} is the second of a pair and something else")));
            }
            self.count(second, true)?;
        }
        Ok(())
    }
}

async fn write_nodes<S: Storage>(writer: &mut Writer<'_, S>, plan: &Plan, from: impl BufRead) -> Result<()> {
    for line in lines(from) {
        if let Line::Node(line) = line? {
            let node = plan.node(&line)?;
            writer.put(PoolBlock(line.block), line.mirrored, node.bytes()).await?;
        }
    }
    Ok(())
}

//! A sound pool taken apart: every block of metadata, what it is, and where its checksum stands. With that, any bytes of it
//! can be changed and all sums above made right again, as though the engine itself had written them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use plywood::format::{
    self, BATCH_RECORD_BYTES_MAX, Carcass, Entry, EntryKind, GROUPS_PER_INDEX, GroupDescriptor, GroupIndex,
    JOURNAL_FIRST, Node, Place, Root, SUPERBLOCK_COPIES, Slot, Superblock, VolumeRecord,
};
use plywood::units::{Generation, Lsn, PoolBlock, VirtualBlock, VolumeId};

use super::medium::Medium;

/// Where the places of the carcass table's nodes begin.
const CARCASS_TABLE: u64 = 1 << 62;
const CHECKSUM_IN_ENTRY: usize = 7;

/// A block of metadata, or a pair.
pub struct Part {
    pub place: Place,
    pub mirrored: bool,
    /// Blocks that hold its checksum, and where in them.
    parents: Vec<(PoolBlock, usize)>,
}

/// A batch of the journal that is due.
#[derive(Clone, Copy)]
pub struct Batch {
    pub address: PoolBlock,
    pub blocks: u64,
    pub first: Lsn,
    pub last: Lsn,
    pub checksum: u32,
}

/// A pool whose bytes can be changed.
pub struct Anatomy<'a> {
    medium: &'a mut dyn Medium,
    pub superblock: Superblock,
    pub slot: Slot,
    pub parts: BTreeMap<PoolBlock, Part>,
    pub records: Vec<(Entry, VolumeRecord)>,
    pub carcasses: Vec<Carcass>,
    pub batches: Vec<Batch>,
}

pub fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.into())
}

/// What a table's leaf points at: number, entry, and where the entry's checksum stands.
type Leaf = (u64, Entry, (PoolBlock, usize));

impl<'a> Anatomy<'a> {
    /// Takes a sound pool apart.
    ///
    /// # Errors
    /// Those of the medium, and for a pool that is not sound.
    pub fn of(medium: &'a mut dyn Medium) -> io::Result<Self> {
        let mut newest: Option<(Superblock, Slot)> = None;
        for (slot, copies) in [Slot::A, Slot::B].into_iter().zip(SUPERBLOCK_COPIES) {
            if let Ok(found) = Superblock::decode(&medium.block(copies[0])?)
                && newest.as_ref().is_none_or(|(newest, _)| found.generation > newest.generation)
            {
                newest = Some((found, slot));
            }
        }
        let (superblock, slot) = newest.ok_or_else(|| invalid("there is no sound superblock"))?;
        let (records, carcasses) = (Vec::new(), Vec::new());
        let mut anatomy =
            Self { medium, superblock, slot, parts: BTreeMap::new(), records, carcasses, batches: Vec::new() };
        anatomy.tables()?;
        anatomy.space()?;
        anatomy.journal()?;
        Ok(anatomy)
    }

    /// The two copies of the superblock that counts.
    pub fn copies(&self) -> [PoolBlock; 2] {
        SUPERBLOCK_COPIES[self.slot.index()]
    }

    pub fn block(&self, block: PoolBlock) -> io::Result<Vec<u8>> {
        self.medium.block(block)
    }

    pub fn pool_blocks(&self) -> u64 {
        self.superblock.geometry.pool_blocks
    }

    /// The node at `block`.
    pub fn node(&self, block: PoolBlock, level: u8) -> io::Result<Node> {
        Node::decode(&self.block(block)?, level, self.pool_blocks()).map_err(|check| invalid(check.to_string()))
    }

    fn add(&mut self, block: PoolBlock, mirrored: bool, place: Place, parent: (PoolBlock, usize)) -> bool {
        let is_new = !self.parts.contains_key(&block);
        self.parts.entry(block).or_insert(Part { place, mirrored, parents: Vec::new() }).parents.push(parent);
        is_new
    }

    fn tables(&mut self) -> io::Result<()> {
        let damaged = |check: plywood::error::Check| invalid(check.to_string());
        let top = self.copies()[0];
        for (number, entry, parent) in self.table(self.superblock.volume_table, 0, (top, 256 + CHECKSUM_IN_ENTRY))? {
            self.add(entry.address, entry.mirrored, Place::VolumeRecord(VolumeId(number)), parent);
            let record = VolumeRecord::decode(&self.block(entry.address)?).map_err(damaged)?;
            self.tree(record.root.entry, record.root.level, 0, 0, (entry.address, 48 + CHECKSUM_IN_ENTRY))?;
            for (index, block) in record.attributes.iter().enumerate() {
                let place = Place::Attributes { volume: VolumeId(0), index: index as u32 };
                self.add(block.address, false, place, (entry.address, 528 + 16 * index + 8));
            }
            self.records.push((entry, record));
        }
        let table = self.superblock.carcass_table;
        for (number, entry, parent) in self.table(table, CARCASS_TABLE, (top, 280 + CHECKSUM_IN_ENTRY))? {
            self.add(entry.address, entry.mirrored, Place::CarcassPage(number), parent);
            let page = self.block(entry.address)?;
            for (index, carcass) in
                format::decode_carcasses(&page, self.pool_blocks()).map_err(damaged)?.into_iter().enumerate()
            {
                let eaten = if carcass.counting { 0 } else { carcass.first.0 + carcass.cursor };
                let parent = (entry.address, 64 + 64 * index + 8 + CHECKSUM_IN_ENTRY);
                self.tree(carcass.entry, carcass.level, carcass.first.0, eaten, parent)?;
                self.carcasses.push(carcass);
            }
        }
        Ok(())
    }

    /// Adds the nodes of a table. Answers what its leaves point at, by number.
    fn table(&mut self, root: Root, base: u64, parent: (PoolBlock, usize)) -> io::Result<Vec<Leaf>> {
        let mut leaves = Vec::new();
        let mut waiting = vec![(root.entry, root.level, 0, parent)];
        while let Some((entry, level, first, parent)) = waiting.pop() {
            if entry.kind != EntryKind::Node {
                continue;
            }
            self.add(entry.address, entry.mirrored, Place::TableNode { level, first: base + first }, parent);
            let node = Node::decode_table(&self.block(entry.address)?, level, self.pool_blocks());
            let node = node.map_err(|check| invalid(check.to_string()))?;
            for index in 0..256 {
                let child = (node.entry(index), first + ((index as u64) << (8 * level)));
                let parent = (entry.address, 16 * index + CHECKSUM_IN_ENTRY);
                match (child.0.kind, level) {
                    (EntryKind::Hole, _) => {}
                    (_, 0) => leaves.push((child.1, child.0, parent)),
                    _ => waiting.push((child.0, level - 1, child.1, parent)),
                }
            }
        }
        leaves.sort_unstable_by_key(|(number, ..)| *number);
        Ok(leaves)
    }

    fn tree(&mut self, entry: Entry, level: u8, first: u64, eaten: u64, parent: (PoolBlock, usize)) -> io::Result<()> {
        let mut waiting = vec![(entry, level, first, parent)];
        while let Some((entry, level, first, parent)) = waiting.pop() {
            let place = Place::Node { level, first: VirtualBlock(first) };
            if entry.kind != EntryKind::Node || !self.add(entry.address, entry.mirrored, place, parent) || level == 0 {
                continue;
            }
            let node = self.node(entry.address, level)?;
            for index in 0..256 {
                let at = first + ((index as u64) << (8 * level));
                if at + (1 << (8 * level)) > eaten {
                    waiting.push((node.entry(index), level - 1, at, (entry.address, 16 * index + CHECKSUM_IN_ENTRY)));
                }
            }
        }
        Ok(())
    }

    fn space(&mut self) -> io::Result<()> {
        let (geometry, top) = (self.superblock.geometry, self.copies()[0]);
        for (number, reference) in self.superblock.group_index.clone().into_iter().enumerate() {
            let address = geometry.index_block(number as u64, reference.slot);
            self.add(address, true, Place::GroupIndex(number as u64), (top, 1664 + 8 * number));
            let index = GroupIndex::decode(&self.block(address)?).map_err(|check| invalid(check.to_string()))?;
            let groups = number as u64 * GROUPS_PER_INDEX..self.superblock.groups_in_use;
            for (at, group) in groups.take(GROUPS_PER_INDEX as usize).enumerate() {
                if !index.entries[at].empty {
                    let descriptor = geometry.descriptor_block(group, index.entries[at].slot);
                    self.add(descriptor, true, Place::GroupDescriptor(group), (address, 8 * at));
                    self.pages(group, descriptor)?;
                }
            }
        }
        Ok(())
    }

    fn pages(&mut self, group: u64, address: PoolBlock) -> io::Result<()> {
        let geometry = self.superblock.geometry;
        let found =
            GroupDescriptor::decode(&self.block(address)?, group).map_err(|check| invalid(check.to_string()))?;
        for (page, reference) in found.pages.iter().enumerate().filter(|(_, page)| page.present) {
            let (number, parent) = (page as u32, (address, 64 + 8 * page));
            let block = geometry.page_block(group, number, reference.slot);
            self.add(block, false, Place::SpaceMapPage { group, page: number }, parent);
        }
        for (page, reference) in found.checksum_pages.iter().enumerate().filter(|(_, page)| page.present) {
            let (number, parent) = (page as u32, (address, 320 + 8 * page));
            let block = geometry.checksum_page_block(group, number, reference.slot);
            self.add(block, false, Place::ChecksumPage { group, page: number }, parent);
        }
        Ok(())
    }

    fn journal(&mut self) -> io::Result<()> {
        let (mut at, mut chain) = (self.superblock.journal_append, self.superblock.journal_chain);
        while at < self.superblock.geometry.journal_blocks {
            let address = JOURNAL_FIRST.plus(at);
            let header = format::decode_batch_header(&self.superblock.uuid, &self.block(address)?);
            let Some(header) = header.filter(|header| header.previous == chain) else { break };
            let (blocks, first, last) = (header.blocks, header.first, header.last);
            (chain, at) = (header.checksum, at + blocks);
            self.batches.push(Batch { address, blocks, first, last, checksum: chain });
        }
        Ok(())
    }

    /// Where the next batch would go, what it would follow, and its first change.
    pub fn journal_end(&self) -> (PoolBlock, u32, Lsn) {
        match self.batches.last() {
            Some(last) => (last.address.plus(last.blocks), last.checksum, last.last.next()),
            None => {
                let superblock = &self.superblock;
                (JOURNAL_FIRST.plus(superblock.journal_append), superblock.journal_chain, superblock.lsn.next())
            }
        }
    }

    /// Appends a whole batch. Answers where.
    pub fn append_batch(&mut self, generation: Generation, changes: u64, records: &[u8]) -> io::Result<PoolBlock> {
        let (address, previous, first) = self.journal_end();
        if records.len() > BATCH_RECORD_BYTES_MAX {
            return Err(invalid("the records are too long"));
        }
        let last = Lsn(first.0 + changes - 1);
        let (bytes, _) = format::encode_batch(&self.superblock.uuid, generation, first, last, previous, records);
        for (number, block) in bytes.chunks(4096).enumerate() {
            self.medium.set_block(address.plus(number as u64), block)?;
        }
        Ok(address)
    }

    /// Changes one block, and nothing else.
    pub fn spoil(&mut self, block: PoolBlock, edit: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.block(block)?;
        edit(&mut bytes);
        self.medium.set_block(block, &bytes)
    }

    /// Changes one copy of a superblock, and makes its own checksum right.
    pub fn change_superblock(&mut self, copy: PoolBlock, edit: impl FnOnce(&mut [u8])) -> io::Result<()> {
        self.spoil(copy, |bytes| {
            edit(bytes);
            bytes[12..16].fill(0);
            let own = crc32fast::hash(bytes);
            bytes[12..16].copy_from_slice(&own.to_le_bytes());
        })
    }

    /// Changes a block of metadata, both copies, and makes all sums above right.
    pub fn change(&mut self, block: PoolBlock, edit: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.block(block)?;
        edit(&mut bytes);
        let mut waiting: VecDeque<(PoolBlock, Vec<u8>)> = [(block, bytes)].into();
        let mut tops = BTreeSet::new();
        while let Some((block, bytes)) = waiting.pop_front() {
            let Some(part) = self.parts.get(&block) else {
                tops.insert(block);
                self.medium.set_block(block, &bytes)?;
                continue;
            };
            let (place, mirrored, parents) = (part.place, part.mirrored, part.parents.clone());
            for copy in 0..=u64::from(mirrored) {
                self.medium.set_block(block.plus(copy), &bytes)?;
            }
            let checksum = format::checksum(&self.superblock.uuid, place, &bytes).to_le_bytes();
            for (parent, offset) in parents {
                let mut above = self.block(parent)?;
                above[offset..offset + 4].copy_from_slice(&checksum);
                self.medium.set_block(parent, &above)?;
                waiting.push_back((parent, above));
            }
        }
        if tops.is_empty() { Ok(()) } else { self.seal_superblock() }
    }

    /// Makes both copies of the superblock what the first is, with its own checksum.
    fn seal_superblock(&mut self) -> io::Result<()> {
        let [first, second] = self.copies();
        self.change_superblock(first, |_| ())?;
        let bytes = self.block(first)?;
        self.spoil(second, |other| other.copy_from_slice(&bytes))
    }

    /// The checksum that is recorded for a block, and the one that it has.
    pub fn sums(&self, block: PoolBlock) -> io::Result<(u32, u32)> {
        // The second of a pair has its sum where the first has.
        let of = |at: PoolBlock| self.parts.get(&at).map(|part| (at, part));
        let before = PoolBlock(block.0 - 1);
        let (_, part) =
            of(block).or_else(|| of(before).filter(|(_, part)| part.mirrored)).ok_or_else(|| invalid("no metadata"))?;
        let (parent, offset) = part.parents[0];
        let above = self.block(parent)?;
        let expected = u32::from_le_bytes(above[offset..offset + 4].try_into().map_err(|_| invalid("cut"))?);
        Ok((expected, format::checksum(&self.superblock.uuid, part.place, &self.block(block)?)))
    }

    /// The latest birth that anything gives a node.
    pub fn birth(&self, node: PoolBlock) -> io::Result<u64> {
        let mut latest = 0;
        for (parent, offset) in self.parts.get(&node).map_or(&[][..], |part| &part.parents) {
            let start = offset - CHECKSUM_IN_ENTRY;
            let bytes = self.block(*parent)?;
            let entry = bytes[start..start + 16].try_into().map_err(|_| invalid("cut"))?;
            latest = latest.max(Entry::decode(entry).map_err(|check| invalid(check.to_string()))?.birth.0);
        }
        Ok(latest)
    }

    /// Names of the volumes from whose records a block is reached.
    pub fn reached_from(&self, block: PoolBlock) -> BTreeSet<String> {
        let (mut names, mut waiting, mut seen) = (BTreeSet::new(), vec![block], BTreeSet::new());
        while let Some(block) = waiting.pop() {
            if let Some((_, record)) = self.records.iter().find(|(entry, _)| entry.address == block) {
                names.insert(record.name.clone());
                continue;
            }
            if let Some(part) = self.parts.get(&block)
                && seen.insert(block)
            {
                waiting.extend(part.parents.iter().map(|(parent, _)| *parent));
            }
        }
        names
    }

    /// Names of the volumes that map a block of data.
    pub fn mapped_by(&self, block: PoolBlock) -> io::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for (address, part) in &self.parts {
            if matches!(part.place, Place::Node { level: 0, .. }) {
                let leaf = self.node(*address, 0)?;
                if (0..256)
                    .any(|index| leaf.entry(index).kind == EntryKind::Block && leaf.entry(index).address == block)
                {
                    names.extend(self.reached_from(*address));
                }
            }
        }
        Ok(names)
    }

    /// The page that holds a block's count, where in it, and the count.
    pub fn count(&self, block: PoolBlock) -> io::Result<(PoolBlock, usize, u32)> {
        let (group, index) = self.superblock.geometry.group_of(block).ok_or_else(|| invalid("in no group"))?;
        let wanted = Place::SpaceMapPage { group, page: index / 1024 };
        let page = self.first(|place| *place == wanted)?;
        let offset = index as usize % 1024 * 4;
        let bytes = self.block(page)?;
        let count = bytes[offset..offset + 4].try_into().map_err(|_| invalid("cut"))?;
        Ok((page, offset, u32::from_le_bytes(count)))
    }

    /// The first block of this kind of structure.
    pub fn first(&self, is_wanted: impl Fn(&Place) -> bool) -> io::Result<PoolBlock> {
        let found = self.parts.iter().find(|(_, part)| is_wanted(&part.place)).map(|(block, _)| *block);
        found.ok_or_else(|| invalid("this pool has no such structure"))
    }
}

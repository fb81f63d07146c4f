//! Finds every structure of a pool by the numbers in it, whatever they are, and makes all checksums right again, from the
//! bottom up: what a fuzzer has changed then gets past the checksums and meets the code behind them.
//!
//! Written after `docs/format.md`, on raw bytes: the engine's decoders would refuse just what is to be kept.

use plywood::format::{
    BATCH_BLOCKS_MAX, Geometry, JOURNAL_FIRST, Place, SUPERBLOCK_COPIES, Slot, checksum, encode_batch, span_blocks,
};
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, Generation, Lsn, VirtualBlock, VolumeId};
use rustc_hash::FxHashSet;
use uuid::Uuid;

use crate::image::{Block, Image};

/// What stands in a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Structure {
    /// A copy of the superblock.
    Superblock,
    /// A block of the group index.
    GroupIndex,
    /// The descriptor of a group.
    GroupDescriptor,
    /// A page of counts.
    Page,
    /// A page of checksums of data, or of the bits that say which blocks have one.
    ChecksumPage,
    /// A node of a volume's tree.
    Node,
    /// A node of a table.
    TableNode,
    /// The record of a volume.
    VolumeRecord,
    /// A block of attributes.
    Attributes,
    /// A page of carcasses.
    CarcassPage,
    /// A block of the journal.
    Journal,
}

/// A structure that was found.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// What it is.
    pub structure: Structure,
    /// Its block.
    pub block: u64,
    /// Of a node its level.
    pub level: u8,
}

/// Most structures looked at: trees may be damaged so that they are endless.
const FOUND_MAX: usize = 4096;

/// All structures that the newest superblock leads to. With `repair`, all checksums on the way are made right.
pub fn walk(image: &mut Image, repair: bool) -> Vec<Found> {
    let copies = SUPERBLOCK_COPIES.map(|copies| copies.map(|block| block.0));
    let generation = |block: u64, image: &Image| number(&image.block(block)[..], 128, 8);
    let newest = copies.into_iter().max_by_key(|slot| generation(slot[0], image)).expect("there are two slots");
    let superblock = image.block(newest[0]);
    let mut walk = Walk {
        uuid: Uuid::from_slice(&superblock[40..56]).expect("16 bytes"),
        geometry: Geometry {
            pool_blocks: number(&superblock[..], 152, 8).min(image.size_bytes / BLOCK_BYTES),
            journal_blocks: number(&superblock[..], 176, 8).min(image.size_bytes / BLOCK_BYTES),
        },
        image,
        repair,
        seen: FxHashSet::default(),
        found: copies.iter().flatten().map(|block| at(Structure::Superblock, *block)).collect(),
    };
    walk.journal(number(&superblock[..], 200, 8), number(&superblock[..], 208, 4) as u32);
    walk.table(newest[0], 256, false);
    walk.table(newest[0], 280, true);
    walk.space(newest[0]);
    if repair {
        let content = walk.image.block(newest[0]);
        walk.image.set(newest[1], Some(content));
        for block in copies.into_iter().flatten() {
            walk.image.change(block, |bytes| {
                bytes[12..16].fill(0);
                let own = crc32fast::hash(&bytes[..]);
                bytes[12..16].copy_from_slice(&own.to_le_bytes());
            });
        }
    }
    walk.found
}

fn at(structure: Structure, block: u64) -> Found {
    Found { structure, block, level: 0 }
}

/// The little-endian number of `len` bytes at `offset`.
pub fn number(bytes: &[u8], offset: usize, len: usize) -> u64 {
    bytes[offset..offset + len].iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

struct Walk<'a> {
    image: &'a mut Image,
    uuid: Uuid,
    geometry: Geometry,
    repair: bool,
    seen: FxHashSet<u64>,
    found: Vec<Found>,
}

impl Walk<'_> {
    /// Notes a structure; false when it was seen before or does not exist.
    fn enter(&mut self, structure: Structure, block: u64, level: u8) -> bool {
        let is_new = block > 0 && block < self.geometry.pool_blocks && self.found.len() < FOUND_MAX;
        if is_new && self.seen.insert(block) {
            self.found.push(Found { structure, block, level });
            return true;
        }
        false
    }

    /// Writes the checksum of `block` to where it is kept, and makes the second of a pair like the first.
    fn settle(&mut self, block: u64, place: Place, mirrored: bool, parent: u64, offset: usize) {
        if !self.repair {
            return;
        }
        let content = self.image.block(block);
        if mirrored {
            self.image.change(block + 1, |bytes| *bytes = *content);
        }
        let found = checksum(&self.uuid, place, &content[..]);
        self.image.change(parent, |bytes| bytes[offset..offset + 4].copy_from_slice(&found.to_le_bytes()));
    }

    /// The entry at `offset` of `parent`, if it is a node: its block and whether it is the first of a pair.
    fn child(&self, parent: u64, offset: usize) -> Option<(u64, bool)> {
        let bytes = self.image.block(parent);
        let kind = bytes[offset + 6];
        (kind & 15 == 2).then(|| (number(&bytes[..], offset, 6), kind & 0x10 != 0))
    }

    /// The volume table or the carcass table, whose root stands at `offset` of the superblock.
    fn table(&mut self, superblock: u64, offset: usize, is_carcasses: bool) {
        let level = self.image.block(superblock)[offset + 16].min(3);
        // Seeds of the carcass table's nodes begin at an index that no volume can have.
        let base = if is_carcasses { CARCASS_TABLE } else { 0 };
        self.tree(superblock, offset, level, 0, &mut |walk, parent, offset, level, first| {
            let Some((block, mirrored)) = walk.child(parent, offset) else { return };
            let place = if level > 0 {
                Place::TableNode { level: level - 1, first: base + first }
            } else if is_carcasses {
                walk.carcasses(block);
                Place::CarcassPage(first)
            } else {
                walk.record(block);
                Place::VolumeRecord(VolumeId(first))
            };
            walk.settle(block, place, mirrored, parent, offset + 7);
        });
    }

    /// Goes through a tree whose root entry stands at `offset` of `parent`, children before parents. `settle` gets each
    /// entry with the level of the node that it stands in: of the root entry, one more than the root's.
    fn tree(
        &mut self,
        parent: u64,
        offset: usize,
        level: u8,
        first: u64,
        settle: &mut dyn FnMut(&mut Self, u64, usize, u8, u64),
    ) {
        self.subtree(parent, offset, level + 1, first, settle);
    }

    fn subtree(
        &mut self,
        parent: u64,
        offset: usize,
        level: u8,
        first: u64,
        settle: &mut dyn FnMut(&mut Self, u64, usize, u8, u64),
    ) {
        if level > 0
            && let Some((block, _)) = self.child(parent, offset)
        {
            if !self.enter(Structure::TableNode, block, level - 1) {
                return;
            }
            let step = if level > 1 { span_blocks(level - 2) } else { 1 };
            for index in 0..256 {
                self.subtree(block, index as usize * 16, level - 1, first + index * step, settle);
            }
        }
        settle(self, parent, offset, level, first);
    }

    fn record(&mut self, block: u64) {
        if !self.enter(Structure::VolumeRecord, block, 0) {
            return;
        }
        let bytes = self.image.block(block);
        for index in 0..(number(&bytes[..], 264, 4) as u32).min(64) {
            let offset = 528 + index as usize * 16;
            let attributes = number(&bytes[..], offset, 8);
            if self.enter(Structure::Attributes, attributes, 0) {
                self.settle(attributes, Place::Attributes { volume: VolumeId(0), index }, false, block, offset + 8);
            }
        }
        self.volume_tree(block, 48, bytes[48 + 16].min(3), 0);
    }

    fn carcasses(&mut self, block: u64) {
        if !self.enter(Structure::CarcassPage, block, 0) {
            return;
        }
        let bytes = self.image.block(block);
        for index in 0..number(&bytes[..], 8, 4).min(63) as usize {
            let offset = 64 + index * 64;
            self.volume_tree(block, offset + 8, bytes[offset + 53].min(3), number(&bytes[..], offset + 24, 8));
        }
    }

    /// The tree of a volume or carcass whose entry, to a node of `level`, stands at `offset` of `parent`.
    fn volume_tree(&mut self, parent: u64, offset: usize, level: u8, first: u64) {
        let Some((block, mirrored)) = self.child(parent, offset) else { return };
        if self.enter(Structure::Node, block, level) && level > 0 {
            for index in 0..256_u64 {
                let at = first.wrapping_add(index * span_blocks(level - 1));
                self.volume_tree(block, index as usize * 16, level - 1, at);
            }
        }
        let place = Place::Node { level, first: VirtualBlock(first) };
        self.settle(block, place, mirrored, parent, offset + 7);
    }

    /// Group indexes, descriptors and pages.
    fn space(&mut self, superblock: u64) {
        let groups = self.geometry.group_count();
        let bytes = self.image.block(superblock);
        for index in 0..self.geometry.index_count().min(number(&bytes[..], 212, 4)).min(304) {
            let reference = 1664 + index as usize * 8;
            let block = self.geometry.index_block(index, slot(bytes[reference + 4])).0;
            if self.enter(Structure::GroupIndex, block, 0) {
                for entry in 0..512.min(groups - index * 512) {
                    self.group(block, entry as usize * 8, index * 512 + entry);
                }
                self.settle(block, Place::GroupIndex(index), true, superblock, reference);
            }
        }
    }

    fn group(&mut self, parent: u64, offset: usize, group: u64) {
        let flags = self.image.block(parent)[offset + 6];
        let block = self.geometry.descriptor_block(group, slot(flags)).0;
        if flags & 2 != 0 || !self.enter(Structure::GroupDescriptor, block, 0) {
            return;
        }
        let bytes = self.image.block(block);
        let counts = (0..32).map(|page| (64 + page as usize * 8, page, true));
        let checksums = (0..33).map(|page| (320 + page as usize * 8, page, false));
        for (offset, page, is_counts) in counts.chain(checksums) {
            let flags = bytes[offset + 4];
            let (structure, at, place) = if is_counts {
                let at = self.geometry.page_block(group, page, slot(flags));
                (Structure::Page, at, Place::SpaceMapPage { group, page })
            } else {
                let at = self.geometry.checksum_page_block(group, page, slot(flags));
                (Structure::ChecksumPage, at, Place::ChecksumPage { group, page })
            };
            if flags & 2 != 0 && self.enter(structure, at.0, 0) {
                self.settle(at.0, place, false, block, offset);
            }
        }
        self.settle(block, Place::GroupDescriptor(group), true, parent, offset);
    }

    /// The chain of batches from `append` on.
    fn journal(&mut self, append: u64, chain: u32) {
        let ring = self.geometry.journal_blocks;
        let (mut append, mut chain) = (append, chain);
        while append < ring {
            let address = JOURNAL_FIRST.0 + append;
            let head = self.image.block(address);
            if head[..8] != *b"plywjrn\0" || !self.enter(Structure::Journal, address, 0) {
                return;
            }
            let first = number(&head[..], 32, 8).max(1);
            let last = number(&head[..], 40, 8).max(first);
            let generation = Generation(number(&head[..], 24, 8));
            let blocks = number(&head[..], 48, 4).clamp(1, BATCH_BLOCKS_MAX as u64).min(ring - append);
            let mut content = Vec::new();
            for block in 0..blocks {
                let bytes = self.image.block(address + block);
                content.extend(bytes.as_chunks::<512>().0.iter().flat_map(|sector| &sector[..504]));
                if block > 0 {
                    self.enter(Structure::Journal, address + block, 0);
                }
            }
            let length = (number(&head[..], 52, 4) as usize).min(content.len() - 72);
            let records = &content[72..72 + length];
            let (bytes, next) = encode_batch(&self.uuid, generation, Lsn(first), Lsn(last), chain, records);
            if self.repair {
                for (index, chunk) in bytes.chunks_exact(BLOCK_SIZE).enumerate() {
                    let chunk: &Block = chunk.try_into().expect("whole blocks");
                    self.image.change(address + index as u64, |bytes| *bytes = *chunk);
                }
            } else {
                chain = number(&head[..], 60, 4) as u32;
            }
            if self.repair {
                chain = next;
            }
            append += (bytes.len() / BLOCK_SIZE) as u64;
        }
    }
}

/// First index of the carcass table's nodes, as their seeds have it.
const CARCASS_TABLE: u64 = 1 << 62;

fn slot(flags: u8) -> Slot {
    if flags & 1 == 0 { Slot::A } else { Slot::B }
}

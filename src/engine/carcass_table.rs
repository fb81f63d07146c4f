//! The carcass table on disk: small, and written anew by every checkpoint before which it changed.

use std::rc::Rc;

use rustc_hash::FxHashMap;

use super::checkpoint::{Blocks, put};
use super::state::State;
use crate::format::{self, CARCASSES_PER_PAGE, Carcass, ENTRIES_PER_NODE, Entry, Node, Place, Root};
use crate::units::{Clock, PoolBlock};

/// Where the virtual "first" of the carcass table's nodes begins, so that its checksums differ from the volume table's.
pub(super) const CARCASS_TABLE: u64 = 1 << 62;
/// The carcass table as a checkpoint writes it.
pub(super) struct CarcassImage {
    carcasses: Vec<Carcass>,
    /// Each as a pair where there was one.
    pages: Vec<(PoolBlock, bool)>,
    /// Level by level.
    nodes: Vec<(PoolBlock, bool)>,
}

/// How many nodes each level above `pages` has, up to the root.
pub(super) fn widths_above(pages: usize) -> impl Iterator<Item = usize> {
    let above = |width: usize| width.div_ceil(ENTRIES_PER_NODE);
    std::iter::successors((pages > 0).then(|| above(pages)), move |width| (*width > 1).then(|| above(*width)))
}

impl CarcassImage {
    /// Encodes the carcasses, their pages and the nodes above them. Answers the table's root.
    pub(super) fn finish(
        &mut self,
        uuid: &uuid::Uuid,
        checksums: &mut FxHashMap<u64, u32>,
        blocks: &mut Blocks,
    ) -> Root {
        for carcass in &mut self.carcasses {
            if let Some(checksum) = checksums.get(&carcass.entry.address.0) {
                carcass.entry.checksum = *checksum;
            }
        }
        let mut children: Vec<Entry> = Vec::new();
        let pages = self.pages.iter().copied();
        for (number, (chunk, (address, mirrored))) in self.carcasses.chunks(CARCASSES_PER_PAGE).zip(pages).enumerate() {
            let bytes: Rc<[u8]> = Rc::from(&format::encode_carcasses(chunk)[..]);
            let checksum = format::checksum(uuid, Place::CarcassPage(number as u64), &bytes);
            children.push(Entry::node(address, mirrored, checksum, Clock(0)));
            put(blocks, address, mirrored, &bytes);
        }
        let mut nodes = self.nodes.iter().copied();
        let mut level = 0;
        while !children.is_empty() {
            let mut above = Vec::new();
            for (number, chunk) in children.chunks(ENTRIES_PER_NODE).enumerate() {
                let Some((address, mirrored)) = nodes.next() else { break };
                let mut node = Node::new(Clock(0));
                for (index, entry) in chunk.iter().enumerate() {
                    node.set(index, *entry);
                }
                let first = CARCASS_TABLE + ((number as u64) << (8 * (u32::from(level) + 1)));
                let bytes: Rc<[u8]> = Rc::from(&node.bytes()[..]);
                let checksum = format::checksum(uuid, Place::TableNode { level, first }, &bytes);
                above.push(Entry::node(address, mirrored, checksum, Clock(0)));
                put(blocks, address, mirrored, &bytes);
            }
            if let [root] = above[..] {
                return Root { entry: root, level };
            }
            children = above;
            level += 1;
        }
        Root { entry: Entry::hole(Clock(0)), level: 0 }
    }
}

impl State {
    /// The carcass table is written anew whenever it has changed: it is small.
    pub(super) fn take_carcass_image(&mut self) -> Option<CarcassImage> {
        if !self.carcasses_dirty {
            return None;
        }
        self.carcasses_dirty = false;
        for block in std::mem::take(&mut self.carcass_blocks) {
            self.count(block, -1);
            self.accounts.gave(1);
        }
        let carcasses: Vec<Carcass> = self.carcasses.values().map(|waiting| waiting.carcass).collect();
        let mut blocks = Vec::new();
        let mut take = |_| {
            let (address, mirrored) = self.take_meta(2);
            blocks.push(address);
            blocks.extend(mirrored.then_some(address.plus(1)));
            (address, mirrored)
        };
        let count = carcasses.len().div_ceil(CARCASSES_PER_PAGE);
        let pages = (0..count).map(&mut take).collect();
        let nodes = widths_above(count).flat_map(|width| 0..width).map(&mut take).collect();
        self.carcass_blocks = blocks;
        Some(CarcassImage { carcasses, pages, nodes })
    }
}

//! Nodes without the children that they have lost, and with no child younger than they are, at new places, and the nodes
//! above them.

use rustc_hash::FxHashMap;
use uuid::Uuid;

use crate::engine::Storage;
use crate::engine::inspect::{Counts, Visited, Visitor};
use crate::engine::rebuild::{FreeBlocks, Writer};
use crate::error::Result;
use crate::format::{self, ENTRIES_PER_NODE, Entry, EntryKind, Place};
use crate::units::{PoolBlock, VirtualBlock};

/// Writes every node anew that has lost something below it, or where something below it was born too late.
pub(super) struct Rewriter<'a> {
    uuid: Uuid,
    free: &'a mut FreeBlocks,
    /// Every block that is held: new ones are added.
    counts: &'a mut Counts,
    is_free: &'a dyn Fn(PoolBlock) -> bool,
    /// New entries by the blocks of the nodes that they replace. Their births are those of the old ones.
    replaced: FxHashMap<u64, Entry>,
    waiting: Vec<(PoolBlock, bool, Vec<u8>)>,
}

impl<'a> Rewriter<'a> {
    pub(super) fn new(
        uuid: Uuid,
        free: &'a mut FreeBlocks,
        counts: &'a mut Counts,
        is_free: &'a dyn Fn(PoolBlock) -> bool,
    ) -> Self {
        Self { uuid, free, counts, is_free, replaced: FxHashMap::default(), waiting: Vec::new() }
    }

    /// Nodes written anew so far.
    pub(super) fn rewritten(&self) -> u64 {
        self.replaced.len() as u64
    }

    /// The entry in place of `entry`.
    pub(super) fn replaced(&self, entry: Entry) -> Entry {
        match self.replaced.get(&entry.address.0) {
            Some(new) if entry.kind == EntryKind::Node => Entry { birth: entry.birth, ..*new },
            _ => entry,
        }
    }

    /// Writes the new nodes.
    pub(super) async fn write_out<S: Storage>(&mut self, writer: &mut Writer<'_, S>) -> Result<()> {
        for (address, mirrored, bytes) in self.waiting.drain(..) {
            writer.put(address, mirrored, &bytes).await?;
        }
        Ok(())
    }
}

impl Visitor for Rewriter<'_> {
    fn node(&mut self, visited: &Visited) -> Result<()> {
        let mut node = visited.node.clone();
        let mut changed = false;
        for index in 0..ENTRIES_PER_NODE {
            let entry = visited.node.entry(index);
            let new = if visited.lost.contains(index) {
                Entry::hole(entry.birth)
            } else if visited.level > 0 && !visited.missing.contains(index) {
                self.replaced(entry)
            } else {
                entry
            };
            // An older birth has a block redirected where it could have been overwritten: that is never wrong.
            let is_late = new.kind != EntryKind::Hole && new.birth > visited.entry.birth;
            let new = if is_late { Entry { birth: visited.entry.birth, ..new } } else { new };
            if new != entry {
                node.set(index, new);
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
        let (address, mirrored) = self.free.take(visited.level > 0, self.counts, self.is_free)?;
        let place = Place::Node { level: visited.level, first: VirtualBlock(visited.first) };
        let checksum = format::checksum(&self.uuid, place, node.bytes());
        self.replaced.insert(visited.entry.address.0, Entry::node(address, mirrored, checksum, visited.entry.birth));
        self.waiting.push((address, mirrored, node.bytes().to_vec()));
        Ok(())
    }
}

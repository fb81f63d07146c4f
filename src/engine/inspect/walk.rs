//! The walk over trees: every node once, children before parents, whatever shares it.
//!
//! What cannot be read is a fault and is left out; a [`Visitor`] gets every node that can be, with the children that it has
//! lost. A reference to a node that was walked before is only held against the node's checksum, which names its place: so a
//! wrong reference is found, and nothing is walked twice. The wrong one may come first: what it did not find is looked for
//! again by the next.
//!
//! A node that was born later than the one above it is walked as though it had been born with that one: who may be
//! overwritten in place is decided by birth, and an older birth is never wrong about that.

use rustc_hash::FxHashMap;

use super::counts::{Counts, Reached};
use super::fault::Faults;
use super::reader::{Reader, Target};
use crate::engine::Storage;
use crate::engine::tree::entry_span;
use crate::error::{Check, Result, Structure};
use crate::format::{ENTRIES_PER_NODE, Entry, EntryKind, Node, Place, Root, VolumeRecord};
use crate::units::{Clock, PoolBlock, VirtualBlock};

/// What a walk is for.
pub(in crate::engine) trait Visitor {
    /// A node whose children have been visited.
    ///
    /// # Errors
    /// What ends the walk.
    fn node(&mut self, visited: &Visited) -> Result<()>;

    /// Called after every node that is read.
    fn progress(&mut self, _blocks: u64) {}
}

/// A node that is visited, for the first and only time.
pub(in crate::engine) struct Visited {
    /// What points at it, born no later than the node above.
    pub(in crate::engine) entry: Entry,
    pub(in crate::engine) level: u8,
    pub(in crate::engine) first: u64,
    pub(in crate::engine) node: Node,
    /// Children that are not there: damaged, or eaten already.
    pub(in crate::engine) missing: Missing,
    /// Children that are damaged.
    pub(in crate::engine) lost: Missing,
}

/// A set of a node's children.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(in crate::engine) struct Missing([u64; ENTRIES_PER_NODE / 64]);

impl Missing {
    fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    pub(in crate::engine) fn contains(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 == 1
    }
}

/// A tree, or what a carcass has left of one.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Tree {
    pub(in crate::engine) entry: Entry,
    pub(in crate::engine) level: u8,
    pub(in crate::engine) first: u64,
    /// Everything before this block has been given back.
    pub(in crate::engine) eaten: u64,
    /// What was born from then on is the volume's own.
    pub(in crate::engine) created_at: Clock,
    /// What was born from then on may be overwritten in place.
    pub(in crate::engine) shared_at: Clock,
}

impl Tree {
    /// The tree of a volume.
    pub(in crate::engine) fn of(record: &VolumeRecord) -> Self {
        let (Root { entry, level }, created_at, shared_at) = (record.root, record.created_at, record.shared_at);
        Self { entry, level, first: 0, eaten: 0, created_at, shared_at }
    }
}

/// What a subtree maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Subtree {
    pub(in crate::engine) own: u64,
    pub(in crate::engine) mapped: u64,
    pub(in crate::engine) in_place: u64,
    /// Whether all of it could be read.
    pub(in crate::engine) whole: bool,
}

impl Subtree {
    const EMPTY: Self = Self { own: 0, mapped: 0, in_place: 0, whole: true };

    fn add(&mut self, other: Self) {
        self.own = self.own.saturating_add(other.own);
        self.mapped = self.mapped.saturating_add(other.mapped);
        self.in_place = self.in_place.saturating_add(other.in_place);
        self.whole &= other.whole;
    }
}

/// How a node was looked for that was not found.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tried {
    checksum: u32,
    level: u8,
    first: u64,
}

/// What is remembered of an inner node.
struct Memo {
    checksum: u32,
    first: u64,
    created_at: Clock,
    shared_at: Clock,
    sum: Subtree,
}

/// A node on the way from the root to where the walk is.
struct Frame {
    visited: Visited,
    next: usize,
    sum: Subtree,
    /// Whether this is its first time: then its children are counted.
    fresh: bool,
}

enum Known {
    Unknown,
    Sum(Subtree),
    /// It stands at another place of a tree: this reference is wrong.
    Elsewhere,
}

enum Entered {
    /// A leaf, something known, or (none) something lost.
    Done(Option<Subtree>),
    Inside(Box<Frame>),
}

/// A walk over any number of trees.
pub(in crate::engine) struct Walker<'w, 'r, S: Storage> {
    pub(in crate::engine) reader: &'w mut Reader<'r, S>,
    pub(in crate::engine) counts: &'w mut Counts,
    pub(in crate::engine) faults: &'w mut Faults,
    /// Nodes that cannot be read, and how they were looked for; none for those that hold data as well.
    lost: FxHashMap<u64, Option<Tried>>,
    memos: FxHashMap<u64, Memo>,
    pub(in crate::engine) nodes: u64,
    pub(in crate::engine) data_blocks: u64,
}

impl<'w, 'r, S: Storage> Walker<'w, 'r, S> {
    pub(in crate::engine) fn new(
        reader: &'w mut Reader<'r, S>,
        counts: &'w mut Counts,
        faults: &'w mut Faults,
    ) -> Self {
        let (lost, memos) = (FxHashMap::default(), FxHashMap::default());
        Self { reader, counts, faults, lost, memos, nodes: 0, data_blocks: 0 }
    }

    /// Walks a tree. None when not even its root can be read.
    pub(in crate::engine) async fn walk(&mut self, tree: &Tree, visitor: &mut impl Visitor) -> Result<Option<Subtree>> {
        if tree.entry.kind != EntryKind::Node {
            return Ok(Some(Subtree::EMPTY));
        }
        let mut path = match self.enter(tree, tree.entry, tree.level, tree.first, true, visitor).await? {
            Entered::Done(sum) => return Ok(sum),
            Entered::Inside(frame) => vec![frame],
        };
        while let Some(frame) = path.last_mut() {
            if frame.next == ENTRIES_PER_NODE {
                let Some(frame) = path.pop() else { break };
                let sum = self.leave(tree, *frame, visitor)?;
                match path.last_mut() {
                    Some(above) => above.sum.add(sum),
                    None => return Ok(Some(sum)),
                }
                continue;
            }
            let (index, fresh, level) = (frame.next, frame.fresh, frame.visited.level);
            frame.next += 1;
            let child = frame.visited.node.entry(index);
            if child.kind != EntryKind::Node || level == 0 {
                continue;
            }
            let first = frame.visited.first + index as u64 * entry_span(level);
            if first + entry_span(level) <= tree.eaten {
                frame.visited.missing.insert(index);
                continue;
            }
            let above = frame.visited.entry.birth;
            if fresh && child.birth > above {
                self.faults.add(Structure::Node, child.address, LATE_BIRTH);
            }
            let child = Entry { birth: child.birth.min(above), ..child };
            match self.enter(tree, child, level - 1, first, fresh, visitor).await? {
                Entered::Inside(below) => path.push(below),
                Entered::Done(Some(sum)) => frame.sum.add(sum),
                Entered::Done(None) => {
                    frame.sum.whole = false;
                    frame.visited.missing.insert(index);
                    frame.visited.lost.insert(index);
                }
            }
        }
        Ok(None)
    }

    /// Reads a node, unless it is known.
    async fn enter(
        &mut self,
        tree: &Tree,
        entry: Entry,
        level: u8,
        first: u64,
        counted: bool,
        visitor: &mut impl Visitor,
    ) -> Result<Entered> {
        let address = entry.address;
        let reached = if counted { self.counts.add(address, true) } else { Reached::Again };
        let fresh = match reached {
            Reached::First => true,
            Reached::Again => false,
            Reached::Otherwise => {
                self.faults.add(Structure::Node, address, DATA_AND_METADATA);
                self.lost.insert(address.0, None);
                false
            }
            Reached::Outside => {
                self.faults.add(Structure::Node, address, outside(address));
                return Ok(Entered::Done(None));
            }
        };
        let tried = Tried { checksum: entry.checksum, level, first };
        let fresh = match self.lost.get(&address.0) {
            None => fresh,
            Some(Some(before)) if *before != tried && counted => {
                self.lost.remove(&address.0);
                true
            }
            Some(_) => return Ok(Entered::Done(None)),
        };
        if fresh && entry.mirrored && (reached == Reached::First || self.counts.get(address.plus(1)) == 0) {
            self.counts.add(address.plus(1), true);
        }
        match self.known(tree, entry, level, first) {
            Known::Unknown => {}
            Known::Sum(sum) => return Ok(Entered::Done(Some(sum))),
            Known::Elsewhere => return Ok(Entered::Done(None)),
        }
        let place = Place::Node { level, first: VirtualBlock(first) };
        let target =
            Target { address, mirrored: entry.mirrored, checksum: entry.checksum, place, structure: Structure::Node };
        let bytes = if fresh {
            self.reader.verified(&target, self.faults).await
        } else {
            self.reader.verified_again(&target).await
        };
        let Some(bytes) = bytes else {
            if fresh {
                self.lost.insert(address.0, Some(tried));
            } else {
                // The node itself was found good by another's entry: it is this one that is wrong.
                self.faults.add(Structure::Node, address, OTHER_NODE);
            }
            return Ok(Entered::Done(None));
        };
        let node = match Node::decode(&bytes, level, self.reader.geometry.pool_blocks) {
            Ok(node) => node,
            Err(check) => {
                if fresh {
                    self.faults.add(Structure::Node, address, check);
                }
                self.lost.insert(address.0, Some(tried));
                return Ok(Entered::Done(None));
            }
        };
        self.nodes += u64::from(fresh);
        visitor.progress(self.counts.reached());
        let visited = Visited { entry, level, first, node, missing: Missing::default(), lost: Missing::default() };
        if level > 0 {
            return Ok(Entered::Inside(Box::new(Frame { visited, next: 0, sum: Subtree::EMPTY, fresh })));
        }
        let mut visited = visited;
        let sum = self.leaf(tree, &mut visited, fresh);
        if fresh {
            visitor.node(&visited)?;
        }
        Ok(Entered::Done(Some(sum)))
    }

    /// What an inner node that was walked before maps, where that is known for this tree too.
    fn known(&mut self, tree: &Tree, entry: Entry, level: u8, first: u64) -> Known {
        let memo = self.memos.get(&entry.address.0).filter(|_| level > 0);
        let Some(memo) = memo.filter(|memo| memo.checksum == entry.checksum) else { return Known::Unknown };
        if memo.first != first {
            // It was found good where it was reached first.
            self.faults.add(Structure::Node, entry.address, TWO_PLACES);
            return Known::Elsewhere;
        }
        // Nothing under a node is younger than it.
        let since = |same, from, known| match same {
            true => Some(known),
            false if entry.birth < from => Some(0),
            false => None,
        };
        let own = since(memo.created_at == tree.created_at, tree.created_at, memo.sum.own);
        let in_place = since(memo.shared_at == tree.shared_at, tree.shared_at, memo.sum.in_place);
        let (Some(own), Some(in_place)) = (own, in_place) else { return Known::Unknown };
        Known::Sum(Subtree { own, in_place, ..memo.sum })
    }

    /// Counts what a leaf maps.
    fn leaf(&mut self, tree: &Tree, visited: &mut Visited, fresh: bool) -> Subtree {
        let mut sum = Subtree::EMPTY;
        for index in 0..ENTRIES_PER_NODE {
            let entry = visited.node.entry(index);
            if entry.kind != EntryKind::Block {
                continue;
            }
            sum.mapped += 1;
            sum.own += u64::from(entry.birth >= tree.created_at);
            sum.in_place += u64::from(entry.birth >= tree.shared_at);
            if !fresh {
                continue;
            }
            let wrong = match self.counts.add(entry.address, false) {
                Reached::First => {
                    self.data_blocks += 1;
                    None
                }
                Reached::Again => None,
                Reached::Otherwise => Some(DATA_AND_METADATA),
                Reached::Outside => Some(outside(entry.address)),
            };
            if let Some(check) = wrong {
                self.faults.add(Structure::Data, entry.address, check);
                visited.missing.insert(index);
                visited.lost.insert(index);
                sum.whole = false;
                continue;
            }
            if entry.birth > visited.entry.birth {
                self.faults.add(Structure::Data, entry.address, LATE_BIRTH);
            }
        }
        sum
    }

    fn leave(&mut self, tree: &Tree, frame: Frame, visitor: &mut impl Visitor) -> Result<Subtree> {
        let Frame { visited, sum, fresh, .. } = frame;
        let Tree { created_at, shared_at, .. } = *tree;
        let memo = Memo { checksum: visited.entry.checksum, first: visited.first, created_at, shared_at, sum };
        self.memos.insert(visited.entry.address.0, memo);
        if fresh {
            visitor.node(&visited)?;
        }
        Ok(sum)
    }
}

pub(in crate::engine) const LATE_BIRTH: Check = Check::Inconsistent("it was born later than the node above it");
const TWO_PLACES: Check = Check::Inconsistent("it is reached at two places");
pub(super) const DATA_AND_METADATA: Check = Check::Inconsistent("it is both data and metadata");
const OTHER_NODE: Check = Check::Inconsistent("an entry that points at it says that it is another node");

fn outside(address: PoolBlock) -> Check {
    Check::OutOfBounds { field: "address", value: address.0 }
}

//! Mapping nodes in memory, found by the block they stand at.
//!
//! A node has its block from the moment it becomes dirty, so a block number names a node whether it has been written or
//! not, and a node that two trees hold is there once. States: *clean* (as on disk), *dirty* (changed since the last
//! checkpoint began; only these are changed in memory), *frozen* (being written by the running checkpoint; a change makes
//! a copy at a new block). Clean nodes are dropped under a budget, the others never.

use std::collections::VecDeque;
use std::rc::Rc;

use rustc_hash::FxHashMap;

use crate::format::{Node, Place};
use crate::units::PoolBlock;

/// Clean nodes that are kept in any case: more than the paths of a step.
const CLEAN_NODES_LEAST: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NodeState {
    Clean,
    Dirty,
    Frozen,
}

/// A node and what is needed to write it.
#[derive(Clone)]
pub(super) struct Cached {
    pub(super) node: Rc<Node>,
    pub(super) state: NodeState,
    pub(super) place: Place,
    pub(super) mirrored: bool,
    used: bool,
}

/// Level of the node that stands at `place`.
pub(super) fn level_of(place: Place) -> u8 {
    match place {
        Place::Node { level, .. } | Place::TableNode { level, .. } => level,
        _ => 0,
    }
}

pub(super) struct NodeCache {
    nodes: FxHashMap<u64, Cached>,
    clock: VecDeque<u64>,
    budget: usize,
    dirty: usize,
    /// Nodes in the running checkpoint's image.
    frozen: usize,
}

impl NodeCache {
    pub(super) fn new(budget_nodes: usize) -> Self {
        Self { nodes: FxHashMap::default(), clock: VecDeque::new(), budget: budget_nodes.max(64), dirty: 0, frozen: 0 }
    }

    /// The node at `address`, if it is in memory. The hot path of every lookup.
    #[inline]
    pub(super) fn node(&mut self, address: PoolBlock) -> Option<&Node> {
        let cached = self.nodes.get_mut(&address.0)?;
        cached.used = true;
        Some(&cached.node)
    }

    /// The same, if it is the node of that place. One that a damaged tree has elsewhere, too, is none.
    #[inline]
    pub(super) fn node_at(&mut self, address: PoolBlock, place: Place) -> Option<&Node> {
        let cached = self.nodes.get_mut(&address.0).filter(|cached| cached.place == place)?;
        cached.used = true;
        Some(&cached.node)
    }

    pub(super) fn get(&self, address: PoolBlock) -> Option<&Cached> {
        self.nodes.get(&address.0)
    }

    #[cfg(test)]
    pub(super) fn is_cached(&self, address: PoolBlock) -> bool {
        self.nodes.contains_key(&address.0)
    }

    /// Number of dirty nodes, not counting frozen ones.
    pub(super) fn dirty(&self) -> usize {
        self.dirty
    }

    /// Whether so much is dirty that a checkpoint is due: three quarters of the budget. The more writes a checkpoint
    /// gathers, the fewer times each leaf is written: with random writes to a clone every leaf is dirty sooner or later.
    pub(super) fn is_due(&self) -> bool {
        self.dirty > self.budget / 4 * 3
    }

    /// Whether nothing more may become dirty before a checkpoint ends: what cannot be dropped takes 1.25 budgets.
    pub(super) fn is_full(&self) -> bool {
        self.dirty + self.frozen > self.budget / 4 * 5
    }

    /// Adds a node as read from the medium. One that is there already is newer and stays.
    pub(super) fn insert_clean(&mut self, address: PoolBlock, node: Node, place: Place, mirrored: bool) {
        if self.nodes.contains_key(&address.0) {
            return;
        }
        let cached = Cached { node: Rc::new(node), state: NodeState::Clean, place, mirrored, used: true };
        self.nodes.insert(address.0, cached);
        self.clock.push_back(address.0);
        self.evict();
    }

    /// Adds a node that has not been written yet, in the place of whatever stood at this block in an earlier life.
    pub(super) fn insert_dirty(&mut self, address: PoolBlock, node: Rc<Node>, place: Place, mirrored: bool) {
        self.remove(address);
        self.nodes.insert(address.0, Cached { node, state: NodeState::Dirty, place, mirrored, used: true });
        self.dirty += 1;
    }

    /// The dirty node at `address`, to be changed.
    ///
    /// # Panics
    /// When it is not dirty: the caller has made the path its own first.
    pub(super) fn dirty_node(&mut self, address: PoolBlock) -> &mut Node {
        let cached = self.nodes.get_mut(&address.0).expect("a dirty node stays in memory");
        assert!(cached.state == NodeState::Dirty, "only dirty nodes are changed");
        Rc::make_mut(&mut cached.node)
    }

    /// Forgets the node at `address`: nothing points at it any more.
    pub(super) fn remove(&mut self, address: PoolBlock) {
        if let Some(cached) = self.nodes.remove(&address.0)
            && cached.state == NodeState::Dirty
        {
            self.dirty -= 1;
        }
    }

    /// Forgets the node at `address` unless a change of it is still to be written: it can be read again.
    pub(super) fn forget_clean(&mut self, address: PoolBlock) {
        if self.nodes.get(&address.0).is_some_and(|cached| cached.state == NodeState::Clean) {
            self.nodes.remove(&address.0);
        }
    }

    /// Makes all dirty nodes frozen and answers them: the instant of a checkpoint.
    pub(super) fn freeze(&mut self) -> Vec<(PoolBlock, Cached)> {
        let mut frozen = Vec::with_capacity(self.dirty);
        for (address, cached) in &mut self.nodes {
            if cached.state == NodeState::Dirty {
                cached.state = NodeState::Frozen;
                frozen.push((PoolBlock(*address), cached.clone()));
            }
        }
        self.dirty = 0;
        self.frozen = frozen.len();
        // The map's order depends on its history; the order of writing must not.
        frozen.sort_unstable_by_key(|(address, _)| *address);
        frozen
    }

    /// The frozen node at `address` has been written as `node`: it is clean now, unless it was given up meanwhile.
    pub(super) fn thaw(&mut self, address: PoolBlock, node: Rc<Node>) {
        if let Some(cached) = self.nodes.get_mut(&address.0)
            && cached.state == NodeState::Frozen
        {
            cached.state = NodeState::Clean;
            cached.node = node;
            self.clock.push_back(address.0);
        }
    }

    /// The checkpoint has ended: its image is no more.
    pub(super) fn end_freeze(&mut self) {
        self.frozen = 0;
        self.evict();
    }

    /// Blocks of the dirty nodes above the leaves, in order.
    pub(super) fn dirty_inner(&self) -> Vec<PoolBlock> {
        let mut found: Vec<PoolBlock> = self
            .nodes
            .iter()
            .filter(|(_, cached)| {
                cached.state == NodeState::Dirty
                    && (level_of(cached.place) > 0 || matches!(cached.place, Place::TableNode { .. }))
            })
            .map(|(address, _)| PoolBlock(*address))
            .collect();
        found.sort_unstable();
        found
    }

    /// Lets `fill` correct the node at `address` in what is not a change of the mapping: checksums of its children.
    pub(super) fn refill(&mut self, address: PoolBlock, fill: impl FnOnce(&mut Rc<Node>, Place)) {
        if let Some(cached) = self.nodes.get_mut(&address.0) {
            fill(&mut cached.node, cached.place);
        }
    }

    /// Drops every clean node: for tests and benches of a cold cache.
    pub(super) fn drop_clean(&mut self) {
        self.nodes
            .retain(|_, cached| cached.state != NodeState::Clean || matches!(cached.place, Place::TableNode { .. }));
        self.clock.clear();
    }

    /// The newest clean nodes stay however much is dirty: a step that needs a few of them would else never find them all.
    fn evict(&mut self) {
        while self.nodes.len() > self.budget && self.clock.len() > CLEAN_NODES_LEAST {
            let Some(address) = self.clock.pop_front() else { return };
            match self.nodes.get_mut(&address) {
                Some(cached) if cached.state != NodeState::Clean => {}
                // The volume table is small and every checkpoint needs it at its instant.
                Some(cached) if matches!(cached.place, Place::TableNode { .. }) => {}
                Some(cached) if cached.used => {
                    cached.used = false;
                    self.clock.push_back(address);
                }
                Some(_) => {
                    self.nodes.remove(&address);
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Clock, VirtualBlock};

    /// A step that needed two nodes loaded each in turn, and each load dropped the other: for ever.
    #[test]
    fn clean_nodes_of_a_step_stay_beside_a_budget_of_dirty_ones() {
        let mut cache = NodeCache::new(64);
        let place = Place::Node { level: 0, first: VirtualBlock(0) };
        let node = || Node::new(Clock(1));
        for block in 0..80 {
            cache.insert_dirty(PoolBlock(block), Rc::new(node()), place, false);
        }
        for block in 100..110 {
            cache.insert_clean(PoolBlock(block), node(), place, false);
        }
        assert!((100..110).all(|block| cache.is_cached(PoolBlock(block))));
        for block in 1000..2000 {
            cache.insert_clean(PoolBlock(block), node(), place, false);
        }
        assert!(cache.nodes.len() <= 80 + CLEAN_NODES_LEAST);
    }
}

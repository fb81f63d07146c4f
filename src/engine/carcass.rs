//! The worker that eats carcasses: subtrees that were cut out of their volumes and wait to give their blocks back.
//!
//! A step changes counts and the cursor in one instant, so no checkpoint separates them, and what it frees may be used
//! again only after a checkpoint that holds both. The worker alone takes a node from 1 to 0; it then owns the walk below
//! it. A subtree that others hold too is let go whole; where the volume's own and mapped blocks must go down with it (a
//! discard, a shrink), it is walked first to be counted. A carcass is eaten only when the change that made it is durable.

use std::future::{Future, poll_fn};
use std::task::Poll;

use super::Storage;
use super::pool::{Pool, until};
use super::state::{CarcassKey, Freed, Need, State, TreeKey, Try, Waiting};
use super::tree::{Accounted, entry_index, entry_span};
use super::work::Work;
use crate::canary::{Canary, is_broken};
use crate::error::Result;
use crate::format::{
    ACCOUNT_SPANS_MAX, AccountSpan, Carcass, ENTRIES_PER_NODE, Entry, EntryKind, Node, Place, VolumeRecord, span_blocks,
};
use crate::units::{Lsn, PoolBlock, VirtualBlock, VolumeId};

/// Leaves eaten before other tasks get their turn.
const LEAVES_AT_A_TIME: usize = 32;
/// Leaves read together: one after the other, those of a scattered volume would come at the pace of single reads.
const LEAVES_AHEAD: usize = 128;
/// Metadata blocks below which the worker waits for a checkpoint: its deltas need pages, not blocks, but the carcass
/// table is written anew.
const DELTA_PAGES_MAX: usize = 4096;

impl<S: Storage> Pool<S> {
    /// The background task.
    pub(super) async fn run_carcasses(&self) {
        let inner = &self.inner;
        loop {
            until(&inner.signals.carcass, || {
                let state = inner.state.borrow();
                inner.stopped.get()
                    || state.poisoned.is_some()
                    || (!state.closing && state.next_carcass_to_eat().is_some())
            })
            .await;
            if inner.stopped.get() || inner.state.borrow().poisoned.is_some() {
                return;
            }
            if let Err(error) = self.eat_something().await {
                tracing::error!("background deletion stops: {error}");
                return;
            }
            if inner.state.borrow().deltas.len() > DELTA_PAGES_MAX {
                // What is dirty is bounded: counts that wait for a checkpoint, too.
                if self.checkpoint().await.is_err() {
                    return;
                }
            }
            futures_lite::future::yield_now().await;
        }
    }

    /// Eats a little of the oldest carcass that may be eaten. Answers whether there was one.
    pub(super) async fn eat_something(&self) -> Result<bool> {
        let Some(key) = self.inner.state.borrow().next_carcass_to_eat() else { return Ok(false) };
        let _work = self.at(Work::Delete);
        let _stay = self.enter();
        self.read_ahead(key).await;
        for _ in 0..LEAVES_AT_A_TIME {
            if self.attempt(|state| state.eat(key)).await? {
                break;
            }
        }
        Ok(true)
    }

    /// Brings into memory what the next steps at a carcass want. What cannot be read is left for the step itself to tell.
    async fn read_ahead(&self, key: CarcassKey) {
        let wanted = self.inner.state.borrow_mut().leaves_ahead(key);
        let mut loads: Vec<_> = wanted.into_iter().map(|need| Box::pin(self.satisfy(need))).collect();
        poll_fn(|context| {
            loads.retain_mut(|load| load.as_mut().poll(context).is_pending());
            if loads.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Waits until no carcass is left: own and mapped blocks are exact then.
    pub async fn settle(&self) -> Result<()> {
        loop {
            if self.inner.state.borrow().carcasses.is_empty() {
                return Ok(());
            }
            self.commit().await?;
            self.eat_something().await?;
        }
    }
}

impl State {
    fn next_carcass_to_eat(&self) -> Option<CarcassKey> {
        let durable = self.journal.durable();
        self.carcasses.iter().find(|(_, waiting)| waiting.made <= durable).map(|(key, _)| *key)
    }

    /// The next leaves of a carcass, when the first of them is not in memory and the nodes above are. None that others hold,
    /// too: those are let go unread.
    fn leaves_ahead(&mut self, key: CarcassKey) -> Vec<Need> {
        self.try_leaves_ahead(key).unwrap_or_default()
    }

    fn try_leaves_ahead(&mut self, key: CarcassKey) -> Try<Vec<Need>> {
        let Some(Waiting { carcass, .. }) = self.carcasses.get(&key).copied() else { return Ok(Vec::new()) };
        let at = carcass.first.0 + carcass.cursor;
        let (mut entry, mut level) = (carcass.entry, carcass.level);
        while level > 0 {
            if entry.kind != EntryKind::Node || (!carcass.counting && self.exact_count(entry.address)? > 1) {
                break;
            }
            let node = self.carcass_node(entry, level, at & !(span_blocks(level) - 1))?;
            let index = entry_index(at, level);
            if level > 1 {
                (entry, level) = (node.entry(index), level - 1);
                continue;
            }
            let first = at & !(span_blocks(1) - 1);
            let leaves =
                (index..ENTRIES_PER_NODE).map(|index| (first + index as u64 * entry_span(1), node.entry(index)));
            let leaves: Vec<_> = leaves.filter(|(_, leaf)| leaf.kind == EntryKind::Node).take(LEAVES_AHEAD).collect();
            let mut needs = Vec::new();
            for (position, (first, leaf)) in leaves.into_iter().enumerate() {
                let is_ours = carcass.counting || self.exact_count(leaf.address)? == 1;
                match self.carcass_node(leaf, 0, first) {
                    Err(need) if is_ours => needs.push(need),
                    Ok(_) if position == 0 => break,
                    _ => {}
                }
            }
            return Ok(needs);
        }
        Ok(Vec::new())
    }

    /// One bounded step at a carcass: at most one leaf. Answers whether it is gone.
    fn eat(&mut self, key: CarcassKey) -> Try<bool> {
        let Some(waiting) = self.carcasses.get(&key) else { return Ok(true) };
        self.counters.leaves_eaten += 1;
        let mut carcass = waiting.carcass;
        if carcass.cursor == 0 && !carcass.counting && self.exact_count(carcass.entry.address)? > 1 {
            if !carcass.account {
                self.mark_family(carcass.volume, carcass.first.0);
                self.count(carcass.entry.address, -1);
                return Ok(self.finish_carcass(key));
            }
            carcass.counting = true;
        }
        // Whatever comes down now, at this place, others may hold alone from then on.
        self.mark_family(carcass.volume, carcass.first.0 + carcass.cursor);
        let mut account = Accounted::default();
        let done = if carcass.counting {
            self.count_leaf(&mut carcass, &mut account)?
        } else {
            self.eat_leaf(&mut carcass, &mut account)?
        };
        if carcass.account {
            self.settle_account(&carcass, &account);
        }
        if done && carcass.counting {
            if self.exact_count(carcass.entry.address)? > 1 {
                self.mark_family(carcass.volume, carcass.first.0);
                self.count(carcass.entry.address, -1);
            } else {
                // The others have let go meanwhile: it is ours, counted already.
                carcass = Carcass { counting: false, account: false, cursor: 0, ..carcass };
                return Ok(self.keep_carcass(carcass));
            }
        }
        Ok(if done { self.finish_carcass(key) } else { self.keep_carcass(carcass) })
    }

    pub(super) fn insert_carcass(&mut self, carcass: Carcass, made: Lsn) {
        self.carcasses.insert(CarcassKey::of(&carcass), Waiting { carcass, made });
        self.carcasses_dirty = true;
    }

    fn finish_carcass(&mut self, key: CarcassKey) -> bool {
        self.carcasses.remove(&key);
        self.carcasses_dirty = true;
        if self.carcasses.is_empty() {
            self.forget_families();
        }
        true
    }

    fn keep_carcass(&mut self, carcass: Carcass) -> bool {
        if let Some(waiting) = self.carcasses.get_mut(&CarcassKey::of(&carcass)) {
            waiting.carcass = carcass;
        }
        self.carcasses_dirty = true;
        false
    }

    fn carcass_node(&mut self, entry: Entry, level: u8, first: u64) -> Try<&Node> {
        let place = Place::Node { level, first: VirtualBlock(first) };
        let need = Need::Node { address: entry.address, mirrored: entry.mirrored, checksum: entry.checksum, place };
        self.cache.node_at(entry.address, place).ok_or(need)
    }

    /// Counts the next leaf of a shared subtree. Changes nothing but the cursor; answers whether the end is reached.
    fn count_leaf(&mut self, carcass: &mut Carcass, account: &mut Accounted) -> Try<bool> {
        let (mut entry, mut level) = (carcass.entry, carcass.level);
        loop {
            let at = carcass.first.0 + carcass.cursor;
            let first = at & !(span_blocks(level) - 1);
            let node = self.carcass_node(entry, level, first)?;
            if level == 0 {
                let born = carcass.created_at;
                for index in 0..ENTRIES_PER_NODE {
                    let entry = node.entry(index);
                    if entry.kind == EntryKind::Block {
                        account.mapped -= 1;
                        account.own -= i64::from(entry.birth >= born);
                    }
                }
                carcass.cursor += span_blocks(0);
                break;
            }
            let child = node.entry(entry_index(at, level));
            if child.kind != EntryKind::Node {
                carcass.cursor += entry_span(level) - at % entry_span(level);
                break;
            }
            (entry, level) = (child, level - 1);
        }
        Ok(carcass.cursor >= span_blocks(carcass.level))
    }

    /// Gives back the next leaf of a subtree that is the carcass's alone, and the nodes that end with it.
    fn eat_leaf(&mut self, carcass: &mut Carcass, account: &mut Accounted) -> Try<bool> {
        // The nodes from the carcass's root down, all ours: (entry, level, first block).
        let mut path: Vec<(Entry, u8, u64)> = vec![(carcass.entry, carcass.level, carcass.first.0)];
        let mut leaf_blocks: Option<Vec<Entry>> = None;
        let mut let_go: Option<(Entry, u8, u64)> = None;
        let next = loop {
            let Some((entry, level, first)) = path.last().copied() else { return Ok(true) };
            let at = carcass.first.0 + carcass.cursor;
            let node = self.carcass_node(entry, level, first)?;
            if level == 0 {
                let blocks =
                    (0..ENTRIES_PER_NODE).map(|index| node.entry(index)).filter(|entry| entry.kind == EntryKind::Block);
                leaf_blocks = Some(blocks.collect());
                break first + span_blocks(0);
            }
            // Runs of holes are passed over at once.
            let mut index = entry_index(at, level);
            let child = node.entry(index);
            if child.kind != EntryKind::Node {
                while index < ENTRIES_PER_NODE && node.entry(index).kind != EntryKind::Node {
                    index += 1;
                }
                break first + index as u64 * entry_span(level);
            }
            let child_first = first + index as u64 * entry_span(level);
            if at == child_first && self.exact_count(child.address)? > 1 {
                let_go = Some((child, level - 1, child_first));
                break child_first + entry_span(level);
            }
            path.push((child, level - 1, child_first));
        };
        // Everything was in memory: from here on nothing fails.
        if let Some(blocks) = leaf_blocks {
            // What was cut out before the volume was last shared or rolled back is older than that, and counts no more.
            let shared_at = self.shared_at(TreeKey::Volume(carcass.volume));
            for entry in blocks {
                self.count(entry.address, -1);
                account.mapped -= 1;
                account.own -= i64::from(entry.birth >= carcass.created_at);
                account.in_place -= i64::from(entry.birth >= shared_at);
                self.free_at_once(entry);
            }
        }
        if let Some((entry, level, first)) = let_go {
            if carcass.account {
                // It is to be counted before it is let go: a carcass of its own, to which the reference moves.
                let made = self.carcasses.get(&CarcassKey::of(carcass)).map_or(Lsn(0), |waiting| waiting.made);
                let id = self.next_carcass;
                self.next_carcass += 1;
                let first = VirtualBlock(first);
                self.insert_carcass(Carcass { id, entry, level, first, cursor: 0, counting: false, ..*carcass }, made);
            } else {
                self.count(entry.address, -1);
            }
        }
        carcass.cursor = next - carcass.first.0;
        for (entry, level, first) in path.into_iter().rev() {
            if first + span_blocks(level) != next {
                break;
            }
            self.free_carcass_node(entry);
        }
        Ok(carcass.cursor >= span_blocks(carcass.level))
    }

    fn free_carcass_node(&mut self, entry: Entry) {
        self.count(entry.address, -1);
        if entry.mirrored {
            self.count(PoolBlock(entry.address.0 + 1), -1);
        }
        self.accounts.gave(1 + u64::from(entry.mirrored));
        self.cache.remove(entry.address);
        self.free_at_once(entry);
    }

    /// What must not be done (rule O3): nothing unless that rule is broken on purpose.
    fn free_at_once(&mut self, entry: Entry) {
        if is_broken(Canary::EatenFreedAtOnce) && matches!(self.exact_count(entry.address), Ok(0)) {
            self.allocator.hold(entry.address);
            let epoch = self.epochs.advance();
            self.draining_frees.push_back((epoch, entry.address, Freed::ByRecord));
        }
    }

    /// Takes own and mapped blocks down, and those written in place of who gave them up: of the volume, and of what took its tree over after the subtree was cut out while
    /// it was still counted.
    fn settle_account(&mut self, carcass: &Carcass, account: &Accounted) {
        if account.mapped == 0 && account.own == 0 {
            return;
        }
        let concerned: Vec<(VolumeId, bool)> = self
            .volumes
            .iter()
            .filter(|(_, volume)| concerns(carcass, &volume.record))
            .map(|(id, volume)| (*id, volume.record.created_at == carcass.created_at))
            .collect();
        for (id, owns) in concerned {
            let own = if owns { account.own } else { 0 };
            let in_place = if id == carcass.volume { account.in_place } else { 0 };
            self.account(id, Accounted { own, in_place, ..*account });
        }
    }

    /// The carcasses that the accounts of a volume wait for which takes over the tree of `record` now.
    pub(super) fn inherited_spans(&self, record: &VolumeRecord) -> Vec<AccountSpan> {
        let waiting = self.carcasses.iter().find(|(_, waiting)| waiting.carcass.account);
        let Some(oldest) = waiting.map(|(key, _)| key.cut) else { return Vec::new() };
        let own = AccountSpan { volume: record.id, first: record.accounts_from, end: self.next_carcass };
        let mut spans: Vec<AccountSpan> = record.account_spans.iter().copied().chain([own]).collect();
        spans.retain(|span| span.end > oldest.max(span.first));
        // Each is a generation of clones or rollbacks made while carcasses of the one before waited; so many at a time are
        // no workload, and what is given up is the exactness of two numbers.
        spans.drain(..spans.len().saturating_sub(ACCOUNT_SPANS_MAX));
        spans
    }
}

/// Whether own and mapped blocks of a volume include those of `carcass`, which is cut out of its tree already.
fn concerns(carcass: &Carcass, record: &VolumeRecord) -> bool {
    (carcass.volume == record.id && carcass.cut >= record.accounts_from)
        || record
            .account_spans
            .iter()
            .any(|span| span.volume == carcass.volume && (span.first..span.end).contains(&carcass.cut))
}

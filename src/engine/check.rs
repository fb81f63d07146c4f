//! Checking a pool: every count must equal what a walk finds.

use rustc_hash::FxHashMap;

use super::Storage;
use super::pool::Pool;
use super::state::Need;
use crate::error::{Error, Result};
use crate::format::{COUNTS_PER_PAGE, ENTRIES_PER_NODE, Entry, EntryKind, PAGES_PER_GROUP, Place};
use crate::units::{Clock, PoolBlock, VirtualBlock, VolumeId};

/// Faults listed at most; the rest is counted.
const FAULTS_MAX: usize = 1000;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CheckReport {
    /// Faults, the first thousand.
    pub faults: Vec<Fault>,
    /// Faults in all.
    pub fault_count: u64,
    /// Mapping nodes walked, each once.
    pub nodes: u64,
    /// Data blocks found, each once.
    pub data_blocks: u64,
    /// Blocks in use, the layout of the groups included.
    pub used_blocks: u64,
    /// Volumes walked.
    pub volumes: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.fault_count == 0
    }

    fn add(&mut self, block: PoolBlock, message: String) {
        self.fault_count += 1;
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(Fault { block, message });
        }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fault {
    /// Where.
    pub block: PoolBlock,
    /// What.
    pub message: String,
}

/// Checkpoints that a check writes at most to find an instant after which nothing has changed.
const CHECKPOINTS_TRIED: u32 = 8;

/// While one lives, the carcass worker rests.
struct CarcassPause<S: Storage>(Pool<S>);

impl<S: Storage> CarcassPause<S> {
    fn begin(pool: &Pool<S>) -> Self {
        pool.inner.checks.set(pool.inner.checks.get() + 1);
        Self(pool.clone())
    }
}

impl<S: Storage> Drop for CarcassPause<S> {
    fn drop(&mut self) {
        let inner = &self.0.inner;
        inner.checks.set(inner.checks.get() - 1);
        inner.signals.carcass.notify(usize::MAX);
    }
}

/// Counts found by walking.
struct Walk {
    counts: FxHashMap<u64, u32>,
    report: CheckReport,
}

impl<S: Storage> Pool<S> {
    /// Writes a checkpoint and compares all counts with a walk over every tree. The pool must be at rest meanwhile.
    ///
    /// # Errors
    /// `Busy` when something was changed during the check; what is damaged is reported, not an error.
    pub async fn check(&self) -> Result<CheckReport> {
        let busy = || Error::Busy("the pool was changed while it was checked; try again when it is idle".into());
        // The worker would take counts down beside the walk; a step that it had begun is waited for below.
        let _pause = CarcassPause::begin(self);
        self.commit().await?;
        let mut tries = 0;
        loop {
            self.checkpoint().await?;
            // What is counted on the medium is compared: nothing may have changed since the checkpoint's instant.
            if self.inner.state.borrow().deltas.is_empty() {
                break;
            }
            tries += 1;
            if tries == CHECKPOINTS_TRIED {
                return Err(busy());
            }
        }
        let before = self.change_mark();
        let mut walk = Walk { counts: FxHashMap::default(), report: CheckReport::default() };
        self.walk_volumes(&mut walk).await?;
        self.walk_carcasses(&mut walk).await?;
        self.walk_table(&mut walk).await?;
        self.compare_counts(&mut walk).await?;
        if before != self.change_mark() {
            return Err(busy());
        }
        Ok(walk.report)
    }

    fn change_mark(&self) -> (u64, u64, bool) {
        let state = self.inner.state.borrow();
        (state.journal.last().0, self.inner.checkpoints_begun.get(), state.deltas.is_empty())
    }

    async fn walk_volumes(&self, walk: &mut Walk) -> Result<()> {
        let volumes: Vec<VolumeId> = self.inner.state.borrow().volumes.keys().copied().collect();
        for id in volumes {
            let Some((root, record)) =
                self.inner.state.borrow().volumes.get(&id).map(|volume| (volume.record.root, volume.record.clone()))
            else {
                continue;
            };
            walk.report.volumes += 1;
            for block in &record.attributes {
                *walk.counts.entry(block.address.0).or_default() += 1;
            }
            self.walk_tree(walk, root.entry, root.level, 0).await?;
            let (own, mapped) = self.count_volume(root.entry, root.level, record.created_at).await?;
            let settled = self.inner.state.borrow().carcasses.is_empty();
            if settled && (own, mapped) != (record.own_blocks, record.mapped_blocks) {
                walk.report.add(
                    root.entry.address,
                    format!(
                        "volume {} has {own} own and {mapped} mapped blocks, its record says {} and {}",
                        record.name, record.own_blocks, record.mapped_blocks
                    ),
                );
            }
        }
        Ok(())
    }

    async fn walk_carcasses(&self, walk: &mut Walk) -> Result<()> {
        let (carcasses, blocks) = {
            let state = self.inner.state.borrow();
            let carcasses: Vec<_> = state.carcasses.values().map(|waiting| waiting.carcass).collect();
            (carcasses, state.carcass_blocks.clone())
        };
        for block in blocks {
            *walk.counts.entry(block.0).or_default() += 1;
        }
        for carcass in carcasses {
            let skip = if carcass.counting { 0 } else { carcass.first.0 + carcass.cursor };
            self.walk_eaten(walk, carcass.entry, carcass.level, carcass.first.0, skip).await?;
        }
        Ok(())
    }

    async fn walk_table(&self, walk: &mut Walk) -> Result<()> {
        let table = self.inner.state.borrow().table;
        let mut waiting = vec![(table.entry, table.level, 0u64)];
        while let Some((entry, level, first)) = waiting.pop() {
            if entry.kind != EntryKind::Node {
                continue;
            }
            *walk.counts.entry(entry.address.0).or_default() += 1;
            if entry.mirrored {
                *walk.counts.entry(entry.address.0 + 1).or_default() += 1;
            }
            let children = self.node_children(entry, Place::TableNode { level, first }).await?;
            for (index, child) in children.into_iter().enumerate() {
                if level > 0 {
                    waiting.push((child, level - 1, first + ((index as u64) << (8 * u32::from(level)))));
                } else if child.kind == EntryKind::Node {
                    *walk.counts.entry(child.address.0).or_default() += 1;
                    if child.mirrored {
                        *walk.counts.entry(child.address.0 + 1).or_default() += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts an entry, and what is below it when it is met for the first time.
    async fn walk_tree(&self, walk: &mut Walk, entry: Entry, level: u8, first: u64) -> Result<()> {
        self.walk_eaten(walk, entry, level, first, 0).await
    }

    /// As [`walk_tree`](Self::walk_tree), for a carcass of which everything before block `eaten` is gone.
    async fn walk_eaten(&self, walk: &mut Walk, entry: Entry, level: u8, first: u64, eaten: u64) -> Result<()> {
        let mut waiting = vec![(entry, level, first)];
        while let Some((entry, level, first)) = waiting.pop() {
            match entry.kind {
                EntryKind::Hole => continue,
                EntryKind::Block => {
                    let count = walk.counts.entry(entry.address.0).or_default();
                    *count += 1;
                    walk.report.data_blocks += u64::from(*count == 1);
                    continue;
                }
                EntryKind::Node => {}
            }
            let count = walk.counts.entry(entry.address.0).or_default();
            *count += 1;
            if *count > 1 {
                continue;
            }
            walk.report.nodes += 1;
            if entry.mirrored {
                *walk.counts.entry(entry.address.0 + 1).or_default() += 1;
            }
            let place = Place::Node { level, first: VirtualBlock(first) };
            let children = match self.node_children(entry, place).await {
                Ok(children) => children,
                Err(error @ (Error::Corrupt(_) | Error::Io { .. })) => {
                    walk.report.add(entry.address, error.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            };
            let span = 1u64 << (8 * u32::from(level));
            for (index, child) in children.into_iter().enumerate() {
                let child_first = first + index as u64 * span;
                if child.kind == EntryKind::Node && child.birth > entry.birth {
                    walk.report.add(child.address, format!("born at {}, later than the node above it", child.birth));
                }
                if child_first + span > eaten {
                    waiting.push((child, level.saturating_sub(1), child_first));
                }
            }
        }
        Ok(())
    }

    async fn count_volume(&self, entry: Entry, level: u8, created_at: Clock) -> Result<(u64, u64)> {
        let (mut own, mut mapped) = (0, 0);
        let mut waiting = vec![(entry, level, 0u64)];
        while let Some((entry, level, first)) = waiting.pop() {
            match entry.kind {
                EntryKind::Hole => {}
                EntryKind::Block => {
                    mapped += 1;
                    own += u64::from(entry.birth >= created_at);
                }
                EntryKind::Node => {
                    let place = Place::Node { level, first: VirtualBlock(first) };
                    let Ok(children) = self.node_children(entry, place).await else { continue };
                    let span = 1u64 << (8 * u32::from(level));
                    let below = level.saturating_sub(1);
                    waiting.extend(
                        children
                            .into_iter()
                            .enumerate()
                            .map(|(index, child)| (child, below, first + index as u64 * span)),
                    );
                }
            }
        }
        Ok((own, mapped))
    }

    async fn node_children(&self, entry: Entry, place: Place) -> Result<Vec<Entry>> {
        let need = Need::Node { address: entry.address, mirrored: entry.mirrored, checksum: entry.checksum, place };
        self.attempt(|state| {
            let node = state.cache.node(entry.address).ok_or(need)?;
            Ok((0..ENTRIES_PER_NODE).map(|index| node.entry(index)).collect())
        })
        .await
    }

    async fn compare_counts(&self, walk: &mut Walk) -> Result<()> {
        let (geometry, groups) = {
            let state = self.inner.state.borrow();
            (state.geometry, state.groups_in_use)
        };
        for group in 0..groups {
            for page in 0..PAGES_PER_GROUP {
                let key = (group, page);
                let counts = match self.attempt(|state| state.pages.get(&key).cloned().ok_or(Need::Counts(key))).await {
                    Ok(counts) => counts,
                    Err(error @ (Error::Corrupt(_) | Error::Io { .. })) => {
                        walk.report.add(geometry.group_start(group), error.to_string());
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let implied = super::pool::implied_counts(&self.inner.state.borrow(), group, page);
                for (index, count) in counts.iter().enumerate() {
                    let in_group = u64::from(page) * COUNTS_PER_PAGE + index as u64;
                    let block = geometry.group_start(group).plus(in_group);
                    let found = walk.counts.remove(&block.0).unwrap_or(0) + implied[index];
                    walk.report.used_blocks += u64::from(*count > 0);
                    if *count != found {
                        walk.report.add(block, format!("counted {count} times, a walk finds {found}"));
                    }
                }
            }
        }
        for (block, found) in walk.counts.drain() {
            walk.report.add(PoolBlock(block), format!("in use {found} times, in no group"));
        }
        Ok(())
    }
}

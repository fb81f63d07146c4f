//! Checksums of data: recorded by sealing, dropped when their block comes free.
//!
//! A checksum belongs to a pool block. Only blocks of snapshots get one, and those are never overwritten in place (their
//! birth says so), so it holds as long as anybody maps the block. What has a checksum comes free by a checkpoint alone
//! (whoever maps it was born later than it, so no record frees it), and that checkpoint drops the checksum too. Hence the
//! invariant, in every durable state: **a block whose count is 0 has no checksum**. Blocks that a record names were free
//! in the checkpoint before, so replay has nothing to do.
//!
//! New checksums wait in memory for the next checkpoint, like count deltas, and a crash loses them: they are computed again.
//!
//! A group that was never sealed in has no pages of checksums on the host. Both slots of all of them are allocated before the
//! first checksum of the group is recorded in memory, so that **no checkpoint fails for host space**. That extension
//! needs no flush of its own: the first flush of the checkpoint that writes a page makes both slots durable, and until that
//! checkpoint is durable a successor begins anew.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use futures_lite::future::yield_now;

use super::Storage;
use super::checkpoint::{BLOCKS_AT_A_TIME, Blocks, GroupImage};
use super::pool::{Pool, until};
use super::space::{PageKey, Run};
use super::state::{Need, State, Try};
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{
    self, COUNTS_PER_PAGE, GroupDescriptor, HAS_CHECKSUM_PAGE, PAGES_PER_GROUP, PageRef, Place, has_checksum,
    set_has_checksum,
};
use crate::units::{BLOCK_BYTES, PoolBlock};

const PER_PAGE: usize = COUNTS_PER_PAGE as usize;

/// The key of checksum page `page` of `group` in the cache of pages, behind the pages of counts.
fn key(group: u64, page: u32) -> PageKey {
    (group, PAGES_PER_GROUP + page)
}

/// Checksums that no checkpoint has taken yet.
#[derive(Default)]
pub(super) struct NewChecksums(BTreeMap<PageKey, Box<Page>>);

struct Page {
    sums: [u32; PER_PAGE],
    known: [u64; PER_PAGE / 64],
}

impl NewChecksums {
    fn set(&mut self, page: PageKey, index: usize, checksum: u32) {
        let page =
            self.0.entry(page).or_insert_with(|| Box::new(Page { sums: [0; PER_PAGE], known: [0; PER_PAGE / 64] }));
        page.sums[index] = checksum;
        page.known[index / 64] |= 1 << (index % 64);
    }

    fn get(&self, page: PageKey, index: usize) -> Option<u32> {
        let page = self.0.get(&page)?;
        (page.known[index / 64] >> (index % 64) & 1 == 1).then(|| page.sums[index])
    }

    /// Pages they fall on: 4 KiB of memory each.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl State {
    fn checksum_place(&self, block: PoolBlock) -> Option<(PageKey, usize)> {
        let (group, index) = self.geometry.group_of(block)?;
        Some(((group, index / COUNTS_PER_PAGE as u32), index as usize % PER_PAGE))
    }

    /// The recorded checksum of a block's content, if it has one.
    pub(super) fn data_checksum(&mut self, block: PoolBlock) -> Try<Option<u32>> {
        let Some((page @ (group, in_group), index)) = self.checksum_place(block) else { return Ok(None) };
        if let Some(checksum) = self.checksums.get(page, index).or_else(|| self.frozen_checksums.get(page, index)) {
            return Ok(Some(checksum));
        }
        let block_in_group = in_group as usize * PER_PAGE + index;
        let has_one =
            self.pages.get(&key(group, HAS_CHECKSUM_PAGE)).ok_or(Need::Counts(key(group, HAS_CHECKSUM_PAGE)))?;
        if !has_checksum(has_one, block_in_group) {
            return Ok(None);
        }
        let sums = self.pages.get(&key(group, in_group)).ok_or(Need::Counts(key(group, in_group)))?;
        Ok(Some(sums[index]))
    }

    /// Records the checksum of a block that a snapshot maps: the next checkpoint writes it.
    pub(super) fn set_data_checksum(&mut self, block: PoolBlock, checksum: u32) {
        if let Some((page, index)) = self.checksum_place(block) {
            self.checksums.set(page, index, checksum);
        }
    }

    /// Whether the host has the checksum pages of a group whose descriptor is in memory.
    fn has_checksum_pages(&self, group: u64) -> bool {
        self.checksum_pages_prepared.contains(&group)
            || self
                .descriptors
                .get(&group)
                .is_some_and(|descriptor| descriptor.checksum_pages[HAS_CHECKSUM_PAGE as usize].present)
    }

    /// Whether blocks of a group may have a checksum, or get one by the running checkpoint.
    pub(super) fn may_have_checksums(&self, descriptor: &GroupDescriptor) -> bool {
        let new = &self.frozen_checksums.0;
        descriptor.checksum_pages[HAS_CHECKSUM_PAGE as usize].present
            || new.range((descriptor.group, 0)..(descriptor.group + 1, 0)).next().is_some()
    }

    /// Whether a page of checksums changes: some are new, or a freed block has one.
    fn has_checksums_to_apply(&self, page @ (group, in_group): PageKey, freed: &[Run]) -> bool {
        let first = self.geometry.group_start(group);
        self.frozen_checksums.0.contains_key(&page)
            || self.pages.get(&key(group, HAS_CHECKSUM_PAGE)).is_some_and(|has_one| {
                debug_assert!(freed.iter().all(|run| (run.start.0 - first.0) / COUNTS_PER_PAGE == u64::from(in_group)));
                freed
                    .iter()
                    .flat_map(|run| (0..run.count).map(|offset| run.start.0 + offset - first.0))
                    .any(|index| has_checksum(has_one, index as usize))
            })
    }

    /// Puts new checksums of one page in and takes those of freed blocks out. Both pages are in memory.
    fn apply_checksums(&mut self, (group, page): PageKey, freed: &[Run]) {
        let start = self.geometry.group_start(group);
        let new = self.frozen_checksums.0.remove(&(group, page));
        let (Some(mut has_one), Some(mut sums)) =
            (self.pages.remove(&key(group, HAS_CHECKSUM_PAGE)), self.pages.remove(&key(group, page)))
        else {
            return;
        };
        {
            let (has_one, sums) = (Rc::make_mut(&mut has_one), Rc::make_mut(&mut sums));
            if let Some(new) = new {
                for index in (0..PER_PAGE).filter(|index| new.known[index / 64] >> (index % 64) & 1 == 1) {
                    let block = page as usize * PER_PAGE + index;
                    set_has_checksum(has_one, block, true);
                    sums[index] = new.sums[index];
                }
            }
            if !is_broken(Canary::ChecksumKept) {
                for block in freed.iter().flat_map(|run| (0..run.count).map(|offset| run.start.0 + offset - start.0)) {
                    let block = block as usize;
                    set_has_checksum(has_one, block, false);
                    sums[block % PER_PAGE] = 0;
                }
            }
        }
        self.pages.insert(key(group, HAS_CHECKSUM_PAGE), has_one);
        self.pages.insert(key(group, page), sums);
    }

    /// Adds a page of checksums to what the checkpoint writes, in the slot that the descriptor does not name.
    fn put_checksum_page(
        &mut self,
        groups: &mut BTreeMap<u64, GroupImage>,
        group: u64,
        page: u32,
        blocks: &mut Blocks,
    ) {
        let image = groups.entry(group).or_insert_with(|| self.group_image(group));
        let Some(reference) = image.descriptor.checksum_pages.get_mut(page as usize) else { return };
        let Some(content) = self.pages.get(&key(group, page)) else { return };
        let bytes: Rc<[u8]> = Rc::from(&format::encode_counts(content)[..]);
        let slot = self.next_slot(reference.present.then_some(reference.slot));
        let checksum = format::checksum(&self.uuid, Place::ChecksumPage { group, page }, &bytes);
        *reference = PageRef { checksum, slot, present: true };
        self.counters.pages_written += 1;
        blocks.insert(self.geometry.checksum_page_block(group, page, slot), bytes);
    }
}

impl<S: Storage> Pool<S> {
    /// Makes sure that the host has the pages for new checksums of `blocks`. Nothing may be held up by the caller meanwhile
    /// but an epoch.
    pub(super) async fn prepare_checksum_pages(&self, blocks: impl Iterator<Item = PoolBlock>) -> Result<()> {
        let inner = &self.inner;
        let geometry = inner.state.borrow().geometry;
        let groups: BTreeSet<u64> =
            blocks.filter_map(|block| geometry.group_of(block)).map(|(group, _)| group).collect();
        for group in groups {
            self.load_descriptor(group).await?;
            // One at a time: who came second would write zeros over pages that a checkpoint has written meanwhile.
            until(&inner.signals.space, || !inner.preparing_checksum_pages.get()).await;
            if is_broken(Canary::ChecksumPagesUnprepared) || inner.state.borrow().has_checksum_pages(group) {
                continue;
            }
            inner.preparing_checksum_pages.set(true);
            let range = geometry.checksum_pages_range(group);
            let extended = self.extend(range.start * BLOCK_BYTES..range.end * BLOCK_BYTES).await;
            inner.preparing_checksum_pages.set(false);
            inner.signals.space.notify(usize::MAX);
            extended?;
            inner.state.borrow_mut().checksum_pages_prepared.insert(group);
        }
        Ok(())
    }

    /// The checkpoint's part: writes the checksum pages of blocks that were sealed or, with `freed` by page, came free.
    pub(super) async fn write_checksums(
        &self,
        groups: &mut BTreeMap<u64, GroupImage>,
        freed: BTreeMap<PageKey, Vec<Run>>,
    ) -> Result<()> {
        let mut touched: BTreeSet<PageKey> = freed.keys().copied().collect();
        touched.extend(self.inner.state.borrow().frozen_checksums.0.keys());
        let mut has_one_changed = BTreeSet::new();
        let mut blocks = Blocks::new();
        for (group, page) in touched {
            let runs = freed.get(&(group, page)).map_or(&[][..], Vec::as_slice);
            self.load_descriptor(group).await?;
            self.load(key(group, HAS_CHECKSUM_PAGE)).await?;
            if !self.inner.state.borrow().has_checksums_to_apply((group, page), runs) {
                continue;
            }
            self.load(key(group, page)).await?;
            {
                let mut state = self.inner.state.borrow_mut();
                state.apply_checksums((group, page), runs);
                state.put_checksum_page(groups, group, page, &mut blocks);
            }
            has_one_changed.insert(group);
            if blocks.len() >= BLOCKS_AT_A_TIME {
                self.write_blocks(std::mem::take(&mut blocks)).await?;
                yield_now().await;
            }
        }
        for group in has_one_changed {
            self.inner.state.borrow_mut().put_checksum_page(groups, group, HAS_CHECKSUM_PAGE, &mut blocks);
        }
        self.write_blocks(blocks).await
    }

    /// The next blocks at or after `at`, at most `most` and all of one group, that a checkpoint knows the checksum of.
    pub(super) async fn blocks_with_checksum(&self, at: PoolBlock, most: usize) -> Result<(u64, Vec<PoolBlock>)> {
        let place = self.inner.state.borrow().geometry.group_of(at);
        let (group, from) = place.ok_or_else(|| Error::InvalidInput(format!("block {at} is in no group")))?;
        self.load(key(group, HAS_CHECKSUM_PAGE)).await?;
        let state = self.inner.state.borrow();
        let start = state.geometry.group_start(group);
        let blocks = from as usize..state.geometry.group_blocks(group) as usize;
        // Not waited since it was read; where it is gone all the same, the next step finds it.
        let has_one = state.pages.get(&key(group, HAS_CHECKSUM_PAGE));
        let found = blocks.filter(|block| has_one.is_some_and(|page| has_checksum(page, *block)));
        Ok((group, found.take(most).map(|block| start.plus(block as u64)).collect()))
    }

    async fn load(&self, page: PageKey) -> Result<()> {
        self.attempt(|state| if state.pages.contains_key(&page) { Ok(()) } else { Err(Need::Counts(page)) }).await
    }
}

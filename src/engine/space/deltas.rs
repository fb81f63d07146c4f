//! Changes of reference counts since the last checkpoint, kept in memory until the next one applies them to the pages.
//!
//! No page is read to write data. An entry stays when its sum comes back to zero: the block was handed out meanwhile, and
//! the checkpoint must look at it to find out that it is free.

use rustc_hash::FxHashMap;

use crate::format::{COUNTS_PER_PAGE, Geometry};
use crate::units::PoolBlock;

/// A page of the space map: group and page within it.
pub(crate) type PageKey = (u64, u32);

/// The changes that fall on one page: index within the page, sum of changes.
pub(crate) type DeltaPage = FxHashMap<u16, i32>;

/// Changes by page.
#[derive(Default)]
pub(crate) struct Deltas {
    pages: FxHashMap<PageKey, DeltaPage>,
}

/// The page that counts `block`, and its index there. `None` for blocks before the first group.
pub(crate) fn locate(geometry: &Geometry, block: PoolBlock) -> Option<(PageKey, u16)> {
    let (group, index) = geometry.group_of(block)?;
    let per_page = COUNTS_PER_PAGE as u32;
    Some(((group, index / per_page), (index % per_page) as u16))
}

impl Deltas {
    /// Adds `change` to the count of `block`; a change of 0 only marks it as to be looked at.
    ///
    /// # Panics
    /// When the block is not inside a group: decoding has bounded every address.
    pub(crate) fn add(&mut self, geometry: &Geometry, block: PoolBlock, change: i32) {
        let (page, index) = locate(geometry, block).expect("a counted block lies in a group");
        *self.pages.entry(page).or_default().entry(index).or_insert(0) += change;
    }

    /// The sum for `block`; `None` when nothing has happened to it.
    pub(crate) fn get(&self, page: PageKey, index: u16) -> Option<i32> {
        self.pages.get(&page)?.get(&index).copied()
    }

    /// The pages touched, in order.
    pub(crate) fn pages(&self) -> Vec<PageKey> {
        let mut keys: Vec<PageKey> = self.pages.keys().copied().collect();
        keys.sort_unstable();
        keys
    }

    /// Takes the changes of one page out.
    pub(crate) fn take(&mut self, page: PageKey) -> Option<DeltaPage> {
        self.pages.remove(&page)
    }

    /// Number of pages touched.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

//! Changes of reference counts since the last checkpoint, kept in memory until the next one applies them to the pages.
//!
//! No page is read to write data. An entry stays when its sum comes back to zero: the block was handed out meanwhile, and
//! the checkpoint must look at it to find out that it is free.
//!
//! Changes come in runs: a shadowed leaf adds one to 256 blocks, most of them neighbours. So a page with more than a few
//! changes is an array, and a run is added to it in one go; a page with few is a short list, so that single changes all
//! over a large pool do not take the room of all its pages.

use rustc_hash::FxHashMap;

use crate::format::{COUNTS_PER_PAGE, Geometry};
use crate::units::PoolBlock;

/// A page of the space map: group and page within it. Behind the pages of counts stand those of checksums.
pub(crate) type PageKey = (u64, u32);

const PER_PAGE: usize = COUNTS_PER_PAGE as usize;
/// Most changes that are kept as a list.
const FEW: usize = 32;

/// The changes that fall on one page.
#[derive(Default)]
pub(crate) struct DeltaPage(Changes);

enum Changes {
    /// Index within the page and sum of changes, by index.
    Few(Vec<(u16, i32)>),
    Many(Box<Dense>),
}

struct Dense {
    sums: [i32; PER_PAGE],
    /// Which blocks something has happened to.
    touched: [u64; PER_PAGE / 64],
}

impl Default for Changes {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl Dense {
    fn new() -> Box<Self> {
        Box::new(Self { sums: [0; PER_PAGE], touched: [0; PER_PAGE / 64] })
    }

    fn add_run(&mut self, first: usize, count: usize, change: i32) {
        for sum in &mut self.sums[first..first + count] {
            *sum += change;
        }
        let end = first + count;
        let mut index = first;
        while index < end {
            let word_end = ((index / 64 + 1) * 64).min(end);
            let bits = word_end - index;
            self.touched[index / 64] |= (u64::MAX >> (64 - bits)) << (index % 64);
            index = word_end;
        }
    }

    fn get(&self, index: usize) -> Option<i32> {
        (self.touched[index / 64] >> (index % 64) & 1 == 1).then(|| self.sums[index])
    }
}

impl DeltaPage {
    fn add_run(&mut self, first: u16, count: u16, change: i32) {
        match &mut self.0 {
            Changes::Many(dense) => dense.add_run(first.into(), count.into(), change),
            Changes::Few(list) if list.len() + usize::from(count) > FEW => {
                let mut dense = Dense::new();
                for (index, sum) in list {
                    dense.add_run((*index).into(), 1, *sum);
                }
                dense.add_run(first.into(), count.into(), change);
                self.0 = Changes::Many(dense);
            }
            Changes::Few(list) => {
                for index in first..first + count {
                    match list.binary_search_by_key(&index, |(index, _)| *index) {
                        Ok(position) => list[position].1 += change,
                        Err(position) => list.insert(position, (index, change)),
                    }
                }
            }
        }
    }

    fn get(&self, index: u16) -> Option<i32> {
        match &self.0 {
            Changes::Many(dense) => dense.get(index.into()),
            Changes::Few(list) => {
                let position = list.binary_search_by_key(&index, |(index, _)| *index).ok()?;
                list.get(position).map(|(_, sum)| *sum)
            }
        }
    }

    /// Calls `visit` with the index and the sum of every change, by index.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(u16, i32)) {
        match &self.0 {
            Changes::Few(list) => list.iter().for_each(|(index, sum)| visit(*index, *sum)),
            Changes::Many(dense) => {
                for (word, touched) in dense.touched.iter().enumerate() {
                    let mut left = *touched;
                    while left != 0 {
                        let index = word * 64 + left.trailing_zeros() as usize;
                        visit(index as u16, dense.sums[index]);
                        left &= left - 1;
                    }
                }
            }
        }
    }
}

/// Changes by page.
#[derive(Default)]
pub(crate) struct Deltas {
    /// Where the changes of a page stand in `pages`.
    places: FxHashMap<PageKey, usize>,
    pages: Vec<DeltaPage>,
    /// The page looked up last: the next change mostly falls on it too.
    last: Option<(PageKey, usize)>,
}

impl Deltas {
    /// Adds `change` to the count of `block`; a change of 0 only marks it as to be looked at.
    ///
    /// # Panics
    /// When the block is not inside a group: decoding has bounded every address.
    pub(crate) fn add(&mut self, geometry: &Geometry, block: PoolBlock, change: i32) {
        self.add_run(geometry, block, 1, change);
    }

    /// Adds `change` to the counts of `count` consecutive blocks.
    ///
    /// # Panics
    /// As [`add`](Self::add).
    pub(crate) fn add_run(&mut self, geometry: &Geometry, start: PoolBlock, count: u64, change: i32) {
        let mut done = 0;
        while done < count {
            let (group, index) = geometry.group_of(start.plus(done)).expect("a counted block lies in a group");
            let in_page = u64::from(index) % COUNTS_PER_PAGE;
            let part = (COUNTS_PER_PAGE - in_page).min(count - done);
            let page = self.page_mut((group, index / COUNTS_PER_PAGE as u32));
            page.add_run(in_page as u16, part as u16, change);
            done += part;
        }
    }

    fn page_mut(&mut self, key: PageKey) -> &mut DeltaPage {
        let place = match self.last {
            Some((last, place)) if last == key => place,
            _ => {
                let next = self.pages.len();
                let place = *self.places.entry(key).or_insert(next);
                if place == next {
                    self.pages.push(DeltaPage::default());
                }
                self.last = Some((key, place));
                place
            }
        };
        &mut self.pages[place]
    }

    /// The sum for `block`; `None` when nothing has happened to it.
    pub(crate) fn get(&self, page: PageKey, index: u16) -> Option<i32> {
        self.pages.get(*self.places.get(&page)?)?.get(index)
    }

    /// The pages touched, in order.
    pub(crate) fn pages(&self) -> Vec<PageKey> {
        let mut keys: Vec<PageKey> = self.places.keys().copied().collect();
        keys.sort_unstable();
        keys
    }

    /// Takes the changes of one page out.
    pub(crate) fn take(&mut self, page: PageKey) -> Option<DeltaPage> {
        self.last = None;
        self.pages.get_mut(self.places.remove(&page)?).map(std::mem::take)
    }

    /// Number of pages touched.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(1 << 30, 1 << 20).expect("a layout")
    }

    fn all(deltas: &mut Deltas) -> BTreeMap<(PageKey, u16), i32> {
        let mut found = BTreeMap::new();
        for key in deltas.pages() {
            let page = deltas.take(key).expect("listed");
            page.for_each(|index, sum| assert!(found.insert((key, index), sum).is_none()));
        }
        found
    }

    #[test]
    fn runs_and_single_changes_add_up_across_pages() {
        let geometry = geometry();
        let start = geometry.first_group();
        let mut random = fastrand::Rng::with_seed(3);
        let mut expected: BTreeMap<(PageKey, u16), i32> = BTreeMap::new();
        let mut deltas = Deltas::default();
        for round in 0..2000 {
            // Some pages get few changes, others are crossed by long runs.
            let first = if round % 2 == 0 { random.u64(..100_000) } else { random.u64(..3000) };
            let count = if round % 10 == 1 { random.u64(1..1500) } else { 1 };
            let change = random.i32(-1..=1);
            deltas.add_run(&geometry, start.plus(first), count, change);
            for block in first..first + count {
                let (group, index) = geometry.group_of(start.plus(block)).expect("inside");
                *expected.entry(((group, index / 1024), (index % 1024) as u16)).or_insert(0) += change;
            }
        }
        for ((page, index), sum) in &expected {
            assert_eq!(deltas.get(*page, *index), Some(*sum));
        }
        assert_eq!(deltas.get((0, 31), 1023), expected.get(&((0, 31), 1023)).copied());
        assert!(expected.values().any(|sum| *sum == 0), "a sum of nothing is remembered");
        assert_eq!(all(&mut deltas), expected);
        assert!(deltas.is_empty());
    }

    #[test]
    fn last_page_is_looked_up_anew_after_it_was_taken() {
        let geometry = geometry();
        let block = geometry.first_group().plus(7);
        let mut deltas = Deltas::default();
        deltas.add(&geometry, block, 1);
        assert!(deltas.take((0, 0)).is_some());
        deltas.add(&geometry, block, 2);
        assert_eq!(deltas.get((0, 0), 7), Some(2));
        assert_eq!(deltas.len(), 1);
    }
}

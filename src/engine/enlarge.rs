//! Making a pool larger, in one checkpoint.
//!
//! The geometry stands in the superblock, and everything that depends on it changes with that: groups behind the former
//! end come into being, and the last group, which may have been short, gets the rest of its blocks. Its pages have counted
//! that rest as taken; the same checkpoint counts it as free. Until it is durable no group is appended, or the journal
//! would name blocks that the superblock found after a crash does not know.

use super::pool::until;
use super::space::PageKey;
use super::state::{Need, State};
use super::{Pool, Storage};
use crate::error::{Error, Result};
use crate::format::{COUNTS_PER_PAGE, Geometry};
use crate::units::BLOCK_BYTES;

/// Makes the medium at least so many bytes large.
pub(super) type Enlarger = Box<dyn Fn(u64) -> Result<()>>;

/// A full pool that may grow does so by an eighth, and by this much at least.
const GROWTH_BYTES: u64 = 1 << 30;

impl<S: Storage> Pool<S> {
    /// How the medium is made larger when the pool is to grow by itself.
    pub fn enlarge_with(&self, enlarger: impl Fn(u64) -> Result<()> + 'static) {
        *self.inner.enlarger.borrow_mut() = Some(Box::new(enlarger));
    }

    /// From now on a full pool grows by itself up to `limit_bytes`; 0: it does not.
    pub async fn set_size_limit(&self, limit_bytes: u64) -> Result<()> {
        if limit_bytes > 0 {
            let journal_bytes = self.inner.state.borrow().geometry.journal_blocks * BLOCK_BYTES;
            Geometry::new(limit_bytes, journal_bytes)?;
        }
        self.inner.state.borrow_mut().size_limit_bytes = limit_bytes;
        self.checkpoint().await
    }

    /// Makes a full pool larger, where it may grow. Answers whether it is now.
    pub(super) async fn grow_by_itself(&self) -> Result<bool> {
        let inner = &self.inner;
        let blocks = || inner.state.borrow().geometry.pool_blocks;
        let before = blocks();
        until(&inner.signals.space, || !inner.growing.get()).await;
        if blocks() > before {
            return Ok(true);
        }
        let (size, limit) = (before * BLOCK_BYTES, inner.state.borrow().size_limit_bytes);
        if size >= limit || inner.host_full.get() {
            return Ok(false);
        }
        let wanted = (size + (size / 8).max(GROWTH_BYTES).next_multiple_of(BLOCK_BYTES)).min(limit);
        let enlarged = inner.enlarger.borrow().as_ref().map(|enlarge| enlarge(wanted));
        match enlarged {
            None => return Ok(false),
            Some(Err(error)) => {
                tracing::error!("the pool is full and cannot grow: {error}");
                return Ok(false);
            }
            Some(Ok(())) => {}
        }
        self.enlarge(wanted).await?;
        tracing::warn!(bytes = wanted, limit, "the pool was full and has grown");
        Ok(true)
    }

    /// Makes the pool `size_bytes` large; its storage has that size already. Durable on return.
    ///
    /// # Errors
    /// `InvalidInput` for a size that is smaller, larger than the storage, or no pool's size at all.
    pub async fn enlarge(&self, size_bytes: u64) -> Result<()> {
        let inner = &self.inner;
        until(&inner.signals.space, || !inner.growing.get()).await;
        {
            let mut state = inner.state.borrow_mut();
            state.check_writable()?;
            let present = state.geometry;
            let wanted = Geometry::new(size_bytes, present.journal_blocks * BLOCK_BYTES)?;
            if wanted.pool_blocks < present.pool_blocks {
                return Err(Error::InvalidInput(format!("pool {} cannot become smaller", state.name)));
            }
            if inner.storage.size_bytes() < size_bytes {
                return Err(Error::InvalidInput(format!(
                    "the file has {} bytes, the pool is to have {size_bytes}",
                    inner.storage.size_bytes()
                )));
            }
            if wanted == present {
                return Ok(());
            }
            state.enlargement = Some(wanted);
        }
        inner.growing.set(true);
        let done = self.checkpoint().await;
        inner.state.borrow_mut().enlargement = None;
        inner.growing.set(false);
        inner.host_full.set(false);
        inner.signals.space.notify(usize::MAX);
        done
    }

    /// Brings the pages into memory that an enlargement changes at the next instant.
    pub(super) async fn prepare_enlargement(&self) -> Result<()> {
        let last = {
            let state = self.inner.state.borrow();
            let Some(_) = state.enlargement else { return Ok(()) };
            state.geometry.group_count() - 1
        };
        self.load_descriptor(last).await?;
        loop {
            let Some(page) = self.inner.state.borrow().page_missing_for_enlargement() else { return Ok(()) };
            self.attempt(|state| if state.pages.contains_key(&page) { Ok(()) } else { Err(Need::Counts(page)) })
                .await?;
        }
    }
}

impl State {
    /// Pages of the last group that count blocks which are to come into being. None when the group has no pages yet: an
    /// empty group's counts follow from the geometry.
    fn pages_to_enlarge(&self, wanted: &Geometry) -> Vec<PageKey> {
        let last = self.geometry.group_count() - 1;
        let (before, after) = (self.geometry.group_blocks(last), wanted.group_blocks(last));
        if last >= self.groups_in_use || self.index_entry(last).empty || before == after {
            return Vec::new();
        }
        (before / COUNTS_PER_PAGE..after.div_ceil(COUNTS_PER_PAGE)).map(|page| (last, page as u32)).collect()
    }

    /// A page that the enlargement to come needs and that is not in memory.
    pub(super) fn page_missing_for_enlargement(&self) -> Option<PageKey> {
        let pages = self.pages_to_enlarge(self.enlargement.as_ref()?);
        pages.into_iter().find(|page| !self.pages.contains_key(page))
    }

    /// The instant of an enlargement, within a checkpoint's: the new geometry holds, and what it adds to the last group
    /// is no longer counted as taken.
    pub(super) fn begin_enlargement(&mut self) {
        let Some(wanted) = self.enlargement.take() else { return };
        let last = self.geometry.group_count() - 1;
        let (before, after) = (self.geometry.group_blocks(last), wanted.group_blocks(last));
        let pages = self.pages_to_enlarge(&wanted);
        self.geometry = wanted;
        if pages.is_empty() {
            // What was implied of the group is implied anew.
            self.pages.retain(|(group, _), _| *group != last);
            return;
        }
        let start = wanted.group_start(last);
        for index in before..after {
            self.deltas.add(&wanted, start.plus(index), -1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::rc::Rc;

    use async_executor::LocalExecutor;
    use uuid::Uuid;

    use super::*;
    use crate::engine::{CreateOptions, Memory, NewVolume, OpenOptions, PrivateLog};
    use crate::io::{IoMemory, MemoryStorage};
    use crate::units::PoolBlock;

    const JOURNAL_BYTES: u64 = 4 << 20;
    const MIB: u64 = 1 << 20;

    /// A pool of one whole group and a last one of `rest_blocks`.
    fn size_with_rest(rest_blocks: u64) -> u64 {
        let one = Geometry { pool_blocks: u64::MAX / 8192, journal_blocks: JOURNAL_BYTES / BLOCK_BYTES };
        (one.group_start(1).0 + rest_blocks) * BLOCK_BYTES
    }

    async fn opened(storage: &MemoryStorage, executor: &Rc<LocalExecutor<'static>>) -> Pool<MemoryStorage> {
        let storage = MemoryStorage::from_image(storage.snapshot_image());
        let pool = Pool::open(storage, Box::new(PrivateLog::new(7)), OpenOptions::default()).await.unwrap();
        let background = pool.clone();
        executor.spawn(async move { background.run().await }).detach();
        pool
    }

    async fn fill(pool: &Pool<MemoryStorage>, name: &str, bytes: u64) -> Result<()> {
        let new = NewVolume {
            uuid: Uuid::from_u128(u128::from(bytes) << 64 | name.len() as u128),
            name: name.into(),
            size_bytes: 4 << 30,
            sector_size: 4096,
            quota_bytes: 0,
            reservation_bytes: 0,
            created: 1,
            attributes: BTreeMap::new(),
        };
        let id = pool.create_volume(new).await?.id;
        let volume = pool.open_volume(id, false)?;
        let memory = IoMemory::zeroed(MIB as usize);
        memory.write(0, &[7; MIB as usize]);
        for offset in (0..bytes).step_by(MIB as usize) {
            drop(volume.write(offset, &memory, false).await?);
        }
        volume.flush().await
    }

    /// Enlarges a pool that holds `used` bytes from a last group of `rest_blocks` to `to_bytes`, and uses what came.
    fn enlarged(rest_blocks: u64, used: u64, to_bytes: u64, reopen: bool) {
        let executor = Rc::new(LocalExecutor::new());
        let size_bytes = size_with_rest(rest_blocks);
        let storage = MemoryStorage::new(size_bytes);
        futures_lite::future::block_on(executor.run(async {
            let options =
                CreateOptions { uuid: Uuid::from_u128(1), name: "p".into(), size_bytes, journal_bytes: JOURNAL_BYTES };
            Pool::create(&storage, &options).await.unwrap();
            let mut pool = opened(&storage, &executor).await;
            fill(&pool, "first", used).await.unwrap();
            if reopen {
                pool.checkpoint().await.unwrap();
            }
            pool.inner.storage.grow(to_bytes);
            pool.enlarge(to_bytes).await.unwrap();
            assert_eq!(pool.info().size_bytes, to_bytes);
            if reopen {
                pool.close().await.unwrap();
                pool = opened(&pool.inner.storage, &executor).await;
                assert_eq!(pool.info().size_bytes, to_bytes);
            }
            // More than the former size had left.
            fill(&pool, "more", to_bytes - size_bytes - 8 * MIB).await.unwrap();
            let report = pool.check().await.unwrap();
            assert!(report.is_clean(), "{:?}", &report.faults[..report.faults.len().min(5)]);
            pool.close().await.unwrap();
            let pool = opened(&pool.inner.storage, &executor).await;
            assert!(pool.check().await.unwrap().is_clean());
        }));
    }

    #[test]
    fn unused_last_group_becomes_whole() {
        enlarged(2000, MIB, size_with_rest(2000) + 256 * MIB, false);
        enlarged(2000, MIB, size_with_rest(2000) + 256 * MIB, true);
    }

    #[test]
    fn used_short_group_gets_the_rest_of_its_blocks() {
        // The first group has 127 MiB for data: this much reaches into the second, up to the page that counts its end.
        enlarged(4000, 139 * MIB, size_with_rest(9000), false);
        enlarged(4000, 139 * MIB, size_with_rest(9000), true);
        enlarged(4000, 139 * MIB, size_with_rest(4000) + 256 * MIB, true);
    }

    #[test]
    fn rest_too_small_for_a_group_becomes_one() {
        enlarged(500, 100 * MIB, size_with_rest(500) + 64 * MIB, true);
    }

    #[test]
    fn smaller_or_impossible_sizes_are_refused_and_change_nothing() {
        let executor = Rc::new(LocalExecutor::new());
        let size_bytes = size_with_rest(2000);
        let storage = MemoryStorage::new(size_bytes);
        futures_lite::future::block_on(executor.run(async {
            let options =
                CreateOptions { uuid: Uuid::from_u128(1), name: "p".into(), size_bytes, journal_bytes: JOURNAL_BYTES };
            Pool::create(&storage, &options).await.unwrap();
            let pool = opened(&storage, &executor).await;
            for odd in [size_bytes - BLOCK_BYTES, size_bytes + 1, size_bytes + BLOCK_BYTES, 1 << 60, 0] {
                assert!(matches!(pool.enlarge(odd).await, Err(Error::InvalidInput(_))), "{odd}");
            }
            pool.enlarge(size_bytes).await.unwrap();
            assert_eq!(pool.info().size_bytes, size_bytes);
            assert!(pool.inner.state.borrow().geometry.group_of(PoolBlock(size_bytes / BLOCK_BYTES)).is_none());
        }));
    }
}

//! A volume in use: reading it, and what all changes of it share.

use std::rc::Rc;

use smallvec::SmallVec;

use super::pool::{Inner, Pool, until};
use super::ranges::RangeId;
use super::state::{State, TreeKey, Try};
use super::tree::entry_index;
use super::{Memory, Storage};
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{ENTRIES_PER_NODE, EntryKind};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Lsn, PoolBlock, SECTOR_SIZE, VolumeId};

/// An open volume. While a handle exists the volume is in use: it is not deleted, rolled back or shrunk.
pub struct VolumeHandle<S: Storage> {
    pub(super) pool: Pool<S>,
    pub(super) id: VolumeId,
    pub(super) sector_size: u32,
    pub(super) read_only: bool,
}

impl<S: Storage> Clone for VolumeHandle<S> {
    fn clone(&self) -> Self {
        self.pool.count_handle(self.id, true);
        Self { pool: self.pool.clone(), ..*self }
    }
}

impl<S: Storage> Drop for VolumeHandle<S> {
    fn drop(&mut self) {
        self.pool.count_handle(self.id, false);
    }
}

/// A range of a volume that a change holds. Keep it until the reply has been handed over (rule O8): a request that is
/// sent again after a crash must not overwrite a later one that was answered.
#[must_use]
pub struct Held<S: Storage> {
    inner: Rc<Inner<S>>,
    volume: VolumeId,
    range: RangeId,
}

impl<S: Storage> Held<S> {
    /// Lets the range go now when that rule is broken on purpose.
    pub(super) fn answered(self) -> Self {
        if is_broken(Canary::LetGoBeforeReply) {
            self.let_go();
        }
        self
    }

    fn let_go(&self) {
        let released = {
            let mut state = self.inner.state.borrow_mut();
            state.volumes.get_mut(&self.volume).and_then(|volume| {
                let waiting = volume.ranges.release(self.range);
                (waiting || volume.unready).then(|| Rc::clone(&volume.released))
            })
        };
        if let Some(event) = released {
            event.notify(usize::MAX);
        }
    }
}

impl<S: Storage> Drop for Held<S> {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Where a part of a request lies in the pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// `None` for a hole.
    pub(super) at: Option<PoolBlock>,
    /// Bytes from the block's start.
    pub(super) skip: u64,
    pub(super) length: u64,
}

impl<S: Storage> Pool<S> {
    /// Opens a volume for I/O.
    ///
    /// # Errors
    /// `NotFound`; `ReadOnly` when a snapshot is opened for writing; `Busy` while it is being changed as a whole.
    pub fn open_volume(&self, id: VolumeId, read_only: bool) -> Result<VolumeHandle<S>> {
        let sector_size = {
            let state = self.inner.state.borrow();
            let volume = state.volume(id)?;
            if volume.record.flags.read_only && !read_only {
                return Err(Error::ReadOnly(format!(
                    "{} is a snapshot; clone it to write (`plywood clone create`)",
                    volume.record.name
                )));
            }
            if volume.unready {
                return Err(Error::Busy(format!("{} is being changed", volume.record.name)));
            }
            volume.record.sector_size
        };
        self.count_handle(id, true);
        Ok(VolumeHandle { pool: self.clone(), id, sector_size, read_only })
    }

    fn count_handle(&self, id: VolumeId, more: bool) {
        let handles = &self.inner.open_handles;
        handles.set(if more { handles.get() + 1 } else { handles.get().saturating_sub(1) });
        if let Ok(mut state) = self.inner.state.try_borrow_mut()
            && let Some(volume) = state.volumes.get_mut(&id)
        {
            volume.open = if more { volume.open + 1 } else { volume.open.saturating_sub(1) };
        }
    }

    fn count_request(&self) {
        let requests = &self.inner.requests;
        requests.set(requests.get().wrapping_add(1));
    }

    /// Waits until the blocks `start..end` of a volume are held. Nothing else may be held meanwhile.
    pub(super) async fn hold_range(&self, id: VolumeId, start: u64, end: u64) -> Result<Held<S>> {
        self.count_request();
        let (range, released) = {
            let mut state = self.inner.state.borrow_mut();
            let volume = state.volume_mut(id)?;
            (volume.ranges.request(start..end), Rc::clone(&volume.released))
        };
        let held = Held { inner: Rc::clone(&self.inner), volume: id, range };
        until(&released, || {
            self.inner.state.borrow().volumes.get(&id).is_none_or(|volume| volume.ranges.is_held(range))
        })
        .await;
        Ok(held)
    }
}

impl<S: Storage> VolumeHandle<S> {
    /// Identity of the volume.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// Size the volume shows, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.pool.inner.state.borrow().volumes.get(&self.id).map_or(0, |volume| volume.record.size_bytes)
    }

    /// Sector size in bytes, 512 or 4096.
    pub fn sector_size(&self) -> u32 {
        self.sector_size
    }

    /// Whether writes are refused through this handle.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Refuses what is not inside the volume or not whole sectors of 512 bytes.
    pub(super) fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let size = self.size_bytes();
        let sector = SECTOR_SIZE as u64;
        let inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if !inside || !offset.is_multiple_of(sector) || !length.is_multiple_of(sector) {
            return Err(Error::InvalidInput(format!(
                "{}: {length} bytes at {offset} are not whole sectors inside its {size} bytes",
                self.pool.volume_name(self.id)
            )));
        }
        Ok(())
    }

    /// Fills `into` from `offset` bytes. What was never written reads as zeros.
    pub async fn read(&self, offset: u64, into: &S::Memory) -> Result<()> {
        let length = into.len() as u64;
        self.check_range(offset, length)?;
        self.pool.count_request();
        if self.verifies() {
            return Box::pin(self.read_verified(offset, into)).await;
        }
        let stay = self.pool.enter();
        let first = self.pool.attempt(|state| state.extents(self.id, offset, length)).await?;
        if !self.read_only {
            self.pool.note_read(self.id, offset, length, first.len());
        }
        let storage = &self.pool.inner.storage;
        let mut reads = SmallVec::<[_; 1]>::new();
        let mut position = 0;
        for extent in first {
            let range = position as usize..(position + extent.length) as usize;
            match extent.at {
                None => into.zero(range),
                Some(block) => {
                    let alignment = storage.alignment() as u64;
                    let aligned = extent.skip.is_multiple_of(alignment) && extent.length.is_multiple_of(alignment);
                    if aligned {
                        reads
                            .push((storage.read(block.offset_bytes() + extent.skip, &into.slice(range.clone())), None));
                    } else {
                        // The host's sectors are larger than ours: read whole blocks and take the part.
                        let blocks = (extent.skip + extent.length).div_ceil(BLOCK_BYTES) as usize;
                        let whole = storage.allocate(blocks * BLOCK_SIZE);
                        let read = storage.read(block.offset_bytes(), &whole);
                        let skip = extent.skip as usize;
                        reads.push((read, Some((range.start, whole.slice(skip..skip + range.len())))));
                    }
                }
            }
            position += extent.length;
        }
        let mut outcome = Ok(());
        for (read, part) in reads {
            match read.await {
                Ok(()) => {
                    if let Some((at, part)) = part {
                        into.copy_from(at, &part);
                    }
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        drop(stay);
        outcome
            .map_err(|error| Error::io(format!("read of {} at byte {offset}", self.pool.volume_name(self.id)), error))
    }

    /// Makes everything durable that was written to this volume and answered (rule O2).
    pub async fn flush(&self) -> Result<()> {
        let mut last = self.pool.inner.state.borrow().volume(self.id)?.last;
        if is_broken(Canary::FlushWithoutRecords) {
            last = Lsn(0);
        }
        self.pool.flush_through(last).await
    }

    /// The next byte at or after `offset` that is data, or that is in a hole; `None` when there is none before the end.
    pub async fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>> {
        let size = self.size_bytes();
        let end = size.div_ceil(BLOCK_BYTES);
        let mut block = offset / BLOCK_BYTES;
        let _stay = self.pool.enter();
        while block < end {
            let next = self.pool.attempt(|state| state.seek_leaf(self.id, block, data)).await?;
            match next {
                Ok(found) if found < end => return Ok(Some((found * BLOCK_BYTES).max(offset))),
                Ok(_) => return Ok((!data).then_some(size)),
                Err(go_on) => block = go_on,
            }
        }
        Ok((!data && offset < size).then_some(size))
    }
}

impl State {
    /// Where the bytes `offset..offset + length` of a volume lie, neighbours in the pool joined.
    pub(super) fn extents(&mut self, volume: VolumeId, offset: u64, length: u64) -> Try<SmallVec<[Extent; 2]>> {
        let mut extents: SmallVec<[Extent; 2]> = SmallVec::new();
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let leaf_end = ((block | (ENTRIES_PER_NODE as u64 - 1)) + 1) * BLOCK_BYTES;
            let stop = end.min(leaf_end);
            let leaf = self.leaf(TreeKey::Volume(volume), block)?;
            while at < stop {
                let block = at / BLOCK_BYTES;
                let skip = at % BLOCK_BYTES;
                let part = (BLOCK_BYTES - skip).min(stop - at);
                let mapped =
                    leaf.map(|node| node.entry(entry_index(block, 0))).filter(|entry| entry.kind == EntryKind::Block);
                let here = mapped.map(|entry| entry.address);
                match (extents.last_mut(), here) {
                    (Some(last), None) if last.at.is_none() => last.length += part,
                    (Some(last), Some(here))
                        if last.at.is_some_and(|first| {
                            first.offset_bytes() + last.skip + last.length == here.offset_bytes() + skip
                        }) =>
                    {
                        last.length += part;
                    }
                    _ => extents.push(Extent { at: here, skip, length: part }),
                }
                at += part;
            }
        }
        Ok(extents)
    }

    /// Looks in one leaf for the next data (or hole) at or after `block`; `Err` is the block to go on at.
    fn seek_leaf(&mut self, volume: VolumeId, block: u64, data: bool) -> Try<std::result::Result<u64, u64>> {
        let next = (block | (ENTRIES_PER_NODE as u64 - 1)) + 1;
        let Some(leaf) = self.leaf(TreeKey::Volume(volume), block)? else {
            return Ok(if data { Err(self.after_hole(TreeKey::Volume(volume), block)) } else { Ok(block) });
        };
        let found = (block..next).find(|at| (leaf.entry(entry_index(*at, 0)).kind == EntryKind::Block) == data);
        Ok(found.ok_or(next))
    }
}

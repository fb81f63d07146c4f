//! Volumes as a whole: creating, renaming, resizing, protecting and deleting them, and their attributes.
//!
//! A call returns when its change is durable. One that is repeated with the same uuid answers what the first one made.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::Storage;
use super::growth::Use;
use super::info::VolumeInfo;
use super::pool::{Pool, to_memory};
use super::reservation::check_reservation;
use super::space::Run;
use super::state::{State, Volume};
use super::write::quiesce;
use crate::error::{Corrupt, Error, Result, Structure};
use crate::format::{
    self, AttributeBlockRef, Entry, EntryKind, OnFull, Place, Record, Root, VOLUME_BLOCKS_MAX, VolumeFlags,
    VolumeRecord, check_name,
};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Clock, Lsn, PoolBlock, VolumeId};

/// Room in the log for one record of a volume.
pub(super) const VOLUME_RECORD_BYTES: usize = 4096 + 64;

/// A volume to be created.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its uuid, chosen by the caller.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Size it shows, in bytes: a multiple of 4096 above 0, at most 16 TiB.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub sector_size: u32,
    /// Most own bytes; 0 for no limit.
    pub quota_bytes: u64,
    /// Bytes of its own that are always there for it; 0 for none.
    pub reservation_bytes: u64,
    /// Time of creation in nanoseconds since 1970.
    pub created: u64,
    /// Key and value pairs.
    pub attributes: BTreeMap<String, Vec<u8>>,
}

impl<S: Storage> Pool<S> {
    /// Creates an empty volume.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name or size, `AlreadyExists` when the name is taken, `NoSpace`, also when there is too
    /// little for its reservation.
    pub async fn create_volume(&self, new: NewVolume) -> Result<VolumeInfo> {
        check_size(new.size_bytes)?;
        if new.sector_size != 512 && new.sector_size != 4096 {
            return Err(Error::InvalidInput(format!("sector size {} is neither 512 nor 4096", new.sector_size)));
        }
        check_reservation(new.reservation_bytes, new.size_bytes, new.quota_bytes)?;
        if let Some(known) = self.check_new(new.uuid, &new.name).await? {
            return Ok(known);
        }
        self.make_room_to_owe(None, |state| Ok(new_record(state, &new))).await?;
        let attributes = self.write_attributes(&new.attributes).await?;
        let promise = self.promise(1, VOLUME_RECORD_BYTES).await?;
        let (id, lsn) = {
            let mut state = self.inner.state.borrow_mut();
            state.check_name_free(&new.name)?;
            let mut record = new_record(&state, &new);
            let id = record.id;
            state.check_owing(None, &record)?;
            (record.attributes_bytes, record.attributes) = (attributes.length, attributes.take());
            let lsn = state.publish(None, &Record::VolumeCreated(Box::new(record.clone())));
            state.adopt_attributes(&record.attributes);
            state.add_volume(record, lsn);
            (id, lsn)
        };
        drop(promise);
        self.flush_through(lsn).await?;
        self.volume_by_id(id)
    }

    /// Gives a volume another name.
    pub async fn rename_volume(&self, id: VolumeId, name: &str) -> Result<()> {
        check_name(name)?;
        let named = {
            let state = self.inner.state.borrow();
            let volume = state.volume(id)?;
            let named = (volume.record.name == name).then_some(volume.last);
            if named.is_none() {
                state.check_name_free(name)?;
            }
            named
        };
        if let Some(last) = named {
            return self.flush_through(last).await;
        }
        self.change(id, |state, record| {
            state.check_name_free(name)?;
            record.name = name.to_owned();
            Ok(())
        })
        .await
    }

    /// Changes the size that a volume shows. A reservation that is more than that becomes as much. What a smaller one no longer shows is given up for good. Growing works while
    /// the volume is in use; shrinking does not.
    pub async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> Result<()> {
        check_size(size_bytes)?;
        {
            let state = self.inner.state.borrow();
            let volume = state.volume(id)?;
            if volume.record.flags.read_only {
                return Err(Error::ReadOnly(format!("{} is a snapshot", volume.record.name)));
            }
            if size_bytes < volume.record.size_bytes && volume.open > 0 {
                return Err(Error::Busy(format!("{} is attached; detach it to shrink it", volume.record.name)));
            }
        }
        let resized = |record: &VolumeRecord| VolumeRecord {
            size_bytes,
            reservation_bytes: record.reservation_bytes.min(size_bytes),
            ..record.clone()
        };
        self.make_room_to_owe(Some(id), |state| Ok(resized(&state.volume(id)?.record))).await?;
        let start = size_bytes.div_ceil(BLOCK_BYTES);
        self.wait_for_gathering(id).await;
        self.change_with(
            Use::Metadata,
            id,
            |state, id| state.check_unmap(id, start, VOLUME_BLOCKS_MAX),
            |state, record| {
                // Looked at again: room was waited for since.
                let volume = state.volume(id)?;
                if size_bytes < record.size_bytes && (volume.open > 0 || !volume.ranges.is_empty()) {
                    return Err(Error::Busy(format!("{} is attached; detach it to shrink it", record.name)));
                }
                *record = resized(record);
                state.check_owing(Some(id), record)
            },
        )
        .await
    }

    /// Protects a volume from deletion, or no longer.
    pub async fn protect_volume(&self, id: VolumeId, protected: bool) -> Result<()> {
        self.change(id, |_, record| {
            record.flags.protected = protected;
            Ok(())
        })
        .await
    }

    /// Sets the most bytes that a volume may own; 0 for no limit.
    ///
    /// # Errors
    /// `InvalidInput` for less than its reservation.
    pub async fn set_quota(&self, id: VolumeId, quota_bytes: u64) -> Result<()> {
        let check = |record: &VolumeRecord| check_reservation(record.reservation_bytes, record.size_bytes, quota_bytes);
        check(&self.inner.state.borrow().volume(id)?.record)?;
        self.change(id, |_, record| {
            check(record)?;
            record.quota_bytes = quota_bytes;
            Ok(())
        })
        .await
    }

    /// Deletes a volume. Its blocks come back in the background.
    pub async fn delete_volume(&self, id: VolumeId) -> Result<()> {
        let promise = self.promise_for(Use::Release, None, 1, 64).await?;
        self.wait_for_gathering(id).await;
        let lsn = {
            let mut state = self.inner.state.borrow_mut();
            let volume = state.volume(id)?;
            let name = &volume.record.name;
            if volume.open > 0 || volume.unready {
                return Err(Error::Busy(format!("{name} is in use; detach it first")));
            }
            if volume.record.flags.protected {
                return Err(Error::ReadOnly(format!(
                    "{name} is protected; lift that first (`plywood volume protect --off`)"
                )));
            }
            let lsn = state.publish(None, &Record::VolumeDeleted { volume: id });
            state.remove_volume(id, lsn);
            lsn
        };
        drop(promise);
        self.inner.signals.carcass.notify(usize::MAX);
        self.flush_through(lsn).await
    }

    /// A volume's key and value pairs.
    pub async fn attributes(&self, id: VolumeId) -> Result<BTreeMap<String, Vec<u8>>> {
        let _stay = self.enter();
        let (blocks, length) = {
            let state = self.inner.state.borrow();
            let record = &state.volume(id)?.record;
            (record.attributes.clone(), record.attributes_bytes as usize)
        };
        let mut bytes = Vec::with_capacity(blocks.len() * BLOCK_SIZE);
        for (index, block) in blocks.iter().enumerate() {
            // Seeded by position only: a clone may share its origin's blocks.
            let place = Place::Attributes { volume: VolumeId(0), index: index as u32 };
            bytes.extend(self.read_checked(block.address, false, block.checksum, place, Structure::Attributes).await?);
        }
        let address = blocks.first().map_or(PoolBlock(0), |block| block.address);
        format::decode_attributes(&bytes, length)
            .map_err(|check| Corrupt { structure: Structure::Attributes, address, check }.into())
    }

    /// Sets and removes key and value pairs of a volume.
    pub async fn set_attributes(&self, id: VolumeId, changes: BTreeMap<String, Option<Vec<u8>>>) -> Result<()> {
        loop {
            let before = self.inner.state.borrow().volume(id)?.record.attributes.clone();
            let mut attributes = self.attributes(id).await?;
            for (key, value) in &changes {
                match value {
                    Some(value) => attributes.insert(key.clone(), value.clone()),
                    None => attributes.remove(key),
                };
            }
            let mut written = Some(self.write_attributes(&attributes).await?);
            // Another change of them may have come in between, and would be lost.
            let mut overtaken = false;
            self.change(id, |_, record| {
                overtaken = record.attributes != before;
                if !overtaken && let Some(written) = written.take() {
                    record.attributes_bytes = written.length;
                    record.attributes = written.take();
                }
                Ok(())
            })
            .await?;
            if !overtaken {
                return Ok(());
            }
        }
    }

    /// Changes a volume's record in one durable step.
    pub(super) async fn change(
        &self,
        id: VolumeId,
        edit: impl FnMut(&mut State, &mut VolumeRecord) -> Result<()>,
    ) -> Result<()> {
        self.change_with(Use::Metadata, id, |_, _| Ok(()), edit).await
    }

    /// The same for a change after which others may have more room than before.
    pub(super) async fn change_releasing(
        &self,
        id: VolumeId,
        edit: impl FnMut(&mut State, &mut VolumeRecord) -> Result<()>,
    ) -> Result<()> {
        self.change_with(Use::Release, id, |_, _| Ok(()), edit).await
    }

    async fn change_with(
        &self,
        wanted: Use,
        id: VolumeId,
        mut ready: impl FnMut(&mut State, VolumeId) -> super::state::Try<()>,
        mut edit: impl FnMut(&mut State, &mut VolumeRecord) -> Result<()>,
    ) -> Result<()> {
        let promise = self.promise_for(wanted, None, 1, VOLUME_RECORD_BYTES).await?;
        let stay = self.enter();
        let lsn = self
            .attempt(|state| {
                ready(state, id)?;
                let Some(volume) = state.volumes.get(&id) else {
                    return Ok(Err(Error::NotFound(format!("no volume with id {id}"))));
                };
                let mut record = volume.record.clone();
                if let Err(error) = edit(state, &mut record) {
                    return Ok(Err(error));
                }
                // Not changed by this, and long: `change_volume` keeps what the volume has.
                (record.account_spans, record.accounts_from, record.in_place_blocks) = (Vec::new(), 0, 0);
                let lsn = state.publish(Some(id), &Record::VolumeChanged(Box::new(record.clone())));
                state.change_volume(&record, lsn);
                Ok(Ok(lsn))
            })
            .await??;
        drop((stay, promise));
        self.flush_through(lsn).await
    }

    /// Refuses a bad name; answers the volume when one with this uuid was made already, as durable as an answer must be:
    /// the call that made it may not have returned.
    pub(super) async fn check_new(&self, uuid: Uuid, name: &str) -> Result<Option<VolumeInfo>> {
        check_name(name)?;
        let (id, last) = {
            let state = self.inner.state.borrow();
            state.check_writable()?;
            let Some((id, volume)) = state.volumes.iter().find(|(_, volume)| volume.record.uuid == uuid) else {
                state.check_name_free(name)?;
                state.check_ids_left(1)?;
                return Ok(None);
            };
            if volume.unready {
                return Err(Error::Busy(format!("{} is being made", volume.record.name)));
            }
            (*id, volume.last)
        };
        self.flush_through(last).await?;
        self.volume_by_id(id).map(Some)
    }

    /// Writes attributes to new blocks. The record that names them comes after, and they count from then on: a checkpoint
    /// between the two must not hold them.
    pub(super) async fn write_attributes(&self, attributes: &BTreeMap<String, Vec<u8>>) -> Result<Attributes<S>> {
        let bytes = format::encode_attributes(attributes)?;
        let used = if attributes.is_empty() { 0 } else { bytes.len() };
        let mut written = Attributes { pool: self.clone(), blocks: Vec::new(), length: used as u32 };
        for (index, chunk) in bytes.chunks(BLOCK_SIZE).take(used.div_ceil(BLOCK_SIZE)).enumerate() {
            let promise = self.promise(1, 0).await?;
            let (address, checksum) = {
                let mut state = self.inner.state.borrow_mut();
                let address = state.allocator.take_meta(1).expect("room was promised");
                state.allocator.hold(address);
                let place = Place::Attributes { volume: VolumeId(0), index: index as u32 };
                (address, format::checksum(&state.uuid, place, chunk))
            };
            drop(promise);
            written.blocks.push(AttributeBlockRef { address, checksum });
            let memory = to_memory(&self.inner.storage, chunk);
            let outcome = self.inner.storage.write(address.offset_bytes(), &memory).await;
            outcome.map_err(|error| Error::io(format!("write of attributes at pool block {address}"), error))?;
        }
        Ok(written)
    }

    /// Of a volume that nobody has open, blocks may still be gathered: waits for the last of that. One that is in use is not
    /// waited for, since under load some range of it is always held.
    async fn wait_for_gathering(&self, id: VolumeId) {
        let is_open = self.inner.state.borrow().volumes.get(&id).is_some_and(|volume| volume.open > 0);
        if !is_open {
            quiesce(self, id).await;
        }
    }

    /// Takes a volume out of use for a change of its whole tree, and waits for what is in flight.
    pub(super) async fn take_out_of_use(&self, id: VolumeId) -> Result<()> {
        {
            let mut state = self.inner.state.borrow_mut();
            let volume = state.volume_mut(id)?;
            if volume.open > 0 || volume.unready {
                return Err(Error::Busy(format!("{} is in use; detach it first", volume.record.name)));
            }
            volume.unready = true;
        }
        quiesce(self, id).await;
        Ok(())
    }

    pub(super) fn put_back_in_use(&self, id: VolumeId) {
        if let Some(volume) = self.inner.state.borrow_mut().volumes.get_mut(&id) {
            volume.unready = false;
        }
    }
}

/// Attributes that have been written. Their blocks are given back unless a record takes them.
pub(super) struct Attributes<S: Storage> {
    pool: Pool<S>,
    blocks: Vec<AttributeBlockRef>,
    pub(super) length: u32,
}

impl<S: Storage> Attributes<S> {
    /// The blocks, for the record that is about to name them.
    pub(super) fn take(mut self) -> Vec<AttributeBlockRef> {
        std::mem::take(&mut self.blocks)
    }
}

impl<S: Storage> Drop for Attributes<S> {
    fn drop(&mut self) {
        // Taken while the state is borrowed: then there is nothing to give back.
        if !self.blocks.is_empty() {
            self.pool.inner.state.borrow_mut().abandon(self.blocks.iter().map(|block| block.address));
        }
    }
}

/// The record of a new volume, without its attributes.
fn new_record(state: &State, new: &NewVolume) -> VolumeRecord {
    let clock = state.clock;
    VolumeRecord {
        id: state.next_volume,
        uuid: new.uuid,
        name: new.name.clone(),
        size_bytes: new.size_bytes,
        sector_size: new.sector_size,
        flags: VolumeFlags::default(),
        root: Root { entry: Entry::hole(clock), level: 0 },
        created_at: clock,
        shared_at: clock,
        rolled_at: Clock(0),
        rolled_to: Clock(0),
        origin: None,
        received_from: None,
        own_blocks: 0,
        mapped_blocks: 0,
        in_place_blocks: 0,
        quota_bytes: new.quota_bytes,
        reservation_bytes: new.reservation_bytes,
        on_full: OnFull::Error,
        digest: None,
        created_time: new.created,
        depth: 0,
        attributes: Vec::new(),
        attributes_bytes: 0,
        account_spans: Vec::new(),
        accounts_from: 0,
    }
}

/// Refuses sizes that no volume can have.
pub(super) fn check_size(size_bytes: u64) -> Result<()> {
    let most = VOLUME_BLOCKS_MAX * BLOCK_BYTES;
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES) || size_bytes > most {
        return Err(Error::InvalidInput(format!(
            "size {size_bytes} is not a multiple of 4096 bytes between 4 KiB and 16 TiB"
        )));
    }
    Ok(())
}

impl State {
    pub(super) fn check_name_free(&self, name: &str) -> Result<()> {
        if self.names.contains_key(name) {
            return Err(Error::AlreadyExists(format!("there is a volume named {name} already")));
        }
        Ok(())
    }

    /// Adds a volume that a change has made.
    pub(super) fn add_volume(&mut self, record: VolumeRecord, lsn: Lsn) {
        self.next_volume = VolumeId(self.next_volume.0.max(record.id.0 + 1));
        self.names.insert(record.name.clone(), record.id);
        let id = record.id;
        self.volumes.insert(id, Volume::new(record, lsn, false));
        self.reckon(id);
        self.mark_dirty(id);
    }

    /// Removes a volume: its tree becomes a carcass, its attributes go, its record goes with the next checkpoint.
    pub(super) fn remove_volume(&mut self, id: VolumeId, lsn: Lsn) {
        let Some(mut volume) = self.volumes.remove(&id) else { return };
        self.owed_blocks -= volume.owed_blocks;
        self.dirty_volumes -= u64::from(volume.dirty);
        if let Some(run) = volume.window.give_back() {
            self.allocator.release_run(run);
        }
        self.names.remove(&volume.record.name);
        let root = volume.record.root;
        if root.entry.kind == EntryKind::Node {
            self.remember_family(id, volume.family);
        }
        self.add_carcass(id, root.entry, root.level, 0, false, lsn);
        self.drop_attributes(&volume.record.attributes);
        self.deleted.push(id);
    }

    /// Replaces a volume's properties by those of `record`; its tree stays, but for what a smaller size cuts off.
    pub(super) fn change_volume(&mut self, record: &VolumeRecord, lsn: Lsn) {
        let id = record.id;
        let Some(volume) = self.volumes.get_mut(&id) else { return };
        let old = volume.record.clone();
        volume.record = VolumeRecord {
            root: old.root,
            own_blocks: old.own_blocks,
            mapped_blocks: old.mapped_blocks,
            in_place_blocks: old.in_place_blocks,
            created_at: old.created_at,
            shared_at: old.shared_at,
            rolled_at: old.rolled_at,
            rolled_to: old.rolled_to,
            account_spans: old.account_spans,
            accounts_from: old.accounts_from,
            ..record.clone()
        };
        volume.last = lsn;
        volume.reckon(&mut self.owed_blocks);
        self.mark_dirty(id);
        if old.name != record.name {
            self.names.remove(&old.name);
            self.names.insert(record.name.clone(), id);
        }
        if old.attributes != record.attributes {
            self.drop_attributes(&old.attributes);
            self.adopt_attributes(&record.attributes);
        }
        if record.size_bytes < old.size_bytes {
            self.unmap(id, record.size_bytes.div_ceil(BLOCK_BYTES), VOLUME_BLOCKS_MAX, lsn);
        }
    }

    pub(super) fn drop_attributes(&mut self, blocks: &[AttributeBlockRef]) {
        self.accounts.gave(blocks.len() as u64);
        for block in blocks {
            self.count(block.address, -1);
        }
    }

    /// Counts blocks of attributes that a record names from now on.
    pub(super) fn adopt_attributes(&mut self, blocks: &[AttributeBlockRef]) {
        self.accounts.took(blocks.len() as u64);
        for block in blocks {
            self.count(block.address, 1);
            self.allocator.consume(Run { start: block.address, count: 1 });
        }
    }
}

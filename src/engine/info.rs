//! What a pool and its volumes say of themselves.

use uuid::Uuid;

use super::Storage;
use super::pool::Pool;
use super::state::State;
use crate::error::{Error, Result};
use crate::format::OnFull;
use crate::units::{BLOCK_BYTES, Clock, Generation, Lsn, VolumeId};

/// A volume, snapshot or clone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VolumeInfo {
    /// Identity within the pool.
    pub id: VolumeId,
    /// Identity everywhere.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Size it shows, in bytes.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub sector_size: u32,
    /// It is a snapshot.
    pub read_only: bool,
    /// It is protected from deletion.
    pub protected: bool,
    /// Each of its blocks has a recorded checksum.
    pub sealed: bool,
    /// BLAKE3 over its content, of a sealed snapshot.
    pub digest: Option<[u8; 32]>,
    /// Reads of sealed blocks are verified.
    pub verify_on_read: bool,
    /// What it was made from.
    pub origin: Option<Origin>,
    /// Length of its line of origins.
    pub depth: u32,
    /// Bytes born in it since its creation and still mapped.
    pub own_bytes: u64,
    /// Bytes mapped, shared ones included.
    pub mapped_bytes: u64,
    /// What deleting it would free; none while that has not been found yet.
    pub exclusive: Option<ExclusiveBytes>,
    /// Most own bytes; 0 for no limit.
    pub quota_bytes: u64,
    /// Bytes of its own that are always there for it; 0 for none.
    pub reservation_bytes: u64,
    /// Of these, bytes that are not its own yet: so much it can write at any offsets, whatever others take.
    pub reservation_left_bytes: u64,
    /// Time of creation in nanoseconds since 1970.
    pub created: u64,
    /// Writes wait when the pool is full; else they fail at once.
    pub waits_when_full: bool,
    /// Writes that failed since the pool was opened, for want of space or as the medium failed.
    pub failed_writes: u64,
    /// Blocks written as zeros are unmapped.
    pub detect_zeroes: bool,
    /// It is in use.
    pub open: bool,
    /// Own and mapped bytes are exact: nothing that was cut out of it still waits to be counted.
    pub settled: bool,
}

/// What deleting a volume would free, found in the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ExclusiveBytes {
    /// All that would come free: data, map, record and attributes.
    pub bytes: u64,
    /// Of these, data: what it maps beyond is shared.
    pub data_bytes: u64,
    /// Seconds ago that this was so; 0 when nothing has happened since that could change it.
    pub age_seconds: u64,
    /// When it is exact: seconds for which it has been this.
    pub unchanged_seconds: Option<u64>,
}

/// What a volume was made from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// Its id.
    pub id: VolumeId,
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name; none when it has been deleted.
    pub name: Option<String>,
}

/// A pool in use.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PoolInfo {
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Size of the pool in bytes.
    pub size_bytes: u64,
    /// Bytes of blocks in use as of the last checkpoint, the layout of the groups in use included.
    pub used_bytes: u64,
    /// Of these, what the volumes own. Snapshots own nothing beside their volumes.
    pub own_bytes: u64,
    /// Of these, data that no volume owns: what snapshots keep, and what came from volumes that are gone. None while metadata
    /// has not been counted, which a check does for a pool that an older build made.
    pub kept_bytes: Option<u64>,
    /// Of these, the volumes' maps, records and attributes, and tables.
    pub metadata_bytes: Option<u64>,
    /// Superblocks and journal, which stand before the first group: neither used nor free.
    pub head_bytes: u64,
    /// Bytes taken by superblocks, journal and the layout of the groups in use as of the last checkpoint.
    pub layout_bytes: u64,
    /// Bytes of the journal ring.
    pub journal_bytes: u64,
    /// Bytes of the ring in use.
    pub journal_used_bytes: u64,
    /// Bytes free in the groups in memory, ready to be handed out.
    pub ready_bytes: u64,
    /// Bytes kept back for metadata.
    pub reserve_bytes: u64,
    /// Groups in use, and groups there can be.
    pub groups_in_use: u64,
    /// Groups there can be.
    pub groups: u64,
    /// Number of the last checkpoint.
    pub generation: Generation,
    /// The counter of sharings.
    pub clock: Clock,
    /// Last change made.
    pub last_lsn: Lsn,
    /// Last change that is durable.
    pub durable_lsn: Lsn,
    /// Volumes, snapshots and clones.
    pub volumes: u64,
    /// Sum of their virtual sizes in bytes.
    pub virtual_bytes: u64,
    /// Sum of what is reserved for volumes, in bytes.
    pub reserved_bytes: u64,
    /// Of what is free, bytes that only volumes with a reservation can have: what they have not written yet, and their maps.
    pub owed_bytes: u64,
    /// Subtrees that wait to be taken apart.
    pub carcasses: u64,
    /// What was deleted has not all come free yet: blocks of the deleted trees do with the next checkpoint.
    pub freeing: bool,
    /// Nodes in memory that the next checkpoint writes.
    pub dirty_nodes: u64,
    /// Size up to which it grows by itself, in bytes; 0: it does not.
    pub size_limit_bytes: u64,
    /// Writes that wait for space.
    pub waiting: u64,
    /// Reads of sealed blocks are verified through every volume.
    pub verify_on_read: bool,
    /// Snapshots that are sealed.
    pub sealed: u64,
    /// Why nothing is written any more, if so.
    pub poisoned: Option<String>,
}

impl<S: Storage> Pool<S> {
    /// The pool in figures.
    pub fn info(&self) -> PoolInfo {
        let state = self.inner.state.borrow();
        let geometry = &state.geometry;
        let uses = state.uses();
        PoolInfo {
            uuid: state.uuid,
            name: state.name.clone(),
            size_bytes: geometry.pool_blocks * BLOCK_BYTES,
            used_bytes: state.used_blocks * BLOCK_BYTES,
            own_bytes: uses.own_blocks * BLOCK_BYTES,
            kept_bytes: uses.kept_blocks.map(|blocks| blocks * BLOCK_BYTES),
            metadata_bytes: uses.metadata_blocks.map(|blocks| blocks * BLOCK_BYTES),
            head_bytes: geometry.first_group().0 * BLOCK_BYTES,
            layout_bytes: (uses.layout_blocks + geometry.first_group().0) * BLOCK_BYTES,
            journal_bytes: geometry.journal_blocks * BLOCK_BYTES,
            journal_used_bytes: state.journal.used() * BLOCK_BYTES,
            ready_bytes: state.allocator.free() * BLOCK_BYTES,
            reserve_bytes: state.data_reserve_blocks() * BLOCK_BYTES,
            groups_in_use: state.groups_in_use,
            groups: geometry.group_count(),
            generation: state.generation,
            clock: state.clock,
            last_lsn: state.journal.last(),
            durable_lsn: state.journal.durable(),
            volumes: state.volumes.len() as u64,
            virtual_bytes: state.volumes.values().map(|volume| volume.record.size_bytes).sum(),
            reserved_bytes: state
                .volumes
                .values()
                .map(|volume| volume.record.reservation_bytes)
                .fold(0, u64::saturating_add),
            owed_bytes: state.owed_blocks * BLOCK_BYTES,
            carcasses: state.carcasses.len() as u64,
            freeing: !state.carcasses.is_empty() || state.counters.leaves_eaten > state.eaten_in_image,
            dirty_nodes: state.cache.dirty() as u64,
            size_limit_bytes: state.size_limit_bytes,
            waiting: self.waiting_for_space(),
            verify_on_read: state.verify_on_read,
            sealed: state.volumes.values().filter(|volume| volume.record.flags.sealed).count() as u64,
            poisoned: state.poisoned.clone(),
        }
    }

    /// All volumes, in the order of their creation.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let state = self.inner.state.borrow();
        state.volumes.keys().filter_map(|id| state.volume_info(*id, self.inner.ticks.get()).ok()).collect()
    }

    /// Blocks of a volume that were redirected since the pool was opened, because they were shared.
    pub fn blocks_redirected(&self, id: VolumeId) -> u64 {
        self.inner.state.borrow().volumes.get(&id).map_or(0, |volume| volume.redirected)
    }

    /// At most `count` ids above `after`, in order.
    pub fn volume_ids(&self, after: VolumeId, count: usize) -> Vec<VolumeId> {
        let state = self.inner.state.borrow();
        state.volumes.range(VolumeId(after.0.saturating_add(1))..).map(|(id, _)| *id).take(count).collect()
    }

    /// The volume named `name`.
    pub fn volume(&self, name: &str) -> Result<VolumeInfo> {
        let state = self.inner.state.borrow();
        let id = state.names.get(name).copied();
        let id = id.ok_or_else(|| Error::NotFound(format!("there is no volume named {name}")))?;
        state.volume_info(id, self.inner.ticks.get())
    }

    /// The volume with id `id`.
    pub fn volume_by_id(&self, id: VolumeId) -> Result<VolumeInfo> {
        self.inner.state.borrow().volume_info(id, self.inner.ticks.get())
    }
}

impl State {
    fn volume_info(&self, id: VolumeId, now: u64) -> Result<VolumeInfo> {
        let volume = self.volume(id)?;
        let record = &volume.record;
        let origin = record.origin.map(|origin| Origin {
            id: origin.id,
            uuid: origin.uuid,
            name: self.volumes.get(&origin.id).map(|volume| volume.record.name.clone()),
        });
        Ok(VolumeInfo {
            id,
            uuid: record.uuid,
            name: record.name.clone(),
            size_bytes: record.size_bytes,
            sector_size: record.sector_size,
            read_only: record.flags.read_only,
            protected: record.flags.protected,
            sealed: record.flags.sealed,
            digest: record.digest,
            verify_on_read: record.flags.verify_on_read,
            origin,
            depth: record.depth,
            own_bytes: record.own_blocks * BLOCK_BYTES,
            mapped_bytes: record.mapped_blocks * BLOCK_BYTES,
            exclusive: self.exclusive_bytes(id, now),
            quota_bytes: record.quota_bytes,
            reservation_bytes: record.reservation_bytes,
            reservation_left_bytes: volume.owed_data() * BLOCK_BYTES,
            created: record.created_time,
            waits_when_full: record.on_full == OnFull::Wait,
            failed_writes: volume.failed_writes,
            detect_zeroes: record.flags.detect_zeroes,
            open: volume.open > 0,
            settled: !self.carcasses.values().any(|waiting| waiting.carcass.account),
        })
    }
}

//! Snapshots, clones and rollback: sharing a tree in O(1).
//!
//! The clock ticks first, the new value becomes `shared_at` of everybody who may still write (design, section 4), the root
//! node's count goes up by one. A snapshot is acknowledged, and may be read, when every plan made before the tick has left
//! (an in-place write planned earlier may still land in both), and then data and record are durable (rule O2).
//!
//! Snapshots of several volumes are of one instant: all are published in one step, with one tick of the clock. A write that
//! depends on another's answer is planned after that answer, so where it is before the step, the other is too.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use uuid::Uuid;

use super::Storage;
use super::control::{VOLUME_RECORD_BYTES, check_size};
use super::info::VolumeInfo;
use super::pool::{Pool, until};
use super::state::State;
use super::work::Work;
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::format::{EntryKind, OriginRef, Record, Root, VolumeFlags, VolumeRecord};
use crate::units::{Clock, Lsn, VolumeId};

/// A snapshot to be taken.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// Its uuid, chosen by the caller.
    pub uuid: Uuid,
    /// Its name, in the same name space as all volumes.
    pub name: String,
    /// Time of creation in nanoseconds since 1970.
    pub created: u64,
    /// Key and value pairs.
    pub attributes: BTreeMap<String, Vec<u8>>,
}

/// A clone to be made.
#[derive(Clone, Debug)]
pub struct NewClone {
    /// Its uuid, chosen by the caller.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Time of creation in nanoseconds since 1970.
    pub created: u64,
    /// Size in bytes if it is to be larger than the snapshot.
    pub size_bytes: Option<u64>,
    /// Key and value pairs.
    pub attributes: BTreeMap<String, Vec<u8>>,
}

/// Most volumes whose snapshots are taken at one instant: their records fit the pending log many times over.
const SNAPSHOTS_AT_ONCE: usize = 64;

impl<S: Storage> Pool<S> {
    /// Takes a snapshot of a volume, in use or not. I/O goes on meanwhile.
    pub async fn create_snapshot(&self, origin: VolumeId, new: NewSnapshot) -> Result<VolumeInfo> {
        Ok(self.share(vec![Made::snapshot(origin, new)]).await?.remove(0))
    }

    /// Takes snapshots of several volumes at one instant: what was answered on any of them before a write to another was
    /// asked for is in them when that write is. All of them or, when it is refused, none.
    ///
    /// Who sends the same again gets the same: after a crash before the answer there may be all, none, or some of them;
    /// where only some are there, they are named in the refusal and the others are of another instant for ever.
    pub async fn create_snapshots(&self, wanted: Vec<(VolumeId, NewSnapshot)>) -> Result<Vec<VolumeInfo>> {
        if wanted.is_empty() || wanted.len() > SNAPSHOTS_AT_ONCE {
            let count = wanted.len();
            return Err(Error::InvalidInput(format!(
                "{count} snapshots at once; 1 to {SNAPSHOTS_AT_ONCE} can be taken"
            )));
        }
        let (origins, names): (BTreeSet<_>, BTreeSet<_>) =
            wanted.iter().map(|(origin, new)| (*origin, new.name.as_str())).unzip();
        if origins.len() < wanted.len() || names.len() < wanted.len() {
            return Err(Error::InvalidInput("a volume, or a name of a snapshot, is given twice".into()));
        }
        self.share(wanted.into_iter().map(|(origin, new)| Made::snapshot(origin, new)).collect()).await
    }

    /// Makes a writable volume that starts with a snapshot's content. The snapshot and its origin are not touched.
    pub async fn create_clone(&self, snapshot: VolumeId, new: NewClone) -> Result<VolumeInfo> {
        if let Some(size_bytes) = new.size_bytes {
            check_size(size_bytes)?;
        }
        {
            let state = self.inner.state.borrow();
            let record = &state.volume(snapshot)?.record;
            if !record.flags.read_only {
                return Err(Error::InvalidInput(format!(
                    "{} is not a snapshot; take one first (`plywood snapshot create`)",
                    record.name
                )));
            }
            if new.size_bytes.is_some_and(|size| size < record.size_bytes) {
                return Err(Error::InvalidInput(format!(
                    "a clone of {} is at least its {} bytes large",
                    record.name, record.size_bytes
                )));
            }
        }
        let NewClone { uuid, name, created, size_bytes, attributes } = new;
        let made = Made { origin: snapshot, read_only: false, size_bytes, name, uuid, created, attributes };
        Ok(self.share(vec![made]).await?.remove(0))
    }

    /// Makes all of these in one step of the state, so that nobody's change comes between two of them.
    async fn share(&self, wanted: Vec<Made>) -> Result<Vec<VolumeInfo>> {
        let mut known = Vec::new();
        for made in &wanted {
            known.extend(self.check_new(made.uuid, &made.name).await?);
        }
        match known.first() {
            Some(_) if known.len() == wanted.len() => return Ok(known),
            Some(first) => {
                return Err(Error::AlreadyExists(format!(
                    "{} is there, and not all that were to be taken with it; delete it, and take them anew",
                    first.name
                )));
            }
            None => {}
        }
        let _work = self.at(Work::Share);
        for made in wanted.iter().filter(|made| made.read_only) {
            self.make_room_to_owe(Some(made.origin), |state| state.shared(made.origin)).await?;
        }
        let mut attributes = Vec::new();
        for made in &wanted {
            attributes.push(self.write_attributes(&made.attributes).await?);
        }
        let promise = self.promise(wanted.len() as u64, wanted.len() * VOLUME_RECORD_BYTES).await?;
        let (ids, lsn, epoch) = {
            let mut state = self.inner.state.borrow_mut();
            state.check_sharing(&wanted)?;
            let clock = state.tick_clock()?;
            let (mut ids, mut lsn) = (Vec::new(), Lsn(0));
            for (made, attributes) in wanted.into_iter().zip(attributes) {
                let origin = made.origin;
                let record = VolumeRecord {
                    attributes_bytes: attributes.length,
                    attributes: attributes.take(),
                    ..state.record_of(made, clock)?
                };
                let id = record.id;
                let change = Record::VolumeShared { origin, clock, created: Box::new(record.clone()) };
                lsn = state.publish(None, &change);
                state.adopt_attributes(&record.attributes);
                state.share_volume(origin, record, lsn);
                // Not to be read, cloned or rolled back to before it is acknowledged.
                state.volume_mut(id)?.unready = true;
                ids.push(id);
            }
            (ids, lsn, state.epochs.advance())
        };
        drop(promise);
        if !is_broken(Canary::SnapshotOverWrites) {
            self.wait_for_epoch(epoch).await;
        }
        let durable = self.flush_through(lsn).await;
        for id in &ids {
            self.put_back_in_use(*id);
        }
        durable?;
        ids.into_iter().map(|id| self.volume_by_id(id)).collect()
    }

    /// Waits until every plan made before has left.
    pub(super) async fn wait_for_epoch(&self, epoch: super::epoch::EpochId) {
        until(&self.inner.signals.epoch, || {
            let state = self.inner.state.borrow();
            state.epochs.is_over(epoch) || state.poisoned.is_some()
        })
        .await;
    }

    /// Gives a volume that is not in use the content of one of its snapshots again. With `keep` its present content is
    /// first kept as a snapshot of that name.
    pub async fn roll_back(&self, volume: VolumeId, snapshot: VolumeId, keep: Option<NewSnapshot>) -> Result<()> {
        {
            let state = self.inner.state.borrow();
            let (target, source) = (&state.volume(volume)?.record, &state.volume(snapshot)?.record);
            if target.flags.read_only {
                return Err(Error::ReadOnly(format!("{} is a snapshot", target.name)));
            }
            let of_it = source.origin.is_some_and(|origin| origin.id == volume);
            let from_it = target.origin.is_some_and(|origin| origin.id == snapshot);
            if !source.flags.read_only || !(of_it || from_it) {
                return Err(Error::InvalidInput(format!("{} is not a snapshot of {}", source.name, target.name)));
            }
            if state.volume(volume)?.open > 0 {
                return Err(Error::Busy(format!("{} is in use; detach it first", target.name)));
            }
        }
        if let Some(keep) = keep {
            self.create_snapshot(volume, keep).await?;
        }
        self.take_out_of_use(volume).await?;
        let done = self.roll_back_idle(volume, snapshot).await;
        self.put_back_in_use(volume);
        self.inner.signals.carcass.notify(usize::MAX);
        done
    }

    async fn roll_back_idle(&self, volume: VolumeId, snapshot: VolumeId) -> Result<()> {
        // The old tree gives back what the volume is owed anew: only a map of another size can be more.
        let rolled_back = |state: &State| {
            let (record, from) = (&state.volume(volume)?.record, &state.volume(snapshot)?.record);
            let reservation_bytes = record.reservation_bytes.min(from.size_bytes);
            Ok(VolumeRecord { size_bytes: from.size_bytes, reservation_bytes, ..record.clone() })
        };
        self.make_room_to_owe(Some(volume), rolled_back).await?;
        let promise = self.promise(1, 64).await?;
        let lsn = {
            let mut state = self.inner.state.borrow_mut();
            if state.volume(snapshot)?.unready {
                return Err(Error::Busy("the snapshot is not complete yet".into()));
            }
            state.check_owing(Some(volume), &rolled_back(&state)?)?;
            let clock = state.tick_clock()?;
            let lsn = state.publish(Some(volume), &Record::VolumeRolledBack { volume, snapshot, clock });
            state.roll_back_volume(volume, snapshot, clock, lsn);
            lsn
        };
        drop(promise);
        self.flush_through(lsn).await
    }
}

/// What a snapshot and a clone are made of.
struct Made {
    origin: VolumeId,
    read_only: bool,
    size_bytes: Option<u64>,
    name: String,
    uuid: Uuid,
    created: u64,
    attributes: BTreeMap<String, Vec<u8>>,
}

impl Made {
    fn snapshot(origin: VolumeId, new: NewSnapshot) -> Self {
        let NewSnapshot { uuid, name, created, attributes } = new;
        Self { origin, read_only: true, size_bytes: None, name, uuid, created, attributes }
    }
}

impl State {
    /// A volume's record after a snapshot of it. What that shares the volume cannot overwrite in place any more: what is
    /// reserved for it is owed anew.
    fn shared(&self, origin: VolumeId) -> Result<VolumeRecord> {
        Ok(VolumeRecord { in_place_blocks: 0, ..self.volume(origin)?.record.clone() })
    }

    /// Refuses what cannot be made, all of it together.
    fn check_sharing(&self, wanted: &[Made]) -> Result<()> {
        self.check_ids_left(wanted.len() as u64)?;
        let mut owing = Vec::new();
        for made in wanted {
            self.check_name_free(&made.name)?;
            let origin = self.volume(made.origin)?;
            if origin.unready {
                return Err(Error::Busy(format!("{} is being changed", origin.record.name)));
            }
            if made.read_only {
                owing.push((made.origin, self.shared(made.origin)?));
            }
        }
        self.check_owing_all(&owing)
    }

    /// The record of what is made of a volume at an instant, without its attributes.
    fn record_of(&self, made: Made, clock: Clock) -> Result<VolumeRecord> {
        let from = &self.volume(made.origin)?.record;
        Ok(VolumeRecord {
            id: self.next_volume,
            uuid: made.uuid,
            name: made.name,
            size_bytes: made.size_bytes.unwrap_or(from.size_bytes),
            flags: VolumeFlags {
                read_only: made.read_only,
                detect_zeroes: from.flags.detect_zeroes,
                ..VolumeFlags::default()
            },
            created_at: if made.read_only { from.created_at } else { clock },
            shared_at: clock,
            rolled_at: if made.read_only { from.rolled_at } else { Clock(0) },
            rolled_to: if made.read_only { from.rolled_to } else { Clock(0) },
            origin: Some(OriginRef { id: made.origin, uuid: from.uuid, clock }),
            received_from: None,
            own_blocks: if made.read_only { from.own_blocks } else { 0 },
            quota_bytes: 0,
            in_place_blocks: 0,
            reservation_bytes: 0,
            digest: None,
            created_time: made.created,
            depth: from.depth.saturating_add(1),
            account_spans: Vec::new(),
            accounts_from: 0,
            ..from.clone()
        })
    }

    /// Adds `record` as a sharer of `origin`'s tree. A snapshot stops the origin from overwriting in place; a clone of a
    /// snapshot touches nobody.
    pub(super) fn share_volume(&mut self, origin: VolumeId, mut record: VolumeRecord, lsn: Lsn) {
        let spans = self.volumes.get(&origin).map(|from| self.inherited_spans(&from.record));
        let Some(from) = self.volumes.get_mut(&origin) else { return };
        if record.flags.read_only {
            from.record.shared_at = record.shared_at;
            from.record.in_place_blocks = 0;
            from.reckon(&mut self.owed_blocks);
            if is_broken(Canary::TickAfterSharing) {
                from.record.shared_at = Clock(record.shared_at.0 - 1);
            }
            from.last = lsn;
        }
        record.root = from.record.root;
        record.in_place_blocks = 0;
        record.mapped_blocks = from.record.mapped_blocks;
        record.account_spans = spans.unwrap_or_default();
        record.accounts_from = 0;
        if record.flags.read_only {
            record.own_blocks = from.record.own_blocks;
        }
        // What the origin holds it holds alone no more.
        from.changes.touch();
        let (id, family, is_snapshot) = (record.id, Rc::clone(&from.family), record.flags.read_only);
        self.share_root(record.root);
        self.add_volume(record, lsn);
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.family = family;
        }
        if is_snapshot {
            self.mark_dirty(origin);
        }
    }

    fn share_root(&mut self, root: Root) {
        if root.entry.kind == EntryKind::Node {
            self.count(root.entry.address, 1);
        }
    }

    /// Gives `volume` the tree, size and accounts of `snapshot`; its own tree becomes a carcass.
    pub(super) fn roll_back_volume(&mut self, volume: VolumeId, snapshot: VolumeId, clock: Clock, lsn: Lsn) {
        let (Some(old), Some(from)) = (self.volumes.get(&volume), self.volumes.get(&snapshot)) else { return };
        let old_root = old.record.root;
        let from = from.record.clone();
        let taken_at = from.origin.map_or(Clock(0), |origin| origin.clock);
        self.add_carcass(volume, old_root.entry, old_root.level, 0, false, lsn);
        self.share_root(from.root);
        let (spans, next_carcass) = (self.inherited_spans(&from), self.next_carcass);
        if let Some(volume) = self.volumes.get_mut(&volume) {
            let record = &mut volume.record;
            // A clone rolled back to the snapshot it came from owns nothing again.
            let of_it = from.origin.is_some_and(|origin| origin.id == record.id);
            record.root = from.root;
            record.size_bytes = from.size_bytes;
            record.mapped_blocks = from.mapped_blocks;
            record.in_place_blocks = 0;
            record.reservation_bytes = record.reservation_bytes.min(from.size_bytes);
            record.own_blocks = if of_it { from.own_blocks } else { 0 };
            record.created_at = if of_it { from.created_at } else { clock };
            record.shared_at = clock;
            record.rolled_at = clock;
            record.rolled_to = taken_at;
            record.account_spans = spans;
            record.accounts_from = next_carcass;
            volume.last = lsn;
            volume.reckon(&mut self.owed_blocks);
            volume.changes.mark_all();
            volume.family.borrow_mut().touch();
        }
        self.mark_dirty(volume);
    }
}

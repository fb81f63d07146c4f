//! The operations of a round: chosen at random, issued together, each a task that tells the model when it returned.

use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;

use fastrand::Rng;
use futures_lite::future::yield_now;
use plywood::engine::{Memory, NewClone, NewSnapshot, NewVolume, Storage, VolumeHandle, VolumeInfo};
use plywood::error::{Error, Result};
use plywood::io::{IoMemory, MemoryStorage};
use plywood::units::VolumeId;
use uuid::Uuid;

use crate::content::{Change, Contents, SECTOR, fill_sector, parse_sector};
use crate::model::{Control, Flight, Volume};
use crate::world::{Shared, World, trace};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Volumes beyond which more are deleted than made.
const MOST_VOLUMES: usize = 40;
/// Size up to which volumes get reservations: the pool is never to be full here.
const RESERVED_BYTES: u64 = 256 * MIB;

/// Which volumes the operations of one round use, and whether they want them for themselves.
#[derive(Default)]
pub struct Round {
    shared: Vec<VolumeId>,
    alone: Vec<VolumeId>,
}

impl Round {
    fn may_share(&self, id: VolumeId) -> bool {
        !self.alone.contains(&id)
    }

    fn may_have_alone(&self, id: VolumeId) -> bool {
        !self.alone.contains(&id) && !self.shared.contains(&id)
    }
}

impl World {
    /// Chooses one operation and issues it. False where the choice does not fit the volumes there are.
    pub fn start_operation(&mut self, round: &mut Round) -> bool {
        match self.random.u32(..1000) {
            0..230 => self.start_read(round),
            230..640 => self.start_write(round),
            640..720 => self.start_discard(round),
            720..790 => self.start_zeroes(round),
            790..850 => self.start_flush(round),
            850..875 => self.start_create(),
            875..903 => self.start_snapshot(round),
            903..910 => self.start_snapshots(round),
            910..935 => self.start_clone(round),
            935..945 => self.start_roll_back(round),
            945..965 => self.start_delete(round),
            965..980 => self.start_resize(round),
            980..988 => self.start_rename(round),
            988..994 => self.start_attributes(round),
            994..996 => self.start_protect(round),
            996..998 => self.start_reserve(round),
            _ => self.start_difference(round),
        }
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + 'static) {
        let shared = Rc::clone(&self.shared);
        shared.remaining.set(shared.remaining.get() + 1);
        self.executor
            .spawn(async move {
                shared.guard(task).await;
                shared.remaining.set(shared.remaining.get() - 1);
            })
            .detach();
    }

    fn pick(&mut self, wanted: impl Fn(&Volume) -> bool) -> Option<Volume> {
        let model = self.shared.model.borrow();
        let fitting: Vec<&Volume> = model.volumes.values().filter(|volume| wanted(volume)).collect();
        (!fitting.is_empty()).then(|| fitting[self.random.usize(..fitting.len())].clone())
    }

    /// A byte range of `volume`, most often near one of a few places, so that operations meet each other's.
    fn range(&mut self, volume: &Volume, large: bool) -> (u64, u64) {
        let grain = u64::from(volume.sector_size);
        let spot = self.random.u64(..5);
        let spots = Rng::with_seed(volume.size_bytes ^ (spot << 56)).u64(..volume.size_bytes) / MIB * MIB;
        let near = if self.random.u32(..60) == 0 { self.random.u64(..volume.size_bytes) } else { spots };
        let (offset, length) = match self.random.u32(..100) {
            0..40 => (self.random.u64(..96) * 4 * KIB, 4 * KIB),
            40..60 => {
                (self.random.u64(..96) * 4 * KIB + self.random.u64(..8) * SECTOR, self.random.u64(1..=8) * SECTOR)
            }
            60..85 => (self.random.u64(..1024) * SECTOR, self.random.u64(1..=128) * SECTOR),
            85..97 => (self.random.u64(..16) * 64 * KIB, self.random.u64(1..=4) * 64 * KIB),
            _ => (self.random.u64(..4) * 256 * KIB, MIB),
        };
        let (offset, length) = if large {
            let length = [MIB, 16 * MIB, 256 * MIB, GIB, 64 * GIB, volume.size_bytes][self.random.usize(..6)];
            (offset, length + self.random.u64(..16) * SECTOR)
        } else {
            (offset, length)
        };
        let start = ((near + offset) % volume.size_bytes) / grain * grain;
        let end = start.saturating_add(length.div_ceil(grain) * grain).min(volume.size_bytes);
        (start, end - start)
    }

    fn start_read(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| round.may_share(volume.id)) else { return false };
        round.shared.push(volume.id);
        let (offset, length) = self.range(&volume, false);
        let handle = self.handle(volume.id);
        let shared = Rc::clone(&self.shared);
        let sectors = offset / SECTOR..(offset + length) / SECTOR;
        let number = shared.model.borrow_mut().number();
        shared.model.borrow_mut().observe(number, volume.id, &sectors);
        self.spawn(async move {
            let memory = shared.storage.allocate(length as usize);
            handle.read(offset, &memory).await.unwrap_or_else(|error| panic!("read of {}: {error}", volume.name));
            let seen = shared.model.borrow_mut().observed(number);
            compare(&volume.name, offset, &memory, &seen.contents, |_, _| {});
        });
        true
    }

    fn start_write(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| !volume.read_only && round.may_share(volume.id)) else { return false };
        round.shared.push(volume.id);
        let (offset, length) = self.range(&volume, false);
        let fua = self.random.u32(..20) == 0;
        let number = self.shared.model.borrow_mut().number();
        let shared = Rc::clone(&self.shared);
        self.start_change(&volume, offset, length, Change::Write(number), number, move |handle| async move {
            let memory = shared.storage.allocate(length as usize);
            let mut bytes = vec![0; length as usize];
            for (index, sector) in bytes.chunks_exact_mut(SECTOR as usize).enumerate() {
                fill_sector(sector, number, offset / SECTOR + index as u64);
            }
            memory.write(0, &bytes);
            handle.write(offset, &memory, fua).await
        });
        true
    }

    fn start_discard(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| !volume.read_only && round.may_share(volume.id)) else { return false };
        round.shared.push(volume.id);
        let large = self.random.u32(..6) == 0;
        let (offset, length) = self.range(&volume, large);
        let number = self.shared.model.borrow_mut().number();
        self.start_change(&volume, offset, length, Change::Discard, number, move |handle| async move {
            handle.discard(offset, length).await
        });
        true
    }

    fn start_zeroes(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| !volume.read_only && round.may_share(volume.id)) else { return false };
        round.shared.push(volume.id);
        let unmap = self.random.bool();
        let large = unmap && self.random.u32(..6) == 0;
        let (offset, length) = self.range(&volume, large);
        let number = self.shared.model.borrow_mut().number();
        let (whole, rest) = (offset.next_multiple_of(4096), (offset + length) / 4096 * 4096);
        if unmap && !large && whole < rest && self.random.bool() {
            // A plain write of zeros, which the volume is to find.
            let (pool, id) = (self.pool().clone(), volume.id);
            self.start_change(&volume, whole, rest - whole, Change::Discard, number, move |handle| async move {
                pool.detect_zeroes(id, true).await?;
                handle.write(whole, &IoMemory::zeroed((rest - whole) as usize), false).await
            });
            return true;
        }
        let change = if unmap { Change::Discard } else { Change::Zero };
        self.start_change(&volume, offset, length, change, number, move |handle| async move {
            handle.write_zeroes(offset, length, unmap).await
        });
        true
    }

    /// Issues a change of one range and tells the model of its end before the range is let go.
    fn start_change<F, H>(
        &mut self,
        volume: &Volume,
        offset: u64,
        length: u64,
        change: Change,
        number: u64,
        call: impl FnOnce(VolumeHandle<MemoryStorage>) -> F + 'static,
    ) where
        F: Future<Output = Result<H>> + 'static,
        H: 'static,
    {
        let handle = self.handle(volume.id);
        let shared = Rc::clone(&self.shared);
        let sectors = offset / SECTOR..(offset + length) / SECTOR;
        let delay = self.random.u32(..4);
        let (name, quota_bytes) = (volume.name.clone(), volume.quota_bytes);
        trace(|| format!("{number} begins: {change:?} of volume {} at {offset}, {length} bytes", volume.id));
        shared.model.borrow_mut().issue(number, Flight { volume: volume.id, sectors, change });
        self.spawn(async move {
            match call(handle).await {
                Ok(held) => {
                    trace(|| format!("{number} ends"));
                    shared.model.borrow_mut().complete(number);
                    for _ in 0..delay {
                        yield_now().await;
                    }
                    drop(held);
                }
                Err(Error::NoSpace(_)) if quota_bytes != 0 => {
                    shared.model.borrow_mut().withdraw(number);
                    shared.met.borrow_mut().refusals += 1;
                }
                Err(error) => panic!("change of {name} at {offset}, {length} bytes: {error}"),
            }
        });
    }

    fn start_flush(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| round.may_share(volume.id)) else { return false };
        round.shared.push(volume.id);
        let handle = self.handle(volume.id);
        self.spawn(async move { handle.flush().await.unwrap_or_else(|error| panic!("flush: {error}")) });
        true
    }

    fn start_create(&mut self) -> bool {
        if self.shared.model.borrow().volumes.len() >= MOST_VOLUMES {
            return false;
        }
        // One for each height of tree, so that all are met.
        let size_bytes = match self.random.u32(..8) {
            0..2 => self.random.u64(1..=256) * 4 * KIB,
            2..4 => self.random.u64(257..=65536) * 4 * KIB,
            4..6 => self.random.u64(1..=64) * GIB - self.random.u64(..1000) * 4 * KIB,
            _ => self.random.u64(65..=1000) * GIB + self.random.u64(..1000) * 4 * KIB,
        };
        let new = NewVolume {
            uuid: self.uuid(),
            name: self.name(),
            size_bytes,
            sector_size: if self.random.bool() { 512 } else { 4096 },
            quota_bytes: if self.random.u32(..4) == 0 { self.random.u64(64..=512) * 4 * KIB } else { 0 },
            reservation_bytes: 0,
            created: self.random.u64(..),
            attributes: BTreeMap::new(),
        };
        let expected = Volume {
            id: VolumeId(0),
            uuid: new.uuid,
            name: new.name.clone(),
            size_bytes,
            sector_size: new.sector_size,
            read_only: false,
            protected: false,
            quota_bytes: new.quota_bytes,
            reservation_bytes: 0,
            origin: None,
            attributes: BTreeMap::new(),
            contents: Contents::default(),
            accountable: true,
        };
        let pool = self.pool().clone();
        let retry = self.random.u32(..10) == 0;
        self.start_control(Control::Create(expected.clone()), async move |shared: &Shared| {
            let info = pool.create_volume(new.clone()).await.unwrap_or_else(|error| panic!("create: {error}"));
            if retry {
                let again = pool.create_volume(new).await.unwrap_or_else(|error| panic!("create, sent again: {error}"));
                assert_eq!(again.id, info.id, "a command sent again made a second volume");
            }
            adopt(shared, expected, &info);
        });
        true
    }

    fn start_snapshot(&mut self, round: &mut Round) -> bool {
        if self.shared.model.borrow().volumes.len() >= MOST_VOLUMES {
            return false;
        }
        let Some(origin) = self.pick(|volume| !volume.read_only && round.may_share(volume.id)) else { return false };
        round.shared.push(origin.id);
        let new = NewSnapshot { uuid: self.uuid(), name: self.name(), created: 1, attributes: BTreeMap::new() };
        let expected = snapshot_of(&origin, &new);
        let pool = self.pool().clone();
        let observer = self.shared.model.borrow_mut().number();
        self.shared.model.borrow_mut().observe(observer, origin.id, &(0..u64::MAX));
        self.start_control(Control::Snapshot { observer, volume: expected.clone() }, async move |shared: &Shared| {
            let info = pool.create_snapshot(origin.id, new).await.unwrap_or_else(|error| panic!("snapshot: {error}"));
            let observed = shared.model.borrow_mut().observed(observer);
            let mut volume = expected;
            volume.accountable &= observed.accountable;
            volume.contents = observed.contents;
            adopt(shared, volume, &info);
        });
        true
    }

    /// Snapshots of some volumes at one instant.
    fn start_snapshots(&mut self, round: &mut Round) -> bool {
        let mut origins: Vec<Volume> = Vec::new();
        for _ in 0..self.random.usize(2..=4) {
            let is_wanted = |volume: &Volume| {
                !volume.read_only && round.may_share(volume.id) && origins.iter().all(|origin| origin.id != volume.id)
            };
            origins.extend(self.pick(is_wanted));
        }
        if origins.len() < 2 || self.shared.model.borrow().volumes.len() + origins.len() > MOST_VOLUMES {
            return false;
        }
        round.shared.extend(origins.iter().map(|origin| origin.id));
        let (mut wanted, mut expected) = (Vec::new(), Vec::new());
        for origin in &origins {
            let new = NewSnapshot { uuid: self.uuid(), name: self.name(), created: 1, attributes: BTreeMap::new() };
            let volume = snapshot_of(origin, &new);
            let mut model = self.shared.model.borrow_mut();
            let observer = model.number();
            model.observe(observer, origin.id, &(0..u64::MAX));
            // After a death there may be some of them and not the others.
            model.controls.insert(observer, Control::Snapshot { observer, volume: volume.clone() });
            wanted.push((origin.id, new));
            expected.push((observer, volume));
        }
        let pool = self.pool().clone();
        let shared = Rc::clone(&self.shared);
        self.spawn(async move {
            let taken = pool.create_snapshots(wanted).await.unwrap_or_else(|error| panic!("snapshots: {error}"));
            shared.met.borrow_mut().snapshots_together += taken.len() as u64;
            for ((observer, mut volume), info) in expected.into_iter().zip(taken) {
                let observed = shared.model.borrow_mut().observed(observer);
                volume.accountable &= observed.accountable;
                volume.contents = observed.contents;
                adopt(&shared, volume, &info);
                shared.model.borrow_mut().controls.remove(&observer);
            }
        });
        true
    }

    fn start_clone(&mut self, round: &mut Round) -> bool {
        if self.shared.model.borrow().volumes.len() >= MOST_VOLUMES {
            return false;
        }
        let Some(snapshot) = self.pick(|volume| volume.read_only && round.may_share(volume.id)) else { return false };
        round.shared.push(snapshot.id);
        let size_bytes = (self.random.u32(..4) == 0).then(|| snapshot.size_bytes + self.random.u64(1..=300) * MIB);
        let new =
            NewClone { uuid: self.uuid(), name: self.name(), created: 2, size_bytes, attributes: BTreeMap::new() };
        let expected = Volume {
            id: VolumeId(0),
            uuid: new.uuid,
            name: new.name.clone(),
            size_bytes: size_bytes.unwrap_or(snapshot.size_bytes),
            read_only: false,
            protected: false,
            quota_bytes: 0,
            reservation_bytes: 0,
            origin: Some(snapshot.id),
            attributes: BTreeMap::new(),
            contents: snapshot.contents.cloned(),
            ..snapshot.clone()
        };
        let pool = self.pool().clone();
        self.start_control(Control::Clone(expected.clone()), async move |shared: &Shared| {
            let info = pool.create_clone(snapshot.id, new).await.unwrap_or_else(|error| panic!("clone: {error}"));
            adopt(shared, expected, &info);
        });
        true
    }

    fn start_roll_back(&mut self, round: &mut Round) -> bool {
        let Some(snapshot) = self.pick(|volume| volume.read_only && round.may_share(volume.id)) else { return false };
        let Some(origin) = snapshot.origin.and_then(|id| self.shared.model.borrow().volumes.get(&id).cloned()) else {
            return false;
        };
        let takes_much = origin.reservation_bytes > 0 && snapshot.size_bytes > RESERVED_BYTES;
        if origin.read_only || takes_much || !round.may_have_alone(origin.id) {
            return false;
        }
        round.shared.push(snapshot.id);
        round.alone.push(origin.id);
        self.handles.remove(&origin.id);
        let keep = self.random.bool().then(|| NewSnapshot {
            uuid: self.uuid(),
            name: self.name(),
            created: 3,
            attributes: BTreeMap::new(),
        });
        let kept = keep.as_ref().map(|new| snapshot_of(&origin, new));
        let control = Control::RollBack { volume: origin.id, snapshot: snapshot.id, keep: kept.clone() };
        let pool = self.pool().clone();
        self.start_control(control, async move |shared: &Shared| {
            let keep_name = keep.as_ref().map(|new| new.name.clone());
            pool.roll_back(origin.id, snapshot.id, keep).await.unwrap_or_else(|error| panic!("rollback: {error}"));
            if let (Some(kept), Some(name)) = (kept, keep_name) {
                let info = pool.volume(&name).unwrap_or_else(|error| panic!("kept snapshot: {error}"));
                adopt(shared, kept, &info);
            }
            roll_back(shared, origin.id, snapshot.id);
        });
        true
    }

    fn start_delete(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| round.may_have_alone(volume.id)) else { return false };
        round.alone.push(volume.id);
        let pool = self.pool().clone();
        if volume.protected {
            let in_use = self.handles.contains_key(&volume.id);
            self.spawn(async move {
                let refused = pool.delete_volume(volume.id).await;
                let named =
                    matches!(refused, Err(Error::ReadOnly(_))) || in_use && matches!(refused, Err(Error::Busy(_)));
                assert!(named, "protected volume: {refused:?}");
            });
            return true;
        }
        if self.handles.contains_key(&volume.id) && self.random.u32(..4) == 0 {
            self.spawn(async move {
                let refused = pool.delete_volume(volume.id).await;
                assert!(matches!(refused, Err(Error::Busy(_))), "volume in use: {refused:?}");
            });
            return true;
        }
        self.handles.remove(&volume.id);
        self.start_control(Control::Delete(volume.id), async move |shared: &Shared| {
            pool.delete_volume(volume.id).await.unwrap_or_else(|error| panic!("delete: {error}"));
            shared.model.borrow_mut().volumes.remove(&volume.id);
        });
        true
    }

    fn start_resize(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| !volume.read_only && round.may_have_alone(volume.id)) else {
            return false;
        };
        round.alone.push(volume.id);
        let size_bytes = match self.random.u32(..4) {
            // Room is kept for the map of one with a reservation.
            1 if volume.reservation_bytes == 0 => volume.size_bytes + self.random.u64(1..=100) * GIB,
            0 | 1 => volume.size_bytes + self.random.u64(1..=100) * 4 * KIB,
            2 => self.random.u64(1..=volume.size_bytes / (4 * KIB)) * 4 * KIB,
            _ => (volume.size_bytes / 2).next_multiple_of(4 * KIB),
        };
        let pool = self.pool().clone();
        let id = volume.id;
        if size_bytes < volume.size_bytes {
            if self.handles.contains_key(&id) && self.random.u32(..4) == 0 {
                self.spawn(async move {
                    let refused = pool.resize_volume(id, size_bytes).await;
                    assert!(matches!(refused, Err(Error::Busy(_))), "shrinking a volume in use: {refused:?}");
                });
                return true;
            }
            self.handles.remove(&id);
        }
        self.start_control(Control::Resize { volume: id, size_bytes }, async move |shared: &Shared| {
            pool.resize_volume(id, size_bytes).await.unwrap_or_else(|error| panic!("resize: {error}"));
            resize(shared, id, size_bytes);
        });
        true
    }

    fn start_rename(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| round.may_have_alone(volume.id)) else { return false };
        round.alone.push(volume.id);
        let pool = self.pool().clone();
        let taken = self.pick(|other| other.id != volume.id && round.may_have_alone(other.id));
        if let Some(taken) = taken.filter(|_| self.random.u32(..4) == 0) {
            round.alone.push(taken.id);
            self.spawn(async move {
                let refused = pool.rename_volume(volume.id, &taken.name).await;
                assert!(matches!(refused, Err(Error::AlreadyExists(_))), "taken name: {refused:?}");
            });
            return true;
        }
        let name = self.name();
        self.start_control(Control::Rename { volume: volume.id, name: name.clone() }, async move |shared: &Shared| {
            pool.rename_volume(volume.id, &name).await.unwrap_or_else(|error| panic!("rename: {error}"));
            with(shared, volume.id, |known| known.name = name);
        });
        true
    }

    fn start_attributes(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| round.may_have_alone(volume.id)) else { return false };
        round.alone.push(volume.id);
        let mut attributes = volume.attributes.clone();
        let mut changes = BTreeMap::new();
        for _ in 0..self.random.u32(1..4) {
            let key = format!("key-{}", self.random.u32(..6));
            let value = (self.random.u32(..3) != 0).then(|| vec![self.random.u8(..); self.random.usize(..9000)]);
            match &value {
                Some(value) => attributes.insert(key.clone(), value.clone()),
                None => attributes.remove(&key),
            };
            changes.insert(key, value);
        }
        let pool = self.pool().clone();
        let control = Control::Attributes { volume: volume.id, attributes: attributes.clone() };
        self.start_control(control, async move |shared: &Shared| {
            pool.set_attributes(volume.id, changes).await.unwrap_or_else(|error| panic!("attributes: {error}"));
            with(shared, volume.id, |known| known.attributes = attributes);
        });
        true
    }

    fn start_protect(&mut self, round: &mut Round) -> bool {
        let Some(volume) = self.pick(|volume| round.may_have_alone(volume.id)) else { return false };
        round.alone.push(volume.id);
        // More are released than protected, or in the end nothing could be deleted any more.
        let protected = !volume.protected && self.random.u32(..3) == 0;
        let pool = self.pool().clone();
        self.start_control(Control::Protect { volume: volume.id, protected }, async move |shared: &Shared| {
            pool.protect_volume(volume.id, protected).await.unwrap_or_else(|error| panic!("protect: {error}"));
            with(shared, volume.id, |known| known.protected = protected);
        });
        true
    }

    fn start_reserve(&mut self, round: &mut Round) -> bool {
        let fits = |volume: &Volume| !volume.read_only && volume.size_bytes <= RESERVED_BYTES;
        let Some(volume) = self.pick(|volume| fits(volume) && round.may_have_alone(volume.id)) else { return false };
        round.alone.push(volume.id);
        let most = if volume.quota_bytes > 0 { volume.quota_bytes.min(MIB) } else { MIB };
        let most = most.min(volume.size_bytes) / (4 * KIB);
        let wanted = if self.random.u32(..4) == 0 { 0 } else { self.random.u64(1..=most) };
        let (pool, id, reservation_bytes) = (self.pool().clone(), volume.id, wanted * 4 * KIB);
        self.start_control(Control::Reserve { volume: id, reservation_bytes }, async move |shared: &Shared| {
            pool.set_reservation(id, reservation_bytes).await.unwrap_or_else(|error| panic!("reserve: {error}"));
            with(shared, id, |known| known.reservation_bytes = reservation_bytes);
            shared.met.borrow_mut().reservations += u64::from(wanted > 0);
        });
        true
    }

    /// Asks what changed between a snapshot and its origin, or another relative: no difference may be missing.
    fn start_difference(&mut self, round: &mut Round) -> bool {
        let Some(from) = self.pick(|volume| volume.read_only && round.may_have_alone(volume.id)) else { return false };
        let family = from.origin;
        let Some(to) = self.pick(|volume| {
            round.may_have_alone(volume.id) && (volume.origin == Some(from.id) || Some(volume.id) == family)
        }) else {
            return false;
        };
        round.alone.extend([from.id, to.id]);
        if from.contents.is_doubtful() || to.contents.is_doubtful() {
            return false;
        }
        let pool = self.pool().clone();
        self.spawn(async move {
            let ranges =
                pool.changed_ranges(from.id, to.id).await.unwrap_or_else(|error| panic!("difference: {error}"));
            let named = |block: u64| {
                let offset = block * 4 * KIB;
                ranges
                    .iter()
                    .any(|range| (range.offset_bytes..range.offset_bytes + range.length_bytes).contains(&offset))
            };
            for block in from.contents.differing_blocks(&to.contents) {
                assert!(named(block), "block {block} differs between {} and {}, unreported", from.name, to.name);
            }
        });
        true
    }

    /// Issues a control call; the model knows that it is on its way until it has returned.
    fn start_control(&mut self, control: Control, call: impl AsyncFnOnce(&Shared) + 'static) {
        let shared = Rc::clone(&self.shared);
        let number = shared.model.borrow_mut().number();
        trace(|| format!("{number} begins: {}", control.describe()));
        shared.model.borrow_mut().controls.insert(number, control);
        self.spawn(async move {
            call(&shared).await;
            trace(|| format!("{number} ends"));
            shared.model.borrow_mut().controls.remove(&number);
        });
    }

    fn uuid(&mut self) -> Uuid {
        Uuid::from_u128(self.random.u128(..))
    }

    fn name(&mut self) -> String {
        format!("volume-{}", self.shared.model.borrow_mut().number())
    }
}

/// Compares `memory`, read at `offset`, with what is allowed there, and tells `found` of each sector's value.
pub fn compare<M: Memory>(name: &str, offset: u64, memory: &M, allowed: &Contents, mut found: impl FnMut(u64, u64)) {
    let mut bytes = vec![0; memory.len()];
    memory.read(0, &mut bytes);
    for (index, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
        let number = offset / SECTOR + index as u64;
        let value = parse_sector(sector, number).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
        assert!(
            allowed.allows(number, value),
            "{name}: sector {number} (block {}) holds what operation {value} wrote, expected one of {:?}",
            number / 8,
            allowed.expectation(number)
        );
        found(number, value);
    }
}

/// The snapshot that `new` makes of `origin` as it is, without its id.
pub fn snapshot_of(origin: &Volume, new: &NewSnapshot) -> Volume {
    Volume {
        id: VolumeId(0),
        uuid: new.uuid,
        name: new.name.clone(),
        read_only: true,
        protected: false,
        quota_bytes: 0,
        reservation_bytes: 0,
        origin: Some(origin.id),
        attributes: BTreeMap::new(),
        ..origin.clone()
    }
}

/// Takes a new volume into the model, under the id that the engine gave it.
pub fn adopt(shared: &Shared, mut volume: Volume, info: &VolumeInfo) {
    assert_eq!((info.uuid, &info.name, info.size_bytes), (volume.uuid, &volume.name, volume.size_bytes));
    volume.id = info.id;
    let former = shared.model.borrow_mut().volumes.insert(info.id, volume);
    assert!(former.is_none(), "id {} was given twice", info.id);
}

pub fn with(shared: &Shared, id: VolumeId, change: impl FnOnce(&mut Volume)) {
    change(shared.model.borrow_mut().volumes.get_mut(&id).expect("a volume of the model"));
}

pub fn resize(shared: &Shared, id: VolumeId, size_bytes: u64) {
    with(shared, id, |known| {
        if size_bytes < known.size_bytes {
            known.contents.truncate(size_bytes / SECTOR);
        }
        known.size_bytes = size_bytes;
        known.reservation_bytes = known.reservation_bytes.min(size_bytes);
    });
}

pub fn roll_back(shared: &Shared, id: VolumeId, snapshot: VolumeId) {
    let source = shared.model.borrow().volumes[&snapshot].clone();
    with(shared, id, |known| {
        known.contents = source.contents;
        known.size_bytes = source.size_bytes;
        known.reservation_bytes = known.reservation_bytes.min(source.size_bytes);
        known.accountable = source.accountable;
    });
}

//! The operations: chosen at random, each a task that tells the model when it returned.

use std::collections::BTreeMap;
use std::rc::Rc;

use plywood::engine::{Memory, NewClone, NewSnapshot, NewVolume, Pace, Pool, VolumeInfo};
use plywood::error::Error;
use plywood::io::IoMemory;
use uuid::Uuid;

use crate::content::{SECTOR, SECTORS, fill, parse_blocks};
use crate::medium::Medium;
use crate::model::{BALLAST_BYTES, Control, Hold, Kind, Volume};
use crate::request::{Request, What, carry_out};
use crate::world::{Shared, World};

const BLOCK: u64 = SECTOR * SECTORS;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Marks a volume as used as long as it lives.
struct Using {
    shared: Rc<Shared>,
    volumes: Vec<Uuid>,
    alone: bool,
}

impl Drop for Using {
    fn drop(&mut self) {
        for volume in &self.volumes {
            if self.alone {
                self.shared.alone.borrow_mut().remove(volume);
            } else if let Some(count) = self.shared.used.borrow_mut().get_mut(volume) {
                *count -= 1;
            }
        }
        let in_flight = &self.shared.in_flight;
        in_flight.set(in_flight.get().saturating_sub(1));
    }
}

impl World {
    /// A volume, a snapshot of it and a clone of that: from the start two share.
    pub fn found_family(&mut self, with_ballast: bool) {
        let origin = self.new_volume();
        let origin = Volume { size_bytes: 8 * MIB, sector_size: 512, ..origin };
        self.make(origin.clone());
        for block in [0, 3, 250, 255, 256, 300] {
            self.write_now(origin.uuid, block * BLOCK, 2 * BLOCK);
        }
        if with_ballast {
            let ballast = Volume { size_bytes: BALLAST_BYTES, sector_size: 4096, ..self.new_volume() };
            self.make(ballast.clone());
            // What fills the first group is not compared: it is zeros, and takes no memory here.
            let handle = self.handle(ballast.uuid);
            self.finish(async move {
                for at in 0..96 {
                    drop(handle.write_zeroes(at * MIB, MIB, false).await.expect("there is room"));
                }
                handle.flush().await.expect("flush");
            });
        }
        let pool = self.pool();
        let snapshot = origin.share(self.uuid(), self.name(), true);
        let clone = snapshot.share(self.uuid(), self.name(), false);
        let id = self.shared.model.borrow().volumes[&origin.uuid].id;
        let (first, second) = (new_snapshot(&snapshot), new_clone(&clone));
        let ids = self.finish(async move {
            let snapshot = pool.create_snapshot(id, first).await.expect("a snapshot");
            let clone = pool.create_clone(snapshot.id, second).await.expect("a clone");
            (snapshot.id, clone.id)
        });
        let mut model = self.shared.model.borrow_mut();
        let held = model.volumes[&origin.uuid].clone();
        let snapshot = Volume { id: ids.0, ..held.share(snapshot.uuid, snapshot.name, true) };
        let clone = Volume { id: ids.1, ..snapshot.share(clone.uuid, clone.name, false) };
        if let Some(origin) = model.volumes.get_mut(&origin.uuid) {
            for block in origin.blocks.values_mut() {
                block.hold = Hold::Unknown;
            }
        }
        model.volumes.insert(snapshot.uuid, snapshot);
        model.volumes.insert(clone.uuid, clone);
        let now = model.now();
        model.committed(now);
    }

    /// Leaves the pool so little room that every block that comes free is wanted.
    pub fn fill_up(&mut self) {
        let ballast = Volume { size_bytes: BALLAST_BYTES, sector_size: 4096, ..self.new_volume() };
        self.make(ballast.clone());
        let handle = self.handle(ballast.uuid);
        let room = self.random.u64(24..300) * BLOCK;
        self.finish(async move {
            let mut at = 0;
            for length in [MIB, 64 * BLOCK, BLOCK] {
                while let Ok(held) = handle.write_zeroes(at, length, false).await {
                    drop(held);
                    at += length;
                }
            }
            drop(handle.discard(at - room.min(at), room.min(at)).await.expect("a discard that frees"));
            handle.flush().await.expect("flush");
        });
        let mut model = self.shared.model.borrow_mut();
        let now = model.now();
        model.committed(now);
    }

    /// One block of a volume to which nothing is happening is written, or not.
    pub fn write_somewhere(&mut self) {
        let Some(volume) = self.pick(false, |volume| !volume.read_only) else { return };
        // What was carried out and not answered comes again before anything else does.
        let is_unanswered = self.shared.unanswered.borrow().values().any(|request| request.volume == volume.uuid);
        if is_unanswered || self.shared.model.borrow().is_in_question(volume.uuid) {
            return;
        }
        let block = self.random.u64(..volume.size_bytes / BLOCK);
        let Ok(handle) = self.pool().open_volume(volume.id, false) else { return };
        let shared = Rc::clone(&self.shared);
        let sectors = block * SECTORS..(block + 1) * SECTORS;
        shared.model.borrow_mut().sent_again(volume.uuid, sectors.clone());
        let number = self.begin(volume.uuid, block * BLOCK, BLOCK, Kind::Write, true);
        let memory = IoMemory::from_bytes(&fill(number, sectors.start, SECTORS));
        self.spawn(vec![volume.uuid], false, async move {
            match handle.write(block * BLOCK, &memory, false).await {
                Ok(held) => {
                    shared.model.borrow_mut().acknowledge(number, false);
                    drop(held);
                }
                Err(Error::NoSpace(_)) => shared.model.borrow_mut().refuse(number, false),
                Err(error) => panic!("write of {}: {error}", volume.name),
            }
        });
    }

    fn make(&mut self, volume: Volume) {
        let (pool, new) = (self.pool(), new_volume(&volume));
        let info = self.finish(async move { pool.create_volume(new).await.expect("a volume") });
        self.shared.model.borrow_mut().volumes.insert(volume.uuid, Volume { id: info.id, ..volume });
    }

    fn write_now(&mut self, volume: Uuid, offset: u64, length: u64) {
        let handle = self.handle(volume);
        let number = self.begin(volume, offset, length, Kind::Write, true);
        let memory = IoMemory::from_bytes(&fill(number, offset / SECTOR, length / SECTOR));
        self.finish(async move { drop(handle.write(offset, &memory, true).await.expect("a write")) });
        self.shared.model.borrow_mut().acknowledge(number, true);
    }

    /// Chooses one operation and starts it, if the choice fits the volumes there are.
    pub fn start_operation(&mut self) {
        let started = match self.random.u32(..1000) {
            0..140 => self.start_read(),
            140..150 => self.start_seal(),
            150..560 => self.start_write(),
            560..640 => self.start_discard(),
            640..680 => self.start_zeroes(),
            680..790 => self.start_flush(),
            790..805 => self.start_create(),
            805..840 => self.start_snapshot(),
            840..850 => self.start_snapshots(),
            850..885 => self.start_clone(),
            885..905 => self.start_roll_back(),
            905..945 => self.start_delete(),
            945..957 => self.start_resize(),
            957..963 => self.start_reserve(),
            963..970 => self.start_claim(),
            970..977 => self.start_rename(),
            977..987 => self.start_checkpoint(),
            _ => self.start_commit(),
        };
        self.shared.met.borrow_mut().operations += u64::from(started);
    }

    pub fn spawn(&mut self, volumes: Vec<Uuid>, alone: bool, task: impl Future<Output = ()> + 'static) {
        for volume in &volumes {
            if alone {
                self.shared.alone.borrow_mut().insert(*volume);
            } else {
                *self.shared.used.borrow_mut().entry(*volume).or_default() += 1;
            }
        }
        self.shared.in_flight.set(self.shared.in_flight.get() + 1);
        let using = Using { shared: Rc::clone(&self.shared), volumes, alone };
        self.panicked.spawn(&self.executor, async move {
            task.await;
            drop(using);
        });
    }

    pub fn pick(&mut self, alone: bool, wanted: impl Fn(&Volume) -> bool) -> Option<Volume> {
        let model = self.shared.model.borrow();
        let (taken, used) = (self.shared.alone.borrow(), self.shared.used.borrow());
        let is_free = |uuid: &Uuid| !taken.contains(uuid) && (!alone || used.get(uuid).is_none_or(|count| *count == 0));
        let fitting: Vec<&Volume> = model
            .volumes
            .values()
            .filter(|volume| !volume.is_ballast() && is_free(&volume.uuid) && wanted(volume))
            .collect();
        (!fitting.is_empty()).then(|| fitting[self.random.usize(..fitting.len())].clone())
    }

    /// A range near one of a few places of the volume, so that operations meet each other's.
    fn range(&mut self, volume: &Volume) -> (u64, u64) {
        let grain = u64::from(volume.sector_size);
        let size = volume.size_bytes;
        let near = [0, MIB - 8 * BLOCK, size / 2, size.saturating_sub(24 * BLOCK), 256 * MIB - 4 * BLOCK, 64 * GIB];
        let near = near[self.random.usize(..near.len())] % size / BLOCK * BLOCK;
        if (self.is_hungry && self.random.u32(..6) == 0) || (self.is_tight && self.random.u32(..16) == 0) {
            let start = self.random.u64(..size.min(24 * MIB) / BLOCK) * BLOCK;
            return (start, (self.random.u64(16..=256) * BLOCK).min(size - start));
        }
        let (offset, length) = match self.random.u32(..100) {
            0..45 => (self.random.u64(..12) * BLOCK, BLOCK),
            45..70 => (self.random.u64(..96) * SECTOR, self.random.u64(1..=8) * SECTOR),
            70..90 => (self.random.u64(..96) * SECTOR, self.random.u64(1..=64) * SECTOR),
            90..98 => (self.random.u64(..8) * BLOCK, self.random.u64(1..=24) * BLOCK),
            _ => (0, self.random.u64(32..=256) * BLOCK),
        };
        let start = (near + offset) % size / grain * grain;
        let end = (start + length.div_ceil(grain) * grain).min(size);
        (start, end - start)
    }

    fn begin(&mut self, volume: Uuid, offset: u64, length: u64, kind: Kind, is_data: bool) -> u64 {
        let mut model = self.shared.model.borrow_mut();
        let number = model.number();
        let sectors = offset / SECTOR..(offset + length) / SECTOR;
        model.begin(number, volume, sectors, if is_data { number } else { 0 }, kind);
        number
    }

    fn start_read(&mut self) -> bool {
        let Some(volume) = self.pick(false, |_| true) else { return false };
        let (offset, length) = self.range(&volume);
        let (offset, length) = (offset / BLOCK * BLOCK, length.next_multiple_of(BLOCK));
        let length = length.min(volume.size_bytes - offset);
        let handle = self.handle(volume.uuid);
        let shared = Rc::clone(&self.shared);
        let observer = shared.model.borrow_mut().watch(volume.uuid);
        self.spawn(vec![volume.uuid], false, async move {
            let memory = IoMemory::zeroed(length as usize);
            let outcome = handle.read(offset, &memory).await;
            let mut model = shared.model.borrow_mut();
            let seen = model.watched(observer);
            outcome.unwrap_or_else(|error| panic!("read of {}: {error}", volume.name));
            let mut bytes = vec![0; length as usize];
            memory.read(0, &mut bytes);
            let blocks = parse_blocks(&bytes, offset / BLOCK)
                .unwrap_or_else(|error| panic!("read of {} at {offset}: {error}", volume.name));
            for (number, found) in blocks {
                let frame = seen.get(&number).cloned().unwrap_or_default();
                assert!(
                    frame.matches(&found),
                    "read of {} (id {}), block {number}: found {found:?}, expected {frame:?}",
                    volume.name,
                    volume.id
                );
                if volume.read_only {
                    // Whatever a snapshot showed once it shows for ever.
                    model.settle(volume.uuid, number, found);
                }
            }
        });
        true
    }

    fn start_write(&mut self) -> bool {
        let Some(volume) = self.pick(false, |volume| !volume.read_only) else { return false };
        let (offset, length) = self.range(&volume);
        let fua = self.random.u32(..12) == 0;
        // Sharers change the same blocks at the same time: which of them still holds what both held is where bugs are.
        let grain = |volume: &Volume| u64::from(volume.sector_size);
        let fits = |twin: &Volume| {
            let is_whole = offset.is_multiple_of(grain(twin)) && length.is_multiple_of(grain(twin));
            !twin.read_only && twin.uuid != volume.uuid && is_whole && offset + length <= twin.size_bytes
        };
        if self.random.u32(..4) == 0
            && let Some(twin) = self.pick(false, fits)
        {
            self.change(&twin, offset, length, What::Write { fua: false });
        }
        self.change(&volume, offset, length, What::Write { fua })
    }

    fn start_discard(&mut self) -> bool {
        let Some(volume) = self.pick(false, |volume| !volume.read_only) else { return false };
        let (mut offset, mut length) = self.range(&volume);
        if self.random.u32(..4) == 0 {
            let reach = [MIB, 3 * MIB, 256 * MIB, 70 * GIB][self.random.usize(..4)];
            offset = offset.saturating_sub(self.random.u64(..4) * SECTOR) / u64::from(volume.sector_size)
                * u64::from(volume.sector_size);
            length = (length + reach).min(volume.size_bytes - offset);
        }
        self.change(&volume, offset, length, What::Discard)
    }

    fn start_zeroes(&mut self) -> bool {
        let Some(volume) = self.pick(false, |volume| !volume.read_only) else { return false };
        let (offset, length) = self.range(&volume);
        let unmap = self.random.bool();
        self.change(&volume, offset, length, What::Zeroes { unmap })
    }

    fn change(&mut self, volume: &Volume, offset: u64, length: u64, what: What) -> bool {
        let is_data = matches!(what, What::Write { .. });
        let number = self.begin(volume.uuid, offset, length, what.kind(), is_data);
        let request = Request { volume: volume.uuid, offset, length, what, is_done: false };
        self.shared.unanswered.borrow_mut().insert(number, request);
        self.start_change(number, request);
        true
    }

    pub fn start_change(&mut self, number: u64, request: Request) {
        let handle = self.handle(request.volume);
        let shared = Rc::clone(&self.shared);
        // Now and then a reply takes its time to be handed over.
        let delay = if self.random.u32(..8) == 0 { self.random.u32(..200) } else { self.random.u32(..3) };
        self.spawn(vec![request.volume], false, async move {
            let answered = || shared.unanswered.borrow_mut().remove(&number);
            match carry_out(handle, number, request).await {
                Ok(held) => {
                    shared.model.borrow_mut().acknowledge(number, request.what == What::Write { fua: true });
                    if let Some(request) = shared.unanswered.borrow_mut().get_mut(&number) {
                        request.is_done = true;
                    }
                    for _ in 0..delay {
                        futures_lite::future::yield_now().await;
                    }
                    answered();
                    drop(held);
                }
                Err(Error::NoSpace(_)) => {
                    let in_parts = !matches!(request.what, What::Write { .. });
                    shared.model.borrow_mut().refuse(number, in_parts);
                    shared.met.borrow_mut().no_space += 1;
                    answered();
                }
                Err(error) => panic!("{request:?}: {error}"),
            }
        });
    }

    fn start_flush(&mut self) -> bool {
        let Some(volume) = self.pick(false, |_| true) else { return false };
        let handle = self.handle(volume.uuid);
        let shared = Rc::clone(&self.shared);
        let since = shared.model.borrow_mut().now();
        self.spawn(vec![volume.uuid], false, async move {
            handle.flush().await.unwrap_or_else(|error| panic!("flush: {error}"));
            shared.model.borrow_mut().flushed(volume.uuid, since);
        });
        true
    }

    fn start_commit(&mut self) -> bool {
        let (pool, shared) = (self.pool(), Rc::clone(&self.shared));
        let since = shared.model.borrow_mut().now();
        self.spawn(Vec::new(), false, async move {
            pool.commit().await.unwrap_or_else(|error| panic!("commit: {error}"));
            shared.model.borrow_mut().committed(since);
        });
        true
    }

    fn start_checkpoint(&mut self) -> bool {
        let (pool, shared) = (self.pool(), Rc::clone(&self.shared));
        let since = shared.model.borrow_mut().now();
        self.spawn(Vec::new(), false, async move {
            pool.checkpoint().await.unwrap_or_else(|error| panic!("checkpoint: {error}"));
            shared.model.borrow_mut().committed(since);
        });
        true
    }

    pub fn is_crowded(&self) -> bool {
        self.shared.model.borrow().volumes.len() >= self.most
    }

    fn start_create(&mut self) -> bool {
        if self.is_crowded() {
            return false;
        }
        let volume = self.new_volume();
        let (pool, new) = (self.pool(), new_volume(&volume));
        self.control(Vec::new(), Control::Create(volume.clone()), async move |shared: &Shared| {
            match pool.create_volume(new).await {
                Ok(info) => adopt(shared, Volume { id: info.id, ..volume }),
                Err(error) => refused(shared, "create", &error),
            }
        });
        true
    }

    fn start_snapshot(&mut self) -> bool {
        if self.is_crowded() {
            return false;
        }
        let Some(origin) = self.pick(false, |volume| !volume.read_only) else { return false };
        let snapshot = origin.share(self.uuid(), self.name(), true);
        let (pool, new) = (self.pool(), new_snapshot(&snapshot));
        let observer = {
            let mut model = self.shared.model.borrow_mut();
            let number = model.number();
            model.observe(number, origin.uuid);
            number
        };
        let look = self.random.bool();
        let control = Control::Snapshot { observer, volume: snapshot.clone() };
        self.control(vec![origin.uuid], control, async move |shared: &Shared| {
            let outcome = pool.create_snapshot(origin.id, new).await;
            let blocks = shared.model.borrow().observed(observer);
            shared.model.borrow_mut().observation_ended(observer, outcome.is_ok());
            match outcome {
                Ok(info) => {
                    adopt(shared, Volume { id: info.id, blocks, ..snapshot });
                    if look {
                        settle_doubts(shared, &pool, info).await;
                    }
                }
                Err(error) => refused(shared, "snapshot", &error),
            }
        });
        true
    }

    fn start_clone(&mut self) -> bool {
        if self.is_crowded() {
            return false;
        }
        let Some(snapshot) = self.pick(false, |volume| volume.read_only) else { return false };
        let clone = snapshot.share(self.uuid(), self.name(), false);
        let (pool, new) = (self.pool(), new_clone(&clone));
        self.control(vec![snapshot.uuid], Control::Clone(clone.clone()), async move |shared: &Shared| {
            match pool.create_clone(snapshot.id, new).await {
                Ok(info) => adopt(shared, Volume { id: info.id, ..clone }),
                Err(error) => refused(shared, "clone", &error),
            }
        });
        true
    }

    fn start_roll_back(&mut self) -> bool {
        let Some(snapshot) = self.pick(false, |volume| volume.read_only) else { return false };
        let Some(origin) = self.pick(true, |volume| !volume.read_only && Some(volume.uuid) == snapshot.origin) else {
            return false;
        };
        self.handles.remove(&origin.uuid);
        let keep =
            (self.random.u32(..3) == 0 && !self.is_crowded()).then(|| origin.share(self.uuid(), self.name(), true));
        let observer = keep.as_ref().map(|_| {
            let mut model = self.shared.model.borrow_mut();
            let number = model.number();
            model.observe(number, origin.uuid);
            number
        });
        let pool = self.pool();
        let control =
            Control::RollBack { volume: origin.uuid, snapshot: snapshot.uuid, keep: observer.zip(keep.clone()) };
        *self.shared.used.borrow_mut().entry(snapshot.uuid).or_default() += 1;
        self.control_alone(origin.uuid, control, async move |shared: &Shared| {
            let outcome = pool.roll_back(origin.id, snapshot.id, keep.as_ref().map(new_snapshot)).await;
            if let (Some(observer), Some(keep)) = (observer, keep) {
                let blocks = shared.model.borrow().observed(observer);
                shared.model.borrow_mut().observation_ended(observer, outcome.is_ok());
                if let Some(info) = pool.volumes().into_iter().find(|info| info.uuid == keep.uuid) {
                    adopt(shared, Volume { id: info.id, blocks, ..keep });
                }
            }
            match outcome {
                Ok(()) => shared.model.borrow_mut().roll_back(origin.uuid, snapshot.uuid),
                Err(error) => refused(shared, "rollback", &error),
            }
            if let Some(count) = shared.used.borrow_mut().get_mut(&snapshot.uuid) {
                *count -= 1;
            }
        });
        true
    }

    fn start_seal(&mut self) -> bool {
        let Some(snapshot) = self.pick(false, |volume| volume.read_only) else { return false };
        let pace = if self.random.bool() { Pace::Full } else { Pace::BytesPerTick(self.random.u64(1..64) * BLOCK) };
        let (pool, shared) = (self.pool(), Rc::clone(&self.shared));
        // The snapshot may be deleted meanwhile.
        self.spawn(Vec::new(), false, async move {
            shared.sealing.update(|count| count + 1);
            let outcome = pool.seal(snapshot.id, pace).await;
            shared.sealing.update(|count| count.saturating_sub(1));
            match outcome {
                Ok(report) => {
                    if let Some(known) = shared.model.borrow_mut().volumes.get_mut(&snapshot.uuid) {
                        let before = known.digest.replace(report.digest);
                        assert!(before.is_none_or(|before| before == report.digest), "the digest changed");
                    }
                }
                Err(Error::NotFound(_) | Error::Busy(_)) => {}
                Err(error) => refused(&shared, "seal", &error),
            }
        });
        true
    }

    fn start_delete(&mut self) -> bool {
        // Two sharers at least stay.
        if self.shared.model.borrow().volumes.len() <= 3 {
            return false;
        }
        // Snapshots rather than others: then two writable volumes share what nobody else holds.
        let snapshots_only = self.random.u32(..3) > 0;
        let Some(volume) = self.pick(true, |volume| volume.read_only || !snapshots_only) else { return false };
        self.handles.remove(&volume.uuid);
        let pool = self.pool();
        self.control_alone(volume.uuid, Control::Delete(volume.uuid), async move |shared: &Shared| {
            match pool.delete_volume(volume.id).await {
                Ok(()) => {
                    shared.model.borrow_mut().volumes.remove(&volume.uuid);
                }
                Err(error) => panic!("deletion of {}: {error}", volume.name),
            }
        });
        true
    }

    fn start_resize(&mut self) -> bool {
        let Some(volume) = self.pick(true, |volume| !volume.read_only) else { return false };
        self.handles.remove(&volume.uuid);
        let shift = self.random.u64(1..600) * BLOCK;
        let size_bytes = if self.random.bool() {
            volume.size_bytes + shift
        } else {
            volume.size_bytes.saturating_sub(shift).max(BLOCK)
        };
        let pool = self.pool();
        let control = Control::Resize { volume: volume.uuid, size_bytes };
        self.control_alone(volume.uuid, control, async move |shared: &Shared| {
            match pool.resize_volume(volume.id, size_bytes).await {
                Ok(()) => {
                    if let Some(volume) = shared.model.borrow_mut().volumes.get_mut(&volume.uuid) {
                        volume.truncate(size_bytes);
                    }
                }
                Err(error) => refused(shared, "resize", &error),
            }
        });
        true
    }

    fn start_rename(&mut self) -> bool {
        let Some(volume) = self.pick(true, |_| true) else { return false };
        let (pool, name) = (self.pool(), self.name());
        let attributes = BTreeMap::from([("note".to_owned(), Some(name.clone().into_bytes()))]);
        let control = Control::Rename { volume: volume.uuid, name: name.clone() };
        self.control_alone(volume.uuid, control, async move |shared: &Shared| {
            match pool.rename_volume(volume.id, &name).await {
                Ok(()) => {
                    if let Some(volume) = shared.model.borrow_mut().volumes.get_mut(&volume.uuid) {
                        volume.name = name;
                    }
                }
                Err(error) => refused(shared, "rename", &error),
            }
            if let Err(error) = pool.set_attributes(volume.id, attributes).await {
                refused(shared, "attributes", &error);
            }
        });
        true
    }

    fn control(&mut self, volumes: Vec<Uuid>, control: Control, call: impl AsyncFnOnce(&Shared) + 'static) {
        self.start_control(volumes, false, control, call);
    }

    pub fn control_alone(&mut self, volume: Uuid, control: Control, call: impl AsyncFnOnce(&Shared) + 'static) {
        self.start_control(vec![volume], true, control, call);
    }

    fn start_control(
        &mut self,
        volumes: Vec<Uuid>,
        alone: bool,
        control: Control,
        call: impl AsyncFnOnce(&Shared) + 'static,
    ) {
        let shared = Rc::clone(&self.shared);
        let number = shared.model.borrow_mut().number();
        shared.model.borrow_mut().controls.insert(number, control);
        self.spawn(volumes, alone, async move {
            call(&shared).await;
            shared.model.borrow_mut().controls.remove(&number);
        });
    }

    fn new_volume(&mut self) -> Volume {
        let size_bytes = match self.random.u32(..10) {
            // Few worlds are tall, so that these are met in time.
            5..10 if self.is_tall => 64 * GIB + self.random.u64(1..=500) * MIB,
            0..3 => self.random.u64(1..=256) * BLOCK,
            3..7 => self.random.u64(257..=5000) * BLOCK,
            7..9 => 256 * MIB + self.random.u64(1..=500) * MIB,
            _ => self.random.u64(257..=5000) * BLOCK,
        };
        let sector_size = if self.random.bool() { 512 } else { 4096 };
        Volume::new(self.uuid(), self.name(), size_bytes, sector_size)
    }

    pub fn uuid(&mut self) -> Uuid {
        Uuid::from_u128(self.random.u128(..))
    }

    pub fn name(&mut self) -> String {
        format!("volume-{}", self.shared.model.borrow_mut().number())
    }
}

fn new_volume(volume: &Volume) -> NewVolume {
    NewVolume {
        uuid: volume.uuid,
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        sector_size: volume.sector_size,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 1,
        attributes: BTreeMap::from([("of".to_owned(), vec![7; 5000])]),
    }
}

pub fn new_snapshot(volume: &Volume) -> NewSnapshot {
    NewSnapshot { uuid: volume.uuid, name: volume.name.clone(), created: 2, attributes: BTreeMap::new() }
}

fn new_clone(volume: &Volume) -> NewClone {
    NewClone { uuid: volume.uuid, name: volume.name.clone(), created: 3, size_bytes: None, attributes: BTreeMap::new() }
}

/// Looks at what a new snapshot holds where that is not known: from now on it must not change.
async fn settle_doubts(shared: &Shared, pool: &Pool<Medium>, info: VolumeInfo) {
    let doubtful = shared.model.borrow().doubtful(info.uuid);
    *shared.used.borrow_mut().entry(info.uuid).or_default() += 1;
    let handle = pool.open_volume(info.id, true).unwrap_or_else(|error| panic!("{}: {error}", info.name));
    for block in doubtful {
        let memory = IoMemory::zeroed(BLOCK as usize);
        handle.read(block * BLOCK, &memory).await.unwrap_or_else(|error| panic!("{}: {error}", info.name));
        for (_, found) in parse_blocks(&memory.to_vec(), block).unwrap_or_else(|error| panic!("{error}")) {
            shared.model.borrow_mut().settle(info.uuid, block, found);
        }
    }
    drop(handle);
    if let Some(count) = shared.used.borrow_mut().get_mut(&info.uuid) {
        *count -= 1;
    }
}

pub fn adopt(shared: &Shared, volume: Volume) {
    let former = shared.model.borrow_mut().volumes.insert(volume.uuid, volume);
    assert!(former.is_none(), "made twice");
}

pub fn refused(shared: &Shared, what: &str, error: &Error) {
    assert!(matches!(error, Error::NoSpace(_)), "{what}: {error}");
    shared.met.borrow_mut().no_space += 1;
}

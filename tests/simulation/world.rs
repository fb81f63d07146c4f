//! A pool on scrambled memory, the model beside it, and the ways in which the engine ends: closed, cut off after a
//! commit, or dead in the middle of everything with its pending log kept.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::rc::Rc;
use std::sync::LazyLock;

use async_executor::LocalExecutor;
use fastrand::Rng;
use futures_lite::FutureExt as _;
use futures_lite::future::yield_now;
use plywood::engine::{CreateOptions, Memory, OpenOptions, PendingLog, Pool, PrivateLog, Storage, VolumeHandle};
use plywood::error::Error;
use plywood::io::MemoryStorage;
use plywood::units::{Lsn, VolumeId};
use uuid::Uuid;

use crate::content::{Change, SECTOR, parse_sector};
use crate::met::Met;
use crate::model::{Control, Model, Volume};
use crate::operations::{Round, compare, resize, roll_back, with};

const POOL_BYTES: u64 = 1 << 30;
/// Small, so that it wraps and fills often.
const JOURNAL_BYTES: u64 = 1 << 20;
/// Blocks read at a time when everything is compared.
const COMPARED_BLOCKS: u64 = 256;
/// Ticks of an idle engine, a second each, for which operations may wait; after that it is taken to be stuck.
const PATIENCE: u32 = 300;
/// Steps in which nothing could go on at all, after which it is taken to be stuck before there is a pool to tick.
const IDLE_STEPS: u32 = 1000;

/// What the tasks of operations use.
pub struct Shared {
    pub model: Rc<RefCell<Model>>,
    pub storage: MemoryStorage,
    pub met: Rc<RefCell<Met>>,
    pub remaining: Rc<Cell<usize>>,
    panic: RefCell<Option<Box<dyn Any + Send>>>,
}

impl Shared {
    /// Runs `task`; its panic is kept for whoever drives the executor, which would swallow it.
    pub async fn guard<T>(&self, task: impl Future<Output = T>) -> Option<T> {
        match AssertUnwindSafe(task).catch_unwind().await {
            Ok(value) => Some(value),
            Err(panic) => {
                self.panic.borrow_mut().get_or_insert(panic);
                None
            }
        }
    }
}

/// The pending log in memory that outlives an engine, as the front's does.
#[derive(Clone)]
struct SharedLog(Rc<RefCell<PrivateLog>>);

impl PendingLog for SharedLog {
    fn session(&self) -> u128 {
        self.0.borrow().session()
    }

    fn free_bytes(&self) -> usize {
        self.0.borrow().free_bytes()
    }

    fn publish(&mut self, lsn: Lsn, record: &[u8]) {
        self.0.borrow_mut().publish(lsn, record);
    }

    fn release(&mut self, through: Lsn) {
        self.0.borrow_mut().release(through);
    }

    fn poison(&mut self) {
        self.0.borrow_mut().poison();
    }

    fn is_poisoned(&self) -> bool {
        self.0.borrow().is_poisoned()
    }

    fn published(&self) -> Vec<(Lsn, Vec<u8>)> {
        self.0.borrow().published()
    }
}

/// With `PLYWOOD_MODEL_TRACE` set, prints what the test does, for finding the story of a failure.
pub fn trace(line: impl FnOnce() -> String) {
    static TRACES: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PLYWOOD_MODEL_TRACE").is_some());
    if *TRACES {
        println!("{}", line());
    }
}

/// How an engine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Closed: everything is in a checkpoint.
    Closed,
    /// Gone after a commit, its pending log with it: the journal has everything.
    CutOff,
    /// Dead at any moment; what it had issued completes, and its pending log is kept.
    Died,
}

/// One pool, one model, one source of chance.
pub struct World {
    pub random: Rng,
    pub shared: Rc<Shared>,
    pub executor: LocalExecutor<'static>,
    pub handles: HashMap<VolumeId, VolumeHandle<MemoryStorage>>,
    pool: Option<Pool<MemoryStorage>>,
    log: SharedLog,
}

impl World {
    /// A new pool, open.
    pub fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let shared = Rc::new(Shared {
            model: Rc::default(),
            storage: MemoryStorage::scrambled(POOL_BYTES, seed),
            met: Rc::default(),
            remaining: Rc::default(),
            panic: RefCell::default(),
        });
        let log = SharedLog(Rc::new(RefCell::new(PrivateLog::new(random.u128(..)))));
        let mut world =
            Self { random, shared, executor: LocalExecutor::new(), handles: HashMap::new(), pool: None, log };
        let options = CreateOptions {
            uuid: Uuid::from_u128(world.random.u128(..)),
            name: "model".to_owned(),
            size_bytes: POOL_BYTES,
            journal_bytes: JOURNAL_BYTES,
        };
        let storage = world.shared.storage.clone();
        world.finish(async move { Pool::create(&storage, &options).await.expect("create of the pool") });
        world.open();
        world
    }

    pub fn pool(&self) -> &Pool<MemoryStorage> {
        self.pool.as_ref().expect("open")
    }

    /// The handle on `id` that operations use, opened when first wanted.
    pub fn handle(&mut self, id: VolumeId) -> VolumeHandle<MemoryStorage> {
        if let Some(handle) = self.handles.get(&id) {
            return handle.clone();
        }
        let read_only = self.shared.model.borrow().volumes[&id].read_only;
        let handle = self.pool().open_volume(id, read_only).unwrap_or_else(|error| panic!("open of {id}: {error}"));
        self.handles.insert(id, handle.clone());
        handle
    }

    /// Issues up to twelve operations together and runs them to their end, or to a random moment before it when the
    /// engine is to die. Returns how many were issued.
    pub fn round(&mut self, dies: bool) -> u64 {
        let mut round = Round::default();
        let wanted = self.random.u64(1..=12);
        let mut issued = 0;
        for _ in 0..wanted * 4 {
            if issued == wanted {
                break;
            }
            issued += u64::from(self.start_operation(&mut round));
            // Some get a head start, so that the others meet them half done.
            if self.random.u32(..3) == 0 {
                for _ in 0..self.random.u32(..20) {
                    self.executor.try_tick();
                    self.shared.storage.run_one();
                }
            }
        }
        let steps = if dies { Some(self.random.u32(..400)) } else { None };
        let remaining = Rc::clone(&self.shared.remaining);
        self.drive(steps, || remaining.get() == 0);
        issued
    }

    /// Ends the engine in one of its ways and starts the next, which must hold what the model holds.
    pub fn reopen(&mut self, end: End) {
        trace(|| format!("the engine ends: {end:?}; {}", self.waiting()));
        match end {
            End::Closed => {
                self.handles.clear();
                let pool = self.pool().clone();
                self.finish(async move { pool.close().await.unwrap_or_else(|error| panic!("close: {error}")) });
            }
            End::CutOff => {
                let pool = self.pool().clone();
                self.finish(async move { pool.commit().await.unwrap_or_else(|error| panic!("commit: {error}")) });
            }
            End::Died => {}
        }
        if let Some(pool) = self.pool.take() {
            self.shared.met.borrow_mut().add(&pool);
        }
        // The tasks go first: they hold handles, and theirs is the state that dies.
        self.executor = LocalExecutor::new();
        self.shared.remaining.set(0);
        self.handles.clear();
        // The successor starts after the last operation of its predecessor (rule O9).
        while self.shared.storage.run_one() {}
        if end == End::CutOff {
            self.log = SharedLog(Rc::new(RefCell::new(PrivateLog::new(self.random.u128(..)))));
        }
        self.shared.met.borrow_mut().ended(end);
        self.open();
        trace(|| format!("open again: {:?}", self.pool().counters()));
        self.resolve();
    }

    fn open(&mut self) {
        let storage = self.shared.storage.clone();
        let log: Box<dyn PendingLog> = Box::new(self.log.clone());
        // Room for little, so that lookups miss.
        let options = OpenOptions { cache_bytes: 1 << 20 };
        let pool = self.finish(async move { Pool::open(storage, log, options).await.expect("open of the pool") });
        let background = pool.clone();
        let shared = Rc::clone(&self.shared);
        self.executor.spawn(async move { shared.guard(background.run()).await }).detach();
        self.pool = Some(pool);
    }

    /// Runs one future to its end.
    pub fn finish<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> T {
        let result: Rc<RefCell<Option<T>>> = Rc::default();
        let (slot, shared) = (Rc::clone(&result), Rc::clone(&self.shared));
        let task = self.executor.spawn(async move { *slot.borrow_mut() = shared.guard(future).await });
        let done = Rc::clone(&result);
        self.drive(None, || done.borrow().is_some());
        drop(task);
        result.take().expect("finished")
    }

    /// Lets tasks and storage take turns until `done`, or for `steps`.
    fn drive(&mut self, steps: Option<u32>, done: impl Fn() -> bool) {
        let (mut idle, mut ticks) = (0, 0);
        let mut taken = 0;
        loop {
            let mut progress = false;
            // Bounded: a task that waits for the storage by yielding must not keep it from running.
            for _ in 0..256 {
                if !self.executor.try_tick() {
                    break;
                }
                progress = true;
            }
            if let Some(panic) = self.shared.panic.take() {
                resume_unwind(panic);
            }
            if done() || steps.is_some_and(|steps| taken >= steps) {
                return;
            }
            for _ in 0..self.random.u32(1..16) {
                progress |= self.shared.storage.run_one();
            }
            taken += 1;
            idle = if progress { 0 } else { idle + 1 };
            // A tick makes background tasks look around, which is no progress of what is waited for.
            ticks += u32::from(idle > 4);
            if (idle > 4 || self.random.u32(..2000) == 0)
                && let Some(pool) = &self.pool
            {
                pool.tick();
            }
            assert!(idle < IDLE_STEPS && ticks < PATIENCE, "stuck: {}", self.waiting());
        }
    }

    fn waiting(&self) -> String {
        let model = self.shared.model.borrow();
        let controls: Vec<String> = model.controls.values().map(Control::describe).collect();
        let pool = self.pool.as_ref().map(Pool::info);
        format!("in flight {:?}; control calls {controls:?}; {pool:?}", model.flights)
    }

    /// Brings the model to what an engine that died made of the calls it had not answered.
    fn resolve(&mut self) {
        let mut model = self.shared.model.borrow_mut();
        let flights: Vec<_> = model.flights.drain().map(|(_, flight)| flight).collect();
        for writes in [true, false] {
            for flight in &flights {
                if matches!(flight.change, Change::Write(_)) == writes
                    && let Some(volume) = model.volumes.get_mut(&flight.volume)
                {
                    volume.contents.doubt(flight.sectors.clone(), &flight.change);
                    volume.accountable = false;
                }
            }
        }
        let mut controls: Vec<_> = model.controls.drain().collect();
        controls.sort_unstable_by_key(|(number, _)| *number);
        drop(model);
        for (_, control) in controls {
            self.resolve_control(control);
        }
        self.shared.model.borrow_mut().observers.clear();
    }

    fn resolve_control(&mut self, control: Control) {
        let infos = self.pool().volumes();
        let found = |uuid: Uuid| infos.iter().find(|info| info.uuid == uuid);
        match control {
            Control::Create(volume) | Control::Clone(volume) => {
                if let Some(info) = found(volume.uuid) {
                    self.adopt_once(volume, info.id);
                }
            }
            Control::Snapshot { observer, mut volume } => {
                // Where the call had returned to its task but not to us, the model has it already.
                if let Some(info) = found(volume.uuid)
                    && self.shared.model.borrow().observers.contains_key(&observer)
                {
                    let observed = self.shared.model.borrow_mut().observed(observer);
                    volume.accountable &= observed.accountable;
                    volume.contents = observed.contents;
                    self.adopt_once(volume, info.id);
                }
            }
            Control::Delete(id) => {
                if !infos.iter().any(|info| info.id == id) {
                    self.shared.model.borrow_mut().volumes.remove(&id);
                }
            }
            Control::RollBack { volume, snapshot, keep } => {
                if let Some(kept) = keep
                    && let Some(info) = found(kept.uuid)
                {
                    self.adopt_once(kept, info.id);
                }
                let info = infos.iter().find(|info| info.id == volume).expect("rollback deletes nothing");
                let before = self.shared.model.borrow().volumes[&volume].clone();
                let after = self.shared.model.borrow().volumes[&snapshot].clone();
                if info.size_bytes != before.size_bytes || self.differs(&before) {
                    assert_eq!(info.size_bytes, after.size_bytes);
                    roll_back(&self.shared, volume, snapshot);
                }
            }
            Control::Resize { volume, size_bytes } => {
                let info = infos.iter().find(|info| info.id == volume).expect("resizing deletes nothing");
                if info.size_bytes == size_bytes {
                    resize(&self.shared, volume, size_bytes);
                }
            }
            Control::Rename { volume, name } => {
                let info = infos.iter().find(|info| info.id == volume).expect("renaming deletes nothing");
                with(&self.shared, volume, |known| {
                    if info.name == name {
                        known.name = name;
                    }
                });
            }
            Control::Attributes { volume, attributes } => {
                if self.attributes(volume) == attributes {
                    with(&self.shared, volume, |known| known.attributes = attributes);
                }
            }
            Control::Reserve { volume, reservation_bytes } => {
                let info = infos.iter().find(|info| info.id == volume).expect("reserving deletes nothing");
                if info.reservation_bytes == reservation_bytes {
                    with(&self.shared, volume, |known| known.reservation_bytes = reservation_bytes);
                }
            }
            Control::Protect { volume, protected } => {
                let info = infos.iter().find(|info| info.id == volume).expect("protecting deletes nothing");
                if info.protected == protected {
                    with(&self.shared, volume, |known| known.protected = protected);
                }
            }
        }
    }

    fn adopt_once(&self, mut volume: Volume, id: VolumeId) {
        volume.id = id;
        self.shared.model.borrow_mut().volumes.entry(id).or_insert(volume);
    }

    fn attributes(&mut self, id: VolumeId) -> BTreeMap<String, Vec<u8>> {
        let pool = self.pool().clone();
        self.finish(async move { pool.attributes(id).await.unwrap_or_else(|error| panic!("attributes: {error}")) })
    }

    /// Whether any block of the model's is not what the engine has.
    fn differs(&mut self, volume: &Volume) -> bool {
        let handle = self.handle(volume.id);
        for (first, count) in volume.contents.runs(COMPARED_BLOCKS) {
            let memory = self.read(&handle, first * 8 * SECTOR, count * 8 * SECTOR);
            let mut bytes = vec![0; memory.len()];
            memory.read(0, &mut bytes);
            for (index, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                let number = first * 8 + index as u64;
                let value = parse_sector(sector, number);
                if !value.is_ok_and(|value| volume.contents.allows(number, value)) {
                    return true;
                }
            }
        }
        false
    }

    fn read(
        &mut self,
        handle: &VolumeHandle<MemoryStorage>,
        offset: u64,
        length: u64,
    ) -> <MemoryStorage as Storage>::Memory {
        let memory = self.shared.storage.allocate(length as usize);
        let (handle, into) = (handle.clone(), memory.clone());
        self.finish(async move { handle.read(offset, &into).await.unwrap_or_else(|error| panic!("read: {error}")) });
        memory
    }

    /// Compares everything with the model, settles what was in doubt, and has the pool checked. Nothing is in flight.
    pub fn verify(&mut self) {
        let infos = self.pool().volumes();
        let known: Vec<Volume> = self.shared.model.borrow().volumes.values().cloned().collect();
        let engine_ids: Vec<VolumeId> = infos.iter().map(|info| info.id).collect();
        let model_ids: Vec<VolumeId> = known.iter().map(|volume| volume.id).collect();
        assert_eq!(engine_ids, model_ids, "volumes of the pool and of the model");
        for (info, volume) in infos.iter().zip(&known) {
            let facts = (info.uuid, &info.name, info.size_bytes, info.sector_size, info.read_only, info.protected);
            let expected =
                (volume.uuid, &volume.name, volume.size_bytes, volume.sector_size, volume.read_only, volume.protected);
            assert_eq!(facts, expected, "{}", volume.name);
            assert_eq!(info.reservation_bytes, volume.reservation_bytes, "{}", volume.name);
            assert_eq!(self.attributes(volume.id), volume.attributes, "attributes of {}", volume.name);
            self.verify_contents(volume);
            if info.settled && volume.accountable {
                let found = (info.mapped_bytes / 4096, info.own_bytes / 4096);
                let expected = (volume.contents.mapped_blocks(), volume.contents.own_blocks());
                assert_eq!(found, expected, "mapped and own blocks of {}", volume.name);
            }
            self.shared.met.borrow_mut().volume(info.size_bytes, volume.contents.mapped_blocks());
        }
        let pool = self.pool().clone();
        let report = self.finish(async move {
            loop {
                match pool.check().await {
                    Ok(report) => return report,
                    // The carcass worker was at it; it comes to an end.
                    Err(Error::Busy(_)) => yield_now().await,
                    Err(error) => panic!("check: {error}"),
                }
            }
        });
        assert!(report.faults.is_empty(), "pool check: {:#?}", report.faults);
        assert_eq!(
            self.shared.storage.statistics().overlapping_changes,
            0,
            "two writes of the engine met on the medium"
        );
    }

    fn verify_contents(&mut self, volume: &Volume) {
        let handle = self.handle(volume.id);
        let mut settled = volume.contents.clone();
        for (first, count) in volume.contents.runs(COMPARED_BLOCKS) {
            // A block more on either side: what was never written must still be zeros.
            let start = first.saturating_sub(1) * 8 * SECTOR;
            let end = ((first + count + 1) * 8 * SECTOR).min(volume.size_bytes);
            let memory = self.read(&handle, start, end - start);
            compare(&volume.name, start, &memory, &volume.contents, |sector, value| settled.settle(sector, value));
        }
        self.verify_holes(volume, &handle);
        with(&self.shared, volume.id, |known| known.contents = settled);
    }

    /// Walks what the engine calls data: outside of what the model knows, it must be zeros.
    fn verify_holes(&mut self, volume: &Volume, handle: &VolumeHandle<MemoryStorage>) {
        let mut at = 0;
        while at < volume.size_bytes {
            let (asked, end) = (handle.clone(), volume.size_bytes);
            let run = self.finish(async move {
                let start = asked.seek(at, true).await.unwrap_or_else(|error| panic!("seek: {error}"))?;
                let hole = asked.seek(start, false).await.unwrap_or_else(|error| panic!("seek: {error}"));
                Some((start, hole.unwrap_or(end)))
            });
            let Some((start, end)) = run else { return };
            assert!(start >= at && end > start, "{}: data from {start} to {end}, asked at {at}", volume.name);
            let blocks = start / 4096..end.div_ceil(4096);
            if blocks.clone().any(|block| !volume.contents.is_mapped(block)) {
                assert!(!volume.accountable, "{}: data at {start}..{end} that nobody wrote", volume.name);
                assert!(end - start <= 256 << 20, "{}: a run of {} bytes of data", volume.name, end - start);
                let memory = self.read(handle, start, (end - start).min(volume.size_bytes - start));
                compare(&volume.name, start, &memory, &volume.contents, |_, _| {});
            }
            at = end;
        }
    }
}

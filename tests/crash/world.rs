//! A pool on a medium that may crash at any moment, the model beside it, and the line of its engines: each begins with
//! what a crash of the one before has left.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use async_executor::LocalExecutor;
use fastrand::Rng;
use plywood::engine::{CreateOptions, OpenOptions, Pool, VolumeHandle};
use uuid::Uuid;

use crate::image::Image;
use crate::log::Log;
use crate::medium::{Medium, Phase};
use crate::met::Met;
use crate::model::Model;
use crate::request::Request;
use crate::task::Panicked;
use crate::verify::{self, Crash, Remains, Setting, judge, log_after, observe, verify};

const MIB: u64 = 1 << 20;
/// Of as many changes that are not durable every combination is looked at now and then.
const FEW_CHANGES: u32 = 4;
/// Steps without progress after which an engine is taken to be stuck.
const PATIENCE: u32 = 20_000;

/// What the tasks of operations share.
pub struct Shared {
    pub model: RefCell<Model>,
    pub met: RefCell<Met>,
    pub in_flight: Cell<usize>,
    /// Snapshots being sealed.
    pub sealing: Cell<u64>,
    /// Volumes that one task has for itself.
    pub alone: RefCell<BTreeSet<Uuid>>,
    /// Volumes that tasks use, and how many.
    pub used: RefCell<HashMap<Uuid, usize>>,
    /// Requests whose replies have not been handed over: the front sends them again to the next engine.
    pub unanswered: RefCell<BTreeMap<u64, Request>>,
}

pub struct World {
    pub random: Rng,
    pub shared: Rc<Shared>,
    pub executor: LocalExecutor<'static>,
    pub panicked: Panicked,
    pub handles: HashMap<Uuid, VolumeHandle<Medium>>,
    pub medium: Medium,
    pub pool: Option<Pool<Medium>>,
    pub setting: Setting,
    /// Whether volumes may be so large that their trees have four levels.
    pub is_tall: bool,
    /// Whether writes are so many and large that the pool fills.
    pub is_hungry: bool,
    /// Whether the pool is nearly full from the beginning, so that what comes free is used again at once.
    pub is_tight: bool,
    /// Most volumes.
    pub most: usize,
    log: Log,
    seen: u64,
}

impl World {
    /// A new pool: small, so that it fills; or of two groups, the first of which is nearly full from the start.
    pub fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let setting = Setting {
            alignment: if random.u32(..4) == 0 { 4096 } else { 512 },
            journal_bytes: MIB,
            cache_bytes: [1 << 18, 1 << 20, 4 << 20][random.usize(..3)],
        };
        let two_groups = random.u32(..4) == 0;
        let is_tight = !two_groups && random.u32(..2) == 0;
        let size_bytes = if two_groups { 2 * MIB + MIB + 128 * MIB + 8 * MIB } else { (7 + random.u64(..14)) * MIB };
        let medium =
            Medium::new(Image::new(size_bytes).into(), random.u64(..), setting.alignment, setting.journal_bytes);
        let shared = Rc::new(Shared {
            model: RefCell::default(),
            met: RefCell::default(),
            in_flight: Cell::default(),
            sealing: Cell::default(),
            alone: RefCell::default(),
            used: RefCell::default(),
            unanswered: RefCell::default(),
        });
        let log = Log::new(random.u128(..));
        let mut world = Self {
            is_tall: random.u32(..6) == 0,
            is_hungry: !two_groups && random.u32(..8) == 0,
            is_tight,
            most: random.usize(4..14),
            random,
            shared,
            executor: LocalExecutor::new(),
            panicked: Panicked::default(),
            handles: HashMap::new(),
            medium,
            pool: None,
            setting,
            log,
            seen: 0,
        };
        let options = CreateOptions {
            uuid: Uuid::from_u128(world.random.u128(..)),
            name: "crash".to_owned(),
            size_bytes,
            journal_bytes: setting.journal_bytes,
        };
        let storage = world.medium.clone();
        world.finish(async move { Pool::create(&storage, &options).await.expect("create of the pool") });
        world.open();
        if world.random.bool() {
            // All reads are verified, those after crashes too.
            let pool = world.pool();
            world.finish(async move { pool.verify_pool_on_read(true).await.expect("a checkpoint") });
        }
        world.found_family(two_groups);
        if is_tight {
            world.fill_up();
        }
        world.shared.met.borrow_mut().worlds += 1;
        world
    }

    pub fn pool(&self) -> Pool<Medium> {
        self.pool.clone().expect("open")
    }

    /// The handle that operations on a volume use.
    pub fn handle(&mut self, uuid: Uuid) -> VolumeHandle<Medium> {
        if let Some(handle) = self.handles.get(&uuid) {
            return handle.clone();
        }
        let (id, read_only) = {
            let model = self.shared.model.borrow();
            (model.volumes[&uuid].id, model.volumes[&uuid].read_only)
        };
        let handle = self.pool().open_volume(id, read_only).unwrap_or_else(|error| panic!("open of {id}: {error}"));
        self.handles.insert(uuid, handle.clone());
        handle
    }

    fn open(&mut self) {
        let (storage, log) = (self.medium.clone(), Box::new(self.log.clone()));
        let options = OpenOptions { cache_bytes: self.setting.cache_bytes };
        let pool = self.finish(async move { Pool::open(storage, log, options).await });
        let pool = pool.unwrap_or_else(|error| panic!("the pool does not open: {error}"));
        let background = pool.clone();
        self.panicked.spawn(&self.executor, async move { background.run().await });
        self.pool = Some(pool);
    }

    /// Runs one future to its end on the scrambled medium.
    pub fn finish<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> T {
        let result: Rc<RefCell<Option<T>>> = Rc::default();
        let slot = Rc::clone(&result);
        self.panicked.spawn(&self.executor, async move {
            let value = future.await;
            *slot.borrow_mut() = Some(value);
        });
        let mut idle = 0;
        while result.borrow().is_none() {
            let before = self.medium.events();
            self.turn();
            idle = if self.medium.events() != before { 0 } else { idle + 1 };
            self.panicked.check().unwrap_or_else(|error| panic!("{error}"));
            assert!(idle < PATIENCE, "stuck");
        }
        result.take().expect("finished")
    }

    /// Lets tasks and medium go on a little.
    fn turn(&mut self) {
        let mut progress = false;
        for _ in 0..self.random.u32(1..64) {
            if !self.executor.try_tick() {
                break;
            }
            progress = true;
        }
        for _ in 0..self.random.u32(0..4) {
            progress |= self.medium.run_one();
        }
        if (!progress || self.random.u32(..200) == 0)
            && let Some(pool) = &self.pool
        {
            pool.tick();
        }
    }

    /// Operates for about `events` events of the medium, then until it is in the middle of something that few events are
    /// in the middle of. Crashes in thought at one of `every` events, more often in the beginning: what a successor does
    /// first stands on what it found.
    pub fn live(&mut self, events: u64, every: u64) -> Result<(), String> {
        const FIRST: u64 = 60;
        let begin = self.medium.events();
        let end = begin + events;
        let last = end + 400;
        let wanted: fn(&Phase) -> bool = match self.random.u32(..6) {
            0 => |phase| phase.superblock,
            1 => |phase| phase.journal,
            2 => |phase| phase.punch,
            3 => |phase| phase.flush && phase.write,
            _ => |_| true,
        };
        self.seen = begin;
        let mut idle = 0;
        while self.medium.events() < end || (self.medium.events() < last && !wanted(&self.medium.phase())) {
            if self.shared.in_flight.get() < 10 && self.random.u32(..3) == 0 {
                self.start_operation();
            }
            let before = (self.medium.events(), self.shared.in_flight.get(), self.shared.model.borrow_mut().now);
            self.turn();
            self.panicked.check()?;
            let after = (self.medium.events(), self.shared.in_flight.get(), self.shared.model.borrow_mut().now);
            // Background tasks that only look and wait again are no progress.
            idle = if before != after { 0 } else { idle + 1 };
            if idle >= PATIENCE {
                let model = self.shared.model.borrow();
                return Err(format!(
                    "stuck: {:?}; {:?}; in flight {:?}; calls {:?}; alone {:?}; {:?}; {:?}",
                    self.medium.under_way(),
                    self.pool().activity(),
                    model.flights,
                    model.controls.keys(),
                    self.shared.alone.borrow(),
                    self.pool().info(),
                    self.pool().counters()
                ));
            }
            if let Some(pool) = &self.pool
                && let Some(reason) = pool.info().poisoned
            {
                return Err(format!("the pool is poisoned: {reason}"));
            }
            let now = self.medium.events();
            while self.seen < now {
                self.seen += 1;
                let every = if self.seen < begin + FIRST { every.div_ceil(3) } else { every };
                if self.random.u64(..every) == 0 {
                    self.crash_in_thought()?;
                }
            }
        }
        Ok(())
    }

    fn crash_in_thought(&mut self) -> Result<(), String> {
        let crash = if self.random.u32(..3) == 0 { Crash::ProcessDeath } else { Crash::PowerCut };
        let mut remains = self.remains(crash);
        let mut images = vec![remains.image.clone()];
        if self.random.u32(..8) == 0 {
            images[0].damage_superblock(&mut self.random);
        } else if crash == Crash::PowerCut && self.random.u32(..24) == 0 {
            let every = self.medium.every_power_cut(FEW_CHANGES, &mut self.random);
            self.shared.met.borrow_mut().cuts_enumerated += u64::from(every.is_some());
            images = every.unwrap_or(images);
        }
        let model = self.shared.model.borrow();
        let mut met = self.shared.met.borrow_mut();
        for image in images {
            remains.image = image;
            verify(&remains, self.setting, &model, &mut self.random, &mut met)
                .map_err(|error| format!("after a {crash:?}: {error}"))?;
        }
        Ok(())
    }

    fn remains(&mut self, crash: Crash) -> Remains {
        let mut met = self.shared.met.borrow_mut();
        met.phase(self.medium.phase());
        met.in_seal += u64::from(self.shared.sealing.get() > 0);
        if let Some(pool) = &self.pool {
            met.activity(pool.activity());
        }
        let log = log_after(crash, &self.log, &mut self.random);
        let (image, lost_power) = match crash {
            Crash::PowerCut => {
                met.power_cuts += 1;
                (self.medium.power_cut(&mut self.random), true)
            }
            Crash::ProcessDeath => {
                met.deaths += 1;
                (self.medium.process_death(&mut self.random), false)
            }
        };
        let unanswered = self.shared.unanswered.borrow().clone();
        Remains { image, log, lost_power, unanswered }
    }

    /// Ends the engine by a crash, starts the next, and goes on with what it holds.
    pub fn crash(&mut self) -> Result<(), String> {
        let crash = if self.random.bool() { Crash::ProcessDeath } else { Crash::PowerCut };
        let mut remains = self.remains(crash);
        if let Some(pool) = self.pool.take() {
            self.shared.met.borrow_mut().ended(&pool);
        }
        let mut again = true;
        loop {
            // The tasks go first: they hold handles.
            self.executor = LocalExecutor::new();
            self.handles.clear();
            self.shared.in_flight.set(0);
            self.shared.sealing.set(0);
            self.shared.alone.borrow_mut().clear();
            self.shared.used.borrow_mut().clear();
            if remains.lost_power {
                // The client died too.
                self.shared.unanswered.borrow_mut().clear();
            }
            let setting = self.setting;
            self.medium =
                Medium::new(remains.image.clone(), self.random.u64(..), setting.alignment, setting.journal_bytes);
            self.log = remains.log.clone();
            self.open();
            self.shared.met.borrow_mut().opened(&self.pool());
            // Another one soon after: nothing that was found may be lost again, but what was never certain may.
            if again && self.random.bool() {
                again = false;
                for _ in 0..self.random.u32(..4) {
                    self.write_somewhere();
                }
                for _ in 0..self.random.u32(..40) {
                    self.turn();
                }
                let second = if self.random.bool() { Crash::ProcessDeath } else { Crash::PowerCut };
                let lost_power = remains.lost_power;
                remains = self.remains(second);
                remains.lost_power |= lost_power;
                self.pool = None;
                continue;
            }
            break;
        }
        let pool = self.pool();
        let committing = pool.clone();
        self.finish(async move { committing.commit().await }).map_err(|error| format!("commit: {error}"))?;
        // Reading and checking go over the medium that scrambles, with the engine's background work beside them.
        let observed = {
            let medium = self.medium.clone();
            let _turning = medium.turning();
            observe(&self.executor, &pool)?
        };
        let settled = judge(&self.shared.model.borrow(), &observed, remains.lost_power)?;
        *self.shared.model.borrow_mut() = settled;
        self.send_again();
        if self.random.bool() {
            let medium = self.medium.clone();
            let _turning = medium.turning();
            verify::check(&self.executor, &pool)?;
        }
        self.shared.met.borrow_mut().went_on += 1;
        Ok(())
    }
}

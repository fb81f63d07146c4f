//! One life of an engine: runs its futures until they end, its storage has stopped, or nothing moves any more.

use std::cell::RefCell;
use std::rc::Rc;

use async_executor::LocalExecutor;
use plywood::engine::{OpenOptions, PendingLog, Pool, PrivateLog};
use plywood::error::Error;
use plywood::units::Lsn;

use crate::storage::FuzzStorage;

/// Steps of tasks in which one call must have ended.
const STEPS_MAX: u64 = 20_000_000;
/// Seconds of an idle engine for which a call may wait.
const TICKS_MAX: u32 = 200;

/// A pending log that outlives engines.
#[derive(Clone)]
pub struct SharedLog(Rc<RefCell<PrivateLog>>);

impl SharedLog {
    /// An empty log of the life named `session`.
    pub fn new(session: u128) -> Self {
        Self(Rc::new(RefCell::new(PrivateLog::new(session))))
    }
}

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

/// The storage stopped before a call ended.
#[derive(Clone, Copy, Debug)]
pub struct Stopped;

/// A pool that is open, and its tasks.
pub struct Session {
    executor: LocalExecutor<'static>,
    storage: FuzzStorage,
    pool: Option<Pool<FuzzStorage>>,
}

impl Session {
    /// No pool yet, on `storage`.
    pub fn new(storage: &FuzzStorage) -> Self {
        Self { executor: LocalExecutor::new(), storage: storage.clone(), pool: None }
    }

    /// Opens the pool. With `background` its tasks run beside the calls from now on.
    pub fn open(&mut self, log: &SharedLog, background: bool) -> Result<Result<Pool<FuzzStorage>, Error>, Stopped> {
        let (storage, log) = (self.storage.clone(), Box::new(log.clone()));
        let options = OpenOptions { cache_bytes: 1 << 20 };
        let opened = self.run(async move { Pool::open(storage, log, options).await })?;
        if let Ok(pool) = &opened {
            if background {
                let tasks = pool.clone();
                self.executor.spawn(async move { tasks.run().await }).detach();
            }
            self.pool = Some(pool.clone());
        }
        Ok(opened)
    }

    /// Runs one call to its end.
    ///
    /// # Panics
    /// When it does not end though the storage answers.
    pub fn run<T: 'static>(&self, call: impl Future<Output = T> + 'static) -> Result<T, Stopped> {
        let outcome: Rc<RefCell<Option<T>>> = Rc::default();
        let slot = Rc::clone(&outcome);
        let task = self.executor.spawn(async move { *slot.borrow_mut() = Some(call.await) });
        let (mut steps, mut ticks) = (0, 0);
        while outcome.borrow().is_none() {
            if self.executor.try_tick() {
                steps += 1;
                assert!(steps < STEPS_MAX, "a call does not end: {:?}", self.pool.as_ref().map(Pool::info));
            } else if self.storage.has_stopped() {
                return Err(Stopped);
            } else {
                ticks += 1;
                assert!(ticks < TICKS_MAX, "a call is stuck: {:?}", self.pool.as_ref().map(Pool::info));
                if let Some(pool) = &self.pool {
                    pool.tick();
                }
            }
        }
        drop(task);
        Ok(outcome.take().expect("it has ended"))
    }

    /// Lets a second go by, and everything that can be done then be done.
    pub fn tick(&self) {
        if let Some(pool) = &self.pool {
            pool.tick();
        }
        let mut steps = 0;
        while self.executor.try_tick() {
            steps += 1;
            assert!(steps < STEPS_MAX, "the background work does not end");
        }
    }
}

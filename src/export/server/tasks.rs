//! The tasks of requests: one place for each slot, made at start, so that a request allocates nothing.
//!
//! A slot has one request at a time, so its place is free again before the next one comes. A task is polled when it is
//! started and when it was woken; each is in the queue of the woken once at most, which therefore never overflows.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};
use std::time::Instant;

use concurrent_queue::ConcurrentQueue;

/// The tasks of all slots.
pub(super) trait Tasks {
    /// Begins the request in `slot` and goes as far as it can at once.
    fn start(&self, slot: usize, begun: Instant);

    /// Goes on with every task that has been woken. Answers whether there was one.
    fn run(&self) -> bool;
}

/// The tasks that `make` makes.
pub(super) struct SlotTasks<M, F> {
    make: M,
    places: Vec<RefCell<Pin<Box<Option<F>>>>>,
    wakers: Vec<Waker>,
    states: Vec<Arc<SlotWaker>>,
    woken: Arc<ConcurrentQueue<usize>>,
}

struct SlotWaker {
    slot: usize,
    is_woken: AtomicBool,
    woken: Arc<ConcurrentQueue<usize>>,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_woken.swap(true, Ordering::AcqRel) {
            // It has room for every slot, and no slot is in it twice.
            let _ = self.woken.push(self.slot);
        }
    }
}

impl<M, F> SlotTasks<M, F>
where
    M: Fn(usize, Instant) -> F,
    F: Future<Output = ()>,
{
    pub(super) fn new(slot_count: usize, make: M) -> Self {
        let woken = Arc::new(ConcurrentQueue::bounded(slot_count.max(1)));
        let state = |slot| Arc::new(SlotWaker { slot, is_woken: AtomicBool::new(false), woken: Arc::clone(&woken) });
        let states: Vec<_> = (0..slot_count).map(state).collect();
        Self {
            make,
            places: (0..slot_count).map(|_| RefCell::new(Box::pin(None))).collect(),
            wakers: states.iter().map(|state| Waker::from(Arc::clone(state))).collect(),
            states,
            woken,
        }
    }

    /// Polls the task of a slot. One that was woken after its end is none.
    fn step(&self, slot: usize) {
        let mut place = self.places[slot].borrow_mut();
        let Some(task) = place.as_mut().as_pin_mut() else { return };
        if task.poll(&mut Context::from_waker(&self.wakers[slot])).is_ready() {
            place.set(None);
        }
    }
}

impl<M, F> Tasks for SlotTasks<M, F>
where
    M: Fn(usize, Instant) -> F,
    F: Future<Output = ()>,
{
    fn start(&self, slot: usize, begun: Instant) {
        self.places[slot].borrow_mut().set(Some((self.make)(slot, begun)));
        self.step(slot);
    }

    fn run(&self) -> bool {
        // Those that wake one another meanwhile have their turn when the driver has had its own.
        let count = self.woken.len();
        for _ in 0..count {
            let Ok(slot) = self.woken.pop() else { break };
            self.states[slot].is_woken.store(false, Ordering::Release);
            self.step(slot);
        }
        count > 0
    }
}

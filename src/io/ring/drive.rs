//! The loop of a thread that runs tasks and their I/O.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use async_executor::LocalExecutor;

use super::reactor::Reactor;
use crate::io::MemoryStorage;

/// Tasks run between two looks at the ring, so that tasks which keep waking each other cannot hold up completions.
const TICKS: usize = 256;

/// What completes operations: a ring, or a storage in memory.
pub trait Driver {
    /// Hands over what is queued, waits for a completion if `wait`, and wakes those whose operation has completed.
    ///
    /// # Errors
    /// When no operation can complete any more.
    fn advance(&self, wait: bool) -> io::Result<()>;
}

impl Driver for Reactor {
    fn advance(&self, wait: bool) -> io::Result<()> {
        if wait {
            if self.in_flight() == 0 {
                return Err(io::Error::other("every task waits, and no operation is in flight that could wake one"));
            }
            self.submit_and_wait(None)?;
        } else {
            self.submit()?;
        }
        self.reap();
        Ok(())
    }
}

impl Driver for MemoryStorage {
    fn advance(&self, wait: bool) -> io::Result<()> {
        if !self.run_one() && wait {
            return Err(io::Error::other("every task waits, and no operation is in flight that could wake one"));
        }
        Ok(())
    }
}

/// A source of work beside the driver's completions: a queue in shared memory that another process fills.
///
/// The other side is told to wake this one, through an eventfd in the ring, only while this thread sleeps. Between
/// [`prepare_sleep`](Poller::prepare_sleep) and [`woken`](Poller::woken) it must do so.
pub trait Poller {
    /// Takes work that has come, and does what can be done of it. Called between any two tasks. True when there was some.
    fn poll(&self) -> bool;

    /// The thread is about to sleep: tells the other side to wake it from now on, then looks once more. False when work
    /// has come meanwhile, and the thread must not sleep.
    fn prepare_sleep(&self) -> bool;

    /// The thread is awake, whatever woke it. Follows every `prepare_sleep`, also one that answered false.
    fn woken(&self);
}

/// No other source of work.
impl Poller for () {
    fn poll(&self) -> bool {
        false
    }

    fn prepare_sleep(&self) -> bool {
        true
    }

    fn woken(&self) {}
}

struct MainWaker(AtomicBool);

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `future` and the executor's tasks on this thread until `future` has ended. Tasks that have not are left as they
/// are, with their operations in flight.
///
/// # Errors
/// When the driver fails, or everything waits for what can never come.
pub fn block_on<T>(
    executor: &LocalExecutor<'_>,
    driver: &impl Driver,
    poller: &impl Poller,
    future: impl Future<Output = T>,
) -> io::Result<T> {
    let woken = Arc::new(MainWaker(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        let mut stalled = false;
        for _ in 0..TICKS {
            if woken.0.swap(false, Ordering::AcqRel)
                && let Poll::Ready(value) = future.as_mut().poll(&mut context)
            {
                return Ok(value);
            }
            let ran = executor.try_tick() || woken.0.load(Ordering::Acquire);
            // Each time, so that background tasks which have much to do leave requests their turn.
            if !poller.poll() && !ran {
                stalled = true;
                break;
            }
        }
        if stalled {
            let sleep = poller.prepare_sleep();
            let advanced = driver.advance(sleep);
            poller.woken();
            advanced?;
        } else {
            driver.advance(false)?;
        }
    }
}

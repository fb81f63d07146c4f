//! What wakes a thread that sleeps in its ring: an eventfd that others write, and time.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::operation::{Request, WakeupState};
use super::reactor::{Operation, Reactor};
use crate::io::IoMemory;

/// An eventfd kept posted in a ring: whoever writes to it ends the ring's wait.
///
/// Wakes are added up until they are taken, so none is lost between two waits; several may be taken as one.
pub struct Wakeup {
    state: Rc<WakeupState>,
    /// Dropping it cancels the read.
    _read: Operation,
}

impl Wakeup {
    /// Takes the wakes that came since the last time; 0 when there were none. Does not wait.
    pub fn take(&self) -> u64 {
        self.state.count.take()
    }

    /// Waits for a wake and takes all that came: answers their sum. One task at a time may wait.
    ///
    /// # Errors
    /// When the eventfd cannot be read any more.
    pub fn wait(&self) -> impl Future<Output = io::Result<u64>> {
        std::future::poll_fn(|context| match (self.take(), self.state.failed.get()) {
            (0, None) => {
                self.state.waker.set(Some(context.waker().clone()));
                Poll::Pending
            }
            (0, Some(errno)) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
            (count, _) => Poll::Ready(Ok(count)),
        })
    }
}

/// Completes when its time has passed. Dropping it takes the timer back.
#[must_use = "a timer does nothing unless it is awaited"]
pub struct Sleep(Operation);

impl Future for Sleep {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}

impl Reactor {
    /// Keeps a read of `fd`, an eventfd, posted in the ring until the answer is dropped.
    ///
    /// # Errors
    /// `InvalidInput` for a descriptor with O_NONBLOCK: the ring's read of it would fail at once instead of waiting.
    pub fn watch_eventfd(&self, fd: Rc<OwnedFd>) -> io::Result<Wakeup> {
        if rustix::fs::fcntl_getfl(&*fd)?.contains(rustix::fs::OFlags::NONBLOCK) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an eventfd to be watched must be a blocking one"));
        }
        let state = Rc::new(WakeupState::default());
        let read = self.issue(Request::Wakeup(fd, Rc::clone(&state), IoMemory::zeroed(8)));
        Ok(Wakeup { state, _read: read })
    }

    /// Completes after `duration`, measured from this call's submission. The error is the ring's, not the clock's.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep(self.issue(Request::Timeout(Box::new(duration.into()))))
    }
}

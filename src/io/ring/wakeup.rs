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

/// An eventfd polled by a ring: whoever writes to it ends the ring's wait.
///
/// One poll tells of every write; nobody reads the eventfd, and what it counts means nothing. A wake is kept until it is taken,
/// so none is lost between two waits; several may be taken as one.
pub struct Wakeup {
    state: Rc<WakeupState>,
    /// Dropping it cancels the poll.
    _poll: Operation,
}

impl Wakeup {
    /// Takes the wakes that came since the last time; false when there were none. Does not wait.
    pub fn take(&self) -> bool {
        self.state.woken.take()
    }

    /// Waits for a wake and takes all that came. One task at a time may wait.
    ///
    /// # Errors
    /// When the eventfd cannot be polled any more.
    pub fn wait(&self) -> impl Future<Output = io::Result<()>> {
        std::future::poll_fn(|context| match (self.take(), self.state.failed.get()) {
            (true, _) => Poll::Ready(Ok(())),
            (false, Some(errno)) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
            (false, None) => {
                self.state.waker.set(Some(context.waker().clone()));
                Poll::Pending
            }
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
    /// Keeps `fd`, an eventfd, polled by the ring until the answer is dropped. One that was written before counts as a wake.
    pub fn watch_eventfd(&self, fd: Rc<OwnedFd>) -> Wakeup {
        let state = Rc::new(WakeupState::default());
        let poll = self.issue(Request::Wakeup(fd, Rc::clone(&state)));
        Wakeup { state, _poll: poll }
    }

    /// Completes after `duration`, measured from this call's submission. The error is the ring's, not the clock's.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep(self.issue(Request::Timeout(Box::new(duration.into()))))
    }
}

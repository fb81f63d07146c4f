//! The ring itself: set-up, the slots of operations in flight, submission and reaping.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{EnterFlags, IoUring, Submitter, cqueue, opcode, types};
use slab::Slab;

use super::operation::{Release, Request, RingFile, Step};
use crate::io::memory::PayloadArea;

/// `user_data` of a cancellation: its own result says nothing that the cancelled operation's does not.
const CANCELLATION: u64 = u64::MAX;

/// Slots in the ring's table of registered files. More files simply are not registered.
const REGISTERED_FILES: u32 = 16;
/// Slots in the ring's table of registered buffers, a GiB each at most.
const REGISTERED_BUFFERS: u32 = 64;

/// Completions handled between two looks at the queue.
const REAP_BATCH: usize = 64;

/// Sizes of a [`Reactor`]'s queues.
#[derive(Clone, Copy, Debug)]
pub struct ReactorOptions {
    /// Entries that can wait for one submission; when more are queued they are submitted on the way.
    pub submissions: u32,
    /// Operations in flight; what exceeds it waits in memory.
    pub completions: u32,
}

impl Default for ReactorOptions {
    fn default() -> Self {
        Self { submissions: 256, completions: 2048 }
    }
}

/// An io_uring, used by the thread that made it. A clone is another handle to the same ring.
#[derive(Clone)]
pub struct Reactor {
    pub(super) inner: Rc<Inner>,
}

pub(in crate::io) struct Inner {
    ring: RefCell<IoUring>,
    state: RefCell<State>,
    /// What operations in flight may point at; unpinned by the kernel only when the ring is gone.
    areas: RefCell<Vec<Rc<PayloadArea>>>,
    buffers_registered: Cell<Option<u32>>,
    free_files: RefCell<Vec<u32>>,
    /// Whom a reap wakes; empty between two of them, kept for its memory.
    wakers: RefCell<Vec<Waker>>,
    flags: &'static str,
}

#[derive(Default)]
struct State {
    slots: Slab<Slot>,
    /// Operations whose next entry found the ring full, in order.
    backlog: VecDeque<usize>,
    /// Entries given to the ring and not reaped.
    in_ring: usize,
    limit: usize,
}

struct Slot {
    /// None once it has ended.
    request: Option<Request>,
    result: Option<io::Result<()>>,
    waker: Option<Waker>,
    attempts: u32,
    /// Nobody waits for the result: the slot goes when the operation ends.
    abandoned: bool,
    /// Its entry is in the ring, as opposed to the backlog.
    in_ring: bool,
}

impl Reactor {
    /// Makes a ring for this thread, with what the kernel offers of: one issuer, task work run only when the thread
    /// asks, submission that goes on after a bad entry.
    ///
    /// # Errors
    /// What `io_uring_setup` answers: EPERM where `kernel.io_uring_disabled` forbids it, ENOSYS where there is none.
    pub fn new(options: ReactorOptions) -> io::Result<Self> {
        let (ring, flags) = set_up(options)?;
        let files = ring.submitter().register_files_sparse(REGISTERED_FILES);
        let free_files = if files.is_ok() { (0..REGISTERED_FILES).rev().collect() } else { Vec::new() };
        let limit = ring.params().cq_entries() as usize;
        tracing::debug!(flags, limit, registered_files = files.is_ok(), "io_uring is set up");
        Ok(Self {
            inner: Rc::new(Inner {
                ring: RefCell::new(ring),
                state: RefCell::new(State { limit, ..State::default() }),
                areas: RefCell::default(),
                buffers_registered: Cell::new(None),
                free_files: RefCell::new(free_files),
                wakers: RefCell::default(),
                flags,
            }),
        })
    }

    /// The set-up flags that the kernel accepted, for `pool info`.
    pub fn flags(&self) -> &'static str {
        self.inner.flags
    }

    /// Registers the memory of payloads, so that transfers from and to them pin no pages. It stays registered, and the
    /// area alive, as long as the reactor.
    ///
    /// # Errors
    /// ENOMEM when the process may not lock that much memory (RLIMIT_MEMLOCK): payloads work all the same, only slower.
    pub fn register_payload(&self, area: &Rc<PayloadArea>) -> io::Result<()> {
        let ring = self.inner.ring.borrow();
        let first = match self.inner.buffers_registered.get() {
            Some(first) => first,
            None => {
                ring.submitter().register_buffers_sparse(REGISTERED_BUFFERS)?;
                self.inner.buffers_registered.set(Some(0));
                0
            }
        };
        let regions = area.regions();
        let next = first + regions.len() as u32;
        if next > REGISTERED_BUFFERS {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "the ring's table of registered buffers is full"));
        }
        let regions: Vec<libc::iovec> =
            regions.into_iter().map(|(base, len)| libc::iovec { iov_base: base.cast(), iov_len: len }).collect();
        // SAFETY: the regions are inside the area's mapping, which `areas` keeps until the ring has been dropped.
        unsafe { ring.submitter().register_buffers_update(first, &regions, None) }?;
        self.inner.buffers_registered.set(Some(next));
        self.inner.areas.borrow_mut().push(Rc::clone(area));
        area.set_registered(u16::try_from(first).ok());
        Ok(())
    }

    /// Operations that have not ended, polls of eventfds and timers among them.
    pub fn in_flight(&self) -> usize {
        let state = self.inner.state.borrow();
        state.in_ring + state.backlog.len()
    }

    /// Submits what is queued without waiting, and lets the kernel post completions that are ready.
    ///
    /// # Errors
    /// As [`submit_and_wait`](Self::submit_and_wait).
    pub fn submit(&self) -> io::Result<()> {
        self.inner.enter(Some(Duration::ZERO))
    }

    /// Submits what is queued and waits until something has completed, or for `timeout`.
    ///
    /// # Errors
    /// Only for what makes the ring unusable. Interruption, a timeout that ran out, and a full completion queue are no
    /// errors: reap, and call again.
    pub fn submit_and_wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.enter(timeout)
    }

    /// Takes the completions that are there and wakes those who wait for them. Answers how many there were.
    pub fn reap(&self) -> usize {
        self.inner.reap()
    }

    /// Completes when `fd` can be read (or was hung up), as poll(2) tells. Dropping the future ends the wait.
    pub fn readable(&self, fd: &Rc<OwnedFd>) -> Operation {
        self.issue(Request::Ready(Rc::clone(fd), libc::POLLIN as u32))
    }

    /// Completes when `fd` can be written to. Dropping the future ends the wait.
    pub fn writable(&self, fd: &Rc<OwnedFd>) -> Operation {
        self.issue(Request::Ready(Rc::clone(fd), libc::POLLOUT as u32))
    }

    pub(in crate::io) fn issue(&self, request: Request) -> Operation {
        Operation { kind: Kind::Issued(Rc::clone(&self.inner), self.inner.issue(request)) }
    }

    /// Gives the ring a file to work on, registered if there is room. `release` is called when its last operation has
    /// ended and its last handle is gone, before it is closed.
    pub(in crate::io) fn adopt_file(&self, fd: OwnedFd, release: Option<Release>) -> Rc<RingFile> {
        let registered = self.inner.register_file(&fd);
        Rc::new(RingFile { fd, registered, release, reactor: Rc::downgrade(&self.inner) })
    }
}

impl Inner {
    fn issue(&self, request: Request) -> usize {
        let slot =
            Slot { request: Some(request), result: None, waker: None, attempts: 0, abandoned: false, in_ring: false };
        let mut state = self.state.borrow_mut();
        let key = state.slots.insert(slot);
        self.push(&mut state, key);
        key
    }

    /// Puts the next entry of an operation into the ring, or the operation into the backlog.
    fn push(&self, state: &mut State, key: usize) {
        // Whoever waits already goes first, so that nothing starves in the backlog.
        if state.in_ring >= state.limit || !state.backlog.is_empty() {
            state.backlog.push_back(key);
            return;
        }
        if !self.push_entry(state, key) {
            state.backlog.push_back(key);
        }
    }

    fn push_entry(&self, state: &mut State, key: usize) -> bool {
        let slot = &mut state.slots[key];
        let Some(request) = &mut slot.request else { return true };
        let entry = request.entry().user_data(key as u64);
        // SAFETY: the request, which owns the memory and the file of the entry, stays in its slot until the completion
        // has been reaped; the ring's drop waits for that too.
        slot.in_ring = unsafe { self.queue(&entry) };
        state.in_ring += usize::from(slot.in_ring);
        slot.in_ring
    }

    /// Queues an entry, after submitting what is queued already when there is no room. False when there is none yet.
    ///
    /// # Safety
    /// What the entry points at stays valid until its completion has been reaped.
    unsafe fn queue(&self, entry: &Entry) -> bool {
        let mut ring = self.ring.borrow_mut();
        // SAFETY: the caller's promise.
        if unsafe { ring.submission().push(entry) }.is_ok() {
            return true;
        }
        // A refusal leaves the queue full; the entry then waits in the backlog and the next submission reports errors.
        let _ = ring.submitter().submit();
        // SAFETY: the caller's promise.
        unsafe { ring.submission().push(entry) }.is_ok()
    }

    fn push_backlog(&self, state: &mut State) {
        while state.in_ring < state.limit
            && let Some(&key) = state.backlog.front()
            && self.push_entry(state, key)
        {
            state.backlog.pop_front();
        }
    }

    fn enter(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.push_backlog(&mut self.state.borrow_mut());
        let mut ring = self.ring.borrow_mut();
        let queued = ring.submission().len() as u32;
        let submitter = ring.submitter();
        let entered = match timeout {
            None => submitter.submit_and_wait(1),
            Some(Duration::ZERO) => submit_and_look(&submitter, queued),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec))
            }
        };
        match entered.as_ref().map_err(io::Error::raw_os_error) {
            // The kernel is short of memory for requests: what is in flight frees some.
            Err(Some(libc::EAGAIN)) => std::thread::sleep(Duration::from_millis(1)),
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {}
            Err(_) => return entered.map(drop),
        }
        Ok(())
    }

    fn reap(&self) -> usize {
        let mut reaped = 0;
        let mut wakers = self.wakers.take();
        loop {
            let mut batch = [(0, 0, false); REAP_BATCH];
            let mut count = 0;
            {
                let mut ring = self.ring.borrow_mut();
                for completion in ring.completion().take(REAP_BATCH) {
                    let goes_on = cqueue::more(completion.flags());
                    batch[count] = (completion.user_data(), completion.result(), goes_on);
                    count += 1;
                }
            }
            for &(user_data, result, goes_on) in &batch[..count] {
                // The request of an ended operation is dropped here, outside every borrow: with it may go the last
                // handle of a file, which takes itself off the ring's table.
                let ended = self.complete(user_data, result, goes_on, &mut wakers);
                drop(ended);
            }
            for waker in wakers.drain(..) {
                waker.wake();
            }
            reaped += count;
            if count < REAP_BATCH {
                break;
            }
        }
        *self.wakers.borrow_mut() = wakers;
        if reaped > 0 {
            self.push_backlog(&mut self.state.borrow_mut());
        }
        reaped
    }

    /// `goes_on`: the same entry will complete once more.
    fn complete(&self, user_data: u64, result: i32, goes_on: bool, wakers: &mut Vec<Waker>) -> Option<Request> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let key = user_data as usize;
        if goes_on {
            let slot = state.slots.get_mut(key)?;
            slot.request.as_mut()?.complete(result, &mut slot.attempts, wakers);
            return None;
        }
        state.in_ring -= 1;
        if user_data == CANCELLATION {
            return None;
        }
        let slot = state.slots.get_mut(key)?;
        slot.in_ring = false;
        let step = slot.request.as_mut()?.complete(result, &mut slot.attempts, wakers);
        let end = match step {
            // A wait that was given up ends at its next completion, also when the cancellation came too late.
            Step::Again if !(slot.abandoned && slot.request.as_ref().is_some_and(Request::is_wait)) => {
                self.push(state, key);
                return None;
            }
            Step::Again => Ok(()),
            Step::Finished(end) => end,
        };
        if slot.abandoned {
            if let Err(error) = &end
                && error.raw_os_error() != Some(libc::ECANCELED)
            {
                tracing::debug!(%error, "an operation that nobody waits for failed");
            }
            return state.slots.remove(key).request;
        }
        slot.result = Some(end);
        wakers.extend(slot.waker.take());
        slot.request.take()
    }

    fn poll(&self, key: usize, context: &Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state.borrow_mut();
        let slot = &mut state.slots[key];
        if let Some(result) = slot.result.take() {
            state.slots.remove(key);
            return Poll::Ready(result);
        }
        match &mut slot.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// The operation's future is gone. A transfer goes on; a wait is cancelled.
    fn abandon(&self, key: usize) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let slot = &mut state.slots[key];
        slot.waker = None;
        slot.abandoned = true;
        let Some(request) = &slot.request else {
            state.slots.remove(key);
            return;
        };
        if !request.is_wait() {
            return;
        }
        let in_ring = slot.in_ring;
        let ended = if in_ring {
            // SAFETY: a cancellation points at nothing.
            let queued = unsafe { self.queue(&opcode::AsyncCancel::new(key as u64).build().user_data(CANCELLATION)) };
            state.in_ring += usize::from(queued);
            None
        } else {
            state.backlog.retain(|&waiting| waiting != key);
            Some(state.slots.remove(key))
        };
        drop(ended);
    }

    fn register_file(&self, fd: &OwnedFd) -> Option<u32> {
        let index = self.free_files.borrow_mut().pop()?;
        match self.ring.borrow().submitter().register_files_update(index, &[fd.as_raw_fd()]) {
            Ok(_) => Some(index),
            Err(error) => {
                tracing::debug!(%error, "cannot register a file with the ring; using its descriptor");
                self.free_files.borrow_mut().push(index);
                None
            }
        }
    }

    pub(super) fn unregister_file(&self, index: u32) {
        match self.ring.borrow().submitter().register_files_update(index, &[-1]) {
            Ok(_) => self.free_files.borrow_mut().push(index),
            // The slot is lost, not the file: the ring lets go of it at its end.
            Err(error) => tracing::warn!(%error, index, "cannot take a file off the ring"),
        }
    }
}

impl Drop for Inner {
    /// Waits for everything in flight: the kernel may still be writing the memory that goes with the slots. No future is
    /// left, since each holds the reactor; what remains was given up, and waits have been cancelled.
    fn drop(&mut self) {
        while !self.state.get_mut().slots.is_empty() {
            if let Err(error) = self.enter(Some(Duration::from_millis(100))) {
                // Freed memory that a device writes to is worse than memory that is never freed.
                tracing::error!(%error, "cannot wait for operations in flight; keeping their memory");
                std::mem::forget(std::mem::take(&mut self.state.get_mut().slots));
                return;
            }
            self.reap();
            self.cancel_waits();
        }
        for area in self.areas.get_mut() {
            area.set_registered(None);
        }
    }
}

impl Inner {
    /// Cancels again what found no room for its cancellation when it was given up.
    fn cancel_waits(&self) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        for (key, slot) in &state.slots {
            if slot.in_ring && slot.request.as_ref().is_some_and(Request::is_wait) {
                // SAFETY: a cancellation points at nothing.
                let queued =
                    unsafe { self.queue(&opcode::AsyncCancel::new(key as u64).build().user_data(CANCELLATION)) };
                state.in_ring += usize::from(queued);
            }
        }
    }
}

/// Waits for an operation in the ring. The operation goes on when this is dropped, unless it only waits for something.
#[must_use = "an operation ends unseen when its future is dropped"]
pub struct Operation {
    kind: Kind,
}

enum Kind {
    Issued(Rc<Inner>, usize),
    /// Never reached the ring.
    Ready(io::Result<()>),
    Ended,
}

impl Operation {
    /// An operation that ended before it began: refused, or with nothing to do.
    pub(in crate::io) fn ended(result: io::Result<()>) -> Self {
        Self { kind: Kind::Ready(result) }
    }
}

impl Future for Operation {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match std::mem::replace(&mut self.kind, Kind::Ended) {
            Kind::Issued(inner, key) => {
                let polled = inner.poll(key, context);
                if polled.is_pending() {
                    self.kind = Kind::Issued(inner, key);
                }
                polled
            }
            Kind::Ready(result) => Poll::Ready(result),
            Kind::Ended => panic!("an operation was polled after it had ended"),
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Kind::Issued(inner, key) = &self.kind {
            inner.abandon(*key);
        }
    }
}

/// Submits the `queued` entries of a ring with deferred task work and takes what has arrived, without waiting: asking for 0
/// events runs that work, which a plain submission does not.
///
/// # Errors
/// What `io_uring_enter` answers.
pub fn submit_and_look(submitter: &Submitter<'_>, queued: u32) -> io::Result<usize> {
    // SAFETY: there is no argument, and no more is submitted than the kernel finds in the queue.
    unsafe { submitter.enter::<libc::sigset_t>(queued, 0, EnterFlags::GETEVENTS.bits(), None) }
}

/// Sets the ring up with the best flags that this kernel knows. Each set is one that some kernel since 5.19 accepts; an
/// older one refuses a flag it does not know with EINVAL.
fn set_up(options: ReactorOptions) -> io::Result<(IoUring, &'static str)> {
    type Set = fn(&mut io_uring::Builder) -> &mut io_uring::Builder;
    let sets: [(&'static str, Set); 4] = [
        // Linux 6.6.
        ("single issuer, deferred task work, no array", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_submit_all().setup_no_sqarray()
        }),
        // Linux 6.1.
        ("single issuer, deferred task work", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_submit_all()
        }),
        // Linux 5.19.
        ("cooperative task work", |builder| builder.setup_coop_taskrun().setup_submit_all()),
        ("none", |builder| builder),
    ];
    let mut refused = None;
    for (name, set) in sets {
        let mut builder = IoUring::builder();
        set(builder.setup_clamp().setup_cqsize(options.completions).dontfork());
        match builder.build(options.submissions) {
            Ok(ring) => return Ok((ring, name)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

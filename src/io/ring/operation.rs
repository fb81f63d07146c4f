//! What an operation consists of: the entries it puts into the ring one after the other, and what it makes of each
//! result.
//!
//! Nothing here touches the ring, so that retries and short transfers can be tested with made-up results. A request owns
//! everything that the kernel uses while it is in flight.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::task::Waker;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

use super::punch::Punch;
use super::reactor::Inner;
use crate::engine::Memory;
use crate::io::IoMemory;

/// Most bytes in one entry: a length is 32 bits wide, and the kernel itself stops at 2 GiB less a page.
const MAX_TRANSFER_BYTES: usize = 1 << 30;

/// How often one entry is tried again at EINTR or EAGAIN before that becomes the operation's error: a bound, so that a
/// host that never recovers does not keep the thread busy for ever.
const MAX_ATTEMPTS: u32 = 1000;

/// What is done with a file before it is closed.
pub(in crate::io) type Release = Box<dyn FnOnce(BorrowedFd<'_>)>;

/// A file as the ring knows it: a registered one spares the kernel taking and dropping a reference at each operation.
pub(in crate::io) struct RingFile {
    pub(super) fd: OwnedFd,
    pub(super) registered: Option<u32>,
    pub(super) release: Option<Release>,
    pub(super) reactor: Weak<Inner>,
}

impl RingFile {
    pub(in crate::io) fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for RingFile {
    fn drop(&mut self) {
        // Every operation on the file holds it, so none is left.
        if let Some(release) = self.release.take() {
            release(self.fd.as_fd());
        }
        if let (Some(index), Some(reactor)) = (self.registered, self.reactor.upgrade()) {
            reactor.unregister_file(index);
        }
    }
}

/// Builds the entry for a file: a registered one by its index, another by its descriptor.
macro_rules! for_file {
    ($file:expr, |$target:ident| $build:expr) => {
        match $file.registered {
            Some(index) => {
                let $target = types::Fixed(index);
                $build
            }
            None => {
                let $target = types::Fd($file.fd.as_raw_fd());
                $build
            }
        }
    };
}

/// A read or write at an offset of a file.
pub(in crate::io) struct Transfer {
    pub file: Rc<RingFile>,
    pub offset: u64,
    pub memory: IoMemory,
    pub write: bool,
    /// `RWF_DSYNC`, or 0.
    pub flags: i32,
    /// Bytes transferred so far.
    pub done: usize,
    /// What the host's direct I/O is aligned to, in bytes.
    pub alignment: usize,
}

/// An operation, with all that it owns.
pub(in crate::io) enum Request {
    Transfer(Transfer),
    /// fdatasync.
    Sync(Rc<RingFile>),
    /// fallocate with FALLOC_FL_PUNCH_HOLE.
    Punch(Punch),
    /// fallocate of the whole range if `allocate`, then zeros from `position` on, a buffer at a time; none when `position` is
    /// the end, unless the host cannot allocate ahead.
    Extend {
        file: Rc<RingFile>,
        range: Range<u64>,
        position: u64,
        allocate: bool,
        zeros: IoMemory,
    },
    Timeout(Box<types::Timespec>),
    /// Waits for `events` of poll(2).
    Ready(Rc<OwnedFd>, u32),
    /// Polls an eventfd, again and again: one entry with many completions.
    Wakeup(Rc<OwnedFd>, Rc<WakeupState>),
}

/// What a poll of an eventfd has seen.
#[derive(Default)]
pub(in crate::io) struct WakeupState {
    pub woken: Cell<bool>,
    pub waker: Cell<Option<Waker>>,
    /// Set when the poll ended for good.
    pub failed: Cell<Option<i32>>,
}

/// What follows from a result.
#[derive(Debug)]
pub(super) enum Step {
    /// The next entry of the operation, or the same one again.
    Again,
    Finished(io::Result<()>),
}

impl Request {
    /// The next entry. Its pointers are valid as long as the request lives, wherever it is moved.
    pub(super) fn entry(&mut self) -> Entry {
        match self {
            Self::Transfer(transfer) => transfer.entry(),
            Self::Sync(file) => {
                for_file!(file, |target| opcode::Fsync::new(target).flags(types::FsyncFlags::DATASYNC).build())
            }
            Self::Punch(punch) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let piece = punch.piece();
                let len = piece.end - piece.start;
                for_file!(punch.file, |target| fallocate(opcode::Fallocate::new(target, len), &piece, mode))
            }
            Self::Extend { file, range, allocate: true, .. } => {
                for_file!(file, |target| fallocate(opcode::Fallocate::new(target, range.end - range.start), range, 0))
            }
            Self::Extend { file, range, position, zeros, .. } => {
                let len = (range.end - *position).min(zeros.len() as u64) as u32;
                let bytes = zeros.as_ptr().cast_const();
                for_file!(file, |target| opcode::Write::new(target, bytes, len).offset(*position).build())
            }
            Self::Timeout(timespec) => opcode::Timeout::new(&raw const **timespec).build(),
            Self::Ready(fd, events) => opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), *events).build(),
            Self::Wakeup(fd, _) => {
                opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).multi(true).build()
            }
        }
    }

    /// Takes the result of an entry: a count, or an errno with its sign changed. Counts tries in `attempts`; a waker that
    /// is to be woken goes into `wakers`.
    pub(super) fn complete(&mut self, result: i32, attempts: &mut u32, wakers: &mut Vec<Waker>) -> Step {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            *attempts += 1;
            if *attempts < MAX_ATTEMPTS {
                return Step::Again;
            }
        } else {
            *attempts = 0;
        }
        match self {
            Self::Transfer(transfer) => transfer.complete(result),
            Self::Timeout(_) if result == -libc::ETIME => Step::Finished(Ok(())),
            Self::Punch(punch) => punch.complete(result),
            Self::Sync(_) | Self::Timeout(_) | Self::Ready(..) => Step::Finished(check(result)),
            Self::Extend { allocate: allocate @ true, range, position, .. } => match -result {
                0 if *position < range.end => {
                    *allocate = false;
                    Step::Again
                }
                // Where the host cannot allocate ahead, writing the zeros does it.
                libc::EOPNOTSUPP if !range.is_empty() => {
                    *allocate = false;
                    *position = range.start;
                    Step::Again
                }
                _ => Step::Finished(check(result)),
            },
            Self::Extend { range, position, .. } => match check(result) {
                Ok(()) if result == 0 => Step::Finished(Err(io::ErrorKind::WriteZero.into())),
                Ok(()) => {
                    *position += u64::from(result.unsigned_abs());
                    if *position < range.end { Step::Again } else { Step::Finished(Ok(())) }
                }
                failed => Step::Finished(failed),
            },
            Self::Wakeup(_, state) => {
                let step = match check(result) {
                    Ok(()) => {
                        state.woken.set(true);
                        Step::Again
                    }
                    failed => {
                        state.failed.set(Some(-result));
                        Step::Finished(failed)
                    }
                };
                wakers.extend(state.waker.take());
                step
            }
        }
    }

    /// Whether the operation is to end when nobody waits for it any more, because it may never end by itself.
    pub(super) fn is_wait(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::Ready(..) | Self::Wakeup(..))
    }
}

fn fallocate(call: opcode::Fallocate, range: &Range<u64>, mode: i32) -> Entry {
    call.offset(range.start).mode(mode).build()
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

impl Transfer {
    fn entry(&self) -> Entry {
        let len = (self.memory.len() - self.done).min(MAX_TRANSFER_BYTES);
        let rest = self.memory.slice(self.done..self.done + len);
        let (address, len, offset) = (rest.as_ptr(), len as u32, self.offset + self.done as u64);
        match (self.write, rest.registered_index()) {
            (false, None) => for_file!(self.file, |target| opcode::Read::new(target, address, len)
                .offset(offset)
                .rw_flags(self.flags)
                .build()),
            (false, Some(index)) => for_file!(self.file, |target| opcode::ReadFixed::new(target, address, len, index)
                .offset(offset)
                .rw_flags(self.flags)
                .build()),
            (true, None) => for_file!(self.file, |target| opcode::Write::new(target, address, len)
                .offset(offset)
                .rw_flags(self.flags)
                .build()),
            (true, Some(index)) => for_file!(self.file, |target| opcode::WriteFixed::new(target, address, len, index)
                .offset(offset)
                .rw_flags(self.flags)
                .build()),
        }
    }

    fn complete(&mut self, result: i32) -> Step {
        if let Err(error) = check(result) {
            return Step::Finished(Err(error));
        }
        self.done += result.unsigned_abs() as usize;
        if self.done >= self.memory.len() {
            return Step::Finished(Ok(()));
        }
        // What is left cannot be aligned after a transfer that ended inside a sector: that is a file which ends there.
        if result == 0 || !self.done.is_multiple_of(self.alignment) {
            let end = self.offset + self.done as u64;
            let error = if self.write {
                io::Error::new(io::ErrorKind::WriteZero, format!("the host stopped writing at offset {end}"))
            } else {
                io::Error::new(io::ErrorKind::UnexpectedEof, format!("the file ends at offset {end}"))
            };
            return Step::Finished(Err(error));
        }
        Step::Again
    }
}

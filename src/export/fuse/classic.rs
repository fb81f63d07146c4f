//! The classic transport of the front: read and write on /dev/fuse, for kernels without FUSE over io_uring.
//!
//! Two threads a queue. The reader takes a free entry and reads a request into it; the three pieces of its buffer are
//! chosen so that the data of a WRITE lands page-aligned in the payload. The other thread sleeps until the engine has
//! answered and writes the answers. Each queue has a descriptor of its own (`FUSE_DEV_IOC_CLONE`), because the kernel
//! looks for the request of an answer among those that were read from the same one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::abi::{DEV_IOC_CLONE, InHeader, OutHeader, opcode};
use crate::error::{Error, Result};
use crate::export::shared::{Answer, FrontQueue};

/// One queue of the transport, shared by its two threads.
pub(super) struct StreamQueue {
    front: FrontQueue,
    fuse: OwnedFd,
    /// By entry: the kernel's name of the request in it. Private, so that no engine can damage it.
    uniques: Box<[AtomicU64]>,
    free: Mutex<Vec<u32>>,
    freed: Condvar,
    ended: AtomicBool,
}

/// Another descriptor of the session that `fuse` serves.
fn joined(fuse: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let session = u32::try_from(fuse.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: the ioctl reads one u32, which lives through the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), DEV_IOC_CLONE, &raw const session) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device.into())
}

impl StreamQueue {
    pub(super) fn new(front: FrontQueue, fuse: BorrowedFd<'_>) -> Result<Self> {
        let fuse = joined(fuse).map_err(|error| Error::io("joining a queue to the FUSE session", error))?;
        let uniques = (0..front.depth()).map(|_| AtomicU64::new(0)).collect();
        let free = Mutex::new((0..front.depth()).rev().collect());
        Ok(Self { front, fuse, uniques, free, freed: Condvar::new(), ended: AtomicBool::new(false) })
    }

    fn take_free(&self) -> u32 {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(entry) = free.pop() {
                return entry;
            }
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, entry: u32) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        self.freed.notify_one();
    }

    /// The reader's thread: until the session ends.
    pub(super) fn read_requests(&self) {
        let mut entry = self.take_free();
        loop {
            match self.read_request(entry) {
                Ok(true) => entry = self.take_free(),
                Ok(false) => {}
                // ENOENT: the request was withdrawn while it was read.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => {}
                Err(error) => {
                    if error.raw_os_error() != Some(libc::ENODEV) {
                        super::give_out(self.front.queue(), &error);
                    }
                    break;
                }
            }
        }
        self.ended.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(self.front.doorbell(), &1_u64.to_ne_bytes());
    }

    /// Reads one request. True when it was handed to the engine and the entry is taken.
    fn read_request(&self, entry: u32) -> io::Result<bool> {
        const HEADER: usize = size_of::<InHeader>();
        let header = self.front.header_pointer(entry);
        let segment = |start: *mut u8, len| libc::iovec { iov_base: start.cast(), iov_len: len };
        let segments = [
            segment(header, HEADER),
            segment(header.wrapping_add(128), 40),
            segment(self.front.payload_pointer(entry), self.front.payload_bytes()),
        ];
        // SAFETY: the segments lie inside the entry's header (288 bytes) and payload, which live in shared memory and
        // belong to this thread while the entry is not sent.
        let len = unsafe { libc::readv(self.fuse.as_raw_fd(), segments.as_ptr(), 3) };
        let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
        if len < HEADER {
            return Err(io::Error::other("a FUSE request is cut short"));
        }
        let mut bytes = [0; HEADER];
        self.front.read_header(entry, 0, &mut bytes);
        let header: InHeader = bytemuck::pod_read_unaligned(&bytes);
        // These have no answer; an INTERRUPT may be ignored, since the request it is about gets its answer.
        if matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
            return Ok(false);
        }
        self.front.arrange_stream(entry, len - HEADER, header.opcode == opcode::WRITE);
        self.uniques[entry as usize].store(header.unique, Ordering::Release);
        self.front.send(entry);
        self.front.ring();
        Ok(true)
    }

    /// The other thread: writes answers until the session ends.
    pub(super) fn write_answers(&self) {
        let mut count = [0; 8];
        while !self.ended.load(Ordering::SeqCst) {
            self.front.take_answers(|answer| {
                self.write_answer(&answer);
                self.give_back(answer.entry);
            });
            if self.front.prepare_sleep() {
                let _ = rustix::io::read(self.front.doorbell(), &mut count);
            }
            self.front.awake();
        }
    }

    fn write_answer(&self, answer: &Answer) {
        let (start, len) = if answer.inline_len > 0 {
            (self.front.inline_pointer(answer.entry), answer.inline_len)
        } else {
            (self.front.payload_pointer(answer.entry), answer.payload_len)
        };
        let unique = self.uniques[answer.entry as usize].load(Ordering::Acquire);
        let mut header = OutHeader { len: 16 + len as u32, error: answer.error, unique };
        let segments = [
            libc::iovec { iov_base: (&raw mut header).cast(), iov_len: 16 },
            libc::iovec { iov_base: start.cast(), iov_len: len },
        ];
        // SAFETY: the header lives through the call; the reply lies inside the entry's slot or payload.
        let written = unsafe { libc::writev(self.fuse.as_raw_fd(), segments.as_ptr(), 2) };
        if written < 0 {
            let error = io::Error::last_os_error();
            // ENOENT: nobody waits any more. ENODEV: the session has ended.
            if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) {
                tracing::error!(queue = self.front.queue(), %error, "an answer was refused");
            }
        }
    }
}

/// Beside the rings, FORGET and INTERRUPT still come through /dev/fuse: they are read and need no answer. Anything else
/// there means that the kernel has left the rings, which it does for a session that is ending.
pub(super) fn drain(fuse: &File, transfer_bytes: usize) {
    // The kernel wants room for the largest request, although none of that size comes here.
    let mut buffer = vec![0; transfer_bytes + super::abi::LEAST_READ_BUFFER];
    loop {
        match rustix::io::read(fuse.as_fd(), &mut buffer) {
            Ok(len) if len >= 40 => {
                let header: InHeader = bytemuck::pod_read_unaligned(&buffer[..40]);
                if !matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
                    let answer = OutHeader { len: 16, error: -libc::EIO, unique: header.unique };
                    let _ = rustix::io::write(fuse.as_fd(), bytemuck::bytes_of(&answer));
                    tracing::warn!(opcode = header.opcode, "request outside the rings refused");
                }
            }
            Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN | rustix::io::Errno::NOENT) => {}
            Err(error) => {
                if error != rustix::io::Errno::NODEV {
                    tracing::error!(%error, "reading /dev/fuse");
                }
                break;
            }
        }
    }
}

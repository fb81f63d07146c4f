//! The io_uring transport of the front: one ring and one thread for each possible processor (kernel 6.14).
//!
//! An entry is registered once with its header and payload, both in shared memory. The kernel completes its command when
//! it has put a request in; [`COMMIT_AND_FETCH`](ring_command::COMMIT_AND_FETCH) answers that and waits for the next. The
//! copies of data between the kernel's pages and the payload run on the queue's thread. The engine wakes the thread
//! through an eventfd that is polled in the same ring, so there is one place to sleep. Nobody reads it: each write is told
//! by the poll, whatever the eventfd's count.
//!
//! Nothing is allocated once a queue runs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::SyncSender;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode as ring_opcode, types};

use super::abi::{InHeader, OutHeader, RING_IN_OUT, RingCommand, RingInOut, ring_command};
use crate::error::{Error, Result};
use crate::export::shared::{Answer, FrontQueue, HEADER_BYTES};
use crate::io::submit_and_look;

/// user_data of the poll of the doorbell.
const DOORBELL: u64 = u64::MAX;
/// Registered files.
const FUSE_FILE: types::Fixed = types::Fixed(0);
const DOORBELL_FILE: types::Fixed = types::Fixed(1);

/// Ring with entries of 128 bytes.
pub(super) type WideRing = IoUring<Entry128, cqueue::Entry>;

/// Makes a ring for `entries` commands in flight, for whichever thread enables it ([`enable`]): what the kernel does for a
/// request in that thread is done when the thread enters the kernel for it, without an interrupt of its own. (A kernel that
/// has FUSE over io_uring has these flags, of 6.1.)
pub(super) fn wide_ring(entries: u32) -> io::Result<WideRing> {
    WideRing::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_r_disabled()
        .setup_cqsize(entries.next_power_of_two() * 4)
        .build(entries.next_power_of_two() * 2)
}

/// Gives a ring to the calling thread.
pub(super) fn enable(ring: &WideRing) -> io::Result<()> {
    ring.submitter().register_enable_rings()
}

/// Submits what is queued and takes what has arrived, without waiting.
fn look(ring: &mut WideRing) -> io::Result<()> {
    let queued = ring.submission().len() as u32;
    submit_and_look(&ring.submitter(), queued).map(drop)
}

/// Takes a completion; the ring is free to be used again before the next.
pub(super) fn next_completion(ring: &mut WideRing) -> Option<cqueue::Entry> {
    ring.completion().next()
}

/// A FUSE command of entry `entry` of queue `queue`.
pub(super) fn command(queue: u16, entry: u64, command: u32, commit_id: u64) -> Entry128 {
    let mut area = [0; 80];
    let fields = RingCommand { qid: queue, commit_id, ..RingCommand::default() };
    area[..size_of::<RingCommand>()].copy_from_slice(bytemuck::bytes_of(&fields));
    ring_opcode::UringCmd80::new(FUSE_FILE, command).cmd(area).build().user_data(entry)
}

/// A REGISTER command: `segments` are read while it is submitted.
pub(super) fn register_command(queue: u16, entry: u64, segments: &[libc::iovec; 2]) -> Entry128 {
    const LEN: usize = 24;
    const _: () = assert!(size_of::<Entry128>() == 128);
    let mut area = [0; 80];
    let fields = RingCommand { qid: queue, ..RingCommand::default() };
    area[..size_of::<RingCommand>()].copy_from_slice(bytemuck::bytes_of(&fields));
    let address = std::ptr::from_ref(segments) as u64;
    let mut built = ring_opcode::UringCmd80::new(FUSE_FILE, ring_command::REGISTER)
        .cmd(area)
        .addr(Some(address))
        .build()
        .user_data(entry);
    // SAFETY: the entry is the kernel's struct io_uring_sqe of 128 bytes (asserted above), whose `len` is the u32 at byte
    // 24; the crate has no setter for it on commands, and REGISTER wants the number of segments there.
    unsafe { (&raw mut built).cast::<u8>().add(LEN).cast::<u32>().write(2) };
    built
}

/// What the front remembers of an entry; private, so that no engine can damage it.
#[derive(Clone, Copy, Default)]
struct Fetched {
    commit_id: u64,
    unique: u64,
    registered: bool,
}

/// One queue of the transport, ready to run on its thread.
pub(super) struct RingQueue {
    /// First, so that it is gone before what its commands point to.
    ring: WideRing,
    front: FrontQueue,
    segments: Box<[[libc::iovec; 2]]>,
    fetched: Box<[Fetched]>,
}

// SAFETY: the addresses in `segments` point into shared memory that `front` keeps mapped, and are not tied to a thread.
unsafe impl Send for RingQueue {}

impl RingQueue {
    /// Prepares the ring. Done before INIT is answered: a promise of rings that cannot be kept blocks every user.
    pub(super) fn new(front: FrontQueue, fuse: BorrowedFd<'_>) -> Result<Self> {
        let failed = |error| Error::io("preparing a ring for FUSE", error);
        // One more for the doorbell.
        let ring = wide_ring(front.depth() + 1).map_err(failed)?;
        ring.submitter().register_files(&[fuse.as_raw_fd(), front.doorbell().as_raw_fd()]).map_err(failed)?;
        let segment = |start: *mut u8, len| libc::iovec { iov_base: start.cast(), iov_len: len };
        let segments = (0..front.depth()).map(|entry| {
            [
                segment(front.header_pointer(entry), HEADER_BYTES),
                segment(front.payload_pointer(entry), front.payload_bytes()),
            ]
        });
        let segments = segments.collect();
        let fetched = vec![Fetched::default(); front.depth() as usize].into();
        Ok(Self { ring, front, segments, fetched })
    }

    /// Registers all entries, says on `ready` how that went, and serves until the session ends.
    pub(super) fn run(mut self, ready: &SyncSender<io::Result<()>>) {
        let registered = enable(&self.ring).and_then(|()| self.register());
        let failed = registered.is_err();
        let _ = ready.send(registered);
        if failed {
            return;
        }
        if let Err(error) = self.serve() {
            super::give_out(self.front.queue(), &error);
        }
    }

    fn qid(&self) -> u16 {
        self.front.queue() as u16
    }

    fn push(&mut self, entry: &Entry128) -> io::Result<()> {
        // SAFETY: what the entry points to (headers, payloads, segments) lives as long as the ring does.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    fn push_doorbell(&mut self) -> io::Result<()> {
        let poll =
            ring_opcode::PollAdd::new(DOORBELL_FILE, libc::POLLIN as u32).multi(true).build().user_data(DOORBELL);
        self.push(&Entry128::from(poll))
    }

    /// The poll goes on by itself, as a rule.
    fn rung(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        if cqueue::more(completion.flags()) { Ok(()) } else { self.push_doorbell() }
    }

    fn push_register(&mut self, entry: u32) -> io::Result<()> {
        let command = register_command(self.qid(), u64::from(entry), &self.segments[entry as usize]);
        self.push(&command)
    }

    fn register(&mut self) -> io::Result<()> {
        self.push_doorbell()?;
        for entry in 0..self.front.depth() {
            self.push_register(entry)?;
        }
        // A REGISTER that is refused completes while it is submitted; one that is taken stays in flight. EAGAIN: the
        // kernel has not finished with the answer to INIT.
        for _ in 0..1000 {
            look(&mut self.ring)?;
            let mut again = false;
            while let Some(completion) = next_completion(&mut self.ring) {
                match (completion.user_data(), completion.result()) {
                    (DOORBELL, _) => self.rung(&completion)?,
                    (entry, result) if result == -libc::EAGAIN || result == -libc::EINTR => {
                        again = true;
                        self.push_register(entry as u32)?;
                    }
                    (_, 0) => return Err(io::Error::other("a request came before all queues were ready")),
                    (_, result) => return Err(io::Error::from_raw_os_error(-result)),
                }
            }
            if !again {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            self.answer_all()?;
            let sleep = self.front.prepare_sleep();
            let entered = if sleep { self.ring.submit_and_wait(1).map(drop) } else { look(&mut self.ring) };
            self.front.awake();
            match entered {
                Ok(()) => {}
                // EBUSY and EAGAIN: completions must be taken before more can be submitted.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
                Err(error) => return Err(error),
            }
            if self.take_completions()?.is_break() {
                return Ok(());
            }
        }
    }

    fn answer_all(&mut self) -> io::Result<()> {
        let Self { front, ring, fetched, .. } = self;
        let mut result = Ok(());
        front.take_answers(|answer| {
            if result.is_ok() {
                result = commit(front, ring, &fetched[answer.entry as usize], &answer);
            }
        });
        result
    }

    /// Break when the session has ended.
    fn take_completions(&mut self) -> io::Result<std::ops::ControlFlow<()>> {
        let mut sent = false;
        let mut ended = false;
        while let Some(completion) = next_completion(&mut self.ring) {
            let (entry, result) = (completion.user_data(), completion.result());
            if entry == DOORBELL {
                self.rung(&completion)?;
                continue;
            }
            let entry = entry as u32;
            match -result {
                0 => {
                    self.fetch(entry);
                    sent = true;
                }
                libc::EAGAIN | libc::EINTR if !self.fetched[entry as usize].registered => self.push_register(entry)?,
                libc::EAGAIN | libc::EINTR => {
                    let commit_id = self.fetched[entry as usize].commit_id;
                    let again = command(self.qid(), u64::from(entry), ring_command::COMMIT_AND_FETCH, commit_id);
                    self.push(&again)?;
                }
                libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED => ended = true,
                // The kernel gave up this entry: the queue goes on with one less.
                errno => tracing::error!(queue = self.front.queue(), entry, errno, "FUSE entry lost"),
            }
        }
        if sent {
            self.front.ring();
        }
        Ok(if ended { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) })
    }

    /// A request has arrived in this entry.
    fn fetch(&mut self, entry: u32) {
        let mut header = [0; size_of::<InHeader>()];
        let mut in_out = [0; size_of::<RingInOut>()];
        self.front.read_header(entry, 0, &mut header);
        self.front.read_header(entry, RING_IN_OUT, &mut in_out);
        let header: InHeader = bytemuck::pod_read_unaligned(&header);
        let in_out: RingInOut = bytemuck::pod_read_unaligned(&in_out);
        self.fetched[entry as usize] = Fetched { commit_id: in_out.commit_id, unique: header.unique, registered: true };
        self.front.send(entry);
    }
}

/// Gives an answer to the kernel.
fn commit(front: &FrontQueue, ring: &mut WideRing, fetched: &Fetched, answer: &Answer) -> io::Result<()> {
    let payload_len = if answer.inline_len > 0 {
        front.inline_to_payload(answer);
        answer.inline_len
    } else {
        answer.payload_len
    } as u32;
    let header = OutHeader { len: 16 + payload_len, error: answer.error, unique: fetched.unique };
    front.write_header(answer.entry, 0, bytemuck::bytes_of(&header));
    let in_out = RingInOut { commit_id: fetched.commit_id, payload_sz: payload_len, ..RingInOut::default() };
    front.write_header(answer.entry, RING_IN_OUT, bytemuck::bytes_of(&in_out));
    let commit =
        command(front.queue() as u16, u64::from(answer.entry), ring_command::COMMIT_AND_FETCH, fetched.commit_id);
    // SAFETY: the command points to nothing; the entry's header and payload were given at REGISTER and live.
    while unsafe { ring.submission().push(&commit) }.is_err() {
        ring.submit()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_command_has_the_kernels_layout() {
        let segments = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2];
        let entry = register_command(3, 17, &segments);
        // SAFETY: Entry128 is plain data of 128 bytes.
        let bytes: [u8; 128] = unsafe { std::mem::transmute(entry) };
        assert_eq!(bytes[0], 46);
        assert_eq!(bytes[8..12], 1_u32.to_ne_bytes());
        assert_eq!(bytes[16..24], (segments.as_ptr() as u64).to_ne_bytes());
        assert_eq!(bytes[24..28], 2_u32.to_ne_bytes());
        assert_eq!(bytes[32..40], 17_u64.to_ne_bytes());
        assert_eq!(bytes[64..66], 3_u16.to_ne_bytes());
    }

    #[test]
    fn commit_command_echoes_the_commit_id() {
        // SAFETY: as above.
        let bytes: [u8; 128] =
            unsafe { std::mem::transmute(command(1, 2, ring_command::COMMIT_AND_FETCH, 0x1122_3344)) };
        assert_eq!(bytes[8..12], 2_u32.to_ne_bytes());
        assert_eq!(bytes[24..28], [0; 4]);
        assert_eq!(bytes[56..64], 0x1122_3344_u64.to_ne_bytes());
    }
}

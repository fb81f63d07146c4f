//! Whether this kernel's FUSE over io_uring keeps many background requests under way.
//!
//! Kernels before April 2026 ("fuse: fix io-uring background queue dispatch on request completion") could fall to one at a
//! time, and all that a loop device reads and writes is background requests. No version number tells, since the fix went
//! into stable series. So it is tried: a scratch file system of one file, 32 parallel asynchronous O_DIRECT reads of it,
//! which are held back until no more come. Allowing 16 at a time makes several waves, so that the way in which the
//! kernel refills after completions is seen as well.

use std::ffi::c_long;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};

use super::abi::{
    Attr, AttrOut, EntryOut, InHeader, OpenOut, OutHeader, RING_IN_OUT, ROOT_ID, RingInOut, opcode, open_flag,
    ring_command,
};
use super::init::Wishes;
use super::mount::Mount;
use super::session::{answer_offer, read_offer};
use super::uring::{WideRing, command, enable, next_completion, register_command, wide_ring};
use crate::error::{Error, Result};
use crate::export::shared::{HEADER_BYTES, possible_processors};
use crate::io::{IoMemory, Mapping};

/// Reads in all, and how many the kernel may have under way.
const READS: u32 = 32;
const AT_A_TIME: u16 = 16;
/// No more requests are expected after this long.
const QUIET: Duration = Duration::from_millis(200);
const DEADLINE: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 4096;
/// The kernel wants this much room at least.
const PAYLOAD: usize = 8192;
const SLOT: usize = PAYLOAD + 4096;

/// How many background requests were under way in the worst wave. The directory is made, mounted on, and removed.
///
/// # Errors
/// When the transport does not work at all.
pub(super) fn background_depth(directory: &Path) -> Result<u32> {
    let processor = rustix::thread::sched_getcpu();
    let mut scratch = Scratch::start(directory, processor)?;
    let file = directory.join("scratch");
    let submitter = std::thread::spawn(move || read_all(&file, processor));
    let depth = scratch.serve();
    // Ends the session, and with it the other thread's reads, also when they hang.
    drop(scratch);
    let read = submitter.join().unwrap_or_else(|_| Err(io::Error::other("the reading thread died")));
    let _ = std::fs::remove_dir(directory);
    let failed = |error| Error::io("self-test of FUSE over io_uring", error);
    let depth = depth.map_err(failed)?;
    read.map_err(failed)?;
    tracing::debug!(depth, "self-test of FUSE over io_uring");
    Ok(depth)
}

/// A scratch session, served by one ring on one thread.
struct Scratch {
    ring: WideRing,
    /// By entry: queue.
    entries: Vec<u16>,
    memory: Mapping,
    _mount: Mount,
}

impl Scratch {
    fn start(directory: &Path, processor: usize) -> Result<Self> {
        let failed = |error| Error::io("preparing the self-test of FUSE over io_uring", error);
        let queues = possible_processors()?.len();
        let entries_of = |queue: usize| if queue == processor { READS as usize + 4 } else { 2 };
        let entries: Vec<u16> = (0..queues).flat_map(|queue| vec![queue as u16; entries_of(queue)]).collect();
        let memory = Mapping::anonymous(entries.len() * SLOT).map_err(failed)?;
        let mount = Mount::new("plywood:self-test", directory, READ_BYTES)?;
        let offer = read_offer(mount.fuse())?;
        if !offer.has_io_uring() {
            return Err(Error::Incompatible("this kernel does not offer FUSE over io_uring".into()));
        }
        let ring = wide_ring(entries.len() as u32).map_err(failed)?;
        enable(&ring).map_err(failed)?;
        ring.submitter().register_files(&[mount.fuse().as_raw_fd()]).map_err(failed)?;
        let wishes = Wishes { transfer_bytes: READ_BYTES, max_background: AT_A_TIME, over_io_uring: true };
        answer_offer(mount.fuse(), &offer, &wishes)?;
        let mut scratch = Self { ring, entries, memory, _mount: mount };
        scratch.register().map_err(failed)?;
        Ok(scratch)
    }

    fn register(&mut self) -> io::Result<()> {
        for entry in 0..self.entries.len() {
            let start = self.memory.as_ptr().wrapping_add(entry * SLOT);
            let segments = [
                libc::iovec { iov_base: start.cast(), iov_len: HEADER_BYTES },
                libc::iovec { iov_base: start.wrapping_add(4096).cast(), iov_len: PAYLOAD },
            ];
            // Submitted at once: the segments are read while that happens.
            let command = register_command(self.entries[entry], entry as u64, &segments);
            // SAFETY: the segments live through the submission; what they point to lives as long as the ring.
            unsafe { self.ring.submission().push(&command) }.map_err(io::Error::other)?;
            self.ring.submit()?;
        }
        Ok(())
    }

    /// Serves until all reads are answered; how many were under way in the worst wave.
    fn serve(&mut self) -> io::Result<u32> {
        let started = Instant::now();
        let (mut held, mut answered, mut worst) = (Vec::new(), 0, READS);
        while answered < READS {
            if started.elapsed() > DEADLINE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let expected = (READS - answered).min(u32::from(AT_A_TIME)) as usize;
            let quiet = !self.wait()?;
            while let Some(completion) = next_completion(&mut self.ring) {
                if completion.result() < 0 {
                    return Err(io::Error::from_raw_os_error(-completion.result()));
                }
                let entry = completion.user_data() as usize;
                let header: InHeader = self.memory.read_value(entry * SLOT);
                if header.opcode == opcode::READ {
                    held.push(entry);
                } else {
                    self.answer_other(entry, &header)?;
                }
            }
            if held.len() >= expected || (quiet && !held.is_empty()) {
                worst = worst.min(held.len() as u32);
                answered += held.len() as u32;
                for entry in held.drain(..) {
                    self.answer(entry, 0, &[0; READ_BYTES])?;
                }
            }
        }
        self.ring.submit()?;
        Ok(if worst >= u32::from(AT_A_TIME).min(READS) { u32::from(AT_A_TIME) } else { worst })
    }

    /// Waits for requests; false when none came.
    fn wait(&mut self) -> io::Result<bool> {
        let quiet = Timespec::from(QUIET);
        match self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&quiet)) {
            Ok(_) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME) => Ok(false),
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(true),
                _ => Err(error),
            },
        }
    }

    fn answer_other(&mut self, entry: usize, header: &InHeader) -> io::Result<()> {
        let attr = |ino: u64| Attr {
            ino,
            size: u64::from(READS) * READ_BYTES as u64,
            mode: if ino == ROOT_ID { libc::S_IFDIR | 0o700 } else { libc::S_IFREG | 0o600 },
            nlink: 1,
            blksize: 4096,
            ..Attr::default()
        };
        match header.opcode {
            opcode::LOOKUP => {
                let out = EntryOut { nodeid: 2, attr: attr(2), entry_valid: 60, attr_valid: 60, ..EntryOut::default() };
                self.answer(entry, 0, bytemuck::bytes_of(&out))
            }
            opcode::GETATTR => {
                let out = AttrOut { attr_valid: 60, attr: attr(header.nodeid), ..AttrOut::default() };
                self.answer(entry, 0, bytemuck::bytes_of(&out))
            }
            opcode::OPEN => {
                let out = OpenOut { open_flags: open_flag::DIRECT_IO | open_flag::NOFLUSH, ..OpenOut::default() };
                self.answer(entry, 0, bytemuck::bytes_of(&out))
            }
            opcode::RELEASE => self.answer(entry, 0, &[]),
            _ => self.answer(entry, -libc::ENOSYS, &[]),
        }
    }

    fn answer(&mut self, entry: usize, error: i32, reply: &[u8]) -> io::Result<()> {
        let at = entry * SLOT;
        let header: InHeader = self.memory.read_value(at);
        let in_out: RingInOut = self.memory.read_value(at + RING_IN_OUT);
        self.memory.write(at + 4096, reply);
        let len = reply.len() as u32;
        self.memory.write_value(at, &OutHeader { len: 16 + len, error, unique: header.unique });
        let answered = RingInOut { commit_id: in_out.commit_id, payload_sz: len, ..RingInOut::default() };
        self.memory.write_value(at + RING_IN_OUT, &answered);
        let commit = command(self.entries[entry], entry as u64, ring_command::COMMIT_AND_FETCH, in_out.commit_id);
        // SAFETY: the command points to nothing.
        while unsafe { self.ring.submission().push(&commit) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }
}

/// The kernel's `struct iocb` (include/uapi/linux/aio_abi.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}
const _: () = assert!(size_of::<Iocb>() == 64);

/// Reads the whole file with [`READS`] asynchronous reads from one processor, so that one queue gets them all. The old
/// AIO interface is used because it submits on the calling thread; io_uring would use its own workers.
fn read_all(path: &PathBuf, processor: usize) -> io::Result<()> {
    let mut only = rustix::thread::CpuSet::new();
    only.set(processor);
    // This thread's own affinity; where it is not allowed, several queues share the reads.
    let _ = rustix::thread::sched_setaffinity(None, &only);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let buffers = IoMemory::zeroed(READS as usize * READ_BYTES);
    let context = AioContext::new()?;
    let mut iocbs = [Iocb::default(); READS as usize];
    for (index, iocb) in (0..).zip(iocbs.iter_mut()) {
        *iocb = Iocb {
            descriptor: file.as_raw_fd().cast_unsigned(),
            buffer: buffers.as_ptr() as u64 + index * READ_BYTES as u64,
            len: READ_BYTES as u64,
            offset: index.cast_signed() * READ_BYTES as i64,
            ..Iocb::default()
        };
    }
    context.read(&mut iocbs, &file)
}

struct AioContext(u64);

impl AioContext {
    fn new() -> io::Result<Self> {
        let mut context = 0_u64;
        // SAFETY: io_setup writes one number, which lives through the call.
        if unsafe { libc::syscall(libc::SYS_io_setup, c_long::from(READS), &raw mut context) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(context))
    }

    /// Submits all and waits for all. The file is only borrowed to be open.
    fn read(&self, iocbs: &mut [Iocb], _file: &File) -> io::Result<()> {
        let pointers: Vec<*mut Iocb> = iocbs.iter_mut().map(std::ptr::from_mut).collect();
        let mut submitted = 0;
        while submitted < pointers.len() {
            let rest = &pointers[submitted..];
            // SAFETY: the pointers are to live iocbs, whose buffers and file outlive `io_destroy`, which waits for all.
            let count = unsafe { libc::syscall(libc::SYS_io_submit, self.0, rest.len() as c_long, rest.as_ptr()) };
            submitted += usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        }
        let mut events = vec![[0_i64; 4]; pointers.len()];
        let wanted = events.len() as c_long;
        // SAFETY: `struct io_event` is four 64-bit numbers; there is room for as many as are asked for.
        let count = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                wanted,
                wanted,
                events.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
        if count != wanted {
            return Err(io::Error::last_os_error());
        }
        match events.iter().find(|event| event[2] != READ_BYTES as i64) {
            Some(event) => Err(io::Error::from_raw_os_error(i32::try_from(-event[2]).unwrap_or(libc::EIO))),
            None => Ok(()),
        }
    }
}

impl Drop for AioContext {
    fn drop(&mut self) {
        // SAFETY: waits for what is in flight; the context is used no more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::switch::UringSwitch;
    use super::*;

    #[test]
    #[ignore = "needs root and a kernel with FUSE over io_uring"]
    fn sound_kernel_keeps_as_many_under_way_as_it_may() {
        let _on = UringSwitch::on().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..5 {
            assert_eq!(background_depth(&folder.path().join("scratch")).unwrap(), u32::from(AT_A_TIME));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the directory is gone again");
    }
}

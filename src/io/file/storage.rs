//! The engine's storage on a pool's file, through a reactor's ring.

use std::cell::{Cell, OnceCell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::host_claim::HostClaim;
use super::lock::release;
use super::pool_file::{OpenOptions, PoolFile};
use crate::engine::{Memory, Storage};
use crate::error::{Error, Result};
use crate::io::IoMemory;
use crate::io::ring::{Operation, Punch, PunchPace, PunchStatistics, Reactor, Request, RingFile, Transfer};

/// Zeros that an extension writes at a time: large, so that the host makes large extents; bounded, so that it does not
/// fill the disk's queue before everybody else.
const EXTENSION_BYTES: usize = 1 << 20;
/// Holes that are looked for at a time; of what comes behind them nothing is said.
const HOLES_MAX: usize = 4096;
/// Time between two looks at what is still in flight.
const LOOK: Duration = Duration::from_millis(1);

/// A pool's file or device on a ring. A clone is another handle to the same file.
///
/// Operations do not wait for each other. What a short transfer left, and the steps of an extension, are submitted when
/// the step before is reaped, whether or not anybody polls the future.
#[derive(Clone)]
pub struct FileStorage {
    shared: Rc<Shared>,
}

struct Shared {
    // Before the reactor: the file takes itself off the ring when it goes.
    file: Rc<RingFile>,
    reactor: Reactor,
    path: PathBuf,
    block_device: bool,
    /// The file has it, too: it goes when the last operation has ended.
    host_claim: Option<Rc<RefCell<HostClaim>>>,
    alignment: usize,
    size_bytes: Cell<u64>,
    zeros: OnceCell<IoMemory>,
    pace: Rc<PunchPace>,
}

impl FileStorage {
    /// Puts a pool's file on a ring. Its locks are given up when the last handle is dropped and the last operation has
    /// ended.
    pub fn new(reactor: &Reactor, file: PoolFile) -> Self {
        let parts = file.into_parts();
        let host_claim = parts.host_claim.map(|claim| Rc::new(RefCell::new(claim)));
        let (claimed, locked) = (host_claim.clone(), parts.locked);
        let last = move |fd: BorrowedFd<'_>| {
            drop(claimed);
            if locked {
                release(fd);
            }
        };
        let shared = Shared {
            file: reactor.adopt_file(parts.fd, Some(Box::new(last))),
            host_claim,
            reactor: reactor.clone(),
            path: parts.path,
            block_device: parts.block_device,
            alignment: parts.alignment,
            size_bytes: Cell::new(parts.size_bytes),
            zeros: OnceCell::new(),
            pace: PunchPace::new(),
        };
        Self { shared: Rc::new(shared) }
    }

    /// [`PoolFile::create`], put on a ring.
    ///
    /// # Errors
    /// As there.
    pub fn create(reactor: &Reactor, path: &Path, size_bytes: u64, force: bool) -> Result<Self> {
        Ok(Self::new(reactor, PoolFile::create(path, size_bytes, force)?))
    }

    /// [`PoolFile::open`], put on a ring.
    ///
    /// # Errors
    /// As there.
    pub fn open(reactor: &Reactor, path: &Path, options: OpenOptions) -> Result<Self> {
        Ok(Self::new(reactor, PoolFile::open(path, options)?))
    }

    /// Where the pool was found.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Makes the file larger, sparse; or takes note of a device that has grown. The new size is durable with the next
    /// [`flush`](Storage::flush): one of its own could fail, and take with it what others were to make durable.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] when `size_bytes` is less than the size, or more than the device has; what the host
    /// answers.
    pub fn grow(&self, size_bytes: u64) -> Result<()> {
        let shared = &*self.shared;
        let failed = |error| Error::io(format!("growing {} to {size_bytes} bytes", shared.path.display()), error);
        let present = seek(shared.file.fd(), SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
        if size_bytes < shared.size_bytes.get() || (shared.block_device && size_bytes > present) {
            return Err(Error::InvalidInput(format!(
                "{} cannot grow from {} to {size_bytes} bytes",
                shared.path.display(),
                shared.size_bytes.get()
            )));
        }
        if !shared.block_device && size_bytes > present {
            rustix::fs::ftruncate(shared.file.fd(), size_bytes).map_err(|error| failed(error.into()))?;
        }
        shared.size_bytes.set(size_bytes.max(present));
        Ok(())
    }

    /// Bytes that the host has allocated to the file; a device's size.
    ///
    /// # Errors
    /// What the host answers.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        if self.shared.block_device {
            return Ok(self.shared.size_bytes.get());
        }
        // Counted in units of 512 bytes whatever the host's block is.
        Ok(u64::try_from(rustix::fs::fstat(self.shared.file.fd())?.st_blocks).unwrap_or(0) * 512)
    }

    /// Bytes that the host's file system has free for the file to grow into; none for a device.
    ///
    /// # Errors
    /// What the host answers.
    pub fn host_free_bytes(&self) -> io::Result<Option<u64>> {
        if self.shared.block_device {
            return Ok(None);
        }
        let host = rustix::fs::fstatvfs(self.shared.file.fd())?;
        Ok(Some(host.f_bavail.saturating_mul(host.f_frsize)))
    }

    /// What punching came to since the file was opened. While it goes on nothing else does on the file.
    pub fn punching(&self) -> PunchStatistics {
        self.shared.pace.statistics()
    }

    /// Whether the claim of this host on a block device stays when the file goes: whoever opens the device next here
    /// takes it up, and another host does not slip in between.
    pub fn keep_host_claim(&self, keep: bool) {
        if let Some(claim) = &self.shared.host_claim {
            claim.borrow().keep(keep);
        }
    }

    /// Waits until no operation is in flight, and lets other hosts have a block device, unless the claim is to stay. It is
    /// not used afterwards.
    ///
    /// # Errors
    /// When the ring is broken.
    pub async fn leave_host(&self) -> io::Result<()> {
        let Some(claim) = &self.shared.host_claim else { return Ok(()) };
        // Each operation holds the file.
        while Rc::strong_count(&self.shared.file) > 1 {
            self.shared.reactor.sleep(LOOK).await?;
        }
        claim.borrow_mut().leave();
        Ok(())
    }

    /// Nothing is written to a device that another host has taken.
    fn check_host(&self) -> io::Result<()> {
        match &self.shared.host_claim {
            Some(claim) if claim.borrow().is_lost() => Err(io::Error::other("another host has taken the pool over")),
            _ => Ok(()),
        }
    }

    fn transfer(&self, offset: u64, memory: &IoMemory, write: bool, flags: i32) -> Operation {
        let shared = &*self.shared;
        // Some hosts take what is not aligned through the page cache instead of refusing it.
        let unaligned = offset | memory.len() as u64 | memory.as_ptr() as u64;
        if !unaligned.is_multiple_of(shared.alignment as u64) {
            return Operation::ended(Err(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let fit = self.check(offset, memory.len() as u64);
        if let Err(error) = fit.and_then(|()| if write { self.check_host() } else { Ok(()) }) {
            return Operation::ended(Err(error));
        }
        shared.pace.note_other();
        shared.reactor.issue(Request::Transfer(Transfer {
            file: Rc::clone(&shared.file),
            offset,
            memory: memory.clone(),
            write,
            flags,
            done: 0,
            alignment: shared.alignment,
        }))
    }

    /// A write beyond the end would make the file larger behind the engine's back.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let size_bytes = self.shared.size_bytes.get();
        if offset.checked_add(len).is_none_or(|end| end > size_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{len} bytes at offset {offset} are beyond the end, {size_bytes}"),
            ));
        }
        Ok(())
    }

    /// The operation on a range, or its end when the range is empty or outside.
    fn on_range(&self, range: &Range<u64>, request: impl FnOnce() -> Request) -> Operation {
        if range.is_empty() {
            return Operation::ended(Ok(()));
        }
        match self.check(range.start, range.end - range.start).and_then(|()| self.check_host()) {
            Ok(()) => self.shared.reactor.issue(request()),
            Err(error) => Operation::ended(Err(error)),
        }
    }

    /// Allocates a range and writes zeros to what of it is at or after `zeros_from`.
    fn make_ready(&self, range: &Range<u64>, zeros_from: u64) -> Operation {
        let shared = &*self.shared;
        self.on_range(range, || Request::Extend {
            file: Rc::clone(&shared.file),
            range: range.clone(),
            position: zeros_from,
            allocate: !shared.block_device,
            zeros: shared.zeros.get_or_init(|| IoMemory::zeroed(EXTENSION_BYTES)).clone(),
        })
    }
}

impl Storage for FileStorage {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        IoMemory::zeroed(len)
    }

    fn alignment(&self) -> usize {
        self.shared.alignment
    }

    fn size_bytes(&self) -> u64 {
        self.shared.size_bytes.get()
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.transfer(offset, into, false, 0)
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.transfer(offset, from, true, 0)
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.transfer(offset, from, true, libc::RWF_DSYNC)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.shared.pace.note_other();
        self.shared.reactor.issue(Request::Sync(Rc::clone(&self.shared.file)))
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.make_ready(&range, range.start)
    }

    fn reserve(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        // A device has nothing to allocate; writing makes a thinly provisioned one do so.
        self.make_ready(&range, if self.shared.block_device { range.start } else { range.end })
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.on_range(&range, || {
            Request::Punch(Punch::new(Rc::clone(&self.shared.file), range.clone(), Rc::clone(&self.shared.pace)))
        })
    }

    fn holes(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let shared = &*self.shared;
        let mut holes = Vec::new();
        let mut at = range.start;
        // A host that cannot tell says that all is data.
        while !shared.block_device && at < range.end && holes.len() < HOLES_MAX {
            let Ok(hole) = seek(shared.file.fd(), SeekFrom::Hole(at)) else { break };
            if hole >= range.end {
                break;
            }
            at = match seek(shared.file.fd(), SeekFrom::Data(hole)) {
                Ok(data) => data.min(range.end),
                Err(Errno::NXIO) => range.end,
                Err(_) => break,
            };
            holes.push(hole..at);
        }
        holes
    }
}

//! The engine's way to the medium: one trait for memory, one for a file or device.
//!
//! The engine makes no system call. What it wants read, written, made durable, allocated or punched it asks of a
//! [`Storage`]: a file through io_uring, plain memory, or the crash simulator. It runs on one thread; nothing here needs
//! to be `Send`.

use std::future::Future;
use std::io;
use std::ops::Range;

/// A piece of memory that an I/O can be done on: a client's payload or a buffer of the engine's own.
///
/// A clone is another handle to the same bytes, as is a [`slice`](Memory::slice): several operations may use parts of
/// one payload at a time. Bytes are only ever copied in and out, never borrowed, because the kernel or another process
/// may be writing them.
pub trait Memory: Clone + 'static {
    /// Length in bytes.
    fn len(&self) -> usize;

    /// Whether the length is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A handle to a part of it, `range` in bytes.
    ///
    /// # Panics
    /// When the range is not inside.
    #[must_use]
    fn slice(&self, range: Range<usize>) -> Self;

    /// Copies `into.len()` bytes out, from `offset` on.
    fn read(&self, offset: usize, into: &mut [u8]);

    /// Copies `from` in at `offset`.
    fn write(&self, offset: usize, from: &[u8]);

    /// Sets `range` to zero.
    fn zero(&self, range: Range<usize>);

    /// Copies all of `from` in at `offset`.
    fn copy_from(&self, offset: usize, from: &Self);

    /// Whether all of `range` is zero. Looks no further than the first byte that is not, or little.
    fn is_zero(&self, range: Range<usize>) -> bool {
        const STEP: usize = 512;
        let mut bytes = [0; STEP];
        range.clone().step_by(STEP).all(|at| {
            let part = &mut bytes[..STEP.min(range.end - at)];
            self.read(at, part);
            part.iter().all(|byte| *byte == 0)
        })
    }
}

/// The pool file or device.
///
/// An operation is issued **when the method is called**, not when its future is first polled; dropping the future does
/// not withdraw it, and the storage keeps the memory until the operation has ended. Offsets and lengths are multiples
/// of [`alignment`](Storage::alignment). Short transfers are finished or made errors here, never passed on.
pub trait Storage: 'static {
    /// The memory this storage reads into and writes from.
    type Memory: Memory;

    /// New zeroed memory of `len` bytes, aligned for this storage. Outside the steady state this may be the heap.
    fn allocate(&self, len: usize) -> Self::Memory;

    /// The smallest unit of offset, length and memory address, in bytes: 512 or 4096.
    fn alignment(&self) -> usize;

    /// Size of the file or device in bytes, as of now.
    fn size_bytes(&self) -> u64;

    /// Fills `into` from `offset`.
    fn read(&self, offset: u64, into: &Self::Memory) -> impl Future<Output = io::Result<()>> + 'static;

    /// Writes all of `from` at `offset`. The data may still be in a volatile cache when this completes.
    fn write(&self, offset: u64, from: &Self::Memory) -> impl Future<Output = io::Result<()>> + 'static;

    /// Writes all of `from` at `offset`; complete only when this data is durable (`RWF_DSYNC`). Makes nothing else so.
    fn write_durable(&self, offset: u64, from: &Self::Memory) -> impl Future<Output = io::Result<()>> + 'static;

    /// Makes every write that had completed when this was called durable (`fdatasync`).
    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static;

    /// Allocates `range` (bytes) on the host and writes zeros where it was not written yet, so that later writes change
    /// no extent of the host file. Content that is there already may be kept or zeroed: the caller owns the range.
    /// Durable only after a [`flush`](Storage::flush).
    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static;

    /// As [`extend`](Storage::extend) where it costs little, and else without the zeros: the host has the space, and a first
    /// write to each part of it changes the host file's extents. It reads as before, or as zeros.
    fn reserve(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.extend(range)
    }

    /// Gives `range` (bytes) back to the host. It reads as zeros afterwards. `EOPNOTSUPP` where the host
    /// cannot do that: it reads as before.
    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static;

    /// Parts of `range` (bytes) that the host has not written yet or that were punched, in ascending order; no more than are
    /// known. Some system calls: for what is done once a group, and not for each request.
    fn holes(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let _ = range;
        Vec::new()
    }
}

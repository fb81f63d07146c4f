//! Memory that two processes map: a memfd of fixed size.
//!
//! Sealed against shrinking and growing, so that no access can meet a missing page. Every access is checked against the
//! length here; offsets come from a validated layout, never from the memory itself. What the other side writes meanwhile
//! may be read torn, which is why everything read is bounded before it is used.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::engine::Memory;
use crate::error::{Error, Result};

/// A mapped memfd.
pub struct SharedMemory {
    descriptor: OwnedFd,
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; it lives until the value is dropped. Access is through atomics, or through
// raw copies whose ordering the atomics give.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New zeroed memory of `len` bytes, `name` being what /proc shows.
    ///
    /// # Errors
    /// What the host answers.
    pub fn create(name: &str, len: usize) -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io(format!("creating shared memory {name}"), error.into());
        let descriptor = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(failed)?;
        ftruncate(&descriptor, len as u64).map_err(failed)?;
        fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
        Self::map(descriptor, len)
    }

    /// Maps memory that another process made.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when it is not sealed against shrinking or is empty.
    pub fn open(descriptor: OwnedFd) -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io("opening shared memory", error.into());
        let seals = fcntl_get_seals(&descriptor).map_err(failed)?;
        let len = usize::try_from(fstat(&descriptor).map_err(failed)?.st_size).unwrap_or(0);
        // Without the seal its owner could truncate it under us, and an access would be SIGBUS.
        if !seals.contains(SealFlags::SHRINK) || len == 0 {
            return Err(Error::Incompatible("shared memory is empty or not sealed against shrinking".into()));
        }
        Self::map(descriptor, len)
    }

    fn map(descriptor: OwnedFd, len: usize) -> Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &descriptor,
                0,
            )
        }
        .map_err(|error| Error::io("mapping shared memory", error.into()))?;
        let address = NonNull::new(address.cast()).ok_or_else(|| Error::Incompatible("mapping at address 0".into()))?;
        Ok(Self { descriptor, address, len })
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The memfd, to be given to another process.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Address of byte `offset`, for the kernel; good for `len` bytes.
    ///
    /// # Panics
    /// When the range is not inside.
    pub(crate) fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        self.check(offset, len);
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.address.as_ptr().add(offset) }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset, "shared memory: {offset}+{len} is outside");
    }

    /// The atomic number at `offset`, which is a multiple of 4.
    pub(crate) fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        self.check(offset, 4);
        assert!(offset.is_multiple_of(4));
        // SAFETY: inside the mapping and aligned, as just checked; both processes use only atomics on these bytes.
        unsafe { AtomicU32::from_ptr(self.address.as_ptr().add(offset).cast()) }
    }

    /// The atomic number at `offset`, which is a multiple of 8.
    pub(crate) fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, 8);
        assert!(offset.is_multiple_of(8));
        // SAFETY: as for atomic_u32.
        unsafe { AtomicU64::from_ptr(self.address.as_ptr().add(offset).cast()) }
    }

    /// Copies bytes out, from `offset` on.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        // SAFETY: the source is inside the mapping; the destination is private memory. A concurrent writer in the other
        // process can garble the bytes read, nothing else.
        unsafe { std::ptr::copy_nonoverlapping(self.address.as_ptr().add(offset), into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in at `offset`.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: the destination is inside the mapping; the source is private memory.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.address.as_ptr().add(offset), from.len()) }
    }

    /// Moves `len` bytes within the memory; the ranges may overlap.
    pub(crate) fn copy_within(&self, from: usize, to: usize, len: usize) {
        self.check(from, len);
        self.check(to, len);
        // SAFETY: both ranges are inside the mapping; `copy` allows overlap.
        unsafe { std::ptr::copy(self.address.as_ptr().add(from), self.address.as_ptr().add(to), len) }
    }

    /// Sets `range` to zero.
    pub(crate) fn zero(&self, range: Range<usize>) {
        let len = range.end.saturating_sub(range.start);
        self.check(range.start, len);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::write_bytes(self.address.as_ptr().add(range.start), 0, len) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more: every reference borrows from `self`.
        let unmapped = unsafe { munmap(self.address.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory").field("len", &self.len).finish_non_exhaustive()
    }
}

/// A part of shared memory as the engine sees memory.
#[derive(Clone, Debug)]
pub struct SharedSlice {
    memory: Arc<SharedMemory>,
    range: Range<usize>,
}

impl SharedSlice {
    /// All of `memory`.
    pub fn whole(memory: Arc<SharedMemory>) -> Self {
        let range = 0..memory.len();
        Self { memory, range }
    }

    /// Address for an I/O of the kernel; good for [`len`](Memory::len) bytes while this handle lives.
    pub fn pointer(&self) -> *mut u8 {
        self.memory.pointer(self.range.start, self.range.len())
    }
}

impl Memory for SharedSlice {
    fn len(&self) -> usize {
        self.range.len()
    }

    fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "slice {range:?} is outside");
        Self {
            memory: Arc::clone(&self.memory),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= self.range.len());
        self.memory.read(self.range.start + offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= self.range.len());
        self.memory.write(self.range.start + offset, from);
    }

    fn zero(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.range.len());
        self.memory.zero(self.range.start + range.start..self.range.start + range.end);
    }

    fn copy_from(&self, offset: usize, from: &Self) {
        let len = from.range.len();
        assert!(offset + len <= self.range.len());
        let (source, target) = (from.memory.pointer(from.range.start, len), self.range.start + offset);
        // SAFETY: both ranges were checked to be inside mappings that live; `copy` allows overlap.
        unsafe { std::ptr::copy(source, self.memory.pointer(target, len), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_opened_again_shows_the_same_bytes() {
        let first = SharedMemory::create("test", 8192).unwrap();
        first.write(5000, b"plywood");
        let second = SharedMemory::open(first.descriptor().try_clone_to_owned().unwrap()).unwrap();
        let mut bytes = [0; 7];
        second.read(5000, &mut bytes);
        assert_eq!(&bytes, b"plywood");
    }

    #[test]
    fn memory_cannot_be_shrunk() {
        let memory = SharedMemory::create("test", 8192).unwrap();
        assert!(ftruncate(memory.descriptor(), 4096).is_err());
    }

    #[test]
    fn unsealed_memory_is_refused() {
        let descriptor = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&descriptor, 4096).unwrap();
        assert!(matches!(SharedMemory::open(descriptor), Err(Error::Incompatible(_))));
    }

    #[test]
    #[should_panic(expected = "is outside")]
    fn access_outside_panics() {
        SharedMemory::create("test", 4096).unwrap().write(4090, &[0; 7]);
    }

    #[test]
    fn slices_copy_between_and_zero_their_own_part_only() {
        let whole = SharedSlice::whole(Arc::new(SharedMemory::create("test", 8192).unwrap()));
        let (left, right) = (whole.slice(0..4096), whole.slice(4096..8192));
        left.write(0, &[7; 4096]);
        right.copy_from(100, &left.slice(10..20));
        let mut bytes = [0; 12];
        right.read(99, &mut bytes);
        assert_eq!(bytes, [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        left.zero(0..4095);
        left.slice(4094..4096).read(0, &mut bytes[..2]);
        assert_eq!(bytes[..2], [0, 7]);
    }
}

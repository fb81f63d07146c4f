//! A mapped range of memory that other processes may share: payloads, request queues, the pending log.
//!
//! Nothing here hands out a reference to plain bytes. Another process, or the kernel, may write them at any moment, so
//! bytes are copied in and out through raw pointers, and what synchronises goes through the aligned atomics. A copy that
//! races with a writer holds some mixture of old and new bytes; whoever reads shared memory checks what it got.
//!
//! A mapping of a file that another process may cut short can kill its reader with SIGBUS. [`Mapping::shared`] therefore
//! checks the size of what it maps, and [`shared_memory`] makes memfds whose size is sealed.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Makes a memfd of `len` bytes whose size is sealed, to be mapped by several processes. It reads as zeros.
///
/// It is closed by exec; the process that starts another hands it over explicitly.
///
/// # Errors
/// What the kernel answers; `InvalidInput` when the name holds a NUL byte.
pub fn shared_memory(name: &str, len: usize) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let fd = rustix::fs::memfd_create(&name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// A range of shared memory, mapped for reading and writing until this value is dropped.
///
/// Wrap it in an `Arc`: the front's threads and the engine's payloads all keep it alive.
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; it has no tie to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: every access through `&Mapping` is an atomic or a raw copy of bytes for which all values are valid. The same
// memory is written by other processes anyway, so callers already treat every copy as untrusted.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` zeroed bytes that only this process (and its forks) sees.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` for length 0.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::check_len(len)?;
        // SAFETY: a null hint lets the kernel choose free addresses, so no existing mapping is touched.
        let address = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
        }?;
        Ok(Self::at(address, len))
    }

    /// Maps `len` bytes of `fd` from `offset` (a multiple of the page size) on, shared with all who map the same. With
    /// `populate` the pages are made present at once, so that no later access waits for memory.
    ///
    /// # Errors
    /// What the kernel answers; `InvalidInput` for length 0 or when the file ends inside the range: touching what lies
    /// beyond its end would be a SIGBUS.
    pub fn shared(fd: impl AsFd, offset: u64, len: usize, populate: bool) -> io::Result<Self> {
        Self::check_len(len)?;
        let size = u64::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("shared memory of {size} bytes ends before the {len} bytes at offset {offset}"),
            ));
        }
        let flags = if populate { MapFlags::SHARED | MapFlags::POPULATE } else { MapFlags::SHARED };
        // SAFETY: a null hint lets the kernel choose free addresses, so no existing mapping is touched.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset)
        }?;
        Ok(Self::at(address, len))
    }

    fn check_len(len: usize) -> io::Result<()> {
        if len == 0 || isize::try_from(len).is_err() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("cannot map {len} bytes")));
        }
        Ok(())
    }

    fn at(address: *mut std::ffi::c_void, len: usize) -> Self {
        let address = NonNull::new(address.cast()).expect("mmap without MAP_FIXED never answers address 0");
        Self { address, len }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: an empty range cannot be mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is mapped, for handing ranges of it to the kernel. Valid as long as the mapping lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Asks for huge pages. Where there are none, nothing changes.
    pub fn prefer_huge_pages(&self) {
        // SAFETY: the range is ours, and this advice changes no content. A refusal only means small pages.
        let _ = unsafe { rustix::mm::madvise(self.address.as_ptr().cast(), self.len, Advice::LinuxHugepage) };
    }

    /// Copies `into.len()` bytes out, from `offset` on.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.pointer(offset, into.len());
        // SAFETY: `pointer` checked the range; `into` is ours alone, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies `from` in at `offset`.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let into = self.pointer(offset, from.len());
        // SAFETY: `pointer` checked the range; no reference into the mapping exists, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }

    /// Sets `range` to zero.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn zero(&self, range: Range<usize>) {
        assert!(range.start <= range.end, "range ends before it starts");
        let len = range.end - range.start;
        // SAFETY: `pointer` checked the range.
        unsafe { std::ptr::write_bytes(self.pointer(range.start, len), 0, len) }
    }

    /// Copies a plain value out.
    ///
    /// # Panics
    /// When it is not inside.
    pub fn read_value<T: bytemuck::AnyBitPattern>(&self, offset: usize) -> T {
        let from = self.pointer(offset, size_of::<T>());
        // SAFETY: `pointer` checked the range, the read needs no alignment, and every bit pattern is a valid `T`.
        unsafe { from.cast::<T>().read_unaligned() }
    }

    /// Copies a plain value in.
    ///
    /// # Panics
    /// When it is not inside.
    pub fn write_value<T: bytemuck::NoUninit>(&self, offset: usize, value: &T) {
        self.write(offset, bytemuck::bytes_of(value));
    }

    /// The 32-bit word at `offset` (a multiple of 4) as an atomic.
    ///
    /// # Panics
    /// When it is not inside or not aligned.
    pub fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "offset {offset} is not aligned for a 32-bit atomic");
        let word = self.pointer(offset, 4);
        // SAFETY: inside the mapping and aligned (mappings start on a page); atomics may be shared with anybody.
        unsafe { AtomicU32::from_ptr(word.cast()) }
    }

    /// The 64-bit word at `offset` (a multiple of 8) as an atomic.
    ///
    /// # Panics
    /// When it is not inside or not aligned.
    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "offset {offset} is not aligned for a 64-bit atomic");
        let word = self.pointer(offset, 8);
        // SAFETY: inside the mapping and aligned (mappings start on a page); atomics may be shared with anybody.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    /// Address of `len` bytes at `offset`, after checking that they are inside.
    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at offset {offset} are not inside a mapping of {} bytes",
            self.len
        );
        // SAFETY: the offset is inside the mapping, which is one allocation.
        unsafe { self.address.as_ptr().add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by this value with this length, and nothing can use it any more.
        if let Err(error) = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.len) } {
            tracing::error!(%error, len = self.len, "cannot unmap shared memory");
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn two_mappings_of_one_memfd_show_the_same_bytes() {
        let fd = shared_memory("plywood-test", 8192).unwrap();
        let one = Mapping::shared(&fd, 0, 8192, true).unwrap();
        let other = Mapping::shared(&fd, 4096, 4096, false).unwrap();
        one.write(4096 + 10, b"hello");
        let mut seen = [0; 5];
        other.read(10, &mut seen);
        assert_eq!(&seen, b"hello");
        other.atomic_u64(64).store(77, Ordering::Release);
        assert_eq!(one.atomic_u64(4096 + 64).load(Ordering::Acquire), 77);
        assert_eq!(one.read_value::<u64>(4096 + 64), 77);
        one.zero(4096..8192);
        assert_eq!(other.atomic_u32(64).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn mapping_beyond_the_end_is_refused() {
        let fd = shared_memory("plywood-test", 4096).unwrap();
        assert_eq!(Mapping::shared(&fd, 0, 8192, false).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Mapping::shared(&fd, u64::MAX - 10, 4096, false).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Mapping::anonymous(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn sealed_memory_cannot_be_cut_short() {
        let fd = shared_memory("plywood-test", 4096).unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
    }

    #[test]
    #[should_panic(expected = "not inside a mapping")]
    fn copy_that_leaves_the_mapping_panics() {
        Mapping::anonymous(4096).unwrap().write(4090, &[0; 7]);
    }

    #[test]
    #[should_panic(expected = "not aligned")]
    fn unaligned_atomic_panics() {
        let _ = Mapping::anonymous(4096).unwrap().atomic_u64(4);
    }
}

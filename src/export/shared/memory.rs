//! A memfd with its mapping: what one process makes and another opens.

use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};

use crate::error::{Error, Result};
use crate::io::{Mapping, shared_memory};

/// Memory that two processes map. Access is that of the [`Mapping`]: checked against its length, by copies and atomics.
pub struct SharedMemory {
    descriptor: OwnedFd,
    mapping: Arc<Mapping>,
}

impl SharedMemory {
    /// New zeroed memory of `len` bytes, `name` being what /proc shows.
    ///
    /// # Errors
    /// What the host answers.
    pub fn create(name: &str, len: usize) -> Result<Self> {
        let failed = |error| Error::io(format!("creating shared memory {name}"), error);
        let descriptor = shared_memory(name, len).map_err(failed)?;
        let mapping = Mapping::shared(&descriptor, 0, len, false).map_err(failed)?;
        Ok(Self { descriptor, mapping: Arc::new(mapping) })
    }

    /// Maps memory that another process made.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when it is not sealed against shrinking or is empty.
    pub fn open(descriptor: OwnedFd) -> Result<Self> {
        let failed = |error| Error::io("opening shared memory", error);
        let seals = fcntl_get_seals(&descriptor).map_err(|errno| failed(errno.into()))?;
        let len = fstat(&descriptor).map_err(|errno| failed(errno.into()))?.st_size;
        let len = usize::try_from(len).unwrap_or(0);
        // Without the seal its owner could truncate it under us, and an access would be SIGBUS.
        if !seals.contains(SealFlags::SHRINK) || len == 0 {
            return Err(Error::Incompatible("shared memory is empty or not sealed against shrinking".into()));
        }
        let mapping = Mapping::shared(&descriptor, 0, len, false).map_err(failed)?;
        Ok(Self { descriptor, mapping: Arc::new(mapping) })
    }

    /// The memfd, to be given to another process.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// The mapping.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Address of byte `offset`, for the kernel; good for `len` bytes while this memory lives.
    ///
    /// # Panics
    /// When the range is not inside.
    pub(super) fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len()), "{offset}+{len} is outside");
        self.as_ptr().wrapping_add(offset)
    }
}

impl Deref for SharedMemory {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory").field("len", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

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
    fn unsealed_memory_is_refused() {
        let descriptor = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&descriptor, 4096).unwrap();
        assert!(matches!(SharedMemory::open(descriptor), Err(Error::Incompatible(_))));
    }

    #[test]
    #[should_panic(expected = "is outside")]
    fn address_outside_panics() {
        SharedMemory::create("test", 4096).unwrap().pointer(4090, 7);
    }
}

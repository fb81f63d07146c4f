//! A pool that is not in use, mapped for reading: check, dump, and the sources of imports.
//!
//! Reading a mapped page that the disk cannot deliver, or that lies beyond the end of a file cut short meanwhile, raises
//! SIGBUS, and a tool that looks for damage must not die of it. So nothing here reads the mapping with a plain load: each
//! read is a `process_vm_readv` of this process on itself. The kernel then resolves the page on our behalf and answers
//! EFAULT where a load would have been killed, page by page, so that the unreadable one is named. (A SIGBUS handler that
//! jumps would be the other way; it needs process-wide state, and jumping over Rust frames is not defined.) Where a
//! sandbox forbids the call, the same range is read with `pread` instead.
//!
//! The mapping brings the host's page cache, which suits a walk over a pool nobody writes. Direct I/O of an engine drops
//! those pages again, and the locks keep engines away as long as this is open.
//!
//! **Memory.** Of a pool single blocks are read, a megabyte apart as often as not: reading ahead would fetch the data
//! between them (128 KiB for each leaf), so it is switched off, and runs of blocks go through `pread`. What is mapped
//! counts as this process's, and so do the tables behind it, a page for each 2 MiB touched; so the mapping is made anew
//! after [`READS_MAX`] reads.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::Future;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use super::file::{open_existing, refuse_another_host, take, try_claim, try_fence};
use super::memory::IoMemory;
use crate::engine::{Memory, Storage};
use crate::error::{Error, Result};
use crate::units::BLOCK_SIZE;

/// Reads through one mapping of a pool: with the tables, 128 MiB.
const READS_MAX: u32 = 16 << 10;

/// A file or device mapped for reading. Writes are refused with EROFS. A clone is another handle to the same mapping.
#[derive(Clone)]
pub struct MappedStorage {
    shared: Rc<Shared>,
}

struct Shared {
    file: File,
    /// None for an empty file, which cannot be mapped.
    map: RefCell<Option<memmap2::Mmap>>,
    size_bytes: u64,
    /// Whether single blocks are read, all over the file.
    scattered: bool,
    /// Reads through the present mapping.
    reads: Cell<u32>,
    /// The host forbids `process_vm_readv`.
    forbidden: Cell<bool>,
}

impl MappedStorage {
    /// Maps the pool at `path`. Others may read it meanwhile; nobody may open it for use.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Busy`] when the pool is in use; what the host answers.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_existing(path, libc::O_RDONLY)?;
        if file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device()) {
            refuse_another_host(path)?;
        }
        take(path, Duration::ZERO, || try_claim(&file, false).and_then(|()| try_fence(&file, false)))?;
        Self::map(file, path, true)
    }

    /// Maps a file that is no pool, such as the source of an import, without locks.
    ///
    /// # Errors
    /// [`Error::NotFound`]; what the host answers.
    pub fn open_unlocked(path: &Path) -> Result<Self> {
        Self::map(open_existing(path, libc::O_RDONLY)?, path, false)
    }

    fn map(mut file: File, path: &Path, scattered: bool) -> Result<Self> {
        let failed = |error| Error::io(format!("mapping {}", path.display()), error);
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let map = RefCell::new(map_file(&file, size_bytes, scattered).map_err(failed)?);
        let (reads, forbidden) = (Cell::new(0), Cell::new(false));
        Ok(Self { shared: Rc::new(Shared { file, map, size_bytes, scattered, reads, forbidden }) })
    }

    /// Fills `into` from `offset`, at once.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end; an error that names the offset where the host cannot deliver a page.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        // SAFETY: the slice is ours alone, and its bytes take any value.
        unsafe { self.shared.read(offset, into.as_mut_ptr(), into.len()) }
    }
}

fn map_file(file: &File, size_bytes: u64, scattered: bool) -> io::Result<Option<memmap2::Mmap>> {
    let len = usize::try_from(size_bytes).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    if len == 0 {
        return Ok(None);
    }
    // SAFETY: no reference into the mapping is ever made, so a change of the file breaks no promise of Rust's.
    let map = unsafe { memmap2::MmapOptions::new().len(len).map(file) }?;
    if scattered {
        map.advise(memmap2::Advice::Random)?;
    }
    Ok(Some(map))
}

impl Shared {
    /// # Safety
    /// `into` is valid for writing `len` bytes.
    unsafe fn read(&self, offset: u64, into: *mut u8, len: usize) -> io::Result<()> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.size_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{len} bytes at offset {offset} are beyond the end, {}", self.size_bytes),
            ));
        }
        let mut done = 0;
        while done < len {
            // SAFETY: the caller's promise for the part that is left.
            match unsafe { self.copy(offset + done as u64, into.add(done), len - done) } {
                Ok(0) => return Err(unreadable(offset + done as u64, "the file has been cut short")),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    return Err(unreadable(offset + done as u64, "the disk or the end of the file"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One system call's worth of bytes.
    ///
    /// # Safety
    /// `into` is valid for writing `len` bytes.
    unsafe fn copy(&self, offset: u64, into: *mut u8, len: usize) -> io::Result<usize> {
        let through_map = !(self.forbidden.get() || self.scattered && len > BLOCK_SIZE);
        if through_map && self.scattered {
            self.reads.set(self.reads.get() + 1);
            if self.reads.get() > READS_MAX {
                self.reads.set(1);
                // The old one goes first: its tables are what this is for.
                drop(self.map.take());
                self.map.replace(map_file(&self.file, self.size_bytes, true)?);
            }
        }
        if let Some(map) = &*self.map.borrow()
            && through_map
        {
            let local = libc::iovec { iov_base: into.cast(), iov_len: len };
            let address = map.as_ptr().wrapping_add(offset as usize);
            let remote = libc::iovec { iov_base: address.cast_mut().cast(), iov_len: len };
            // SAFETY: the kernel writes to `local`, which the caller vouches for; `remote` is only read, and any address
            // would do: a bad one is EFAULT.
            let count = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
            if count >= 0 {
                return Ok(count.unsigned_abs());
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) {
                return Err(error);
            }
            tracing::debug!(%error, "process_vm_readv is forbidden here; reading the file instead");
            self.forbidden.set(true);
        }
        // SAFETY: the caller's promise. The offset is below the file's size, which is an `off_t`.
        let count = unsafe { libc::pread(self.file.as_raw_fd(), into.cast(), len, offset as libc::off_t) };
        if count < 0 { Err(io::Error::last_os_error()) } else { Ok(count.unsigned_abs()) }
    }
}

fn unreadable(offset: u64, why: &str) -> io::Error {
    io::Error::other(format!("the page at offset {} cannot be read ({why})", offset & !4095))
}

fn read_only() -> std::future::Ready<io::Result<()>> {
    std::future::ready(Err(io::Error::from_raw_os_error(libc::EROFS)))
}

impl Storage for MappedStorage {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        IoMemory::zeroed(len)
    }

    fn alignment(&self) -> usize {
        512
    }

    fn size_bytes(&self) -> u64 {
        self.shared.size_bytes
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        // SAFETY: the handle keeps its bytes alive during the call.
        std::future::ready(unsafe { self.shared.read(offset, into.as_ptr(), into.len()) })
    }

    fn write(&self, _: u64, _: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        read_only()
    }

    fn write_durable(&self, _: u64, _: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        read_only()
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        std::future::ready(Ok(()))
    }

    fn extend(&self, _: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        read_only()
    }

    fn punch(&self, _: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        read_only()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use futures_lite::future;

    use super::*;
    use crate::io::{OpenOptions, PoolFile};

    const SIZE: u64 = 1 << 20;

    fn pool() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pool");
        let file = File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(&[8; 8192], 4096 - 100).unwrap();
        (folder, path)
    }

    #[test]
    fn mapped_pool_is_read_and_not_written() {
        let (_folder, path) = pool();
        let storage = MappedStorage::open(&path).unwrap();
        assert_eq!(storage.size_bytes(), SIZE);
        let memory = storage.allocate(16384);
        future::block_on(storage.read(0, &memory)).unwrap();
        assert_eq!(memory.to_vec(), [vec![0; 3996], vec![8; 8192], vec![0; 4196]].concat());
        let error = future::block_on(storage.write(0, &memory)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        let error = future::block_on(storage.read(SIZE - 4096, &memory)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn page_that_cannot_be_read_is_an_error_and_not_a_signal() {
        let (_folder, path) = pool();
        // The first goes through the mapping block by block, the other for whole ranges too.
        let storages = [MappedStorage::open(&path).unwrap(), MappedStorage::open_unlocked(&path).unwrap()];
        File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
        for storage in storages {
            let mut bytes = vec![0; 16384];
            for offset in [0, 8192] {
                let error = storage.read_at(offset, &mut bytes[offset as usize..12288]).unwrap_err();
                assert!(error.to_string().contains("offset 8192"), "{error}");
            }
            assert_eq!(bytes[4096], 8);
            storage.read_at(0, &mut bytes[..8192]).unwrap();
        }
    }

    #[test]
    fn mapping_made_anew_reads_the_same() {
        let (_folder, path) = pool();
        let storage = MappedStorage::open(&path).unwrap();
        let mut bytes = vec![0; 4096];
        for _ in 0..READS_MAX + 10 {
            storage.read_at(8192, &mut bytes).unwrap();
        }
        assert_eq!(storage.shared.reads.get(), 10);
        assert_eq!(bytes[..3996], [8; 3996]);
    }

    #[test]
    fn forbidden_call_is_replaced_by_reading_the_file() {
        let (_folder, path) = pool();
        let storage = MappedStorage::open(&path).unwrap();
        storage.shared.forbidden.set(true);
        let mut bytes = vec![0; 8192];
        storage.read_at(4096 - 100, &mut bytes).unwrap();
        assert_eq!(bytes, [8; 8192]);
        File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
        assert!(storage.read_at(4096, &mut bytes).unwrap_err().to_string().contains("offset 8192"));
    }

    #[test]
    fn readers_share_a_pool_and_keep_engines_out() {
        let (_folder, path) = pool();
        let one = MappedStorage::open(&path).unwrap();
        let other = MappedStorage::open(&path).unwrap();
        assert!(matches!(PoolFile::open(&path, OpenOptions::default()).unwrap_err(), Error::Busy(_)));
        drop((one, other));
        let engine = PoolFile::open(&path, OpenOptions::default()).unwrap();
        assert!(matches!(MappedStorage::open(&path).map(drop).unwrap_err(), Error::Busy(_)));
        MappedStorage::open_unlocked(&path).unwrap();
        drop(engine);
    }

    #[test]
    fn empty_file_is_a_storage_of_size_0() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let storage = MappedStorage::open(file.path()).unwrap();
        assert_eq!(storage.size_bytes(), 0);
        assert_eq!(storage.read_at(0, &mut [0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        storage.read_at(0, &mut []).unwrap();
    }
}

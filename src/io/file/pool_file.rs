//! Opening and creating the file or device of a pool.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;

use super::content::sniff;
use super::host::{Host, direct_alignment, has_shared_extents};
use super::host_claim::HostClaim;
use super::lock::{take, try_claim, try_fence};
use crate::engine::Memory;
use crate::error::{Error, Result};
use crate::format::HOST_CLAIM;
use crate::io::IoMemory;
use crate::units::BLOCK_BYTES;

/// How to open a pool's file.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Accepts a network file system, a shared (reflinked) file, and btrfs with copy-on-write.
    pub force: bool,
    /// How long to wait for whoever holds the pool. A successor waits for its predecessor's last I/O.
    pub wait: Duration,
    /// The caller was started by the front that holds the [`PoolClaim`](super::PoolClaim), and takes only the fence.
    pub claimed_by_front: bool,
    /// Takes a block device that another host had open, did not leave, and shows no sign of life on. Should it live all the
    /// same, the pool is destroyed.
    pub take_over: bool,
}

/// The file or device of a pool: open for direct I/O, locked, and found fit.
///
/// The locks are held until this is dropped, or the [`FileStorage`](super::FileStorage) that it became.
#[derive(Debug)]
pub struct PoolFile {
    file: File,
    path: PathBuf,
    block_device: bool,
    host: Host,
    alignment: usize,
    size_bytes: u64,
    locked: bool,
    host_claim: Option<HostClaim>,
}

impl PoolFile {
    /// Creates the file of a pool with `size_bytes`, sparse, or takes an existing empty one or a block device.
    ///
    /// `force` makes it take a file or device that holds something, and a host it would refuse. A file that did not
    /// exist before does not exist after a failure either.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when it holds something; [`Error::InvalidInput`] for a size that is not a multiple of the
    /// block, larger than the device or more than the host can hold, and for a host that is refused;
    /// [`Error::Busy`] when it is in use.
    pub fn create(path: &Path, size_bytes: u64, force: bool) -> Result<Self> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES) || i64::try_from(size_bytes).is_err() {
            let message =
                format!("pool size {size_bytes} is not a multiple of {BLOCK_BYTES} bytes, or is out of range");
            return Err(Error::InvalidInput(message));
        }
        match std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => Self::create_in(file, path, size_bytes, force).inspect_err(|_| {
                if let Err(error) = std::fs::remove_file(path) {
                    tracing::warn!(%error, path = %path.display(), "cannot remove the half-made pool file");
                }
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let file = open_for_io(path, Duration::ZERO)?;
                Self::create_in(file, path, size_bytes, force)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NotFound(format!("the folder of {} does not exist", path.display())))
            }
            Err(error) => Err(Error::io(format!("creating {}", path.display()), error)),
        }
    }

    fn create_in(mut file: File, path: &Path, size_bytes: u64, force: bool) -> Result<Self> {
        let failed = |operation: &str, error| Error::io(format!("{operation} {}", path.display()), error);
        // Locked before a byte is looked at: nobody's pool is emptied under them.
        take(path, Duration::ZERO, || try_claim(&file, true).and_then(|()| try_fence(&file, true)))?;
        let block_device = is_block_device(path, &file)?;
        let host = Host::of(&file, block_device).map_err(|error| failed("looking at the host of", error))?;
        if let Some(objection) = host.objection()
            && !force
        {
            return Err(refused(path, &objection));
        }
        let present = file.seek(SeekFrom::End(0)).map_err(|error| failed("measuring", error))?;
        if !force && let Some(content) = sniff(&file, present).map_err(|error| failed("reading", error))? {
            return Err(Error::AlreadyExists(format!(
                "{} holds {content}; choose another place, or --force to destroy it",
                path.display()
            )));
        }
        if block_device {
            if size_bytes > present {
                let message =
                    format!("pool size {size_bytes} is larger than {}, which has {present} bytes", path.display());
                return Err(Error::InvalidInput(message));
            }
        } else {
            // Emptied first, so that it is sparse throughout and btrfs accepts the flag.
            file.set_len(0).map_err(|error| failed("emptying", error))?;
            host.prepare_empty(&file).map_err(|error| failed("preparing", error))?;
            file.set_len(size_bytes).map_err(|error| match error.raw_os_error() {
                Some(libc::EFBIG | libc::EINVAL) => Error::InvalidInput(format!(
                    "a file of {size_bytes} bytes is larger than {} at {} can hold",
                    host.name,
                    path.display()
                )),
                _ => failed("sizing", error),
            })?;
            file.sync_all().map_err(|error| failed("syncing", error))?;
            sync_folder_of(path).map_err(|error| failed("syncing the folder of", error))?;
        }
        Self::for_direct_io(file, path, host, block_device, true)?.claim_for_host(force)
    }

    /// Opens the file of an existing pool.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Busy`] when it is in use for longer than `options.wait`; [`Error::InvalidInput`] for
    /// a host that is refused or does no direct I/O.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self> {
        let file = open_for_io(path, options.wait)?;
        if !options.claimed_by_front {
            take(path, options.wait, || try_claim(&file, true))?;
        }
        take(path, options.wait, || try_fence(&file, true))?;
        let block_device = is_block_device(path, &file)?;
        let looking = |error| Error::io(format!("looking at the host of {}", path.display()), error);
        let host = Host::of(&file, block_device).map_err(looking)?;
        if !options.force
            && let Some(objection) = host.objection_to(&file).map_err(looking)?
        {
            return Err(refused(path, &objection));
        }
        Self::for_direct_io(file, path, host, block_device, true)?.claim_for_host(options.take_over)
    }

    /// Takes a descriptor that is open for reading and writing; `path` is for messages. No lock is taken or given up.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] when its host does no direct I/O.
    pub fn from_fd(fd: OwnedFd, path: &Path) -> Result<Self> {
        let file = File::from(fd);
        let block_device = is_block_device(path, &file)?;
        let host = Host::of(&file, block_device)
            .map_err(|error| Error::io(format!("looking at the host of {}", path.display()), error))?;
        Self::for_direct_io(file, path, host, block_device, false)
    }

    /// Switches to direct I/O and proves that it works.
    fn for_direct_io(mut file: File, path: &Path, host: Host, block_device: bool, locked: bool) -> Result<Self> {
        let failed = |operation: &str, error| Error::io(format!("{operation} {}", path.display()), error);
        let no_direct_io = || {
            Error::InvalidInput(format!(
                "{} at {} does no direct I/O (O_DIRECT); put the pool on ext4, xfs or a block device",
                host.name,
                path.display()
            ))
        };
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| failed("looking at", error.into()))?;
        rustix::fs::fcntl_setfl(&file, flags | OFlags::DIRECT).map_err(|error| match error {
            rustix::io::Errno::INVAL => no_direct_io(),
            error => failed("switching to direct I/O on", error.into()),
        })?;
        let alignment = direct_alignment(&file, block_device)
            .map_err(|error| failed("measuring the sectors of", error))?
            .ok_or_else(no_direct_io)?;
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(|error| failed("measuring", error))?;
        // Some hosts accept the flag and refuse the I/O.
        probe_read(&file, alignment).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => no_direct_io(),
            _ => failed("reading the start of", error),
        })?;
        Ok(Self { file, path: path.to_owned(), block_device, host, alignment, size_bytes, locked, host_claim: None })
    }

    /// Keeps other hosts from a block device. One that is too small for a pool is left alone.
    fn claim_for_host(mut self, take_over: bool) -> Result<Self> {
        if self.block_device && self.size_bytes > HOST_CLAIM.plus(1).offset_bytes() {
            self.host_claim = Some(HostClaim::take(&self.file, &self.path, take_over)?);
        }
        Ok(self)
    }

    /// Claims a block device for this host, for whoever opens it next here. Answers the host that it was taken from. Nothing
    /// is done about a file.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn claim_host(path: &Path, options: OpenOptions) -> Result<Option<String>> {
        let block_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
        let claim = if block_device { Self::open(path, options)?.host_claim } else { None };
        Ok(claim.and_then(|mut claim| {
            claim.keep(true);
            claim.taken_from.take()
        }))
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes when it was opened.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Name of the host file system, or "block device".
    pub fn host_name(&self) -> &str {
        &self.host.name
    }

    /// What direct I/O on it is aligned to, in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Whether blocks of it are shared with another file, as after a reflink copy. Only its first extents are looked at.
    ///
    /// # Errors
    /// What the host answers.
    pub fn is_shared(&self) -> io::Result<bool> {
        if self.block_device || !self.host.shares_extents() {
            return Ok(false);
        }
        has_shared_extents(&self.file)
    }

    pub(super) fn into_parts(self) -> Parts {
        Parts {
            fd: self.file.into(),
            path: self.path,
            block_device: self.block_device,
            alignment: self.alignment,
            size_bytes: self.size_bytes,
            locked: self.locked,
            host_claim: self.host_claim,
        }
    }
}

/// What a [`FileStorage`](super::FileStorage) takes over.
pub(super) struct Parts {
    pub fd: OwnedFd,
    pub path: PathBuf,
    pub block_device: bool,
    pub alignment: usize,
    pub size_bytes: u64,
    pub locked: bool,
    pub host_claim: Option<HostClaim>,
}

fn refused(path: &Path, objection: &str) -> Error {
    Error::InvalidInput(format!("{}: {objection} (--force to use it all the same)", path.display()))
}

/// Opens what exists at `path`, and is a file or a block device, with `flags` of open(2).
pub(in crate::io) fn open_existing(path: &Path, flags: i32) -> Result<File> {
    let opening = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Error::NotFound(format!("there is no pool at {}", path.display())),
        io::ErrorKind::ReadOnlyFilesystem => {
            Error::ReadOnly(format!("{} is on a read-only file system", path.display()))
        }
        _ => Error::io(format!("opening {}", path.display()), error),
    };
    // Looked at before it is opened: opening a FIFO waits for its other end, and a tape rewinds.
    let kind = std::fs::metadata(path).map_err(opening)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::InvalidInput(format!("{} is neither a file nor a block device", path.display())));
    }
    let write = flags & libc::O_ACCMODE == libc::O_RDWR;
    let flags = flags & !libc::O_ACCMODE;
    std::fs::OpenOptions::new().read(true).write(write).custom_flags(flags).open(path).map_err(opening)
}

/// Opens for reading and writing; a device so that nobody mounts it or opens it likewise. Waits for a device as for a
/// lock.
fn open_for_io(path: &Path, wait: Duration) -> Result<File> {
    let block_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let flags = if block_device { libc::O_RDWR | libc::O_EXCL } else { libc::O_RDWR };
    let mut opened = None;
    take(path, wait, || match open_existing(path, flags) {
        // Only EBUSY says that a device is held; EACCES of an open is about permissions.
        Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
            Err(io::Error::from_raw_os_error(libc::EBUSY))
        }
        other => {
            opened = Some(other);
            Ok(())
        }
    })?;
    opened.unwrap_or_else(|| Err(Error::Busy(format!("pool {} is in use", path.display()))))
}

fn is_block_device(path: &Path, file: &File) -> Result<bool> {
    let metadata = file.metadata().map_err(|error| Error::io(format!("looking at {}", path.display()), error))?;
    Ok(metadata.file_type().is_block_device())
}

/// Reads a sector at the start directly. A file that is shorter is left to the engine's own checks.
fn probe_read(file: &File, alignment: usize) -> io::Result<()> {
    let sector = IoMemory::zeroed(alignment);
    // SAFETY: the kernel writes at most `len` bytes to memory that lives until the call returns.
    let read = unsafe { libc::pread(file.as_raw_fd(), sector.as_ptr().cast(), sector.len(), 0) };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the name of a new file durable.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

//! The claim of a host on a pool that stands on a block device, which other hosts may see as well.
//!
//! Locks are known to one kernel only. So whoever opens such a pool for use says so in a block of the device, and goes on
//! saying so once a second, from a thread of its own: neither a slow command nor a full ring makes it look dead. Another
//! host that finds the claim refuses, for ever when it sees it change, until told otherwise when it does not
//! ([`OpenOptions::take_over`](super::OpenOptions)).
//!
//! What this cannot do is to stop a host that is cut off or suspended and comes back: its writes are under way before it
//! reads that its claim is gone. Then [`is_lost`](HostClaim::is_lost) holds, and nothing more is written. Only hardware
//! (persistent reservations, switching it off) shuts a host out.
//!
//! A claim outlives the process that dies, and one that hands over to a successor: it is of the kernel's run, and within
//! one kernel the locks decide. It is taken away when the last I/O has ended, by [`Drop`] or
//! [`leave`](HostClaim::leave), unless it is to be [kept](HostClaim::keep).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::lock::{take, try_fence};
use crate::engine::Memory;
use crate::error::{Error, Result};
use crate::format::{self, HOST_CLAIM, HOST_NAME_BYTES_MAX};
use crate::io::IoMemory;
use crate::units::BLOCK_SIZE;

/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(1);
/// How long a sign of life is waited for before a claim counts as one of the past.
const WATCH: Duration = Duration::from_secs(3);
/// The same, before a claim of another host is taken over.
const WATCH_LONG: Duration = Duration::from_secs(10);
/// Time between two looks at a claim that is watched.
const LOOK: Duration = Duration::from_millis(250);
/// How long the last I/O of who had the device open here may take to end.
const LAST_IO: Duration = Duration::from_secs(10);
/// Two hosts that found no claim at the same instant see by then whose is there: longer than a write takes.
const SETTLE: Duration = Duration::from_millis(250);

/// A claim that this process keeps alive.
#[derive(Debug)]
pub(super) struct HostClaim {
    shared: Arc<Shared>,
    beating: Option<JoinHandle<()>>,
    /// The host that it was taken from.
    pub(super) taken_from: Option<String>,
}

#[derive(Debug)]
struct Shared {
    /// The description that does the pool's I/O: the fence on it holds for a beat, too.
    file: File,
    path: PathBuf,
    host: Host,
    stop: Mutex<bool>,
    stopped: Condvar,
    lost: AtomicBool,
    keep: AtomicBool,
}

impl HostClaim {
    /// Claims the device for this host. `file` is open for direct I/O.
    ///
    /// # Errors
    /// [`Error::Elsewhere`] when another host has it open, or had it and did not leave it; what the device answers.
    pub(super) fn take(file: &File, path: &Path, take_over: bool) -> Result<Self> {
        let failed = |error| Error::io(format!("claiming {} for this host", path.display()), error);
        let host = Host::this();
        let found = find(file).map_err(failed)?;
        let taken_from = match &found {
            Some(other) if other.boot != host.boot => host.settle_with(other, file, path, take_over)?,
            _ => None,
        };
        let beat = found.as_ref().map_or(0, |found| found.beat).wrapping_add(1);
        write(file, Some(&host.claim(beat)), libc::RWF_DSYNC).map_err(failed)?;
        if found.is_none_or(|found| found.boot != host.boot) {
            thread::sleep(SETTLE);
            if find(file).map_err(failed)?.is_none_or(|now| now.boot != host.boot) {
                return Err(Error::Elsewhere(format!("another host opens pool {} at this moment", path.display())));
            }
        }
        let file = file.try_clone().map_err(failed)?;
        let shared = Arc::new(Shared {
            file,
            path: path.to_owned(),
            host,
            stop: Mutex::new(false),
            stopped: Condvar::new(),
            lost: AtomicBool::new(false),
            keep: AtomicBool::new(false),
        });
        let beats = Arc::clone(&shared);
        let beating = thread::Builder::new().name("host-claim".into()).spawn(move || beats.beat(beat));
        Ok(Self { shared, beating: Some(beating.map_err(|error| Error::io("a thread", error))?), taken_from })
    }

    /// Whether another host has taken the device.
    pub(super) fn is_lost(&self) -> bool {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Whether the claim stays when this goes: a successor on this host is to find it.
    pub(super) fn keep(&self, keep: bool) {
        self.shared.keep.store(keep, Ordering::Relaxed);
    }

    /// Takes the claim away. Nothing is written to the device afterwards.
    pub(super) fn leave(&mut self) {
        let Some(beating) = self.beating.take() else { return };
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
        if beating.join().is_err() {
            tracing::error!(path = %self.shared.path.display(), "the thread of the host claim has panicked");
        }
        if self.is_lost() || self.shared.keep.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = write(&self.shared.file, None, libc::RWF_DSYNC) {
            let path = self.shared.path.display();
            tracing::warn!(%error, %path, "the claim of this host stays; another host will want --take-over");
        }
    }
}

impl Drop for HostClaim {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Shared {
    fn beat(&self, mut beat: u64) {
        let mut failing = false;
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (guard, _) = self.stopped.wait_timeout(stop, BEAT).unwrap_or_else(PoisonError::into_inner);
            stop = guard;
            if *stop {
                return;
            }
            beat = beat.wrapping_add(1);
            match self.show_life(beat) {
                Ok(true) => failing = false,
                Ok(false) => {
                    self.lost.store(true, Ordering::Relaxed);
                    tracing::error!(path = %self.path.display(), "another host has taken this pool; nothing more is written");
                    return;
                }
                // The pool's own I/O tells what is wrong with the device; once is enough here.
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(%error, path = %self.path.display(), "no sign of life could be written");
                }
                Err(_) => {}
            }
        }
    }

    /// Whether the claim was still this host's.
    fn show_life(&self, beat: u64) -> io::Result<bool> {
        match read(&self.file) {
            Ok(found) if found.as_ref().is_none_or(|found| found.boot != self.host.boot) => return Ok(false),
            Err(error) if error.kind() != io::ErrorKind::InvalidData => return Err(error),
            _ => {}
        }
        // Others see it without its being durable.
        write(&self.file, Some(&self.host.claim(beat)), 0)?;
        Ok(true)
    }
}

/// This host, as a claim names it.
#[derive(Clone, Debug)]
struct Host {
    machine: Uuid,
    boot: Uuid,
    name: String,
}

impl Host {
    fn this() -> Self {
        let id = |path| fs::read_to_string(path).ok().and_then(|text| Uuid::try_parse(text.trim()).ok());
        let mut name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        while name.len() > HOST_NAME_BYTES_MAX {
            name.pop();
        }
        Self {
            machine: id("/etc/machine-id").unwrap_or_default(),
            boot: id("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            name,
        }
    }

    fn claim(&self, beat: u64) -> format::HostClaim {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        format::HostClaim { machine: self.machine, boot: self.boot, beat, time, name: self.name.clone() }
    }

    /// Decides what a claim of another kernel's run means. Answers the host whose pool it is no longer.
    fn settle_with(
        &self,
        other: &format::HostClaim,
        file: &File,
        path: &Path,
        take_over: bool,
    ) -> Result<Option<String>> {
        let pool = path.display();
        let watch = if take_over { WATCH_LONG } else { WATCH };
        tracing::info!(%pool, host = %other, seconds = watch.as_secs(), "watching for signs of life of another host");
        match watched(file, other, watch).map_err(|error| Error::io(format!("watching {pool}"), error))? {
            Life::Shown => {
                return Err(Error::Elsewhere(format!("pool {pool} is in use on host {other}; stop it there")));
            }
            Life::Left => return Ok(None),
            Life::None => {}
        }
        // Its own, of before a reboot.
        if !self.machine.is_nil() && other.machine == self.machine {
            tracing::info!(%pool, "this host had the pool open when it went down");
            return Ok(None);
        }
        if take_over {
            tracing::warn!(%pool, host = %other, "taken over");
            return Ok(Some(other.to_string()));
        }
        Err(Error::Elsewhere(format!(
            "pool {pool} was open on host {other}, which did not leave it and shows no sign of life; when you are sure that \
             it is off, use --take-over: if it is only suspended or cut off, and writes again, the pool is destroyed"
        )))
    }
}

/// Takes away a claim of this host that was kept for a successor, when there will be none. Nothing is done about a file.
///
/// # Errors
/// [`Error::Busy`] when somebody here still has the device open; what it answers.
pub fn leave_host(path: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("leaving {} to other hosts", path.display()), error);
    if !fs::metadata(path).map_err(failed)?.file_type().is_block_device() {
        return Ok(());
    }
    let file = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).map_err(failed)?;
    take(path, LAST_IO, || try_fence(&file, true))?;
    match find(&file).map_err(failed)? {
        Some(found) if found.boot == Host::this().boot => write(&file, None, libc::RWF_DSYNC).map_err(failed),
        _ => Ok(()),
    }
}

/// Refuses a device that another host has open at this moment. It may be read otherwise.
///
/// # Errors
/// [`Error::Elsewhere`]; what the device answers.
pub(in crate::io) fn refuse_another_host(path: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("looking at who has {}", path.display()), error);
    // Not through the page cache, which knows nothing of what other hosts write.
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).map_err(failed)?;
    let Some(other) = find(&file).map_err(failed)?.filter(|found| found.boot != Host::this().boot) else {
        return Ok(());
    };
    if watched(&file, &other, WATCH).map_err(failed)? == Life::Shown {
        return Err(Error::Elsewhere(format!("pool {} is in use on host {other}; look at it there", path.display())));
    }
    Ok(())
}

/// What a claim does while it is watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    /// It stays as it is.
    None,
    /// It changes.
    Shown,
    /// It goes.
    Left,
}

fn watched(file: &File, claim: &format::HostClaim, watch: Duration) -> io::Result<Life> {
    let began = Instant::now();
    while began.elapsed() < watch {
        thread::sleep(LOOK);
        match find(file)? {
            None => return Ok(Life::Left),
            Some(now) if now != *claim => return Ok(Life::Shown),
            Some(_) => {}
        }
    }
    Ok(Life::None)
}

/// The claim that stands on the device. One that is not sound is none.
fn find(file: &File) -> io::Result<Option<format::HostClaim>> {
    match read(file) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        found => found,
    }
}

/// The claim that stands on the device; `InvalidData` for one that is not sound.
fn read(file: &File) -> io::Result<Option<format::HostClaim>> {
    let memory = IoMemory::zeroed(BLOCK_SIZE);
    // SAFETY: the kernel writes at most `len` bytes to memory that lives until the call returns.
    let done = retry(|| unsafe {
        libc::pread(file.as_raw_fd(), memory.as_ptr().cast(), memory.len(), HOST_CLAIM.offset_bytes().cast_signed())
    })?;
    if done < BLOCK_SIZE {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    format::HostClaim::decode(&memory.to_vec())
        .map_err(|check| io::Error::new(io::ErrorKind::InvalidData, check.to_string()))
}

/// Writes the claim, or none, with `flags` of pwritev2(2).
fn write(file: &File, claim: Option<&format::HostClaim>, flags: i32) -> io::Result<()> {
    let memory = claim.map_or_else(|| IoMemory::zeroed(BLOCK_SIZE), |claim| IoMemory::from_bytes(&claim.encode()[..]));
    let entry = libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: memory.len() };
    let offset = HOST_CLAIM.offset_bytes().cast_signed();
    // SAFETY: the kernel reads `len` bytes of memory that lives until the call returns.
    let done = retry(|| unsafe { libc::pwritev2(file.as_raw_fd(), &raw const entry, 1, offset, flags) })?;
    if done < BLOCK_SIZE { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

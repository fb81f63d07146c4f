//! Loop devices on the front's files.
//!
//! Plain blocking calls. Attaching makes the kernel ask the FUSE session about the file before the call returns, so **none
//! of this may run in the engine process or on a serving thread of the front**: a thread that waits for its own process to
//! answer cannot be killed, and its process could not be succeeded. A helper process does it ([`helper`]).
//!
//! `loopdev-3` finds and detaches devices; what it lacks (LOOP_CONFIGURE with a block size, status) is an ioctl on its
//! descriptor.

mod abi;
pub mod helper;
mod in_use;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use loopdev::{LoopControl, LoopDevice};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::in_use::{Use, users};
use crate::error::{Error, Result};
use crate::units::VolumeId;

/// How long others may take every free device before us.
const ATTACH_PATIENCE: Duration = Duration::from_secs(10);
/// Longest pause after one was taken.
const ATTACH_PAUSE_MOST: Duration = Duration::from_millis(5);
/// Numbers behind the last device that are tried for new ones.
const NEW_NUMBERS: u32 = 64;
/// How long a detached device may take to let go of its file: probes of udev and the like hold it for a moment.
const DETACH_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether a device has no other user any more.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Beginning of the name that we give our devices.
const LABEL: &str = "plywood/";

/// What to attach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachRequest {
    /// The volume's file in the front's directory.
    pub file: PathBuf,
    /// The pool, and the volume in it: the device carries both, so that it is found again.
    pub pool: Uuid,
    /// The volume.
    pub volume: VolumeId,
    /// Logical and physical sector size, 512 or 4096.
    pub sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Set where its writes wait when the pool is full.
    #[serde(default)]
    pub waiting: Option<WaitingWrites>,
}

/// What a device whose writes wait when the pool is full may have outstanding, so that reads and other volumes keep queue
/// entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingWrites {
    /// Writes at a time.
    pub most: u32,
    /// Bytes of each: those of one queue entry.
    pub bytes: u32,
}

/// A device of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// /dev/loopN.
    pub device: PathBuf,
    /// N.
    pub number: u32,
    /// The volume.
    pub volume: VolumeId,
    /// Writes are refused.
    pub read_only: bool,
    /// Its file is in the file system of another front, which must have died: it gives nothing but errors.
    pub stale: bool,
}

fn label(pool: Uuid, volume: VolumeId) -> String {
    // 8 + 32 + 1 + at most 20 bytes of the 63 there are.
    format!("{LABEL}{}/{volume}", pool.simple())
}

fn volume_of_label(text: &str, pool: Uuid) -> Option<VolumeId> {
    parse_label(text).filter(|(of, _)| *of == pool).map(|(_, volume)| volume)
}

/// The pool and the volume that a label names.
fn parse_label(text: &str) -> Option<(Uuid, VolumeId)> {
    let (uuid, volume) = text.strip_prefix(LABEL)?.split_once('/')?;
    let pool = Uuid::try_parse(uuid).ok().filter(|pool| pool.simple().to_string() == uuid)?;
    Some((pool, VolumeId(volume.parse().ok()?)))
}

fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn sys_path(number: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}/{name}"))
}

fn control() -> Result<LoopControl> {
    LoopControl::open().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::NotFound(
            "/dev/loop-control does not exist: this kernel has no loop devices, or modprobe loop".into(),
        ),
        io::ErrorKind::PermissionDenied => Error::io("opening /dev/loop-control (are you root?)", error),
        _ => Error::io("opening /dev/loop-control", error),
    })
}

/// Attaches a file as the first free loop device, with direct I/O, which is verified.
///
/// # Errors
/// [`Error::InvalidInput`] for another sector size; what the host answers; [`Error::Incompatible`] when the device would
/// not do direct I/O, in which case it is detached again.
pub fn attach(request: &AttachRequest) -> Result<Attached> {
    if !matches!(request.sector_size, 512 | 4096) {
        return Err(Error::InvalidInput(format!("sector size {} is neither 512 nor 4096", request.sector_size)));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(!request.read_only)
        .custom_flags(libc::O_CLOEXEC)
        .open(&request.file)
        .map_err(|error| Error::io(format!("opening {}", request.file.display()), error))?;
    let control = control()?;
    let label = label(request.pool, request.volume);
    let began = Instant::now();
    let mut pause = Duration::from_micros(100);
    loop {
        let device = match control.next_free() {
            Ok(device) => device,
            // The node of a device that was just made may come a moment later.
            Err(error) if error.kind() == io::ErrorKind::NotFound && began.elapsed() < ATTACH_PATIENCE => {
                sleep(ATTACH_PAUSE_MOST);
                continue;
            }
            Err(error) => return Err(Error::io("finding a free loop device", error)),
        };
        let number = device.minor().map_err(|error| Error::io("looking at a loop device", error))?;
        let configured =
            abi::configure(descriptor(&device), &file, request.sector_size, request.read_only, label.as_bytes());
        match configured {
            Ok(()) => {}
            // The driver names a device as free until it is configured, to all that ask.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && began.elapsed() < ATTACH_PATIENCE => {
                sleep(pause);
                pause = (pause * 2).min(ATTACH_PAUSE_MOST);
                continue;
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(Error::Busy("every free loop device was taken by somebody else first; try again".into()));
            }
            Err(error) => return Err(Error::io(format!("attaching {}", device_path(number).display()), error)),
        }
        if let Err(error) = verify_direct_io(&device, number) {
            let _ = device.detach();
            return Err(error);
        }
        tune(number, request.waiting);
        tracing::info!(volume = %request.volume, device = %device_path(number).display(), "attached");
        return Ok(Attached {
            device: device_path(number),
            number,
            volume: request.volume,
            read_only: request.read_only,
            stale: false,
        });
    }
}

fn descriptor(device: &LoopDevice) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the device that it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// The driver drops direct I/O without a word when it cannot do it; the page cache would then stand between the volume's
/// flushes and the engine, and grow with everything written.
fn verify_direct_io(device: &LoopDevice, number: u32) -> Result<()> {
    let status = abi::status(descriptor(device)).map_err(|error| Error::io("asking a loop device's status", error))?;
    let shown = fs::read_to_string(sys_path(number, "loop/dio")).unwrap_or_default();
    if status.flags & abi::FLAG_DIRECT_IO == 0 || shown.trim() != "1" {
        return Err(Error::Incompatible("this kernel's loop device refuses direct I/O on a FUSE file".into()));
    }
    Ok(())
}

/// Has `spares` free devices at least, set up as volumes want them, so that attaching need not.
///
/// # Errors
/// When devices cannot be listed or made.
pub fn prepare(spares: usize) -> Result<()> {
    let listing = |error| Error::io("looking at the loop devices", error);
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/sys/block").map_err(listing)? {
        numbers.extend(loop_number(&entry.map_err(listing)?.file_name()));
    }
    numbers.sort_unstable();
    // The lowest are taken first: the rest are not looked at.
    let mut free: Vec<u32> = numbers.iter().copied().filter(|number| !is_attached(*number)).take(spares).collect();
    let first_new = numbers.last().map_or(0, |last| last + 1);
    for number in first_new..=first_new + NEW_NUMBERS {
        if free.len() == spares {
            break;
        }
        match control()?.add(number) {
            Ok(_) => free.push(number),
            // Somebody else was faster, or its node comes a moment later.
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {}
            Err(error) => return Err(Error::io("making a loop device", error)),
        }
    }
    // Each waits for its own queue only.
    thread::scope(|scope| {
        for number in free {
            scope.spawn(move || tune(number, None));
        }
    });
    Ok(())
}

/// Queue settings; a kernel that lacks one does without. What a device has already is not set again: each of the first
/// three freezes its queue, 10 to 25 ms on Linux 6.18 even where nothing changes, and devices are used again and again.
///
/// To bound the writes of a device takes a scheduler, which keeps the rest back.
pub(super) fn tune(number: u32, waiting: Option<WaitingWrites>) {
    // Else multiples of the payload size, so that a large request is cut without a rest.
    let largest_kib = waiting.map_or(1024, |writes| (writes.bytes >> 10).clamp(4, 1024)).to_string();
    if let Some(WaitingWrites { most, .. }) = waiting {
        let writes = most.to_string();
        set(number, "queue/scheduler", "mq-deadline");
        // It moved with Linux 6.19.
        if !set(number, "queue/iosched/async_depth", &writes) && !set(number, "queue/async_depth", &writes) {
            tracing::warn!(number, "the device's writes are not bounded: waiting for space, they may hold up others");
        }
    } else {
        set(number, "queue/scheduler", "none");
    }
    let settings = [
        ("queue/max_sectors_kb", largest_kib.as_str()),
        ("queue/wbt_lat_usec", "0"),
        ("queue/nomerges", "0"),
        ("queue/rq_affinity", "1"),
        ("queue/read_ahead_kb", "1024"),
    ];
    for (name, value) in settings {
        set(number, name, value);
    }
}

/// Sets a queue setting that has another value. Answers whether it has this one now.
fn set(number: u32, name: &str, value: &str) -> bool {
    let path = sys_path(number, name);
    if fs::read_to_string(&path).is_ok_and(|text| is_set(&text, value)) {
        return true;
    }
    let outcome = fs::write(path, value);
    if let Err(error) = &outcome {
        tracing::debug!(number, name, %error, "queue setting not taken");
    }
    outcome.is_ok()
}

/// Whether a queue setting's text says `value`: alone, or in brackets among the choices.
fn is_set(text: &str, value: &str) -> bool {
    let text = text.trim();
    text == value
        || text.split_whitespace().any(|choice| choice.strip_prefix('[') == Some(format!("{value}]").as_str()))
}

/// Detaches a device and waits until it has let go of its file. Nothing happens when it is not attached.
///
/// The driver detaches at once when nobody else has the device open, and with its last user otherwise, without a word about
/// which it will be. So it is asked, and told to stay attached when the device did not go: to look first who has it open
/// would mean to read all descriptors of all processes, most often for nothing.
///
/// # Errors
/// [`Error::Busy`] that names mount points, in any mount namespace, and processes. The device stays attached then.
pub fn detach(number: u32) -> Result<()> {
    let path = device_path(number);
    let deadline = Instant::now() + DETACH_PATIENCE;
    let Some(carried) = open(number)?.and_then(|device| Carried::by(&device)) else { return Ok(()) };
    loop {
        // O_EXCL fails while the device is mounted anywhere, or otherwise claimed, and keeps it from being mounted until it
        // is asked to go. The number may be somebody else's by now.
        let Some(device) = claim(number, deadline)?.filter(|device| carried.is_on(device)) else { break };
        match abi::clear(&device) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(busy(number)),
            Err(error) => return Err(Error::io(format!("detaching {}", path.display()), error)),
        }
        // The last descriptor, ours, lets the driver finish.
        drop(device);
        if has_gone(number) {
            break;
        }
        // Somebody has it open: probes go after a moment. It must not be mounted meanwhile and go with its file system.
        let Some(device) = open(number)?.filter(|device| carried.is_on(device)) else { break };
        abi::stay_attached(&device).map_err(|error| Error::io(format!("keeping {}", path.display()), error))?;
        if Instant::now() > deadline {
            return Err(busy(number));
        }
    }
    tracing::info!(device = %path.display(), "detached");
    Ok(())
}

/// What a device carries: its file, and the name that it was given; empty where the file's front has died and cannot say.
#[derive(Debug, PartialEq, Eq)]
struct Carried(Option<(u64, u64, String)>);

impl Carried {
    /// None when nothing is attached.
    fn by(device: &File) -> Option<Self> {
        match abi::status_of(device) {
            Ok(status) => Some(Self(Some((status.device, status.inode, status.name())))),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => None,
            Err(_) => Some(Self(None)),
        }
    }

    /// Nothing shows that it is not.
    fn is_on(&self, device: &File) -> bool {
        Self::by(device).is_some_and(|Self(now)| now.is_none() || self.0.is_none() || now == self.0)
    }
}

/// Opens a device as anybody may. None when there is none, or one that is being detached.
fn open(number: u32) -> Result<Option<File>> {
    let path = device_path(number);
    match File::open(&path) {
        Ok(device) => Ok(Some(device)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => Ok(None),
        Err(error) => Err(Error::io(format!("opening {}", path.display()), error)),
    }
}

fn is_attached(number: u32) -> bool {
    sys_path(number, "loop").exists()
}

/// Waits a moment for a device that was asked to go: Linux 5.17 lets go of the file a little later.
fn has_gone(number: u32) -> bool {
    let deadline = Instant::now() + LOOK_AGAIN;
    let mut pause = Duration::from_micros(100);
    while is_attached(number) {
        if Instant::now() > deadline {
            return false;
        }
        sleep(pause);
        pause *= 2;
    }
    true
}

/// Whether nobody has a device mounted, also where no mount can be seen: one that an import works in is in no namespace.
///
/// # Errors
/// [`Error::Busy`] when somebody has.
pub fn check_free(number: u32) -> Result<()> {
    claim(number, Instant::now() + DETACH_PATIENCE).map(drop)
}

/// Opens a device so that nobody can mount it. None when it is not attached any more.
fn claim(number: u32, deadline: Instant) -> Result<Option<File>> {
    let path = device_path(number);
    loop {
        match OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&path) {
            Ok(device) => return Ok(Some(device)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => return Ok(None),
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                return Err(Error::io(format!("opening {}", path.display()), error));
            }
            Err(_) => {}
        }
        // The mounts of a namespace whose last process has ended are undone a moment later.
        let mounted = in_use::users(number).iter().any(|user| matches!(user, Use::Mounted { .. }));
        if mounted || Instant::now() > deadline {
            return Err(busy(number));
        }
        sleep(LOOK_AGAIN);
    }
}

fn busy(number: u32) -> Error {
    let users: Vec<_> = in_use::users(number).iter().map(Use::to_string).collect();
    let path = device_path(number);
    Error::Busy(match users.as_slice() {
        [] => format!("{} is in use, by a mount namespace without a process perhaps", path.display()),
        users => format!("{} is in use: {}", path.display(), users.join("; ")),
    })
}

/// Tells a device that its volume has grown to `size_bytes`, which the engine knows already.
///
/// # Errors
/// What the host answers; EPERM when the volume has another size.
pub fn grow(number: u32, file: &Path, size_bytes: u64) -> Result<()> {
    let path = device_path(number);
    // The kernel's idea of the file's size is old; the truncation to its true size corrects it.
    let opened = OpenOptions::new().write(true).open(file);
    opened
        .and_then(|opened| opened.set_len(size_bytes))
        .map_err(|error| Error::io(format!("showing the kernel the size of {}", file.display()), error))?;
    let device = LoopDevice::open(&path).map_err(|error| Error::io(format!("opening {}", path.display()), error))?;
    device.set_capacity().map_err(|error| Error::io(format!("growing {}", path.display()), error))
}

/// Has the host's device manager look at a device again, because its volume is called something else now. Best effort: where
/// there is none, nobody is told.
pub fn announce(number: u32) {
    if let Err(error) = fs::write(sys_path(number, "uevent"), "change") {
        tracing::debug!(number, %error, "uevent");
    }
}

/// The devices that carry volumes of this pool, also those that a front left behind which has died: their files are not in
/// the file system mounted on `directory`.
///
/// # Errors
/// When /sys or the directory cannot be read.
pub fn list(pool: Uuid, directory: &Path) -> Result<Vec<Attached>> {
    let own =
        fs::metadata(directory).map_err(|error| Error::io(format!("looking at {}", directory.display()), error))?.dev();
    let mut found = Vec::new();
    for (number, status) in labelled()? {
        if let Some(volume) = volume_of_label(&status.name(), pool) {
            found.push(Attached {
                device: device_path(number),
                number,
                volume,
                read_only: status.flags & abi::FLAG_READ_ONLY != 0,
                stale: status.device != own,
            });
        }
    }
    Ok(found)
}

/// A device that carries a volume of some pool, whether anybody serves it or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ours {
    /// /dev/loopN.
    pub device: PathBuf,
    /// The pool.
    pub pool: Uuid,
    /// The volume.
    pub volume: VolumeId,
}

/// All devices that carry volumes of ours, of whatever pool.
///
/// # Errors
/// When /sys cannot be read.
pub fn list_ours() -> Result<Vec<Ours>> {
    let ours = |(number, status): (u32, abi::Info)| {
        let (pool, volume) = parse_label(&status.name())?;
        Some(Ours { device: device_path(number), pool, volume })
    };
    Ok(labelled()?.into_iter().filter_map(ours).collect())
}

/// The loop devices in use, by number.
fn labelled() -> Result<Vec<(u32, abi::Info)>> {
    let entries = fs::read_dir("/sys/block").map_err(|error| Error::io("listing /sys/block", error))?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(number) = loop_number(&name) else { continue };
        if !is_attached(number) {
            continue;
        }
        // It may be detached, or deleted, at any moment: then it is not in the list.
        let Ok(device) = File::open(device_path(number)) else { continue };
        let Ok(status) = abi::status_of(&device) else { continue };
        found.push((number, status));
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found)
}

/// N of "loopN".
fn loop_number(name: &OsStr) -> Option<u32> {
    name.to_str()?.strip_prefix("loop")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_name_the_pool_and_the_volume_and_fit() {
        let pool = Uuid::from_u128(u128::MAX - 5);
        let text = label(pool, VolumeId(u64::MAX));
        assert!(text.len() < 64);
        assert_eq!(volume_of_label(&text, pool), Some(VolumeId(u64::MAX)));
        assert_eq!(volume_of_label(&text, Uuid::nil()), None);
        assert_eq!(volume_of_label("/var/lib/some.img", pool), None);
        assert_eq!(volume_of_label("plywood/x", pool), None);
    }

    #[test]
    fn settings_that_stand_are_known() {
        assert!(is_set("[none] mq-deadline kyber bfq\n", "none"));
        assert!(!is_set("none [mq-deadline] kyber bfq\n", "none"));
        assert!(is_set("1024\n", "1024"));
        assert!(!is_set("10240\n", "1024"));
    }

    #[test]
    fn only_loop_devices_have_a_number() {
        assert_eq!(loop_number(OsStr::new("loop17")), Some(17));
        assert_eq!(loop_number(OsStr::new("loop17p1")), None);
        assert_eq!(loop_number(OsStr::new("vda")), None);
    }

    #[test]
    fn strange_sector_sizes_are_refused() {
        let request = AttachRequest {
            file: "/nonexistent".into(),
            pool: Uuid::nil(),
            volume: VolumeId(1),
            sector_size: 1024,
            read_only: false,
            waiting: None,
        };
        assert!(matches!(attach(&request), Err(Error::InvalidInput(_))));
    }
}

//! `plywood serve`: the process that holds the front, and starts the engine process and its successors.
//!
//! Beside what the front itself holds, this process holds the listening control socket, so that a command that comes
//! while an engine is succeeded waits instead of failing.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::engine_process::{CONTROL, METRICS, STARTS};
use super::lookup::{FoundPool, daemon_socket};
use super::memory_budget::MemoryBudget;
use super::successor::Inherited;
use super::{logging, lookup, places, process, service_manager};
use crate::engine::PendingLog;
use crate::error::{Error, Result};
use crate::export::front::{Ending, EngineCommand, Front, FrontEvent, FrontOptions};
use crate::export::fuse::TransportChoice;
use crate::export::link::{EXIT_FINISHED, EXIT_REPLACE_FRONT, EXIT_SUCCEED_ME};
use crate::export::shared::SharedPendingLog;
use crate::io::{OpenOptions, PoolClaim, PoolFile, leave_host};

/// How long a command that works on the file may hold up the start.
const TURN: Duration = Duration::from_secs(10);
/// Time between two looks at who is in the way.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How to serve.
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// Started by a command: leave its session.
    pub background: bool,
    /// How requests come from the kernel.
    pub transport: TransportChoice,
    /// Attach what was attached when the daemon stopped.
    pub attach_all: bool,
    /// What sealing in the background may read a second, in bytes; 0 for none.
    pub seal_bytes: u64,
    /// Memory for payloads and mapping nodes together, in bytes; what suits the machine unless told.
    pub memory_bytes: Option<u64>,
    /// A line for the shell that is run when the pool crosses a threshold.
    pub on_threshold: Option<String>,
    /// A port of this machine on which metrics are served over HTTP.
    pub metrics: Option<SocketAddr>,
}

/// Serves a pool until SIGTERM, SIGINT or a stop command, and until nothing that is attached is in use any more. A second
/// signal ends it whatever is in use.
///
/// # Errors
/// What keeps the daemon from starting, and what is still attached at its end.
pub fn serve(pool: &FoundPool, options: &ServeOptions) -> Result<()> {
    process::become_io_flusher();
    logging::start(logging::DAEMON);
    process::require_root("serving a pool")?;
    require_devices()?;
    let budget = MemoryBudget::new(options.memory_bytes)?;
    if options.background {
        // Fails when it leads its process group already, and then it is in no session of the starter's to leave.
        let _ = rustix::process::setsid();
    }
    let handed_back = service_manager::handed_back();
    let (claim, control) = match Inherited::take()? {
        Some(inherited) => inherited.into_parts(pool)?,
        None => (claim(pool)?, ControlSocket::bind(pool)?),
    };
    let spare = claim.try_clone().map_err(|error| Error::io("duplicating a descriptor", error))?;
    // Looked up before the mount namespace is another: under chroot the kernel would tell a path of the machine's root then.
    let program = std::env::current_exe().map_err(|error| Error::io("finding the plywood program", error))?;
    process::enter_own_mount_namespace(device_of(&pool.path)?)?;
    process::stay_in_memory();
    process::outlive_others();
    let directory = places::mount_directory(pool.uuid);
    places::make_private_directory(&directory)?;
    let kept = handed_back.and_then(|memory| kept_changes(pool, memory));
    let is_new = kept.is_none();
    let engine = engine_command(program.clone(), pool, options, &budget, &control)?;
    // A refusal is told once, and not by one engine process after the other.
    let own = OpenOptions { claimed_by_front: true, wait: TURN, ..OpenOptions::default() };
    PoolFile::claim_host(&pool.path, own)?;
    let front = Front::start(FrontOptions {
        transport: options.transport,
        payload_budget_bytes: usize::try_from(budget.payload_bytes).unwrap_or(usize::MAX),
        classic_queues: budget.classic_queues,
        claim: Some(claim),
        pending: kept,
        ..FrontOptions::new(&pool.name, pool.uuid, directory.clone(), engine)
    })?;
    if is_new {
        service_manager::keep_instead(front.pending_memory());
    }
    let stop = front.stop_handle();
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| Error::io("signal handlers", error))?;
    let forward = {
        let stop = stop.clone();
        move || {
            for _ in signals.forever() {
                service_manager::stopping();
                stop.stop();
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(forward).map_err(|error| Error::io("a thread", error))?;
    let mut ready = false;
    let served = front.run(|event| {
        tell(pool, event);
        match event {
            // A successor is no news to a service manager.
            FrontEvent::Serving { .. } if !std::mem::replace(&mut ready, true) => service_manager::ready(&pool.name),
            FrontEvent::GaveUp => {
                service_manager::gave_up();
                // I/O on the devices fails once this process is gone, and whoever wants the pool can have it anew.
                stop.stop();
            }
            _ => {}
        }
    });
    if matches!(served, Ok(Ending::Replace)) {
        tracing::info!(pool = %pool.name, "nothing is attached: the program on disk replaces this one");
        return Err(Inherited::pass_on(&program, spare, &control));
    }
    drop(control);
    // An engine process that has closed the pool has done so already.
    if let Err(error) = leave_host(&pool.path) {
        tracing::warn!(pool = %pool.name, %error, "other hosts find the pool still claimed");
    }
    if served.is_ok() {
        tracing::info!(pool = %pool.name, "stopped");
        // Best effort: it is empty, and in the way of nobody.
        let _ = fs::remove_dir(directory);
    }
    served.map(drop)
}

/// Memory of pending changes that the service manager has kept while no process of the pool's lived: for the next engine,
/// when nobody has had the pool since. Only then it belongs to what is there.
fn kept_changes(pool: &FoundPool, memory: OwnedFd) -> Option<SharedPendingLog> {
    let kept = SharedPendingLog::keep(memory, pool.uuid);
    let kept =
        kept.inspect_err(|error| tracing::error!(%error, "what was kept of an earlier daemon is refused")).ok()?;
    let refused = match lookup::last_session(&pool.path) {
        // It ends with the daemon that was poisoned, as without a service manager.
        _ if kept.is_poisoned() => "that daemon's pool was poisoned",
        Ok(session) if session == kept.session() => {
            if kept.holds_changes() {
                tracing::warn!(pool = %pool.name, "the last daemon died with changes that the pool had not yet; they are taken over");
            }
            return Some(kept);
        }
        Ok(_) => "somebody else has had the pool since",
        Err(_) => "the pool cannot be read",
    };
    if kept.holds_changes() {
        tracing::error!(pool = %pool.name, "changes that the last daemon had acknowledged and not recorded are lost: {refused}");
    }
    None
}

/// Takes the right to start engines. A command that works on the file is waited for, another daemon is not.
fn claim(pool: &FoundPool) -> Result<PoolClaim> {
    let began = Instant::now();
    loop {
        match PoolClaim::acquire(&pool.path, LOOK_AGAIN) {
            Err(Error::Busy(_)) if daemon_socket(pool.uuid)?.is_some() => {
                return Err(Error::Busy(format!("a daemon serves pool {} already", pool.name)));
            }
            Err(Error::Busy(_)) if began.elapsed() < TURN => {}
            claimed => return claimed,
        }
    }
}

fn tell(pool: &FoundPool, event: &FrontEvent) {
    let pool = &pool.name;
    match event {
        FrontEvent::Started { pid } => tracing::info!(%pool, pid, "engine process started"),
        FrontEvent::Serving { pid, after } => {
            let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(%pool, pid, after_ms, "engine process serves");
        }
        FrontEvent::Ended { pid, status, plight } => {
            let how = if status
                .code()
                .is_some_and(|code| [EXIT_FINISHED, EXIT_SUCCEED_ME, EXIT_REPLACE_FRONT].contains(&code))
            {
                String::new()
            } else {
                format!(", {plight}")
            };
            tracing::info!(%pool, pid, "engine process ended with {status}{how}");
        }
        FrontEvent::GaveUp => {
            tracing::error!(
                %pool,
                "engine processes die one after the other; the daemon ends, and its devices give errors from now on; \
                 `plywood attach --all` starts it anew"
            );
        }
    }
}

/// Said before anything is started, by name: the daemon would be of no use.
fn require_devices() -> Result<()> {
    for (device, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
        if !fs::exists(device).unwrap_or(false) {
            return Err(Error::NotFound(format!(
                "{device} is missing: this kernel has no {module}, or this container may not use it; try modprobe {module}"
            )));
        }
    }
    Ok(())
}

/// Number of the device that a pool file stands on, or that a pool is.
fn device_of(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::metadata(path).map_err(|error| Error::io(path.display().to_string(), error))?;
    let number = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    Ok((rustix::fs::major(number), rustix::fs::minor(number)))
}

fn engine_command(
    program: PathBuf,
    pool: &FoundPool,
    options: &ServeOptions,
    budget: &MemoryBudget,
    control: &ControlSocket,
) -> Result<EngineCommand> {
    let failed = |error| Error::io("preparing the engine process", error);
    let mut arguments: Vec<OsString> = vec!["--pool".into(), pool.path.clone().into(), "engine".into()];
    if options.attach_all {
        arguments.push("--attach-all".into());
    }
    arguments.push(format!("--seal-bytes={}", options.seal_bytes).into());
    arguments.push(format!("--cache-bytes={}", budget.cache_bytes).into());
    let starts = memfd_create("plywood-starts", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let listener = control.listener.try_clone().map_err(failed)?;
    let mut descriptors = vec![(CONTROL.to_owned(), listener), (STARTS.to_owned(), File::from(starts).into())];
    if let Some(command) = &options.on_threshold {
        arguments.push(format!("--on-threshold={command}").into());
    }
    if let Some(address) = options.metrics {
        descriptors.push((METRICS.to_owned(), metrics_port(address)?.into()));
    }
    Ok(EngineCommand { program, arguments, descriptors })
}

/// Listens for who collects metrics. The socket is the front's: whoever comes while an engine is succeeded waits.
fn metrics_port(address: SocketAddr) -> Result<TcpListener> {
    // There is no password: what is told is for this machine.
    if !address.ip().is_loopback() {
        return Err(Error::InvalidInput(format!(
            "metrics on {address}: only an address of this machine, as 127.0.0.1"
        )));
    }
    TcpListener::bind(address).map_err(|error| Error::io(format!("metrics on {address}"), error))
}

/// The listening socket; its file goes away with it.
pub(super) struct ControlSocket {
    pub(super) listener: OwnedFd,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens. What a front left that died is taken away: the claim on the pool is ours.
    fn bind(pool: &FoundPool) -> Result<Self> {
        places::make_private_directory(Path::new(places::RUN_DIRECTORY))?;
        let path = places::socket(pool.uuid);
        let failed = |error| Error::io(format!("{}: control socket", path.display()), error);
        // The claim is ours, so this is an engine that has not noticed yet that its front has died.
        let began = Instant::now();
        while daemon_socket(pool.uuid)?.is_some() && began.elapsed() < TURN {
            thread::sleep(LOOK_AGAIN);
        }
        if daemon_socket(pool.uuid)?.is_some() {
            return Err(Error::Busy(format!(
                "a daemon serves another file with the uuid of {}; a pool must not be copied under its daemon",
                pool.path.display()
            )));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // The directory is closed to others, so there is no instant at which they could connect.
        let listener = UnixListener::bind(&path).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self { listener: listener.into(), path })
    }

    /// Goes on with the socket of the program that this process was before.
    pub(super) fn inherit(pool: &FoundPool, listener: OwnedFd) -> Self {
        Self { listener, path: places::socket(pool.uuid) }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, "{} stays behind", self.path.display());
        }
    }
}

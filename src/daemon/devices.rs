//! Commands as the engine process does them: attach and detach, and everything that devices have to follow.
//!
//! Runs on control threads. The kernel asks the FUSE session about a file while it is attached, so the loop devices are
//! handled by helper processes, never here: a thread that waited in the kernel for an answer that only its own
//! process can give could not even be killed.

mod ending;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use uuid::Uuid;

use super::changes::Changes;
use super::device_locks::{DeviceLocks, OneVolume};
use super::engine_process::Engine;
use super::events::{self, Draft, EventRing};
use super::execute::execute;
use super::figures::figures;
use super::protocol::{Attachment, Command, Detached, EventKind, Failure, Figures, Kept, Reply};
use super::remote::Remote;
use super::spares::{SPARES, Spares};
use super::{attributes, metrics, mounts, places, process, server};
use crate::engine::{Underway, VolumeInfo, Work};
use crate::error::{Error, Result};
use crate::export::loopdev::helper::{Helpers, LoopCommand};
use crate::export::loopdev::{AttachRequest, Attached, WaitingWrites, announce};
use crate::export::shared::SharedBoard;
use crate::units::VolumeId;

/// Our own build, also after its file was replaced or deleted.
const OWN_BUILD: &str = "/proc/self/exe";
/// The hidden command that calls [`serve`](crate::export::loopdev::helper::serve).
pub const LOOP_HELPER: &str = "loop-helper";
/// How long helpers of an engine that died may take: one that detaches waits for probes, 5 s at most.
const HELPER_PATIENCE: Duration = Duration::from_secs(30);
/// How long changes under way may take that somebody waits for.
const SETTLE_PATIENCE: Duration = Duration::from_secs(30);
/// How often a stop looks whether what was in use still is.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The engine process as its clients see it.
pub(super) struct Daemon {
    remote: Remote<Engine>,
    events: Arc<EventRing>,
    board: SharedBoard,
    pool: Uuid,
    front_pid: u32,
    directory: PathBuf,
    devices: DeviceLocks,
    spares: Spares,
    helpers: Arc<Helpers>,
    changes: Changes,
    replaceable: bool,
    /// This process ends, and another answers whoever asks again.
    replacing: AtomicBool,
    stopping: AtomicBool,
    forced: AtomicBool,
}

/// What is known of a volume before something is done with its device.
struct Known {
    volume: VolumeInfo,
    attachment: Option<Attachment>,
    attributes: BTreeMap<String, Vec<u8>>,
}

impl Known {
    async fn of(engine: &Engine, volume: VolumeInfo) -> Result<Self> {
        let attachment = engine.control.devices.borrow().get(&volume.id).cloned();
        let attributes = engine.control.pool.attributes(volume.id).await?;
        Ok(Self { volume, attachment, attributes })
    }

    /// The mark of an attached volume.
    fn mark(&self) -> Option<&Vec<u8>> {
        self.attributes.get(attributes::ATTACHED)
    }
}

/// How an engine process serves.
pub(super) struct Serving {
    /// The pool.
    pub(super) pool: Uuid,
    /// Process id of the front.
    pub(super) front_pid: u32,
    /// Engine processes before this one.
    pub(super) restarts: u64,
    /// Attach what was attached when the daemon stopped.
    pub(super) attach_all: bool,
    /// Where it stands what is being done.
    pub(super) board: SharedBoard,
    /// The front can be replaced.
    pub(super) replaceable: bool,
}

/// Takes the figures on the engine thread, and makes metrics of them on the caller's.
pub(super) fn metrics_of(remote: Remote<Engine>) -> impl Fn() -> Result<String> + Send + 'static {
    move || Ok(metrics::text(taken_figures(&remote)?))
}

fn taken_figures(remote: &Remote<Engine>) -> Result<Figures> {
    remote.call(|engine| async move { figures(&engine.control, &engine.server.counters()) })
}

impl Daemon {
    /// Finds out which devices there are already, and begins to listen to clients and signals.
    ///
    /// # Errors
    /// When threads or signal handlers cannot be had.
    pub(super) fn start(
        remote: Remote<Engine>,
        events: Arc<EventRing>,
        serving: Serving,
        listener: UnixListener,
    ) -> Result<()> {
        let Serving { pool, front_pid, restarts, attach_all, board, replaceable } = serving;
        let helpers = Arc::new(Helpers::new(OWN_BUILD.into(), helper_arguments(pool).into()));
        let of_spares = Arc::clone(&helpers);
        let daemon = Arc::new(Self {
            remote,
            events,
            board,
            pool,
            front_pid,
            directory: places::mount_directory(pool),
            devices: DeviceLocks::default(),
            spares: Spares::start(move || of_spares.run(&LoopCommand::Prepare { spares: SPARES }).map(drop))?,
            helpers,
            changes: Changes::default(),
            replaceable,
            replacing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            forced: AtomicBool::new(false),
        });
        let signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| Error::io("signal handlers", error))?;
        let watcher = Arc::clone(&daemon);
        spawn("signals", move || watcher.watch(signals))?;
        spawn("devices", move || {
            // Clients wait in the socket's queue until it is known what is attached.
            daemon.recover(restarts, attach_all);
            let handler = move |command| {
                let done = Arc::clone(&daemon).handle(command);
                // The threads of a killed front end one after the other, and the first tells us to stop.
                if done.is_err() && daemon.stopping.load(Ordering::Acquire) {
                    thread::sleep(LOOK_AGAIN);
                }
                // With the front its devices have died. Whoever asks hears that nobody answers any more, and starts another.
                while !daemon.front_lives() {
                    thread::park();
                }
                done
            };
            if let Err(error) = server::listen(listener, Arc::new(handler)) {
                tracing::error!(%error, "control socket: thread");
            }
        })
    }

    /// Does a command.
    fn handle(self: Arc<Self>, command: Command) -> Result<Reply, Failure> {
        while self.replacing.load(Ordering::Acquire) {
            thread::sleep(LOOK_AGAIN);
        }
        let stopping = self.stopping.load(Ordering::Acquire);
        if stopping
            && !matches!(command, Command::Detach { .. } | Command::DetachAll | Command::Stop { .. })
            && !command.is_read_only()
        {
            return Err(Error::Busy("the daemon is stopping; try again when it has ended".into()).into());
        }
        // What is asked again and again is not told.
        let asked = (!command.is_read_only() || command == Command::PoolCheck).then(|| command.clone());
        if let Some(draft) = asked.as_ref().and_then(events::begun) {
            self.events.post(draft);
        }
        let underway = asked.as_ref().map(|asked| Underway::new(&self.board, work_of(asked)));
        let change = command.changes_volumes().then(|| self.changes.begin());
        let done = Arc::clone(&self).answer(command);
        drop(change);
        drop(underway);
        match (&done, &asked) {
            (Ok(reply), Some(asked)) => {
                for draft in events::done(asked, reply) {
                    self.events.post(draft);
                }
            }
            (Err(failure), Some(asked)) => {
                if let Some(draft) = events::begun(asked) {
                    let text = format!("{}: {}", draft.text, failure.message);
                    self.events.post(Draft { kind: EventKind::Ended, text, ..draft });
                }
            }
            _ => {}
        }
        done
    }

    fn answer(self: Arc<Self>, command: Command) -> Result<Reply, Failure> {
        let reply = match command {
            Command::Events { after, wait_ms } => {
                Reply::Events(self.events.after(after, Duration::from_millis(wait_ms))?)
            }
            Command::Settle => {
                if !self.changes.settle(SETTLE_PATIENCE) {
                    return Err(
                        Error::Busy("a change of a volume has been under way for long; try again".into()).into()
                    );
                }
                Reply::Done
            }
            Command::Figures => Reply::Figures(Box::new(taken_figures(&self.remote)?)),
            Command::Metrics => Reply::Metrics(metrics::text(taken_figures(&self.remote)?)),
            Command::Attach { name, read_only } => {
                let (_device, known) = self.lock_volume(&name)?;
                Reply::Attached(vec![self.attach(&known, read_only)?])
            }
            Command::AttachAll => Reply::Attached(self.attach_all()?),
            Command::Detach { name } => {
                let (_device, known) = self.lock_volume(&name)?;
                let id = known.volume.id;
                let Some(attachment) = known.attachment else {
                    // A predecessor may have died between detaching and forgetting.
                    self.forget(id)?;
                    return Err(Error::NotFound(format!("{name} is not attached; nothing to detach")).into());
                };
                self.detach(id, &attachment, true)?;
                Reply::Done
            }
            Command::DetachAll => Reply::Detached(self.detach_all(true)?),
            Command::Upgrade => {
                self.upgrade()?;
                Reply::Done
            }
            Command::Stop { force } => {
                self.stop(force)?;
                Reply::Done
            }
            command => self.change(command)?,
        };
        Ok(reply)
    }

    /// What the engine does. What has to do with a volume's device, too, does not meet attaching it half-way.
    fn change(&self, command: Command) -> Result<Reply> {
        let (Command::VolumeResize { name, .. }
        | Command::VolumeOnFull { name, .. }
        | Command::VolumeRename { name, .. }
        | Command::VolumeDelete { name, .. }
        | Command::SnapshotDelete { name }
        | Command::SnapshotRollback { volume: name, .. }) = &command
        else {
            return self.execute(command);
        };
        let (_device, known) = self.lock_volume(name)?;
        match command {
            Command::VolumeResize { .. } => self.resize(command),
            Command::VolumeOnFull { .. } => self.on_full(command),
            Command::VolumeRename { .. } => self.rename(command),
            Command::VolumeDelete { detach: true, .. } => self.delete(&known, command),
            command => self.execute(command),
        }
    }

    fn tell(&self, kind: EventKind, volume: &str, text: String) {
        self.events.post(Draft::about(kind, volume, text));
    }

    /// The volume of that name, with which nobody else does anything.
    fn lock_volume(&self, name: &str) -> Result<(OneVolume<'_>, Known)> {
        loop {
            let device = self.devices.one(self.id_of(name)?);
            // Another may have got the name meanwhile.
            let known = self.look_up(name)?;
            if device.is_of(known.volume.id) {
                return Ok((device, known));
            }
        }
    }

    fn execute(&self, command: Command) -> Result<Reply> {
        self.remote.call(|engine| async move { execute(&engine.control, command).await })?
    }

    fn id_of(&self, name: &str) -> Result<VolumeId> {
        let name = name.to_owned();
        self.remote.call(|engine| async move { engine.control.find(&name).map(|volume| volume.id) })?
    }

    /// Asks for all at once: each question wakes the engine.
    fn look_up(&self, name: &str) -> Result<Known> {
        let name = name.to_owned();
        self.remote.call(|engine| async move {
            let volume = engine.control.find(&name)?;
            Known::of(&engine, volume).await
        })?
    }

    fn attachments(&self) -> Result<BTreeMap<VolumeId, Attachment>> {
        self.remote.call(|engine| async move { engine.control.devices.borrow().clone() })
    }

    fn set_mark(&self, id: VolumeId, mark: Option<Vec<u8>>) -> Result<()> {
        let changes = BTreeMap::from([(attributes::ATTACHED.to_owned(), mark)]);
        self.remote.call(move |engine| async move { engine.control.pool.set_attributes(id, changes).await })?
    }

    /// Takes the marks of an attached volume away.
    fn forget(&self, id: VolumeId) -> Result<()> {
        self.remote.call(move |engine| async move {
            let held = engine.control.pool.attributes(id).await?;
            let marks =
                [attributes::ATTACHED, attributes::ATTACHED_BY].into_iter().filter(|mark| held.contains_key(*mark));
            let changes: BTreeMap<_, _> = marks.map(|mark| (mark.to_owned(), None)).collect();
            if changes.is_empty() { Ok(()) } else { engine.control.pool.set_attributes(id, changes).await }
        })?
    }

    fn file(&self, id: VolumeId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn attach(&self, known: &Known, read_only: bool) -> Result<Attachment> {
        let Known { volume, attachment, .. } = known;
        let name = &volume.name;
        let read_only = read_only || volume.read_only;
        if let Some(attachment) = attachment {
            if attachment.read_only == read_only {
                return Ok(attachment.clone());
            }
            let (device, how) = (attachment.device.display(), if read_only { "for writing" } else { "read-only" });
            return Err(Error::Busy(format!("{name} is attached {how} as {device} already; detach it first")));
        }
        // First noted, then done: a successor knows of every device that there may be.
        let mark = Some(Vec::from(if read_only { "ro" } else { attributes::FOR_WRITING }));
        let is_marked = known.mark() == mark.as_ref();
        if !is_marked {
            self.set_mark(volume.id, mark)?;
        }
        let request = AttachRequest {
            file: self.file(volume.id),
            pool: self.pool,
            volume: volume.id,
            sector_size: volume.sector_size,
            read_only,
            waiting: self.waiting_writes(volume.waits_when_full)?,
        };
        let attached = self.helpers.run(&LoopCommand::Attach(request)).and_then(|devices| {
            devices.into_iter().next().ok_or_else(|| Error::Busy("no loop device was made; try again".into()))
        });
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) => {
                // What was to be brought back still is.
                if !is_marked && let Err(error) = self.set_mark(volume.id, known.mark().cloned()) {
                    tracing::warn!(volume = %name, "attach: {error}");
                }
                return Err(error);
            }
        };
        let attachment = Attachment { name: name.to_owned(), device: attached.device, read_only };
        tracing::info!(volume = %name, device = %attachment.device.display(), read_only, "attached");
        let how = if read_only { ", read-only" } else { "" };
        self.tell(EventKind::Attached, name, format!("{}{how}", attachment.device.display()));
        self.enter(volume.id, attachment.clone())?;
        // Last: it takes a processor from whoever waits for the answer.
        self.spares.see();
        Ok(attachment)
    }

    fn enter(&self, id: VolumeId, attachment: Attachment) -> Result<()> {
        self.remote.call(move |engine| async move {
            engine.control.devices.borrow_mut().insert(id, attachment);
        })
    }

    /// Detaches, and waits until the volume is not in use any more.
    fn detach(&self, id: VolumeId, attachment: &Attachment, forget: bool) -> Result<()> {
        let number = number(&attachment.device)?;
        let name = &attachment.name;
        self.helpers.run(&LoopCommand::Detach { number }).map_err(|error| self.why_busy(attachment, error))?;
        self.remote.call(move |engine| async move {
            engine.server.closed(id).await;
            engine.control.devices.borrow_mut().remove(&id);
        })?;
        tracing::info!(volume = %name, device = %attachment.device.display(), "detached");
        self.tell(EventKind::Detached, name, attachment.device.display().to_string());
        if forget { self.forget(id) } else { Ok(()) }
    }

    /// Names the mount points, and the processes that work in them.
    fn why_busy(&self, attachment: &Attachment, error: Error) -> Error {
        if !matches!(error, Error::Busy(_)) {
            return error;
        }
        let users = self.users(attachment);
        if users.is_empty() {
            return error;
        }
        let (name, device) = (&attachment.name, attachment.device.display());
        Error::Busy(format!("{name} ({device}) is in use: {users}; unmount it first"))
    }

    fn users(&self, attachment: &Attachment) -> String {
        let users = mounts::users(&attachment.device, &[std::process::id(), self.front_pid]);
        users.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    fn detach_all(&self, forget: bool) -> Result<Detached> {
        let _devices = self.devices.all();
        let mut outcome = Detached::default();
        for (id, attachment) in self.attachments()? {
            match self.detach(id, &attachment, forget) {
                Ok(()) => outcome.detached.push(attachment.name),
                Err(error @ (Error::Busy(_) | Error::Io { .. })) => {
                    let users = self.users(&attachment);
                    let reason = if users.is_empty() { error.to_string() } else { users };
                    let Attachment { name, device, .. } = attachment;
                    outcome.kept.push(Kept { name, device, reason });
                }
                Err(error) => return Err(error),
            }
        }
        if forget && let Err(error) = self.sorted_devices() {
            tracing::warn!("looking for devices of dead daemons: {error}");
        }
        Ok(outcome)
    }

    /// Attaches what has the mark of an attached volume and is not one. A volume that cannot be attached does not keep the
    /// others from it; the first failure is told at the end.
    fn attach_all(&self) -> Result<Vec<Attachment>> {
        let _devices = self.devices.all();
        let marked = self.remote.call(|engine| async move {
            let mut marked = Vec::new();
            for volume in engine.control.pool.volumes() {
                let known = Known::of(&engine, volume).await?;
                if known.mark().is_some() && !known.attributes.contains_key(attributes::EPHEMERAL) {
                    marked.push(known);
                }
            }
            Ok::<_, Error>(marked)
        })??;
        let (mut attached, mut failed) = (Vec::new(), None);
        for known in marked {
            match self.attach(&known, known.mark().is_some_and(|mark| mark == b"ro")) {
                Ok(attachment) => attached.push(attachment),
                Err(error) => {
                    tracing::error!(volume = %known.volume.name, "attach --all: {error}");
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(attached), Err)
    }

    /// A device shows the new size of its volume at once.
    fn resize(&self, command: Command) -> Result<Reply> {
        let reply = self.execute(command)?;
        if let Reply::Volume(volume) = &reply
            && let Some(device) = &volume.device
        {
            let id = VolumeId(volume.id);
            self.helpers.run(&LoopCommand::Grow {
                number: number(device)?,
                file: self.file(id),
                size_bytes: volume.size_bytes,
            })?;
        }
        Ok(reply)
    }

    /// What a volume's device may have outstanding; none where its writes do not wait.
    fn waiting_writes(&self, waits_when_full: bool) -> Result<Option<WaitingWrites>> {
        if !waits_when_full {
            return Ok(None);
        }
        self.remote.call(|engine| async move { engine.server.waiting_writes() }).map(Some)
    }

    fn on_full(&self, command: Command) -> Result<Reply> {
        let reply = self.execute(command)?;
        if let Reply::Volume(volume) = &reply
            && let Some(device) = &volume.device
        {
            let waiting = self.waiting_writes(volume.waits_when_full)?;
            self.helpers.run(&LoopCommand::Tune { number: number(device)?, waiting })?;
        }
        Ok(reply)
    }

    /// One change of the pool: the mark of an attached volume goes with the volume.
    fn delete(&self, known: &Known, command: Command) -> Result<Reply> {
        if let Some(attachment) = &known.attachment
            && !known.volume.protected
        {
            self.detach(known.volume.id, attachment, false)?;
        }
        self.execute(command)
    }

    fn rename(&self, command: Command) -> Result<Reply> {
        let reply = self.execute(command)?;
        if let Reply::Volume(volume) = &reply {
            let (id, name) = (VolumeId(volume.id), volume.name.clone());
            let device = self.remote.call(move |engine| async move {
                let mut devices = engine.control.devices.borrow_mut();
                let attachment = devices.get_mut(&id)?;
                attachment.name = name;
                Some(attachment.device.clone())
            })?;
            if let Some(device) = device {
                announce(number(&device)?);
            }
        }
        Ok(reply)
    }

    /// Finds the devices that a predecessor attached, and cleans up after an earlier daemon.
    fn recover(&self, restarts: u64, attach_all: bool) {
        if let Err(error) = wait_for_helpers_of_the_dead(self.pool) {
            tracing::error!("waiting for loop helpers of the engine before: {error}");
        }
        self.spares.see();
        if let Err(error) = self.find_devices() {
            tracing::error!("finding the loop devices of this pool: {error}");
        }
        if restarts > 0 {
            return;
        }
        if let Err(error) = self.drop_ephemeral() {
            tracing::error!("deleting what an earlier daemon left: {error}");
        }
        if attach_all && let Err(error) = self.attach_all() {
            tracing::error!("attach --all: {error}");
        }
    }

    fn find_devices(&self) -> Result<()> {
        let _devices = self.devices.all();
        for Attached { device, volume, read_only, .. } in self.sorted_devices()? {
            let known = self.remote.call(move |engine| async move { engine.control.pool.volume_by_id(volume) })?;
            match known {
                Ok(known) => self.enter(volume, Attachment { name: known.name, device, read_only })?,
                Err(error) => tracing::error!(device = %device.display(), "a device without a volume: {error}"),
            }
        }
        Ok(())
    }

    /// The devices of this front. Those of a front that has died give nothing but errors, and are taken away as soon as
    /// nobody has them mounted any more.
    fn sorted_devices(&self) -> Result<Vec<Attached>> {
        let found = self.helpers.run(&LoopCommand::List { pool: self.pool, directory: self.directory.clone() })?;
        let (dead, living): (Vec<_>, Vec<_>) = found.into_iter().partition(|device| device.stale);
        for Attached { device, number, volume, .. } in dead {
            match self.helpers.run(&LoopCommand::Detach { number }) {
                Ok(_) => tracing::info!(%volume, device = %device.display(), "a dead daemon's device is gone"),
                Err(error) => tracing::warn!(%volume, "a dead daemon's device: {error}"),
            }
        }
        Ok(living)
    }

    /// What lives only as long as its use has none any more when a daemon starts.
    fn drop_ephemeral(&self) -> Result<()> {
        let _devices = self.devices.all();
        self.remote.call(|engine| async move {
            let pool = &engine.control.pool;
            for volume in pool.volumes() {
                let attached = engine.control.devices.borrow().contains_key(&volume.id);
                if !attached && pool.attributes(volume.id).await?.contains_key(attributes::EPHEMERAL) {
                    tracing::info!(volume = %volume.name, "deleted: its use has ended with an earlier daemon");
                    pool.delete_volume(volume.id).await?;
                }
            }
            Ok(())
        })?
    }
}

/// The pool is there so that a successor knows its predecessor's helpers.
fn helper_arguments(pool: Uuid) -> [OsString; 2] {
    [LOOP_HELPER.into(), pool.to_string().into()]
}

/// A helper does what it has begun though its engine has died; opening a volume's file, it even waits for the successor. What
/// it attaches or detaches after the devices were listed would be known to nobody.
fn wait_for_helpers_of_the_dead(pool: Uuid) -> io::Result<()> {
    let began = Instant::now();
    for helper in process::strangers_with(&helper_arguments(pool))? {
        if !process::wait_for_end(helper, HELPER_PATIENCE.saturating_sub(began.elapsed()))? {
            tracing::error!(helper, "a loop helper of the engine before does not end; its device may not be found");
        }
    }
    Ok(())
}

/// What is noted of a command while it is done.
fn work_of(command: &Command) -> Work {
    match command {
        Command::Attach { .. } | Command::AttachAll => Work::Attach,
        Command::Detach { .. } | Command::DetachAll => Work::Detach,
        _ => Work::Command,
    }
}

/// N of `/dev/loopN`.
fn number(device: &Path) -> Result<u32> {
    let name = device.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_prefix("loop"));
    let number = name.and_then(|number| number.parse().ok());
    number.ok_or_else(|| Error::InvalidInput(format!("{} is not a loop device", device.display())))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = thread::Builder::new().name(name.into()).spawn(body);
    spawned.map(drop).map_err(|error| Error::io("starting a thread", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_loop_devices_are_read() {
        assert_eq!(number(Path::new("/dev/loop17")).unwrap(), 17);
        for odd in ["/dev/sda", "/dev/loop", "/dev/loop1p1", "/"] {
            assert!(number(Path::new(odd)).is_err(), "{odd}");
        }
    }
}

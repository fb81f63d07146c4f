//! What a command means on an open pool. The same code serves the engine process and a command that works on the file
//! directly; block devices are the daemon's own business and come on top (see `devices`).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use super::figures::{self, pool_info};
use super::filesystem::{self, FileSystem};
use super::protocol::{
    self, Attachment, Attributes, Bytes, Command, DIFF_RANGES, Diff, Hello, Keep, Range, Reply, SnapshotOf,
};
use super::watch::Told;
use super::{metrics, scrub, size_words};
use crate::engine::{Memory, NewClone, NewSnapshot, NewVolume, Pace, Pool, Progress, Storage, VolumeInfo};
use crate::error::{Error, Result};
use crate::format::{ATTRIBUTES_BYTES_MAX, ENTRIES_PER_NODE, Geometry, check_name};
use crate::io::{FileStorage, PunchStatistics};
use crate::units::VolumeId;

/// An open pool and what surrounds it.
pub struct Control<S: Medium> {
    /// The pool.
    pub pool: Pool<S>,
    /// What it stands on.
    pub medium: S,
    /// Its file.
    pub path: PathBuf,
    /// What is a block device at the moment.
    pub devices: RefCell<BTreeMap<VolumeId, Attachment>>,
    /// How far a check of it is that is under way.
    pub checking: Cell<Option<Progress>>,
    /// What is known beside what the engine knows.
    pub told: Told,
    /// The processes that serve it; none for a command that works on the file directly.
    pub daemon: Option<DaemonFacts>,
}

/// What a pool stands on, as far as commands are about it.
pub trait Medium: Storage + Clone {
    /// Makes it larger; durable on return.
    ///
    /// # Errors
    /// What the host says.
    fn grow(&self, size_bytes: u64) -> Result<()>;

    /// Bytes that the host has allocated to it.
    fn host_bytes(&self) -> u64;

    /// Bytes that the host can still give it; none when it has all it may have.
    fn host_free_bytes(&self) -> Option<u64>;

    /// What giving space back to the host came to.
    fn punching(&self) -> PunchStatistics;
}

impl Medium for FileStorage {
    fn grow(&self, size_bytes: u64) -> Result<()> {
        Self::grow(self, size_bytes)
    }

    fn host_bytes(&self) -> u64 {
        self.allocated_bytes().unwrap_or_else(|_| self.size_bytes())
    }

    fn host_free_bytes(&self) -> Option<u64> {
        // A host that cannot say it is not taken for a full one.
        Self::host_free_bytes(self).unwrap_or_default()
    }

    fn punching(&self) -> PunchStatistics {
        Self::punching(self)
    }
}

/// The processes that serve a pool.
#[derive(Clone, Debug)]
pub struct DaemonFacts {
    /// Process id of the front.
    pub front_pid: u32,
    /// Process id of the engine process.
    pub engine_pid: u32,
    /// How often the engine process was started again.
    pub engine_restarts: u64,
    /// How requests come from the kernel.
    pub transport: String,
}

/// Does one command. A refused command has changed nothing.
///
/// # Errors
/// What the engine answers, and [`Error::InvalidInput`] for what can never be right.
pub async fn execute<S: Medium>(control: &Control<S>, command: Command) -> Result<Reply> {
    let pool = &control.pool;
    match command {
        Command::Hello => hello(control),
        Command::PoolInfo => Ok(Reply::Pool(Box::new(pool_info(control)))),
        Command::Events { .. } => Err(Error::InvalidInput("events are the engine process's own".into())),
        // Here nobody else has one under way.
        Command::Settle => Ok(Reply::Done),
        Command::Figures => Ok(Reply::Figures(Box::new(figures::figures(control, &[])))),
        Command::Metrics => Ok(Reply::Metrics(metrics::text(figures::figures(control, &[])))),
        Command::PoolCheck => {
            let checked = pool.check_showing(&mut |at| control.checking.set(Some(at))).await;
            control.checking.set(None);
            Ok(Reply::Check(checked?.into()))
        }
        Command::PoolCheckProgress => Ok(Reply::Progress(control.checking.get())),
        Command::ScrubBegin => scrub::begin(pool).await,
        Command::ScrubStep { blocks } => scrub::step(pool, blocks).await,
        Command::ScrubTouched { damaged } => scrub::touched(pool, damaged).await,
        Command::PoolVerify { on } => {
            pool.verify_pool_on_read(on).await?;
            Ok(Reply::Pool(Box::new(pool_info(control))))
        }
        Command::PoolGrow { size_bytes } => {
            grow(control, size_bytes).await?;
            Ok(Reply::Pool(Box::new(pool_info(control))))
        }
        Command::PoolLimit { limit_bytes } => {
            let info = pool.info();
            if limit_bytes > 0 && limit_bytes < info.size_bytes {
                let (now, wanted) = (size_words(info.size_bytes), size_words(limit_bytes));
                return Err(Error::InvalidInput(format!("pool {} has {now} already; {wanted} is less", info.name)));
            }
            pool.set_size_limit(limit_bytes).await?;
            Ok(Reply::Pool(Box::new(pool_info(control))))
        }
        Command::PoolTrim => {
            pool.settle().await?;
            pool.trim().await?;
            Ok(Reply::Pool(Box::new(pool_info(control))))
        }
        Command::VolumeCreate { uuid, name, size_bytes, sector_size, quota_bytes, reservation_bytes, attributes } => {
            check_name(&name)?;
            check_size(size_bytes, sector_size)?;
            let attributes = bounded(attributes)?;
            let created = now_ns();
            let new =
                NewVolume { uuid, name, size_bytes, sector_size, quota_bytes, reservation_bytes, created, attributes };
            Ok(control.reply(pool.create_volume(new).await?))
        }
        Command::VolumeList => {
            let ids: Vec<VolumeId> = pool.volumes().iter().map(|volume| volume.id).collect();
            measure(control, &ids, LEAVES_FOR_A_LIST).await;
            Ok(Reply::Volumes(pool.volumes().into_iter().map(|volume| control.describe(volume)).collect()))
        }
        Command::VolumeInfo { name } => {
            measure(control, &[control.find(&name)?.id], u64::MAX).await;
            Ok(control.reply(control.find(&name)?))
        }
        Command::VolumeRename { name, to } => {
            check_name(&to)?;
            let volume = control.find(&name)?;
            pool.rename_volume(volume.id, &to).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::VolumeResize { name, size_bytes, force } => resize(control, &name, size_bytes, force).await,
        Command::VolumeDelete { name, .. } => delete(control, &control.find(&name)?).await,
        Command::VolumeProtect { name, protected } => {
            let volume = control.find(&name)?;
            pool.protect_volume(volume.id, protected).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::VolumeVerify { name, on } => {
            let volume = control.find(&name)?;
            pool.verify_volume_on_read(volume.id, on).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::VolumeZeroes { name, detect } => {
            let volume = control.find(&name)?;
            pool.detect_zeroes(volume.id, detect).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::SnapshotSeal { name } => {
            let snapshot = control.find(&name)?;
            require_snapshot(&snapshot)?;
            pool.seal(snapshot.id, Pace::Full).await?;
            Ok(control.reply(pool.volume_by_id(snapshot.id)?))
        }
        Command::VolumeOnFull { name, wait } => {
            let volume = control.find(&name)?;
            pool.set_on_full(volume.id, wait).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::VolumeQuota { name, quota_bytes } => {
            let volume = control.find(&name)?;
            pool.set_quota(volume.id, quota_bytes).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::VolumeReserve { name, reservation_bytes } => {
            let volume = control.find(&name)?;
            pool.set_reservation(volume.id, reservation_bytes).await?;
            Ok(control.reply(pool.volume_by_id(volume.id)?))
        }
        Command::SnapshotCreate { volume, uuid, name, attributes } => {
            check_name(&name)?;
            let origin = control.find(&volume)?;
            let new = NewSnapshot { uuid, name, created: now_ns(), attributes: bounded(attributes)? };
            Ok(control.reply(pool.create_snapshot(origin.id, new).await?))
        }
        Command::SnapshotCreateAll { snapshots } => {
            let mut wanted = Vec::new();
            for SnapshotOf { volume, uuid, name, attributes } in snapshots {
                check_name(&name)?;
                let new = NewSnapshot { uuid, name, created: now_ns(), attributes: bounded(attributes)? };
                wanted.push((control.find(&volume)?.id, new));
            }
            let taken = pool.create_snapshots(wanted).await?;
            Ok(Reply::Volumes(taken.into_iter().map(|volume| control.describe(volume)).collect()))
        }
        Command::SnapshotDelete { name } => {
            let snapshot = control.find(&name)?;
            require_snapshot(&snapshot)?;
            delete(control, &snapshot).await
        }
        Command::SnapshotRollback { volume, snapshot, keep } => roll_back(control, &volume, &snapshot, keep).await,
        Command::CloneCreate { snapshot, uuid, name, size_bytes, attributes } => {
            check_name(&name)?;
            let origin = control.find(&snapshot)?;
            require_snapshot(&origin)?;
            if let Some(size_bytes) = size_bytes {
                check_size(size_bytes, origin.sector_size)?;
            }
            let new = NewClone { uuid, name, created: now_ns(), size_bytes, attributes: bounded(attributes)? };
            Ok(control.reply(pool.create_clone(origin.id, new).await?))
        }
        Command::Diff { from, to, start_bytes } => {
            let from = from.map(|from| control.find(&from)).transpose()?.map(|from| from.id);
            let to = control.find(&to)?.id;
            // A leaf may bring as many again as it has entries.
            let page = pool.changed_page(from, to, start_bytes, DIFF_RANGES - ENTRIES_PER_NODE).await?;
            let ranges = page.ranges.into_iter();
            let ranges = ranges.map(|range| Range(range.offset_bytes, range.length_bytes, range.mapped)).collect();
            Ok(Reply::Diff(Diff { ranges, next_bytes: page.next_bytes }))
        }
        Command::AttributesGet { name } => {
            let attributes = pool.attributes(control.find(&name)?.id).await?;
            Ok(Reply::Attributes(attributes.into_iter().map(|(key, value)| (key, Bytes(value))).collect()))
        }
        Command::AttributesSet { name, changes } => {
            let volume = control.find(&name)?;
            set_attributes(control, &volume, changes).await?;
            Ok(Reply::Done)
        }
        Command::AttachList => Ok(Reply::Attached(control.devices.borrow().values().cloned().collect())),
        // Without a daemon nothing is attached; with one, this is not the way to detach.
        Command::DetachAll if control.daemon.is_none() => Ok(Reply::Detached(protocol::Detached::default())),
        Command::Attach { .. }
        | Command::AttachAll
        | Command::Detach { .. }
        | Command::DetachAll
        | Command::Upgrade
        | Command::Stop { .. } => {
            Err(Error::InvalidInput(format!("{}: only a daemon can do this", command.describe())))
        }
    }
}

impl<S: Medium> Control<S> {
    /// The volume of that name, or which pool does not have it.
    pub fn find(&self, name: &str) -> Result<VolumeInfo> {
        self.pool.volume(name).map_err(|error| match error {
            Error::NotFound(_) => {
                let pool = self.pool.info().name;
                Error::NotFound(format!(
                    "no volume or snapshot named {name:?} in pool {pool}; see plywood volume list --all"
                ))
            }
            error => error,
        })
    }

    /// A volume as it is told to clients.
    pub fn describe(&self, volume: VolumeInfo) -> protocol::Volume {
        let device = self.devices.borrow().get(&volume.id).map(|attachment| attachment.device.clone());
        let (origin, origin_uuid) = volume.origin.map_or((None, None), |origin| (origin.name, Some(origin.uuid)));
        protocol::Volume {
            id: volume.id.0,
            uuid: volume.uuid,
            name: volume.name,
            size_bytes: volume.size_bytes,
            sector_size: volume.sector_size,
            snapshot: volume.read_only,
            protected: volume.protected,
            sealed: volume.sealed,
            digest: volume.digest.map(hex::encode),
            verify_on_read: volume.verify_on_read,
            detect_zeroes: volume.detect_zeroes,
            waits_when_full: volume.waits_when_full,
            failed_writes: volume.failed_writes,
            origin,
            origin_uuid,
            depth: volume.depth,
            own_bytes: volume.own_bytes,
            mapped_bytes: volume.mapped_bytes,
            exclusive_bytes: volume.exclusive.map(|exclusive| exclusive.bytes),
            exclusive_age_seconds: volume.exclusive.map(|exclusive| exclusive.age_seconds),
            exclusive_unchanged_seconds: volume.exclusive.and_then(|exclusive| exclusive.unchanged_seconds),
            shared_bytes: volume.exclusive.map(|exclusive| volume.mapped_bytes.saturating_sub(exclusive.data_bytes)),
            quota_bytes: volume.quota_bytes,
            reservation_bytes: volume.reservation_bytes,
            reservation_left_bytes: volume.reservation_left_bytes,
            created_ns: volume.created,
            open: volume.open,
            device,
        }
    }

    fn reply(&self, volume: VolumeInfo) -> Reply {
        Reply::Volume(Box::new(self.describe(volume)))
    }

    /// [`Error::Busy`] that names the device, when the volume is one.
    fn require_detached(&self, volume: &VolumeInfo, what: &str) -> Result<()> {
        let name = &volume.name;
        if let Some(attachment) = self.devices.borrow().get(&volume.id) {
            let device = attachment.device.display();
            return Err(Error::Busy(format!(
                "{name} is attached as {device}, so it cannot be {what}; detach it first"
            )));
        }
        if volume.open {
            return Err(Error::Busy(format!("{name} is in use, so it cannot be {what}; try again later")));
        }
        Ok(())
    }
}

fn hello<S: Medium>(control: &Control<S>) -> Result<Reply> {
    let info = control.pool.info();
    let own = std::process::id();
    let (front_pid, engine_pid) =
        control.daemon.as_ref().map_or((own, own), |facts| (facts.front_pid, facts.engine_pid));
    Ok(Reply::Hello(Hello {
        build: env!("CARGO_PKG_VERSION").into(),
        pool_uuid: info.uuid,
        pool_name: info.name,
        pool_path: control.path.clone(),
        front_pid,
        engine_pid,
    }))
}

/// Leaves that are read to list the volumes of a pool that no daemon serves: a second or so.
const LEAVES_FOR_A_LIST: u64 = 20_000;

/// Finds what volumes hold alone where no daemon does it in the background.
async fn measure<S: Medium>(control: &Control<S>, ids: &[VolumeId], leaves_most: u64) {
    if control.daemon.is_none() {
        control.pool.measure_exclusive(ids, leaves_most).await;
    }
}

async fn grow<S: Medium>(control: &Control<S>, size_bytes: u64) -> Result<()> {
    let info = control.pool.info();
    if size_bytes < info.size_bytes {
        let (now, wanted) = (size_words(info.size_bytes), size_words(size_bytes));
        return Err(Error::InvalidInput(format!("pool {} has {now} and cannot shrink to {wanted}", info.name)));
    }
    Geometry::new(size_bytes, info.journal_bytes)?;
    // First the file: a pool that is larger than its file would be taken for truncated.
    control.medium.grow(size_bytes)?;
    control.pool.enlarge(size_bytes).await
}

async fn resize<S: Medium>(control: &Control<S>, name: &str, size_bytes: u64, force: bool) -> Result<Reply> {
    let volume = control.find(name)?;
    check_size(size_bytes, volume.sector_size)?;
    if volume.read_only {
        return Err(Error::ReadOnly(format!("{name} is a snapshot; clone it, and resize the clone")));
    }
    if size_bytes < volume.size_bytes {
        control.require_detached(&volume, "made smaller")?;
        if !force && let Some(found) = recognise(control, &volume).await? {
            let (kind, needs) = (found.kind, size_words(found.size_bytes));
            if size_bytes < found.size_bytes {
                return Err(Error::InvalidInput(format!(
                    "the {kind} file system on {name} takes {needs}; make it smaller first, or lose it with --force"
                )));
            }
        }
    }
    control.pool.resize_volume(volume.id, size_bytes).await?;
    Ok(control.reply(control.pool.volume_by_id(volume.id)?))
}

/// The file system on a volume that nobody uses.
async fn recognise<S: Medium>(control: &Control<S>, volume: &VolumeInfo) -> Result<Option<FileSystem>> {
    let handle = control.pool.open_volume(volume.id, true)?;
    let len = volume.size_bytes.min(filesystem::HEAD_BYTES as u64) as usize;
    let memory = control.medium.allocate(len);
    handle.read(0, &memory).await?;
    let mut head = vec![0; len];
    memory.read(0, &mut head);
    Ok(FileSystem::recognise(&head))
}

async fn delete<S: Medium>(control: &Control<S>, volume: &VolumeInfo) -> Result<Reply> {
    let name = &volume.name;
    if volume.protected {
        return Err(Error::ReadOnly(format!(
            "{name} is protected against deletion; lift that with plywood volume protect --off"
        )));
    }
    control.require_detached(volume, "deleted")?;
    control.pool.delete_volume(volume.id).await?;
    Ok(Reply::Done)
}

async fn roll_back<S: Medium>(control: &Control<S>, volume: &str, snapshot: &str, keep: Option<Keep>) -> Result<Reply> {
    let (volume, snapshot) = (control.find(volume)?, control.find(snapshot)?);
    require_snapshot(&snapshot)?;
    if volume.read_only {
        return Err(Error::ReadOnly(format!("{} is a snapshot and never changes; clone it instead", volume.name)));
    }
    control.require_detached(&volume, "rolled back")?;
    let keep = match keep {
        Some(Keep { uuid, name }) => {
            check_name(&name)?;
            Some(NewSnapshot { uuid, name, created: now_ns(), attributes: BTreeMap::new() })
        }
        None => None,
    };
    control.pool.roll_back(volume.id, snapshot.id, keep).await?;
    Ok(control.reply(control.pool.volume_by_id(volume.id)?))
}

async fn set_attributes<S: Medium>(
    control: &Control<S>,
    volume: &VolumeInfo,
    changes: BTreeMap<String, Option<Bytes>>,
) -> Result<()> {
    let before = control.pool.attributes(volume.id).await?;
    let mut after = before.clone();
    for (key, value) in &changes {
        match value {
            Some(value) => after.insert(key.clone(), value.0.clone()),
            None => after.remove(key),
        };
    }
    if after == before {
        return Ok(());
    }
    check_attributes(&after)?;
    let changes = changes.into_iter().map(|(key, value)| (key, value.map(|value| value.0))).collect();
    control.pool.set_attributes(volume.id, changes).await
}

fn require_snapshot(volume: &VolumeInfo) -> Result<()> {
    if volume.read_only {
        return Ok(());
    }
    Err(Error::InvalidInput(format!(
        "{} is a volume, not a snapshot; take one with plywood snapshot create",
        volume.name
    )))
}

fn check_size(size_bytes: u64, sector_size: u32) -> Result<()> {
    if !matches!(sector_size, 512 | 4096) {
        return Err(Error::InvalidInput(format!("sector size {sector_size} is neither 512 nor 4096")));
    }
    if size_bytes == 0 {
        return Err(Error::InvalidInput("size is 0; a volume has at least one sector".into()));
    }
    if !size_bytes.is_multiple_of(sector_size.into()) {
        let words = format!("size {size_bytes} is not a multiple of the sector size {sector_size}");
        return Err(Error::InvalidInput(format!("{words}; {} is", size_bytes.next_multiple_of(sector_size.into()))));
    }
    Ok(())
}

fn bounded(attributes: Attributes) -> Result<BTreeMap<String, Vec<u8>>> {
    let attributes = attributes.into_iter().map(|(key, value)| (key, value.0)).collect();
    check_attributes(&attributes)?;
    Ok(attributes)
}

fn check_attributes(attributes: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    if let Some(key) = attributes.keys().find(|key| key.is_empty() || key.len() > 255) {
        return Err(Error::InvalidInput(format!("attribute key of {} bytes; 1 to 255 are allowed", key.len())));
    }
    let total: usize = attributes.iter().map(|(key, value)| key.len() + value.len()).sum();
    if total > ATTRIBUTES_BYTES_MAX {
        return Err(Error::NoSpace(format!("attributes would take {total} bytes; at most {ATTRIBUTES_BYTES_MAX} fit")));
    }
    Ok(())
}

pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_sizes_are_refused() {
        for (size_bytes, sector_size) in [(0, 4096), (4095, 4096), (512, 4096), (511, 512), (4096, 1024)] {
            assert!(check_size(size_bytes, sector_size).is_err(), "{size_bytes} in sectors of {sector_size}");
        }
        assert!(check_size(512, 512).is_ok());
        assert!(check_size(4096, 4096).is_ok());
    }

    #[test]
    fn attributes_have_a_bound() {
        let attributes = [("key".to_owned(), Bytes(vec![0; ATTRIBUTES_BYTES_MAX]))].into();
        assert!(matches!(bounded(attributes), Err(Error::NoSpace(_))));
        let attributes = [(String::new(), Bytes(Vec::new()))].into();
        assert!(matches!(bounded(attributes), Err(Error::InvalidInput(_))));
    }
}

//! The volumes of Docker and Podman in the pool: creating, telling about, and removing them.
//!
//! Of all volumes these are the ones with [`DOCKER_OPTIONS`] among their attributes; others are neither shown nor touched.
//! A volume gets its final attributes in one step when all of it is there. One whose creation was cut short is not there
//! for anybody, and is begun anew or taken away.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::names::Names;
use super::options::Options;
use super::record::{self, Record, THROWN_AWAY, UNFINISHED};
use crate::cli::attach::{delete_when_idle, detach_when_idle};
use crate::cli::image::Filesystem;
use crate::cli::mount::{kind_and_options, release};
use crate::cli::size;
use crate::daemon::attributes::{ATTACHED_BY, DOCKER_MOUNTS, DOCKER_OPTIONS, EPHEMERAL};
use crate::daemon::protocol::{Attributes, Bytes, Command, Kind, Volume};
use crate::daemon::{self, Client, FoundPool, VOLUMES_DIRECTORY, making};

/// How long an ephemeral volume waits for its next mount after the last one. Docker and Podman mount a volume when they create a
/// container, to fill it from the image, and once more when they start it.
const GRACE: Duration = Duration::from_secs(10);
/// Sector size of new volumes.
const SECTOR_SIZE: u32 = 4096;

/// The volumes of one pool.
#[derive(Debug)]
pub struct Volumes {
    pool: FoundPool,
    default_size_bytes: u64,
    /// Where they are mounted, each by its id.
    pub(super) directory: PathBuf,
    pub(super) names: Names,
    /// Something could not be put in order at once.
    pub(super) pending: AtomicBool,
    /// Ephemeral volumes whose last mount has ended, by id, and when they go.
    ending: Mutex<BTreeMap<u64, Instant>>,
}

/// A volume of Docker's, and what is known about it.
pub(super) struct Known {
    pub(super) volume: Volume,
    pub(super) record: Record,
}

impl Volumes {
    /// Those of `pool`.
    pub fn new(pool: FoundPool, default_size_bytes: u64) -> Self {
        let directory = PathBuf::from(VOLUMES_DIRECTORY).join(pool.uuid.to_string());
        let (names, pending, ending) = Default::default();
        Self { pool, default_size_bytes, directory, names, pending, ending }
    }

    /// The pool's daemon, which is started when it does not run.
    pub(super) fn client(&self) -> Result<Client> {
        Ok(daemon::start(&self.pool)?)
    }

    /// The volume of that name. None when there is none of Docker's, or its creation has not ended.
    pub(super) fn find(&self, client: &Client, name: &str) -> Result<Option<Known>> {
        Ok(self.look_up(client, name)?.filter(|known| !known.record.unfinished))
    }

    fn look_up(&self, client: &Client, name: &str) -> Result<Option<Known>> {
        let looked = client.volume(name).and_then(|volume| Ok((client.attributes(name)?, volume)));
        let (attributes, volume) = match looked {
            Err(failure) if failure.kind == Kind::NotFound => return Ok(None),
            looked => looked?,
        };
        Ok(Record::read(&attributes, &record::boot_id()?).map(|record| Known { volume, record }))
    }

    /// All that are there.
    pub(super) fn all(&self, client: &Client) -> Result<Vec<Known>> {
        Ok(self.all_with_unfinished(client)?.into_iter().filter(|known| !known.record.unfinished).collect())
    }

    fn all_with_unfinished(&self, client: &Client) -> Result<Vec<Known>> {
        let boot = record::boot_id()?;
        let mut found = Vec::new();
        for volume in client.volumes()?.into_iter().filter(|volume| !volume.snapshot) {
            let attributes = match client.attributes(&volume.name) {
                // Deleted meanwhile.
                Err(failure) if failure.kind == Kind::NotFound => continue,
                attributes => attributes?,
            };
            found.extend(Record::read(&attributes, &boot).map(|record| Known { volume, record }));
        }
        Ok(found)
    }

    /// Creates a volume. One that is there already and was asked for in the same way is the same.
    ///
    /// # Errors
    /// Options that make no sense, a name that is taken, and what the pool answers.
    pub fn create(&self, name: &str, given: &BTreeMap<String, String>) -> Result<()> {
        let options = Options::read(given)?;
        let _held = self.names.hold(name);
        let client = self.client()?;
        match self.look_up(&client, name)? {
            Some(Known { record, .. }) if record.unfinished => {
                tracing::info!(volume = name, "its creation was cut short; begun anew");
                self.drop_unfinished(&client, name)?;
            }
            Some(Known { record, .. }) => {
                ensure!(
                    record.options == options,
                    "volume {name} exists, and was created with {}, not with {}; remove it first, or choose another name",
                    record.options.describe(),
                    options.describe()
                );
                return Ok(());
            }
            None => {}
        }
        // Prune leaves alone what is being made.
        let _making = making::begin(self.pool.uuid)?;
        if let Err(error) = self.make(&client, name, &options) {
            if let Err(left) = self.drop_unfinished(&client, name) {
                tracing::warn!(volume = name, "what was made of it is still there: {left:#}");
            }
            return Err(error);
        }
        Ok(())
    }

    fn make(&self, client: &Client, name: &str, options: &Options) -> Result<()> {
        let kept: Bytes = serde_json::to_vec(options)?.into();
        let attributes: Attributes =
            [(DOCKER_OPTIONS.to_owned(), kept), (EPHEMERAL.to_owned(), Bytes::from(UNFINISHED))].into();
        let size_bytes = options.size_bytes.unwrap_or(self.default_size_bytes);
        match &options.from {
            Some(from) => self.clone_from(client, name, from, options.size_bytes, attributes)?,
            None => {
                let made = client.create_volume(name, size_bytes, SECTOR_SIZE, attributes);
                made.map_err(|failure| taken(name, failure))?;
                let filesystem = options.filesystem()?;
                let device = client.attach(name, false)?.device;
                // Docker fills a volume from the image only where it is empty.
                filesystem.make_empty(&device).with_context(|| {
                    let size = size::echo(size_bytes);
                    format!("no {filesystem} can be made on {size}; it wants {}", size::show(filesystem.least_bytes()))
                })?;
                detach_when_idle(client, name)?;
            }
        }
        if let Some(quota_bytes) = options.quota_bytes {
            client.for_volume(Command::VolumeQuota { name: name.into(), quota_bytes })?;
        }
        let mark = options.ephemeral.then(|| Bytes::from(THROWN_AWAY));
        client.set_attributes(name, [(EPHEMERAL.to_owned(), mark)].into())?;
        Ok(())
    }

    fn clone_from(
        &self,
        client: &Client,
        name: &str,
        from: &str,
        size_bytes: Option<u64>,
        attributes: Attributes,
    ) -> Result<()> {
        let origin = client.volume(from).with_context(|| format!("from={from}"))?;
        ensure!(
            origin.snapshot,
            "from={from}: it is a volume, which may change; take a snapshot of it: plywood snapshot create {from} NAME"
        );
        let grows = size_bytes.is_some_and(|size| size != origin.size_bytes);
        if let Some(size) = size_bytes {
            ensure!(
                size >= origin.size_bytes,
                "size={size}: {from} has {}, and a clone cannot be smaller",
                size::echo(origin.size_bytes)
            );
        }
        let made = client.for_volume(Command::CloneCreate {
            snapshot: from.to_owned(),
            uuid: Uuid::new_v4(),
            name: name.to_owned(),
            size_bytes: size_bytes.filter(|_| grows),
            attributes,
        });
        made.map_err(|failure| taken(name, failure))?;
        if grows {
            let device = client.attach(name, false)?.device;
            grow_file_system(&device)?;
            detach_when_idle(client, name)?;
        }
        Ok(())
    }

    /// Takes away what was made of a volume whose creation was cut short.
    fn drop_unfinished(&self, client: &Client, name: &str) -> Result<()> {
        match self.look_up(client, name)? {
            Some(known) if known.record.unfinished => Ok(delete_when_idle(client, name)?),
            // Nothing was made, or the name is somebody else's.
            _ => Ok(()),
        }
    }

    /// Takes away what creations have left that were cut short with an earlier plugin, and puts in order what its mounts
    /// have left. To be called before anything else is done.
    ///
    /// # Errors
    /// When the pool cannot be asked.
    pub fn clean_up(&self) -> Result<()> {
        let client = self.client()?;
        for known in self.all_with_unfinished(&client)? {
            let name = &known.volume.name;
            if known.record.unfinished {
                match self.drop_unfinished(&client, name) {
                    Ok(()) => tracing::info!(volume = name, "deleted: its creation was cut short"),
                    Err(error) => tracing::warn!(volume = name, "its creation was cut short: {error:#}"),
                }
            }
        }
        if !self.settle() {
            self.pending.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// What `docker volume inspect` shows.
    ///
    /// # Errors
    /// When there is no such volume.
    pub fn info(&self, name: &str) -> Result<Value> {
        let client = self.client()?;
        let known = self.find(&client, name)?.with_context(|| missing(name))?;
        let mut info = self.brief(&known)?;
        let Known { volume, record } = known;
        let mut status = json!({
            "Pool": self.pool.name,
            "Uuid": volume.uuid,
            "SizeBytes": volume.size_bytes,
            "OwnBytes": volume.own_bytes,
            "MappedBytes": volume.mapped_bytes,
            "QuotaBytes": volume.quota_bytes,
            "Ephemeral": record.ephemeral,
            "Mounts": record.mounts.ids.len(),
        });
        let snapshots: Vec<Value> = client
            .volumes()?
            .iter()
            .filter(|other| other.snapshot && other.origin_uuid == Some(volume.uuid))
            .map(|snapshot| json!({ "Name": snapshot.name, "Created": created(snapshot) }))
            .collect();
        status["Snapshots"] = snapshots.into();
        if let Some(from) = record.options.from {
            status["From"] = from.into();
        }
        if let Some(bytes) = volume.exclusive_bytes {
            status["ExclusiveBytes"] = bytes.into();
        }
        info["Status"] = status;
        Ok(info)
    }

    /// What `docker volume ls` shows.
    ///
    /// # Errors
    /// When the pool cannot be asked.
    pub fn list(&self) -> Result<Vec<Value>> {
        self.all(&self.client()?)?.iter().map(|known| self.brief(known)).collect()
    }

    fn brief(&self, known: &Known) -> Result<Value> {
        let mut brief = json!({ "Name": known.volume.name });
        if let Some(directory) = self.mounted_on(&known.volume)? {
            brief["Mountpoint"] = directory.display().to_string().into();
        }
        // Left out where it is not known: Go's reader stumbles over an empty one.
        if let Some(created) = created(&known.volume) {
            brief["CreatedAt"] = created.into();
        }
        Ok(brief)
    }

    /// Deletes a volume. One that is gone already is all right: the answer to an earlier request may have been lost.
    ///
    /// # Errors
    /// When it is in use, or not Docker's.
    pub fn remove(&self, name: &str) -> Result<()> {
        let _held = self.names.hold(name);
        let client = self.client()?;
        let Some(known) = self.look_up(&client, name)? else {
            return match client.volume(name) {
                Err(failure) if failure.kind == Kind::NotFound => Ok(()),
                Err(failure) => Err(failure.into()),
                Ok(_) => bail!("{name} is not a volume of Docker's; delete it with plywood volume delete {name}"),
            };
        };
        if known.record.unfinished {
            return self.drop_unfinished(&client, name);
        }
        if self.mounted_on(&known.volume)?.is_some() {
            match known.record.mounts.ids.len() {
                // Left over from a mount that was cut short.
                0 => self.take_down(&client, &known)?,
                1 => bail!("volume {name} is in use by a container; remove the container first"),
                count => bail!("volume {name} is in use {count} times; remove the containers first"),
            }
        }
        release(&client, name)?;
        client.delete(name)?;
        Ok(())
    }

    /// Forgets the mounts of a volume that is not mounted, or deletes it where it was for them alone. The kernel takes a
    /// dead container's mounts away a moment after its last process: what has to wait for that is done later.
    pub(super) fn end_of_use(&self, client: &Client, known: &Known) -> Result<()> {
        let name = &known.volume.name;
        release(client, name)?;
        let left = client.attributes(name)?;
        if left.get(ATTACHED_BY).is_some_and(|by| by.0 == b"mount") {
            self.pending.store(true, Ordering::Release);
        } else if known.record.ephemeral {
            if !self.has_ended(&known.volume) {
                self.pending.store(true, Ordering::Release);
                return Ok(());
            }
            client.delete(name)?;
            tracing::info!(volume = name, "deleted: it was for the time of its use");
        } else {
            client.set_attributes(name, [(DOCKER_MOUNTS.to_owned(), None)].into())?;
        }
        Ok(())
    }

    /// Whether the last use of an ephemeral volume is over: nobody has mounted it again for a while.
    fn has_ended(&self, volume: &Volume) -> bool {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let ended = now >= *ending.entry(volume.id).or_insert(now + GRACE);
        if ended {
            ending.remove(&volume.id);
        }
        ended
    }

    /// It is mounted again. False: too late.
    pub(super) fn use_again(&self, volume: &Volume) -> bool {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let is_in_time = ending.get(&volume.id).is_some_and(|end| Instant::now() < *end);
        if is_in_time {
            ending.remove(&volume.id);
        }
        is_in_time
    }

    /// Tries again what could not be put in order.
    pub fn settle_pending(&self) {
        if self.pending.swap(false, Ordering::AcqRel) && !self.settle() {
            self.pending.store(true, Ordering::Release);
        }
    }
}

pub(super) fn missing(name: &str) -> String {
    format!("there is no volume {name}; create it with docker volume create -d plywood {name}")
}

fn taken(name: &str, failure: daemon::protocol::Failure) -> anyhow::Error {
    if failure.kind == Kind::AlreadyExists {
        return anyhow::anyhow!(
            "the pool has something else of the name {name}, which is not Docker's; choose another name, or rename that: \
             plywood volume rename {name} NAME"
        );
    }
    failure.into()
}

fn created(volume: &Volume) -> Option<String> {
    let instant = Timestamp::from_nanosecond(i128::from(volume.created_ns)).ok().filter(|_| volume.created_ns > 0)?;
    // Whole seconds, as Docker's own driver gives them.
    Some(Timestamp::from_second(instant.as_second()).ok()?.to_string())
}

/// Makes the file system as large as its device. It is not mounted.
fn grow_file_system(device: &std::path::Path) -> Result<()> {
    let (kind, _) = kind_and_options(device)?;
    // Its programs know its forebears as well.
    let kind = if kind.starts_with("ext") { "ext4" } else { kind };
    let filesystem = Filesystem::from_str(kind, false);
    let filesystem =
        filesystem.map_err(|_| anyhow::anyhow!("size=: a clone with {kind} cannot grow; leave size= out"))?;
    filesystem.grow(device)
}

//! What the calls mean: snapshots of containerd's as volumes of a pool.
//!
//! | containerd | pool |
//! |---|---|
//! | active | a writable clone of the parent's snapshot, or of an empty file system ([`base`]) |
//! | committed | a snapshot of what was active; that one is put aside in the same change ([`super::record`]) |
//! | view | a private clone like an active one, mounted read-only: its journal can be replayed |
//! | removed | a volume with a name that means nothing; it is deleted when nobody uses it ([`Reaper`]) |
//!
//! A call may be cut off anywhere, by the death of this process, of the daemon or of the machine: what the pool holds then
//! is either all of what the call does or nothing that containerd would see.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::base::{self, GrowFileSystem, MakeFileSystem};
use super::error::{Error, Result};
use super::filter::Filters;
use super::imported::Imported;
use super::index::Index;
use super::link::Link;
use super::reaper::Reaper;
use super::record::{
    BASE, GONE, Kind, Labels, PREFIX, RECORD, REFERENCE, Record, check_key, check_labels, volume_name,
};
use super::settle::settle;
use crate::daemon::attributes::{ATTACHED, FOR_WRITING};
use crate::daemon::filesystem::mount_options;
use crate::daemon::protocol::{self, Attributes, Bytes, Command, Failure};

/// On an active snapshot: how large it is to be, in bytes.
const MAX_SIZE: &str = "containerd.io/snapshot/max-size";

/// A volume's uuid and name.
type Named = (Uuid, String);

/// How long the pool is watched for commands of a process that has died.
const SETTLING: Duration = Duration::from_millis(30);

/// How snapshots are made.
pub struct Settings {
    /// File system of what has no parent: `ext4`, `xfs` or `btrfs`.
    pub filesystem: String,
    /// Virtual size of what has no parent.
    pub size_bytes: u64,
    /// Size of the smallest such file system.
    pub least_bytes: u64,
    /// Makes file systems.
    pub make: Box<MakeFileSystem>,
    /// Makes them as large as their device.
    pub grow: Box<GrowFileSystem>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { filesystem, size_bytes, .. } = self;
        formatter.debug_struct("Settings").field("filesystem", filesystem).field("size_bytes", size_bytes).finish()
    }
}

/// A mount, as containerd's client does it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// File system.
    pub filesystem: String,
    /// Block device.
    pub device: String,
    /// Options.
    pub options: Vec<String>,
}

/// What is to be changed of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These are all.
    All(Labels),
    /// Those of these keys, which are deleted where there is no value.
    Some(Vec<(String, Option<String>)>),
}

/// The snapshots in a pool.
#[derive(Debug)]
pub struct Store {
    link: Arc<Link>,
    reaper: Arc<Reaper>,
    index: Index,
    imported: Imported,
    /// Held for reading by every call, and alone while the index is read anew.
    calls: RwLock<()>,
    settings: Settings,
}

impl Store {
    /// The snapshots that the pool holds. The empty file system is made if there is none yet; what an earlier process did
    /// not finish is taken away.
    ///
    /// # Errors
    /// What the pool answers, and when the file system cannot be made.
    pub fn open(link: Link, settings: Settings) -> Result<Self> {
        let link = Arc::new(link);
        let reaper = Reaper::start(Arc::clone(&link))
            .map_err(|error| Error::Unavailable(format!("starting a thread: {error}")))?;
        let store = Self {
            link,
            reaper,
            index: Index::default(),
            imported: Imported::default(),
            calls: RwLock::default(),
            settings,
        };
        store.load()?;
        store.base(store.settings.size_bytes)?;
        Ok(store)
    }

    /// Begins a call. When it is not known what became of an earlier one, the pool is asked first.
    fn enter(&self) -> Result<RwLockReadGuard<'_, ()>> {
        if self.link.is_in_doubt() {
            let _alone = self.calls.write().unwrap_or_else(PoisonError::into_inner);
            if self.link.is_in_doubt() {
                self.load().inspect_err(|_| self.link.doubt())?;
            }
        }
        Ok(self.calls.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn load(&self) -> Result<()> {
        self.link.begin_certainty();
        // A command of a process that has died may be carried out meanwhile, or be in a socket still: what is read is what
        // stays.
        self.link.call(Command::Settle)?;
        let (mut volumes, _) = self.volumes()?;
        let (found, gone) = loop {
            let found = self.records(&volumes);
            std::thread::sleep(SETTLING);
            self.link.call(Command::Settle)?;
            let (now, gone) = self.volumes()?;
            let is_same = volumes == now;
            volumes = now;
            match found {
                Ok(found) if is_same => break (found, gone),
                Err(Error::Pool(failure)) if failure.kind == protocol::Kind::NotFound => {}
                other => drop(other?),
            }
        };
        gone.into_iter().for_each(|name| self.reaper.take_away(name));
        let committed: BTreeSet<Uuid> = found.iter().filter_map(|(_, record)| record.of).collect();
        self.index.clear();
        for (uuid, record) in found {
            if committed.contains(&uuid) {
                match self.reaper.put_aside(&record.volume()) {
                    // By the process that died.
                    Err(Error::Pool(failure)) if failure.kind == protocol::Kind::NotFound => {}
                    put_aside => put_aside?,
                }
            } else {
                self.index.put(record);
            }
        }
        Ok(())
    }

    /// All volumes that are containerd's, and apart the names of those that are about to go.
    fn volumes(&self) -> Result<(Vec<Named>, Vec<String>)> {
        let volumes = self.link.volumes()?.into_iter().filter(|volume| volume.name.starts_with(PREFIX));
        let (gone, there): (Vec<_>, Vec<_>) = volumes.partition(|volume| volume.name.starts_with(GONE));
        let there = there.into_iter().map(|volume| (volume.uuid, volume.name)).collect();
        Ok((there, gone.into_iter().map(|volume| volume.name).collect()))
    }

    /// Those of them that are snapshots.
    fn records(&self, volumes: &[Named]) -> Result<Vec<(Uuid, Record)>> {
        let mut found = Vec::new();
        for (uuid, name) in volumes {
            let attributes = self.link.attributes(name)?;
            let record = attributes.get(RECORD).and_then(|bytes| Record::decode(name, &bytes.0));
            found.extend(record.map(|record| (*uuid, record)));
        }
        Ok(found)
    }

    fn base(&self, size_bytes: u64) -> Result<String> {
        let Settings { filesystem, make, .. } = &self.settings;
        base::base(&self.link, &self.reaper, filesystem, size_bytes, make)
    }

    /// `Prepare` and `View`.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when there is a snapshot of that key, or when the pool has the layer that was to be made;
    /// [`Error::NotFound`] and [`Error::Invalid`] for the parent; and what the pool answers.
    pub fn prepare(&self, key: &str, parent: &str, kind: Kind, labels: Labels) -> Result<Vec<Mount>> {
        check_key(key)?;
        check_labels(&labels)?;
        let max_bytes = max_size(&labels)?;
        let _call = self.enter()?;
        let _claim = self.index.claim(&[key], &[parent]);
        if self.index.find(key).is_some() {
            return Err(Error::AlreadyExists(format!("there is a snapshot {key:?} already")));
        }
        let filesystem = self.filesystem_of(parent)?;
        let least = self.settings.least_bytes;
        if let Some(size) = max_bytes.filter(|size| parent.is_empty() && *size < least) {
            let told =
                format!("label {MAX_SIZE}={size}: an empty {filesystem} file system wants {least} bytes at least");
            return Err(Error::Invalid(told));
        }
        if kind == Kind::Active
            && let Some(reference) = labels.get(REFERENCE)
        {
            self.adopt(reference, parent, &labels)?;
        }
        let origin = if parent.is_empty() {
            self.base(max_bytes.unwrap_or(self.settings.size_bytes))?
        } else {
            volume_name(parent)
        };
        let now_ns = now_ns();
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let record = Record { key, parent, kind, created_ns: now_ns, updated_ns: now_ns, labels, filesystem, of: None };
        self.make_clone(&origin, &record, max_bytes)?;
        let mounts = self.mount_of(&record).inspect_err(|_| {
            // Whoever is told that there is none must not find it.
            if let Err(error) = self.reaper.put_aside(&record.volume()) {
                tracing::warn!("a snapshot that could not be attached stays until it is removed: {error}");
            }
        })?;
        self.index.put(record);
        Ok(vec![mounts])
    }

    /// The file system that comes with a parent.
    fn filesystem_of(&self, parent: &str) -> Result<String> {
        if parent.is_empty() {
            return Ok(self.settings.filesystem.clone());
        }
        let parent = self.find(parent)?;
        if parent.kind != Kind::Committed {
            return Err(Error::Invalid(format!("parent {:?} is {}, not committed", parent.key, parent.kind.name())));
        }
        Ok(parent.filesystem)
    }

    /// Makes the volume of a snapshot, which may take so many bytes at most. Where that is more than the origin's virtual size,
    /// clone and file system are that large; where it is less, the file system keeps its size.
    fn make_clone(&self, origin: &str, record: &Record, max_bytes: Option<u64>) -> Result<()> {
        let volume = record.volume();
        let size_bytes = match max_bytes {
            Some(max_bytes) if self.link.volume(origin)?.size_bytes < max_bytes => Some(max_bytes),
            _ => None,
        };
        let mut attributes = attributes_of(record)?;
        attributes.insert(ATTACHED.to_owned(), FOR_WRITING.into());
        self.in_free_name(&volume, || {
            let (snapshot, uuid, attributes) = (origin.to_owned(), Uuid::new_v4(), attributes.clone());
            let create = |name| Command::CloneCreate { snapshot, uuid, name, size_bytes, attributes };
            let Some(quota_bytes) = max_bytes else { return self.link.for_volume(create(volume.clone())).map(drop) };
            // It has its name, and is a snapshot, only when it has the size and the quota as well.
            let draft = format!("{GONE}{}", uuid.simple());
            self.link.for_volume(create(draft.clone()))?;
            let limit = || -> Result<()> {
                if size_bytes.is_some() {
                    let device = self.link.attach(&draft)?;
                    let grown = (self.settings.grow)(&record.filesystem, Path::new(&device));
                    grown.map_err(|reason| Failure::new(protocol::Kind::Io, reason))?;
                }
                self.link.for_volume(Command::VolumeQuota { name: draft.clone(), quota_bytes })?;
                self.link.rename(&draft, &volume)
            };
            limit().inspect_err(|_| self.reaper.take_away(draft.clone()))
        })
    }

    /// Makes something of the name `volume`. What has that name and is no snapshot that we know of, such as one whose making
    /// was reported as failed, is in the way only once.
    fn in_free_name(&self, volume: &str, make: impl Fn() -> Result<()>) -> Result<()> {
        match make() {
            Err(Error::Pool(failure)) if failure.kind == protocol::Kind::AlreadyExists => {
                let there = self.link.attributes(volume)?;
                if !there.contains_key(RECORD) {
                    return Err(Error::Precondition(format!(
                        "volume {volume:?}, which is not containerd's, is in the way"
                    )));
                }
                self.reaper.put_aside(volume)?;
                make()
            }
            made => made,
        }
    }

    /// When the pool has the layer with this chain id: makes it a snapshot with this parent, if there is none yet, and
    /// answers [`Error::AlreadyExists`]; whoever asks looks for it by its label then.
    fn adopt(&self, reference: &str, parent: &str, labels: &Labels) -> Result<()> {
        let same = |record: &Record| {
            record.kind == Kind::Committed && record.labels.get(REFERENCE).is_some_and(|known| known == reference)
        };
        let known = self.index.select(same);
        let there = || Error::AlreadyExists(format!("the pool has layer {reference} already"));
        if known.iter().any(|record| record.parent == parent) {
            return Err(there());
        }
        // The same layer on the same layers, which are other snapshots here.
        let key = format!("{reference} on {:.16}", blake3::hash(parent.as_bytes()).to_hex());
        let known = known.into_iter().next();
        let shared: Vec<&str> = known.iter().map(|record| record.key.as_str()).collect();
        let _claim = self.index.claim(&[&key], &shared);
        // Another call may have been about the same meanwhile.
        if self.index.find(&key).is_some() {
            return Err(there());
        }
        let (origin, filesystem) = match &known {
            Some(known) if self.index.find(&known.key).is_some_and(|found| same(&found)) => {
                (known.volume(), known.filesystem.clone())
            }
            _ => match self.imported.find(&self.link, reference)? {
                Some(layer) => (layer.volume, layer.filesystem),
                None => return Ok(()),
            },
        };
        let now_ns = now_ns();
        let record = Record {
            key,
            parent: parent.to_owned(),
            kind: Kind::Committed,
            created_ns: now_ns,
            updated_ns: now_ns,
            labels: labels.clone(),
            filesystem,
            of: None,
        };
        let attributes = attributes_of(&record)?;
        let volume = record.volume();
        self.in_free_name(&volume, || {
            let (origin, name, attributes) = (origin.clone(), volume.clone(), attributes.clone());
            let command = Command::SnapshotCreate { volume: origin, uuid: Uuid::new_v4(), name, attributes };
            self.link.for_volume(command).map(drop)
        })?;
        self.index.put(record);
        Err(there())
    }

    /// `Mounts`: the same at any time, after a restart of the daemon or of the machine too.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Precondition`] for what is committed; and what the pool answers.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let _call = self.enter()?;
        let _claim = self.index.claim(&[], &[key]);
        let record = self.find(key)?;
        if record.kind == Kind::Committed {
            return Err(Error::Precondition(format!("snapshot {key:?} is committed; it has no mounts")));
        }
        Ok(vec![self.mount_of(&record)?])
    }

    fn mount_of(&self, record: &Record) -> Result<Mount> {
        let device = self.link.attach(&record.volume())?;
        let mut options: Vec<_> = mount_options(&record.filesystem).split(',').collect();
        options.push("noatime");
        if record.kind == Kind::View {
            options.push("ro");
        }
        let options = options.into_iter().map(str::to_owned).collect();
        Ok(Mount { filesystem: record.filesystem.clone(), device, options })
    }

    /// `Commit`.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::AlreadyExists`] for the name, [`Error::Precondition`] for what is not active, no space when
    /// writes to it have failed, and what the pool answers.
    pub fn commit(&self, name: &str, key: &str, parent: &str, labels: Labels) -> Result<()> {
        check_key(name)?;
        check_labels(&labels)?;
        let _call = self.enter()?;
        let _claim = self.index.claim(&[key, name], &[]);
        let active = self.find(key)?;
        if self.index.find(name).is_some() {
            return Err(Error::AlreadyExists(format!("there is a snapshot {name:?} already")));
        }
        if active.kind != Kind::Active {
            return Err(Error::Precondition(format!("snapshot {key:?} is {}, not active", active.kind.name())));
        }
        if !parent.is_empty() && parent != active.parent {
            let made_from = &active.parent;
            let words = format!("snapshot {key:?} was made from {made_from:?}; it cannot be committed on {parent:?}");
            return Err(Error::Invalid(words));
        }
        let mut volume = self.link.volume(&active.volume())?;
        if let Some(device) = &volume.device {
            let is_mounted = settle(device).map_err(|error| {
                Failure::new(protocol::Kind::Io, format!("writing out {}: {error}", device.display()))
            })?;
            if is_mounted {
                volume = self.link.volume(&volume.name)?;
            }
        }
        // Whoever unpacked has not heard of it, for umount(2) does not tell: a layer must not be less than it says.
        if volume.failed_writes > 0 {
            let words = format!(
                "{} writes to snapshot {key:?} failed, since no space is left in the pool or its quota, or the disk fails; remove it, \
                 and make it anew",
                volume.failed_writes
            );
            return Err(Failure::new(protocol::Kind::NoSpace, words).into());
        }
        let now_ns = now_ns();
        let record = Record {
            key: name.to_owned(),
            kind: Kind::Committed,
            created_ns: now_ns,
            updated_ns: now_ns,
            labels,
            of: Some(volume.uuid),
            ..active
        };
        let attributes = attributes_of(&record)?;
        let to = record.volume();
        self.in_free_name(&to, || {
            let (volume, name, attributes) = (volume.name.clone(), to.clone(), attributes.clone());
            self.link.for_volume(Command::SnapshotCreate { volume, uuid: Uuid::new_v4(), name, attributes }).map(drop)
        })?;
        self.index.replace(key, record);
        // It is no snapshot any more in any case; its name is in nobody's way, either.
        if let Err(error) = self.reaper.put_aside(&volume.name) {
            tracing::warn!(volume = %volume.name, "what was committed stays until the next start: {error}");
        }
        Ok(())
    }

    /// `Remove`. Space comes back in the background.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Precondition`] for what others are made from; and what the pool answers.
    pub fn remove(&self, key: &str) -> Result<()> {
        let _call = self.enter()?;
        let _claim = self.index.claim(&[key], &[]);
        let record = self.find(key)?;
        if self.index.has_children(key) {
            return Err(Error::Precondition(format!("cannot remove snapshot with child: {key:?}")));
        }
        let volume = record.volume();
        let removed = match self.link.delete(&volume) {
            // Its device is in use, or cannot be taken away now: one such snapshot must not end a collection of garbage.
            Err(Error::Pool(failure)) if matches!(failure.kind, protocol::Kind::Busy | protocol::Kind::Io) => {
                self.reaper.put_aside(&volume)
            }
            deleted => deleted,
        };
        match removed {
            // By somebody else, by hand.
            Err(Error::Pool(failure)) if failure.kind == protocol::Kind::NotFound => {}
            removed => removed?,
        }
        self.index.remove(key);
        Ok(())
    }

    /// `Stat`.
    ///
    /// # Errors
    /// [`Error::NotFound`], and what the pool answers.
    pub fn stat(&self, key: &str) -> Result<Record> {
        let _call = self.enter()?;
        self.find(key)
    }

    fn find(&self, key: &str) -> Result<Record> {
        self.index.find(key).ok_or_else(|| Error::NotFound(format!("there is no snapshot {key:?}")))
    }

    /// `Update`.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`] for the labels, and what the pool answers.
    pub fn update(&self, key: &str, change: Change) -> Result<Record> {
        let _call = self.enter()?;
        let _claim = self.index.claim(&[key], &[]);
        let mut record = self.find(key)?;
        match change {
            Change::All(labels) => record.labels = labels,
            Change::Some(changes) => {
                for (key, value) in changes {
                    match value {
                        Some(value) => record.labels.insert(key, value),
                        None => record.labels.remove(&key),
                    };
                }
            }
        }
        check_labels(&record.labels)?;
        record.updated_ns = now_ns().max(record.updated_ns);
        self.link.set_attribute(&record.volume(), RECORD, record.encode()?)?;
        self.index.put(record.clone());
        Ok(record)
    }

    /// `List`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a filter that makes no sense.
    pub fn list<S: AsRef<str>>(&self, filters: &[S]) -> Result<Vec<Record>> {
        let filters = Filters::parse(filters)?;
        let _call = self.enter()?;
        Ok(self.index.select(|record| filters.matches(record)))
    }

    /// `Usage`: what was written in this snapshot itself and is still there, in bytes.
    ///
    /// # Errors
    /// [`Error::NotFound`], and what the pool answers.
    pub fn usage(&self, key: &str) -> Result<u64> {
        let record = self.stat(key)?;
        Ok(self.link.volume(&record.volume())?.own_bytes)
    }

    /// `Cleanup`: takes away what can be, now; empty file systems of a size that was asked for once too.
    pub fn clean_up(&self) {
        if let Err(error) = self.clean_bases() {
            tracing::warn!("empty file systems that nobody needs stay: {error}");
        }
        let left = self.reaper.pass();
        tracing::debug!(left, "cleanup");
    }

    fn clean_bases(&self) -> Result<()> {
        let Settings { filesystem, size_bytes, .. } = &self.settings;
        let usual = base::name(filesystem, *size_bytes);
        let unusual = |name: &String| name.starts_with(BASE) && *name != usual;
        let names: Vec<_> = self.link.volumes()?.into_iter().map(|volume| volume.name).filter(unusual).collect();
        if names.is_empty() {
            return Ok(());
        }
        // No call is about to make something of one.
        let _alone = self.calls.write().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            match self.link.delete(&name) {
                Err(Error::Pool(failure)) if failure.kind == protocol::Kind::NotFound => {}
                Err(error) => tracing::warn!("{name}, which nobody needs, stays: {error}"),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

fn attributes_of(record: &Record) -> Result<Attributes> {
    Ok([(RECORD.to_owned(), Bytes(record.encode()?))].into())
}

/// The size that the labels ask for, as whole blocks.
fn max_size(labels: &Labels) -> Result<Option<u64>> {
    const BLOCK_BYTES: u64 = crate::units::BLOCK_BYTES;
    let Some(text) = labels.get(MAX_SIZE) else { return Ok(None) };
    let bytes: Option<u64> = text.parse().ok().filter(|bytes| *bytes >= BLOCK_BYTES);
    let whole = bytes.and_then(|bytes| bytes.checked_next_multiple_of(BLOCK_BYTES));
    whole.map(Some).ok_or_else(|| Error::Invalid(format!("label {MAX_SIZE}={text:?} is not a size in bytes")))
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

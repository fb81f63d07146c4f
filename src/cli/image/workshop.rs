//! What an import works with: the search for layers that the pool has, working volumes, and the snapshots made of them.
//! Dropping it takes away what was made, unless the import has succeeded.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use uuid::Uuid;

use super::apply::{Applier, Summary, Whiteouts};
use super::archive::{Archive, End};
use super::directory::copy_directory;
use super::filesystem::{Detached, Filesystem};
use super::layers::{self, known};
use super::source::Layer;
use super::stream::{Interrupt, interrupted};
use super::tree::show;
use crate::cli::attach::{delete_when_idle, detach_when_idle};
use crate::cli::working::ephemeral;
use crate::daemon::Client;
use crate::daemon::making::{self, Making};
use crate::daemon::protocol::{Attributes, Command, Failure, Kind, Volume};

/// How long a layer that another import makes at this moment is waited for, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What is the same for all that is done about one layer.
#[derive(Clone)]
pub(super) struct Step {
    pub(super) filesystem: Filesystem,
    pub(super) size_bytes: u64,
    /// It may be larger, too: nobody asked for a size.
    pub(super) is_least: bool,
    pub(super) sector_size: u32,
    pub(super) number: usize,
    /// The snapshot of the layer below.
    pub(super) below: Option<Volume>,
}

/// Which layer is wanted.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Its chain id.
    pub(super) chain: &'a str,
    pub(super) diff_id: &'a str,
}

/// What an import has made so far. Dropping it takes all of it away.
pub(super) struct Workshop<'a> {
    pub(super) client: &'a Client,
    pub(super) interrupt: &'a Interrupt,
    /// Nobody prunes while it is held.
    pub(super) making: Option<Making>,
    /// Working volumes.
    pub(super) working: Vec<String>,
    /// Snapshots, which stay when everything went well.
    pub(super) made: Vec<String>,
}

impl Workshop<'_> {
    fn check(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(interrupted().into()) } else { Ok(()) }
    }

    /// Looks for a layer among the snapshots, whatever they are called, on the same file system and not larger than is wanted.
    /// Of several it is one that is a layer of its own, if there is one, and as large as is wanted, or nearly so. Answers
    /// whether it is one of its own; else it is an image, or containerd's.
    fn find_layer(&self, wanted: Wanted<'_>, step: &Step) -> Result<Option<(Volume, bool)>> {
        let ground = (Some(step.filesystem.to_string()), step.sector_size);
        let candidates = layers::known_snapshots(self.client)?.into_iter().filter_map(|known| {
            let is_right = layers::is_layer(&known, wanted.chain)
                || step.below.as_ref().is_some_and(|below| layers::is_layer_on(&known, below.uuid, wanted.diff_id));
            let is_layer = is_right && layers::ground(&known) == ground;
            let is_containerds = || {
                let filesystem = layers::unpacked_by_containerd(&known, wanted.chain);
                filesystem.is_some() && (filesystem, known.volume.sector_size) == ground
            };
            let fits = known.volume.size_bytes <= step.size_bytes;
            let is_it = (is_layer || is_containerds()) && (fits || step.is_least);
            let is_own = is_layer && !known.is_image();
            is_it.then_some((known.volume, is_own))
        });
        Ok(candidates.max_by_key(|(volume, is_own)| {
            let fits = volume.size_bytes <= step.size_bytes;
            (*is_own, fits, if fits { volume.size_bytes } else { u64::MAX - volume.size_bytes })
        }))
    }

    /// A layer that the pool has. It is a layer of its own afterwards: an image, or containerd's snapshot, may be deleted while
    /// this import needs it. That takes no space.
    pub(super) fn reuse(&mut self, wanted: Wanted<'_>, step: &Step, attributes: &Attributes) -> Result<Option<Volume>> {
        self.on_found(wanted, step, |work, (found, is_own)| {
            if is_own {
                return Ok(found);
            }
            let step = Step { size_bytes: found.size_bytes, ..step.clone() };
            let volume = work.begin(&Step { below: Some(found), ..step.clone() })?;
            work.commit_layer(&volume, wanted, &step, attributes)
        })
    }

    /// A working volume with the content of a layer that the pool has.
    pub(super) fn begin_with(&mut self, wanted: Wanted<'_>, step: &Step) -> Result<Option<String>> {
        self.on_found(wanted, step, |work, (found, _)| {
            work.begin_as_large(&Step { below: Some(found), ..step.clone() })
        })
    }

    /// Does something with a layer that the pool has. What is deleted meanwhile is looked for again.
    fn on_found<T>(
        &mut self,
        wanted: Wanted<'_>,
        step: &Step,
        mut what: impl FnMut(&mut Self, (Volume, bool)) -> Result<T>,
    ) -> Result<Option<T>> {
        while let Some(found) = self.find_layer(wanted, step)? {
            match what(self, found) {
                Err(error) if is(&error, Kind::NotFound) => self.check()?,
                done => return done.map(Some),
            }
        }
        Ok(None)
    }

    /// A name that is free for a layer.
    fn name_for(&self, chain: &str, step: &Step) -> Result<String> {
        let names: BTreeSet<String> = self.client.volumes()?.into_iter().map(|volume| volume.name).collect();
        // The same layer on another file system, or of another size, is another snapshot.
        let special = format!("{chain}.{}.{}.{}", step.filesystem, step.size_bytes, step.sector_size);
        match [chain, special.as_str()].into_iter().find(|name| !names.contains(*name)) {
            Some(name) => Ok(name.to_owned()),
            None => bail!("{special} exists already, and is not the layer of that name; rename it"),
        }
    }

    /// Makes a snapshot of a layer that is no image. Another import may have made the same layer meanwhile: then it is that
    /// one, and the volume has been for nothing.
    pub(super) fn commit_layer(
        &mut self,
        volume: &str,
        wanted: Wanted<'_>,
        step: &Step,
        attributes: &Attributes,
    ) -> Result<Volume> {
        loop {
            // In this order: what has taken the name is found.
            let name = self.name_for(wanted.chain, step);
            if let Some((found, true)) = self.find_layer(wanted, step)? {
                return Ok(found);
            }
            match self.commit(volume, &name?, attributes.clone()) {
                Err(error) if is(&error, Kind::AlreadyExists) => self.check()?,
                made => return made,
            }
        }
    }

    /// A working volume that holds what is below this layer, with a file system of the size that is wanted.
    pub(super) fn begin_as_large(&mut self, step: &Step) -> Result<String> {
        let volume = self.begin(step)?;
        if step.below.as_ref().is_some_and(|below| below.size_bytes < step.size_bytes) {
            let device = self.client.attach(&volume, false)?.device;
            step.filesystem.grow(&device)?;
            detach_when_idle(self.client, &volume)?;
        }
        Ok(volume)
    }

    /// A working volume that holds what is below this layer; what is on it has the size that it had.
    fn begin(&mut self, step: &Step) -> Result<String> {
        let Some(below) = &step.below else { return self.create_volume(step.size_bytes, step.sector_size) };
        let name = working_name();
        let began = Instant::now();
        loop {
            self.check()?;
            let made = self.client.for_volume(Command::CloneCreate {
                snapshot: below.name.clone(),
                uuid: Uuid::new_v4(),
                name: name.clone(),
                size_bytes: (below.size_bytes < step.size_bytes).then_some(step.size_bytes),
                attributes: ephemeral("import"),
            });
            match made {
                // Another import has just made it, and it is not durable yet.
                Err(failure) if failure.kind == Kind::Busy && began.elapsed() < PATIENCE => thread::sleep(LOOK_AGAIN),
                made => {
                    made?;
                    self.working.push(name.clone());
                    return Ok(name);
                }
            }
        }
    }

    pub(super) fn drop_working(&mut self, volume: &str) -> Result<()> {
        delete_when_idle(self.client, volume)?;
        self.working.retain(|working| working != volume);
        Ok(())
    }

    pub(super) fn create_volume(&mut self, size_bytes: u64, sector_size: u32) -> Result<String> {
        self.check()?;
        let name = working_name();
        self.client.create_volume(&name, size_bytes, sector_size, ephemeral("import"))?;
        self.working.push(name.clone());
        Ok(name)
    }

    /// Unpacks a layer onto a working volume. Answers its diff id.
    pub(super) fn unpack(
        &self,
        volume: &str,
        layer: &Layer,
        step: &Step,
        progress: &ProgressBar,
    ) -> Result<Option<String>> {
        let device = self.client.attach(volume, false)?.device;
        if step.below.is_none() {
            step.filesystem.make(&device)?;
        }
        self.check()?;
        let mounted = mount(step, &device)?;
        let (summary, diff_id) = match layer {
            Layer::Directory(path) => (copy_directory(mounted.root()?, path, progress, self.interrupt)?, None),
            Layer::Archive { .. } => {
                let (summary, diff_id) = self.unpack_archive(&mounted, layer, progress)?;
                (summary, Some(diff_id))
            }
        };
        mounted.unmount()?;
        tracing::debug!(layer = layer.name(), ?summary, "unpacked");
        detach_when_idle(self.client, volume)?;
        Ok(diff_id)
    }

    fn unpack_archive(&self, mounted: &Detached, layer: &Layer, progress: &ProgressBar) -> Result<(Summary, String)> {
        let in_layer = || layer.name();
        let mut reader = layer.read(progress, self.interrupt)?;
        let mut applier = Applier::new(mounted.root()?, Whiteouts::Obey);
        let mut archive = Archive::new(&mut reader);
        while let Some(entry) = archive.next_entry().with_context(in_layer)? {
            self.check()?;
            let applied = applier.apply(&entry, &mut archive);
            applied.with_context(|| format!("cannot unpack {}", show(&entry.path))).with_context(in_layer)?;
        }
        let end = archive.finish().with_context(in_layer)?;
        // A digest over all of it tells more than the mark, which not every writer sets.
        if end == End::Unmarked && layer.diff_id().is_none() {
            bail!("{}: the archive has no end mark: it is cut short", layer.name());
        }
        let summary = applier.finish().with_context(in_layer)?;
        let diff_id = reader.verify().with_context(in_layer)?;
        Ok((summary, diff_id))
    }

    /// Makes the snapshot of a working volume that is not attached any more, and takes the volume away.
    pub(super) fn commit(&mut self, volume: &str, name: &str, attributes: Attributes) -> Result<Volume> {
        self.check()?;
        let made = self.client.create_snapshot(volume, name, attributes)?;
        self.made.push(name.to_owned());
        self.drop_working(volume)?;
        Ok(made)
    }
}

impl Workshop<'_> {
    /// Deletes all that was made. Answers what could not be, with the reason.
    pub(super) fn take_away(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        for volume in self.working.drain(..) {
            let gone = delete_when_idle(self.client, &volume);
            left.extend(gone.err().map(|failure| format!("{volume} ({failure})")));
        }
        if self.made.is_empty() {
            return left;
        }
        // Another import may stand on what this one has made, or be about to.
        drop(self.making.take());
        let unneeded = || -> Result<Option<(Making, BTreeSet<String>)>> {
            let Some(alone) = making::alone(self.client.pool_uuid()?)? else { return Ok(None) };
            let all = known(self.client)?;
            let unneeded = layers::unneeded(&all, &BTreeSet::new())?;
            let names = unneeded.into_iter().chain(all.iter().filter(|known| known.is_image()));
            Ok(Some((alone, names.map(|known| known.volume.name.clone()).collect())))
        };
        let (_alone, unneeded) = match unneeded() {
            Ok(Some(unneeded)) => unneeded,
            Ok(None) => {
                tracing::info!(layers = ?self.made, "left to the imports that go on, and to prune");
                self.made.clear();
                return left;
            }
            Err(error) => {
                left.extend(self.made.drain(..).map(|name| format!("{name} ({error:#})")));
                return left;
            }
        };
        for snapshot in self.made.drain(..).rev().filter(|name| unneeded.contains(name)) {
            left.extend(self.client.delete(&snapshot).err().map(|failure| format!("{snapshot} ({failure})")));
        }
        left
    }
}

/// For a panic; otherwise there is nothing left by then.
impl Drop for Workshop<'_> {
    fn drop(&mut self) {
        for volume in self.take_away() {
            tracing::warn!(volume, "left behind by an import");
        }
    }
}

/// Whether the pool has answered this.
fn is(error: &anyhow::Error, kind: Kind) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == kind)
}

fn mount(step: &Step, device: &Path) -> Result<Detached> {
    let mounted = step.filesystem.mount(device)?;
    if step.below.is_none() {
        mounted.remove_lost_and_found()?;
    }
    Ok(mounted)
}

/// A daemon that starts afresh deletes what an import that was killed has left under such a name.
fn working_name() -> String {
    let unique = Uuid::new_v4().simple().to_string();
    format!("import-{}", &unique[..12])
}

//! `plywood image import`: one snapshot a layer, chained, each made on a clone of the one below.
//!
//! The top one gets the name that was asked for, lower ones are named by their chain id (`sha256:...`). Each has its chain
//! id as an attribute: another image with the same lower layers finds them there and starts from them. Everything is done on working volumes, which
//! are gone at the end; when something fails, or a signal comes, the snapshots made so far are gone too.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::io::Errno;
use uuid::Uuid;

use super::apply::{Applier, Summary, Whiteouts};
use super::archive::{Archive, End};
use super::directory::{content_bytes, copy_directory};
use super::disk::Disk;
use super::filesystem::{Detached, Filesystem};
use super::labels;
use super::layers::{self, Known};
use super::source::{Configuration, Image, Layer, Source, platform};
use super::stream::{Interrupt, interrupted, sha256_of};
use super::tree::show;
use crate::cli::attach::{delete_when_idle, detach_when_idle};
use crate::cli::working::ephemeral;
use crate::cli::{Context, Name, output, size};
use crate::daemon::protocol::{Attributes, Bytes, Command, Failure, Kind, Reply, Volume};
use crate::daemon::{Client, making};

/// Virtual size of an image whose content does not ask for more.
const DEFAULT_SIZE_BYTES: u64 = 10 << 30;
/// Sector size of an image's volume.
const SECTOR_SIZE: u32 = 4096;
/// That of a disk image, for which its partition table was written.
const DISK_SECTOR_SIZE: u32 = 512;
/// How long a layer that another import makes at this moment is waited for, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Imports an image.
#[derive(Debug, Args)]
pub struct ImportArguments {
    /// `oci:DIR[:TAG]`, `docker-archive:FILE`, `tar:FILE`, `dir:DIR`, `raw:FILE` or `qcow2:FILE`
    #[arg(value_parser = OsStringValueParser::new().try_map(|typed| Source::parse(&typed)))]
    source: Source,
    /// Name of the image
    name: Name,
    /// Virtual size of the image and of the containers started from it [default: 10G, or as the content needs]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Sector size of the volumes [default: 4096; of a disk image 512]
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    sector_size: Option<String>,
    /// File system to unpack onto [default: ext4]
    #[arg(long, value_enum, value_name = "FS")]
    fs: Option<Filesystem>,
}

/// What to import, and how.
#[derive(Debug)]
pub struct Order {
    /// Where it comes from.
    pub source: Source,
    /// Name of the image.
    pub name: String,
    /// Virtual size, when not chosen here.
    pub size_bytes: Option<u64>,
    /// The file system; none for the default, and for disk images.
    pub filesystem: Option<Filesystem>,
    /// Sector size of the volumes, when not the usual.
    pub sector_size: Option<u32>,
}

/// What was imported.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The image's snapshot.
    pub image: Volume,
    /// How many layers it has.
    pub layers: usize,
    /// How many of them were there already.
    pub reused: usize,
}

/// `plywood image import`.
///
/// # Errors
///
/// Those of [`import_image`].
pub fn import(context: &Context, arguments: &ImportArguments) -> Result<()> {
    let order = Order {
        source: arguments.source.clone(),
        name: arguments.name.text()?,
        size_bytes: arguments.size,
        filesystem: arguments.fs,
        sector_size: arguments.sector_size.as_deref().map(str::parse).transpose()?,
    };
    let client = context.daemon_client()?;
    // Layers without an image are pruned, but not those of this one.
    let _making = making::begin(client.pool_uuid()?)?;
    let interrupt = watch_signals()?;
    let progress = progress_bar();
    let imported = import_image(&client, &order, &progress, &interrupt);
    progress.finish_and_clear();
    let Imported { image, layers, reused } = imported?;
    if context.json {
        let value = serde_json::json!({
            "name": image.name, "uuid": image.uuid, "layers": layers, "layers_reused": reused,
            "own_bytes": image.own_bytes, "mapped_bytes": image.mapped_bytes, "size_bytes": image.size_bytes,
        });
        return Ok(output::json("image", &value)?);
    }
    let layers = if layers == 1 { "1 layer".to_owned() } else { format!("{layers} layers") };
    let reused = if reused == 0 { String::new() } else { format!(" ({reused} here already)") };
    Ok(output::line(&format!(
        "{}: {layers}{reused}, {}, virtual size {}",
        image.name,
        size::show(image.mapped_bytes),
        size::echo(image.size_bytes)
    ))?)
}

/// A flag that SIGINT, SIGTERM and SIGHUP set.
///
/// # Errors
///
/// The handlers cannot be installed.
pub(crate) fn watch_signals() -> Result<Interrupt> {
    let interrupt = Interrupt::default();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupt))?;
    }
    Ok(interrupt)
}

pub(super) fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    ProgressBar::new_spinner()
}

/// A bar on a terminal over so many bytes; nothing elsewhere.
pub(crate) fn progress_over(what: &str, length_bytes: u64) -> ProgressBar {
    let progress = progress_bar();
    progress.set_message(what.to_owned());
    start_progress(&progress, Some(length_bytes));
    progress
}

pub(super) fn start_progress(progress: &ProgressBar, length_bytes: Option<u64>) {
    let template = match length_bytes {
        Some(length_bytes) => {
            progress.set_length(length_bytes);
            "{msg:24!} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        }
        None => "{spinner} {msg} {binary_bytes} {binary_bytes_per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        progress.set_style(style);
    }
}

/// Imports an image. When it fails the pool holds what it held before.
///
/// # Errors
///
/// The source is not what it should be, the name is taken, the image does not fit into its volume or the pool, or a
/// signal came.
pub fn import_image(client: &Client, order: &Order, progress: &ProgressBar, interrupt: &Interrupt) -> Result<Imported> {
    match client.volume(&order.name) {
        Ok(_) => bail!("{} exists already; choose another name", order.name),
        Err(failure) if failure.kind == Kind::NotFound => {}
        Err(failure) => return Err(failure.into()),
    }
    // Everything that can be refused without the pool is looked at before anything is made.
    let disk = Disk::open(&order.source)?;
    let image = if disk.is_none() { order.source.open()? } else { None };
    let mut work = Workshop { client, interrupt, working: Vec::new(), made: Vec::new() };
    let result = match (image, disk) {
        (Some(image), _) => import_layers(&mut work, order, &image, progress),
        (None, Some(disk)) => import_disk(&mut work, order, &disk, progress),
        (None, None) => bail!("{}: nothing to import", order.source.describe()),
    };
    match result {
        Ok(imported) => {
            work.made.clear();
            Ok(imported)
        }
        Err(error) => {
            let left = work.take_away();
            let error = if interrupt.load(Ordering::Relaxed) { interrupted().into() } else { error };
            match left.as_slice() {
                [] => Err(error),
                left => Err(anyhow!("{error:#}; and could not be taken away again: {}", left.join(", "))),
            }
        }
    }
}

fn import_layers(work: &mut Workshop<'_>, order: &Order, image: &Image, progress: &ProgressBar) -> Result<Imported> {
    let filesystem = order.filesystem.unwrap_or_default();
    let sector_size = order.sector_size.unwrap_or(SECTOR_SIZE);
    let (needed_bytes, length_bytes) = match image.layers.as_slice() {
        [Layer::Directory(path)] => {
            let content = content_bytes(path)?;
            (content, Some(content))
        }
        _ => {
            let stored = image.stored_bytes();
            // Compressed layers of root file systems have a third of their content's size or so.
            (stored.unwrap_or(0).saturating_mul(3), stored)
        }
    };
    let size_bytes = order.size_bytes.unwrap_or_else(|| default_size(needed_bytes));
    start_progress(progress, length_bytes);
    let count = image.layers.len();
    let mut below: Option<String> = None;
    let mut chain: Option<String> = None;
    let mut reused = 0;
    for (index, layer) in image.layers.iter().enumerate() {
        progress.set_message(format!("layer {} of {count}", index + 1));
        let is_top = index + 1 == count;
        let step = Step { filesystem, size_bytes, sector_size, number: index + 1, below: below.clone() };
        let known = layer.diff_id().map(|diff_id| chain_id(chain.as_deref(), &diff_id));
        let found = match &known {
            Some(chain) => work.find_layer(chain, &step)?,
            None => Found::Free(String::new()),
        };
        let (volume, diff_id, name) = match found {
            Found::Same { name, is_image } => {
                progress.inc(layer.stored_bytes().unwrap_or(0));
                reused += 1;
                let diff_id = layer.diff_id();
                if !is_top {
                    let keep = || attributes_of_layer(&step, diff_id.as_deref(), known.as_deref());
                    // The image may be deleted while this one needs its layer.
                    below = Some(if is_image { work.keep_layer(name, &step, &keep())? } else { name });
                    chain = known;
                    continue;
                }
                chain = known;
                // The same content under one more name.
                (work.begin(&Step { below: Some(name), ..step.clone() })?, diff_id, order.name.clone())
            }
            Found::Free(name) => {
                let volume = work.begin(&step)?;
                let unpacked = work.unpack(&volume, layer, &step, progress);
                let diff_id = unpacked.map_err(|error| explain(work, error, size_bytes))?;
                chain = diff_id.as_ref().map(|diff_id| chain_id(chain.as_deref(), diff_id));
                (volume, diff_id, if is_top { order.name.clone() } else { name })
            }
        };
        let mut attributes = attributes_of_layer(&step, diff_id.as_deref(), chain.as_deref());
        if is_top {
            let diff_ids: Vec<String> = diff_id.into_iter().collect();
            attributes.extend(attributes_of_image(&order.source, image.configuration.as_ref(), &diff_ids)?);
        }
        below = Some(match &chain {
            Some(chain) if !is_top => work.commit_layer(&volume, name, chain, &step, &attributes)?,
            _ => {
                work.commit(&volume, &name, attributes)?;
                name
            }
        });
    }
    Ok(Imported { image: work.client.volume(&order.name)?, layers: count, reused })
}

fn import_disk(work: &mut Workshop<'_>, order: &Order, disk: &Disk, progress: &ProgressBar) -> Result<Imported> {
    ensure!(order.filesystem.is_none(), "--fs does not go with a disk image, which brings its own file system");
    let whole = disk.size_bytes().next_multiple_of(4096);
    let size_bytes = order.size_bytes.unwrap_or(whole);
    ensure!(
        size_bytes >= disk.size_bytes(),
        "the disk image has {}, more than its volume of {}; give it at least that with --size",
        size::echo(disk.size_bytes()),
        size::show(size_bytes)
    );
    start_progress(progress, Some(disk.size_bytes()));
    progress.set_message("disk");
    let volume = work.create_volume(size_bytes, order.sector_size.unwrap_or(DISK_SECTOR_SIZE))?;
    let device = work.client.attach(&volume, false)?.device;
    disk.copy_to(&device, progress, work.interrupt).map_err(|error| explain(work, error, size_bytes))?;
    detach_when_idle(work.client, &volume)?;
    let mut attributes = attributes_of_image(&order.source, None, &[])?;
    attributes.insert(labels::LAYER.into(), "1".into());
    work.commit(&volume, &order.name, attributes)?;
    Ok(Imported { image: work.client.volume(&order.name)?, layers: 1, reused: 0 })
}

/// Room for the content, a quarter for the file system and what containers add, and at least the usual.
fn default_size(needed_bytes: u64) -> u64 {
    let generous = needed_bytes.saturating_add(needed_bytes / 4).saturating_add(1 << 30);
    DEFAULT_SIZE_BYTES.max(generous.next_multiple_of(1 << 30))
}

/// The image specification's rule (config.md, "Layer ChainID").
pub(crate) fn chain_id(below: Option<&str>, diff_id: &str) -> String {
    match below {
        None => diff_id.to_owned(),
        Some(below) => sha256_of(format!("{below} {diff_id}").as_bytes()),
    }
}

fn attributes_of_layer(step: &Step, diff_id: Option<&str>, chain: Option<&str>) -> Attributes {
    let mut attributes = Attributes::new();
    attributes.insert(labels::LAYER.into(), step.number.to_string().as_str().into());
    attributes.insert(labels::FILESYSTEM.into(), step.filesystem.to_string().as_str().into());
    for (key, value) in [(labels::DIFF_ID, diff_id), (labels::CHAIN_ID, chain)] {
        if let Some(value) = value {
            attributes.insert(key.into(), value.into());
        }
    }
    attributes
}

fn attributes_of_image(
    source: &Source,
    configuration: Option<&Configuration>,
    diff_ids: &[String],
) -> Result<Attributes> {
    let json = if let Some(configuration) = configuration {
        labels::configuration_to_keep(&configuration.json, &configuration.parsed)?
    } else {
        // A root file system alone: all that can be said is which machine it is for.
        let platform = platform();
        let (os, architecture) = platform.split_once('/').context("this machine's platform")?;
        let rootfs = serde_json::json!({"type": "layers", "diff_ids": diff_ids});
        let created = jiff::Timestamp::now().to_string();
        let json = serde_json::json!({"created": created, "os": os, "architecture": architecture, "rootfs": rootfs});
        json.to_string().into_bytes()
    };
    let mut attributes = Attributes::new();
    attributes.insert(labels::CONFIGURATION.into(), Bytes(json));
    attributes.insert(labels::SOURCE.into(), source.describe().as_str().into());
    Ok(attributes)
}

/// What is the same for all that is done about one layer.
#[derive(Clone)]
struct Step {
    filesystem: Filesystem,
    size_bytes: u64,
    sector_size: u32,
    number: usize,
    /// The snapshot of the layer below.
    below: Option<String>,
}

enum Found {
    /// A snapshot with this layer, on the same file system and of the same size; it may be an image of its own.
    Same { name: String, is_image: bool },
    /// A name to make it under.
    Free(String),
}

/// What an import has made so far. Dropping it takes all of it away.
struct Workshop<'a> {
    client: &'a Client,
    interrupt: &'a Interrupt,
    /// Working volumes.
    working: Vec<String>,
    /// Snapshots, which stay when everything went well.
    made: Vec<String>,
}

impl Workshop<'_> {
    fn check(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(interrupted().into()) } else { Ok(()) }
    }

    /// Looks for a layer among the snapshots, whatever they are called, and for a name to make it under.
    fn find_layer(&self, chain: &str, step: &Step) -> Result<Found> {
        let snapshots = self.client.volumes()?;
        let wanted = (chain.to_owned(), Some(step.filesystem.to_string()), step.size_bytes, step.sector_size);
        let mut image = None;
        for volume in snapshots.iter().filter(|volume| volume.snapshot) {
            if volume.size_bytes != step.size_bytes || volume.sector_size != step.sector_size {
                continue;
            }
            let attributes = match self.client.attributes(&volume.name) {
                // Deleted meanwhile.
                Err(failure) if failure.kind == Kind::NotFound => continue,
                other => other?,
            };
            let known = Known { volume: volume.clone(), attributes };
            if layers::layer(&known).as_ref() == Some(&wanted) {
                if !known.is_image() {
                    return Ok(Found::Same { name: known.volume.name, is_image: false });
                }
                image = Some(known.volume.name);
            }
        }
        if let Some(name) = image {
            return Ok(Found::Same { name, is_image: true });
        }
        Self::name_for(chain, step, &snapshots).map(Found::Free)
    }

    /// A name that is free for a layer.
    fn name_for(chain: &str, step: &Step, snapshots: &[Volume]) -> Result<String> {
        // The same layer on another file system, or of another size, is another snapshot.
        let special = format!("{chain}.{}.{}.{}", step.filesystem, step.size_bytes, step.sector_size);
        let is_free = |name: &&str| !snapshots.iter().any(|volume| volume.name == *name);
        match [chain, special.as_str()].into_iter().find(is_free) {
            Some(name) => Ok(name.to_owned()),
            None => bail!("{special} exists already, and is not the layer of that name; rename it"),
        }
    }

    /// Makes a layer of what is known as an image only, and answers its name. It takes no space.
    fn keep_layer(&mut self, image: String, step: &Step, attributes: &Attributes) -> Result<String> {
        let chain = labels::text(attributes, labels::CHAIN_ID).context("a layer without a chain id")?;
        let name = Self::name_for(&chain, step, &self.client.volumes()?)?;
        let volume = self.begin(&Step { below: Some(image), ..step.clone() })?;
        self.commit_layer(&volume, name, &chain, step, attributes)
    }

    /// Makes a snapshot of a layer that is no image, and answers its name. Another import may have made the same layer
    /// meanwhile: then it is that one, and the volume has been for nothing.
    fn commit_layer(
        &mut self,
        volume: &str,
        mut name: String,
        chain: &str,
        step: &Step,
        attributes: &Attributes,
    ) -> Result<String> {
        loop {
            let taken = match self.commit(volume, &name, attributes.clone()) {
                Ok(()) => return Ok(name),
                Err(error) => error,
            };
            let is_taken = taken.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == Kind::AlreadyExists);
            ensure!(is_taken, taken);
            match self.find_layer(chain, step)? {
                Found::Same { name, is_image: false } => return Ok(name),
                Found::Same { .. } => name = Self::name_for(chain, step, &self.client.volumes()?)?,
                Found::Free(free) => name = free,
            }
            self.check()?;
        }
    }

    /// A working volume that holds what is below this layer.
    fn begin(&mut self, step: &Step) -> Result<String> {
        let Some(below) = &step.below else { return self.create_volume(step.size_bytes, step.sector_size) };
        let name = working_name();
        let began = Instant::now();
        loop {
            self.check()?;
            match self.client.create_clone(below, &name, ephemeral("import")) {
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

    fn create_volume(&mut self, size_bytes: u64, sector_size: u32) -> Result<String> {
        self.check()?;
        let name = working_name();
        self.client.create_volume(&name, size_bytes, sector_size, ephemeral("import"))?;
        self.working.push(name.clone());
        Ok(name)
    }

    /// Unpacks a layer onto a working volume. Answers its diff id.
    fn unpack(&self, volume: &str, layer: &Layer, step: &Step, progress: &ProgressBar) -> Result<Option<String>> {
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
    fn commit(&mut self, volume: &str, name: &str, attributes: Attributes) -> Result<()> {
        self.check()?;
        self.client.create_snapshot(volume, name, attributes)?;
        self.made.push(name.to_owned());
        self.client.delete(volume)?;
        self.working.retain(|working| working != volume);
        Ok(())
    }
}

impl Workshop<'_> {
    /// Deletes all that was made. Answers what could not be, with the reason.
    fn take_away(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        for volume in self.working.drain(..) {
            let gone = delete_when_idle(self.client, &volume);
            left.extend(gone.err().map(|failure| format!("{volume} ({failure})")));
        }
        for snapshot in self.made.drain(..).rev() {
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

/// Says what is behind an error of the file system on the volume.
fn explain(work: &Workshop<'_>, error: anyhow::Error, size_bytes: u64) -> anyhow::Error {
    let is = |wanted: &[i32]| {
        error.chain().any(|cause| {
            let found = cause
                .downcast_ref::<std::io::Error>()
                .and_then(std::io::Error::raw_os_error)
                .or_else(|| cause.downcast_ref::<Errno>().map(|errno| errno.raw_os_error()));
            found.is_some_and(|found| wanted.contains(&found))
        })
    };
    let out_of_space = is(&[libc::ENOSPC, libc::EDQUOT]);
    // A volume that gets no more blocks fails its file system's writes with one of these.
    if !out_of_space && !is(&[libc::EIO, libc::EROFS, libc::EUCLEAN]) {
        return error;
    }
    let pool_is_full = match work.client.call(Command::PoolInfo) {
        Ok(Reply::Pool(pool)) => pool.free_bytes < 16 << 20,
        _ => false,
    };
    if pool_is_full {
        return error.context("no space is left in the pool; delete something, or grow it with `plywood pool grow`");
    }
    if out_of_space {
        let taken = size::show(size_bytes);
        return anyhow!("the image is larger than its volume of {taken}; give it more with --size ({error:#})");
    }
    error.context("the volume took no more data; is there no space left on the disk that holds the pool?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_specification() {
        // Worked out with sha256sum.
        let first = "sha256:aaaa";
        assert_eq!(chain_id(None, first), first);
        assert_eq!(chain_id(Some(first), "sha256:bbbb"), sha256_of(b"sha256:aaaa sha256:bbbb"));
    }

    #[test]
    fn size_follows_the_content_when_it_is_large() {
        assert_eq!(default_size(0), 10 << 30);
        assert_eq!(default_size(7 << 30), 10 << 30);
        assert_eq!(default_size(20 << 30), 26 << 30);
        assert_eq!(default_size(u64::MAX / 2) % (1 << 30), 0);
    }
}

//! `plywood image import`: one snapshot a layer, chained, each made on a clone of the one below.
//!
//! The top one gets the name that was asked for, lower ones are named by their chain id (`sha256:...`). Each has its chain
//! id as an attribute: another image with the same lower layers finds them there and starts from them, whether they came with
//! an image, were exported since, or were unpacked by containerd. Where a larger volume is wanted than the layers below have, the clone and
//! its file system are grown.
//!
//! Everything is done on working volumes, which are gone at the end. When something fails, or a signal comes, the snapshots
//! made so far are gone too; where another import goes on meanwhile, which may stand on them, they are left for `plywood
//! prune`.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::io::Errno;

use super::directory::content_bytes;
use super::disk::Disk;
use super::filesystem::Filesystem;
use super::labels;
use super::source::{Configuration, Image, Layer, Source, platform};
use super::stream::{Interrupt, interrupted, sha256_of};
use super::workshop::{Step, Wanted, Workshop};
use crate::cli::attach::detach_when_idle;
use crate::cli::working::refuse_taken;
use crate::cli::{Context, Name, output, size};
use crate::daemon::protocol::{Attributes, Bytes, Command, Reply, Volume};
use crate::daemon::{Client, making};

/// Virtual size of an image whose content does not ask for more.
const DEFAULT_SIZE_BYTES: u64 = 10 << 30;
/// Sector size of an image's volume.
const SECTOR_SIZE: u32 = 4096;
/// That of a disk image, for which its partition table was written.
const DISK_SECTOR_SIZE: u32 = 512;

/// Imports an image.
#[derive(Debug, Args)]
pub struct ImportArguments {
    /// `oci:DIR[:TAG]`, `docker-archive:FILE`, `tar:FILE`, `dir:DIR`, `raw:FILE` or `qcow2:FILE`
    #[arg(value_parser = OsStringValueParser::new().try_map(|typed| Source::parse(&typed)))]
    source: Source,
    /// Name of the image
    name: Name,
    /// Virtual size of the image and of the containers started from it [default: 10G, or as the content needs, or a layer that it shares has]
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
    let interrupt = heed_signals()?;
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

/// How long after the first signal another one counts: timeout(1) sends two at once, and a shell and the kernel do when a
/// terminal goes.
const SAME_SIGNAL: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A flag that SIGINT, SIGTERM and SIGHUP set; another of them a second later ends the process where it stands, for it may wait
/// for what does not look at the flag. What is left then has the mark of what nobody needs.
///
/// # Errors
///
/// The handlers cannot be installed.
pub(crate) fn heed_signals() -> Result<Interrupt> {
    let interrupt = watch_signals()?;
    let is_armed = Arc::<AtomicBool>::default();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&is_armed))?;
    }
    let flag = Interrupt::clone(&interrupt);
    thread::spawn(move || {
        while !flag.load(Ordering::Relaxed) {
            thread::sleep(LOOK_AGAIN);
        }
        thread::sleep(SAME_SIGNAL);
        is_armed.store(true, Ordering::Relaxed);
    });
    Ok(interrupt)
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

/// Imports an image. When it fails the pool holds what it held before, but for layers that another import may have begun to
/// stand on.
///
/// # Errors
///
/// The source is not what it should be, the name is taken, the image does not fit into its volume or the pool, or a
/// signal came.
pub fn import_image(client: &Client, order: &Order, progress: &ProgressBar, interrupt: &Interrupt) -> Result<Imported> {
    refuse_taken(client, &order.name)?;
    // Everything that can be refused without the pool is looked at before anything is made.
    let disk = Disk::open(&order.source)?;
    let image = if disk.is_none() { order.source.open()? } else { None };
    // Layers without an image are pruned, but not those of this one.
    let making = making::begin(client.pool_uuid()?)?;
    let mut work = Workshop { client, interrupt, making: Some(making), working: Vec::new(), made: Vec::new() };
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
    let mut below: Option<Volume> = None;
    let mut chain: Option<String> = None;
    let mut reused = 0;
    for (index, layer) in image.layers.iter().enumerate() {
        progress.set_message(format!("layer {} of {count}", index + 1));
        let is_top = index + 1 == count;
        let is_least = order.size_bytes.is_none();
        let step = Step { filesystem, size_bytes, is_least, sector_size, number: index + 1, below: below.take() };
        let below_it = chain.take();
        let known = layer.diff_id().map(|diff_id| (chain_id(below_it.as_deref(), &diff_id), diff_id));
        let mut found = None;
        if let Some((id, diff_id)) = &known {
            let wanted = Wanted { chain: id, diff_id };
            if is_top {
                // The same content under one more name.
                found = work.begin_with(wanted, &step)?;
            } else {
                below = work.reuse(wanted, &step, &attributes_of_layer(&step, known.as_ref()))?;
            }
        }
        if below.is_some() || found.is_some() {
            progress.inc(layer.stored_bytes().unwrap_or(0));
            reused += 1;
        }
        if below.is_some() {
            chain = known.map(|(chain, _)| chain);
            continue;
        }
        let (volume, known) = match found {
            Some(volume) => (volume, known),
            None => {
                let volume = work.begin_as_large(&step)?;
                let unpacked = work.unpack(&volume, layer, &step, progress);
                let diff_id = unpacked.map_err(|error| explain(work, error, size_bytes))?;
                let told = diff_id.map(|diff_id| (chain_id(below_it.as_deref(), &diff_id), diff_id));
                // Only now it may be known which layer this is, and whether the pool has it.
                let had = match &told {
                    Some((chain, diff_id)) if known.is_none() => work.begin_with(Wanted { chain, diff_id }, &step)?,
                    _ => None,
                };
                if had.is_some() {
                    work.drop_working(&volume)?;
                    reused += 1;
                }
                (had.unwrap_or(volume), told)
            }
        };
        let mut attributes = attributes_of_layer(&step, known.as_ref());
        if is_top {
            let diff_ids: Vec<String> = known.iter().map(|(_, diff_id)| diff_id.clone()).collect();
            attributes.extend(attributes_of_image(&order.source, image.configuration.as_ref(), &diff_ids)?);
        }
        below = Some(match &known {
            Some((chain, diff_id)) if !is_top => {
                work.commit_layer(&volume, Wanted { chain, diff_id }, &step, &attributes)?
            }
            _ => work.commit(&volume, &order.name, attributes)?,
        });
        chain = known.map(|(chain, _)| chain);
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

/// `known` has its chain id and diff id.
fn attributes_of_layer(step: &Step, known: Option<&(String, String)>) -> Attributes {
    let mut attributes = Attributes::new();
    attributes.insert(labels::LAYER.into(), step.number.to_string().as_str().into());
    attributes.insert(labels::FILESYSTEM.into(), step.filesystem.to_string().as_str().into());
    let below = step.below.as_ref().map(|below| below.uuid.to_string());
    let (chain, diff_id) = known.map(|(chain, diff_id)| (chain, diff_id)).unzip();
    for (key, value) in [(labels::DIFF_ID, diff_id), (labels::CHAIN_ID, chain), (labels::BELOW, below.as_ref())] {
        if let Some(value) = value {
            attributes.insert(key.into(), value.as_str().into());
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

//! The same story on both sides: layers, containers, two writes each, and what is tried besides.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use indicatif::ProgressBar;
use serde::Serialize;

use super::Story;
use super::content::{LARGE_FILE, LAYERS, Noise, describe, write_layer};
use super::faults::{Trial, try_all};
use super::measure::{Times, taken_bytes, write_block};
use super::overlay::{Ground, Union};
use super::place::{DemoPool, Place};
use crate::cli::image::{Order, Source, copy_directory, import_image, open_root};
use crate::cli::output::Waiting;
use crate::cli::run::{Container, Network, Settings, remove_container, run_in_background, write_bundle};
use crate::daemon::Client;
use crate::daemon::protocol::{Check, Command, Pool, Reply, Volume};

/// What was measured on one side.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// What it is.
    pub name: String,
    /// A container's root being made and mounted, without its process.
    pub start: Times,
    /// The first write into the large file and its fsync, in each container.
    pub first: Times,
    /// The second.
    pub second: Times,
    /// Bytes that the disk wrote for all the first writes, where it counts them.
    pub first_written_bytes: Option<u64>,
    /// And for the second.
    pub second_written_bytes: Option<u64>,
    /// Space that the containers have of their own after both writes.
    pub taken_bytes: u64,
    /// What was tried.
    pub trials: Vec<Trial>,
}

/// What is told of plywood alone.
#[derive(Clone, Debug, Serialize)]
pub struct PlywoodStory {
    /// What both sides have.
    pub side: Side,
    /// The image's layers, the lowest first.
    pub layers: Vec<Sizes>,
    /// The containers.
    pub containers: Vec<Sizes>,
    /// Own bytes of a container before its first write: the largest.
    pub untouched_bytes: u64,
    /// What is in the pool's file.
    pub accounts: Accounts,
    /// What deleting gave back.
    pub given_back: GivenBack,
    /// What a check of the pool found at the end.
    pub check_faults: Vec<String>,
}

/// A volume's sizes, as `docker ps -s` shows them.
#[derive(Clone, Debug, Serialize)]
pub struct Sizes {
    /// Its name.
    pub name: String,
    /// What it alone has.
    pub own_bytes: u64,
    /// With all that it shares.
    pub virtual_bytes: u64,
}

/// The pool's file, from its creation until the containers have written.
#[derive(Clone, Debug, Serialize)]
pub struct Accounts {
    /// What `du` sees more of it.
    pub grown_bytes: u64,
    /// Own bytes of all layers and containers.
    pub own_bytes: u64,
    /// Nodes, records and attributes.
    pub metadata_bytes: u64,
    /// The space map's pages that came with new groups.
    pub layout_bytes: u64,
    /// Blocks that are written ahead of need, or set aside.
    pub ahead_bytes: u64,
}

impl Accounts {
    /// What `du` should see: the sizes that volumes are shown with, and what the pool lists as its own. Metadata is not
    /// in it: it has to fit into what the sum may be off by.
    pub const fn accounted_bytes(&self) -> u64 {
        self.own_bytes + self.layout_bytes + self.ahead_bytes
    }
}

/// What `du` sees of the pool's file.
#[derive(Clone, Debug, Serialize)]
pub struct GivenBack {
    /// With everything.
    pub before_bytes: u64,
    /// Without the containers.
    pub without_containers_bytes: u64,
    /// Without the layers above the root file system either.
    pub without_layers_bytes: u64,
    /// Own bytes of what was deleted.
    pub expected_bytes: u64,
}

impl GivenBack {
    /// What came back.
    pub const fn back_bytes(&self) -> u64 {
        self.before_bytes.saturating_sub(self.without_layers_bytes)
    }
}

/// A container whose process runs in the background. The process ends first, then the root goes.
struct Running<'a> {
    container: Option<Container<'a>>,
    process: u32,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(container) = self.container.take() {
            remove_container(&container.id);
            drop(container);
        }
    }
}

/// Tells the story on plywood.
///
/// # Errors
///
/// A step fails, or a signal came.
pub fn on_plywood(story: &Story, place: &Place, source: &Source) -> Result<PlywoodStory> {
    let waiting = Waiting::begin("plywood: importing the root file system");
    let pool = DemoPool::create(place)?;
    let client = &pool.client;
    let empty = settled(client, place)?;
    let order =
        Order { source: source.clone(), name: "debian".into(), size_bytes: None, filesystem: None, sector_size: None };
    import_image(client, &order, &ProgressBar::hidden(), &story.interrupt)?;
    drop(waiting);
    let mut top = "debian".to_owned();
    for layer in 1..=LAYERS {
        story.check()?;
        let _waiting = Waiting::begin(format!("plywood: layer {layer}, {}", describe(layer)));
        top = add_layer(story, client, &top, layer)?;
    }
    let waiting = Waiting::begin("plywood: containers");
    let (mut running, mut starts) = (Vec::new(), Vec::new());
    for number in 1..=story.arguments.containers {
        story.check()?;
        let began = Instant::now();
        let container = Container::open(client, &top, Some(&format!("container-{number}")), [].into())?;
        starts.push(began.elapsed());
        let process = start_process(&container.bundle, &container.id)?;
        running.push(Running { container: Some(container), process });
    }
    let names: Vec<String> = (1..=story.arguments.containers).map(|number| format!("container-{number}")).collect();
    story.disk.written_bytes()?;
    let untouched_bytes =
        names.iter().map(|name| Ok(client.volume(name)?.own_bytes)).collect::<Result<Vec<_>>>()?.into_iter().max();
    let roots: Vec<PathBuf> = running.iter().map(|one| root_of(one.process)).collect();
    let (first, first_written_bytes) = write_all(story, &roots, 1)?;
    let (second, second_written_bytes) = write_all(story, &roots, 2)?;
    let quiet = settled(client, place)?;
    let after = quiet.taken_bytes;
    drop(waiting);
    let _waiting = Waiting::begin("plywood: what else is right, sizes, and the space that comes back");
    let layers = sizes_of_layers(client)?;
    let containers = names.iter().map(|name| Ok(sizes(&client.volume(name)?))).collect::<Result<Vec<_>>>()?;
    let accounts = accounts(&empty, &quiet, &layers, &containers);
    let trials = match running.first().and_then(|one| one.container.as_ref()) {
        Some(container) => try_all(&container.root())?,
        None => Vec::new(),
    };
    drop(running);
    let without_containers = settled(client, place)?.taken_bytes;
    for layer in (1..=LAYERS).rev() {
        client.delete(&layer_name(layer))?;
    }
    let above: u64 = layers.iter().filter(|layer| layer.name.starts_with("layer-")).map(|layer| layer.own_bytes).sum();
    let own: u64 = containers.iter().map(|container| container.own_bytes).sum();
    let given_back = GivenBack {
        before_bytes: after,
        without_containers_bytes: without_containers,
        without_layers_bytes: settled(client, place)?.taken_bytes,
        expected_bytes: above + own,
    };
    let Reply::Check(Check { faults, .. }) = client.call(Command::PoolCheck)? else { bail!("unexpected answer") };
    Ok(PlywoodStory {
        side: Side {
            name: "plywood".into(),
            start: Times::of(&starts),
            first,
            second,
            first_written_bytes,
            second_written_bytes,
            taken_bytes: own,
            trials,
        },
        layers,
        containers,
        untouched_bytes: untouched_bytes.unwrap_or(0),
        accounts,
        given_back,
        check_faults: faults.into_iter().map(|fault| fault.message).collect(),
    })
}

fn layer_name(layer: usize) -> String {
    format!("layer-{layer}")
}

/// A clone of the layer below, filled, and made a snapshot: as an image is built.
fn add_layer(story: &Story, client: &Client, below: &str, layer: usize) -> Result<String> {
    let name = layer_name(layer);
    let working = format!("building-{name}");
    let mut container = Container::open(client, below, Some(&working), [].into())?;
    write_layer(layer, &container.root(), story.arguments.file_size, &story.interrupt)?;
    container.keep = true;
    container.close()?;
    client.create_snapshot(&working, &name, [].into())?;
    client.delete(&working)?;
    Ok(name)
}

/// The pool, and its file's size, when nothing is left to be done in the background.
struct Quiet {
    pool: Pool,
    taken_bytes: u64,
}

fn settled(client: &Client, place: &Place) -> Result<Quiet> {
    let began = Instant::now();
    let mut former = None;
    loop {
        let Reply::Pool(pool) = client.call(Command::PoolInfo)? else { bail!("unexpected answer") };
        let taken = taken_bytes(&place.pool_path())?;
        let state = (taken, pool.used_bytes, pool.freeing);
        let quiet = !pool.freeing && former == Some(state);
        if quiet || began.elapsed() > Duration::from_secs(20) {
            return Ok(Quiet { pool: *pool, taken_bytes: taken });
        }
        former = Some(state);
        // The background commits each second, and checkpoints and punches when it is idle.
        thread::sleep(Duration::from_millis(2500));
    }
}

fn sizes(volume: &Volume) -> Sizes {
    Sizes { name: volume.name.clone(), own_bytes: volume.own_bytes, virtual_bytes: volume.mapped_bytes }
}

fn sizes_of_layers(client: &Client) -> Result<Vec<Sizes>> {
    let mut snapshots: Vec<Volume> = client.volumes()?.into_iter().filter(|volume| volume.snapshot).collect();
    snapshots.sort_by_key(|volume| volume.depth);
    Ok(snapshots.iter().map(sizes).collect())
}

fn accounts(empty: &Quiet, quiet: &Quiet, layers: &[Sizes], containers: &[Sizes]) -> Accounts {
    let own_bytes: u64 = layers.iter().chain(containers).map(|one| one.own_bytes).sum();
    let layout = |pool: &Pool| pool.layout_bytes;
    let layout_bytes = layout(&quiet.pool).saturating_sub(layout(&empty.pool));
    let used = quiet.pool.used_bytes.saturating_sub(empty.pool.used_bytes);
    let metadata_bytes = used.saturating_sub(layout_bytes).saturating_sub(own_bytes);
    let ahead = |state: &Quiet| state.pool.host_bytes.saturating_sub(state.pool.used_bytes);
    Accounts {
        grown_bytes: quiet.taken_bytes.saturating_sub(empty.taken_bytes),
        own_bytes,
        metadata_bytes,
        layout_bytes,
        ahead_bytes: ahead(quiet).saturating_sub(ahead(empty)),
    }
}

/// Tells the story on overlayfs.
///
/// # Errors
///
/// A step fails, or a signal came.
pub fn on_overlay(story: &Story, place: &Place, source: &Source) -> Result<Side> {
    let copies = story.arguments.file_size.saturating_mul(u64::from(story.arguments.containers) + 2);
    let ground = Ground::prepare(place.path(), copies + (8 << 30))?;
    let mut layers = vec![ground.layer(0)?];
    {
        let _waiting = Waiting::begin("overlayfs: unpacking the same layers");
        unpack(story, source, &layers[0])?;
        for layer in 1..=LAYERS {
            story.check()?;
            layers.push(ground.layer(layer)?);
            write_layer(layer, &layers[layer], story.arguments.file_size, &story.interrupt)?;
        }
    }
    let waiting = Waiting::begin("overlayfs: containers, each of which copies the large file");
    let (mut unions, mut starts, mut roots): (Vec<Union>, _, _) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..story.arguments.containers {
        story.check()?;
        let began = Instant::now();
        let union = ground.start(&layers)?;
        starts.push(began.elapsed());
        roots.push(root_of(start_process(&union.bundle, &union.id)?));
        unions.push(union);
    }
    let taken = |unions: &[Union]| unions.iter().map(|union| taken_bytes(&union.upper())).sum::<Result<u64>>();
    story.disk.written_bytes()?;
    let before = taken(&unions)?;
    let (first, first_written_bytes) = write_all(story, &roots, 1)?;
    let (second, second_written_bytes) = write_all(story, &roots, 2)?;
    let after = taken(&unions)?;
    drop(waiting);
    let trials = match unions.first() {
        Some(union) => try_all(&union.root())?,
        None => Vec::new(),
    };
    drop(unions);
    Ok(Side {
        name: ground.description.clone(),
        start: Times::of(&starts),
        first,
        second,
        first_written_bytes,
        second_written_bytes,
        taken_bytes: after.saturating_sub(before),
        trials,
    })
}

/// Unpacks the root file system into a directory: all its layers, as the lowest of overlayfs's.
fn unpack(story: &Story, source: &Source, directory: &Path) -> Result<()> {
    if let Source::Directory(from) = source {
        copy_directory(open_root(directory)?, from, &ProgressBar::hidden(), &story.interrupt)?;
        return Ok(());
    }
    let Some(image) = source.open()? else { bail!("{}: the demo needs a root file system", source.describe()) };
    for layer in &image.layers {
        layer.unpack(open_root(directory)?, &story.interrupt)?;
    }
    Ok(())
}

/// Starts a process that does nothing, as a container's own.
fn start_process(bundle: &Path, id: &str) -> Result<u32> {
    let root = bundle.join("rootfs");
    let sleep =
        ["bin/sleep", "usr/bin/sleep"].into_iter().find(|program| root.join(program).symlink_metadata().is_ok());
    ensure!(sleep.is_some(), "the root file system has no program `sleep`, with which the demo's containers wait");
    let settings = Settings {
        command: vec![format!("/{}", sleep.unwrap_or_default()), "86400".into()],
        hostname: "demo".into(),
        network: Network::None,
        ..Settings::default()
    };
    write_bundle(bundle, &settings)?;
    run_in_background(bundle, id)
}

/// The root directory of a process, in its own mount namespace.
fn root_of(process: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{process}/root"))
}

/// One write in each container, and what the disk wrote for all of them.
fn write_all(story: &Story, roots: &[PathBuf], round: u64) -> Result<(Times, Option<u64>)> {
    let before = story.disk.written_bytes()?;
    let mut times = Vec::new();
    for (number, root) in roots.iter().enumerate() {
        story.check()?;
        let path = root.join(LARGE_FILE);
        // Not the same block in every container, nor in both rounds.
        let mut noise = Noise((1 + round * 1000 + number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        times.push(write_block(&path, &mut noise)?);
    }
    let written = match (before, story.disk.written_bytes()?) {
        (Some(before), Some(after)) => Some(after.saturating_sub(before)),
        _ => None,
    };
    Ok((Times::of(&times), written))
}

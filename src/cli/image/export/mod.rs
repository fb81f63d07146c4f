//! `plywood image export`: an image as an OCI layout or an archive for Docker, a layer for each snapshot that it is made of.
//!
//! A layer is what differs between two snapshots, as names. On ext4 the changed blocks tell which names these are
//! ([`trace`]), so that the cost is that of the change. Where they do not, and on other file systems, both trees are walked
//! ([`changes`]). Content is read from a mounted private clone, so that the kernel has replayed a journal, if there was
//! something to be replayed.

mod changes;
pub(super) mod ext4;
mod ranges;
mod sink;
mod tarball;
mod target;
mod trace;

use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum as _};
use indicatif::ProgressBar;
use serde::Serialize;

use super::import::chain_id;
use super::layers::{self, Known, known};
use super::tree::Tree;
use super::{Detached, Filesystem, Interrupt, heed_signals, labels};
use crate::cli::output;
use crate::cli::working::{ephemeral, private_name, take_away};
use crate::cli::{Context, Name, size};
use crate::daemon::protocol::{Failure, Kind, Range, Volume};
use crate::daemon::{Client, making};
use crate::io::Frozen;
use crate::units::BLOCK_BYTES;
use changes::{Changes, compare, differs_since, tell};
use ext4::Ext4;
use ranges::Blocks;
use sink::{Archive, Blob, Layout, Sink};
use tarball::{Tarball, Written};

pub use sink::Compression;
pub use target::Target;

/// Exports an image.
#[derive(Debug, Args)]
#[command(after_help = "\
plywood image export web oci:/srv/images:web
plywood image export web docker-archive:/tmp/web.tar && docker load --input /tmp/web.tar

Layers are written anew from the pool's snapshots: their digests are not those of the archives that were imported. The \
pool knows them by both. A container becomes an image with plywood commit.")]
pub struct ExportArguments {
    /// The image
    name: Name,
    /// `oci:DIR[:TAG]`, to which the image is added, or `docker-archive:FILE[:NAME[:TAG]]`
    to: Target,
    /// How the layers of an OCI layout are compressed
    #[arg(long, value_enum, default_value_t)]
    compress: Compression,
    /// Find what a layer changed by walking the trees, not by its changed blocks
    #[arg(long)]
    walk: bool,
}

/// How it was found what a layer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Found {
    /// There is nothing below it: it is all there is.
    Whole,
    /// By the blocks that have changed.
    Blocks,
    /// By walking both trees.
    Walk,
}

/// A layer that was written.
#[derive(Clone, Debug, Serialize)]
struct Told {
    snapshot: String,
    diff_id: String,
    digest: String,
    size_bytes: u64,
    #[serde(flatten)]
    written: Written,
    found_by: Found,
    /// Bytes that were read of both snapshots' devices.
    read_bytes: u64,
}

/// Does it.
///
/// # Errors
/// The name is no image's, the target has something in the way, and what keeps it from being read or written.
pub fn export(context: &Context, arguments: &ExportArguments) -> Result<()> {
    let name = arguments.name.text()?;
    let client = context.daemon_client_for(&name)?;
    let interrupt = heed_signals()?;
    // Prune leaves the private clones alone, and image delete the layers.
    let _making = making::begin(client.pool_uuid()?)?;
    let all = known(&client)?;
    let image = all.iter().find(|known| known.volume.name == name).with_context(|| format!("{name} has gone"))?;
    ensure!(image.is_image(), "{name} is no image; plywood volume export writes it as a disk image");
    let filesystem = labels::text(&image.attributes, labels::FILESYSTEM)
        .with_context(|| format!("{name} is a disk image; plywood volume export writes it as one"))?;
    let filesystem = Filesystem::from_str(&filesystem, false)
        .map_err(|_| anyhow::anyhow!("{name} is on a file system that is not known: {filesystem}"))?;
    let snapshots = layers::chain(&all, image)?;
    let mut sink = match &arguments.to {
        Target::Oci { directory, tag } => Sink::Oci(Layout::begin(directory, tag, arguments.compress)?),
        Target::DockerArchive { file, reference } => {
            let named = reference.clone().or_else(|| target::tagged(&name));
            let named = named
                .with_context(|| format!("Docker takes no image called {name}; give docker-archive:FILE:NAME[:TAG]"))?;
            Sink::Docker(Archive::begin(file, named)?)
        }
    };
    let progress = super::import::progress_bar();
    super::import::start_progress(&progress, None);
    let work = Work { client: &client, filesystem, walk: arguments.walk, progress: &progress, interrupt: &interrupt };
    let written = work.write_all(&snapshots, &mut sink);
    progress.finish_and_clear();
    let (told, blobs) = written?;
    let digest = sink.finish(&configuration(image, &blobs)?, &blobs)?;
    remember(&client, &snapshots, &blobs);
    report(context, &name, &arguments.to, &digest, &told)
}

fn report(context: &Context, name: &str, to: &Target, digest: &str, layers: &[Told]) -> Result<()> {
    if context.json {
        let value = serde_json::json!({"name": name, "to": to.to_string(), "digest": digest, "layers": layers});
        return Ok(output::json("exported", &value)?);
    }
    let count = if layers.len() == 1 { "1 layer".to_owned() } else { format!("{} layers", layers.len()) };
    let stored: u64 = layers.iter().map(|layer| layer.size_bytes).sum();
    let sockets: u64 = layers.iter().map(|layer| layer.written.sockets_left_out).sum();
    let sockets = if sockets == 0 { String::new() } else { format!(", without {sockets} sockets") };
    Ok(output::line(&format!("{name}: {count}, {} in {to}{sockets}; {digest}", size::show(stored)))?)
}

/// Notes on the layers which ones they are now: so an import of what was exported finds them.
fn remember(client: &Client, snapshots: &[&Known], blobs: &[Blob]) {
    let mut chain: Option<String> = None;
    for (snapshot, blob) in snapshots.iter().zip(blobs) {
        let id = chain_id(chain.as_deref(), &blob.diff_id);
        if !layers::is_layer(snapshot, &id) {
            let exported = [(labels::EXPORTED.to_owned(), Some(id.as_str().into()))].into();
            let Volume { uuid, name, .. } = &snapshot.volume;
            let noted = client.name_of(*uuid, name).and_then(|now| match now {
                Some(now) => client.set_attributes(&now, exported),
                None => Err(Failure::new(Kind::NotFound, "it has gone")),
            });
            if let Err(failure) = noted {
                tracing::warn!("{name}: an import of this export will not find it: {failure}");
            }
        }
        chain = Some(id);
    }
}

/// The image's configuration with the layers as they were written. All else stays as it is, known here or not.
fn configuration(image: &Known, layers: &[Blob]) -> Result<Vec<u8>> {
    let mut object = labels::raw_configuration(&image.attributes, &image.volume.name)?;
    let diff_ids: Vec<&str> = layers.iter().map(|blob| blob.diff_id.as_str()).collect();
    object.insert("rootfs".into(), serde_json::json!({"type": "layers", "diff_ids": diff_ids}));
    let steps = object.get("history").and_then(serde_json::Value::as_array).map(|steps| {
        let is_layer = |step: &&serde_json::Value| step["empty_layer"].as_bool() != Some(true);
        steps.iter().filter(is_layer).count()
    });
    // A history that tells of other layers than there are is refused by who reads it.
    if steps.is_some_and(|steps| steps != layers.len()) {
        object.remove("history");
    }
    Ok(serde_json::to_vec(&object)?)
}

/// What is the same for all layers.
struct Work<'a> {
    client: &'a Client,
    filesystem: Filesystem,
    walk: bool,
    progress: &'a ProgressBar,
    interrupt: &'a Interrupt,
}

impl Work<'_> {
    /// Writes a layer for each snapshot; each stands on the one before it.
    fn write_all(&self, snapshots: &[&Known], sink: &mut Sink) -> Result<(Vec<Told>, Vec<Blob>)> {
        let mut told: Vec<Told> = Vec::new();
        let mut blobs: Vec<Blob> = Vec::new();
        let mut below: Option<Opened<'_>> = None;
        for (number, snapshot) in snapshots.iter().enumerate() {
            self.progress.set_message(format!("layer {} of {}", number + 1, snapshots.len()));
            let mut layer = Opened::open(self, &snapshot.volume)?;
            let written = sink.layer(|to| self.write(below.as_mut(), &mut layer, to));
            let (blob, (written, found_by, read_bytes)) = written.with_context(|| snapshot.volume.name.clone())?;
            told.push(Told {
                snapshot: snapshot.volume.name.clone(),
                diff_id: blob.diff_id.clone(),
                digest: blob.digest.clone(),
                size_bytes: blob.size_bytes,
                written,
                found_by,
                read_bytes,
            });
            blobs.push(blob);
            below = Some(layer);
        }
        Ok((told, blobs))
    }

    fn write(
        &self,
        below: Option<&mut Opened<'_>>,
        layer: &mut Opened<'_>,
        to: &mut dyn Write,
    ) -> Result<(Written, Found, u64)> {
        let devices: Vec<PathBuf> =
            below.iter().map(|below| below.device.clone()).chain([layer.device.clone()]).collect();
        let read = || devices.iter().map(|device| read_bytes(device)).sum::<u64>();
        let before = read();
        let mut tarball = Tarball::new(to, below.is_some(), self.progress, self.interrupt);
        let found = match below {
            None => {
                compare(None, layer.root()?, Vec::new(), &|_, _| true, &mut |met| tarball.take(met))?;
                Found::Whole
            }
            Some(below) => match self.by_blocks(below, layer) {
                Some(changes) => {
                    let new = Tree::new(layer.root()?);
                    tell(&changes, &new, &mut || below.root(), &mut |met| tarball.take(met))?;
                    Found::Blocks
                }
                None => {
                    let differs = differs_since(below.created_ns);
                    let old = Some(below.root()?);
                    compare(old, layer.root()?, Vec::new(), &differs, &mut |met| tarball.take(met))?;
                    Found::Walk
                }
            },
        };
        let (written, _) = tarball.finish()?;
        Ok((written, found, read().saturating_sub(before)))
    }

    /// What the changed blocks say; none where they do not say it.
    fn by_blocks(&self, below: &mut Opened<'_>, layer: &mut Opened<'_>) -> Option<Changes> {
        if self.walk || self.filesystem != Filesystem::Ext4 {
            return None;
        }
        let mut found = || -> Result<Changes> {
            let (old, new) = (below.blocks()?, layer.blocks()?);
            let mut blocks = Vec::new();
            self.client.each_changed_range(Some(&below.clone), &layer.clone, |Range(offset, length, _)| {
                blocks.push(offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES));
                Ok::<_, Failure>(())
            })?;
            let blocks: Blocks = blocks.into_iter().collect();
            let changes = trace::changes(&old, &new, &blocks)?;
            tracing::debug!(layer = layer.clone, old = old.read_blocks(), new = new.read_blocks(), "blocks read");
            Ok(changes)
        };
        found().inspect_err(|error| tracing::info!("the trees are walked: {error:#}")).ok()
    }
}

/// A snapshot as a device, and mounted when it has to be. What it is read through is taken away when this is dropped.
struct Opened<'a> {
    client: &'a Client,
    clone: String,
    device: PathBuf,
    filesystem: Filesystem,
    created_ns: u64,
    mounted: Option<Detached>,
}

impl<'a> Opened<'a> {
    fn open(work: &Work<'a>, snapshot: &Volume) -> Result<Self> {
        let client = work.client;
        let clone = private_name(&snapshot.name, "export");
        let made = client.create_clone(&snapshot.name, &clone, ephemeral("export"))?;
        let attached = if made.origin_uuid == Some(snapshot.uuid) {
            client.attach(&clone, false)
        } else {
            Err(Failure::new(Kind::NotFound, format!("{} has gone, and another has its name", snapshot.name)))
        };
        match attached {
            Ok(attached) => Ok(Self {
                client,
                clone,
                device: attached.device,
                filesystem: work.filesystem,
                created_ns: snapshot.created_ns,
                mounted: None,
            }),
            Err(failure) => {
                take_away(client, &clone);
                Err(failure.into())
            }
        }
    }

    /// The root of its tree. Nobody may hold it for longer than this.
    fn root(&mut self) -> Result<OwnedFd> {
        if self.mounted.is_none() {
            // Inodes that stand beside one that is wanted are not read ahead: they are wanted seldom.
            let options: &[(&str, &str)] = match self.filesystem {
                Filesystem::Ext4 => &[("inode_readahead_blks", "1")],
                _ => &[],
            };
            self.mounted = Some(self.filesystem.mount_with(&self.device, options)?);
        }
        self.mounted.as_ref().context("it is not mounted")?.root()
    }

    /// Its blocks, with all of them where they belong: the kernel replays a journal that has something in it first.
    fn blocks(&mut self) -> Result<Ext4> {
        let ext4 = Ext4::open(&self.device)?;
        if self.mounted.is_some() || !ext4.is_unclean {
            return Ok(ext4);
        }
        let root = self.root()?;
        let place = format!("/proc/self/fd/{}", root.as_raw_fd());
        Frozen::freeze(Path::new(&place)).and_then(Frozen::thaw).context("replaying the journal")?;
        Ext4::open(&self.device)
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.mounted = None;
        take_away(self.client, &self.clone);
    }
}

/// Bytes read of a block device so far (`Documentation/block/stat.rst`: sectors of 512 bytes); 0 where that is not told.
fn read_bytes(device: &Path) -> u64 {
    let told = || -> Result<u64> {
        let Some(name) = device.file_name() else { bail!("no device") };
        let stat = fs::read_to_string(Path::new("/sys/class/block").join(name).join("stat"))?;
        Ok(stat.split_whitespace().nth(2).context("no sectors")?.parse::<u64>()? * 512)
    };
    told().unwrap_or(0)
}

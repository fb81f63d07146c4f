//! `plywood prune`: what nothing refers to any more.
//!
//! Four kinds, and nothing else. Volumes that were for the time of a use, when the use has ended: of imports, exports, mounts,
//! sending and receiving, `run --rm` and creations for Docker that were cut short. Layers that no image has and nothing was cloned from. With
//! `--images` images, too, that nothing was made from. What containers have said that are no more. Whatever
//! carries a mark that is not known here is left alone: whoever set it knows when it has had its use.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use uuid::Uuid;

use super::image::labels;
use super::image::layers::{self, Known, known};
use super::output::{self, Waiting, confirm};
use super::run::logs;
use super::{Context, size};
use crate::daemon::attributes::{DOCKER_MOUNTS, EPHEMERAL};
use crate::daemon::protocol::{Command, Failure, Kind, Pool, Reply, Volume};
use crate::daemon::{Client, making};

/// How long the space of what was deleted is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Deletes what nothing refers to.
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing refers to:
  clones that were made for a mount, or for a container of `run --rm`, which has ended
  what an import, export, send, receive, or a creation for Docker has left that was cut short
  ephemeral volumes of Docker after their last use
  layers of images that no image has any more, and that nothing was cloned from
  the logs of containers that are no more
  with --images: images that no container and no other image is made from

Other images, snapshots, containers that were kept, and volumes, also those of Docker that no container uses, are never pruned: \
delete them by name, or with docker volume rm. What is attached, in use or protected is left alone. While something is \
being imported or created, prune waits for nobody and is refused.")]
pub struct PruneArguments {
    /// Show what would be deleted, and the bytes that it would free at least
    #[arg(long)]
    dry_run: bool,
    /// Images too that nothing is made from
    #[arg(long)]
    images: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// Something that nothing refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Loose {
    name: String,
    reason: &'static str,
    /// What deleting it alone would free, where it is known.
    exclusive_bytes: Option<u64>,
}

/// Does it.
///
/// # Errors
/// When something is being made, and what the pool answers.
pub fn prune(context: &Context, arguments: &PruneArguments) -> Result<()> {
    let client = context.client()?;
    let pool = client.hello()?;
    let alone = || -> Result<_> {
        // On the file nobody else does anything anyway.
        if !client.is_daemon() {
            return Ok(None);
        }
        let Some(alone) = making::alone(pool.pool_uuid)? else {
            bail!("something is being imported or created in pool {}; try again when it has ended", pool.pool_name);
        };
        Ok(Some(alone))
    };
    let found = || find(&known(&client)?, arguments.images);
    let loose = {
        let _alone = alone()?;
        found()?
        // Nobody is kept waiting for an answer.
    };
    let at_least: u64 = loose.iter().filter_map(|loose| loose.exclusive_bytes).sum();
    if arguments.dry_run {
        return told(context, &loose, "would be deleted", "frees_at_least_bytes", at_least);
    }
    if !loose.is_empty() {
        if !context.json {
            list(&loose)?;
        }
        confirm(&format!("delete these, which frees at least {}?", size::show(at_least)), arguments.yes)?;
    }
    let before = if loose.is_empty() { 0 } else { settled_usage(&client)? };
    let mut deleted = Vec::new();
    let alone = alone()?;
    let now = if loose.is_empty() { Vec::new() } else { found()? };
    for loose in now.into_iter().filter(|found| loose.iter().any(|asked| asked.name == found.name)) {
        match client.delete(&loose.name) {
            Ok(()) => deleted.push(loose),
            // It has got a use, or an end, meanwhile.
            Err(Failure { kind: Kind::Busy | Kind::NotFound, message }) => tracing::info!("{}: {message}", loose.name),
            Err(failure) => return Err(failure.into()),
        }
    }
    let living: Vec<Uuid> = client.volumes()?.into_iter().map(|volume| volume.uuid).collect();
    let of_logs = logs::remove_all_but(pool.pool_uuid, &living)?;
    drop(alone);
    let freed = if deleted.is_empty() { 0 } else { before.saturating_sub(settled_usage(&client)?) } + of_logs;
    told(context, &deleted, "deleted", "freed_bytes", freed)
}

/// What nothing refers to among all there is.
fn find(all: &[Known], images: bool) -> Result<Vec<Loose>> {
    let mut loose = Vec::new();
    let mut gone: BTreeSet<Uuid> = BTreeSet::new();
    for known in all.iter().filter(|known| known.is_free()) {
        if let Some(reason) = ended(known) {
            gone.insert(known.volume.uuid);
            loose.push(loose_of(&known.volume, reason));
        }
    }
    while images && let Some(known) = unused_image(all, &gone) {
        gone.insert(known.volume.uuid);
        loose.push(loose_of(&known.volume, "an image that nothing is made from"));
    }
    let unneeded = layers::unneeded(all, &gone)?;
    loose.extend(unneeded.into_iter().map(|known| loose_of(&known.volume, "a layer of no image")));
    Ok(loose)
}

/// An image that nothing is made from but what is about to go: no container, no clone, no image that stands on it.
fn unused_image<'a>(all: &'a [Known], gone: &BTreeSet<Uuid>) -> Option<&'a Known> {
    let is_below = |image: &Known, other: &Known| {
        let of_it = other.volume.origin_uuid == Some(image.volume.uuid);
        let below = labels::text(&other.attributes, labels::BELOW);
        of_it || below.is_some_and(|below| below == image.volume.uuid.to_string())
    };
    all.iter().find(|known| {
        let is_used = || all.iter().any(|other| !gone.contains(&other.volume.uuid) && is_below(known, other));
        known.is_image() && known.is_free() && !gone.contains(&known.volume.uuid) && !is_used()
    })
}

fn loose_of(volume: &Volume, reason: &'static str) -> Loose {
    Loose { name: volume.name.clone(), reason, exclusive_bytes: volume.exclusive_bytes }
}

/// Why a volume has had its use. None: it has not, or that is not known here.
fn ended(known: &Known) -> Option<&'static str> {
    match known.attributes.get(EPHEMERAL)?.0.as_slice() {
        b"receive" => Some("left by a receive that was cut short"),
        b"send" => Some("left by a send that was cut short"),
        b"export" => Some("left by an export that was cut short"),
        _ if known.volume.snapshot => None,
        b"import" => Some("left by an import that was cut short"),
        b"mount" => Some("made for a mount that has ended"),
        b"volume" => Some("left by a container's start that was cut short"),
        b"run" => Some("of a container that has ended"),
        b"docker-create" => Some("left by a creation that was cut short"),
        // One that was never mounted waits for its use.
        b"docker" if known.attributes.contains_key(DOCKER_MOUNTS) => Some("ephemeral, and has had its use"),
        _ => None,
    }
}

fn pool_of(client: &Client) -> Result<Pool> {
    match client.call(Command::PoolInfo)? {
        Reply::Pool(pool) => Ok(*pool),
        reply => bail!("unexpected answer {reply:?}"),
    }
}

/// The bytes used, when everything that was deleted has been given back.
fn settled_usage(client: &Client) -> Result<u64> {
    let _waiting = Waiting::begin("giving the space back");
    let began = Instant::now();
    loop {
        // A trim is of a checkpoint, and so are the figures.
        client.call(Command::PoolTrim)?;
        let pool = pool_of(client)?;
        if !pool.freeing || began.elapsed() > PATIENCE {
            return Ok(pool.used_bytes);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn list(loose: &[Loose]) -> Result<()> {
    let rows = loose.iter().map(|Loose { name, reason, exclusive_bytes }| {
        vec![name.clone(), (*reason).to_owned(), exclusive_bytes.map_or_else(|| "-".into(), size::show)]
    });
    Ok(output::table(&["NAME", "WHAT", "EXCLUSIVE"], &["EXCLUSIVE"], rows.collect())?)
}

fn told(context: &Context, loose: &[Loose], what: &str, key: &str, bytes: u64) -> Result<()> {
    if context.json {
        return Ok(output::json("pruned", &serde_json::json!({ "volumes": loose, key: bytes }))?);
    }
    if loose.is_empty() && bytes == 0 {
        return Ok(output::line("nothing to prune")?);
    }
    if key == "freed_bytes" {
        let count = loose.len();
        return Ok(output::line(&format!("{count} {what}; freed {}", size::echo(bytes)))?);
    }
    list(loose)?;
    Ok(output::line(&format!("{} {what}; frees at least {}", loose.len(), size::echo(bytes)))?)
}

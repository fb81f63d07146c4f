//! `plywood snapshot`: create, list, seal, delete, rollback.

use anyhow::{Context as _, Result};
use clap::Subcommand;
use uuid::Uuid;

use super::hold::hold_still;
use super::image::labels;
use super::output::{self, Waiting, confirm};
use super::{Context, Name, size, volume};
use crate::daemon::Client;
use crate::daemon::protocol::{Command, Keep, Volume};

/// Snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of a volume, in use or not
    Create {
        /// The volume
        volume: Name,
        /// Name of the snapshot
        name: Name,
        /// Another volume of which one is taken at the same instant
        #[arg(long, value_name = "VOLUME=NAME")]
        with: Vec<Name>,
        /// The volume is a container's root: take one of each of its volumes too, at the same instant, as NAME.VOLUME
        #[arg(long)]
        volumes: bool,
        /// Hold the mounted file systems still meanwhile, so that the snapshots need no journal replay
        #[arg(long)]
        freeze: bool,
    },
    /// List snapshots
    List {
        /// Only those of this volume
        volume: Option<Name>,
    },
    /// Record a checksum for each block of snapshots, and the digest of their content
    Seal {
        /// The snapshots
        #[arg(required = true)]
        names: Vec<Name>,
    },
    /// Delete snapshots
    Delete {
        /// The snapshots
        #[arg(required = true)]
        names: Vec<Name>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Give a volume the content of a snapshot of it; not while it is attached
    Rollback {
        /// The volume
        volume: Name,
        /// The snapshot
        snapshot: Name,
        /// Keep what the volume holds now as a snapshot of this name
        #[arg(long, value_name = "NAME")]
        keep: Option<Name>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

/// Does a snapshot command.
///
/// # Errors
/// What the pool answers, and what keeps it from being printed.
pub fn run(context: &Context, command: SnapshotCommand) -> Result<()> {
    let client = context.client()?;
    match command {
        SnapshotCommand::Create { volume, name, with, volumes, freeze } => {
            let (volume, name) = (volume.text()?, name.text()?);
            let mut wanted = vec![(volume.clone(), name.clone())];
            for pair in with {
                let pair = pair.text()?;
                let (volume, name) = pair.split_once('=').with_context(|| format!("{pair}: give VOLUME=NAME"))?;
                wanted.push((volume.to_owned(), name.to_owned()));
            }
            if volumes {
                for of_it in volumes_of(&client, &volume)? {
                    let with = format!("{name}.{of_it}");
                    wanted.push((of_it, with));
                }
            }
            for taken in create(&client, &wanted, freeze)? {
                volume::changed(context, &taken)?;
            }
            Ok(())
        }
        SnapshotCommand::List { volume } => {
            let mut snapshots: Vec<Volume> = client.volumes()?.into_iter().filter(|volume| volume.snapshot).collect();
            if let Some(volume) = volume {
                let uuid = client.volume(&volume.text()?)?.uuid;
                snapshots.retain(|snapshot| snapshot.origin_uuid == Some(uuid));
            }
            list(context, snapshots)
        }
        SnapshotCommand::Seal { names } => {
            for name in &names {
                let name = name.text()?;
                let waiting = Waiting::begin(format!("sealing {name}"));
                let sealed = client.for_volume(Command::SnapshotSeal { name });
                drop(waiting);
                volume::changed(context, &sealed?)?;
            }
            Ok(())
        }
        SnapshotCommand::Delete { names, yes } => {
            for name in &names {
                let name = name.text()?;
                confirm(&format!("delete snapshot {name}{}?", volume::frees(&client.volume(&name)?)), yes)?;
                client.call(Command::SnapshotDelete { name: name.clone() })?;
                volume::done(context, "deleted", &name)?;
            }
            Ok(())
        }
        SnapshotCommand::Rollback { volume, snapshot, keep, yes } => {
            let (volume, snapshot) = (volume.text()?, snapshot.text()?);
            if keep.is_none() {
                let what = format!("what was written to {volume} since {snapshot} will be gone; roll it back?");
                confirm(&what, yes)?;
            }
            let keep = match keep {
                Some(name) => Some(Keep { uuid: Uuid::new_v4(), name: name.text()? }),
                None => None,
            };
            let volume = client.for_volume(Command::SnapshotRollback { volume, snapshot, keep })?;
            volume::changed(context, &volume)
        }
    }
}

/// Takes snapshots at one instant: pairs of volume and name. With `freeze` all file systems are held still first.
fn create(client: &Client, wanted: &[(String, String)], freeze: bool) -> Result<Vec<Volume>> {
    let to_hold = if freeze { wanted } else { &[] };
    let to_hold = to_hold.iter().map(|(volume, _)| client.volume(volume)).collect::<Result<Vec<_>, _>>()?;
    let held = hold_still(&to_hold, "or leave --freeze out")?;
    let taken = match wanted {
        [(volume, name)] => client.create_snapshot(volume, name, Default::default()).map(|taken| vec![taken]),
        several => client.create_snapshots(several),
    };
    // Whatever came of it: a file system that stays frozen stops its users.
    held.let_go()?;
    Ok(taken?)
}

/// Names of the volumes that a container has mounted.
fn volumes_of(client: &Client, container: &str) -> Result<Vec<String>> {
    let held = client.attributes(container)?;
    let listed = labels::text(&held, labels::CONTAINER_VOLUMES)
        .with_context(|| format!("{container} is no container with volumes; leave --volumes out"))?;
    let listed: Vec<Uuid> = serde_json::from_str(&listed).with_context(|| format!("{container}: its volumes"))?;
    let all = client.volumes()?;
    Ok(all.into_iter().filter(|volume| listed.contains(&volume.uuid)).map(|volume| volume.name).collect())
}

/// Snapshots, with what is known of their content. The whole digest is in the JSON.
fn list(context: &Context, snapshots: Vec<Volume>) -> Result<()> {
    if context.json {
        return Ok(output::json("volumes", &snapshots)?);
    }
    let rows = snapshots.into_iter().map(|snapshot| {
        let origin = volume::origin(&snapshot);
        let [exclusive, age] = volume::exclusive(&snapshot);
        vec![
            snapshot.name,
            size::show(snapshot.size_bytes),
            size::show(snapshot.own_bytes),
            exclusive,
            age,
            size::show(snapshot.mapped_bytes),
            origin,
            volume::created(snapshot.created_ns, "%Y-%m-%d %H:%M"),
            if snapshot.sealed { "yes" } else { "no" }.into(),
            snapshot.digest.map_or_else(|| "-".into(), |digest| digest.chars().take(12).collect()),
            snapshot.device.map_or_else(|| "-".into(), |device| device.display().to_string()),
        ]
    });
    let headings =
        ["NAME", "VIRTUAL", "OWN", "EXCLUSIVE", "AGE", "MAPPED", "ORIGIN", "CREATED", "SEALED", "DIGEST", "DEVICE"];
    Ok(output::table(&headings, &["VIRTUAL", "OWN", "EXCLUSIVE", "AGE", "MAPPED"], rows.collect())?)
}

//! `plywood snapshot`: create, list, seal, delete, rollback.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use uuid::Uuid;

use super::output::{self, Waiting, confirm};
use super::{Context, Name, size, volume};
use crate::daemon::mounts::{device_number, own_mounts};
use crate::daemon::protocol::{Command, Keep, Volume};
use crate::io::Frozen;

/// Snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of a volume, in use or not
    Create {
        /// The volume
        volume: Name,
        /// Name of the snapshot
        name: Name,
        /// Hold the mounted file system still meanwhile, so that the snapshot needs no journal replay
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
        SnapshotCommand::Create { volume, name, freeze } => {
            let (volume, name) = (volume.text()?, name.text()?);
            let frozen = if freeze { hold_still(&client.volume(&volume)?, "or leave --freeze out")? } else { None };
            let taken = client.create_snapshot(&volume, &name, Default::default());
            // Thawed first, whatever came of it: a file system that stays frozen stops its users.
            if let Some(frozen) = frozen {
                frozen.thaw().context("file system stays frozen; thaw it with fsfreeze -u")?;
            }
            volume::changed(context, &taken?)
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

/// Freezes the file system of an attached volume where it is mounted in this namespace. None when it is not attached.
/// `instead` is what to do where it is mounted elsewhere only.
pub(super) fn hold_still(volume: &Volume, instead: &str) -> Result<Option<Frozen>> {
    let Some(device) = &volume.device else { return Ok(None) };
    let number = device_number(device).with_context(|| device.display().to_string())?;
    let mounts = own_mounts().context("/proc/self/mountinfo")?;
    let Some(mount) = mounts.into_iter().find(|mount| mount.is_of(device, number)) else {
        let device: PathBuf = device.clone();
        anyhow::bail!(
            "{} is not mounted in this mount namespace; run this where it is mounted, {instead}",
            device.display()
        );
    };
    let point = mount.mount_point;
    Ok(Some(Frozen::freeze(&point).with_context(|| format!("{}: freezing the file system", point.display()))?))
}

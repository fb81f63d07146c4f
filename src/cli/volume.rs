//! `plywood volume`: create, list, info, rename, resize, delete, protect, verify-on-read.

use anyhow::Result;
use clap::Subcommand;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use jiff::{Timestamp, tz::TimeZone};

use super::image::Source;
use super::output::{self, confirm};
use super::transfer::{self, Target};
use super::{Context, Name, size};
use crate::daemon::protocol::{Command, Volume};

/// Volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create an empty volume
    Create {
        /// Name of the volume
        name: Name,
        /// Size of the device; blocks are taken when they are first written
        #[arg(long, value_parser = size::parse)]
        size: u64,
        /// Sector size of the device in bytes: 512 or 4096
        #[arg(long, default_value_t = 4096, value_name = "BYTES")]
        sector_size: u32,
        /// Most bytes of its own; none without this option
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        quota: Option<u64>,
        /// Bytes of its own that the pool always has for it, whatever other volumes take
        ///
        /// Writing it never fails for want of space in the pool until it has so many bytes that no snapshot shares. The room
        /// that its map can need (0.4 % of its size) is kept as well. A snapshot shares what the volume has, so the whole
        /// reservation is wanted anew: a snapshot that the pool has too little for is refused. Reserved is space of the pool:
        /// a pool in a sparse file can still meet a host that is full.
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        reserve: Option<u64>,
        /// What writes do that need a block when the pool has none
        #[arg(long, value_enum, default_value_t = OnFull::Error, value_name = "WHAT")]
        on_full: OnFull,
        /// Unmap whole blocks that are written as zeros, instead of storing them
        #[arg(long)]
        detect_zeroes: bool,
    },
    /// List volumes and clones, with snapshots on demand
    List {
        /// Snapshots too
        #[arg(long)]
        all: bool,
    },
    /// Show one volume or snapshot
    Info {
        /// Volume or snapshot
        name: Name,
    },
    /// Give a volume or snapshot another name
    Rename {
        /// Volume or snapshot
        name: Name,
        /// The new name
        to: Name,
    },
    /// Change the size of a volume, its quota, or its reservation
    Resize {
        /// The volume
        name: Name,
        /// New size of the device
        #[arg(long, value_parser = size::parse, required_unless_present_any = ["quota", "reserve"])]
        size: Option<u64>,
        /// New quota; 0 takes it away
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        quota: Option<u64>,
        /// New reservation, no more than size and quota; 0 takes it away
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        reserve: Option<u64>,
        /// Shrink even below the file system on it
        #[arg(long)]
        force: bool,
    },
    /// Write a volume or snapshot into a new file; of a volume in use what it holds at this moment
    Export {
        /// Volume or snapshot
        name: Name,
        /// raw:FILE (holes are kept) or qcow2:FILE
        to: Target,
    },
    /// Make a volume of a disk image
    Import {
        /// raw:FILE or qcow2:FILE
        #[arg(value_parser = OsStringValueParser::new().try_map(|typed| Source::parse(&typed)))]
        source: Source,
        /// Name of the volume
        name: Name,
        /// Sector size of the device in bytes: 512 or 4096
        #[arg(long, default_value_t = 4096, value_name = "BYTES")]
        sector_size: u32,
    },
    /// Delete a volume or snapshot and give its space back
    Delete {
        /// Volumes or snapshots
        #[arg(required = true)]
        names: Vec<Name>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Set what writes do that need a block when the pool has none
    OnFull {
        /// The volume
        name: Name,
        /// What they do
        what: OnFull,
    },
    /// Unmap whole blocks (4 KiB) that are written as zeros from now on, instead of storing them
    DetectZeroes {
        /// The volume
        name: Name,
        /// No longer
        #[arg(long)]
        off: bool,
    },
    /// Verify sealed blocks on every read: damage gives an error, never data
    VerifyOnRead {
        /// Volume or snapshot
        name: Name,
        /// No longer
        #[arg(long)]
        off: bool,
    },
    /// Refuse to delete a volume or snapshot from now on
    Protect {
        /// Volume or snapshot
        name: Name,
        /// Allow it again
        #[arg(long)]
        off: bool,
    },
}

/// What writes do that need a block when the pool has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnFull {
    /// Fail at once
    Error,
    /// Wait for space, a minute at most
    Wait,
}

/// Does a volume command.
///
/// # Errors
/// What the pool answers, and what keeps it from being printed.
pub fn run(context: &Context, command: VolumeCommand) -> Result<()> {
    let client = context.client()?;
    let volume = match command {
        // These want a daemon, which could not open the pool while a client has it.
        VolumeCommand::Export { name, to } => {
            drop(client);
            return transfer::export(context, &name.text()?, &to);
        }
        VolumeCommand::Import { source, name, sector_size } => {
            drop(client);
            return transfer::import(context, &source, &name.text()?, sector_size);
        }
        VolumeCommand::Create { name, size, sector_size, quota, reserve, on_full, detect_zeroes } => {
            let mut created = client.for_volume(Command::VolumeCreate {
                uuid: uuid::Uuid::new_v4(),
                name: name.text()?,
                size_bytes: size,
                sector_size,
                quota_bytes: quota.unwrap_or(0),
                reservation_bytes: reserve.unwrap_or(0),
                attributes: Default::default(),
            })?;
            if on_full == OnFull::Wait {
                created = client.for_volume(Command::VolumeOnFull { name: created.name, wait: true })?;
            }
            if detect_zeroes {
                created = client.for_volume(Command::VolumeZeroes { name: created.name, detect: true })?;
            }
            created
        }
        VolumeCommand::List { all } => {
            let volumes = client.volumes()?;
            return list(context, volumes.into_iter().filter(|volume| all || !volume.snapshot).collect());
        }
        VolumeCommand::Info { name } => {
            let volume = client.volume(&name.text()?)?;
            return show(context, &volume);
        }
        VolumeCommand::Rename { name, to } => {
            client.for_volume(Command::VolumeRename { name: name.text()?, to: to.text()? })?
        }
        VolumeCommand::Resize { name, size, quota, reserve, force } => {
            let name = name.text()?;
            let present = client.volume(&name)?.reservation_bytes;
            let quota = quota.map(|quota_bytes| Command::VolumeQuota { name: name.clone(), quota_bytes });
            let size = size.map(|size_bytes| Command::VolumeResize { name: name.clone(), size_bytes, force });
            let reserve = |wanted: fn(u64, u64) -> bool| {
                let bytes = reserve.filter(|bytes| wanted(*bytes, present));
                bytes.map(|reservation_bytes| Command::VolumeReserve { name: name.clone(), reservation_bytes })
            };
            // A reservation is no more than size and quota: less of it comes before these, more after them. The quota can be
            // refused without having changed the size.
            let less = reserve(|bytes, present| bytes <= present);
            let more = reserve(|bytes, present| bytes > present);
            let mut volume = None;
            for command in [less, quota, size, more].into_iter().flatten() {
                volume = Some(client.for_volume(command)?);
            }
            volume.ok_or_else(|| anyhow::anyhow!("nothing to change was given"))?
        }
        VolumeCommand::Delete { names, yes } => {
            for name in &names {
                let volume = client.volume(&name.text()?)?;
                let what = if volume.snapshot { "snapshot" } else { "volume" };
                confirm(&format!("delete {what} {}{}?", volume.name, frees(&volume)), yes)?;
                client.delete(&volume.name)?;
                done(context, "deleted", &volume.name)?;
            }
            return Ok(());
        }
        VolumeCommand::OnFull { name, what } => {
            client.for_volume(Command::VolumeOnFull { name: name.text()?, wait: what == OnFull::Wait })?
        }
        VolumeCommand::DetectZeroes { name, off } => {
            client.for_volume(Command::VolumeZeroes { name: name.text()?, detect: !off })?
        }
        VolumeCommand::VerifyOnRead { name, off } => {
            client.for_volume(Command::VolumeVerify { name: name.text()?, on: !off })?
        }
        VolumeCommand::Protect { name, off } => {
            client.for_volume(Command::VolumeProtect { name: name.text()?, protected: !off })?
        }
    };
    changed(context, &volume)
}

/// Prints a volume that was made or changed: a line, or its JSON.
pub(super) fn changed(context: &Context, volume: &Volume) -> Result<()> {
    if context.json {
        return Ok(output::json("volume", volume)?);
    }
    let what = if volume.snapshot { "snapshot" } else { "volume" };
    let mut notes = vec![size::echo(volume.size_bytes)];
    if let Some(origin) = &volume.origin {
        notes.push(format!("from {origin}"));
    }
    if volume.quota_bytes > 0 {
        notes.push(format!("quota {}", size::echo(volume.quota_bytes)));
    }
    if volume.reservation_bytes > 0 {
        notes.push(format!("{} reserved", size::echo(volume.reservation_bytes)));
    }
    if volume.protected {
        notes.push("protected".into());
    }
    if volume.waits_when_full {
        notes.push("waits when the pool is full".into());
    }
    if volume.detect_zeroes {
        notes.push("blocks of zeros are not stored".into());
    }
    if let Some(digest) = &volume.digest {
        notes.push(format!("sealed, digest {digest}"));
    }
    if volume.verify_on_read {
        notes.push("verified on read".into());
    }
    Ok(output::line(&format!("{what} {}: {}", volume.name, notes.join(", ")))?)
}

/// Prints that something happened to a name.
pub(super) fn done(context: &Context, what: &str, name: &str) -> Result<()> {
    if context.json { Ok(output::json(what, &name)?) } else { Ok(output::line(&format!("{what} {name}"))?) }
}

pub(super) fn list(context: &Context, volumes: Vec<Volume>) -> Result<()> {
    if context.json {
        return Ok(output::json("volumes", &volumes)?);
    }
    let rows = volumes.into_iter().map(|volume| {
        let (kind, origin) = (kind(&volume).to_owned(), origin(&volume));
        let [exclusive, age] = exclusive(&volume);
        vec![
            volume.name,
            kind,
            size::show(volume.size_bytes),
            size::show(volume.own_bytes),
            exclusive,
            age,
            size::show(volume.mapped_bytes),
            origin,
            created(volume.created_ns, "%Y-%m-%d %H:%M"),
            volume.device.map_or_else(|| "-".into(), |device| device.display().to_string()),
        ]
    });
    let headings = ["NAME", "KIND", "VIRTUAL", "OWN", "EXCLUSIVE", "AGE", "MAPPED", "ORIGIN", "CREATED", "DEVICE"];
    Ok(output::table(&headings, &["VIRTUAL", "OWN", "EXCLUSIVE", "AGE", "MAPPED"], rows.collect())?)
}

/// What deleting it would free, and how old that figure is, for a table.
pub(super) fn exclusive(volume: &Volume) -> [String; 2] {
    let age = volume.exclusive_age_seconds.map(|age| if age == 0 { "now".into() } else { format!("{age} s") });
    [volume.exclusive_bytes.map(size::show), age].map(|known| known.unwrap_or_else(|| "-".into()))
}

/// What is asked about deleting it, as far as it is known.
pub(super) fn frees(volume: &Volume) -> String {
    volume.exclusive_bytes.map_or_else(String::new, |bytes| format!(", which frees {}", size::show(bytes)))
}

/// The same in words.
fn exclusive_words(volume: &Volume) -> String {
    let (Some(bytes), Some(age)) = (volume.exclusive_bytes, volume.exclusive_age_seconds) else {
        return "not known yet".into();
    };
    let when = match volume.exclusive_unchanged_seconds {
        Some(unchanged) => format!("so for {unchanged} s"),
        None => format!("as it was {age} s ago"),
    };
    format!("{}, {when}", size::echo(bytes))
}

/// The origin, for a table.
pub(super) fn origin(volume: &Volume) -> String {
    match (&volume.origin, &volume.origin_uuid) {
        (Some(name), _) => name.clone(),
        (None, Some(_)) => "(deleted)".into(),
        (None, None) => "-".into(),
    }
}

pub(super) fn show(context: &Context, volume: &Volume) -> Result<()> {
    if context.json {
        return Ok(output::json("volume", volume)?);
    }
    let yes_or_no = |value: bool| if value { "yes" } else { "no" }.to_owned();
    let quota = if volume.quota_bytes == 0 { "none".into() } else { size::echo(volume.quota_bytes) };
    let origin = match (&volume.origin, &volume.origin_uuid) {
        (Some(name), _) => name.clone(),
        (None, Some(uuid)) => format!("{uuid} (deleted)"),
        (None, None) => "none".into(),
    };
    Ok(output::facts(&[
        ("name", volume.name.clone()),
        ("kind", kind(volume).into()),
        ("uuid", volume.uuid.to_string()),
        ("id", volume.id.to_string()),
        ("virtual size", size::echo(volume.size_bytes)),
        ("sector size", size::show(volume.sector_size.into())),
        ("own", size::echo(volume.own_bytes)),
        ("exclusive", exclusive_words(volume)),
        ("shared", volume.shared_bytes.map_or_else(|| "not known yet".into(), size::echo)),
        ("mapped", size::echo(volume.mapped_bytes)),
        ("quota", quota),
        ("reserved", reserved(volume)),
        ("when full", if volume.waits_when_full { "writes wait" } else { "writes fail" }.into()),
        ("failed writes", volume.failed_writes.to_string()),
        ("detect zeroes", yes_or_no(volume.detect_zeroes)),
        ("origin", origin),
        ("depth", volume.depth.to_string()),
        ("protected", yes_or_no(volume.protected)),
        ("sealed", yes_or_no(volume.sealed)),
        ("digest", volume.digest.clone().unwrap_or_else(|| "none".into())),
        ("verify on read", yes_or_no(volume.verify_on_read)),
        ("created", created(volume.created_ns, "%Y-%m-%d %H:%M:%S %Z")),
        ("in use", yes_or_no(volume.open)),
        ("device", volume.device.as_ref().map_or_else(|| "none".into(), |device| device.display().to_string())),
    ])?)
}

/// What is reserved for it, and how much of that it has not written yet.
fn reserved(volume: &Volume) -> String {
    match (volume.reservation_bytes, volume.reservation_left_bytes) {
        (0, _) => "nothing".into(),
        (bytes, left) => format!("{}, {} of it not its own yet", size::echo(bytes), size::show(left)),
    }
}

fn kind(volume: &Volume) -> &'static str {
    match (volume.snapshot, volume.origin_uuid.is_some()) {
        (true, _) => "snapshot",
        (false, true) => "clone",
        (false, false) => "volume",
    }
}

pub(super) fn created(created_ns: u64, format: &str) -> String {
    match Timestamp::from_nanosecond(i128::from(created_ns)) {
        Ok(instant) if created_ns > 0 => instant.to_zoned(TimeZone::system()).strftime(format).to_string(),
        _ => "-".into(),
    }
}

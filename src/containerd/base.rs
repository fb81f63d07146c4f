//! Empty file systems, made once a pool for each kind and size; what has no parent is a clone of one.

use std::path::Path;

use super::error::{Error, Result};
use super::link::Link;
use super::reaper::Reaper;
use super::record::{BASE, GONE};
use crate::daemon::protocol::{Attributes, Command, Failure, Kind};
use uuid::Uuid;

/// Makes an empty file system of a kind on a device that reads as zeros, without `lost+found`; or says why not.
pub type MakeFileSystem = dyn Fn(&str, &Path) -> std::result::Result<(), String> + Send + Sync;

/// Makes a file system of a kind as large as the device that it is on; or says why not.
pub type GrowFileSystem = dyn Fn(&str, &Path) -> std::result::Result<(), String> + Send + Sync;

/// Sectors of the volumes: what file systems use anyway, so that no write has to be merged with what was there.
const SECTOR_SIZE: u32 = 4096;

/// Name of the snapshot with an empty file system of this kind and size.
pub fn name(kind: &str, size_bytes: u64) -> String {
    format!("{BASE}{kind}-{size_bytes}")
}

/// Name of the snapshot with an empty file system of this kind and size, which is made when it is not there.
///
/// It has its name only when it is whole. Two that make the same one at once both do; one of the two stays.
///
/// # Errors
/// What the pool answers, and what the program that makes file systems says.
pub fn base(link: &Link, reaper: &Reaper, kind: &str, size_bytes: u64, make: &MakeFileSystem) -> Result<String> {
    let name = name(kind, size_bytes);
    match link.volume(&name) {
        Err(Error::Pool(failure)) if failure.kind == Kind::NotFound => {}
        found => return found.map(|_| name),
    }
    let draft = format!("{GONE}{}", Uuid::new_v4().simple());
    let made = format_draft(link, &draft, &name, kind, size_bytes, make);
    reaper.take_away(draft);
    match made {
        Err(Error::Pool(failure)) if failure.kind == Kind::AlreadyExists => Ok(name),
        made => made.map(|()| name),
    }
}

fn format_draft(
    link: &Link,
    draft: &str,
    name: &str,
    kind: &str,
    size_bytes: u64,
    make: &MakeFileSystem,
) -> Result<()> {
    link.for_volume(Command::VolumeCreate {
        uuid: Uuid::new_v4(),
        name: draft.into(),
        size_bytes,
        sector_size: SECTOR_SIZE,
        quota_bytes: 0,
        reservation_bytes: 0,
        attributes: Attributes::new(),
    })?;
    let device = link.attach(draft)?;
    make(kind, Path::new(&device)).map_err(|reason| Failure::new(Kind::Io, reason))?;
    let attributes = Attributes::new();
    let (volume, name) = (draft.to_owned(), name.to_owned());
    link.for_volume(Command::SnapshotCreate { volume, uuid: Uuid::new_v4(), name, attributes }).map(drop)
}

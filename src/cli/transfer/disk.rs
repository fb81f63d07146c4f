//! Volumes as disk images, and disk images as volumes: raw files with holes, and qcow2 by QEMU's own program.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::str::FromStr;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail};

use super::content::Content;
use super::file::NewFile;
use crate::cli::attach::detach_when_idle;
use crate::cli::image::{Disk, Source, heed_signals, interrupted, progress_over, run_program};
use crate::cli::working::{ephemeral, make_lasting, private_name, refuse_taken, take_away};
use crate::cli::{Context, output, size};
use crate::daemon::making;
use crate::daemon::protocol::{Range, Volume};

/// A disk image to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Block for block.
    Raw(PathBuf),
    /// One of QEMU's.
    Qcow2(PathBuf),
}

impl Target {
    fn path(&self) -> &Path {
        match self {
            Self::Raw(path) | Self::Qcow2(path) => path,
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            Some((_, "")) => Err(format!("{text:?} names no file")),
            Some(("raw", path)) => Ok(Self::Raw(path.into())),
            Some(("qcow2", path)) => Ok(Self::Qcow2(path.into())),
            _ => Err(format!("{text:?}: give raw:FILE or qcow2:FILE")),
        }
    }
}

/// Writes a volume or snapshot into a new file.
///
/// # Errors
/// A file that exists, what the pool answers, and what keeps the file from being written.
pub fn export(context: &Context, name: &str, to: &Target) -> Result<()> {
    let path = to.path();
    let file = NewFile::begin(path)?;
    let client = context.daemon_client_for(name)?;
    let interrupt = heed_signals()?;
    let _making = making::begin(client.pool_uuid()?)?;
    let volume = client.volume(name)?;
    // A volume may be in use: what it holds at this moment is what is written.
    let moment = match volume.snapshot {
        true => None,
        false => Some(client.create_snapshot(name, &private_name(name, "export"), ephemeral("export"))?),
    };
    let Volume { name: snapshot, uuid, .. } = moment.as_ref().unwrap_or(&volume);
    let written = Content::open(&client, snapshot, *uuid, "export").and_then(|mut content| {
        let Target::Raw(_) = to else {
            let mut convert = Process::new("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", "qcow2", "-W"]).arg(&content.device).arg(file.draft());
            return run_program(&mut convert, "qemu-utils");
        };
        file.file().set_len(volume.size_bytes)?;
        let bar = progress_over("exporting", volume.size_bytes);
        let of = content.name().to_owned();
        client.each_changed_range(None, &of, |Range(offset, length, _)| {
            let length = length.min(volume.size_bytes.saturating_sub(offset));
            content.read(offset, length, |offset, _, bytes| {
                if interrupt.load(Ordering::Relaxed) {
                    return Err(interrupted().into());
                }
                bar.set_position(offset);
                bytes.map_or(Ok(()), |bytes| Ok(file.file().write_all_at(bytes, offset)?))
            })
        })?;
        bar.finish_and_clear();
        Ok(())
    });
    if let Some(moment) = &moment {
        take_away(&client, &moment.name);
    }
    written.with_context(|| path.display().to_string())?;
    let taken = file.finish()?.metadata()?.blocks() * 512;
    if context.json {
        let value =
            serde_json::json!({ "name": name, "file": path, "size_bytes": volume.size_bytes, "file_bytes": taken });
        return Ok(output::json("exported", &value)?);
    }
    Ok(output::line(&format!(
        "{}: {} of {name}, takes {}",
        path.display(),
        size::show(volume.size_bytes),
        size::show(taken)
    ))?)
}

/// Makes a volume of a disk image.
///
/// # Errors
/// A source that is no disk image or cannot be read, a name that is taken, and what the pool answers.
pub fn import(context: &Context, source: &Source, name: &str, sector_size: u32) -> Result<()> {
    let Some(disk) = Disk::open(source)? else {
        bail!("give raw:FILE or qcow2:FILE; others make images: plywood image import")
    };
    let client = context.daemon_client()?;
    let interrupt = heed_signals()?;
    let _making = making::begin(client.pool_uuid()?)?;
    let size_bytes = disk.size_bytes().next_multiple_of(u64::from(sector_size.max(512)));
    refuse_taken(&client, name)?;
    // It has its name when it is whole.
    let working = private_name(name, "import");
    client.create_volume(&working, size_bytes, sector_size, ephemeral("import"))?;
    let bar = progress_over("importing", size_bytes);
    let copied = client
        .attach(&working, false)
        .map_err(anyhow::Error::from)
        .and_then(|attached| disk.copy_to(&attached.device, &bar, &interrupt))
        .and_then(|()| Ok(detach_when_idle(&client, &working)?));
    bar.finish_and_clear();
    if let Err(error) = copied {
        take_away(&client, &working);
        return Err(if interrupt.load(Ordering::Relaxed) { interrupted().into() } else { error });
    }
    let made = make_lasting(&client, &working, name).inspect_err(|_| take_away(&client, &working))?;
    crate::cli::volume::changed(context, &made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        assert_eq!("raw:/a:b".parse(), Ok(Target::Raw("/a:b".into())));
        assert_eq!("qcow2:x".parse(), Ok(Target::Qcow2("x".into())));
        for wrong in ["", "raw", "raw:", "vmdk:x", "/a"] {
            wrong.parse::<Target>().unwrap_err();
        }
    }
}

//! The content of a snapshot, read through a private clone of it.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::Advice;
use uuid::Uuid;

use super::stream::DATA_BYTES;
use crate::cli::image::detach;
use crate::daemon::Client;
use crate::daemon::attributes::EPHEMERAL;
use crate::daemon::protocol::{Attributes, Bytes, Command, Range, Reply};

/// A snapshot as a device of its own. What it is read through is taken away when this is dropped.
pub struct Content<'a> {
    client: &'a Client,
    clone: String,
    /// The device.
    pub device: PathBuf,
    /// Closed before the device is detached.
    file: Option<File>,
    buffer: Vec<u8>,
}

impl<'a> Content<'a> {
    /// That of `snapshot`. `purpose` tells whoever looks what the clone is for.
    ///
    /// # Errors
    /// What the daemon answers.
    pub fn open(client: &'a Client, snapshot: &str, purpose: &str) -> Result<Self> {
        let clone = private_name(snapshot, purpose);
        client.create_clone(snapshot, &clone, ephemeral(purpose))?;
        let opened = client.attach(&clone, true).map_err(anyhow::Error::from).and_then(|attached| {
            let file = File::open(&attached.device).with_context(|| attached.device.display().to_string())?;
            Ok((attached.device, file))
        });
        match opened {
            Ok((device, file)) => Ok(Self { client, clone, device, file: Some(file), buffer: Vec::new() }),
            Err(error) => {
                take_away(client, &clone);
                Err(error)
            }
        }
    }

    /// Reads a range in pieces of at most [`DATA_BYTES`]; none for a piece that is all zeros.
    ///
    /// # Errors
    /// When it cannot be read, and those of `each`.
    pub fn read(
        &mut self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(u64, u64, Option<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        let file = self.file.as_ref().context("the device is closed")?;
        let mut at = offset;
        while at < offset + length {
            let want = (offset + length - at).min(DATA_BYTES as u64);
            self.buffer.resize(want as usize, 0);
            let read = file.read_exact_at(&mut self.buffer, at);
            read.with_context(|| format!("reading {want} bytes at byte {at} of {}", self.clone))?;
            let is_zero = self.buffer.iter().all(|byte| *byte == 0);
            each(at, want, (!is_zero).then_some(&self.buffer[..]))?;
            // Nobody reads it again; what others read shall stay in memory.
            let _ = rustix::fs::fadvise(file, at, std::num::NonZeroU64::new(want), Advice::DontNeed);
            at += want;
        }
        Ok(())
    }
}

impl Drop for Content<'_> {
    fn drop(&mut self) {
        self.file = None;
        take_away(self.client, &self.clone);
    }
}

/// Detaches and deletes a working volume. What stays is found by `plywood prune`, and by the next daemon.
pub fn take_away(client: &Client, name: &str) {
    if let Err(failure) = detach(client, name).and_then(|()| client.delete(name)) {
        tracing::warn!("{name} could not be taken away: {failure}");
    }
}

/// The mark of a working volume.
pub fn ephemeral(purpose: &str) -> Attributes {
    [(EPHEMERAL.to_owned(), Bytes::from(purpose))].into()
}

/// A name for a working volume, within the bound of names.
pub fn private_name(of: &str, purpose: &str) -> String {
    let mut end = of.len().min(200);
    while !of.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}.{purpose}-{:.8}", &of[..end], Uuid::new_v4().simple().to_string())
}

/// Goes through the ranges that differ between a snapshot and its base, or that have content where there is no base, from
/// `start_bytes` on: offset, length, and whether the snapshot has content there.
///
/// # Errors
/// What the pool answers, and those of `each`.
pub fn each_change(
    client: &Client,
    base: Option<&str>,
    snapshot: &str,
    start_bytes: u64,
    mut each: impl FnMut(u64, u64, bool) -> Result<()>,
) -> Result<()> {
    let mut page = ControlFlow::Continue(0);
    while let ControlFlow::Continue(from_bytes) = page {
        let (from, to) = (base.map(str::to_owned), snapshot.to_owned());
        let Reply::Diff(diff) = client.call(Command::Diff { from, to, start_bytes: from_bytes })? else {
            bail!("unexpected answer")
        };
        for Range(offset, length, has_data) in diff.ranges {
            let (at, end) = (offset.max(start_bytes), offset + length);
            if at < end {
                each(at, end - at, has_data)?;
            }
        }
        page = match diff.next_bytes {
            Some(next) if next > from_bytes => ControlFlow::Continue(next),
            Some(_) => bail!("daemon's answer does not move on from byte {from_bytes}"),
            None => ControlFlow::Break(()),
        };
    }
    Ok(())
}

/// A bar over a volume's size on a terminal; nothing elsewhere.
pub fn progress(what: &str, size_bytes: u64) -> ProgressBar {
    if !std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(size_bytes);
    let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// The directory of a file that is to be made.
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_names_stay_within_the_bound_and_characters_whole() {
        for name in ["a", &"é".repeat(127), &"x".repeat(255), &"€".repeat(85)] {
            let name = private_name(name, "receive");
            assert!(name.len() <= 255 && name.contains(".receive-"), "{name}");
        }
    }
}

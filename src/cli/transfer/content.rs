//! The content of a snapshot, read through a private clone of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use rustix::fs::Advice;
use uuid::Uuid;

use super::stream::DATA_BYTES;
use crate::cli::working::{ephemeral, private_name, take_away};
use crate::daemon::Client;

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
    /// What the daemon answers, and that another snapshot has the name than the one of that uuid.
    pub fn open(client: &'a Client, snapshot: &str, uuid: Uuid, purpose: &str) -> Result<Self> {
        let clone = private_name(snapshot, purpose);
        let made = client.create_clone(snapshot, &clone, ephemeral(purpose))?;
        if made.origin_uuid != Some(uuid) {
            take_away(client, &clone);
            bail!("{snapshot} has gone, and another has its name");
        }
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

    /// The name of the clone. It has the snapshot's tree, and its name is nobody else's, whatever becomes of the snapshot's.
    pub fn name(&self) -> &str {
        &self.clone
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

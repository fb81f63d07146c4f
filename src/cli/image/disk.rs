//! Disk images, block for block: raw files with their holes skipped, and qcow2 through QEMU's own program.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail, ensure};
use indicatif::ProgressBar;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::Deserialize;

use super::filesystem::run;
use super::source::{Source, open_file};
use super::stream::{Interrupt, interrupted};

const COPY_BYTES: usize = 1 << 20;
const BLOCK_BYTES: usize = 4096;

/// A disk image that was looked at.
#[derive(Debug)]
pub enum Disk {
    /// A raw file.
    Raw {
        /// The file.
        file: File,
        /// What it is called in messages.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
    },
    /// One of QEMU's.
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// The size of the disk that it describes.
        size_bytes: u64,
    },
}

impl Disk {
    /// Looks at a disk image. `None` for a source of another kind.
    ///
    /// # Errors
    ///
    /// It cannot be read, is empty, or cannot be taken alone.
    pub fn open(source: &Source) -> Result<Option<Self>> {
        Ok(Some(match source {
            Source::Raw(path) => {
                let file = open_file(path)?;
                let size_bytes = file.metadata()?.len();
                ensure!(size_bytes > 0, "{}: is empty", path.display());
                Self::Raw { file, path: path.clone(), size_bytes }
            }
            Source::Qcow2(path) => {
                open_file(path)?;
                Self::Qcow2 { path: path.clone(), size_bytes: inspect(path)? }
            }
            _ => return Ok(None),
        }))
    }

    /// The size of the disk.
    pub const fn size_bytes(&self) -> u64 {
        match self {
            Self::Raw { size_bytes, .. } | Self::Qcow2 { size_bytes, .. } => *size_bytes,
        }
    }

    /// Copies the disk onto a device that is at least as large and reads as zeros.
    ///
    /// # Errors
    ///
    /// The image cannot be read, or the device not written.
    pub fn copy_to(&self, device: &Path, progress: &ProgressBar, interrupt: &Interrupt) -> Result<()> {
        match self {
            Self::Raw { file, path, size_bytes } => {
                let to = OpenOptions::new().write(true).open(device).with_context(|| device.display().to_string())?;
                copy(file, &to, *size_bytes, progress, interrupt)
                    .with_context(|| format!("copying {} to its volume", path.display()))?;
                to.sync_all().context("writing the disk to its volume")
            }
            Self::Qcow2 { path, size_bytes } => {
                let mut command = Command::new("qemu-img");
                command.args(["convert", "-f", "qcow2", "-O", "raw", "-n", "--target-is-zero", "-W"]);
                run(command.arg(file_name(path)).arg(device), "qemu-utils")?;
                progress.inc(*size_bytes);
                let device = File::open(device)?;
                device.sync_all().context("writing the disk to its volume")
            }
        }
    }
}

fn copy(from: &File, to: &File, size_bytes: u64, progress: &ProgressBar, interrupt: &Interrupt) -> Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut offset = 0;
    while offset < size_bytes {
        let data = match rustix::fs::seek(from, SeekFrom::Data(offset)) {
            Ok(data) => data.min(size_bytes),
            Err(Errno::NXIO) => size_bytes,
            // A file system without holes.
            Err(_) => offset,
        };
        // The device's blocks are copied whole.
        let data = (data - data % BLOCK_BYTES as u64).max(offset);
        progress.inc(data - offset);
        offset = data;
        let want = usize::try_from(size_bytes - offset).unwrap_or(usize::MAX).min(COPY_BYTES);
        if want == 0 {
            break;
        }
        if interrupt.load(Ordering::Relaxed) {
            return Err(interrupted().into());
        }
        from.read_exact_at(&mut buffer[..want], offset)?;
        for (index, block) in buffer[..want].chunks(BLOCK_BYTES).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                to.write_all_at(block, offset + (index * BLOCK_BYTES) as u64)?;
            }
        }
        offset += want as u64;
        progress.inc(want as u64);
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Inspected {
    virtual_size: u64,
    #[serde(default)]
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: serde_json::Value,
}

/// The size of the disk in a qcow2 file that stands alone.
fn inspect(path: &Path) -> Result<u64> {
    let output = Command::new("qemu-img").args(["info", "-f", "qcow2", "--output=json"]).arg(file_name(path)).output();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("qcow2 images are read by qemu-img, which is not installed: apt-get install qemu-utils")
        }
        other => other.context("qemu-img")?,
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", path.display(), said.trim().replace('\n', "; "));
    let found: Inspected = serde_json::from_slice(&output.stdout).context("answer of qemu-img info")?;
    // Whoever made the file chose what it refers to: following it would put any file of this host into the image.
    if let Some(backing) = &found.backing_filename {
        bail!("{}: has the backing file {backing}; convert it into one that stands alone first", path.display());
    }
    if let Some(data) = found.format_specific.pointer("/data/data-file") {
        bail!(
            "{}: keeps its data in another file, {data}; convert it into one that stands alone first",
            path.display()
        );
    }
    Ok(found.virtual_size)
}

/// A path that qemu-img takes for a file, not for one of its protocols (`nbd:...`).
fn file_name(path: &Path) -> PathBuf {
    if path.is_absolute() { path.to_owned() } else { Path::new(".").join(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_copy_skips_holes_and_zeros_and_keeps_the_rest() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"first", 4096 + 100).unwrap();
        file.write_all_at(&[0; 1 << 20], 2 << 20).unwrap();
        file.write_all_at(b"middle", (5 << 20) - 3).unwrap();
        file.write_all_at(b"end", (8 << 20) - 3).unwrap();
        let disk = Disk::open(&Source::Raw(path.clone())).unwrap().unwrap();
        assert_eq!(disk.size_bytes(), 8 << 20);
        let copy = place.path().join("copy");
        File::create(&copy).unwrap().set_len(8 << 20).unwrap();
        let progress = ProgressBar::hidden();
        disk.copy_to(&copy, &progress, &Interrupt::default()).unwrap();
        assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&path).unwrap());
        assert_eq!(progress.position(), 8 << 20);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&copy.metadata().unwrap());
        assert!(blocks * 512 <= 64 << 10, "{blocks} sectors allocated");
    }

    #[test]
    fn qcow2_with_a_backing_file_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let make = |arguments: &[&str]| {
            let mut command = Command::new("qemu-img");
            command.current_dir(&place).args(["create", "-q", "-f", "qcow2"]).args(arguments);
            command.status().is_ok_and(|status| status.success())
        };
        if !make(&["alone.qcow2", "4M"]) {
            std::io::Write::write_all(&mut std::io::stdout(), b"skipped: no qemu-img\n").unwrap();
            return;
        }
        let open = |name: &str| Disk::open(&Source::Qcow2(place.path().join(name)));
        assert_eq!(open("alone.qcow2").unwrap().unwrap().size_bytes(), 4 << 20);
        assert!(make(&["-b", "/etc/passwd", "-F", "raw", "leak.qcow2"]));
        assert!(open("leak.qcow2").unwrap_err().to_string().contains("/etc/passwd"));
        std::fs::write(place.path().join("none.qcow2"), "not one").unwrap();
        assert!(open("none.qcow2").is_err());
    }
}

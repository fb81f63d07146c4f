//! What the demo measures: times of writes, bytes that reach the disk, space that is taken.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use walkdir::WalkDir;

use super::content::Noise;

const BLOCK_BYTES: u64 = 4096;

/// The time of several equal operations.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    /// The middle one.
    pub median_us: f64,
    /// The longest.
    pub worst_us: f64,
}

impl Times {
    /// Of at least one time.
    pub fn of(times: &[Duration]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        let microseconds = |index: usize| sorted.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6);
        Self { median_us: microseconds(sorted.len() / 2), worst_us: microseconds(sorted.len().saturating_sub(1)) }
    }
}

/// `810 us`, `1.2 ms`, `1.76 s`.
pub fn show_time(microseconds: f64) -> String {
    match microseconds {
        time if time < 1000.0 => format!("{time:.0} us"),
        time if time < 100_000.0 => format!("{:.1} ms", time / 1e3),
        time if time < 1_000_000.0 => format!("{:.0} ms", time / 1e3),
        time => format!("{:.2} s", time / 1e6),
    }
}

/// Opens a file, overwrites one of its blocks, and syncs it, as a database would: opening belongs to it, since that is
/// when overlayfs copies.
///
/// # Errors
///
/// The host refuses.
pub fn write_block(path: &Path, noise: &mut Noise) -> Result<Duration> {
    let mut block = [0; BLOCK_BYTES as usize];
    noise.fill(&mut block);
    let size_bytes = fs::metadata(path).with_context(|| path.display().to_string())?.len();
    let offset = noise.next() % (size_bytes / BLOCK_BYTES).max(1) * BLOCK_BYTES;
    let began = Instant::now();
    let file = OpenOptions::new().write(true).open(path).with_context(|| path.display().to_string())?;
    file.write_all_at(&block, offset)?;
    file.sync_all()?;
    Ok(began.elapsed())
}

/// The disk below a directory: what it was asked to write.
#[derive(Debug)]
pub struct Disk {
    /// A descriptor of the directory, to write out its file system.
    directory: File,
    statistics: Option<PathBuf>,
}

impl Disk {
    /// The disk below `directory`.
    ///
    /// # Errors
    ///
    /// The directory cannot be opened.
    pub fn below(directory: &Path) -> Result<Self> {
        let device = fs::metadata(directory)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let statistics = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat"));
        let statistics = statistics.exists().then_some(statistics);
        Ok(Self { directory: File::open(directory)?, statistics })
    }

    /// Bytes written since it was started, all that is pending included. `None` where the host does not count them:
    /// its file system is not on one disk.
    ///
    /// # Errors
    ///
    /// The file system cannot be written out.
    pub fn written_bytes(&self) -> Result<Option<u64>> {
        rustix::fs::syncfs(&self.directory)?;
        let Some(path) = &self.statistics else { return Ok(None) };
        let text = fs::read_to_string(path)?;
        // Documentation/block/stat.rst: the seventh number is sectors written, of 512 bytes always.
        Ok(text.split_whitespace().nth(6).and_then(|number| number.parse::<u64>().ok()).map(|sectors| sectors * 512))
    }

    /// Bytes free for us.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub fn free_bytes(&self) -> Result<u64> {
        let found = rustix::fs::fstatvfs(&self.directory)?;
        Ok(found.f_bavail * found.f_frsize)
    }
}

/// What `du` says of a file, or of a directory with all that is in it.
///
/// # Errors
///
/// Something cannot be looked at.
pub fn taken_bytes(path: &Path) -> Result<u64> {
    let mut blocks = 0;
    for found in WalkDir::new(path) {
        blocks += found?.metadata()?.blocks();
    }
    Ok(blocks * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_ordered_and_shown_in_their_unit() {
        let times = Times::of(&[5, 1, 900, 3, 4].map(Duration::from_micros));
        assert_eq!((times.median_us, times.worst_us), (4.0, 900.0));
        let shown = [12.4, 999.4, 1200.0, 810_000.0, 1_759_000.0].map(show_time);
        assert_eq!(shown, ["12 us", "999 us", "1.2 ms", "810 ms", "1.76 s"]);
    }

    #[test]
    fn written_block_changes_one_block_of_the_file() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        write_block(&path, &mut Noise(9)).unwrap();
        let content = fs::read(&path).unwrap();
        let changed = content.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).count();
        assert_eq!((content.len(), changed), (1 << 20, 1));
        assert!(taken_bytes(&path).unwrap() >= 1 << 20);
    }
}

//! What the demo's three layers hold. The same files are written onto a mounted clone and into a layer of overlayfs.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};

use crate::cli::image::Interrupt;

/// The layers above the root file system.
pub const LAYERS: usize = 3;
/// The large file, in the second layer.
pub const LARGE_FILE: &str = "srv/data/large";
/// A directory with files, in the first.
pub const DIRECTORY: &str = "srv/application";
/// Small files, in the third, one for each thing that is tried.
pub const SMALL_FILE: &str = "srv/configuration/small";
/// A file with two names.
pub const LINKED: [&str; 2] = ["srv/configuration/linked", "srv/configuration/linked-too"];
/// Another one.
pub const WATCHED: [&str; 2] = ["srv/configuration/watched", "srv/configuration/watched-too"];
/// What the small files hold.
pub const OLD: &[u8] = b"as the image has it\n";

const CHUNK_BYTES: usize = 1 << 20;

/// What each layer is called in the demo's output.
pub fn describe(layer: usize) -> &'static str {
    match layer {
        1 => "200 small files",
        2 => "one large file",
        _ => "configuration",
    }
}

/// Writes layer 1, 2 or 3 below `root`.
///
/// # Errors
///
/// The host refuses, or a signal came.
pub fn write_layer(layer: usize, root: &Path, large_bytes: u64, interrupt: &Interrupt) -> Result<()> {
    let directory = |name: &str| {
        let path = root.join(name);
        DirBuilder::new().recursive(true).mode(0o755).create(&path).with_context(|| path.display().to_string())
    };
    match layer {
        1 => {
            directory(DIRECTORY)?;
            let mut noise = Noise(1);
            for number in 0..200 {
                let mut content = vec![0; 4096];
                noise.fill(&mut content);
                fs::write(root.join(DIRECTORY).join(format!("file-{number:03}")), content)?;
            }
        }
        2 => {
            directory("srv/data")?;
            write_large(&root.join(LARGE_FILE), large_bytes, interrupt)?;
        }
        _ => {
            directory("srv/configuration")?;
            fs::write(root.join(SMALL_FILE), OLD)?;
            for [name, other] in [LINKED, WATCHED] {
                fs::write(root.join(name), OLD)?;
                fs::hard_link(root.join(name), root.join(other))?;
            }
        }
    }
    Ok(())
}

/// Fills a file with what neither compression nor holes make small.
fn write_large(path: &Path, large_bytes: u64, interrupt: &Interrupt) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    let mut noise = Noise(2);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = large_bytes;
    while left > 0 {
        ensure!(!interrupt.load(Ordering::Relaxed), "interrupted by a signal");
        noise.fill(&mut chunk);
        let count = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        file.write_all(&chunk[..count])?;
        left -= count as u64;
    }
    file.sync_all()?;
    Ok(())
}

/// Bytes that look like any (Marsaglia's xorshift64): the same on every run.
pub struct Noise(pub u64);

impl Noise {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Fills a buffer whose length is a multiple of eight.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

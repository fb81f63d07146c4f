//! One digest of all that a file tree holds: names, kinds, modes, owners, links, times and contents.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// BLAKE3 over the tree below `root`, without what lies on other file systems. Access times are left out: looking
/// changes them.
///
/// # Panics
/// When anything cannot be read: an I/O error on the volume is what tests look for.
pub fn digest(root: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    let device = fs::metadata(root).expect("the root").dev();
    let entries = walkdir::WalkDir::new(root).sort_by_file_name().same_file_system(true);
    for entry in entries {
        let entry = entry.unwrap_or_else(|error| panic!("walk of {}: {error}", root.display()));
        let path = entry.path();
        let name = path.strip_prefix(root).expect("below the root");
        if name.as_os_str() == "lost+found" {
            continue;
        }
        let metadata = entry.metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if metadata.dev() != device {
            continue;
        }
        hasher.update(name.as_os_str().as_bytes());
        let length = if metadata.is_dir() { 0 } else { metadata.size() };
        for field in [
            u64::from(metadata.mode()),
            u64::from(metadata.uid()),
            u64::from(metadata.gid()),
            metadata.rdev(),
            if metadata.is_dir() { 0 } else { metadata.nlink() },
            length,
            metadata.mtime().cast_unsigned(),
            metadata.mtime_nsec().cast_unsigned(),
        ] {
            hasher.update(&field.to_le_bytes());
        }
        if metadata.is_symlink() {
            hasher.update(fs::read_link(path).expect("a link").as_os_str().as_bytes());
        } else if metadata.is_file() {
            feed(&mut hasher, path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Fewer than `most` random bytes.
pub fn random_bytes(random: &mut fastrand::Rng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.usize(..most)];
    random.fill(&mut bytes);
    bytes
}

fn feed(hasher: &mut blake3::Hasher, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        hasher.update(&buffer[..count]);
    }
}

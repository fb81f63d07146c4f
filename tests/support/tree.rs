//! All that a file tree holds, as one digest, or name by name, so that a difference between two has a name: kinds, modes, owners,
//! links, times, attributes and contents.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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

/// All that is known of each name below a root.
pub type Tree = BTreeMap<PathBuf, String>;

/// Reads the tree below `root`, without what lies on other file systems. The root itself is as its file system was made. Times
/// are those of changes of content, with nanoseconds or without: they do not come with every archive.
#[track_caller]
pub fn tree_of(root: &Path, with_nanoseconds: bool) -> Tree {
    let entries = walkdir::WalkDir::new(root).min_depth(1).same_file_system(true).into_iter();
    let tree = entries.map(|entry| {
        let entry = entry.expect("an entry");
        let (path, metadata) = (entry.path(), entry.metadata().expect("its metadata"));
        let is_directory = metadata.is_dir();
        let link = fs::read_link(path).unwrap_or_default();
        let content = if metadata.is_file() { fs::read(path).expect("its content") } else { Vec::new() };
        let keys = xattr::list(path).expect("its attributes");
        let attributes: BTreeMap<_, _> =
            keys.map(|key| (key.clone(), xattr::get(path, &key).expect("an attribute"))).collect();
        let said = format!(
            "{:o} {}:{} device {} {} bytes links {} at {}.{:09} -> {link:?} {} {attributes:?}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.rdev(),
            if is_directory { 0 } else { metadata.size() },
            if is_directory { 0 } else { metadata.nlink() },
            metadata.mtime(),
            if with_nanoseconds { metadata.mtime_nsec() } else { 0 },
            blake3::hash(&content).to_hex(),
        );
        (path.strip_prefix(root).expect("below the root").to_owned(), said)
    });
    tree.collect()
}

/// # Panics
/// When `found` is not what is expected, with the first name that differs, or those that are too many.
#[track_caller]
pub fn assert_same(found: &Tree, expected: &Tree, what: &str) {
    for (path, said) in expected {
        assert_eq!(found.get(path), Some(said), "{what}: {}", path.display());
    }
    let more: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{what}: {more:?} should not be there");
}

//! What a tree of files holds, name by name, so that a difference between two has a name.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// All that is known of each name below a root.
pub type Tree = BTreeMap<PathBuf, String>;

/// Reads the tree below `root`, without what lies on other file systems. The root itself is as its file system was made. Times
/// are those of changes of content, in seconds: the rest does not come with every archive.
#[track_caller]
pub fn tree_of(root: &Path) -> Tree {
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
            "{:o} {}:{} device {} {} bytes links {} at {} -> {link:?} {} {attributes:?}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.rdev(),
            if is_directory { 0 } else { metadata.size() },
            if is_directory { 0 } else { metadata.nlink() },
            metadata.mtime(),
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

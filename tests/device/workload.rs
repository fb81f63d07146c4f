//! Work on files whose content is remembered, none of it synced.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::tree::random_bytes;

/// Sets what it holds when it goes, also when a test fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes, appends, overwrites, renames and deletes until told to stop; returns what the files then hold.
pub fn work(folder: &Path, seed: u64, stop: &AtomicBool) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    fs::create_dir(folder).expect("a folder");
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let choice = random.u32(..10);
        let present = (!files.is_empty()).then(|| files.keys().nth(random.usize(..files.len())).cloned()).flatten();
        match (choice, present) {
            (0..=3, _) | (_, None) if files.len() < 60 => {
                next += 1;
                let path = folder.join(format!("file-{next}"));
                let bytes = random_bytes(&mut random, 500_000);
                fs::write(&path, &bytes).expect("writing a file");
                files.insert(path, bytes);
            }
            (0..=5, Some(path)) => {
                let held = files.get_mut(&path).expect("known");
                let at = random.usize(..=held.len());
                let bytes = random_bytes(&mut random, 50_000);
                let file = fs::OpenOptions::new().write(true).open(&path).expect("opening a file");
                std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at as u64).expect("overwriting");
                held.resize(held.len().max(at + bytes.len()), 0);
                held[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            (6, Some(path)) => {
                next += 1;
                let to = folder.join(format!("renamed-{next}"));
                fs::rename(&path, &to).expect("renaming");
                let bytes = files.remove(&path).expect("known");
                files.insert(to, bytes);
            }
            (7, Some(path)) => {
                fs::remove_file(&path).expect("deleting");
                files.remove(&path);
            }
            (_, Some(path)) => {
                assert!(fs::read(&path).expect("reading") == files[&path], "{} changed by itself", path.display());
            }
            (_, None) => {}
        }
    }
    files
}

/// Compares the files with what they should hold.
pub fn compare(files: &BTreeMap<PathBuf, Vec<u8>>) {
    for (path, bytes) in files {
        let found = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            blake3::hash(&found) == blake3::hash(bytes),
            "{}: {} bytes that are not those written",
            path.display(),
            found.len()
        );
    }
}

//! What a union of directories cannot do right and a file system does, tried live.
//!
//! Each is a promise of POSIX or of the kernel's manual pages that programs rely on (kernel documentation,
//! filesystems/overlayfs.rst, "Non-standard behavior"). What is tried here happens to files of the image, at their
//! first write in a container.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::fs::inotify;
use serde::Serialize;

use super::content::{DIRECTORY, LINKED, OLD, SMALL_FILE, WATCHED};
use crate::io::MappedStorage;

const NEW: &[u8] = b"as the container";

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// What.
    pub what: &'static str,
    /// Whether it came out as it should.
    pub right: bool,
    /// What was seen.
    pub seen: String,
}

/// Tries all of them in the root file system at `root`.
///
/// # Errors
///
/// Something that has nothing to do with what is tried.
pub fn try_all(root: &Path) -> Result<Vec<Trial>> {
    Ok(vec![rename_directory(root), two_descriptors(root)?, hard_link(root)?, watch(root)?])
}

fn rename_directory(root: &Path) -> Trial {
    let outcome = fs::rename(root.join(DIRECTORY), root.join("srv/renamed"));
    let seen = match &outcome {
        Ok(()) => "renamed".to_owned(),
        Err(error) if error.raw_os_error() == Some(libc::EXDEV) => "EXDEV: cross-device link".to_owned(),
        Err(error) => error.to_string(),
    };
    Trial { what: "rename a directory of the image", right: outcome.is_ok(), seen }
}

/// A descriptor for reading, mapped, as a database or a loader holds one, and another one for writing.
fn two_descriptors(root: &Path) -> Result<Trial> {
    let path = root.join(SMALL_FILE);
    let reader = File::open(&path).with_context(|| path.display().to_string())?;
    let mapping = MappedStorage::open_unlocked(&path)?;
    let mut before = [0; NEW.len()];
    mapping.read_at(0, &mut before)?;
    let writer = OpenOptions::new().read(true).write(true).open(&path)?;
    writer.write_all_at(NEW, 0)?;
    let (mut read, mut mapped) = ([0; NEW.len()], [0; NEW.len()]);
    reader.read_exact_at(&mut read, 0)?;
    mapping.read_at(0, &mut mapped)?;
    let seen = match (read == NEW, mapped == NEW) {
        (true, true) => "both see the write",
        (true, false) => "the mapping keeps the old data",
        (false, true) => "the descriptor keeps the old data",
        (false, false) => "both keep the old data",
    };
    let right = before == OLD[..NEW.len()] && read == NEW && mapped == NEW;
    Ok(Trial { what: "O_RDONLY (mapped) and O_RDWR of one file", right, seen: seen.to_owned() })
}

fn hard_link(root: &Path) -> Result<Trial> {
    let [name, other] = LINKED.map(|name| root.join(name));
    OpenOptions::new().write(true).open(&name)?.write_all_at(NEW, 0)?;
    let right = fs::read(&other)?.starts_with(NEW);
    let seen = if right { "both names show it" } else { "link broken: the other name has the old data" };
    Ok(Trial { what: "write to a file with two hard links", right, seen: seen.to_owned() })
}

/// Watches a file by one name, and writes to it by the other.
fn watch(root: &Path) -> Result<Trial> {
    let [name, other] = WATCHED.map(|name| root.join(name));
    let descriptor = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&descriptor, &other, inotify::WatchFlags::MODIFY)?;
    OpenOptions::new().write(true).open(&name)?.write_all_at(NEW, 0)?;
    let mut events = [0; 4096];
    let right = rustix::io::read(&descriptor, &mut events).is_ok_and(|count| count > 0);
    let seen = if right { "the write was reported" } else { "nothing was reported" };
    Ok(Trial { what: "inotify on the file that was written", right, seen: seen.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::super::content::{LAYERS, write_layer};
    use super::*;
    use crate::cli::image::Interrupt;

    #[test]
    fn plain_directory_does_everything_right() {
        let place = tempfile::tempdir().unwrap();
        for layer in 1..=LAYERS {
            write_layer(layer, place.path(), 1 << 20, &Interrupt::default()).unwrap();
        }
        for trial in try_all(place.path()).unwrap() {
            assert!(trial.right, "{trial:?}");
        }
    }
}

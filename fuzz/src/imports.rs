//! Where the import targets unpack: a directory in memory, with something beside it that nothing may touch.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use plywood::cli::image::open_root;
use tempfile::TempDir;

const OUTSIDE: &str = "outside";
const CONTENT: &[u8] = b"not to be touched";

/// A directory to unpack into.
pub struct Ground {
    directory: TempDir,
}

impl Ground {
    /// A new one in /dev/shm, or where temporary files go.
    ///
    /// # Panics
    /// When there is no room.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix("plywood-fuzz-").tempdir_in(parent).expect("a directory");
        std::fs::write(directory.path().join(OUTSIDE), CONTENT).expect("room for a file");
        Self { directory }
    }

    /// An empty directory of that name in it.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn empty(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        if path.exists() && std::fs::remove_dir_all(&path).is_err() {
            // Deeper than a process may have files open.
            assert!(Command::new("rm").arg("-rf").arg(&path).status().is_ok_and(|status| status.success()));
        }
        std::fs::create_dir(&path).expect("room for a directory");
        path
    }

    /// An empty root to unpack into.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn root(&self) -> OwnedFd {
        open_root(&self.empty("root")).expect("the directory was made")
    }

    /// Whether all that stands beside the root is what was put there, `known` by name.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_untouched(&self, known: &[&str]) {
        assert_eq!(std::fs::read(self.directory.path().join(OUTSIDE)).expect("it is there"), CONTENT);
        for entry in std::fs::read_dir(self.directory.path()).expect("it is there") {
            let name = entry.expect("it can be listed").file_name();
            let is_known = name == OUTSIDE || known.iter().any(|known| name == **known);
            assert!(is_known, "{} was unpacked outside of the root", name.display());
        }
    }
}

impl Default for Ground {
    fn default() -> Self {
        Self::new()
    }
}

/// A small archive of each kind of entry.
///
/// # Panics
/// Never: it is written to memory.
pub fn sample_archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |kind: tar::EntryType, path: &str, link: Option<&str>, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.set_mtime(1_700_000_000);
        header.set_device_major(1).and_then(|()| header.set_device_minor(3)).expect("a header of ustar");
        if let Some(link) = link {
            header.set_link_name(link).expect("a short name");
        }
        builder.append_data(&mut header, path, content).expect("memory takes it");
    };
    add(tar::EntryType::XHeader, "pax", None, b"30 mtime=1700000000.123456789\n23 path=dir/from-pax-x\n");
    add(tar::EntryType::Directory, "dir/", None, b"");
    add(tar::EntryType::Regular, "dir/file", None, b"content");
    add(tar::EntryType::Symlink, "dir/link", Some("../dir"), b"");
    add(tar::EntryType::Regular, "dir/link/through", None, b"through a link");
    add(tar::EntryType::Link, "hard", Some("dir/file"), b"");
    add(tar::EntryType::Fifo, "fifo", None, b"");
    add(tar::EntryType::Char, "null", None, b"");
    add(tar::EntryType::Regular, "dir/.wh.file", None, b"");
    add(tar::EntryType::Regular, "dir/.wh..wh..opq", None, b"");
    builder.into_inner().expect("memory takes it")
}

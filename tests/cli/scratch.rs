//! A pool file in a folder of its own, and `plywood` on it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::command::{Outcome, binary, prepare, run_command};

/// A folder that goes away, with a pool in it.
pub struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    /// A folder without anything.
    pub fn empty() -> Self {
        // Beside the build, which stands on a real file system: /tmp may be one that has no direct I/O.
        let folder = tempfile::Builder::new().prefix("cli-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        Self { folder }
    }

    /// A folder with a new pool of 1 GiB.
    pub fn with_pool() -> Self {
        let scratch = Self::empty();
        let file = scratch.pool().into_os_string();
        scratch.plywood(["pool".into(), "create".into(), file, "--size".into(), "1G".into()] as [OsString; 5]).expect();
        scratch
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn pool(&self) -> PathBuf {
        self.path("main.plywood")
    }

    /// Runs `plywood` on the pool.
    #[track_caller]
    pub fn plywood<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Outcome {
        run_command(self.prepare(arguments))
    }

    /// The same, not started yet.
    pub fn prepare<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> std::process::Command {
        let mut command = prepare(&binary().to_string_lossy(), arguments);
        command.env("PLYWOOD_POOL", self.pool()).env("COLUMNS", "100").env_remove("PLYWOOD_LOG");
        command.current_dir(self.folder.path());
        command
    }

    /// Runs `plywood` with the words of `line`, which must succeed, and returns what it said.
    #[track_caller]
    pub fn done(&self, line: &str) -> String {
        self.plywood(line.split_whitespace()).expect()
    }

    /// What `plywood LINE --json` prints.
    #[track_caller]
    pub fn json(&self, line: &str) -> Value {
        let text = self.done(&format!("{line} --json"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`{line} --json`: {error}: {text}"))
    }

    /// Runs `plywood` with the words of `line`, which must be refused: exit status 1, one line that has all of `named`,
    /// and the pool file the same, byte for byte.
    #[track_caller]
    pub fn refused(&self, line: &str, named: &[&str]) {
        self.refused_words(line.split_whitespace(), named);
    }

    #[track_caller]
    pub fn refused_words<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>, named: &[&str]) {
        let file = self.pool();
        let before = digest(&file);
        self.plywood(arguments).expect_refusal(named);
        assert_eq!(digest(&file), before, "a refused command has changed the pool file");
    }

    /// Runs `plywood` with the words of `line`, which make no sense: exit status 2.
    #[track_caller]
    pub fn misused(&self, line: &str) {
        let outcome = self.plywood(line.split_whitespace());
        assert_eq!(outcome.status.code(), Some(2), "`{line}`: {}{}", outcome.stdout, outcome.stderr);
        assert!(!outcome.stderr.is_empty(), "`{line}` says nothing");
    }
}

/// Digest of a file's content and length; a hole and written zeros are the same. None when it is not there.
pub fn digest(file: &Path) -> Option<blake3::Hash> {
    use rustix::fs::{SeekFrom, seek};
    let file = fs::File::open(file).ok()?;
    let len = file.metadata().expect("metadata").len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    let mut offset = 0;
    // Pools are sparse: only what the host holds is read.
    while let Ok(data) = seek(&file, SeekFrom::Data(offset)) {
        let end = seek(&file, SeekFrom::Hole(data)).expect("the end of the data");
        let mut block = [0; 4096];
        offset = data;
        while offset < end {
            let count = file.read_at(&mut block, offset).expect("reading a file");
            if block[..count].iter().any(|byte| *byte != 0) {
                hasher.update(&offset.to_le_bytes()).update(&block[..count]);
            }
            offset += count as u64;
        }
    }
    Some(hasher.finalize())
}

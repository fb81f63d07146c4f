//! A disk that fails: the pool stops writing, says why, reads what it can, stays so through a kill, and opens clean when the
//! disk works again.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::recording::RecordedDisk;
use crate::support::command::{Outcome, run, shell, wait_until};
use crate::support::machine::scratch;
use crate::support::pool::{TestPool, Transport};

const LONG: Duration = Duration::from_secs(90);
/// No operation on a disk that fails may hang: this long is far more than any of them takes.
const PATIENCE: &str = "timeout 60";

/// A pool on a disk that fails when it is told so, with a mounted file system and a device beside it.
struct Dying {
    // Dropped in this order, also by a panic.
    pool: TestPool,
    disk: RecordedDisk,
    _folder: tempfile::TempDir,
    faulty: PathBuf,
    files: String,
    raw: String,
    point: PathBuf,
    kept: String,
}

impl Dying {
    fn begin() -> Self {
        let folder = tempfile::tempdir_in(scratch()).expect("a folder");
        let faulty = folder.path().join("faulty");
        let options: [&OsStr; 2] = ["--faulty".as_ref(), faulty.as_ref()];
        let disk = RecordedDisk::start_with(folder.path(), 1 << 30, &options);
        let pool = TestPool::create_on(disk.device.as_ref(), "1G", Transport::Auto);
        for name in ["files", "raw"] {
            pool.done(&format!("volume create {name} --size 128M --sector-size 4096"));
        }
        let (files, raw) = (pool.attach("files"), pool.attach("raw"));
        run("mkfs.ext4", ["-q", &files]).expect();
        let point = pool.mount("files");
        shell(&format!("dd if=/dev/urandom of='{}' bs=1M count=8 conv=fsync", point.join("kept").display())).expect();
        let kept = digest(&point.join("kept"));
        write(&raw, 0, 16).expect();
        Self { pool, disk, _folder: folder, faulty, files, raw, point, kept }
    }

    fn fail(&self, operations: &str) {
        fs::write(&self.faulty, operations).expect("the word");
    }

    /// The disk works again, and the pool is started anew: all that was flushed is there.
    fn end(self) {
        fs::remove_file(&self.faulty).expect("the word");
        // The daemon of before says no to everything; its devices cannot be written.
        shell(&format!("{PATIENCE} umount '{0}' || {PATIENCE} umount -l '{0}'", self.point.display())).expect();
        let stopped = self.pool.plywood(["stop", "--force"]);
        assert!(self.pool.process("front_pid").is_none(), "{}", stopped.stderr);
        let files = self.pool.attach("files");
        shell(&format!("e2fsck -p {files} || [ $? -eq 1 ]")).expect();
        run("e2fsck", ["-f", "-n", &files]).expect();
        let point = self.pool.mount("files");
        assert_eq!(digest(&point.join("kept")), self.kept, "what was flushed is there");
        write(&self.pool.attach("raw"), 1, 16).expect();
        self.pool.unmount(&point);
        self.pool.done("detach --all");
        self.pool.stop();
        self.pool.check();
        drop(self.pool);
        self.disk.stop();
    }
}

/// Past the page cache.
fn digest(file: &Path) -> String {
    shell(&format!("{PATIENCE} dd if='{}' iflag=direct bs=1M 2>/dev/null | sha256sum", file.display())).expect()
}

fn write(device: &str, at_mib: u32, count_mib: u32) -> Outcome {
    let line =
        format!("if=/dev/urandom of={device} bs=1M seek={at_mib} count={count_mib} oflag=direct conv=notrunc,fsync");
    shell(&format!("{PATIENCE} dd {line}"))
}

/// Writes and flushes fail. The first of them that metadata needs stops the pool; a kill does not make it forget.
pub fn failed_writes_stop_the_pool_until_it_is_opened_anew() {
    let dying = Dying::begin();
    dying.fail("write flush");
    assert!(!write(&dying.raw, 64, 8).succeeded(), "a disk that fails wrote");
    wait_until("the pool says that it stopped", LONG, || !dying.pool.info()["poisoned"].is_null());
    let reason = dying.pool.info()["poisoned"].as_str().expect("a reason").to_owned();
    assert!(reason.contains("nput/output error") || reason.contains("os error 5"), "{reason}");
    assert_eq!(digest(&dying.point.join("kept")), dying.kept, "reads go on");
    dying.pool.refused("volume create other --size 1M", &["poisoned", "Input/output error"]);
    // The disk works again; what an engine could not make durable before is not known to anybody.
    dying.fail("");
    assert!(!write(&dying.raw, 0, 1).succeeded(), "a pool that stopped wrote");
    let engine = dying.pool.process("engine_pid").expect("an engine");
    run("kill", ["-9".to_owned(), engine.to_string()]).expect();
    assert!(!write(&dying.raw, 0, 1).succeeded(), "a successor forgot that the pool had stopped");
    dying.end();
}

/// Everything fails, as when a disk is gone.
pub fn disk_that_goes_away_hangs_nobody() {
    let dying = Dying::begin();
    dying.fail("read write flush");
    assert!(!write(&dying.raw, 64, 8).succeeded(), "a disk that is gone wrote");
    let gone = shell(&format!("{PATIENCE} dd if={} of=/dev/null iflag=direct bs=1M count=8", dying.raw));
    assert!(!gone.succeeded(), "a disk that is gone was read");
    run("timeout", ["60", "blockdev", "--getsize64", &dying.files]).expect();
    wait_until("the pool says that it stopped", LONG, || !dying.pool.info()["poisoned"].is_null());
    dying.end();
}

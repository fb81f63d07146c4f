//! The engine process is killed (-9) ten times under load. Nobody above may notice: no I/O error, no mismatch, and no
//! acknowledged write lost, flushed or not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::fio::Verify;
use crate::story::FileSystem;
use crate::support::command::{is_slow, run};
use crate::support::kernel_log::KernelLog;
use crate::support::mounted::device_at;
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::random_bytes;

const KILLS: u64 = 10;

/// Under fio with verification at depth 32.
pub fn under_fio(transport: Transport) {
    let pool = TestPool::create("10G", transport);
    pool.done("volume create raw --size 1G --sector-size 4096");
    let device = pool.attach("raw");
    let (size_mib, rate_iops, pause_ms) = if is_slow() { (128, 400, 3000) } else { (512, 6000, 700) };
    let mut writer = Verify { file: &device, size_mib, rate_iops }.start();
    for kill in 0..KILLS {
        std::thread::sleep(Duration::from_millis(pause_ms));
        assert!(writer.is_running(), "fio ended before kill {kill}: {:?}", writer.finish());
        pool.kill_engine();
    }
    assert!(writer.is_running(), "fio ended before the last kill: {:?}", writer.finish());
    writer.finish().expect();
    assert_eq!(pool.info()["engine_restarts"], KILLS);
    pool.done("detach raw");
    pool.stop();
    pool.check();
}

/// Under a mounted ext4 whose files are written, appended to, renamed and deleted without any fsync, their digests
/// remembered here.
pub fn under_ext4(transport: Transport) {
    let log = KernelLog::from_now();
    let pool = TestPool::create("10G", transport);
    pool.done("volume create files --size 2G --sector-size 4096");
    let device = pool.attach("files");
    run("mkfs.ext4", ["-q", &device]).expect();
    let point = pool.mount("files");

    let stop = AtomicBool::new(false);
    let files = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let folder = point.join(format!("worker-{worker}"));
                let stop = &stop;
                scope.spawn(move || work(&folder, worker, stop))
            })
            .collect();
        // The workers end also when a kill goes wrong here.
        let ending = StopOnDrop(&stop);
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(if is_slow() { 3000 } else { 800 }));
            pool.kill_engine();
            // Drops clean pages only: from now on they come from the device again.
            fs::write("/proc/sys/vm/drop_caches", "1").expect("dropping caches");
        }
        drop(ending);
        let mut files = BTreeMap::new();
        for worker in workers {
            files.extend(worker.join().expect("a worker's files are as it wrote them"));
        }
        files
    });
    assert!(files.len() > 20, "only {} files were left to compare", files.len());
    // Compared from the cache and, once it is written back and dropped, from the device.
    compare(&files);
    run("sync", ["-f", point.to_str().expect("a path")]).expect();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("dropping caches");
    compare(&files);
    let name = device_at(&point).expect("mounted");
    let errors = format!("/sys/fs/ext4/{}/errors_count", name.trim_start_matches("/dev/"));
    assert_eq!(fs::read_to_string(errors).expect("ext4's count of errors").trim(), "0");
    assert_eq!(pool.info()["engine_restarts"], KILLS);

    pool.unmount(&point);
    let device = pool.attach("files");
    FileSystem::Ext4.check(&device);
    log.assert_no_io_error(&device);
    pool.done("detach files");
    pool.stop();
    pool.check();
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes, appends, overwrites, renames and deletes until told to stop; returns what the files then hold.
fn work(folder: &Path, seed: u64, stop: &AtomicBool) -> BTreeMap<PathBuf, Vec<u8>> {
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

fn compare(files: &BTreeMap<PathBuf, Vec<u8>>) {
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

//! The engine process is killed (-9) ten times under load. Nobody above may notice: no I/O error, no mismatch, and no
//! acknowledged write lost, flushed or not.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::fio::Verify;
use crate::story::FileSystem;
use crate::support::command::{is_slow, run};
use crate::support::kernel_log::KernelLog;
use crate::support::mounted::device_at;
use crate::support::pool::{TestPool, Transport};
use crate::workload::{StopOnDrop, compare, work};

const KILLS: u64 = 10;

/// Under fio with verification at depth 32.
pub fn under_fio(transport: Transport) {
    let pool = TestPool::create("10G", transport);
    pool.done("volume create raw --size 1G --sector-size 4096");
    let device = pool.attach("raw");
    let (size_mib, rate_iops, pause_ms) = if is_slow() { (32, 400, 3000) } else { (64, 6000, 700) };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ending = StopOnDrop(&stop);
        let verifier = scope.spawn(|| Verify { file: &device, size_mib, rate_iops }.until(&stop));
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(pause_ms));
            assert!(!verifier.is_finished(), "fio has ended");
            pool.kill_engine();
        }
        drop(ending);
        verifier.join().expect("fio found what it wrote");
    });
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

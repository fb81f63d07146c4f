//! fio with verification on an attached volume, while snapshots of it are taken and deleted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::story::FileSystem;
use crate::support::command::{Background, is_slow, run};
use crate::support::kernel_log::KernelLog;
use crate::support::pool::{TestPool, Transport};

/// A writer at depth 32 that reads everything back and compares.
pub struct Verify<'a> {
    pub file: &'a str,
    pub size_mib: u64,
    /// Bounds the speed, so that there is time to do things under it.
    pub rate_iops: u64,
}

impl Verify<'_> {
    pub fn start(&self) -> Background {
        Background::start("fio", self.arguments())
    }

    /// Runs again and again until told to stop. Answers how often.
    ///
    /// # Panics
    /// When it finds something else than it wrote.
    pub fn until(&self, stop: &AtomicBool) -> u64 {
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            self.start().finish().expect();
            rounds += 1;
        }
        rounds
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = [
            "--name=verify",
            "--ioengine=libaio",
            "--iodepth=32",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_backlog=4096",
            "--randrepeat=0",
            "--verify_state_save=0",
            "--group_reporting",
        ]
        .map(str::to_owned)
        .to_vec();
        arguments.push(format!("--filename={}", self.file));
        arguments.push(format!("--size={}M", self.size_mib));
        arguments.push(format!("--rate_iops={}", self.rate_iops));
        arguments
    }
}

/// fio on one volume; on another a mounted ext4 is written to. Snapshots of both are taken and deleted meanwhile, and a
/// clone of every one that stays is sound.
pub fn under_snapshots(transport: Transport, sector_size: u32) {
    let log = KernelLog::from_now();
    let pool = TestPool::create("20G", transport);
    pool.done(&format!("volume create raw --size 512M --sector-size {sector_size}"));
    pool.done(&format!("volume create files --size 1G --sector-size {sector_size}"));
    let raw = pool.attach("raw");
    let files = pool.attach("files");
    run("mkfs.ext4", ["-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", &files]).expect();
    let point = pool.mount("files");

    let (size_mib, rate_iops, rounds) = if is_slow() { (32, 400, 6) } else { (256, 6000, 20) };
    let mut raw_writer = Verify { file: &raw, size_mib, rate_iops }.start();
    let target = point.join("fio");
    let target = target.to_string_lossy();
    let mut file_writer = Verify { file: &target, size_mib, rate_iops: rate_iops / 2 }.start();

    let mut kept = Vec::new();
    let mut taken = 0;
    for round in 0..rounds {
        pool.done(&format!("snapshot create raw raw-{round}"));
        pool.done(&format!("snapshot create files files-{round}"));
        taken += u32::from(raw_writer.is_running() && file_writer.is_running());
        if round % 2 == 0 {
            pool.done(&format!("snapshot delete raw-{round} --yes"));
            pool.done(&format!("snapshot delete files-{round} --yes"));
        } else {
            kept.push(format!("files-{round}"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(taken >= rounds / 2, "only {taken} snapshots were taken while fio was writing");
    raw_writer.finish().expect();
    file_writer.finish().expect();

    for snapshot in &kept {
        let clone = format!("clone-of-{snapshot}");
        pool.done(&format!("clone create {snapshot} {clone}"));
        // Mounting replays the file system's journal: a snapshot is what a power cut would have left.
        let point = pool.mount(&clone);
        pool.unmount(&point);
        let device = pool.attach(&clone);
        FileSystem::Ext4.check(&device);
        pool.done(&format!("detach {clone}"));
    }
    pool.unmount(&point);
    let device = pool.attach("files");
    FileSystem::Ext4.check(&device);
    pool.done("detach --all");
    pool.stop();
    pool.check();
    for device in [raw, files] {
        log.assert_no_io_error(&device);
    }
}

//! A pool, or the host's file system under it, filled by random writes to several volumes with snapshots: what needs no
//! space goes on, a write that is refused has changed nothing, and what was acknowledged is there.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::refusals::HostDisk;
use crate::support::command::{Background, run, wait_until};
use crate::support::pool::{TestPool, Transport};

const UNIT: usize = 16 << 10;
const VOLUME_UNITS: u64 = (1 << 30) / UNIT as u64;
const OWN_UNITS: u64 = 1024;
const LONG: Duration = Duration::from_secs(120);
const VOLUMES: [&str; 3] = ["one", "two", "three"];

/// Memory for direct I/O.
#[repr(align(4096))]
struct Unit([u8; UNIT]);

/// A device, and what was written to it.
struct Written {
    device: File,
    /// Number of the last write of each unit.
    numbers: HashMap<u64, u64>,
    next: u64,
}

impl Written {
    fn open(device: &str) -> Self {
        let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device);
        Self { device: device.expect("a device"), numbers: HashMap::new(), next: 1 }
    }

    fn write(&mut self, unit: u64) -> io::Result<()> {
        let number = self.next;
        self.next += 1;
        let mut bytes = Box::new(Unit([0; UNIT]));
        for (index, word) in bytes.0.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&content(unit, number, index).to_le_bytes());
        }
        self.device.write_all_at(&bytes.0, unit * UNIT as u64)?;
        self.numbers.insert(unit, number);
        Ok(())
    }

    /// Random writes with a flush now and then, until there is no space.
    fn fill(&mut self, random: &mut fastrand::Rng) {
        loop {
            for _ in 0..32 {
                let unit = random.u64(..VOLUME_UNITS);
                if let Err(error) = self.write(unit) {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
                    return;
                }
            }
            self.device.sync_data().expect("a flush needs no space");
        }
    }

    fn compare(&self) {
        let mut bytes = Box::new(Unit([0; UNIT]));
        for (unit, number) in &self.numbers {
            self.device.read_exact_at(&mut bytes.0, unit * UNIT as u64).expect("reads go on");
            for (index, word) in bytes.0.chunks_exact(8).enumerate() {
                let found = u64::from_le_bytes(word.try_into().expect("a word"));
                assert_eq!(found, content(*unit, *number, index), "unit {unit}, word {index} of write {number}");
            }
        }
    }
}

fn content(unit: u64, number: u64, index: usize) -> u64 {
    (unit << 40 | number << 12 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub fn random_writes_fill_the_pool() {
    fill(&TestPool::create("1G", Transport::Auto));
}

pub fn random_writes_fill_the_host() {
    let host = HostDisk::create(700 << 20);
    fill(&TestPool::create_in(&host.point, "8G", Transport::Auto));
}

fn fill(pool: &TestPool) {
    pool.done("volume create own --size 64M --sector-size 4096");
    let mut own = Written::open(&pool.attach("own"));
    (0..OWN_UNITS).for_each(|unit| own.write(unit).expect("there is space"));
    let mut volumes = VOLUMES.map(|name| {
        pool.done(&format!("volume create {name} --size 1G --sector-size 4096"));
        Written::open(&pool.attach(name))
    });
    let full = AtomicBool::new(false);
    let mut snapshots = Vec::new();
    thread::scope(|scope| {
        let writers: Vec<_> =
            volumes.iter_mut().map(|volume| scope.spawn(move || volume.fill(&mut fastrand::Rng::new()))).collect();
        let mut round = 0;
        while !full.load(Ordering::Relaxed) {
            for name in VOLUMES {
                // Near the end there may be no space for one.
                if pool.plywood(["snapshot", "create", name, &format!("{name}-{round}")]).succeeded() {
                    snapshots.push(format!("{name}-{round}"));
                }
            }
            round += 1;
            thread::sleep(Duration::from_millis(300));
            full.store(writers.iter().all(|writer| writer.is_finished()), Ordering::Relaxed);
        }
    });
    assert!(snapshots.len() >= VOLUMES.len(), "{snapshots:?}");

    // Full: reads, overwriting what is a volume's own, flushes, discards that are worth it and deletions go on.
    volumes.iter().for_each(Written::compare);
    for unit in 0..OWN_UNITS / 2 {
        own.write(unit).expect("its own blocks are there");
    }
    own.device.sync_data().expect("a flush");
    own.compare();
    let device = pool.volume("own")["device"].as_str().expect("a device").to_owned();
    let (half, length) = ((OWN_UNITS / 2 * UNIT as u64).to_string(), (OWN_UNITS / 4 * UNIT as u64).to_string());
    run("blkdiscard", ["-o", &half, "-l", &length, &device]).expect();
    own.numbers.retain(|unit, _| *unit < OWN_UNITS / 2 || *unit >= OWN_UNITS / 4 * 3);
    for snapshot in &snapshots {
        pool.done(&format!("snapshot delete {snapshot} --yes"));
    }
    // What that gave back can be written again.
    wait_until("there is space again", LONG, || volumes[0].write(0).is_ok());
    volumes[0].device.sync_data().expect("a flush");
    volumes.iter().chain([&own]).for_each(Written::compare);

    let written: Vec<_> = volumes.into_iter().chain([own]).map(|volume| volume.numbers).collect();
    pool.done("detach --all");
    pool.stop();
    pool.check();
    for (name, numbers) in VOLUMES.into_iter().chain(["own"]).zip(written) {
        Written { numbers, ..Written::open(&pool.attach(name)) }.compare();
    }
}

/// Writes that wait for space go on when the *host* has some again; others are not held up meanwhile.
pub fn writes_wait_for_the_host() {
    let host = HostDisk::create(400 << 20);
    let filler = host.point.join("filler");
    run("fallocate", ["-l", "150M", filler.to_str().expect("a path")]).expect();
    let pool = TestPool::create_in(&host.point, "8G", Transport::Auto);
    pool.done("volume create own --size 64M --sector-size 4096");
    let mut own = Written::open(&pool.attach("own"));
    (0..OWN_UNITS).for_each(|unit| own.write(unit).expect("there is space"));
    pool.done("volume create patient --size 1G --sector-size 4096 --on-full wait");
    let of = format!("of={}", pool.attach("patient"));
    let line = ["if=/dev/urandom", &of, "bs=1M", "count=200", "oflag=direct", "conv=fsync"];
    let mut writer = Background::start("dd", line);
    wait_until("a write waits for space", LONG, || {
        assert!(writer.is_running(), "it does not wait");
        pool.info()["waiting"].as_u64() > Some(0)
    });
    for unit in 0..OWN_UNITS {
        own.write(unit).expect("its own blocks are there");
    }
    own.compare();
    std::fs::remove_file(&filler).expect("the filler");
    wait_until("the writer ends", LONG, || !writer.is_running());
    writer.finish().expect();
    own.compare();
    drop(own);
    pool.done("detach --all");
    pool.stop();
    pool.check();
}

//! A volume with a reservation on a pool that its neighbours fill: every byte of it can be written.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use crate::support::command::{Background, run, wait_until};
use crate::support::pool::{TestPool, Transport};

const RESERVED_BYTES: u64 = 96 << 20;
const UNIT: usize = 4096;
const LONG: Duration = Duration::from_secs(180);

/// Memory for direct I/O.
#[repr(align(4096))]
struct Unit([u8; UNIT]);

fn content(unit: u64, round: u8) -> Box<Unit> {
    let mut random = fastrand::Rng::with_seed(unit << 8 | u64::from(round));
    let mut bytes = Box::new(Unit([0; UNIT]));
    random.fill(&mut bytes.0);
    bytes
}

/// Writes every unit of the device in random order, with a flush now and then, and reads it again.
fn write_all(device: &str, round: u8) {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("a device");
    let mut units: Vec<u64> = (0..RESERVED_BYTES / UNIT as u64).collect();
    fastrand::Rng::with_seed(round.into()).shuffle(&mut units);
    for (count, unit) in units.iter().enumerate() {
        let written = device.write_all_at(&content(*unit, round).0, unit * UNIT as u64);
        written.unwrap_or_else(|error| panic!("unit {unit}, the {count}th of round {round}: {error}"));
        if count % 512 == 0 {
            device.sync_data().unwrap_or_else(|error| panic!("flush after {count} units of round {round}: {error}"));
        }
    }
    device.sync_all().expect("a flush");
    let mut found = Box::new(Unit([0; UNIT]));
    for unit in units {
        device.read_exact_at(&mut found.0, unit * UNIT as u64).expect("a read");
        assert!(found.0 == content(unit, round).0, "unit {unit} of round {round}");
    }
}

/// fio that writes all over a device until there is no space.
fn filler(device: &str, block: &str) -> Background {
    let line = [
        "--name=fill",
        &format!("--filename={device}"),
        "--rw=randwrite",
        &format!("--bs={block}"),
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=16",
        "--size=4G",
        "--norandommap",
    ];
    Background::start("fio", line)
}

pub fn reserved_volume_is_written_on_a_full_pool() {
    let pool = TestPool::create("512M", Transport::Auto);
    pool.done(&format!("volume create kept --size {RESERVED_BYTES} --reserve {RESERVED_BYTES} --sector-size 4096"));
    let kept = pool.attach("kept");
    let neighbours = ["one", "two"].map(|name| {
        pool.done(&format!("volume create {name} --size 4G --sector-size 4096"));
        pool.attach(name)
    });
    assert!(pool.info()["owed_bytes"].as_u64() >= Some(RESERVED_BYTES));
    // One in large writes, the other in small ones, until both have been refused.
    let [large, small] = [filler(&neighbours[0], "256k"), filler(&neighbours[1], "4k")];
    for mut one in [large, small] {
        wait_until("a neighbour is refused", LONG, || !one.is_running());
        assert!(!one.finish().succeeded(), "it was to run out of space");
    }
    // While they go on trying.
    let mut again = filler(&neighbours[1], "4k");
    write_all(&kept, 1);
    // A snapshot would want all of it anew.
    pool.refused("snapshot create kept early", &["bytes are missing"]);
    // What is given up can be had again.
    run("blkdiscard", [kept.as_str()]).expect();
    write_all(&kept, 2);
    wait_until("the neighbour ends", LONG, || !again.is_running());
    drop(again.finish());
    // After a restart, too.
    pool.done("detach --all");
    pool.stop();
    let kept = pool.attach("kept");
    run("blkdiscard", ["-o", "0", "-l", &(RESERVED_BYTES / 2).to_string(), &kept]).expect();
    let neighbour = pool.attach("two");
    let mut again = filler(&neighbour, "64k");
    write_all(&kept, 3);
    wait_until("the neighbour ends", LONG, || !again.is_running());
    drop(again.finish());
    pool.done("detach --all");
    // With a neighbour gone there is room for a snapshot.
    pool.done("volume delete one --yes");
    pool.done("snapshot create kept late");
    pool.stop();
    pool.check();
}

//! Rule O9 on a slow disk: an engine is killed while its reads and writes are on their way, and its successor writes nothing
//! before the last of them has ended.

use std::ffi::OsStr;
use std::fs;
use std::time::Duration;

use crate::fio::Verify;
use crate::recording::RecordedDisk;
use crate::support::command::{run, wait_until};
use crate::support::machine::scratch;
use crate::support::pool::{TestPool, Transport};

const KILLS: u32 = 3;
/// How long the dead engine's last operations take.
const SLOW_MS: u64 = 1500;

pub fn successor_waits_for_the_dead(transport: Transport) {
    let folder = tempfile::tempdir_in(scratch()).expect("a folder");
    let slow = folder.path().join("slow");
    let options: [&OsStr; 2] = ["--slow".as_ref(), slow.as_ref()];
    let disk = RecordedDisk::start_with(folder.path(), 2 << 30, &options);
    let pool = TestPool::create_on(disk.device.as_ref(), "2G", transport);
    pool.done("volume create raw --size 256M --sector-size 4096");
    let device = pool.attach("raw");
    // So that no space has to be prepared.
    run("dd", ["if=/dev/zero", &format!("of={device}"), "bs=1M", "count=224", "oflag=direct"]).expect();
    let mut writer = Verify { file: &device, size_mib: 224, rate_iops: 2000 }.start();
    for kill in 0..KILLS {
        std::thread::sleep(Duration::from_millis(900));
        assert!(writer.is_running(), "fio ended before kill {kill}: {:?}", writer.finish());
        let engine = pool.process("engine_pid").expect("an engine");
        fs::write(&slow, SLOW_MS.to_string()).expect("a number");
        let waits = slow.with_extension("waits");
        let waiting = || fs::read_to_string(&waits).ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
        wait_until("many operations are on their way", Duration::from_secs(60), || waiting() > 8);
        // What it has sent must have come to the disk before the disk is quick again: it would overtake itself.
        run("kill", ["-STOP".to_owned(), engine.to_string()]).expect();
        let mut seen = 0;
        wait_until("all that was sent has come", Duration::from_secs(60), || {
            std::thread::sleep(Duration::from_millis(100));
            let now = waiting();
            std::mem::replace(&mut seen, now) == now
        });
        run("kill", ["-9".to_owned(), engine.to_string()]).expect();
        fs::remove_file(&slow).and_then(|()| fs::remove_file(&waits)).expect("the numbers");
        wait_until("a new engine process", Duration::from_secs(60), || {
            pool.process("engine_pid").is_some_and(|id| id != engine)
        });
    }
    writer.finish().expect();
    let overtaken = folder.path().join("slow.overtaken");
    assert!(!overtaken.exists(), "a successor wrote while the dead engine's I/O was on its way");
    pool.done("detach raw");
    pool.stop();
    pool.check();
    drop(pool);
    disk.stop();
}

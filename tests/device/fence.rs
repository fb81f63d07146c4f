//! Rule O9 on a slow disk: an engine is killed while its reads and writes are on their way, and its successor writes nothing
//! before the last of them has ended.

use std::ffi::OsStr;
use std::fs;
use std::time::{Duration, Instant};

use crate::fio::Verify;
use crate::recording::RecordedDisk;
use crate::support::command::{run, wait_until};
use crate::support::machine::scratch;
use crate::support::pool::{TestPool, Transport};

const KILLS: u32 = 3;
/// How long the dead engine's last operations take.
const SLOW_MS: u64 = 2500;
/// When nothing has come for this long, nothing is on its way.
const QUIET: Duration = Duration::from_millis(600);

pub fn successor_waits_for_the_dead(transport: Transport) {
    let folder = tempfile::tempdir_in(scratch()).expect("a folder");
    // What it goes by waits for no other disk.
    let control = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let slow = control.path().join("slow");
    let waits = slow.with_extension("waits");
    std::os::unix::fs::symlink("/dev/null", folder.path().join("log")).expect("no log");
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
        // The last round's, or nothing.
        let _ = fs::remove_file(&waits);
        fs::write(&slow, SLOW_MS.to_string()).expect("a number");
        let waiting = || fs::read_to_string(&waits).ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
        wait_until("many operations are on their way", Duration::from_secs(60), || waiting() > 8);
        // What it has sent must have come to the disk before the disk is quick again: it would overtake itself.
        run("kill", ["-STOP".to_owned(), engine.to_string()]).expect();
        let mut quiet = (0, Instant::now());
        wait_until("all that was sent has come", Duration::from_secs(60), || {
            let now = waiting();
            if now == 0 || now != quiet.0 {
                quiet = (now, Instant::now());
            }
            quiet.1.elapsed() > QUIET
        });
        run("kill", ["-9".to_owned(), engine.to_string()]).expect();
        fs::remove_file(&slow).expect("the number");
        wait_until("a new engine process", Duration::from_secs(60), || {
            pool.process("engine_pid").is_some_and(|id| id != engine)
        });
    }
    writer.finish().expect();
    let overtaken = control.path().join("slow.overtaken");
    assert!(!overtaken.exists(), "a successor wrote while the dead engine's I/O was on its way");
    pool.done("detach raw");
    pool.stop();
    pool.check();
    drop(pool);
    disk.stop();
}

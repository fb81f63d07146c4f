//! A full pool under file systems: what needs no space goes on, what waits is served when there is some, and nothing that
//! was flushed is lost.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::command::{Background, is_slow, run, shell, wait_until};
use crate::support::pool::{TestPool, Transport};

const LONG: Duration = Duration::from_secs(60);

/// A pool with a mounted file system and a device that takes all the space that is left.
struct Full {
    pool: TestPool,
    device: String,
    point: std::path::PathBuf,
    ballast: String,
}

fn fill(on_full: &str) -> Full {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done(&format!("volume create files --size 512M --sector-size 4096 --on-full {on_full}"));
    pool.done("volume create ballast --size 4G --sector-size 4096");
    let device = pool.attach("files");
    run("mkfs.ext4", ["-q", &device]).expect();
    let point = pool.mount("files");
    write(&point.join("kept"), 8).expect();
    let ballast = pool.attach("ballast");
    let filled = run("dd", ["if=/dev/urandom", &format!("of={ballast}"), "bs=1M", "oflag=direct"]);
    assert!(filled.stderr.contains("No space left"), "{}", filled.stderr);
    Full { pool, device, point, ballast }
}

fn write(file: &Path, mebibytes: u64) -> crate::support::command::Outcome {
    let (of, count) = (format!("of={}", file.display()), format!("count={mebibytes}"));
    run("dd", ["if=/dev/urandom".to_owned(), of, "bs=1M".into(), count, "conv=fsync".into()])
}

fn digest(file: &Path) -> String {
    // Past the page cache.
    shell(&format!("dd if='{}' iflag=direct bs=1M 2>/dev/null | sha256sum", file.display())).expect()
}

impl Full {
    fn end(self, clean: bool) {
        self.pool.unmount(&self.point);
        let device = &self.device;
        if !clean {
            // The journal first, as a mount would.
            shell(&format!("e2fsck -p {device} || [ $? -eq 1 ]")).expect();
        }
        run("e2fsck", ["-f", "-n", device]).expect();
        self.pool.done("detach --all");
        self.pool.stop();
        self.pool.check();
    }
}

pub fn writes_wait_for_space() {
    let full = fill("wait");
    let Full { pool, point, ballast, .. } = &full;
    let kept = digest(&point.join("kept"));
    let line = format!("dd if=/dev/urandom of='{}' bs=1M count=40 conv=fsync", point.join("late").display());
    let mut writer = Background::start("sh", ["-c", &line]);
    // Seconds, in which nothing fails and nobody else is held up.
    std::thread::sleep(Duration::from_secs(if is_slow() { 10 } else { 4 }));
    assert!(writer.is_running(), "it waits for space");
    assert_eq!(digest(&point.join("kept")), kept);
    let overwrite = [format!("of={ballast}"), "if=/dev/zero".into(), "bs=64k".into(), "count=16".into()];
    run("dd", overwrite.into_iter().chain(["oflag=direct".into(), "conv=notrunc".into()])).expect();
    pool.done("snapshot create files while-full");
    // An engine that dies meanwhile is succeeded by one that goes on waiting.
    pool.kill_engine();
    assert!(writer.is_running(), "it waits for space");
    run("blkdiscard", ["-o", "0", "-l", "209715200", ballast]).expect();
    wait_until("the writer ends", LONG, || !writer.is_running());
    writer.finish().expect();
    assert_eq!(fs::metadata(point.join("late")).expect("the file").len(), 40 << 20);
    full.end(true);
}

pub fn writes_fail_and_nothing_is_lost() {
    let full = fill("error");
    let Full { pool, point, device, ballast } = &full;
    let kept = digest(&point.join("kept"));
    assert!(!write(&point.join("late"), 40).succeeded(), "there was space");
    assert_eq!(digest(&point.join("kept")), kept, "reads go on");
    pool.unmount(point);
    run("blkdiscard", ["-o", "0", "-l", "209715200", ballast]).expect();
    shell(&format!("e2fsck -p {device} || [ $? -eq 1 ]")).expect();
    run("e2fsck", ["-f", "-n", device]).expect();
    let again = pool.mount("files");
    assert_eq!(digest(&again.join("kept")), kept, "what was flushed is there");
    write(&again.join("later"), 40).expect();
    let full = Full { point: again, ..full };
    full.end(false);
}

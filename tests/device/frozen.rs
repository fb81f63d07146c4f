//! Commands that are killed while they hold a file system still.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::command::{Background, binary, run, wait_until};
use crate::support::pool::{TestPool, Transport};

/// `FIFREEZE` as it stands in `/proc/PID/syscall`.
const FREEZING: &str = "0xc0045877";
/// How long each ioctl takes that a command has under `strace`, in microseconds: time to find and kill it.
const DELAY: &str = "inject=ioctl:delay_exit=4000000";

/// Starts a program that writes a file there.
fn writer(point: &Path) -> Background {
    Background::start("sh", ["-c".to_owned(), format!("echo x >'{}'", point.join("probe").display())])
}

/// Kills a command by `signal` in the moment after the file system has been frozen: writers go on all the same, soon.
fn goes_on_after(pool: &TestPool, point: &Path, words: &[&str], signal: Signal) {
    println!("{words:?}, {signal:?}");
    let (trace, file) = (pool.folder().join("trace"), pool.file().to_string_lossy().into_owned());
    // -D: the process started is the command itself.
    let mut arguments: Vec<String> = ["-D", "-qq", "-e", "trace=ioctl", "-e", DELAY, "-o"].map(str::to_owned).into();
    arguments.extend([trace.to_string_lossy().into_owned(), binary().to_string_lossy().into_owned()]);
    arguments.extend(["--pool".to_owned(), file].into_iter().chain(words.iter().map(|word| (*word).to_owned())));
    let mut command = Background::start("strace", arguments);
    wait_until("freezing", Duration::from_secs(60), || {
        assert!(command.is_running(), "it ended before it froze anything");
        fs::read_to_string(format!("/proc/{}/syscall", command.id())).is_ok_and(|at| at.contains(FREEZING))
    });
    // It has begun to.
    thread::sleep(Duration::from_millis(500));
    let mut blocked = writer(point);
    thread::sleep(Duration::from_secs(1));
    let (was_frozen, was_running) = (blocked.is_running(), command.is_running());
    kill_process(Pid::from_raw(command.id() as i32).expect("a process id"), signal).expect("it lives");
    let began = Instant::now();
    while blocked.is_running() && began.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(20));
    }
    let went_on = !blocked.is_running();
    // Or nothing of this test could ever be unmounted.
    let _ = run("fsfreeze", ["-u".as_ref(), point.as_os_str()]);
    assert!(was_frozen && was_running, "nobody was killed while the file system was frozen");
    assert!(went_on, "it stayed frozen");
    blocked.finish().expect();
    assert!(!command.finish().succeeded());
}

pub fn goes_on_when_who_froze_it_dies() {
    let pool = TestPool::create("2G", Transport::Auto);
    pool.done("volume create data --size 256M");
    run("mkfs.ext4", ["-q", &pool.attach("data")]).expect();
    let point = pool.mount("data");
    for (number, signal) in [Signal::KILL, Signal::INT].into_iter().enumerate() {
        let name = format!("at-{number}");
        goes_on_after(&pool, &point, &["snapshot", "create", "data", &name, "--freeze"], signal);
    }
    // And those that nobody kills leave nothing behind, and nothing frozen.
    pool.done("snapshot create data whole --freeze");
    writer(&point).finish().expect();
    pool.unmount(&point);
    pool.stop();
    pool.check();
}

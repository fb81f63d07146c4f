//! Deaths that are not the engine's alone: of the front, and of an engine whose front cannot start another at once.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::fio::Verify;
use crate::support::command::{binary, prepare, run, run_command, wait_until};
use crate::support::mounted::device_at;
use crate::support::pool::{TestPool, Transport, children, is_alive};
use crate::workload::StopOnDrop;

/// Longest that I/O may stand still under an upgrade, on a machine that is busy with other things as well.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(60);

/// The front takes its devices with it. What was acknowledged is in the pool, flushed or not, and `attach --all` brings
/// the rest back.
pub fn front_killed() {
    let pool = TestPool::create("10G", Transport::Auto);
    for name in ["files", "raw"] {
        pool.done(&format!("volume create {name} --size 256M --sector-size 4096"));
    }
    let raw = pool.attach("raw");
    run("mkfs.ext4", ["-q", &pool.attach("files")]).expect();
    let point = pool.mount("files");
    let dead_device = device_at(&point).expect("mounted");
    fs::write(point.join("kept"), "kept").expect("a file");
    run("sync", ["-f", point.to_str().expect("a path")]).expect();
    write_directly(&raw, 0x5a);

    let (front, engine) = (pool.process("front_pid").expect("a front"), pool.process("engine_pid").expect("an engine"));
    run("kill", ["-9".to_owned(), front.to_string()]).expect();
    wait_until("the end of the engine", LONG, || !is_alive(engine));

    pool.done("attach --all");
    assert_ne!(pool.process("front_pid"), Some(front));
    let device = pool.volume("raw")["device"].as_str().expect("it was attached").to_owned();
    let block = fs::File::open(&device).and_then(|file| {
        let mut block = [0; 4096];
        file.read_exact_at(&mut block, 8192).map(|()| block)
    });
    assert_eq!(block.expect("reading it back"), [0x5a; 4096], "an acknowledged write is lost");

    // The dead front's device stays as long as somebody has it mounted, and is taken away then.
    run("umount", [&point]).expect();
    let point = pool.mount("files");
    assert_ne!(device_at(&point), Some(dead_device.clone()));
    assert_eq!(fs::read_to_string(point.join("kept")).expect("the file"), "kept");
    pool.unmount(&point);
    pool.done("detach --all");
    let backing = PathBuf::from(format!("/sys/block/{}/loop", dead_device.trim_start_matches("/dev/")));
    assert!(!backing.exists(), "the dead front's device is still there");
    pool.stop();
    pool.check();
}

/// Without a flush, as a program with O_DIRECT does.
fn write_directly(device: &str, byte: u8) {
    let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device");
    let bytes = vec![byte; 3 * 4096];
    let start = bytes.as_ptr().align_offset(4096);
    file.write_all_at(&bytes[start..start + 4096], 8192).expect("a write of one block");
}

/// The program on disk is replaced, and the engine by what stands there then, under load. A program that cannot succeed it
/// is found out before anything has happened.
pub fn upgraded_under_load() {
    let mut pool = TestPool::create("4G", Transport::Auto);
    let program = pool.folder().join("plywood");
    install(&program, b"");
    pool.use_program(&program);
    pool.done("volume create raw --size 512M --sector-size 4096");
    let raw = pool.attach("raw");
    pool.done("volume create files --size 256M --sector-size 4096");
    run("mkfs.ext4", ["-q", &pool.attach("files")]).expect();
    let point = pool.mount("files");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ending = StopOnDrop(&stop);
        let verifier = scope.spawn(|| Verify { file: &raw, size_mib: 32, rate_iops: 4000 }.until(&stop));
        upgrade_and_refuse(&pool, &program, &point);
        drop(ending);
        verifier.join().expect("fio found what it wrote");
    });
    pool.unmount(&point);
    pool.done("detach --all");
    pool.stop();
    pool.check();
}

fn upgrade_and_refuse(pool: &TestPool, program: &Path, point: &Path) {
    for build in 1..=3 {
        std::thread::sleep(Duration::from_millis(500));
        let old = pool.process("engine_pid");
        install(program, format!("build {build}").as_bytes());
        let (without, ()) = longest_pause(point, || std::thread::sleep(Duration::from_millis(300)));
        let (pause, told) = longest_pause(point, || pool.done("upgrade"));
        assert!(told.contains("stays the former program while volumes are attached"), "{told}");
        let (pause_ms, without_ms) = (pause.as_millis(), without.as_millis());
        println!("{told}: the longest write and fsync beside it took {pause_ms} ms, {without_ms} ms without");
        assert!(pause < LONGEST_PAUSE, "I/O stood still for {pause:?}");
        let new = pool.process("engine_pid").expect("a successor");
        assert_ne!(Some(new), old);
        let (running, there) = (fs::metadata(format!("/proc/{new}/exe")), fs::metadata(program));
        let inodes = (running.expect("it runs").ino(), there.expect("it is there").ino());
        assert_eq!(inodes.0, inodes.1, "the successor is another program");
    }
    let serving = pool.process("engine_pid");
    let good = fs::read(program).expect("the program");
    for (text, named) in [("#!/bin/sh\nexit 78\n", "does not read"), ("#!/bin/sh\nexit 3\n", "cannot serve")] {
        replace(program, text.as_bytes());
        let asked = run_command({
            let mut command = prepare(&binary().to_string_lossy(), ["upgrade"]);
            command.env("PLYWOOD_POOL", pool.file());
            command
        });
        asked.expect_refusal(&[named]);
    }
    replace(program, &good);
    assert_eq!(pool.process("engine_pid"), serving, "a refused upgrade changes nothing");
}

/// Longest time that a write and fsync of a file takes while `work` is done.
fn longest_pause<T>(point: &Path, work: impl FnOnce() -> T) -> (Duration, T) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let file = fs::File::create(point.join("written")).expect("a file");
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                file.write_all_at(&[1; 4096], 0).and_then(|()| file.sync_all()).expect("a write");
                longest = longest.max(began.elapsed());
            }
            longest
        });
        let ending = StopOnDrop(&stop);
        std::thread::sleep(Duration::from_millis(50));
        let done = work();
        std::thread::sleep(Duration::from_millis(200));
        drop(ending);
        (writer.join().expect("no write fails"), done)
    })
}

/// Where nothing is attached, `upgrade` replaces the front as well: the same process, the program on disk. Commands wait
/// meanwhile, none fails, and nobody gets between.
pub fn front_replaced() {
    let mut pool = TestPool::create("1G", Transport::Auto);
    let program = pool.folder().join("plywood");
    install(&program, b"");
    pool.use_program(&program);
    pool.done("volume create raw --size 64M --sector-size 4096");
    let raw = pool.attach("raw");
    write_directly(&raw, 0x5a);
    let front = pool.process("front_pid").expect("a front");
    let runs = |process: u32| {
        let inode = |path: &Path| fs::metadata(path).expect("a program").ino();
        inode(Path::new(&format!("/proc/{process}/exe"))) == inode(&program)
    };
    install(&program, b"first");
    let told = pool.done("upgrade");
    assert!(told.contains(&format!("process {front}, stays")) && !runs(front), "{told}");
    pool.done("detach raw");
    for build in ["second", "third"] {
        install(&program, build.as_bytes());
        let (stop, asked) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let ending = StopOnDrop(&stop);
            scope.spawn(|| {
                loop {
                    pool.done("volume list");
                    asked.fetch_add(1, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let told = pool.done("upgrade");
            assert!(!told.contains("stays"), "{told}");
            drop(ending);
        });
        assert!(asked.load(Ordering::Relaxed) > 0);
        assert_eq!(pool.process("front_pid"), Some(front), "it is the same process");
        let engine = pool.process("engine_pid").expect("an engine");
        assert!(runs(front) && runs(engine), "the front is still the former program");
    }
    let block = fs::File::open(pool.attach("raw")).and_then(|file| {
        let mut block = [0; 4096];
        file.read_exact_at(&mut block, 8192).map(|()| block)
    });
    assert_eq!(block.expect("reading it back"), [0x5a; 4096]);
    pool.done("detach raw");
    pool.stop();
    pool.check();
}

/// A build of its own: the same program, and something behind its end. The first, from which is upgraded, may be really
/// another one: `PLYWOOD_OLD_BINARY` names it (`tools/test-upgrade`).
fn install(program: &Path, mark: &[u8]) {
    let old = std::env::var_os("PLYWOOD_OLD_BINARY").map(PathBuf::from).filter(|_| mark.is_empty());
    let mut bytes = fs::read(old.unwrap_or_else(binary)).expect("the program under test");
    bytes.extend(mark);
    replace(program, &bytes);
}

/// As a package manager does: the old file lives on for those that run it.
fn replace(program: &Path, bytes: &[u8]) {
    let new = program.with_extension("new");
    fs::write(&new, bytes).expect("a program");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("its mode");
    fs::rename(&new, program).expect("replacing the program");
}

/// Between an engine's death and its successor's start the pool belongs to the front: nobody else opens it.
pub fn nobody_slips_in() {
    let pool = TestPool::create("4G", Transport::Auto);
    pool.done("volume create raw --size 64M");
    let raw = pool.attach("raw");
    let info = pool.info();
    let (front, engine) = (info["front_pid"].as_u64().expect("a pid"), info["engine_pid"].as_u64().expect("a pid"));
    let uuid = info["uuid"].as_str().expect("a uuid").to_owned();
    let frozen = Frozen::freeze(front, &uuid);
    run("kill", ["-9".to_owned(), engine.to_string()]).expect();
    std::thread::scope(|scope| {
        for line in ["volume create other --size 1M", "pool check"] {
            scope.spawn(|| pool.refused(line, &["in use"]));
        }
    });
    drop(frozen);
    write_directly(&raw, 0x33);
    assert_eq!(pool.names(), ["raw"]);
    assert_eq!(pool.info()["engine_restarts"], 1);
    pool.done("detach raw");
    pool.stop();
    pool.check();
}

/// A front that is stopped, and whose control socket cannot be found: who comes now tries the file itself.
struct Frozen {
    front: u64,
    socket: PathBuf,
    hidden: PathBuf,
}

impl Frozen {
    fn freeze(front: u64, uuid: &str) -> Self {
        let socket = PathBuf::from(format!("/run/plywood/{uuid}.sock"));
        let hidden = socket.with_extension("hidden");
        fs::rename(&socket, &hidden).expect("a control socket");
        run("kill", ["-STOP".to_owned(), front.to_string()]).expect();
        Self { front, socket, hidden }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::rename(&self.hidden, &self.socket);
        let _ = std::process::Command::new("kill").args(["-CONT", &self.front.to_string()]).status();
    }
}

/// A loop helper outlives the engine that it works for: what it attaches afterwards, the successor knows, and nobody attaches
/// the volume a second time.
pub fn helpers_of_the_dead_are_waited_for() {
    let pool = TestPool::create("1G", Transport::Auto);
    for name in ["raw", "late"] {
        pool.done(&format!("volume create {name} --size 64M"));
    }
    pool.attach("raw");
    let [front, engine] = ["front_pid", "engine_pid"].map(|key| pool.process(key).expect("a process"));
    // Those that are kept for the next command; one may still be at work.
    std::thread::sleep(Duration::from_secs(1));
    let helpers = children(engine, "loop-helper");
    assert!(!helpers.is_empty(), "no helper is kept");
    let to_helpers =
        |signal: &str| helpers.iter().map(u32::to_string).for_each(|id| drop(run("kill", [signal, id.as_str()])));
    to_helpers("-STOP");
    std::thread::scope(|scope| {
        let attaching = scope.spawn(|| pool.attach("late"));
        std::thread::sleep(Duration::from_secs(1));
        assert!(!attaching.is_finished(), "it was attached by nobody");
        run("kill", ["-9".to_owned(), engine.to_string()]).expect();
        wait_until("a successor", Duration::from_secs(60), || {
            children(front, "engine").into_iter().any(|id| id != engine)
        });
        std::thread::sleep(Duration::from_secs(2));
        to_helpers("-CONT");
        let device = attaching.join().expect("it is attached");
        wait_until("the helpers' end", Duration::from_secs(60), || !helpers.iter().any(|id| is_alive(*id)));
        let devices = run("losetup", ["--list", "--noheadings", "--output", "NAME,BACK-FILE"]).expect();
        let uuid = pool.info()["uuid"].as_str().expect("a uuid").to_owned();
        let of_pool: Vec<&str> = devices.lines().filter(|line| line.contains(&uuid)).collect();
        assert_eq!(of_pool.len(), 2, "{of_pool:?}");
        assert!(of_pool.iter().any(|line| line.starts_with(&device)), "{of_pool:?}");
    });
    pool.done("detach --all");
    pool.stop();
    pool.check();
}

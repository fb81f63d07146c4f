//! The front allocates nothing once it serves, and the engine nothing for a request: counted beneath the real program, by a
//! library that is preloaded into it. And neither waits for anything but its ring: seen by strace.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::fio::Verify;
use crate::support::command::{binary, is_slow, run, wait_until};
use crate::support::pool::{TestPool, Transport, is_alive};

const KILLS: usize = 6;

/// What was allocated so far, by threads that serve and by others; bytes that are allocated now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    serving: i64,
    others: i64,
    live_bytes: i64,
}

/// A daemon with the library beneath it.
struct Counted {
    daemon: Child,
    counters: File,
}

impl Counted {
    fn start(pool: &TestPool, transport: Transport) -> Self {
        let (library, path) = (build(pool.folder()), pool.folder().join("counters"));
        let counters = File::options().create_new(true).read(true).write(true).open(&path).expect("a file");
        counters.set_len(4096).expect("its size");
        let daemon = Command::new(binary())
            .args(["serve", "--transport", transport.name()])
            .env("PLYWOOD_POOL", pool.file())
            .env("LD_PRELOAD", library)
            .env("COUNT_ALLOCATIONS", path)
            .stdin(Stdio::null())
            .stderr(File::create(pool.folder().join("log")).expect("a log"))
            .spawn()
            .expect("a daemon");
        wait_until("the daemon serves", Duration::from_secs(60), || pool.process("front_pid") == Some(daemon.id()));
        Self { daemon, counters }
    }

    /// When nothing is told any more: an engine's first answer does not wait for what is logged of its start.
    fn settled(&self) -> Counters {
        let mut last = self.now();
        wait_until("nothing is counted any more", Duration::from_secs(60), || {
            std::thread::sleep(Duration::from_millis(150));
            let now = self.now();
            std::mem::replace(&mut last, now) == now
        });
        last
    }

    fn now(&self) -> Counters {
        let number = |index: u64| {
            let mut bytes = [0; 8];
            self.counters.read_exact_at(&mut bytes, index * 8).expect("the counters");
            i64::from_ne_bytes(bytes)
        };
        Counters { serving: number(0), others: number(1), live_bytes: number(2) }
    }

    /// What threads that do requests have allocated in engines so far.
    fn of_engines(&self) -> i64 {
        let mut bytes = [0; 8];
        self.counters.read_exact_at(&mut bytes, 24).expect("the counters");
        i64::from_ne_bytes(bytes)
    }
}

fn build(folder: &Path) -> PathBuf {
    let library = folder.join("count_allocations.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/device/count_allocations.c");
    run("cc", ["-O1", "-shared", "-fPIC", "-o", &library.to_string_lossy(), &source.to_string_lossy()]).expect();
    library
}

/// Serving takes no memory at all, whatever comes: devices, mounts, I/O. Starting an engine anew takes some, and gives it
/// back.
pub fn front_allocates_nothing(transport: Transport) {
    let pool = TestPool::create("4G", transport);
    for name in ["raw", "files"] {
        pool.done(&format!("volume create {name} --size 256M --sector-size 4096"));
    }
    let mut counted = Counted::start(&pool, transport);
    let start = counted.settled();
    assert!(start.others > 100 && start.live_bytes > 0, "nothing was counted: {start:?}");

    let raw = pool.attach("raw");
    run("mkfs.ext4", ["-q", &pool.attach("files")]).expect();
    let point = pool.mount("files");
    let io = || {
        let size_mib = if is_slow() { 16 } else { 64 };
        Verify { file: &raw, size_mib, rate_iops: 6000 }.start().finish().expect();
        fs::write(point.join("file"), vec![7; 8 << 20]).expect("a file");
        run("sync", ["-f", point.to_str().expect("a path")]).expect();
    };
    io();
    pool.done("snapshot create files before");
    assert_eq!(counted.now(), start, "the front has allocated");

    // What logging keeps for the next time is there after the first.
    let mut live = Vec::new();
    for _ in 0..KILLS {
        pool.kill_engine();
        live.push(counted.settled().live_bytes);
    }
    let begun = counted.settled();
    println!("{transport:?}: {} allocations for {KILLS} engines, live bytes {live:?}", begun.others - start.others);
    assert_eq!(begun.serving, start.serving, "a thread that serves has allocated");
    assert!(live[1..].iter().all(|bytes| *bytes == live[1]), "each engine leaves something behind: {live:?}");
    io();
    assert_eq!(counted.now(), begun, "the front has allocated after deaths");

    pool.unmount(&point);
    pool.done("detach --all");
    pool.done("stop");
    let status = counted.daemon.wait().expect("the daemon's end");
    assert!(status.success() && !is_alive(counted.daemon.id()), "{status}");
    pool.check();
}

/// A job of 4 KiB requests, 32 at a time, over the whole of a volume of 64 MiB.
fn job(device: &str, rw: &str, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=job", "--ioengine=libaio", "--iodepth=32", "--direct=1", "--bs=4k", "--size=64M"]);
    command
        .args(["--randrepeat=0", &format!("--filename={device}"), &format!("--rw={rw}")])
        .args(more)
        .stdout(Stdio::null());
    command
}

/// Reads, writes to blocks of the volume's own and flushes take no memory in the engine: what it allocates meanwhile is what
/// it does each second, and for commands, in whatever number requests come.
pub fn engine_allocates_nothing_for_requests() {
    const SIZE_MIB: u64 = 64;
    let pool = TestPool::create("4G", Transport::Uring);
    pool.done("volume create raw --size 64M --sector-size 4096");
    let mut counted = Counted::start(&pool, Transport::Uring);
    let raw = pool.attach("raw");
    let fio = |rw: &str, more: &[&str]| assert!(job(&raw, rw, more).status().expect("fio").success());
    // Provisioned, and every queue as long as it gets.
    fio("write", &["--end_fsync=1"]);
    fio("randrw", &[]);
    pool.done("pool check");
    for (rw, more, requests) in [
        ("randread", &["--loops=4"][..], 4 * SIZE_MIB as i64 * 256),
        ("randwrite", &["--loops=4"][..], 4 * SIZE_MIB as i64 * 256),
        ("randwrite", &["--fdatasync=4", "--io_size=48M"][..], 5 * 48 * 64),
    ] {
        let before = counted.of_engines();
        fio(rw, more);
        let allocated = counted.of_engines() - before;
        println!("{rw}: {allocated} allocations beside {requests} requests");
        assert!(allocated < 400, "{rw}: {allocated} allocations for {requests} requests");
    }
    pool.done("detach --all");
    pool.done("stop");
    let status = counted.daemon.wait().expect("the daemon's end");
    assert!(status.success(), "{status}");
    pool.check();
}

/// While requests come, the threads that serve them enter their ring, where they sleep, and ring the other side's eventfd. No
/// lock is waited for (futex), nothing is read or written by a call that waits; what an engine does each second (how full the
/// host is) is counted and bounded.
pub fn queue_threads_wait_for_their_ring_only() {
    const SECONDS: u64 = 3;
    let pool = TestPool::create("4G", Transport::Uring);
    pool.done("volume create raw --size 64M --sector-size 4096");
    let raw = pool.attach("raw");
    assert!(job(&raw, "write", &["--end_fsync=1"]).status().expect("fio").success());
    let process = |key| pool.process(key).expect("a process");
    let (front, engine) = (process("front_pid"), process("engine_pid"));
    let rings = fs::read_dir(format!("/proc/{front}/task")).expect("its threads").filter_map(|thread| {
        let thread = thread.expect("a thread").path();
        let name = fs::read_to_string(thread.join("comm")).expect("its name");
        name.starts_with("front-ring").then(|| thread.file_name().expect("a number").to_string_lossy().into_owned())
    });
    let threads: Vec<String> = rings.chain([engine.to_string()]).collect();
    assert!(threads.len() > 1, "no thread is called front-ring");

    let mut load = job(&raw, "randrw", &["--time_based", &format!("--runtime={}", SECONDS + 2), "--fdatasync=16"])
        .spawn()
        .expect("fio");
    std::thread::sleep(Duration::from_secs(1));
    let trace = pool.folder().join("trace");
    // Ends by timeout's signal, and lets its threads go.
    let limit = ["--signal=INT", &SECONDS.to_string(), "strace", "-f", "-y", "-qq"].map(str::to_owned);
    let of = [front, engine].into_iter().flat_map(|process| ["-p".to_owned(), process.to_string()]);
    run("timeout", limit.into_iter().chain(["-o".to_owned(), trace.to_string_lossy().into_owned()]).chain(of));
    assert!(load.wait().expect("fio").success());

    let text = fs::read_to_string(&trace).expect("what strace wrote");
    let mut calls: BTreeMap<&str, u64> = BTreeMap::new();
    for line in text.lines() {
        let Some((thread, call)) = line.split_once(char::is_whitespace) else { continue };
        let Some((name, arguments)) = call.trim_start().split_once('(') else { continue };
        // Which never waits: the other side reads it.
        let name = if name == "write" && arguments.contains("<anon_inode:[eventfd]>") { "eventfd_write" } else { name };
        if threads.iter().any(|of| of == thread) && name.chars().all(|sign| sign.is_ascii_alphanumeric() || sign == '_')
        {
            *calls.entry(name).or_default() += 1;
        }
    }
    println!("system calls of {} threads: {calls:?}", threads.len());
    let entered = calls.remove("io_uring_enter").unwrap_or(0);
    assert!(entered > 100, "{entered} entries of a ring were seen");
    calls.remove("eventfd_write");
    for each_second in ["fstat", "fstatfs", "statfs"] {
        let count = calls.remove(each_second).unwrap_or(0);
        assert!(count <= 2 * (SECONDS + 2), "{count} calls of {each_second}");
    }
    assert!(calls.is_empty(), "a thread that serves requests made other calls: {calls:?}");

    pool.done("detach --all");
    pool.done("stop");
    pool.check();
}

//! Memory that is short: whoever dirties more than there is waits for our device, and our device for nobody.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::command::{is_slow, run, shell};
use crate::support::kernel_log::KernelLog;
use crate::support::pool::{TestPool, Transport};

/// Bits of a task's flags, of `include/linux/sched.h`.
const PF_MEMALLOC_NOIO: u64 = 0x0008_0000;
const PF_LOCAL_THROTTLE: u64 = 0x0010_0000;
/// The number of CAP_SYS_RESOURCE, without which nobody may become an I/O flusher.
const CAP_SYS_RESOURCE: u32 = 24;
const LIMIT_MIB: u64 = 48;

/// A memory cgroup of its own, in either of the kernel's hierarchies. Removed when it is dropped.
struct SmallMemory {
    folder: PathBuf,
}

impl SmallMemory {
    fn new() -> Self {
        let (root, limit) = if Path::new("/sys/fs/cgroup/memory").is_dir() {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
            ("/sys/fs/cgroup", "memory.max")
        };
        let folder = Path::new(root).join(format!("plywood-test-{}", std::process::id()));
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let memory = Self { folder };
        let bytes = LIMIT_MIB << 20;
        fs::write(memory.folder.join(limit), bytes.to_string()).expect("a limit of memory");
        memory
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

/// The kernel tells of tasks that hang this long, until it is dropped.
struct HungTasks {
    before: Option<String>,
}

impl HungTasks {
    const FILE: &'static str = "/proc/sys/kernel/hung_task_timeout_secs";

    fn watch(seconds: u32) -> Self {
        let before = fs::read_to_string(Self::FILE).ok();
        let before = before.filter(|_| fs::write(Self::FILE, seconds.to_string()).is_ok());
        Self { before }
    }
}

impl Drop for HungTasks {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(Self::FILE, before);
        }
    }
}

/// On ext4 on our device a writer dirties eight times the memory that it may have.
pub fn writer_in_small_memory_hangs_nobody() {
    let count = if is_slow() { 2 * LIMIT_MIB } else { 8 * LIMIT_MIB };
    let pool = TestPool::create("2G", Transport::Auto);
    pool.done("volume create files --size 1G --sector-size 4096");
    let device = pool.attach("files");
    run("mkfs.ext4", ["-q", &device]).expect();
    let point = pool.mount("files");
    let memory = SmallMemory::new();
    let (log, hung) = (KernelLog::from_now(), HungTasks::watch(20));
    let file = point.join("large");
    let enter = format!("echo $$ > '{}/cgroup.procs'", memory.folder.display());
    shell(&format!("{enter} && exec dd if=/dev/urandom of='{}' bs=1M count={count} conv=fsync", file.display()))
        .expect();
    // Reading it back goes through the same small memory, with the rest of it dirty.
    shell(&format!(
        "{enter}; dd if=/dev/zero of='{0}.2' bs=1M count={count} 2>/dev/null & {enter}; cat '{0}' > /dev/null; wait",
        file.display()
    ))
    .expect();
    drop(hung);
    log.assert_no_io_error(&device);
    log.assert_nobody_hung();
    pool.unmount(&point);
    run("e2fsck", ["-f", "-n", &device]).expect();
    pool.done("detach files");
    pool.stop();
    pool.check();
}

/// Every thread of front and engine, the kernel's workers for them among them, is marked as one that I/O depends on, and
/// their memory is locked.
pub fn threads_wait_for_no_writeback_and_stay_in_memory() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create raw --size 256M --sector-size 4096");
    let device = pool.attach("raw");
    // What the ring hands to the kernel's workers: space is allocated, data is flushed.
    run("dd", ["if=/dev/urandom", &format!("of={device}"), "bs=1M", "count=64", "oflag=direct", "conv=fsync"]).expect();
    let may_be_marked = has_capability(CAP_SYS_RESOURCE);
    let mut workers = 0;
    for key in ["front_pid", "engine_pid"] {
        let process = pool.process(key).expect("a process");
        let status = fs::read_to_string(format!("/proc/{process}/status")).expect("its status");
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("a line").trim().to_owned();
        assert!(!locked.starts_with("0 "), "{key}: nothing is locked");
        let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
        for task in tasks.map(|task| task.expect("a thread").path()) {
            let Ok(line) = fs::read_to_string(task.join("stat")) else { continue };
            let (name, rest) = line.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).expect("a name");
            // Behind the name: state, four ids, the terminal's process group, flags.
            let flags: u64 = rest.split_whitespace().nth(6).and_then(|word| word.parse().ok()).expect("flags");
            workers += u32::from(name.starts_with("iou-wrk"));
            let is_marked = flags & PF_MEMALLOC_NOIO != 0 && flags & PF_LOCAL_THROTTLE != 0;
            assert_eq!(is_marked, may_be_marked, "{key}, thread {name}: flags {flags:#x}");
        }
    }
    assert!(workers > 0, "no worker of the kernel was seen");
    pool.done("detach raw");
    pool.stop();
}

fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("our own status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("a line").trim().to_owned();
    u64::from_str_radix(&effective, 16).expect("hexadecimal") >> number & 1 == 1
}

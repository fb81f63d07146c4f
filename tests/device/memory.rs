//! A daemon keeps to the memory it was given, and does its work with it.

use std::fs;
use std::time::Duration;

use crate::support::command::{is_slow, run, wait_until};
use crate::support::kernel_log::KernelLog;
use crate::support::pool::{TestPool, Transport};

/// What both processes may have beside their budget: programs, tables, the pool's counts.
const BESIDE_BUDGET_BYTES: u64 = 40 << 20;

/// With the least of budgets: random writes to more leaves than it holds nodes are verified, and both processes together
/// stay small.
pub fn daemon_keeps_to_its_budget(transport: Transport) {
    let log = KernelLog::from_now();
    let pool = TestPool::create("20G", transport);
    pool.done("volume create a --size 16G");
    pool.refused("serve --memory 1M", &["--memory", "8 MiB"]);
    let mut serve = pool.prepare(["serve", "--background", "--memory", "8M"]);
    let mut daemon = serve.stdout(std::process::Stdio::null()).spawn().expect("the daemon");
    wait_until("the daemon serves", Duration::from_secs(60), || pool.process("engine_pid").is_some());
    let device = pool.attach("a");
    // 16384 leaves, sixteen times the nodes that the budget holds.
    let writes = if is_slow() { 500 } else { 20_000 };
    run(
        "fio",
        [
            "--name=verify",
            "--ioengine=libaio",
            "--iodepth=32",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k",
            "--size=16G",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            &format!("--number_ios={writes}"),
            &format!("--filename={device}"),
        ],
    )
    .expect();
    let read = pool.done("metrics");
    let read = read.lines().find_map(|line| line.strip_prefix("plywood_nodes_read_total{")?.rsplit_once(' '));
    assert!(read.is_some_and(|(_, count)| count != "0"), "nodes were dropped and read again: {read:?}");
    let resident = resident_bytes(&pool);
    assert!(resident < (8 << 20) + BESIDE_BUDGET_BYTES, "front and engine have {resident} bytes");
    pool.done("detach a");
    pool.stop();
    drop(daemon.wait());
    pool.check();
    log.assert_no_io_error(&device);
}

/// What both processes have, each shared page in parts.
fn resident_bytes(pool: &TestPool) -> u64 {
    ["front_pid", "engine_pid"]
        .into_iter()
        .map(|key| {
            let process = pool.process(key).expect("a process");
            let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("smaps_rollup");
            let line = text.lines().find(|line| line.starts_with("Pss:")).expect("a line");
            line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") << 10
        })
        .sum()
}

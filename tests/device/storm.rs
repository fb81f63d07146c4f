//! The engine process is killed (-9) at random moments, and its successor while it takes over, under fio with verification
//! and unsynced work on files, while snapshots and clones come and go, are sealed, attached and detached.
//!
//! `PLYWOOD_STORM_KILLS` says how many kills (30), `PLYWOOD_STORM_SEED` repeats the moments of a run, as far as a machine
//! can. `tools/kill-storm` runs it as long as one likes. Half of the moments are random, the others are those that were met
//! least so far; what engines were at when they died is told by the front, and printed as a table.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use plywood::engine::Work;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::fio::Verify;
use crate::moments::{Deaths, Moments, Table};
use crate::story::FileSystem;
use crate::support::command::{is_slow, run, wait_until};
use crate::support::kernel_log::KernelLog;
use crate::support::pool::{TestPool, Transport, children};
use crate::workload::{StopOnDrop, compare, work};

const KILLS: u64 = 30;
/// So many must meet every kind of work.
const KILLS_FOR_ALL: u64 = 500;
/// Successors killed one after the other before one is left to serve: a front gives up at five.
const SUCCESSORS_KILLED_MAX: u32 = 3;
/// Snapshots of each volume that are kept at a time.
const KEPT: usize = 3;
/// Longest that anybody may wait for an engine to serve again, on a machine that is busy with other things as well.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// The same for a command, while engines die under it.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the storm met.
#[derive(Debug, Default)]
struct Met {
    snapshots: AtomicU64,
    deletions: AtomicU64,
    verified_rounds: AtomicU64,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

pub fn kills_at_random_moments() {
    let log = KernelLog::from_now();
    let kills = number("PLYWOOD_STORM_KILLS").unwrap_or(if is_slow() { 5 } else { KILLS });
    let seed = number("PLYWOOD_STORM_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("{kills} kills, PLYWOOD_STORM_SEED={seed}");
    let pool = TestPool::create("20G", Transport::Auto);
    pool.done("volume create raw --size 512M --sector-size 4096");
    let raw = pool.attach("raw");
    let mut devices = vec![raw.clone()];
    let points: Vec<PathBuf> = ["one", "two"]
        .map(|name| {
            pool.done(&format!("volume create {name} --size 2G --sector-size 4096"));
            let device = pool.attach(name);
            run("mkfs.ext4", ["-q", &device]).expect();
            devices.push(device);
            pool.mount(name)
        })
        .to_vec();
    let front = pool.process("front_pid").expect("a front");

    let (stop, met) = (AtomicBool::new(false), Met::default());
    let began = Instant::now();
    let files = std::thread::scope(|scope| {
        let ending = StopOnDrop(&stop);
        let (stop, pool, raw) = (&stop, &pool, &raw);
        let (snapshots, deletions) = (&met.snapshots, &met.deletions);
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let folder = points[worker % points.len()].join(format!("worker-{worker}"));
                scope.spawn(move || work(&folder, seed.wrapping_add(worker as u64), stop))
            })
            .collect();
        let (size_mib, rate_iops) = if is_slow() { (16, 400) } else { (96, 6000) };
        let verifier = scope.spawn(move || Verify { file: raw, size_mib, rate_iops }.until(stop));
        let sharer = scope.spawn(move || come_and_go(pool, stop, snapshots, deletions));
        let other = scope.spawn(move || be_busy(pool, stop));
        let mut random = fastrand::Rng::with_seed(seed);
        let table = storm(pool, front, kills, &mut random);
        drop(ending);
        met.verified_rounds.store(verifier.join().expect("fio found what it wrote"), Ordering::Relaxed);
        sharer.join().expect("snapshots and clones were made and deleted");
        other.join().expect("devices came and went");
        let mut files = BTreeMap::new();
        for worker in workers {
            files.extend(worker.join().expect("a worker's files are as it wrote them"));
        }
        (files, table)
    });
    let (files, table) = files;
    println!("{met:?}, {} files, {} s", files.len(), began.elapsed().as_secs());
    println!("{table}");
    assert!(table.kills_while_taking_over() > 0, "no engine was killed while it took over");
    assert!(met.snapshots.load(Ordering::Relaxed) > 0 && met.verified_rounds.load(Ordering::Relaxed) > 0, "{met:?}");

    for point in &points {
        run("sync", ["-f", point.to_str().expect("a path")]).expect();
    }
    fs::write("/proc/sys/vm/drop_caches", "3").expect("dropping caches");
    compare(&files);
    points.iter().for_each(|point| pool.unmount(point));
    for name in ["one", "two"] {
        FileSystem::Ext4.check(&pool.attach(name));
    }
    devices.iter().for_each(|device| log.assert_no_io_error(device));
    pool.done("detach --all");
    pool.stop();
    pool.check();
    let missed = table.missed();
    assert!(kills < KILLS_FOR_ALL || missed.is_empty(), "nobody was killed at {missed:?}");
}

/// Kills engines, and answers what they were at.
fn storm(pool: &TestPool, front: u32, kills: u64, random: &mut fastrand::Rng) -> Table {
    let (moments, mut deaths) = (Moments::of(front), Deaths::of(pool));
    while deaths.look() < kills {
        wait_until("an engine serves", LONGEST_PAUSE, || pool.process("engine_pid").is_some());
        let mut last = kill_serving(front, &moments, &deaths.table, random);
        for _ in 0..random.u32(..=SUCCESSORS_KILLED_MAX) {
            last = kill_successor(front, last, &moments, random);
        }
        // The front tells of a death before it starts the next.
        wait_for_engine(front, Some(last));
    }
    deaths.table
}

/// Kills an engine at a random moment, or at work that was met least so far.
fn kill_serving(front: u32, moments: &Moments, table: &Table, random: &mut fastrand::Rng) -> u32 {
    if random.bool() {
        std::thread::sleep(Duration::from_millis(random.u64(100..if is_slow() { 6000 } else { 600 })));
    } else {
        // It has to serve for a moment; a front does not start engines for ever that never do.
        std::thread::sleep(Duration::from_millis(random.u64(20..100)));
        if moments.wait_for(table.rarest()) {
            std::thread::sleep(Duration::from_micros(random.u64(..300)));
        }
    }
    let engine = wait_for_engine(front, None);
    kill(engine);
    engine
}

/// A successor is there within a few milliseconds, and serves in a few tens.
fn kill_successor(front: u32, last: u32, moments: &Moments, random: &mut fastrand::Rng) -> u32 {
    let engine = wait_for_engine(front, Some(last));
    match random.u32(..4) {
        0 => drop(moments.wait_for(Work::Replay)),
        1 => drop(moments.wait_for(Work::Opening)),
        _ => std::thread::sleep(Duration::from_millis(random.u64(..40))),
    }
    kill(engine);
    engine
}

/// At once: a program that does it would come too late.
fn kill(engine: u32) {
    let process = i32::try_from(engine).ok().and_then(Pid::from_raw).expect("a process id");
    match kill_process(process, Signal::KILL) {
        // It has handed over meanwhile.
        Ok(()) | Err(Errno::SRCH) => {}
        Err(errno) => panic!("killing {engine}: {errno}"),
    }
}

/// The engine process that the front has started, another one than `after`.
fn wait_for_engine(front: u32, after: Option<u32>) -> u32 {
    let began = Instant::now();
    loop {
        if let Some(engine) = children(front, "engine").into_iter().find(|engine| Some(*engine) != after) {
            return engine;
        }
        assert!(began.elapsed() < LONGEST_PAUSE, "the front starts no engine");
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Takes snapshots of all volumes, makes clones of them, and deletes them again, until told to stop.
fn come_and_go(pool: &TestPool, stop: &AtomicBool, snapshots: &AtomicU64, deletions: &AtomicU64) {
    let mut kept: Vec<(&str, String, String)> = Vec::new();
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let volume = ["raw", "one", "two"][round % 3];
        let (snapshot, clone) = (format!("snapshot-{round}"), format!("clone-{round}"));
        in_the_end(pool, &format!("snapshot create {volume} {snapshot}"));
        in_the_end(pool, &format!("clone create {snapshot} {clone}"));
        snapshots.fetch_add(1, Ordering::Relaxed);
        kept.push((volume, snapshot, clone));
        if kept.len() > KEPT {
            let (_, snapshot, clone) = kept.remove(round % KEPT);
            in_the_end(pool, &format!("volume delete {clone} --yes"));
            in_the_end(pool, &format!("snapshot delete {snapshot} --yes"));
            deletions.fetch_add(1, Ordering::Relaxed);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // What a snapshot of a file system in use holds is what a power cut would have left: it mounts, and is sound then.
    for (_, _, clone) in kept.into_iter().filter(|(volume, ..)| *volume != "raw") {
        let point = pool.mount(&clone);
        pool.unmount(&point);
        FileSystem::Ext4.check(&pool.attach(&clone));
        pool.done(&format!("detach {clone}"));
    }
}

/// Attaches and detaches a volume of its own, seals snapshots of it, upgrades the program, and has all that is free punched,
/// which engines that live so briefly do not come to by themselves; until told to stop.
fn be_busy(pool: &TestPool, stop: &AtomicBool) {
    pool.done("volume create idle --size 64M");
    let device = pool.attach("idle");
    run("dd", ["if=/dev/urandom", &format!("of={device}"), "bs=1M", "count=16", "oflag=direct"]).expect();
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        match round % 4 {
            0 => {
                in_the_end(pool, "detach idle");
                in_the_end(pool, "attach idle");
            }
            1 => {
                in_the_end(pool, "snapshot create idle sealed");
                long(pool, "snapshot seal sealed");
                in_the_end(pool, "snapshot delete sealed --yes");
            }
            2 => long(pool, "upgrade"),
            _ => long(pool, "pool trim"),
        }
    }
}

/// Repeats a command that could not be answered between two deaths within its client's patience. What was not answered may have
/// been done.
fn in_the_end(pool: &TestPool, line: &str) {
    let (began, mut unanswered) = (Instant::now(), false);
    loop {
        let outcome = pool.plywood(line.split_whitespace());
        let is_unanswered = outcome.stderr.contains("does not answer");
        if !is_unanswered || began.elapsed() > PATIENCE {
            let done = ["already", "no volume or snapshot named", "nothing to detach"];
            if !(unanswered && done.iter().any(|words| outcome.stderr.contains(words))) {
                outcome.expect();
            }
            return;
        }
        unanswered = true;
    }
}

/// A command that begins anew after each death may be killed more often than its client has patience for.
fn long(pool: &TestPool, line: &str) {
    let outcome = pool.plywood(line.split_whitespace());
    if !outcome.stderr.contains("does not answer") {
        outcome.expect();
    }
}

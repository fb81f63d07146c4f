//! The engine process is killed (-9) at random moments, and its successor while it takes over, under fio with verification
//! and unsynced work on files, while snapshots and clones come and go.
//!
//! `PLYWOOD_STORM_KILLS` says how many kills (30), `PLYWOOD_STORM_SEED` repeats the moments of a run, as far as a machine
//! can. `tools/kill-storm` runs it as long as one likes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::fio::Verify;
use crate::story::FileSystem;
use crate::support::command::{is_slow, run, wait_until};
use crate::support::kernel_log::KernelLog;
use crate::support::pool::{TestPool, Transport};
use crate::workload::{StopOnDrop, compare, work};

const KILLS: u64 = 30;
/// Successors killed one after the other before one is left to serve: a front gives up at five.
const SUCCESSORS_KILLED_MAX: u32 = 3;
/// Snapshots of each volume that are kept at a time.
const KEPT: usize = 3;
/// Longest that anybody may wait for an engine to serve again, on a machine that is busy with other things as well.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);

/// What the storm met.
#[derive(Debug, Default)]
struct Met {
    kills_while_serving: u64,
    kills_while_taking_over: u64,
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

    let (stop, mut met) = (AtomicBool::new(false), Met::default());
    let files = std::thread::scope(|scope| {
        let ending = StopOnDrop(&stop);
        let (stop, pool, raw) = (&stop, &pool, &raw);
        let (snapshots, deletions, rounds) = (&met.snapshots, &met.deletions, &met.verified_rounds);
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let folder = points[worker % points.len()].join(format!("worker-{worker}"));
                scope.spawn(move || work(&folder, seed.wrapping_add(worker as u64), stop))
            })
            .collect();
        let verifier = scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let (size_mib, rate_iops) = if is_slow() { (16, 400) } else { (96, 6000) };
                Verify { file: raw, size_mib, rate_iops }.start().finish().expect();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let sharer = scope.spawn(move || come_and_go(pool, stop, snapshots, deletions));
        let mut random = fastrand::Rng::with_seed(seed);
        let counts = storm(pool, front, kills, &mut random);
        drop(ending);
        verifier.join().expect("fio found what it wrote");
        sharer.join().expect("snapshots and clones were made and deleted");
        let mut files = BTreeMap::new();
        for worker in workers {
            files.extend(worker.join().expect("a worker's files are as it wrote them"));
        }
        (files, counts)
    });
    let (files, counts) = files;
    (met.kills_while_serving, met.kills_while_taking_over) = counts;
    println!("{met:?}, {} files", files.len());
    assert!(met.kills_while_serving > 0 && met.kills_while_taking_over > 0, "the storm missed one kind: {met:?}");
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
}

/// Kills engines. Answers how many were serving, and how many were on their way to.
fn storm(pool: &TestPool, front: u32, kills: u64, random: &mut fastrand::Rng) -> (u64, u64) {
    let (mut serving, mut taking_over) = (0, 0);
    while serving + taking_over < kills {
        wait_until("an engine serves", LONGEST_PAUSE, || pool.process("engine_pid").is_some());
        std::thread::sleep(Duration::from_millis(random.u64(100..if is_slow() { 6000 } else { 1200 })));
        let mut last = kill_next(front, None);
        serving += 1;
        for _ in 0..random.u32(..=SUCCESSORS_KILLED_MAX) {
            if serving + taking_over == kills {
                break;
            }
            // The successor is there within a few milliseconds, and serves in a few tens.
            last = wait_for_engine(front, Some(last));
            std::thread::sleep(Duration::from_millis(random.u64(..40)));
            kill(last);
            taking_over += 1;
        }
    }
    (serving, taking_over)
}

fn kill_next(front: u32, after: Option<u32>) -> u32 {
    let engine = wait_for_engine(front, after);
    kill(engine);
    engine
}

fn kill(engine: u32) {
    run("kill", ["-9".to_owned(), engine.to_string()]).expect();
}

/// The engine process that the front has started, another one than `after`.
fn wait_for_engine(front: u32, after: Option<u32>) -> u32 {
    let began = Instant::now();
    loop {
        if let Some(engine) = engines(front).into_iter().find(|engine| Some(*engine) != after) {
            return engine;
        }
        assert!(began.elapsed() < LONGEST_PAUSE, "the front starts no engine");
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Living children of the front that are engines. It has other helpers.
fn engines(front: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{front}/task")).expect("the front lives");
    let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let ids: Vec<u32> =
        children.flat_map(|line| line.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    ids.into_iter()
        .filter(|id| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == b"engine")
        })
        .collect()
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
        pool.done(&format!("snapshot create {volume} {snapshot}"));
        pool.done(&format!("clone create {snapshot} {clone}"));
        snapshots.fetch_add(1, Ordering::Relaxed);
        kept.push((volume, snapshot, clone));
        if kept.len() > KEPT {
            let (_, snapshot, clone) = kept.remove(round % KEPT);
            pool.done(&format!("volume delete {clone} --yes"));
            pool.done(&format!("snapshot delete {snapshot} --yes"));
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

//! File systems and a database on volumes, their pool on a disk that is recorded, and the power that fails at any moment
//! of it. What is left opens without repair, file systems mount and are sound, and no transaction is lost that was
//! acknowledged.
//!
//! `PLYWOOD_CUTS` says how many states are looked at (10), `PLYWOOD_CUT_SEED` repeats a choice.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::recording::{RecordedDisk, Recording};
use crate::story::FileSystem;
use crate::support::command::{run, wait_until};
use crate::support::machine::scratch;
use crate::support::pool::{TestPool, Transport};
use crate::workload::{StopOnDrop, work};

const CUTS: u64 = 10;
const DISK_BYTES: u64 = 3 << 30;
const RUNS: Duration = Duration::from_secs(8);
/// On a slow disk it takes longer to this many transactions, but no longer than that.
const TRANSACTIONS: u64 = 20;
const RUNS_MOST: Duration = Duration::from_secs(180);
const VOLUMES: [(&str, FileSystem); 3] =
    [("files", FileSystem::Ext4), ("more", FileSystem::Xfs), ("database", FileSystem::Ext4)];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

/// A transaction, and the log's length when sqlite had acknowledged it.
struct Acknowledged {
    number: u64,
    position: u64,
}

pub fn programs_survive() {
    let cuts = number("PLYWOOD_CUTS").unwrap_or(CUTS);
    let seed = number("PLYWOOD_CUT_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("{cuts} cuts, PLYWOOD_CUT_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = tempfile::Builder::new().prefix("plywood-test-").tempdir_in(scratch()).expect("a folder");
    let (log, ready, acknowledged) = record(folder.path(), seed);
    assert!(acknowledged.len() as u64 > TRANSACTIONS, "sqlite made only {} transactions", acknowledged.len());

    let mut recording = Recording::open(&log, &folder.path().join("image"), DISK_BYTES);
    let first = recording.index_at(ready).max(1);
    let flushes: Vec<usize> = recording.flushes().into_iter().filter(|count| *count > first).collect();
    // Half of them behind a flush, half anywhere.
    let mut moments: Vec<usize> =
        (0..cuts)
            .map(|cut| {
                if cut % 2 == 0 {
                    flushes[random.usize(..flushes.len())]
                } else {
                    random.usize(first..=recording.len())
                }
            })
            .collect();
    moments.sort_unstable();
    println!("{} events, {} flushes, {} transactions", recording.len(), flushes.len(), acknowledged.len());
    for (number, count) in moments.into_iter().enumerate() {
        let cut = folder.path().join("cut");
        recording.cut(count, &cut, &mut random);
        let position = recording.position(count);
        let promised = acknowledged.iter().filter(|one| one.position <= position).map(|one| one.number).max();
        verify(&cut, number, promised);
    }
}

/// Runs the programs. Answers the log, its length when all file systems were there, and sqlite's transactions.
fn record(folder: &Path, seed: u64) -> (std::path::PathBuf, u64, Vec<Acknowledged>) {
    let disk = RecordedDisk::start(folder, DISK_BYTES);
    let pool = TestPool::create_on(Path::new(&disk.device), "3G", Transport::Auto);
    let points = VOLUMES.map(|(name, file_system)| {
        pool.done(&format!("volume create {name} --size 512M --sector-size 4096"));
        file_system.make(&pool.attach(name));
        pool.mount(name)
    });
    for point in &points {
        run("sync", ["-f", point.to_str().expect("a path")]).expect();
    }
    let ready = disk.position();
    let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
    let acknowledged = std::thread::scope(|scope| {
        let ending = StopOnDrop(&stop);
        let (stop, made, pool, disk) = (&stop, &made, &pool, &disk);
        for (number, point) in points.iter().take(2).enumerate() {
            scope.spawn(move || work(&point.join("work"), seed.wrapping_add(number as u64), stop));
        }
        let database = points[2].join("numbers.sqlite");
        let transactions = scope.spawn(move || insert_until(&database, stop, made, || disk.position()));
        let began = Instant::now();
        for round in 0.. {
            let enough = began.elapsed() > RUNS && made.load(Ordering::Relaxed) > TRANSACTIONS;
            if enough || began.elapsed() > RUNS_MOST {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
            for (name, _) in VOLUMES {
                pool.done(&format!("snapshot create {name} {name}-{round}"));
            }
        }
        drop(ending);
        transactions.join().expect("sqlite")
    });
    points.iter().for_each(|point| pool.unmount(point));
    pool.done("detach --all");
    pool.stop();
    drop(pool);
    let (_, log) = disk.stop();
    (log, ready, acknowledged)
}

/// Inserts numbers from 1 on, a transaction each, durable when sqlite has answered.
fn insert_until(database: &Path, stop: &AtomicBool, made: &AtomicU64, position: impl Fn() -> u64) -> Vec<Acknowledged> {
    let mut sqlite = Command::new("sqlite3")
        .arg(database)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sqlite3 starts");
    let mut input = sqlite.stdin.take().expect("piped");
    let mut answers = BufReader::new(sqlite.stdout.take().expect("piped")).lines();
    writeln!(input, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t(n INTEGER PRIMARY KEY, b BLOB);")
        .expect("sqlite reads");
    let mut acknowledged = Vec::new();
    for number in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        writeln!(
            input,
            "INSERT INTO t VALUES({number}, randomblob({})); SELECT 'ack {number}';",
            100 + number * 37 % 9000
        )
        .expect("sqlite reads");
        let wanted = format!("ack {number}");
        assert!(answers.by_ref().map_while(Result::ok).any(|line| line == wanted), "sqlite has ended");
        acknowledged.push(Acknowledged { number, position: position() });
        made.store(number, Ordering::Relaxed);
    }
    drop(input);
    assert!(sqlite.wait().expect("sqlite ends").success());
    acknowledged
}

/// Looks at a disk that has lost its power.
fn verify(cut: &Path, number: usize, promised: Option<u64>) {
    let pool = TestPool::adopt(cut);
    pool.check();
    let names = pool.names();
    for (name, file_system) in VOLUMES {
        assert!(names.iter().any(|found| found == name), "cut {number}: {name} is gone");
        let newest =
            names.iter().filter(|found| found.starts_with(&format!("{name}-"))).max_by_key(|found| found.len());
        pool.done(&format!("snapshot create {name} left-{name}"));
        for snapshot in newest.cloned().into_iter().chain([format!("left-{name}")]) {
            let clone = format!("of-{snapshot}");
            pool.done(&format!("clone create {snapshot} {clone}"));
            // Replays the file system's own journal.
            let point = pool.mount(&clone);
            if name == "database" {
                let bound = if snapshot.starts_with("left-") { promised } else { None };
                verify_database(&point.join("numbers.sqlite"), number, bound);
            }
            pool.unmount(&point);
            file_system.check(&pool.attach(&clone));
            pool.done(&format!("detach {clone}"));
        }
    }
    pool.stop();
    pool.check();
    let file = pool.file().to_owned();
    drop(pool);
    wait_until("the end of all users", Duration::from_secs(10), || fs::remove_file(&file).is_ok());
}

fn verify_database(database: &Path, number: usize, promised: Option<u64>) {
    if !database.exists() {
        assert_eq!(promised, None, "cut {number}: the database is gone");
        return;
    }
    let query = "PRAGMA integrity_check; SELECT count(*) FROM sqlite_master; ";
    let answer = run("sqlite3", [database.as_os_str(), query.as_ref()]).expect();
    let mut lines = answer.lines();
    assert_eq!(lines.next(), Some("ok"), "cut {number}: sqlite finds its database damaged: {answer}");
    if lines.next() == Some("0") {
        assert_eq!(promised, None, "cut {number}: the table is gone");
        return;
    }
    let count =
        run("sqlite3", [database.as_os_str(), "SELECT count(*), coalesce(max(n), 0) FROM t;".as_ref()]).expect();
    let (count, last) = count.split_once('|').expect("two columns");
    assert_eq!(count, last, "cut {number}: transactions are missing in the middle");
    let last: u64 = last.parse().expect("a number");
    assert!(last >= promised.unwrap_or(0), "cut {number}: sqlite acknowledged {promised:?}, and {last} is the last");
}

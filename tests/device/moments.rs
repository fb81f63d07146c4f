//! When to kill an engine, and what it was at: seen in the memory that the front holds, and told by the front's log.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use plywood::engine::Work;
use plywood::export::shared::SharedBoard;

use crate::support::pool::TestPool;

/// How long a moment is waited for before any other will do.
const PATIENCE: Duration = Duration::from_millis(600);
/// What a storm under a front that lives never meets.
const NEVER: [Work; 1] = [Work::Close];

/// What engines were at when they were killed, by the front's own words.
#[derive(Default)]
pub struct Table {
    kills: u64,
    works: BTreeMap<String, u64>,
    requests: u64,
    most_requests: u64,
}

/// Deaths as the daemon's log tells them.
pub struct Deaths {
    log: PathBuf,
    read: u64,
    pub table: Table,
}

/// The board of the engines of one front.
pub struct Moments {
    board: SharedBoard,
}

impl Moments {
    pub fn of(front: u32) -> Self {
        let descriptors = fs::read_dir(format!("/proc/{front}/fd")).expect("the front lives").flatten();
        let is_log =
            |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("plywood-pending"));
        let path = descriptors.map(|entry| entry.path()).find(is_log).expect("the front holds a pending log");
        let memory = File::options().read(true).write(true).open(path).expect("its memory");
        Self { board: SharedBoard::watch(memory.into()).expect("a pending log") }
    }

    /// Waits until the engine is at `work`; false when that does not come.
    pub fn wait_for(&self, work: Work) -> bool {
        let began = Instant::now();
        while !self.board.plight(0).has(work) {
            if began.elapsed() > PATIENCE {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }
}

impl Deaths {
    /// From now on.
    pub fn of(pool: &TestPool) -> Self {
        let log = pool.log();
        let read = fs::metadata(&log).expect("the daemon's log").len();
        Self { log, read, table: Table::default() }
    }

    /// Reads what is new.
    pub fn look(&mut self) -> u64 {
        let mut text = String::new();
        let mut log = File::open(&self.log).expect("the daemon's log");
        log.seek(SeekFrom::Start(self.read)).and_then(|_| log.read_to_string(&mut text)).expect("the daemon's log");
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.read += whole as u64;
        text[..whole].lines().for_each(|line| self.table.add(line));
        self.table.kills
    }
}

impl Table {
    fn add(&mut self, line: &str) {
        let Some((_, told)) = line.split_once("engine process ended with signal: 9 (SIGKILL), ") else { return };
        self.kills += 1;
        let (works, rest) = match told.strip_prefix("at: ") {
            Some(told) => told.split_once("; ").expect("works; requests"),
            None => told.split_once(", with ").expect("before; requests"),
        };
        works.split(", ").for_each(|work| *self.works.entry(work.to_owned()).or_default() += 1);
        let requests = rest.split(' ').next().and_then(|count| count.parse().ok()).expect("a number of requests");
        self.requests += requests;
        self.most_requests = self.most_requests.max(requests);
    }

    pub fn kills_at(&self, work: Work) -> u64 {
        self.works.get(work.words()).copied().unwrap_or(0)
    }

    /// Kills of engines that had not begun to serve.
    pub fn kills_while_taking_over(&self) -> u64 {
        self.works.get("before it had the pool").copied().unwrap_or(0)
            + self.kills_at(Work::Opening)
            + self.kills_at(Work::Replay)
    }

    /// What an engine that serves was met at least.
    pub fn rarest(&self) -> Work {
        let before = [Work::Opening, Work::Replay];
        let candidates = Work::ALL.into_iter().filter(|work| !NEVER.contains(work) && !before.contains(work));
        candidates.min_by_key(|work| self.kills_at(*work)).expect("there is work")
    }

    /// What was never met.
    pub fn missed(&self) -> Vec<Work> {
        Work::ALL.into_iter().filter(|work| !NEVER.contains(work) && self.kills_at(*work) == 0).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let average = self.requests as f64 / self.kills.max(1) as f64;
        writeln!(
            f,
            "{} kills, {average:.0} requests in flight on average, {} at most",
            self.kills, self.most_requests
        )?;
        let mut rows: Vec<_> = self.works.iter().collect();
        rows.sort_by_key(|(_, kills)| std::cmp::Reverse(**kills));
        for (work, kills) in rows {
            writeln!(f, "{kills:7}  {work}")?;
        }
        f.write_str("an engine is often at several of these at once")
    }
}

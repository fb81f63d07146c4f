//! How full a pool is, and the thresholds at which people are warned.
//!
//! What counts is what can still be written: the pool's own free blocks, up to the size that it may grow to, or what the
//! host can still give it, whichever is less. A threshold that was reached is left only when the pool is a little emptier
//! than it: a pool that breathes around one would be told of without end.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::protocol::Threshold;
use crate::error::{Error, Result};
use crate::export::link::LINK_VARIABLE;

/// The thresholds in percent, ascending.
pub(super) const THRESHOLDS: [u8; 3] = [80, 90, 95];
/// How much emptier a pool must be, in percent of all space, until a threshold is left.
const HYSTERESIS: u64 = 2;
/// Crossings that wait for the command of an earlier one to end.
const WAITING: usize = 8;
/// How long a command may run.
const LIMIT: Duration = Duration::from_secs(300);
/// Time between two looks at whether it has ended.
const LOOK: Duration = Duration::from_millis(20);

/// The space of a pool, without superblocks and journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Space {
    /// Blocks in use, in bytes.
    pub(super) used_bytes: u64,
    /// Size of the pool, or the size that it may grow to by itself.
    pub(super) size_bytes: u64,
    /// What the host has given the pool's file.
    pub(super) host_bytes: u64,
    /// What the host can still give; none when the pool is a device.
    pub(super) host_free_bytes: Option<u64>,
}

impl Space {
    /// What can still be written.
    pub(super) fn available_bytes(&self) -> u64 {
        let in_pool = self.size_bytes.saturating_sub(self.used_bytes);
        // What the file has and the pool does not use needs nothing of the host.
        let on_host =
            self.host_free_bytes.map(|free| free.saturating_add(self.host_bytes.saturating_sub(self.used_bytes)));
        on_host.map_or(in_pool, |on_host| in_pool.min(on_host))
    }

    /// How much of all space is used, rounded down.
    pub(super) fn percent(&self) -> u64 {
        let all = self.used_bytes.saturating_add(self.available_bytes());
        if all == 0 { 0 } else { (u128::from(self.used_bytes) * 100 / u128::from(all)) as u64 }
    }
}

/// A threshold that was crossed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Crossing {
    /// Which, in percent.
    pub(super) percent: u8,
    /// Upwards, or else downwards.
    pub(super) upwards: bool,
}

/// How many of the thresholds are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Level(usize);

impl Level {
    /// That of a pool that is looked at for the first time.
    pub(super) fn of(percent: u64) -> Self {
        Self(THRESHOLDS.iter().filter(|threshold| percent >= u64::from(**threshold)).count())
    }

    /// One that was kept as a number.
    pub(super) fn from_number(number: u64) -> Self {
        Self(usize::try_from(number).unwrap_or(0).min(THRESHOLDS.len()))
    }

    /// As a number to be kept.
    pub(super) fn number(self) -> u64 {
        self.0 as u64
    }

    /// The thresholds, and whether they are reached.
    pub(super) fn thresholds(self) -> Vec<Threshold> {
        let reached = |(index, &percent)| Threshold { percent, reached: index < self.0 };
        THRESHOLDS.iter().enumerate().map(reached).collect()
    }

    /// Takes a new look, and answers what was crossed, in order.
    pub(super) fn look(&mut self, percent: u64) -> Vec<Crossing> {
        let mut crossed = Vec::new();
        while let Some(&next) = THRESHOLDS.get(self.0)
            && percent >= u64::from(next)
        {
            self.0 += 1;
            crossed.push(Crossing { percent: next, upwards: true });
        }
        while let Some(below) = self.0.checked_sub(1)
            && percent + HYSTERESIS < u64::from(THRESHOLDS[below])
        {
            self.0 = below;
            crossed.push(Crossing { percent: THRESHOLDS[below], upwards: false });
        }
        crossed
    }
}

/// The way to the thread that runs a command at each crossing, one at a time.
#[derive(Debug)]
pub(super) struct Runner(SyncSender<Crossing>);

impl Runner {
    /// Prepares to run `command`, a line for the shell.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub(super) fn start(command: String, pool: String, path: PathBuf) -> Result<Self> {
        let (sender, receiver) = sync_channel(WAITING);
        let run = move || receiver.into_iter().for_each(|crossing| run(&command, &pool, &path, crossing));
        let spawned = thread::Builder::new().name("thresholds".into()).spawn(run);
        spawned.map(|_| Self(sender)).map_err(|error| Error::io("starting a thread", error))
    }

    /// Has the command run for a crossing. Never waits: with too many crossings before it, this one goes without.
    pub(super) fn crossed(&self, crossing: Crossing) {
        if let Err(TrySendError::Full(Crossing { percent, .. })) = self.0.try_send(crossing) {
            tracing::warn!(percent, "the command of an earlier threshold still runs; this one goes without");
        }
    }
}

fn run(command: &str, pool: &str, path: &std::path::Path, crossing: Crossing) {
    let Crossing { percent, upwards } = crossing;
    // What the daemon is spared when memory is short is not for whatever people run.
    let done = Command::new("/bin/sh")
        .args(["-c", "echo 0 >/proc/self/oom_score_adj; eval \"$1\"", "plywood", command])
        .env_remove(LINK_VARIABLE)
        .env("PLYWOOD_POOL", path)
        .env("PLYWOOD_POOL_NAME", pool)
        .env("PLYWOOD_THRESHOLD_PERCENT", percent.to_string())
        .env("PLYWOOD_THRESHOLD_DIRECTION", if upwards { "up" } else { "down" })
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .and_then(|mut child| wait(&mut child, LIMIT));
    match done {
        Ok(status) if status.success() => tracing::info!(percent, upwards, "the command at thresholds was run"),
        Ok(status) => tracing::warn!(percent, upwards, "the command at thresholds ended with {status}"),
        Err(error) => tracing::warn!(percent, upwards, %error, "the command at thresholds does not start"),
    }
}

/// Waits for the end of a command, which comes by force after `limit`: the next threshold's waits for it.
fn wait(child: &mut Child, limit: Duration) -> io::Result<ExitStatus> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if began.elapsed() > limit
            && let Some(group) = Pid::from_raw(child.id().cast_signed())
        {
            tracing::warn!("the command at thresholds has not ended after {} s and is killed", limit.as_secs());
            rustix::process::kill_process_group(group, Signal::KILL)?;
            return child.wait();
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_counts_is_the_lower_of_pool_and_host() {
        let pool = Space { used_bytes: 8 * GIB, size_bytes: 10 * GIB, host_bytes: 8 * GIB, host_free_bytes: None };
        assert_eq!((pool.available_bytes(), pool.percent()), (2 * GIB, 80));
        assert_eq!(Space { host_free_bytes: Some(100 * GIB), ..pool }.percent(), 80);
        assert_eq!(Space { host_free_bytes: Some(GIB), ..pool }.percent(), 88);
        assert_eq!(Space { host_free_bytes: Some(0), ..pool }.percent(), 100);
        // What the file already has of the host can be used again.
        assert_eq!(Space { host_free_bytes: Some(0), host_bytes: 10 * GIB, ..pool }.percent(), 80);
        assert_eq!(Space { size_bytes: 32 * GIB, ..pool }.percent(), 25);
        assert_eq!(Space::default().percent(), 0);
    }

    #[test]
    fn threshold_is_crossed_once_each_way_and_with_hysteresis() {
        let mut level = Level::default();
        let up = |percent| Crossing { percent, upwards: true };
        let down = |percent| Crossing { percent, upwards: false };
        assert_eq!(level.look(79), []);
        assert_eq!(level.look(80), [up(80)]);
        for still in [81, 80, 79, 78, 80] {
            assert_eq!(level.look(still), [], "{still}");
        }
        assert_eq!(level.look(96), [up(90), up(95)]);
        assert_eq!(level.look(93), []);
        assert_eq!(level.look(10), [down(95), down(90), down(80)]);
        assert_eq!(level, Level::default());
        assert_eq!(level.look(100).len(), 3);
    }

    #[test]
    fn level_is_kept_as_a_number() {
        for (percent, reached) in [(0, 0), (79, 0), (80, 1), (90, 2), (94, 2), (95, 3), (100, 3)] {
            let level = Level::of(percent);
            assert_eq!((level.number(), Level::from_number(level.number())), (reached, level));
            assert_eq!(level.thresholds().iter().filter(|threshold| threshold.reached).count() as u64, reached);
        }
        assert_eq!(Level::from_number(u64::MAX).number(), 3);
    }

    #[test]
    fn command_that_hangs_is_killed_with_all_that_it_started() {
        let begun = Instant::now();
        let mut child = Command::new("/bin/sh").args(["-c", "sleep 600 & sleep 600"]).process_group(0).spawn().unwrap();
        let group = Pid::from_raw(child.id().cast_signed()).unwrap();
        let status = wait(&mut child, Duration::from_millis(50)).unwrap();
        assert!(!status.success() && begun.elapsed() < Duration::from_secs(60));
        // A zombie that nobody has waited for yet still counts as a member.
        while rustix::process::test_kill_process_group(group).is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the shell's child lives");
            thread::sleep(LOOK);
        }
    }

    #[test]
    fn command_knows_pool_percent_and_direction_and_runs_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let shown = out.display();
        // Two at a time would find the other's mark.
        let command = format!(
            "mkdir '{shown}.busy' || echo overlap >> '{shown}'; sleep 0.05; \
             echo $PLYWOOD_POOL_NAME $PLYWOOD_POOL $PLYWOOD_THRESHOLD_PERCENT $PLYWOOD_THRESHOLD_DIRECTION >> '{shown}'; \
             rmdir '{shown}.busy'"
        );
        let runner = Runner::start(command, "main".into(), "/a pool".into()).unwrap();
        runner.crossed(Crossing { percent: 80, upwards: true });
        runner.crossed(Crossing { percent: 90, upwards: true });
        runner.crossed(Crossing { percent: 90, upwards: false });
        let began = Instant::now();
        let expected = "main /a pool 80 up\nmain /a pool 90 up\nmain /a pool 90 down\n";
        while fs::read_to_string(&out).unwrap_or_default() != expected {
            assert!(began.elapsed() < Duration::from_secs(30), "{:?}", fs::read_to_string(&out));
            thread::sleep(Duration::from_millis(10));
        }
    }
}

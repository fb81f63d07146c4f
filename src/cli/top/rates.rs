//! What happened between two looks at a pool, a second.

use std::path::PathBuf;

use serde::Serialize;

use crate::daemon::protocol::{Figures, Pool, VolumeFigures};
use crate::export::server::counters::IoKind;

/// What happened, a second.
#[derive(Clone, Debug, Serialize)]
pub struct Rates {
    /// When the second look was taken, in nanoseconds since 1970 UTC.
    pub time_ns: u64,
    /// The time between the two.
    pub interval_ns: u64,
    /// The pool at the second look.
    pub pool: PoolState,
    /// Volumes that are attached or did something, the busiest first.
    pub volumes: Vec<VolumeRates>,
}

/// The pool as far as the view shows it.
#[derive(Clone, Debug, Serialize)]
pub struct PoolState {
    pub name: String,
    pub size_bytes: u64,
    pub used_bytes: u64,
    pub filled_percent: u64,
    pub journal_bytes: u64,
    pub journal_used_bytes: u64,
    pub generation: u64,
    pub waiting: u64,
    pub poisoned: bool,
    pub engine_pid: Option<u32>,
}

/// What a volume did, a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VolumeRates {
    pub name: String,
    pub device: Option<PathBuf>,
    pub own_bytes: u64,
    pub reads_per_second: f64,
    pub writes_per_second: f64,
    /// Flushes, discards, zeros.
    pub others_per_second: f64,
    pub read_bytes_per_second: f64,
    pub written_bytes_per_second: f64,
    pub blocks_redirected_per_second: f64,
    /// Of all requests; none where there were none.
    pub mean_latency_us: Option<f64>,
    pub errors: u64,
}

impl Rates {
    /// What happened between `before` and `now`. When another engine process has taken over meanwhile, what it has done
    /// since.
    pub fn between(before: &Figures, now: &Figures) -> Self {
        let same_engine = before.since_ns == now.since_ns;
        let begin_ns = if same_engine { before.taken_ns } else { now.since_ns };
        let interval_ns = now.taken_ns.saturating_sub(begin_ns).max(1);
        let nothing = VolumeFigures::default();
        let mut volumes: Vec<VolumeRates> = now
            .volumes
            .iter()
            .map(|volume| {
                let earlier = before.volumes.iter().find(|earlier| same_engine && earlier.id == volume.id);
                rates_of(earlier.unwrap_or(&nothing), volume, interval_ns as f64 / 1e9)
            })
            .filter(|volume| volume.device.is_some() || volume.operations() > 0.0)
            .collect();
        volumes.sort_by(|one, other| {
            let busy = other.operations().total_cmp(&one.operations());
            let bytes = |volume: &VolumeRates| volume.read_bytes_per_second + volume.written_bytes_per_second;
            busy.then(bytes(other).total_cmp(&bytes(one))).then_with(|| one.name.cmp(&other.name))
        });
        Self { time_ns: now.taken_ns, interval_ns, pool: state_of(&now.pool), volumes }
    }
}

impl VolumeRates {
    fn operations(&self) -> f64 {
        self.reads_per_second + self.writes_per_second + self.others_per_second
    }
}

fn state_of(pool: &Pool) -> PoolState {
    PoolState {
        name: pool.name.clone(),
        size_bytes: pool.size_bytes,
        used_bytes: pool.used_bytes,
        filled_percent: pool.filled_percent,
        journal_bytes: pool.journal_bytes,
        journal_used_bytes: pool.journal_used_bytes,
        generation: pool.generation,
        waiting: pool.waiting,
        poisoned: pool.poisoned.is_some(),
        engine_pid: pool.engine_pid,
    }
}

fn rates_of(before: &VolumeFigures, now: &VolumeFigures, seconds: f64) -> VolumeRates {
    let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
    let operations = |kind| per_second(now.io.of(kind).operations, before.io.of(kind).operations);
    let bytes = |kind| per_second(now.io.of(kind).bytes, before.io.of(kind).bytes);
    let sum = |volume: &VolumeFigures| {
        IoKind::ALL.iter().fold((0_u64, 0_u64, 0_u64), |(operations, latency_ns, errors), kind| {
            let counters = volume.io.of(*kind);
            (operations + counters.operations, latency_ns.wrapping_add(counters.latency_ns), errors + counters.errors)
        })
    };
    let ((count_then, took_then, errors_then), (count_now, took_now, errors_now)) = (sum(before), sum(now));
    let count = count_now.saturating_sub(count_then);
    let took_ns = took_now.saturating_sub(took_then) as f64;
    VolumeRates {
        name: now.name.clone(),
        device: now.device.clone(),
        own_bytes: now.own_bytes,
        reads_per_second: operations(IoKind::Read),
        writes_per_second: operations(IoKind::Write),
        others_per_second: [IoKind::Flush, IoKind::Discard, IoKind::Zero].map(operations).iter().sum(),
        read_bytes_per_second: bytes(IoKind::Read),
        written_bytes_per_second: bytes(IoKind::Write) + bytes(IoKind::Zero),
        blocks_redirected_per_second: per_second(now.blocks_redirected, before.blocks_redirected),
        mean_latency_us: (count > 0).then(|| took_ns / 1000.0 / count as f64),
        errors: errors_now.saturating_sub(errors_then),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(taken_ns: u64, volumes: Vec<VolumeFigures>) -> Figures {
        Figures { taken_ns, since_ns: 7, volumes, ..Figures::default() }
    }

    fn volume(id: u64, reads: u64, writes: u64) -> VolumeFigures {
        let mut volume = VolumeFigures { id, name: format!("v{id}"), ..VolumeFigures::default() };
        (volume.io.read.operations, volume.io.read.bytes, volume.io.read.latency_ns) =
            (reads, reads * 4096, reads * 2000);
        (volume.io.write.operations, volume.io.write.bytes) = (writes, writes * 512);
        volume.blocks_redirected = writes / 2;
        volume
    }

    #[test]
    fn differences_are_told_a_second_and_the_busiest_first() {
        let before = figures(1_000_000_000, vec![volume(1, 100, 0), volume(2, 0, 0), volume(3, 9, 9)]);
        let now = figures(3_000_000_000, vec![volume(1, 120, 0), volume(2, 100, 100), volume(3, 9, 9)]);
        let rates = Rates::between(&before, &now);
        let names: Vec<_> = rates.volumes.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["v2", "v1"], "one that does nothing and is not attached is left out");
        let (busy, other) = (&rates.volumes[0], &rates.volumes[1]);
        assert_eq!((busy.reads_per_second, busy.writes_per_second), (50.0, 50.0));
        assert_eq!((busy.read_bytes_per_second, busy.written_bytes_per_second), (50.0 * 4096.0, 50.0 * 512.0));
        assert_eq!((busy.blocks_redirected_per_second, busy.mean_latency_us), (25.0, Some(1.0)));
        assert_eq!((other.reads_per_second, other.mean_latency_us), (10.0, Some(2.0)));
    }

    #[test]
    fn successor_begins_with_its_own_counters() {
        let before = figures(1_000_000_000, vec![volume(1, 1000, 0)]);
        let now = Figures { since_ns: 1_500_000_000, ..figures(2_000_000_000, vec![volume(1, 50, 0)]) };
        let rates = Rates::between(&before, &now);
        assert_eq!((rates.interval_ns, rates.volumes[0].reads_per_second), (500_000_000, 100.0));
    }
}

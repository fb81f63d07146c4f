//! What a run met: the rare things that a random test is for. One that was never met makes the test fail, because it
//! then shows nothing about it.

use plywood::engine::Pool;
use plywood::io::MemoryStorage;

use crate::world::End;

/// Counts of what was met.
#[derive(Clone, Debug, Default)]
pub struct Met {
    pub operations: u64,
    pub ring_wraps: u64,
    pub groups_appended: u64,
    pub slots_flipped: u64,
    /// Openings that found records in the journal.
    pub replays: u64,
    /// Openings that found records in a predecessor's pending log.
    pub takeovers: u64,
    pub carcasses_resumed: u64,
    /// As the engine counts them.
    pub quota_hits: u64,
    /// Blocks that were moved together.
    pub gathered: u64,
    /// Changes that came back refused for a quota.
    pub refusals: u64,
    pub reservations: u64,
    /// Snapshots taken at one instant with others.
    pub snapshots_together: u64,
    pub closes: u64,
    pub cuts: u64,
    pub deaths: u64,
    /// Volumes seen with blocks mapped, by the height that their size asks for.
    pub heights: [u64; 4],
}

impl Met {
    /// Takes what the engine counted in its life.
    pub fn add(&mut self, pool: &Pool<MemoryStorage>) {
        let counters = pool.counters();
        self.ring_wraps += counters.ring_wraps;
        self.groups_appended += counters.groups_appended;
        self.slots_flipped += counters.checkpoints;
        self.replays += u64::from(counters.records_replayed > 0);
        self.takeovers += u64::from(counters.records_recovered > 0);
        self.carcasses_resumed += counters.carcasses_resumed;
        self.quota_hits += counters.quota_hits;
        self.gathered += counters.blocks_gathered;
    }

    /// A volume of this size was compared and had something in it: a leaf spans 1 MiB, each level above 256 times that.
    pub fn volume(&mut self, size_bytes: u64, mapped_blocks: u64) {
        if mapped_blocks > 0 {
            let height = (0..3).find(|level| size_bytes <= (1 << 20) << (8 * level)).unwrap_or(3);
            self.heights[height] += 1;
        }
    }

    pub fn ended(&mut self, end: End) {
        match end {
            End::Closed => self.closes += 1,
            End::CutOff => self.cuts += 1,
            End::Died => self.deaths += 1,
        }
    }

    /// Adds what another run met.
    pub fn merge(&mut self, other: &Self) {
        self.operations += other.operations;
        self.ring_wraps += other.ring_wraps;
        self.groups_appended += other.groups_appended;
        self.slots_flipped += other.slots_flipped;
        self.replays += other.replays;
        self.takeovers += other.takeovers;
        self.refusals += other.refusals;
        self.carcasses_resumed += other.carcasses_resumed;
        self.quota_hits += other.quota_hits;
        self.gathered += other.gathered;
        self.reservations += other.reservations;
        self.snapshots_together += other.snapshots_together;
        self.closes += other.closes;
        self.cuts += other.cuts;
        self.deaths += other.deaths;
        for (sum, more) in self.heights.iter_mut().zip(other.heights) {
            *sum += more;
        }
    }

    /// Names and counts, for printing.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("ring wraps", self.ring_wraps),
            ("groups appended", self.groups_appended),
            ("slots flipped", self.slots_flipped),
            ("replays", self.replays),
            ("takeovers of a pending log", self.takeovers),
            ("carcasses resumed", self.carcasses_resumed),
            ("quota hits", self.quota_hits),
            ("blocks moved together", self.gathered),
            ("changes refused by a quota", self.refusals),
            ("reservations made", self.reservations),
            ("snapshots taken with others", self.snapshots_together),
            ("closes", self.closes),
            ("cuts after a commit", self.cuts),
            ("deaths", self.deaths),
            ("trees of height 0", self.heights[0]),
            ("trees of height 1", self.heights[1]),
            ("trees of height 2", self.heights[2]),
            ("trees of height 3", self.heights[3]),
        ]
    }
}

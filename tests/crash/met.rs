//! What a run met. What was never met was not tested.

use plywood::engine::{Activity, Pool};

use crate::medium::{Medium, Phase};

#[derive(Clone, Debug, Default)]
pub struct Met {
    pub worlds: u64,
    pub operations: u64,
    /// Crash states opened and compared.
    pub states: u64,
    pub power_cuts: u64,
    /// Power cuts of which everything that they may leave was looked at.
    pub cuts_enumerated: u64,
    pub deaths: u64,
    pub replays_interrupted: u64,
    pub went_on: u64,
    pub no_space: u64,
    /// Blocks written of what was reserved.
    pub claimed: u64,
    /// Snapshots taken at one instant with others.
    pub snapshots_together: u64,
    pub sent_again: u64,
    pub reserve_used: u64,
    pub in_commit: u64,
    pub in_checkpoint: u64,
    pub in_carcass: u64,
    pub in_superblock: u64,
    pub in_batch: u64,
    pub in_flush: u64,
    pub in_write: u64,
    pub in_punch: u64,
    pub in_extend: u64,
    pub replays: u64,
    pub takeovers: u64,
    pub carcasses_resumed: u64,
    pub ring_wraps: u64,
    pub groups_appended: u64,
    /// Each flips the superblock's slot.
    pub checkpoints: u64,
    /// Pages of counts written, each to the slot that its parent does not name.
    pub pages_flipped: u64,
    pub batches: u64,
    pub shadowed: u64,
    pub punched: u64,
    /// Blocks that were moved together.
    pub gathered: u64,
    pub sealed: u64,
    pub in_seal: u64,
    pub digests: u64,
    pub damage_found: u64,
    pub heights: [u64; 4],
}

impl Met {
    /// A crash state was opened.
    pub fn opened(&mut self, pool: &Pool<Medium>) {
        let counters = pool.counters();
        self.replays += u64::from(counters.records_replayed > 0);
        self.takeovers += u64::from(counters.records_recovered > 0);
        self.carcasses_resumed += counters.carcasses_resumed;
    }

    /// An engine of the main line ended.
    pub fn ended(&mut self, pool: &Pool<Medium>) {
        let counters = pool.counters();
        self.ring_wraps += counters.ring_wraps;
        self.groups_appended += counters.groups_appended;
        self.checkpoints += counters.checkpoints;
        self.pages_flipped += counters.pages_written;
        self.batches += counters.batches;
        self.shadowed += counters.nodes_shadowed;
        self.punched += counters.blocks_punched;
        self.gathered += counters.blocks_gathered;
        self.reserve_used += counters.reserve_used;
        self.sealed += counters.blocks_sealed;
        for info in pool.volumes().iter().filter(|info| info.mapped_bytes > 0) {
            let height = (0..3).find(|level| info.size_bytes <= (1 << 20) << (8 * level)).unwrap_or(3);
            self.heights[height] += 1;
        }
    }

    pub fn activity(&mut self, activity: Activity) {
        self.in_commit += u64::from(activity.committing);
        self.in_checkpoint += u64::from(activity.checkpointing);
        self.in_carcass += u64::from(activity.eating);
    }

    pub fn phase(&mut self, phase: Phase) {
        self.in_superblock += u64::from(phase.superblock);
        self.in_batch += u64::from(phase.journal);
        self.in_flush += u64::from(phase.flush);
        self.in_write += u64::from(phase.write);
        self.in_punch += u64::from(phase.punch);
        self.in_extend += u64::from(phase.extend);
    }

    /// Names and counts.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("worlds", self.worlds),
            ("operations", self.operations),
            ("power cuts", self.power_cuts),
            ("power cuts in every combination", self.cuts_enumerated),
            ("process deaths", self.deaths),
            ("replays interrupted", self.replays_interrupted),
            ("crashes gone on from", self.went_on),
            ("crashes within a superblock's write", self.in_superblock),
            ("crashes within a batch's write", self.in_batch),
            ("crashes within a flush", self.in_flush),
            ("crashes within other writes", self.in_write),
            ("crashes within an extension", self.in_extend),
            ("crashes within a punch", self.in_punch),
            ("crashes within a commit", self.in_commit),
            ("crashes within a checkpoint", self.in_checkpoint),
            ("crashes within a carcass being eaten", self.in_carcass),
            ("requests sent again to a successor", self.sent_again),
            ("blocks of the reserve used", self.reserve_used),
            ("blocks punched", self.punched),
            ("blocks moved together", self.gathered),
            ("replays", self.replays),
            ("takeovers of a pending log", self.takeovers),
            ("carcasses resumed", self.carcasses_resumed),
            ("ring wraps", self.ring_wraps),
            ("groups appended", self.groups_appended),
            ("superblock slots flipped", self.checkpoints),
            ("slots of pages flipped", self.pages_flipped),
            ("batches", self.batches),
            ("nodes shadowed", self.shadowed),
            ("changes refused for space", self.no_space),
            ("blocks written of what was reserved", self.claimed),
            ("snapshots taken with others", self.snapshots_together),
            ("blocks sealed", self.sealed),
            ("crashes within a seal", self.in_seal),
            ("digests of sealed snapshots compared", self.digests),
            ("damaged blocks of sealed snapshots found", self.damage_found),
            ("trees of height 0", self.heights[0]),
            ("trees of height 1", self.heights[1]),
            ("trees of height 2", self.heights[2]),
            ("trees of height 3", self.heights[3]),
        ]
    }

    /// Adds what another world met.
    pub fn merge(&mut self, other: &Self) {
        self.worlds += other.worlds;
        self.operations += other.operations;
        self.states += other.states;
        self.power_cuts += other.power_cuts;
        self.cuts_enumerated += other.cuts_enumerated;
        self.deaths += other.deaths;
        self.replays_interrupted += other.replays_interrupted;
        self.went_on += other.went_on;
        self.no_space += other.no_space;
        self.claimed += other.claimed;
        self.sent_again += other.sent_again;
        self.reserve_used += other.reserve_used;
        self.in_commit += other.in_commit;
        self.in_checkpoint += other.in_checkpoint;
        self.in_carcass += other.in_carcass;
        self.in_superblock += other.in_superblock;
        self.in_batch += other.in_batch;
        self.in_flush += other.in_flush;
        self.in_write += other.in_write;
        self.in_punch += other.in_punch;
        self.in_extend += other.in_extend;
        self.replays += other.replays;
        self.takeovers += other.takeovers;
        self.carcasses_resumed += other.carcasses_resumed;
        self.ring_wraps += other.ring_wraps;
        self.groups_appended += other.groups_appended;
        self.checkpoints += other.checkpoints;
        self.pages_flipped += other.pages_flipped;
        self.batches += other.batches;
        self.shadowed += other.shadowed;
        self.punched += other.punched;
        self.gathered += other.gathered;
        self.snapshots_together += other.snapshots_together;
        self.sealed += other.sealed;
        self.in_seal += other.in_seal;
        self.digests += other.digests;
        self.damage_found += other.damage_found;
        for (sum, more) in self.heights.iter_mut().zip(other.heights) {
            *sum += more;
        }
    }
}

//! Counts of rare and costly things, for tests that must know that they met them and for figures.

/// What the engine is in the middle of: for tests that must know when they stopped it.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// A commit between its cut and the end of its last batch.
    pub committing: bool,
    /// A checkpoint between its instant and its end.
    pub checkpointing: bool,
    /// A carcass of which more has been eaten than the last checkpoint knows.
    pub eating: bool,
    /// Space being prepared on the host.
    pub growing: bool,
}

/// What has happened since the pool was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Nodes read from the medium.
    pub nodes_read: u64,
    /// Nodes written by checkpoints.
    pub nodes_written: u64,
    /// Nodes copied because they were shared.
    pub nodes_shadowed: u64,
    /// Data blocks redirected because they were shared.
    pub blocks_redirected: u64,
    /// Data blocks provisioned by a first write.
    pub blocks_provisioned: u64,
    /// Data blocks moved together because they were read or written together.
    #[serde(default)]
    pub blocks_gathered: u64,
    /// Pages of counts read.
    pub pages_read: u64,
    /// Pages of counts written.
    pub pages_written: u64,
    /// Times that the second block of a pair was used for a damaged first.
    pub second_copies_used: u64,
    /// Batches appended to the journal.
    pub batches: u64,
    /// Times that the journal began again at the ring's start.
    pub ring_wraps: u64,
    /// Groups taken into use.
    pub groups_appended: u64,
    /// Checkpoints, each of which flips the superblock's slot.
    pub checkpoints: u64,
    /// Records replayed when the pool was opened.
    pub records_replayed: u64,
    /// Records taken over from a predecessor's pending log.
    pub records_recovered: u64,
    /// Carcasses made.
    pub carcasses: u64,
    /// Steps of the carcass worker.
    pub leaves_eaten: u64,
    /// Carcasses that waited when the pool was opened.
    pub carcasses_resumed: u64,
    /// Writes refused by a quota.
    pub quota_hits: u64,
    /// Writes refused for want of space.
    pub space_refusals: u64,
    /// Metadata blocks taken of those that are kept back from data.
    pub reserve_used: u64,
    /// Metadata written once because no two free blocks stood together.
    pub pairs_missed: u64,
    /// Blocks whose checksum was recorded.
    pub blocks_sealed: u64,
    /// Blocks read to seal snapshots.
    pub seal_blocks_read: u64,
    /// Blocks that did not match their checksum when they were read.
    pub checksum_mismatches: u64,
    /// Blocks that were allocated on the host and written with zeros ahead of use.
    #[serde(default)]
    pub blocks_extended: u64,
    /// Blocks given back to the host.
    pub blocks_punched: u64,
    /// Bytes of batches, nodes, pages, records and superblocks written.
    pub metadata_bytes_written: u64,
    /// Bytes of data written.
    pub data_bytes_written: u64,
}

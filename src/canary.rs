//! Rules that a test build breaks on purpose, one at a time: a proof is worth what it finds when there is something to be
//! found.
//!
//! Without the feature `canary` nothing here can be switched on and every question compiles to `false`. With it,
//! `break_rule` says for the calling thread which rule is broken from now on. `tests/crash/canaries.rs` breaks each and
//! fails when nobody notices.

/// A rule of the design, section 5, and the way in which it is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Canary {
    /// O1: the cut is taken after the flush, so the data of some of its records is not durable.
    CutAfterFlush,
    /// O2: a FLUSH is answered though changes of its volume are not recorded.
    FlushWithoutRecords,
    /// O2: a snapshot is acknowledged while writes in place planned before it are in flight.
    SnapshotOverWrites,
    /// O3: a block freed by a record is reused before that is durable.
    FreedBeforeRecorded,
    /// O3: what a carcass gives back is reused before a checkpoint.
    EatenFreedAtOnce,
    /// O4: the superblock is written without a flush of what it leads to.
    SuperblockFirst,
    /// O4: one durable copy of the superblock is enough to reuse the former generation.
    OneSuperblockCopy,
    /// O4: a node is written again where it stands.
    NodesInPlace,
    /// O5: the mapping changes before the data has landed.
    MappedBeforeLanded,
    /// O6: who may overwrite in place is decided by counts.
    ExclusiveByCount,
    /// O6: a sharing ticks the clock after `shared_at` was taken.
    TickAfterSharing,
    /// O7: a freed block is reused while plans from before are in flight.
    FreedUnderPlans,
    /// O7: a block under punch may be handed out.
    PunchUnclaimed,
    /// O8: changes of one block overlap.
    RangesOverlap,
    /// O8: a range is let go before the reply has been handed over.
    LetGoBeforeReply,
    /// O9: a successor starts while I/O of its predecessor is in flight. (The lock belongs to the storage: it is the
    /// simulator's that is broken.)
    NoFence,
    /// O9: what a successor replayed is not flushed before it goes on.
    ReplayNotFlushed,
    /// O10: a change is answered and was not published.
    NotPublished,
    /// O10: a change leaves the pending log before its batch is durable.
    ReleasedBeforeRecorded,
    /// O10: memory of another session is merged.
    AnySession,
    /// The slot of a page or descriptor is chosen by generation and not by its parent.
    SlotByGeneration,
    /// Replay does not mark first what its records name.
    OnePassReplay,
    /// Checksums are not seeded with where a block belongs.
    UnseededChecksums,
    /// A flush that failed is taken for one that worked.
    FailedFlushIgnored,
    /// A flush that worked is believed though one that overlapped it has failed.
    FlushBelievedAlone,
    /// A FLUSH is answered when its batch has been written, though the flush that makes it durable has not ended.
    AnsweredWhenWritten,
    /// A block that comes free keeps its checksum.
    ChecksumKept,
    /// A snapshot is called sealed before its checksums are durable.
    SealedTooEarly,
    /// Pages of checksums are not allocated on the host before a checkpoint has to write them.
    ChecksumPagesUnprepared,
}

impl Canary {
    /// All of them.
    pub const ALL: [Self; 29] = [
        Self::CutAfterFlush,
        Self::FlushWithoutRecords,
        Self::SnapshotOverWrites,
        Self::FreedBeforeRecorded,
        Self::EatenFreedAtOnce,
        Self::SuperblockFirst,
        Self::OneSuperblockCopy,
        Self::NodesInPlace,
        Self::MappedBeforeLanded,
        Self::ExclusiveByCount,
        Self::TickAfterSharing,
        Self::FreedUnderPlans,
        Self::PunchUnclaimed,
        Self::RangesOverlap,
        Self::LetGoBeforeReply,
        Self::NoFence,
        Self::ReplayNotFlushed,
        Self::NotPublished,
        Self::ReleasedBeforeRecorded,
        Self::AnySession,
        Self::SlotByGeneration,
        Self::OnePassReplay,
        Self::UnseededChecksums,
        Self::FailedFlushIgnored,
        Self::FlushBelievedAlone,
        Self::AnsweredWhenWritten,
        Self::ChecksumKept,
        Self::SealedTooEarly,
        Self::ChecksumPagesUnprepared,
    ];
}

#[cfg(feature = "canary")]
std::thread_local! {
    static BROKEN: std::cell::Cell<Option<Canary>> = const { std::cell::Cell::new(None) };
}

/// Breaks one rule for this thread, or none.
#[cfg(feature = "canary")]
pub fn break_rule(canary: Option<Canary>) {
    BROKEN.set(canary);
}

/// Whether a rule is to be broken.
#[cfg(feature = "canary")]
pub fn is_broken(canary: Canary) -> bool {
    BROKEN.get() == Some(canary)
}

/// Whether a rule is to be broken: never, in this build.
#[cfg(not(feature = "canary"))]
#[inline(always)]
pub const fn is_broken(_canary: Canary) -> bool {
    false
}

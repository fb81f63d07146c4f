//! What the blocks in use are for.
//!
//! Invariant, of every durable checkpoint: *used = own + kept + metadata + layout of the groups*. Metadata is counted where it
//! is taken and given up, which is always known for certain: a node, record or table has one holder who gives it up, or
//! others stay. What is neither metadata nor layout is data; of it, *own* is what the volumes own, and *kept* what none does:
//! what snapshots keep of what their volume has overwritten or given up, and what came from an origin that is gone. While
//! carcasses wait, what they still hold counts for either: for own, where the volume's account has not gone down yet.
//!
//! A snapshot's own bytes are its volume's at that instant, so they are no sum's part.

use super::state::State;

/// What a checkpoint holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Instant {
    /// Blocks of metadata taken since the pool was opened, less those given up.
    change: i64,
    own_blocks: u64,
    /// Of the groups in use then.
    layout_blocks: u64,
}

/// Blocks by what they are for.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    /// Blocks of metadata when the pool was opened; none while they have not been counted.
    opened_with: Option<u64>,
    change: i64,
    last: Instant,
}

impl Accounts {
    pub(super) fn new(metadata_blocks: Option<u64>) -> Self {
        Self { opened_with: metadata_blocks, ..Self::default() }
    }

    /// What the checkpoint holds that was found.
    pub(super) fn opened(&mut self, own_blocks: u64, layout_blocks: u64) {
        self.last = Instant { change: 0, own_blocks, layout_blocks };
    }

    /// Blocks became metadata.
    pub(super) fn took(&mut self, blocks: u64) {
        self.change += blocks as i64;
    }

    /// Blocks are metadata no more.
    pub(super) fn gave(&mut self, blocks: u64) {
        self.change -= blocks as i64;
    }

    /// Blocks of metadata now.
    pub(super) fn metadata_blocks(&self) -> Option<u64> {
        self.opened_with.map(|blocks| blocks.saturating_add_signed(self.change))
    }

    pub(super) fn instant(&self, own_blocks: u64, layout_blocks: u64) -> Instant {
        Instant { change: self.change, own_blocks, layout_blocks }
    }

    pub(super) fn checkpointed(&mut self, instant: Instant) {
        self.last = instant;
    }

    /// Of the last checkpoint.
    pub(super) fn last(&self) -> Instant {
        self.last
    }

    /// A check has counted the metadata of the checkpoint of `instant`.
    pub(super) fn counted(&mut self, instant: Instant, metadata_blocks: u64) {
        let opened_with = metadata_blocks.saturating_add_signed(-instant.change);
        self.opened_with.get_or_insert(opened_with);
    }
}

/// The blocks in use of the last checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uses {
    pub(super) own_blocks: u64,
    /// None while metadata has not been counted.
    pub(super) kept_blocks: Option<u64>,
    pub(super) metadata_blocks: Option<u64>,
    pub(super) layout_blocks: u64,
}

impl State {
    /// What all volumes own, without snapshots.
    pub(super) fn own_of_volumes(&self) -> u64 {
        let volumes = self.volumes.values().filter(|volume| !volume.record.flags.read_only);
        volumes.map(|volume| volume.record.own_blocks).sum()
    }

    /// What the groups in use have for their own purposes.
    pub(super) fn layout_blocks(&self) -> u64 {
        (0..self.groups_in_use).map(|group| self.geometry.layout_blocks(group)).sum()
    }

    /// What the blocks are for that the last checkpoint counts.
    pub(super) fn uses(&self) -> Uses {
        let Instant { change, own_blocks, layout_blocks } = self.accounts.last;
        let metadata_blocks = self.accounts.opened_with.map(|blocks| blocks.saturating_add_signed(change));
        let kept_blocks = metadata_blocks
            .map(|metadata| self.used_blocks.saturating_sub(layout_blocks).saturating_sub(metadata + own_blocks));
        Uses { own_blocks, kept_blocks, metadata_blocks, layout_blocks }
    }
}

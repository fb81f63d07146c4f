//! Memory that outlives the engine: changes that were made and perhaps acknowledged, but are not durable yet.
//!
//! Rule O10: a change is published here, in the order of its LSN and before its request is answered, and stays until
//! its batch or a superblock at or above it is durable. When the engine process dies, its successor replays superblock,
//! journal, then this. A power cut loses it, as it loses a disk's cache.

use super::work::{NoBoard, WorkBoard};
use crate::units::Lsn;

/// Changes published and not yet durable, in order. In production this is shared memory held by the front.
pub trait PendingLog: 'static {
    /// A random number that names this memory's life. The superblock records it; memory of another session is refused.
    fn session(&self) -> u128;

    /// Bytes that can be published at the moment.
    fn free_bytes(&self) -> usize;

    /// Publishes the encoded record of change `lsn`, the one after the last published. One step: a reader finds all of
    /// it or none.
    ///
    /// # Panics
    /// When the record is larger than [`free_bytes`](PendingLog::free_bytes); the engine asks before it changes anything.
    fn publish(&mut self, lsn: Lsn, record: &[u8]);

    /// Forgets all changes up to and including `through`: they are durable.
    fn release(&mut self, through: Lsn);

    /// Marks the pool as poisoned: a successor must refuse to go on.
    fn poison(&mut self);

    /// Whether a predecessor poisoned the pool.
    fn is_poisoned(&self) -> bool;

    /// What a predecessor left: LSN and encoded record, in order. Empty in a new memory.
    fn published(&self) -> Vec<(Lsn, Vec<u8>)>;

    /// Where the engine notes what it is at; by default nowhere.
    fn board(&self) -> Box<dyn WorkBoard> {
        Box::new(NoBoard)
    }
}

/// A [`PendingLog`] in private memory, for work on a pool that no front holds: it dies with the process, which answers
/// only what it has committed.
#[derive(Debug, Default)]
pub struct PrivateLog {
    session: u128,
    used_bytes: usize,
    records: std::collections::VecDeque<(Lsn, Vec<u8>)>,
    poisoned: bool,
}

/// Bound of a pending log in bytes; when it is full, changes wait as for a full ring.
pub const PENDING_LOG_BYTES: usize = 4 << 20;

impl PrivateLog {
    /// An empty log of the life named `session`.
    pub fn new(session: u128) -> Self {
        Self { session, ..Self::default() }
    }
}

impl PendingLog for PrivateLog {
    fn session(&self) -> u128 {
        self.session
    }

    fn free_bytes(&self) -> usize {
        PENDING_LOG_BYTES - self.used_bytes
    }

    fn publish(&mut self, lsn: Lsn, record: &[u8]) {
        assert!(record.len() <= self.free_bytes(), "the engine asks for room first");
        self.used_bytes += record.len();
        self.records.push_back((lsn, record.to_vec()));
    }

    fn release(&mut self, through: Lsn) {
        while self.records.front().is_some_and(|(lsn, _)| *lsn <= through) {
            if let Some((_, record)) = self.records.pop_front() {
                self.used_bytes -= record.len();
            }
        }
    }

    fn poison(&mut self) {
        self.poisoned = true;
    }

    fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    fn published(&self) -> Vec<(Lsn, Vec<u8>)> {
        self.records.iter().cloned().collect()
    }
}

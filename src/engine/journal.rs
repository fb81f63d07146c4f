//! The pool's one log of changes: what is made, what is recorded, and where the next batch goes.
//!
//! An LSN is taken in the same step that changes the map and publishes the record, so what is published is a prefix of
//! what happened, for all volumes. The ring is filled with whole batches; one that does not fit before its end starts at
//! its beginning. Space comes free when a superblock that names a later position is durable.

use std::collections::VecDeque;

use crate::canary::{Canary, is_broken};
use crate::format::{JOURNAL_FIRST, Record};
use crate::units::{Lsn, PoolBlock};

use super::PendingLog;

/// Where the next batch goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct JournalPosition {
    /// Block within the ring.
    pub(super) append: u64,
    /// Checksum of the batch before.
    pub(super) chain: u32,
    /// Blocks appended or skipped since the pool was opened.
    pub(super) total: u64,
}

pub(super) struct Journal {
    ring_blocks: u64,
    next: Lsn,
    durable: Lsn,
    pending: VecDeque<(Lsn, u32)>,
    bytes: VecDeque<u8>,
    position: JournalPosition,
    head_total: u64,
    scratch: Vec<u8>,
    /// Times that a batch started at the ring's beginning again.
    pub(super) wraps: u64,
}

/// Records to be appended as one batch.
pub(super) struct Cut {
    pub(super) first: Lsn,
    pub(super) last: Lsn,
    pub(super) records: Vec<u8>,
}

/// A batch that has its place in the ring.
pub(super) struct Batch {
    /// LSN of its last record.
    pub(super) last: Lsn,
    /// Block within the ring.
    pub(super) at: u64,
    /// Blocks left out before it, at the ring's end.
    pub(super) skipped: u64,
    pub(super) blocks: u64,
    /// Its checksum, which the next one names.
    pub(super) chain: u32,
}

impl Batch {
    pub(super) fn address(&self) -> PoolBlock {
        PoolBlock(JOURNAL_FIRST.0 + self.at)
    }
}

impl Journal {
    /// A journal whose records up to `durable` are on the medium and whose next batch goes to `position`.
    pub(super) fn new(ring_blocks: u64, durable: Lsn, position: JournalPosition) -> Self {
        Self {
            ring_blocks,
            next: durable.next(),
            durable,
            pending: VecDeque::new(),
            bytes: VecDeque::new(),
            position,
            head_total: 0,
            scratch: Vec::new(),
            wraps: 0,
        }
    }

    /// LSN that the next change will get.
    pub(super) fn next(&self) -> Lsn {
        self.next
    }

    /// LSN of the last change made.
    pub(super) fn last(&self) -> Lsn {
        Lsn(self.next.0 - 1)
    }

    /// Changes up to here are recorded or checkpointed.
    pub(super) fn durable(&self) -> Lsn {
        self.durable
    }

    /// After opening: so many blocks behind the superblock's position hold records.
    pub(super) fn set_used(&mut self, blocks: u64) {
        self.head_total = self.position.total - blocks;
    }

    pub(super) fn position(&self) -> JournalPosition {
        self.position
    }

    /// Bytes of records that wait for a batch.
    pub(super) fn pending_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Makes a change known: takes its LSN and publishes it.
    pub(super) fn publish(&mut self, record: &Record, log: &mut dyn PendingLog) -> Lsn {
        self.scratch.clear();
        record.encode(&mut self.scratch);
        let lsn = self.next;
        if !is_broken(Canary::NotPublished) {
            log.publish(lsn, &self.scratch);
        }
        self.push(lsn, self.scratch.len());
        lsn
    }

    /// Takes over a change that a predecessor published and that has been replayed.
    pub(super) fn adopt(&mut self, lsn: Lsn, record: &[u8]) {
        debug_assert_eq!(lsn, self.next);
        self.scratch.clear();
        self.scratch.extend_from_slice(record);
        self.push(lsn, record.len());
    }

    fn push(&mut self, lsn: Lsn, length: usize) {
        self.next = lsn.next();
        self.pending.push_back((lsn, length as u32));
        self.bytes.extend(&self.scratch);
    }

    /// Copies the pending records up to `through` out, as many as fit one batch of `bytes_max`. They stay pending until
    /// [`recorded`](Self::recorded).
    pub(super) fn cut(&self, through: Lsn, bytes_max: usize) -> Option<Cut> {
        let first = self.pending.front()?.0;
        let mut length = 0;
        let mut last = None;
        for (lsn, bytes) in &self.pending {
            if *lsn > through || length + *bytes as usize > bytes_max {
                break;
            }
            length += *bytes as usize;
            last = Some(*lsn);
        }
        let (front, back) = self.bytes.as_slices();
        let mut records = Vec::with_capacity(length);
        records.extend_from_slice(front.get(..length).unwrap_or(front));
        records.extend_from_slice(back.get(..length - records.len()).unwrap_or(back));
        Some(Cut { first, last: last?, records })
    }

    /// Where a batch of `blocks` goes, and the blocks skipped before it; `None` while the ring has no room.
    pub(super) fn room(&self, blocks: u64) -> Option<(u64, u64)> {
        let (at, skipped) = if self.position.append + blocks <= self.ring_blocks {
            (self.position.append, 0)
        } else {
            (0, self.ring_blocks - self.position.append)
        };
        (self.used() + skipped + blocks < self.ring_blocks).then_some((at, skipped))
    }

    /// Blocks of the ring in use.
    pub(super) fn used(&self) -> u64 {
        self.position.total - self.head_total
    }

    pub(super) fn ring_blocks(&self) -> u64 {
        self.ring_blocks
    }

    /// A batch is durable.
    pub(super) fn recorded(&mut self, batch: &Batch) {
        let Batch { last, at, skipped, blocks, chain } = *batch;
        self.wraps += u64::from(at == 0 && self.position.total > 0);
        self.position = JournalPosition { append: at + blocks, chain, total: self.position.total + skipped + blocks };
        self.durable_through(last);
    }

    /// A superblock that holds all changes up to `lsn` and starts at `head` is durable.
    pub(super) fn checkpointed(&mut self, lsn: Lsn, head: JournalPosition) {
        self.head_total = head.total;
        self.durable_through(lsn);
    }

    fn durable_through(&mut self, lsn: Lsn) {
        self.durable = self.durable.max(lsn);
        while let Some((first, length)) = self.pending.front()
            && *first <= lsn
        {
            self.bytes.drain(..*length as usize);
            self.pending.pop_front();
        }
    }
}

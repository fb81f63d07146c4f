//! The pending log in shared memory: rule O10.
//!
//! A ring of records in a memfd that the front holds. A record is written behind the tail and then *published* by one
//! store of the tail: whoever maps the memory afterwards finds all of it or none, at whatever instant the writer died.
//! Releasing moves the head. Positions count bytes from the beginning of the session and never wrap; the place in the
//! ring is the position modulo its size.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::board::SharedBoard;
use super::memory::SharedMemory;
use crate::engine::{PENDING_LOG_BYTES, PendingLog, WorkBoard};
use crate::error::{Error, Result};
use crate::units::Lsn;

const MAGIC: u64 = u64::from_le_bytes(*b"plywoodP");
/// Version of this memory's layout. A new engine build proves that it knows it before the old one goes.
pub const PENDING_LOG_VERSION: u32 = 1;

const VERSION: usize = 8;
const RING_BYTES: usize = 16;
const UUID: usize = 24;
const SESSION: usize = 40;
const POISONED: usize = 56;
const HEAD: usize = 64;
const TAIL: usize = 128;
const RELEASED: usize = 192;
/// Header page; the ring follows.
const RING: usize = 4096;

/// A record: LSN (8), length (4), checksum over LSN and bytes (4), bytes, up to a multiple of 8.
const RECORD_HEADER: usize = 16;
/// Kept back when room is announced, so that an operation with many small records finds room for their headers too.
const MARGIN: usize = 64 << 10;

/// [`PendingLog`] in memory that outlives the engine.
#[derive(Debug)]
pub struct SharedPendingLog {
    memory: SharedMemory,
    session: u128,
    /// Positions as the header has them: only this process writes them.
    head: u64,
    tail: u64,
    last: Option<Lsn>,
}

/// A record found in the ring, and the position behind it.
struct Found {
    lsn: Lsn,
    bytes: Vec<u8>,
    next: u64,
}

impl SharedPendingLog {
    /// New, empty memory for the pool `pool`, of the life named `session`.
    ///
    /// # Errors
    /// What the host answers.
    pub fn create(pool: Uuid, session: u128) -> Result<Self> {
        let memory = SharedMemory::create("plywood-pending", RING + PENDING_LOG_BYTES)?;
        memory.atomic_u32(VERSION).store(PENDING_LOG_VERSION, Ordering::Relaxed);
        memory.atomic_u64(RING_BYTES).store(PENDING_LOG_BYTES as u64, Ordering::Relaxed);
        memory.write(UUID, pool.as_bytes());
        memory.write(SESSION, &session.to_ne_bytes());
        memory.atomic_u64(0).store(MAGIC, Ordering::Release);
        Ok(Self { memory, session, head: 0, tail: 0, last: None })
    }

    /// Maps what a predecessor left for the pool `pool`, or what the front made.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when it is of another version or pool, or anything in it contradicts itself.
    pub fn open(descriptor: OwnedFd, pool: Uuid) -> Result<Self> {
        let Self { memory, session, .. } = Self::keep(descriptor, pool)?;
        let refuse = |what: String| Err(Error::Incompatible(format!("memory of pending changes: {what}")));
        // A predecessor that was not buried: its front died with it, or before it.
        SharedBoard::new(Arc::clone(memory.mapping())).clear();
        let head = memory.atomic_u64(HEAD).load(Ordering::Acquire);
        let tail = memory.atomic_u64(TAIL).load(Ordering::Acquire);
        if tail < head || tail - head > PENDING_LOG_BYTES as u64 || !head.is_multiple_of(8) || !tail.is_multiple_of(8) {
            return refuse(format!("records from {head} to {tail} are out of bounds"));
        }
        let mut log = Self { memory, session, head, tail, last: None };
        let mut position = head;
        while position < tail {
            let Some(found) = log.found(position) else {
                return refuse(format!("the record at {position} is damaged"));
            };
            if log.last.is_some_and(|last| last.0.checked_add(1) != Some(found.lsn.0)) {
                return refuse(format!("the record at {position} leaves a gap before change {}", found.lsn));
            }
            log.last = Some(found.lsn);
            position = found.next;
        }
        // A predecessor that died while it released.
        log.release(Lsn(log.memory.atomic_u64(RELEASED).load(Ordering::Relaxed)));
        Ok(log)
    }

    /// Holds memory that an earlier front made, for the next engine. Looks at the header only and changes nothing: the last
    /// engine of that front may still be at work. To be given to engines, not to be published in.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when it is of another version or pool.
    pub fn keep(descriptor: OwnedFd, pool: Uuid) -> Result<Self> {
        let memory = SharedMemory::open(descriptor)?;
        let refuse = |what: String| Err(Error::Incompatible(format!("memory of pending changes: {what}")));
        if memory.len() != RING + PENDING_LOG_BYTES || memory.atomic_u64(0).load(Ordering::Acquire) != MAGIC {
            return refuse("size or magic number is wrong".into());
        }
        let version = memory.atomic_u32(VERSION).load(Ordering::Relaxed);
        if version != PENDING_LOG_VERSION {
            return refuse(format!("version is {version}, this build knows {PENDING_LOG_VERSION}"));
        }
        if memory.atomic_u64(RING_BYTES).load(Ordering::Relaxed) != PENDING_LOG_BYTES as u64 {
            return refuse("size of the ring is wrong".into());
        }
        let (mut uuid, mut session) = ([0; 16], [0; 16]);
        memory.read(UUID, &mut uuid);
        memory.read(SESSION, &mut session);
        if uuid != *pool.as_bytes() {
            return refuse(format!("it belongs to pool {}, not to {pool}", Uuid::from_bytes(uuid)));
        }
        Ok(Self { memory, session: u128::from_ne_bytes(session), head: 0, tail: 0, last: None })
    }

    /// Whether it holds changes, as of now, whoever publishes and releases them.
    pub fn holds_changes(&self) -> bool {
        let position = |at| self.memory.atomic_u64(at).load(Ordering::Acquire);
        position(HEAD) != position(TAIL)
    }

    /// The memfd, for the process that shall own the memory or open it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.descriptor()
    }

    /// Where it stands what the engine is at, in the same memory.
    pub fn board_of_engine(&self) -> SharedBoard {
        SharedBoard::new(Arc::clone(self.memory.mapping()))
    }

    fn used(&self) -> usize {
        usize::try_from(self.tail - self.head).unwrap_or(PENDING_LOG_BYTES)
    }

    /// The record at `position`, when it is sound.
    fn found(&self, position: u64) -> Option<Found> {
        let room = usize::try_from(self.tail.checked_sub(position)?).ok()?;
        if room < RECORD_HEADER {
            return None;
        }
        let (mut lsn, mut len, mut checksum) = ([0; 8], [0; 4], [0; 4]);
        self.copy_out(position, &mut lsn);
        self.copy_out(position + 8, &mut len);
        self.copy_out(position + 12, &mut checksum);
        let len = u32::from_ne_bytes(len) as usize;
        if len > room - RECORD_HEADER {
            return None;
        }
        let next = position + record_bytes(len) as u64;
        if next > self.tail {
            return None;
        }
        let mut bytes = vec![0; len];
        self.copy_out(position + RECORD_HEADER as u64, &mut bytes);
        let lsn = Lsn(u64::from_ne_bytes(lsn));
        (checksum_of(lsn, &bytes) == u32::from_ne_bytes(checksum)).then_some(Found { lsn, bytes, next })
    }

    fn place(position: u64) -> usize {
        usize::try_from(position % PENDING_LOG_BYTES as u64).unwrap_or(0)
    }

    fn copy_in(&self, position: u64, from: &[u8]) {
        let place = Self::place(position);
        let (first, wrapped) = from.split_at(from.len().min(PENDING_LOG_BYTES - place));
        self.memory.write(RING + place, first);
        self.memory.write(RING, wrapped);
    }

    fn copy_out(&self, position: u64, into: &mut [u8]) {
        let place = Self::place(position);
        let (first, wrapped) = into.split_at_mut(into.len().min(PENDING_LOG_BYTES - place));
        self.memory.read(RING + place, first);
        self.memory.read(RING, wrapped);
    }

    /// Writes a record behind the tail: nobody sees it yet. Returns the position behind it.
    fn prepare(&self, lsn: Lsn, record: &[u8]) -> u64 {
        let len = record.len();
        assert!(record_bytes(len) <= PENDING_LOG_BYTES - self.used(), "the engine asks for room first");
        let mut header = [0; RECORD_HEADER];
        header[..8].copy_from_slice(&lsn.0.to_ne_bytes());
        header[8..12].copy_from_slice(&u32::try_from(len).expect("it fits in the ring").to_ne_bytes());
        header[12..].copy_from_slice(&checksum_of(lsn, record).to_ne_bytes());
        self.copy_in(self.tail, &header);
        self.copy_in(self.tail + RECORD_HEADER as u64, record);
        self.tail + record_bytes(len) as u64
    }
}

fn record_bytes(len: usize) -> usize {
    (RECORD_HEADER + len).next_multiple_of(8)
}

fn checksum_of(lsn: Lsn, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&lsn.0.to_ne_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

impl PendingLog for SharedPendingLog {
    fn session(&self) -> u128 {
        self.session
    }

    fn free_bytes(&self) -> usize {
        (PENDING_LOG_BYTES - self.used()).saturating_sub(MARGIN)
    }

    fn publish(&mut self, lsn: Lsn, record: &[u8]) {
        debug_assert!(self.last.is_none_or(|last| last.next() == lsn), "changes are published without gaps");
        let tail = self.prepare(lsn, record);
        // The publication: everything before it is visible to whoever reads this tail.
        self.memory.atomic_u64(TAIL).store(tail, Ordering::Release);
        self.tail = tail;
        self.last = Some(lsn);
    }

    fn release(&mut self, through: Lsn) {
        let mut head = self.head;
        while head < self.tail {
            let mut lsn = [0; 8];
            let mut len = [0; 4];
            self.copy_out(head, &mut lsn);
            self.copy_out(head + 8, &mut len);
            if Lsn(u64::from_ne_bytes(lsn)) > through {
                break;
            }
            // Our own record, or one that `open` has checked.
            head += record_bytes(u32::from_ne_bytes(len) as usize) as u64;
        }
        self.head = head.min(self.tail);
        let released = self.memory.atomic_u64(RELEASED);
        released.store(through.0.max(released.load(Ordering::Relaxed)), Ordering::Release);
        self.memory.atomic_u64(HEAD).store(self.head, Ordering::Release);
    }

    fn poison(&mut self) {
        self.memory.atomic_u32(POISONED).store(1, Ordering::Release);
    }

    fn is_poisoned(&self) -> bool {
        self.memory.atomic_u32(POISONED).load(Ordering::Acquire) != 0
    }

    fn board(&self) -> Box<dyn WorkBoard> {
        let board = self.board_of_engine();
        board.count();
        Box::new(board)
    }

    fn published(&self) -> Vec<(Lsn, Vec<u8>)> {
        let mut records = Vec::new();
        let mut position = self.head;
        while position < self.tail {
            // `open` has checked them all; damage since then ends the list, and replay refuses the gap it leaves.
            let Some(found) = self.found(position) else { break };
            records.push((found.lsn, found.bytes));
            position = found.next;
        }
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: Uuid = Uuid::from_u128(42);

    fn log() -> SharedPendingLog {
        SharedPendingLog::create(POOL, 7).unwrap()
    }

    fn reopened(log: &SharedPendingLog) -> Result<SharedPendingLog> {
        SharedPendingLog::open(log.descriptor().try_clone_to_owned().unwrap(), POOL)
    }

    fn record(lsn: u64) -> Vec<u8> {
        vec![lsn.to_le_bytes()[0]; usize::try_from(lsn * 37 % 501).unwrap()]
    }

    #[test]
    fn successor_reads_what_was_published_and_not_released() {
        let mut log = log();
        for lsn in 10..20 {
            log.publish(Lsn(lsn), &record(lsn));
        }
        log.release(Lsn(13));
        log.release(Lsn(2));
        let successor = reopened(&log).unwrap();
        assert_eq!(successor.session(), 7);
        let expected: Vec<_> = (14..20).map(|lsn| (Lsn(lsn), record(lsn))).collect();
        assert_eq!(successor.published(), expected);
        assert_eq!(successor.free_bytes(), log.free_bytes());
    }

    #[test]
    fn ring_wraps_many_times_and_keeps_every_record() {
        let mut log = log();
        let (mut released, mut wraps) = (0, 0);
        for lsn in 1..120_000 {
            if log.free_bytes() < 600 || lsn - released > 3000 {
                released += (lsn - released) / 2;
                log.release(Lsn(released));
            }
            let before = SharedPendingLog::place(log.tail);
            log.publish(Lsn(lsn), &record(lsn));
            wraps += u32::from(SharedPendingLog::place(log.tail) < before);
            if lsn % 9973 == 0 {
                let mut successor = reopened(&log).unwrap();
                let expected: Vec<_> = (released + 1..=lsn).map(|lsn| (Lsn(lsn), record(lsn))).collect();
                assert_eq!(successor.published(), expected);
                successor.publish(Lsn(lsn + 1), b"the successor goes on");
            }
        }
        assert!(wraps > 3, "the ring wrapped {wraps} times");
    }

    #[test]
    fn announced_room_is_enough_for_one_record_or_many() {
        let mut log = log();
        let room = log.free_bytes();
        log.publish(Lsn(1), &vec![1; room]);
        assert_eq!(log.free_bytes(), 0);
        log.release(Lsn(1));
        assert_eq!(log.free_bytes(), room);
        // An operation on 1 MiB has 256 records at most.
        for lsn in 2..258 {
            log.publish(Lsn(lsn), &vec![2; room / 256]);
        }
        assert_eq!(reopened(&log).unwrap().published().len(), 256);
    }

    #[test]
    #[should_panic(expected = "asks for room first")]
    fn record_that_does_not_fit_panics() {
        log().publish(Lsn(1), &vec![0; PENDING_LOG_BYTES]);
    }

    #[test]
    fn record_of_a_writer_that_died_before_the_publication_is_not_there() {
        let mut log = log();
        log.publish(Lsn(1), b"one");
        log.prepare(Lsn(2), b"two");
        let mut successor = reopened(&log).unwrap();
        assert_eq!(successor.published(), [(Lsn(1), b"one".to_vec())]);
        successor.publish(Lsn(2), b"another two");
        assert_eq!(reopened(&log).unwrap().published()[1], (Lsn(2), b"another two".to_vec()));
    }

    #[test]
    fn release_cut_short_by_death_is_completed() {
        let mut log = log();
        log.publish(Lsn(1), b"one");
        log.publish(Lsn(2), b"two");
        log.memory.atomic_u64(RELEASED).store(1, Ordering::Release);
        assert_eq!(reopened(&log).unwrap().published(), [(Lsn(2), b"two".to_vec())]);
    }

    #[test]
    fn poison_outlives_the_engine() {
        let mut log = log();
        assert!(!log.is_poisoned());
        log.poison();
        assert!(reopened(&log).unwrap().is_poisoned());
    }

    #[test]
    fn memory_kept_over_fronts_is_the_same_to_the_next_engine() {
        let mut log = log();
        log.publish(Lsn(1), b"one");
        let kept = SharedPendingLog::keep(log.descriptor().try_clone_to_owned().unwrap(), POOL).unwrap();
        assert_eq!((kept.session(), kept.holds_changes(), kept.is_poisoned()), (7, true, false));
        // The last engine is still at work: who keeps the memory is in nobody's way.
        log.publish(Lsn(2), b"two");
        log.release(Lsn(1));
        assert_eq!(reopened(&kept).unwrap().published(), [(Lsn(2), b"two".to_vec())]);
        log.release(Lsn(2));
        assert!(!kept.holds_changes());
        let other = SharedPendingLog::keep(log.descriptor().try_clone_to_owned().unwrap(), Uuid::from_u128(43));
        assert!(matches!(other, Err(Error::Incompatible(_))));
    }

    #[test]
    fn foreign_or_newer_memory_is_refused() {
        let log = log();
        let other = SharedPendingLog::open(log.descriptor().try_clone_to_owned().unwrap(), Uuid::from_u128(43));
        assert!(matches!(other, Err(Error::Incompatible(_))));
        log.memory.atomic_u32(VERSION).store(2, Ordering::Relaxed);
        assert!(matches!(reopened(&log), Err(Error::Incompatible(_))));
        let strange = SharedMemory::create("strange", 8192).unwrap();
        let strange = strange.descriptor().try_clone_to_owned().unwrap();
        assert!(matches!(SharedPendingLog::open(strange, POOL), Err(Error::Incompatible(_))));
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic() {
        let mut random = fastrand::Rng::with_seed(1);
        let (mut refused, mut opened) = (0, 0);
        for _ in 0..3000 {
            let mut log = log();
            for lsn in 1..random.u64(2..40) {
                log.publish(Lsn(lsn), &record(lsn));
            }
            log.release(Lsn(random.u64(0..5)));
            for _ in 0..random.usize(1..4) {
                let end = if random.bool() { RING } else { RING + 8192 };
                log.memory.write(random.usize(0..end), &[random.u8(..)]);
            }
            match reopened(&log) {
                Ok(successor) => {
                    opened += 1;
                    successor.published();
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 100 && opened > 100, "{refused} refused, {opened} opened");
    }
}

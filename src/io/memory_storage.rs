//! A pool in plain memory, for tests and benchmarks.
//!
//! There are two ways to complete operations. A [`new`](MemoryStorage::new) storage carries each one out when it is
//! called. A [`scrambled`](MemoryStorage::scrambled) one only queues it: each call of
//! [`run_one`](MemoryStorage::run_one) picks a queued operation by its seed and carries out one block of it, so that
//! operations in flight overlap, tear and overtake each other as they may on a real disk. What the engine writes is read
//! from its memory only then, which shows when it changes memory that an operation still owns.
//!
//! Bytes are never lost here, and flushes have no effect but to be counted: power cuts are the crash simulator's matter.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::memory::IoMemory;
use crate::engine::{Memory, Storage};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE};

type Blocks = HashMap<u64, Box<[u8; BLOCK_SIZE]>, rustc_hash::FxBuildHasher>;

/// A copy of all that a [`MemoryStorage`] held at an instant. Blocks that were never written, or were punched, take
/// no room.
#[derive(Clone, Debug, Default)]
pub struct MemoryImage {
    blocks: Blocks,
    size_bytes: u64,
}

impl MemoryImage {
    /// Copies `into.len()` bytes from `offset` out, zeros where nothing is.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for_each_block(offset, into.len(), |block, within, range| match self.blocks.get(&block) {
            Some(bytes) => into[range.clone()].copy_from_slice(&bytes[within..within + range.len()]),
            None => into[range].fill(0),
        });
    }

    /// Changes bytes behind the engine's back, as damage on a disk does.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        for_each_block(offset, from.len(), |block, within, range| {
            let bytes = self.blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK_SIZE]));
            bytes[within..within + range.len()].copy_from_slice(&from[range]);
        });
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Parts of `range` (bytes) that take no room, by whole blocks.
    fn holes(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        holes_between(range, |block| self.blocks.contains_key(&block))
    }

    /// Numbers of the blocks that take room, in ascending order.
    pub fn written_blocks(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self.blocks.keys().copied().collect();
        blocks.sort_unstable();
        blocks
    }
}

/// What a [`MemoryStorage`] was asked for so far. Bytes and calls are counted when an operation is issued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStatistics {
    /// Calls of `read`.
    pub reads: u64,
    /// Bytes asked for.
    pub read_bytes: u64,
    /// Calls of `write` and `write_durable`.
    pub writes: u64,
    /// Bytes to be written by them.
    pub written_bytes: u64,
    /// Those of `writes` that were durable ones.
    pub durable_writes: u64,
    /// Calls of `flush`.
    pub flushes: u64,
    /// Bytes given to `extend`.
    pub extended_bytes: u64,
    /// Bytes given to `punch`.
    pub punched_bytes: u64,
    /// Writes and punches that were issued while another one in flight covered some of their bytes: on a disk either
    /// could win. (Extensions count as writes.)
    pub overlapping_changes: u64,
    /// Most operations that were in flight at a time.
    pub most_in_flight: u64,
}

/// A pool in memory. A clone is another handle to the same pool.
#[derive(Clone)]
pub struct MemoryStorage {
    state: Rc<RefCell<State>>,
}

struct State {
    image: MemoryImage,
    alignment: usize,
    statistics: MemoryStatistics,
    /// Pseudo-random state; none completes every operation at its call.
    scramble: Option<u64>,
    pending: Vec<Pending>,
    /// How many more operations succeed before one fails, and its errno.
    fault: Option<(u64, i32)>,
}

struct Pending {
    action: Action,
    /// Pieces not carried out yet, as ranges of offsets; none is across a block's border.
    pieces: Vec<Range<u64>>,
    fault: Option<i32>,
    done: Rc<RefCell<Done>>,
}

#[derive(Clone)]
enum Action {
    Read(u64, IoMemory),
    Write(u64, IoMemory),
    Flush,
    Extend(Range<u64>),
    Punch(Range<u64>),
}

impl Action {
    fn range(&self) -> Range<u64> {
        match self {
            Self::Read(offset, memory) | Self::Write(offset, memory) => *offset..*offset + memory.len() as u64,
            Self::Flush => 0..0,
            Self::Extend(range) | Self::Punch(range) => range.clone(),
        }
    }

    fn changes(&self) -> bool {
        !matches!(self, Self::Read(..) | Self::Flush)
    }
}

#[derive(Default)]
struct Done {
    result: Option<io::Result<()>>,
    waker: Option<Waker>,
}

/// Waits for an operation of a [`MemoryStorage`].
#[must_use = "an operation ends unseen when its future is dropped"]
pub struct MemoryCompletion {
    done: Rc<RefCell<Done>>,
}

impl Future for MemoryCompletion {
    type Output = io::Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut done = self.done.borrow_mut();
        if let Some(result) = done.result.take() {
            return Poll::Ready(result);
        }
        done.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl MemoryStorage {
    /// An empty storage of `size_bytes` whose operations are carried out when they are called.
    pub fn new(size_bytes: u64) -> Self {
        Self::from_image(MemoryImage { blocks: Blocks::default(), size_bytes })
    }

    /// An empty storage whose operations wait for [`run_one`](Self::run_one), in an order that `seed` decides.
    pub fn scrambled(size_bytes: u64, seed: u64) -> Self {
        Self::scrambled_from_image(MemoryImage { blocks: Blocks::default(), size_bytes }, seed)
    }

    /// A storage that holds `image`, as [`new`](Self::new) otherwise.
    pub fn from_image(image: MemoryImage) -> Self {
        let state = State {
            image,
            alignment: 512,
            statistics: MemoryStatistics::default(),
            scramble: None,
            pending: Vec::new(),
            fault: None,
        };
        Self { state: Rc::new(RefCell::new(state)) }
    }

    /// A storage that holds `image`, as [`scrambled`](Self::scrambled) otherwise.
    pub fn scrambled_from_image(image: MemoryImage, seed: u64) -> Self {
        let storage = Self::from_image(image);
        storage.state.borrow_mut().scramble = Some(seed);
        storage
    }

    /// The same storage with another alignment than 512: 4096.
    #[must_use]
    pub fn with_alignment(self, alignment: usize) -> Self {
        assert!(alignment == 512 || alignment == 4096, "alignment is 512 or 4096");
        self.state.borrow_mut().alignment = alignment;
        self
    }

    /// A copy of what it holds now. Operations still queued are not in it.
    pub fn snapshot_image(&self) -> MemoryImage {
        self.state.borrow().image.clone()
    }

    /// What was asked of it so far.
    pub fn statistics(&self) -> MemoryStatistics {
        self.state.borrow().statistics
    }

    /// Makes the storage larger, as growing the pool's file does.
    pub fn grow(&self, size_bytes: u64) {
        let mut state = self.state.borrow_mut();
        state.image.size_bytes = state.image.size_bytes.max(size_bytes);
    }

    /// Makes one operation fail with `errno`, unchanged: the next one after `after` more have been issued.
    pub fn fail_operation(&self, after: u64, errno: i32) {
        self.state.borrow_mut().fault = Some((after, errno));
    }

    /// Operations issued and not complete. Always 0 unless scrambled.
    pub fn pending(&self) -> usize {
        self.state.borrow().pending.len()
    }

    /// Carries out one block of one queued operation, chosen by the seed, and completes it when that was the last.
    /// Answers false when nothing is queued.
    pub fn run_one(&self) -> bool {
        let waker = {
            let mut state = self.state.borrow_mut();
            if state.pending.is_empty() {
                return false;
            }
            let count = state.pending.len();
            let index = state.random(count);
            let pieces = state.pending[index].pieces.len();
            if pieces > 0 {
                let piece = state.random(pieces);
                let range = state.pending[index].pieces.swap_remove(piece);
                let action = state.pending[index].action.clone();
                state.carry_out(&action, range);
            }
            if state.pending[index].pieces.is_empty() {
                let operation = state.pending.swap_remove(index);
                let mut done = operation.done.borrow_mut();
                done.result = Some(operation.fault.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))));
                done.waker.take()
            } else {
                None
            }
        };
        // Outside the borrow: a waker may run code of its own.
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    fn issue(&self, action: Action) -> MemoryCompletion {
        let done = Rc::new(RefCell::new(Done::default()));
        self.state.borrow_mut().issue(action, Rc::clone(&done));
        MemoryCompletion { done }
    }
}

impl State {
    fn issue(&mut self, action: Action, done: Rc<RefCell<Done>>) {
        let range = action.range();
        self.count(&action);
        if let Err(error) = self.check(&range) {
            done.borrow_mut().result = Some(Err(error));
            return;
        }
        let fault = self.take_fault();
        if action.changes() {
            let overlaps = |other: &Pending| {
                let theirs = other.action.range();
                other.action.changes() && theirs.start < range.end && range.start < theirs.end
            };
            self.statistics.overlapping_changes += u64::from(self.pending.iter().any(overlaps));
        }
        // A failed operation leaves everything as it was, so it has no pieces to carry out.
        let pieces = if fault.is_some() { Vec::new() } else { block_pieces(&range) };
        if self.scramble.is_some() {
            self.pending.push(Pending { action, pieces, fault, done });
            self.statistics.most_in_flight = self.statistics.most_in_flight.max(self.pending.len() as u64);
            return;
        }
        self.statistics.most_in_flight = 1;
        for piece in pieces {
            self.carry_out(&action, piece);
        }
        done.borrow_mut().result = Some(fault.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))));
    }

    fn count(&mut self, action: &Action) {
        let range = action.range();
        let len = range.end - range.start;
        let statistics = &mut self.statistics;
        match action {
            Action::Read(..) => {
                statistics.reads += 1;
                statistics.read_bytes += len;
            }
            Action::Write(..) => {
                statistics.writes += 1;
                statistics.written_bytes += len;
            }
            Action::Flush => statistics.flushes += 1,
            Action::Extend(_) => statistics.extended_bytes += len,
            Action::Punch(_) => statistics.punched_bytes += len,
        }
    }

    /// What a file opened with O_DIRECT would refuse.
    fn check(&self, range: &Range<u64>) -> io::Result<()> {
        let alignment = self.alignment as u64;
        if !range.start.is_multiple_of(alignment) || !range.end.is_multiple_of(alignment) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if range.end > self.image.size_bytes {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{range:?} is beyond the end of a storage of {} bytes", self.image.size_bytes),
            ));
        }
        Ok(())
    }

    fn take_fault(&mut self) -> Option<i32> {
        let (after, errno) = self.fault?;
        self.fault = after.checked_sub(1).map(|after| (after, errno));
        self.fault.is_none().then_some(errno)
    }

    /// Carries out `piece`, which lies inside one block, of `action`.
    fn carry_out(&mut self, action: &Action, piece: Range<u64>) {
        let len = (piece.end - piece.start) as usize;
        let mut bytes = [0; BLOCK_SIZE];
        match action {
            Action::Read(offset, memory) => {
                self.image.read(piece.start, &mut bytes[..len]);
                memory.write((piece.start - offset) as usize, &bytes[..len]);
            }
            Action::Write(offset, memory) => {
                memory.read((piece.start - offset) as usize, &mut bytes[..len]);
                self.image.write(piece.start, &bytes[..len]);
            }
            Action::Extend(_) => self.image.write(piece.start, &bytes[..len]),
            Action::Punch(_) if len == BLOCK_SIZE => {
                self.image.blocks.remove(&(piece.start / BLOCK_BYTES));
            }
            Action::Punch(_) => self.image.write(piece.start, &bytes[..len]),
            Action::Flush => {}
        }
    }

    /// A number below `bound`, by splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
    fn random(&mut self, bound: usize) -> usize {
        let seed = self.scramble.get_or_insert(0);
        *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = *seed;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % bound as u64) as usize
    }
}

impl Storage for MemoryStorage {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        IoMemory::zeroed(len)
    }

    fn alignment(&self) -> usize {
        self.state.borrow().alignment
    }

    fn size_bytes(&self) -> u64 {
        self.state.borrow().image.size_bytes
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Read(offset, into.clone()))
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Write(offset, from.clone()))
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.state.borrow_mut().statistics.durable_writes += 1;
        self.issue(Action::Write(offset, from.clone()))
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Flush)
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Extend(range))
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Punch(range))
    }

    fn holes(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.state.borrow().image.holes(&range)
    }
}

/// Parts of `range` (bytes) whose blocks are not there, for storages that exist for tests.
#[doc(hidden)]
pub fn holes_between(range: &Range<u64>, is_there: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let mut holes: Vec<Range<u64>> = Vec::new();
    for block in range.start.div_ceil(BLOCK_BYTES)..range.end / BLOCK_BYTES {
        let bytes = block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES;
        match holes.last_mut() {
            _ if is_there(block) => {}
            Some(last) if last.end == bytes.start => last.end = bytes.end,
            _ => holes.push(bytes),
        }
    }
    holes
}

/// Cuts a range of offsets at the borders of blocks.
fn block_pieces(range: &Range<u64>) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let end = (start / BLOCK_BYTES + 1).saturating_mul(BLOCK_BYTES).min(range.end);
        pieces.push(start..end);
        start = end;
    }
    pieces
}

/// Calls `visit` with each block that `len` bytes at `offset` touch: its number, the offset inside it, and the range of
/// the `len` bytes that falls into it.
fn for_each_block(offset: u64, len: usize, mut visit: impl FnMut(u64, usize, Range<usize>)) {
    for piece in block_pieces(&(offset..offset + len as u64)) {
        let within = (piece.start % BLOCK_BYTES) as usize;
        visit(piece.start / BLOCK_BYTES, within, (piece.start - offset) as usize..(piece.end - offset) as usize);
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future;

    use super::*;

    #[test]
    fn written_bytes_are_read_back_after_reopening() {
        let storage = MemoryStorage::new(1 << 20);
        let data = IoMemory::from_bytes(&[5; 8192]);
        future::block_on(storage.write(4096 - 512, &data)).unwrap();
        let reopened = MemoryStorage::from_image(storage.snapshot_image());
        let seen = reopened.allocate(8192 + 512);
        future::block_on(reopened.read(4096 - 1024, &seen)).unwrap();
        assert_eq!(seen.to_vec(), [vec![0; 512], vec![5; 8192]].concat());
        assert_eq!(storage.snapshot_image().written_blocks(), [0, 1, 2]);
        let statistics = storage.statistics();
        assert_eq!((statistics.writes, statistics.written_bytes, statistics.reads), (1, 8192, 0));
    }

    #[test]
    fn operation_happens_at_its_call_and_survives_a_dropped_future() {
        let storage = MemoryStorage::new(1 << 20);
        drop(storage.write(0, &IoMemory::from_bytes(&[1; 512])));
        assert_eq!(storage.snapshot_image().written_blocks(), [0]);
    }

    #[test]
    fn punched_block_reads_as_zeros_and_takes_no_room() {
        let storage = MemoryStorage::new(1 << 20);
        future::block_on(storage.extend(0..16384)).unwrap();
        future::block_on(storage.punch(4096..12288)).unwrap();
        assert_eq!(storage.snapshot_image().written_blocks(), [0, 3]);
    }

    #[test]
    fn misaligned_or_outside_is_refused() {
        let storage = MemoryStorage::new(8192).with_alignment(4096);
        let block = storage.allocate(4096);
        let misaligned = future::block_on(storage.write(512, &block)).unwrap_err();
        assert_eq!(misaligned.raw_os_error(), Some(libc::EINVAL));
        let outside = future::block_on(storage.read(8192, &block)).unwrap_err();
        assert_eq!(outside.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn chosen_operation_fails_and_changes_nothing() {
        let storage = MemoryStorage::new(1 << 20);
        storage.fail_operation(1, libc::EIO);
        let data = IoMemory::from_bytes(&[1; 4096]);
        future::block_on(storage.write(0, &data)).unwrap();
        let error = future::block_on(storage.write(4096, &data)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        future::block_on(storage.write(8192, &data)).unwrap();
        assert_eq!(storage.snapshot_image().written_blocks(), [0, 2]);
    }

    #[test]
    fn scrambled_operations_wait_overtake_and_tear() {
        let mut overtaken = 0;
        let mut torn = 0;
        for seed in 0..64 {
            let storage = MemoryStorage::scrambled(1 << 20, seed);
            let mut write = Box::pin(storage.write(0, &IoMemory::from_bytes(&[9; 16384])));
            let seen = storage.allocate(16384);
            let mut read = Box::pin(storage.read(0, &seen));
            assert_eq!(storage.pending(), 2);
            assert!(future::block_on(future::poll_once(&mut write)).is_none());
            while storage.pending() == 2 {
                assert!(storage.run_one());
            }
            let read_first = future::block_on(future::poll_once(&mut read)).is_some();
            overtaken += u64::from(read_first);
            while storage.run_one() {}
            if !read_first {
                future::block_on(read).unwrap();
                future::block_on(write).unwrap();
            }
            let seen = seen.to_vec();
            torn += u64::from(seen.contains(&0) && seen.contains(&9));
            assert_eq!(storage.snapshot_image().written_blocks(), [0, 1, 2, 3]);
        }
        assert!(overtaken > 0 && torn > 0, "overtaken {overtaken}, torn {torn}");
    }

    #[test]
    fn same_seed_gives_the_same_order() {
        let order = |seed| {
            let storage = MemoryStorage::scrambled(1 << 20, seed);
            for block in 0..8 {
                drop(storage.write(block * 4096, &IoMemory::from_bytes(&[1; 4096])));
            }
            let mut order = Vec::new();
            while storage.run_one() {
                order.push(storage.snapshot_image().written_blocks());
            }
            order
        };
        assert_eq!(order(3), order(3));
        assert_ne!(order(3), order(4));
    }

    #[test]
    fn writes_in_flight_over_each_other_are_counted() {
        let storage = MemoryStorage::scrambled(1 << 20, 1);
        drop(storage.write(0, &storage.allocate(8192)));
        drop(storage.write(8192, &storage.allocate(4096)));
        drop(storage.read(0, &storage.allocate(4096)));
        assert_eq!(storage.statistics().overlapping_changes, 0);
        drop(storage.punch(4096..8192));
        assert_eq!(storage.statistics().overlapping_changes, 1);
    }
}

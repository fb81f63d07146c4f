//! A pool in memory that keeps metadata only.
//!
//! A client's payload here has a length and no bytes, so a volume of many gibibytes takes the room of its nodes alone,
//! and what is timed is the engine and not the copying of data. Memory of the engine's own has bytes and is kept.

use std::cell::{Cell, RefCell};
use std::future::{Future, ready};
use std::io;
use std::ops::Range;
use std::rc::Rc;

use plywood::engine::{Memory, Storage};
use plywood::io::IoMemory;
use plywood::units::BLOCK_SIZE;
use rustc_hash::FxHashMap;

/// Memory with bytes, or a payload without any.
#[derive(Clone, Debug)]
pub enum BlankMemory {
    Bytes(IoMemory),
    /// So many bytes that nobody looks at.
    Blank(usize),
}

impl Memory for BlankMemory {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(memory) => memory.len(),
            Self::Blank(len) => *len,
        }
    }

    fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} is not inside");
        match self {
            Self::Bytes(memory) => Self::Bytes(memory.slice(range)),
            Self::Blank(_) => Self::Blank(range.len()),
        }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        match self {
            Self::Bytes(memory) => memory.read(offset, into),
            Self::Blank(_) => into.fill(0),
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        if let Self::Bytes(memory) = self {
            memory.write(offset, from);
        }
    }

    fn zero(&self, range: Range<usize>) {
        if let Self::Bytes(memory) = self {
            memory.zero(range);
        }
    }

    fn copy_from(&self, offset: usize, from: &Self) {
        match (self, from) {
            (Self::Bytes(memory), Self::Bytes(from)) => memory.copy_from(offset, from),
            (Self::Bytes(memory), Self::Blank(len)) => memory.zero(offset..offset + len),
            (Self::Blank(_), _) => {}
        }
    }
}

/// What the storage was asked for, payloads included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
}

/// A pool whose data is not kept. Every operation is complete when its call returns. A clone is the same pool.
#[derive(Clone)]
pub struct BlankStorage {
    blocks: Rc<RefCell<FxHashMap<u64, Box<[u8; BLOCK_SIZE]>>>>,
    requests: Rc<Cell<Requests>>,
    size_bytes: u64,
}

impl BlankStorage {
    pub fn new(size_bytes: u64) -> Self {
        Self { blocks: Rc::default(), requests: Rc::default(), size_bytes }
    }

    /// Another pool with the same content, for what is done to it again and again.
    #[allow(dead_code, reason = "of the benches one does")]
    pub fn copied(&self) -> Self {
        let blocks = Rc::new(RefCell::new(self.blocks.borrow().clone()));
        Self { blocks, requests: Rc::default(), size_bytes: self.size_bytes }
    }

    pub fn requests(&self) -> Requests {
        self.requests.get()
    }

    fn count(&self, change: impl FnOnce(&mut Requests)) {
        let mut requests = self.requests.get();
        change(&mut requests);
        self.requests.set(requests);
    }

    /// Blocks of a range that the engine fills or reads with memory of its own: always whole ones.
    fn whole_blocks(offset: u64, memory: &IoMemory) -> impl Iterator<Item = (u64, usize)> + use<> {
        let block = BLOCK_SIZE as u64;
        assert!(offset.is_multiple_of(block) && memory.len().is_multiple_of(BLOCK_SIZE), "metadata is whole blocks");
        let first = offset / block;
        (0..memory.len() / BLOCK_SIZE).map(move |index| (first + index as u64, index * BLOCK_SIZE))
    }
}

impl Storage for BlankStorage {
    type Memory = BlankMemory;

    fn allocate(&self, len: usize) -> BlankMemory {
        BlankMemory::Bytes(IoMemory::zeroed(len))
    }

    fn alignment(&self) -> usize {
        512
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&self, offset: u64, into: &BlankMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.count(|requests| {
            requests.reads += 1;
            requests.read_bytes += into.len() as u64;
        });
        if let BlankMemory::Bytes(memory) = into {
            let blocks = self.blocks.borrow();
            for (block, at) in Self::whole_blocks(offset, memory) {
                match blocks.get(&block) {
                    Some(bytes) => memory.write(at, &bytes[..]),
                    None => memory.zero(at..at + BLOCK_SIZE),
                }
            }
        }
        ready(Ok(()))
    }

    fn write(&self, offset: u64, from: &BlankMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.count(|requests| {
            requests.writes += 1;
            requests.written_bytes += from.len() as u64;
        });
        // A payload leaves what stood there: nothing but another payload's place is ever made of it unwritten.
        if let BlankMemory::Bytes(memory) = from {
            let mut blocks = self.blocks.borrow_mut();
            for (block, at) in Self::whole_blocks(offset, memory) {
                let bytes = blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK_SIZE]));
                memory.read(at, &mut bytes[..]);
            }
        }
        ready(Ok(()))
    }

    fn write_durable(&self, offset: u64, from: &BlankMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.write(offset, from)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.count(|requests| requests.flushes += 1);
        ready(Ok(()))
    }

    fn extend(&self, _: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        ready(Ok(()))
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        let block = BLOCK_SIZE as u64;
        let mut blocks = self.blocks.borrow_mut();
        for number in range.start / block..range.end / block {
            blocks.remove(&number);
        }
        ready(Ok(()))
    }
}

//! A pool in memory that can stop answering at any operation, and that knows what a power cut would leave of it.
//!
//! Operations are carried out when they are issued. What was written since the last flush is kept version by version: a
//! power cut picks one for each block.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use plywood::engine::{Memory, Storage};
use plywood::io::IoMemory;
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE};

use crate::image::{Block, Image};

/// A pool in memory. A clone is another handle to the same.
#[derive(Clone)]
pub struct FuzzStorage {
    state: Rc<RefCell<State>>,
}

struct State {
    image: Image,
    /// By block: what is durable, then what was written over it and not flushed.
    versions: BTreeMap<u64, Vec<Option<Rc<Block>>>>,
    /// Operations still answered.
    left: u64,
    /// Operations carried out.
    done: u64,
}

/// Ends at once, or never.
pub struct Completion(Option<io::Result<()>>);

impl Future for Completion {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl FuzzStorage {
    /// A storage that holds `image` and answers `operations` before it stops; it carries out one more, silently.
    pub fn new(image: Image, operations: u64) -> Self {
        let state = State { image, versions: BTreeMap::new(), left: operations, done: 0 };
        Self { state: Rc::new(RefCell::new(state)) }
    }

    /// Operations carried out so far.
    pub fn done(&self) -> u64 {
        self.state.borrow().done
    }

    /// Whether it has stopped answering.
    pub fn has_stopped(&self) -> bool {
        self.state.borrow().left == 0
    }

    /// It stops after `operations` more.
    pub fn stop_after(&self, operations: u64) {
        self.state.borrow_mut().left = operations;
    }

    /// What a process that starts now would find.
    pub fn image(&self) -> Image {
        self.state.borrow().image.clone()
    }

    /// What a power cut would leave now: of each block that was written and not flushed a version that `pick`, given how
    /// many there are, chooses; 0 is the durable one.
    pub fn image_after_power_cut(&self, mut pick: impl FnMut(usize) -> usize) -> Image {
        let state = self.state.borrow();
        let mut image = state.image.clone();
        for (block, versions) in &state.versions {
            image.set(*block, versions[pick(versions.len()).min(versions.len() - 1)].clone());
        }
        image
    }

    fn issue(&self, range: Range<u64>, work: impl FnOnce(&mut State)) -> Completion {
        let mut state = self.state.borrow_mut();
        if state.left == 0 {
            return Completion(None);
        }
        if range.end > state.image.size_bytes || range.start % 512 != 0 || range.end % 512 != 0 {
            return Completion(Some(Err(io::Error::from_raw_os_error(22))));
        }
        state.done += 1;
        state.left -= 1;
        work(&mut state);
        // The last one is carried out and not answered: it completes after the engine's death.
        Completion((state.left > 0).then_some(Ok(())))
    }

    fn write_through(&self, offset: u64, from: &IoMemory, durable: bool) -> Completion {
        let from = from.clone();
        self.issue(offset..offset + from.len() as u64, |state| {
            for_each_piece(offset..offset + from.len() as u64, |block, inside, at| {
                let mut content = state.image.block(block);
                from.read(at, &mut Rc::make_mut(&mut content)[inside]);
                state.put(block, Some(content), durable);
            });
        })
    }
}

impl State {
    fn put(&mut self, block: u64, content: Option<Rc<Block>>, durable: bool) {
        if durable {
            self.versions.remove(&block);
        } else {
            let before = || vec![Some(self.image.block(block))];
            self.versions.entry(block).or_insert_with(before).push(content.clone());
        }
        self.image.set(block, content);
    }
}

impl Storage for FuzzStorage {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        IoMemory::zeroed(len)
    }

    fn alignment(&self) -> usize {
        512
    }

    fn size_bytes(&self) -> u64 {
        self.state.borrow().image.size_bytes
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        let range = offset..offset + into.len() as u64;
        self.issue(range.clone(), |state| {
            for_each_piece(range, |block, inside, at| into.write(at, &state.image.block(block)[inside]));
        })
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.write_through(offset, from, false)
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.write_through(offset, from, true)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(0..0, |state| state.versions.clear())
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        // What stands there may be kept, and what does not stand there is zeros already.
        self.issue(range, |_| ())
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(range.clone(), |state| {
            for_each_piece(range, |block, inside, _| {
                if inside.len() == BLOCK_SIZE {
                    state.put(block, None, false);
                }
            });
        })
    }
}

/// Cuts a range of offsets at the borders of blocks: block, bytes inside it, offset from the range's start.
fn for_each_piece(range: Range<u64>, mut each: impl FnMut(u64, Range<usize>, usize)) {
    let mut offset = range.start;
    while offset < range.end {
        let end = ((offset / BLOCK_BYTES + 1) * BLOCK_BYTES).min(range.end);
        let inside = (offset % BLOCK_BYTES) as usize;
        each(offset / BLOCK_BYTES, inside..inside + (end - offset) as usize, (offset - range.start) as usize);
        offset = end;
    }
}

//! A medium with a volatile cache: it records every operation, carries it out piece by piece in an order that a seed
//! decides, and can say at any moment what a power cut or the death of the process would leave.
//!
//! What is promised to the engine is exactly what [`Storage`] says: a write is durable when a flush that began after its
//! end has ended; a durable write when it has ended; everything else may be there, in part, or not. A sector of 512 bytes
//! is written whole or not at all. No two changes of one byte may ever be in flight together: the engine is at fault then.

mod cut;

use std::cell::RefCell;
use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use fastrand::Rng;
use plywood::canary::{Canary, is_broken};
use plywood::engine::{Memory, Storage};
use plywood::io::IoMemory;

use crate::action::{Action, Cached, Call, Content, Fault, sectors};
use crate::content::{SECTOR, is_data};
use crate::image::{BLOCK, Image, parts};

struct Operation {
    number: u64,
    action: Action,
    /// Pieces that have not been carried out.
    pieces: Vec<Range<u64>>,
    /// Whether one has been.
    is_started: bool,
    /// It takes much longer than others.
    is_slow: bool,
    /// It has failed already, and says so at its end.
    failure: Option<i32>,
    done: Rc<RefCell<Done>>,
}

#[derive(Default)]
struct Done {
    result: Option<io::Result<()>>,
    waker: Option<Waker>,
}

/// What is in flight, for counting the phases that crashes met.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phase {
    pub superblock: bool,
    pub journal: bool,
    pub flush: bool,
    pub write: bool,
    pub punch: bool,
    pub extend: bool,
}

type Held = Box<dyn Fn(Call, &Range<u64>) -> bool>;

struct State {
    random: Rng,
    current: Image,
    durable: Image,
    cached: Vec<Cached>,
    in_flight: Vec<Operation>,
    alignment: usize,
    journal: Range<u64>,
    next: u64,
    /// Operations begun and ended.
    events: u64,
    begun: u64,
    calls: [u64; 6],
    fault: Option<Fault>,
    /// Which operations wait though others are carried out at once.
    held: Option<Held>,
    /// Superblocks are written and do not become durable: the process dies before they come back.
    superblocks_withheld: bool,
    /// What the host has room for, if that has a bound.
    host: Option<Host>,
    /// Operations are carried out when they are called.
    at_once: bool,
    /// Operations beyond this number never end.
    stop_after: u64,
    /// Room for a piece on its way.
    scratch: Box<[u8; BLOCK]>,
}

/// What one engine leaves to the next.
#[derive(Clone)]
pub struct Left {
    current: Image,
    durable: Image,
    cached: Vec<Cached>,
    next: u64,
    /// What no fence kept from going on.
    late: Vec<Late>,
}

#[derive(Clone)]
struct Late {
    number: u64,
    action: Action,
    pieces: Vec<Range<u64>>,
}

impl Left {
    /// All of it durable.
    pub fn settled(&self) -> Image {
        self.current.clone()
    }

    /// One copy of a superblock goes bad.
    pub fn damage_superblock(&mut self, random: &mut Rng) {
        let block = [0, 128, 256, 384][random.usize(..4)];
        let at = block * BLOCK as u64 + random.u64(..4) * SECTOR;
        let mut bytes = [0; SECTOR as usize];
        self.current.read(at, &mut bytes);
        bytes[random.usize(..bytes.len())] ^= 1 << random.u32(..8);
        self.current.write(at, &bytes);
        self.durable.write(at, &bytes);
    }
}

impl From<Image> for Left {
    /// All of it durable.
    fn from(image: Image) -> Self {
        Self { current: image.clone(), durable: image, cached: Vec::new(), next: 0, late: Vec::new() }
    }
}

/// A host that is full soon: it has every block before `first`, and room for a few of those behind.
struct Host {
    first: u64,
    room: usize,
    allocated: HashSet<u64>,
}

impl Host {
    /// Whether it has, or now finds, room for all that is written.
    fn allocate(&mut self, range: &Range<u64>) -> bool {
        let blocks = (range.start / BLOCK as u64).max(self.first)..range.end.div_ceil(BLOCK as u64);
        let missing: Vec<u64> = blocks.filter(|block| !self.allocated.contains(block)).collect();
        let fits = self.allocated.len() + missing.len() <= self.room;
        if fits {
            self.allocated.extend(missing);
        }
        fits
    }

    fn give_back(&mut self, range: &Range<u64>) {
        self.allocated.retain(|block| !range.contains(&(block * BLOCK as u64)));
    }
}

/// The medium. A clone is another handle to it.
#[derive(Clone)]
pub struct Medium {
    state: Rc<RefCell<State>>,
}

/// Waits for an operation.
pub struct Completion {
    done: Rc<RefCell<Done>>,
}

impl Future for Completion {
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

impl Medium {
    /// A medium that holds what an earlier one was `left` with, and ends operations in an order that `seed` decides.
    pub fn new(left: Left, seed: u64, alignment: usize, journal_bytes: u64) -> Self {
        let in_flight = left
            .late
            .into_iter()
            .map(|late| Operation {
                number: late.number,
                action: late.action,
                pieces: late.pieces,
                is_started: true,
                is_slow: true,
                failure: None,
                done: Rc::default(),
            })
            .collect();
        let state = State {
            random: Rng::with_seed(seed),
            current: left.current,
            durable: left.durable,
            cached: left.cached,
            in_flight,
            alignment,
            journal: 512 * BLOCK as u64..512 * BLOCK as u64 + journal_bytes,
            next: left.next,
            events: 0,
            begun: 0,
            calls: [0; 6],
            fault: None,
            held: None,
            superblocks_withheld: false,
            host: None,
            at_once: false,
            stop_after: u64::MAX,
            scratch: Box::new([0; BLOCK]),
        };
        Self { state: Rc::new(RefCell::new(state)) }
    }

    /// As [`new`](Self::new), but operations are carried out when they are called; the first `stop_after` of them.
    pub fn at_once(left: Left, seed: u64, alignment: usize, journal_bytes: u64, stop_after: u64) -> Self {
        // What no fence held back is lost here: that may happen too.
        let left = Left { late: Vec::new(), ..left };
        let medium = Self::new(left, seed, alignment, journal_bytes);
        medium.state.borrow_mut().at_once = true;
        medium.state.borrow_mut().stop_after = stop_after;
        medium
    }

    /// Operations begun and ended so far.
    pub fn events(&self) -> u64 {
        self.state.borrow().events
    }

    /// Operations begun so far.
    pub fn begun(&self) -> u64 {
        self.state.borrow().begun
    }

    /// Calls of a kind so far.
    pub fn calls(&self, call: Call) -> u64 {
        self.state.borrow().calls[call as usize]
    }

    /// Has one call fail.
    pub fn fail(&self, fault: Fault) {
        self.state.borrow_mut().fault = Some(fault);
    }

    /// From now on operations that `held` chooses wait, on a medium that does at once what it is asked.
    pub fn hold(&self, held: impl Fn(Call, &Range<u64>) -> bool + 'static) {
        self.state.borrow_mut().held = Some(Box::new(held));
    }

    /// What waited is carried out, and nothing waits any more.
    pub fn let_go(&self) {
        self.state.borrow_mut().held = None;
        self.end_what_waits();
    }

    /// What waits is carried out; what comes is held as before.
    pub fn end_what_waits(&self) {
        loop {
            let waker = {
                let mut state = self.state.borrow_mut();
                if state.in_flight.is_empty() {
                    return;
                }
                state.carry_out_all(0);
                state.end(0)
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// From now on the host, which has all before byte `first`, finds room for no more than `room_bytes` behind it:
    /// what would need more is refused with ENOSPC.
    pub fn limit_host(&self, first: u64, room_bytes: u64) {
        let (first, room) = (first / BLOCK as u64, (room_bytes / BLOCK as u64) as usize);
        self.state.borrow_mut().host = Some(Host { first, room, allocated: HashSet::new() });
    }

    /// From now on such a host finds room for no more than `room_bytes` beyond what it has.
    pub fn fill_host(&self, room_bytes: u64) {
        if let Some(host) = &mut self.state.borrow_mut().host {
            host.room = host.allocated.len() + (room_bytes / BLOCK as u64) as usize;
        }
    }

    /// How many operations are in flight.
    pub fn waiting(&self) -> usize {
        self.state.borrow().in_flight.len()
    }

    /// From now on superblocks are written, and are not durable.
    pub fn withhold_superblocks(&self) {
        self.state.borrow_mut().superblocks_withheld = true;
    }

    /// A bit flips in every block that holds data.
    pub fn damage_data(&self, random: &mut Rng) {
        self.state.borrow_mut().current.change(is_data, |bytes| bytes[random.usize(..BLOCK)] ^= 1 << random.u32(..8));
    }

    /// What is in flight, for a message.
    pub fn under_way(&self) -> Vec<(Call, Range<u64>, usize, bool)> {
        let state = self.state.borrow();
        let tell = |operation: &Operation| {
            let pieces = operation.pieces.len();
            (operation.action.call(), operation.action.range(), pieces, operation.is_slow)
        };
        state.in_flight.iter().map(tell).collect()
    }

    pub fn phase(&self) -> Phase {
        let state = self.state.borrow();
        let mut phase = Phase::default();
        for operation in &state.in_flight {
            match &operation.action {
                Action::Read(..) => {}
                Action::Write(offset, _) | Action::WriteDurable(offset, _) if state.journal.contains(offset) => {
                    phase.journal = true;
                }
                Action::Write(..) => phase.write = true,
                Action::WriteDurable(..) => phase.superblock = true,
                Action::Flush(_) => phase.flush = true,
                Action::Extend(_) => phase.extend = true,
                Action::Punch(_) => phase.punch = true,
            }
        }
        phase
    }

    /// Until the answer is dropped, operations are carried out when they are called. Those in flight end now.
    pub fn turning(&self) -> Turning {
        while self.run_one() {}
        self.state.borrow_mut().at_once = true;
        Turning(self.clone())
    }

    /// What the death of the process leaves: what was begun ends, or was never carried out at all; what was not durable
    /// still is not, and a durable write that did not come back may not be.
    pub fn process_death(&self, random: &mut Rng) -> Left {
        let state = self.state.borrow();
        let mut left = Left {
            current: state.current.clone(),
            durable: state.durable.clone(),
            cached: state.cached.clone(),
            next: state.next,
            late: Vec::new(),
        };
        for operation in &state.in_flight {
            let Some(content) = operation.action.content() else { continue };
            if !operation.is_started && random.u32(..6) == 0 {
                continue;
            }
            if is_broken(Canary::NoFence) {
                let Operation { number, action, pieces, .. } = operation;
                // The memory may be used again: what is in flight has its own.
                let action = match (action, &content) {
                    (Action::Write(offset, _), Content::Bytes(bytes)) => {
                        Action::Write(*offset, IoMemory::from_bytes(bytes))
                    }
                    (Action::WriteDurable(offset, _), Content::Bytes(bytes)) => {
                        Action::WriteDurable(*offset, IoMemory::from_bytes(bytes))
                    }
                    (other, _) => other.clone(),
                };
                left.late.push(Late { number: *number, action, pieces: pieces.clone() });
                continue;
            }
            let range = operation.action.range();
            for piece in &operation.pieces {
                content.write(&mut left.current, &range, piece.clone());
            }
            if matches!(operation.action, Action::WriteDurable(..)) && random.bool() {
                make_durable(&mut left.durable, &mut left.cached, &range, &content);
            } else {
                let outdated = HashSet::new();
                left.cached.push(Cached { number: operation.number, range, content, outdated });
            }
        }
        left
    }

    /// Carries out a piece of one operation in flight, or all that is left of it. Answers false when there is none.
    pub fn run_one(&self) -> bool {
        let waker = {
            let mut state = self.state.borrow_mut();
            let stop_after = state.stop_after;
            if state.in_flight.is_empty() || state.begun > stop_after {
                return false;
            }
            let count = state.in_flight.len();
            let index = state.random.usize(..count);
            if state.in_flight[index].is_slow && state.random.u32(..24) != 0 {
                return true;
            }
            if state.random.bool() {
                state.carry_out_all(index);
            } else {
                state.carry_out_one(index);
            }
            if state.in_flight[index].pieces.is_empty() { state.end(index) } else { None }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    fn issue(&self, action: Action) -> Completion {
        let done = Rc::new(RefCell::new(Done::default()));
        let mut state = self.state.borrow_mut();
        state.begin(action, Rc::clone(&done));
        Completion { done }
    }
}

/// A durable write has ended.
fn make_durable(durable: &mut Image, cached: &mut [Cached], range: &Range<u64>, content: &Content) {
    content.write(durable, range, range.clone());
    for earlier in cached {
        if earlier.range.start < range.end && range.start < earlier.range.end {
            earlier.outdated.extend(sectors(range));
        }
    }
}

impl State {
    fn begin(&mut self, action: Action, done: Rc<RefCell<Done>>) {
        let range = action.range();
        let alignment = self.alignment as u64;
        assert!(range.start.is_multiple_of(alignment) && range.end.is_multiple_of(alignment), "misaligned: {range:?}");
        assert!(range.end <= self.current.size_bytes, "beyond the end: {range:?}");
        if action.changes() {
            for other in self.in_flight.iter().filter(|other| other.action.changes()) {
                let theirs = other.action.range();
                assert!(
                    theirs.end <= range.start || range.end <= theirs.start,
                    "two changes of the same bytes in flight: {theirs:?} and {range:?}"
                );
            }
        }
        let is_held = self.held.as_ref().is_some_and(|held| held(action.call(), &range));
        let failure = self.failure(&action);
        if let (Some(errno), false) = (failure, is_held) {
            done.borrow_mut().result = Some(Err(io::Error::from_raw_os_error(errno)));
            return;
        }
        self.begun += 1;
        self.events += 1;
        let number = self.next;
        self.next += 1;
        let length = if failure.is_some() { 0 } else { range.end - range.start };
        let pieces = parts(range.start, length as usize)
            .map(|(_, _, part)| range.start + part.start as u64..range.start + part.end as u64)
            .collect();
        let is_slow = self.random.u32(..10) == 0;
        self.in_flight.push(Operation { number, action, pieces, is_started: false, is_slow, failure, done });
        if self.at_once && self.begun <= self.stop_after && !is_held {
            let index = self.in_flight.len() - 1;
            self.carry_out_all(index);
            // Nobody waits yet.
            self.end(index);
        }
    }

    /// Counts a call, and has it fail when it is its turn: answers with what. A flush that fails loses what it was to make
    /// durable, and does not know it later.
    fn failure(&mut self, action: &Action) -> Option<i32> {
        let call = action.call();
        let number = self.calls[call as usize];
        self.calls[call as usize] += 1;
        if let Some(host) = &mut self.host {
            let range = action.range();
            match action {
                Action::Read(..) | Action::Flush(_) => {}
                Action::Punch(_) => host.give_back(&range),
                Action::Write(..) | Action::WriteDurable(..) | Action::Extend(_) => {
                    if !host.allocate(&range) {
                        return Some(libc::ENOSPC);
                    }
                }
            }
        }
        let fault = self.fault.filter(|fault| fault.call == call && fault.number == number)?;
        let range = action.range();
        match (action, action.content()) {
            (Action::Flush(numbers), _) => {
                self.cached.retain(|change| numbers.binary_search(&change.number).is_err());
            }
            (_, Some(content)) if fault.in_part => {
                let middle = range.start + (range.end - range.start) / 2 / SECTOR * SECTOR;
                content.write(&mut self.current, &range, range.start..middle);
                let outdated = (middle / SECTOR..range.end / SECTOR).collect();
                let number = self.next;
                self.next += 1;
                self.cached.push(Cached { number, range, content, outdated });
            }
            _ => {}
        }
        Some(fault.errno)
    }

    fn carry_out_all(&mut self, index: usize) {
        for piece in std::mem::take(&mut self.in_flight[index].pieces) {
            self.carry_out(index, piece);
        }
    }

    fn carry_out_one(&mut self, index: usize) {
        let pieces = &mut self.in_flight[index].pieces;
        if !pieces.is_empty() {
            let piece = pieces.swap_remove(self.random.usize(..pieces.len()));
            self.carry_out(index, piece);
        }
    }

    fn carry_out(&mut self, index: usize, piece: Range<u64>) {
        let operation = &mut self.in_flight[index];
        operation.is_started = true;
        let length = (piece.end - piece.start) as usize;
        match &operation.action {
            Action::Read(offset, memory) => {
                let into = (piece.start - offset) as usize;
                self.current.visit(piece.start, length, |range, found| match found {
                    Some(bytes) => memory.write(into + range.start, bytes),
                    None => memory.zero(into + range.start..into + range.end),
                });
            }
            Action::Write(offset, memory) | Action::WriteDurable(offset, memory) => {
                let bytes = &mut self.scratch[..length];
                memory.read((piece.start - offset) as usize, bytes);
                self.current.write(piece.start, bytes);
            }
            Action::Flush(_) => {}
            Action::Extend(_) | Action::Punch(_) => self.current.zero(piece),
        }
    }

    fn end(&mut self, index: usize) -> Option<Waker> {
        self.events += 1;
        let operation = self.in_flight.swap_remove(index);
        let mut done = operation.done.borrow_mut();
        if let Some(errno) = operation.failure {
            done.result = Some(Err(io::Error::from_raw_os_error(errno)));
            return done.waker.take();
        }
        let range = operation.action.range();
        let content = operation.action.content();
        match (&operation.action, content) {
            (Action::WriteDurable(..), Some(content))
                if !self.superblocks_withheld || self.journal.contains(&range.start) =>
            {
                make_durable(&mut self.durable, &mut self.cached, &range, &content);
            }
            (_, Some(content)) => {
                self.cached.push(Cached { number: operation.number, range, content, outdated: HashSet::new() });
            }
            (Action::Flush(numbers), None) => {
                let durable = &mut self.durable;
                self.cached.retain(|change| {
                    let covered = numbers.binary_search(&change.number).is_ok();
                    if covered {
                        change.write(durable);
                    }
                    !covered
                });
            }
            _ => {}
        }
        done.result = Some(Ok(()));
        done.waker.take()
    }
}

impl Storage for Medium {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        IoMemory::zeroed(len)
    }

    fn alignment(&self) -> usize {
        self.state.borrow().alignment
    }

    fn size_bytes(&self) -> u64 {
        self.state.borrow().current.size_bytes
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Read(offset, into.clone()))
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Write(offset, from.clone()))
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::WriteDurable(offset, from.clone()))
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        let mut ended: Vec<u64> = self.state.borrow().cached.iter().map(|change| change.number).collect();
        ended.sort_unstable();
        self.issue(Action::Flush(ended))
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Extend(range))
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.issue(Action::Punch(range))
    }

    fn holes(&self, range: Range<u64>) -> Vec<Range<u64>> {
        // The ring was written when the pool was made: the host has it, though zeros take no room here.
        let state = self.state.borrow();
        plywood::io::holes_between(&range, |block| {
            state.journal.contains(&(block * BLOCK as u64)) || state.current.has_block(block)
        })
    }
}

/// While it lives, a medium carries operations out at once.
pub struct Turning(Medium);

impl Drop for Turning {
    fn drop(&mut self) {
        self.0.state.borrow_mut().at_once = false;
    }
}

//! The engine's side of all queues: takes requests, answers them, sleeps when there are none.
//!
//! An engine finds the queues in whatever state its predecessor left them. [`EngineQueues::open`] forgets the channels'
//! numbers and walks the slots instead: what was sent and not answered is started, what was answered is shown to the front
//! once more. From then on a number is taken as a hint only: an entry is started when its slot says so and this engine has
//! not started it yet.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use super::channel::{Channel, Popped};
use super::front_queue::ring;
use super::geometry::Arrangement;
use super::layout::{INLINE_BYTES, SessionMemory, SlotState, slot};
use crate::error::{Error, Result};
use crate::export::fuse::abi::opcode;

/// A request as it lies in its slot, copied out: nothing in it has been checked.
#[derive(Clone, Copy, Debug)]
pub struct RawRequest {
    /// `struct fuse_in_header`.
    pub header: [u8; 40],
    /// The operation's fixed struct, or the beginning of the body.
    pub op_in: [u8; 128],
    /// Bytes of `op_in` that the kernel wrote at most.
    pub op_in_len: usize,
    /// Bytes of request in the payload.
    pub payload_len: usize,
}

impl RawRequest {
    /// Whether it is a LOOKUP, whose payload is a name.
    pub fn has_name(&self) -> bool {
        const OPCODE: usize = 4;
        self.header[OPCODE..OPCODE + 4] == opcode::LOOKUP.to_ne_bytes()
    }
}

/// What to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// A positive errno.
    Error(i32),
    /// These bytes, at most [`INLINE_BYTES`]. The payload stays as it is, so that a successor can do a WRITE again.
    Inline(&'a [u8]),
    /// So many bytes of the payload.
    Payload(usize),
}

/// All queues of a session as the engine sees them. For one thread.
#[derive(Debug)]
pub struct EngineQueues {
    memory: SessionMemory,
    queues: Vec<EngineQueue>,
    /// By slot: taken and not answered yet.
    in_progress: Vec<Cell<bool>>,
    found: RefCell<Vec<usize>>,
}

#[derive(Debug)]
struct EngineQueue {
    first_slot: usize,
    to_engine: Channel,
    to_front: Channel,
    doorbell: OwnedFd,
    answered: Cell<bool>,
}

impl EngineQueues {
    /// Takes over the queues; `doorbells` wake the front, one for each queue.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when the number of doorbells is another than that of queues.
    pub fn open(memory: SessionMemory, doorbells: Vec<OwnedFd>) -> Result<Self> {
        if doorbells.len() != memory.geometry().queue_count() {
            return Err(Error::Incompatible("the front gave another number of doorbells than of queues".into()));
        }
        let first_slots = memory.geometry().first_slots();
        let queues = doorbells.into_iter().enumerate().map(|(queue, doorbell)| EngineQueue {
            first_slot: first_slots[queue],
            to_engine: memory.to_engine(queue),
            to_front: memory.to_front(queue),
            doorbell,
            answered: Cell::new(false),
        });
        let queues: Vec<_> = queues.collect();
        let slot_count = memory.geometry().slot_count();
        for queue in &queues {
            // First the numbers, then the slots: a request sent in between is found by its number, or twice.
            queue.to_engine.skip();
            queue.to_engine.declare_lost();
            // Answers that the predecessor wrote and perhaps could not announce.
            queue.to_front.declare_lost();
            queue.answered.set(true);
        }
        let in_progress = (0..slot_count).map(|_| Cell::new(false)).collect();
        Ok(Self { memory, queues, in_progress, found: RefCell::new(Vec::with_capacity(slot_count)) })
    }

    /// The memory behind the queues.
    pub fn memory(&self) -> &SessionMemory {
        &self.memory
    }

    /// Calls `start` with the slot of every request that has arrived; each is this engine's until it answers.
    pub fn take(&self, mut start: impl FnMut(usize)) {
        // Collected first: `start` may answer, and so may touch what is iterated here.
        let mut found = self.found.take();
        for (number, queue) in self.queues.iter().enumerate() {
            loop {
                match queue.to_engine.pop() {
                    Popped::Entry(entry) => {
                        found.extend(self.memory.slot(number, entry).filter(|&slot| self.claim(slot)));
                    }
                    Popped::Lost => {
                        let depth = self.memory.geometry().depth(number) as usize;
                        found.extend((queue.first_slot..queue.first_slot + depth).filter(|&slot| self.claim(slot)));
                    }
                    Popped::Empty => break,
                }
            }
        }
        found.drain(..).for_each(&mut start);
        *self.found.borrow_mut() = found;
    }

    fn claim(&self, slot: usize) -> bool {
        self.memory.state(slot).load(Ordering::Acquire) == SlotState::Sent.number()
            && !self.in_progress[slot].replace(true)
    }

    /// Copies a request out of its slot.
    pub fn request(&self, slot: usize) -> RawRequest {
        let control = &self.memory.control;
        let mut request = RawRequest { header: [0; 40], op_in: [0; 128], op_in_len: 128, payload_len: 0 };
        control.read(self.memory.at(slot, 0), &mut request.header);
        control.read(self.memory.at(slot, slot::OP_IN), &mut request.op_in);
        let word = |field| self.memory.word(slot, field).load(Ordering::Relaxed) as usize;
        match self.memory.geometry().arrangement() {
            Arrangement::Ring => request.payload_len = word(slot::RING_PAYLOAD_LEN),
            Arrangement::Stream => {
                let body_len = word(slot::STREAM_LEN);
                request.op_in_len = body_len.min(128);
                request.payload_len = body_len.saturating_sub(40);
            }
        }
        request
    }

    /// Copies the beginning of a slot's payload out.
    pub fn read_payload(&self, slot: usize, into: &mut [u8]) {
        assert!(into.len() <= self.memory.geometry().payload_bytes());
        self.memory.payloads.read(slot * self.memory.geometry().payload_bytes(), into);
    }

    /// Copies to the beginning of a slot's payload.
    pub fn write_payload(&self, slot: usize, from: &[u8]) {
        assert!(from.len() <= self.memory.geometry().payload_bytes());
        self.memory.payloads.write(slot * self.memory.geometry().payload_bytes(), from);
    }

    /// Hands the answer over to the front: from now on the request is answered, whatever becomes of this process. The
    /// front is woken by [`ring`](Self::ring), after a batch of answers.
    pub fn answer(&self, slot: usize, reply: Reply<'_>) {
        let word = |field, value: usize| {
            let value = u32::try_from(value).expect("lengths and errors are small");
            self.memory.word(slot, field).store(value, Ordering::Relaxed);
        };
        let (error, inline, payload_len): (i32, &[u8], usize) = match reply {
            Reply::Error(errno) => (errno, &[], 0),
            Reply::Inline(bytes) => (0, bytes, 0),
            Reply::Payload(len) => (0, &[], len),
        };
        assert!(inline.len() <= INLINE_BYTES);
        self.memory.control.write(self.memory.at(slot, slot::INLINE), inline);
        word(slot::REPLY_INLINE_LEN, inline.len());
        word(slot::REPLY_PAYLOAD_LEN, payload_len);
        self.memory.word(slot, slot::ERROR).store((-error).cast_unsigned(), Ordering::Relaxed);
        self.in_progress[slot].set(false);
        // The answer's bytes are in place before the state says so.
        self.memory.state(slot).store(SlotState::Answered.number(), Ordering::Release);
        let number = self.queues.partition_point(|queue| queue.first_slot <= slot) - 1;
        let queue = &self.queues[number];
        queue.to_front.push(u32::try_from(slot - queue.first_slot).expect("a queue has few entries"));
        queue.answered.set(true);
    }

    /// Wakes the queues of the front that have got answers and sleep.
    pub fn ring(&self) {
        for queue in &self.queues {
            if queue.answered.replace(false) && queue.to_front.sleeps().swap(0, Ordering::SeqCst) != 0 {
                ring(&queue.doorbell);
            }
        }
    }

    /// Says that the engine is going to sleep until something completes or its doorbell rings. False when requests have
    /// arrived meanwhile: it must not sleep then.
    pub fn prepare_sleep(&self) -> bool {
        self.memory.engine_sleeps().store(1, Ordering::SeqCst);
        !self.queues.iter().any(|queue| queue.to_engine.has_news())
    }

    /// Says that the engine is awake.
    pub fn awake(&self) {
        self.memory.engine_sleeps().store(0, Ordering::SeqCst);
    }

    /// Tells the front that an engine serves.
    pub fn declare_serving(&self) {
        self.memory.set_served(true);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

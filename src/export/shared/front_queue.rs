//! The front's side of one queue: hands requests to the engine and takes its answers.
//!
//! What the front must not get wrong, whatever an engine writes, it keeps in private memory: which entries are
//! outstanding, and (in the transports) the kernel's `unique` and `commit_id`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::channel::{Channel, Popped};
use super::layout::{HEADER_BYTES, INLINE_BYTES, SessionMemory, SlotState, slot};

/// The engine's answer to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Entry of the queue.
    pub entry: u32,
    /// 0, or a negative errno that the kernel accepts.
    pub error: i32,
    /// Bytes of reply in the payload.
    pub payload_len: usize,
    /// Bytes of reply in the slot; when there are any, there are none in the payload.
    pub inline_len: usize,
}

/// One queue as the front sees it. A transport with a reader and a reply thread shares it between the two: one sends, the
/// other takes answers.
#[derive(Debug)]
pub(crate) struct FrontQueue {
    memory: SessionMemory,
    queue: usize,
    to_engine: Channel,
    to_front: Channel,
    engine_doorbell: Arc<OwnedFd>,
    doorbell: Arc<OwnedFd>,
    outstanding: Vec<AtomicBool>,
    given_up: Arc<AtomicBool>,
}

impl FrontQueue {
    pub(crate) fn new(
        memory: SessionMemory,
        queue: usize,
        engine_doorbell: Arc<OwnedFd>,
        doorbell: Arc<OwnedFd>,
        given_up: Arc<AtomicBool>,
    ) -> Self {
        let (to_engine, to_front) = (memory.to_engine(queue), memory.to_front(queue));
        let outstanding = (0..memory.geometry().depth(queue)).map(|_| AtomicBool::new(false)).collect();
        Self { memory, queue, to_engine, to_front, engine_doorbell, doorbell, outstanding, given_up }
    }

    pub(crate) fn queue(&self) -> usize {
        self.queue
    }

    pub(crate) fn depth(&self) -> u32 {
        self.memory.geometry().depth(self.queue)
    }

    pub(crate) fn payload_bytes(&self) -> usize {
        self.memory.geometry().payload_bytes()
    }

    /// What the engine rings when this queue sleeps.
    pub(crate) fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    fn slot(&self, entry: u32) -> usize {
        self.memory.slot(self.queue, entry).expect("entries come from the transport, which has as many as the queue")
    }

    /// Address of the kernel's header of an entry.
    pub(crate) fn header_pointer(&self, entry: u32) -> *mut u8 {
        self.memory.control.pointer(self.memory.at(self.slot(entry), 0), HEADER_BYTES)
    }

    /// Address of the payload of an entry.
    pub(crate) fn payload_pointer(&self, entry: u32) -> *mut u8 {
        self.memory.payloads.pointer(self.slot(entry) * self.payload_bytes(), self.payload_bytes())
    }

    /// Address of the reply in the slot of an entry.
    pub(crate) fn inline_pointer(&self, entry: u32) -> *mut u8 {
        self.memory.control.pointer(self.memory.at(self.slot(entry), slot::INLINE), INLINE_BYTES)
    }

    /// Copies from the kernel's header of an entry.
    pub(crate) fn read_header(&self, entry: u32, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= HEADER_BYTES);
        self.memory.control.read(self.memory.at(self.slot(entry), offset), into);
    }

    /// Copies into the kernel's header of an entry.
    pub(crate) fn write_header(&self, entry: u32, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= HEADER_BYTES);
        self.memory.control.write(self.memory.at(self.slot(entry), offset), from);
    }

    /// Copies a reply from the slot to the payload, where the ring's transport wants it.
    pub(crate) fn inline_to_payload(&self, answer: &Answer) {
        let mut reply = [0; INLINE_BYTES];
        let reply = &mut reply[..answer.inline_len];
        self.memory.control.read(self.memory.at(self.slot(answer.entry), slot::INLINE), reply);
        self.memory.payloads.write(self.slot(answer.entry) * self.payload_bytes(), reply);
    }

    /// A request read from /dev/fuse has `body_len` bytes after its header; unless it is a WRITE, the part of it that
    /// `op_in` holds is completed from the payload.
    pub(crate) fn arrange_stream(&self, entry: u32, body_len: usize, is_write: bool) {
        let slot_number = self.slot(entry);
        if !is_write && body_len > 40 {
            let mut rest = [0; 88];
            let rest = &mut rest[..(body_len - 40).min(88)];
            self.memory.payloads.read(slot_number * self.payload_bytes(), rest);
            self.memory.control.write(self.memory.at(slot_number, slot::OP_IN + 40), rest);
        }
        let body_len = u32::try_from(body_len).unwrap_or(u32::MAX);
        self.memory.word(slot_number, slot::STREAM_LEN).store(body_len, Ordering::Relaxed);
    }

    /// Hands the request in this entry to the engine; [`ring`](Self::ring) after a batch of them.
    pub(crate) fn send(&self, entry: u32) {
        self.outstanding[entry as usize].store(true, Ordering::Release);
        // The request's bytes are in place before the state says so.
        self.memory.state(self.slot(entry)).store(SlotState::Sent.number(), Ordering::Release);
        self.to_engine.push(entry);
    }

    /// Wakes the engine if it sleeps.
    pub(crate) fn ring(&self) {
        if self.memory.engine_sleeps().swap(0, Ordering::SeqCst) != 0 {
            ring(&self.engine_doorbell);
        }
    }

    /// Takes an answer when this entry has one.
    fn answer(&self, entry: u32) -> Option<Answer> {
        let outstanding = self.outstanding.get(entry as usize)?;
        let number = self.memory.slot(self.queue, entry)?;
        // First the state: with it comes what the thread that sent the entry wrote before. It alone may be old or damaged,
        // though: an entry that was not sent has no answer.
        if self.memory.state(number).load(Ordering::Acquire) != SlotState::Answered.number()
            || !outstanding.load(Ordering::Acquire)
        {
            return None;
        }
        self.memory.state(number).store(SlotState::Idle.number(), Ordering::Relaxed);
        outstanding.store(false, Ordering::Release);
        let field = |field| self.memory.word(number, field).load(Ordering::Relaxed);
        let error = field(slot::ERROR).cast_signed();
        let (payload_len, inline_len) =
            (field(slot::REPLY_PAYLOAD_LEN) as usize, field(slot::REPLY_INLINE_LEN) as usize);
        // The kernel takes errors in (-512, 0]; anything else, or a length that cannot be, is a fault of the engine.
        let sound = (-511..=0).contains(&error) && payload_len <= self.payload_bytes() && inline_len <= INLINE_BYTES;
        Some(if !sound {
            Answer { entry, error: -libc::EIO, payload_len: 0, inline_len: 0 }
        } else if error != 0 {
            Answer { entry, error, payload_len: 0, inline_len: 0 }
        } else {
            Answer { entry, error, payload_len, inline_len }
        })
    }

    /// Takes all answers there are.
    pub(crate) fn take_answers(&self, mut each: impl FnMut(Answer)) {
        loop {
            match self.to_front.pop() {
                Popped::Entry(entry) => {
                    if let Some(answer) = self.answer(entry) {
                        each(answer);
                    }
                }
                Popped::Lost => (0..self.depth()).filter_map(|entry| self.answer(entry)).for_each(&mut each),
                Popped::Empty => break,
            }
        }
        if self.has_given_up() {
            self.take_failures(each);
        }
    }

    /// No engine will come any more: what it owes is answered with EIO.
    fn take_failures(&self, mut each: impl FnMut(Answer)) {
        for (entry, outstanding) in (0..).zip(&self.outstanding) {
            if let Some(answer) = self.answer(entry) {
                each(answer);
            } else if outstanding.swap(false, Ordering::AcqRel) {
                self.memory.state(self.slot(entry)).store(SlotState::Idle.number(), Ordering::Relaxed);
                each(Answer { entry, error: -libc::EIO, payload_len: 0, inline_len: 0 });
            }
        }
    }

    /// Whether the front has given up on the engine.
    pub(crate) fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Says that this queue is going to sleep. False when there is something to do after all.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.to_front.sleeps().store(1, Ordering::SeqCst);
        let owed = self.has_given_up() && self.is_owed();
        !owed && !self.to_front.has_news()
    }

    fn is_owed(&self) -> bool {
        self.outstanding.iter().any(|outstanding| outstanding.load(Ordering::Acquire))
    }

    /// Says that this queue is awake.
    pub(crate) fn awake(&self) {
        self.to_front.sleeps().store(0, Ordering::SeqCst);
    }
}

/// Rings a doorbell.
pub(crate) fn ring(doorbell: &OwnedFd) {
    // An eventfd takes 2^64 - 2 of these before it blocks; it cannot fail otherwise.
    let _ = rustix::io::write(doorbell, &1_u64.to_ne_bytes());
}

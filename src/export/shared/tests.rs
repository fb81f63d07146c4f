//! Both sides of the queues in one process, and engines that die at every point of an answer.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::{EventfdFlags, eventfd};

use super::super::front_queue::{Answer, FrontQueue};
use super::super::geometry::Geometry;
use super::*;

struct Pair {
    memory: SessionMemory,
    front: FrontQueue,
    given_up: Arc<AtomicBool>,
}

fn doorbell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

impl Pair {
    fn new() -> Self {
        let memory = SessionMemory::create(Geometry::new(Arrangement::Ring, 4096, vec![2, 8]).unwrap()).unwrap();
        let given_up = Arc::new(AtomicBool::new(false));
        let front =
            FrontQueue::new(memory.clone(), 1, Arc::new(doorbell()), Arc::new(doorbell()), Arc::clone(&given_up));
        Self { memory, front, given_up }
    }

    fn engine(&self) -> EngineQueues {
        EngineQueues::open(self.memory.clone(), vec![doorbell(), doorbell()]).unwrap()
    }

    fn send(&self, entry: u32) {
        self.front.write_header(entry, 0, &[u8::try_from(entry).unwrap() + 1; 40]);
        self.front.send(entry);
    }

    fn answers(&self) -> Vec<Answer> {
        let mut answers = Vec::new();
        self.front.take_answers(|answer| answers.push(answer));
        answers
    }
}

fn taken(engine: &EngineQueues) -> Vec<usize> {
    let mut slots = Vec::new();
    engine.take(|slot| slots.push(slot));
    slots.sort_unstable();
    slots
}

#[test]
fn request_travels_to_the_engine_and_its_answer_back() {
    let pair = Pair::new();
    let engine = pair.engine();
    pair.send(3);
    assert_eq!(taken(&engine), [5]);
    assert_eq!(engine.request(5).header, [4; 40]);
    assert_eq!(taken(&engine), [] as [usize; 0]);
    engine.answer(5, Reply::Inline(b"hello"));
    let answers = pair.answers();
    assert_eq!(answers, [Answer { entry: 3, error: 0, payload_len: 0, inline_len: 5 }]);
    pair.front.inline_to_payload(&answers[0]);
    let mut bytes = [0; 5];
    engine.read_payload(5, &mut bytes);
    assert_eq!(&bytes, b"hello");
    assert_eq!(pair.answers(), []);
}

#[test]
fn successor_starts_what_was_sent_and_not_answered() {
    let pair = Pair::new();
    pair.send(1);
    let first = pair.engine();
    pair.send(2);
    assert_eq!(taken(&first), [3, 4]);
    pair.send(6);
    first.answer(3, Reply::Payload(10));
    drop(first);
    pair.send(7);
    let second = pair.engine();
    assert_eq!(taken(&second), [4, 8, 9]);
    for slot in [9, 4, 8] {
        second.answer(slot, Reply::Error(libc::ENOSPC));
    }
    let mut entries: Vec<_> = pair.answers().iter().map(|answer| (answer.entry, answer.error)).collect();
    entries.sort_unstable();
    assert_eq!(entries, [(1, 0), (2, -libc::ENOSPC), (6, -libc::ENOSPC), (7, -libc::ENOSPC)]);
}

#[test]
fn answer_that_was_never_announced_reaches_the_front_through_the_successor() {
    let pair = Pair::new();
    let first = pair.engine();
    pair.send(4);
    assert_eq!(taken(&first), [6]);
    assert_eq!(pair.answers(), []);
    // Death between the slot's state and the channel.
    pair.memory.state(6).store(SlotState::Answered.number(), Ordering::Release);
    assert_eq!(pair.answers(), []);
    drop(first);
    let second = pair.engine();
    assert_eq!(taken(&second), [] as [usize; 0]);
    assert_eq!(pair.answers().len(), 1);
    assert_eq!(pair.answers(), []);
}

#[test]
fn stale_numbers_start_nothing_twice() {
    let pair = Pair::new();
    pair.send(0);
    let engine = pair.engine();
    // The front sent it before the engine came, and its number arrives as well.
    pair.memory.to_engine(1).push(0);
    assert_eq!(taken(&engine), [2]);
    engine.answer(2, Reply::Payload(0));
    assert_eq!(pair.answers().len(), 1);
    pair.memory.to_engine(1).push(0);
    assert_eq!(taken(&engine), [] as [usize; 0]);
    pair.memory.to_engine(1).push(77);
    assert_eq!(taken(&engine), [] as [usize; 0]);
}

#[test]
fn damaged_answers_become_errors_and_strange_ones_are_ignored() {
    let pair = Pair::new();
    let engine = pair.engine();
    pair.send(0);
    assert_eq!(taken(&engine), [2]);
    engine.answer(2, Reply::Payload(4097));
    assert_eq!(pair.answers(), [Answer { entry: 0, error: -libc::EIO, payload_len: 0, inline_len: 0 }]);
    pair.memory.to_front(1).push(99);
    pair.memory.state(3).store(SlotState::Answered.number(), Ordering::Release);
    pair.memory.to_front(1).push(1);
    assert_eq!(pair.answers(), []);
}

#[test]
fn sleeping_side_is_told_of_news_that_came_meanwhile() {
    let pair = Pair::new();
    let engine = pair.engine();
    taken(&engine);
    assert!(engine.prepare_sleep());
    pair.send(5);
    pair.front.ring();
    assert!(!engine.prepare_sleep());
    engine.awake();
    assert_eq!(taken(&engine), [7]);
    pair.answers();
    assert!(pair.front.prepare_sleep());
    engine.answer(7, Reply::Payload(0));
    assert!(!pair.front.prepare_sleep());
    engine.ring();
    let mut count = [0; 8];
    assert!(rustix::io::read(&engine.queues[1].doorbell, &mut count).is_ok(), "the doorbell rang");
}

#[test]
fn front_that_has_given_up_answers_everything_with_eio() {
    let pair = Pair::new();
    pair.send(1);
    pair.send(2);
    assert!(pair.front.prepare_sleep());
    pair.given_up.store(true, Ordering::Release);
    assert!(!pair.front.prepare_sleep());
    let errors: Vec<_> = pair.answers().iter().map(|answer| (answer.entry, answer.error)).collect();
    assert_eq!(errors, [(1, -libc::EIO), (2, -libc::EIO)]);
    assert!(pair.front.prepare_sleep());
}

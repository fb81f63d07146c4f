//! A queue of entry numbers between two processes: one writer, one reader, no lock.
//!
//! A number is only a *hint* that this entry changed its state; the state itself stands in the entry's slot. Therefore
//! nothing is lost when either side dies at any instant: a writer that dies before it stored the tail, or a reader that
//! dies after it stored the head, is made good by walking the slots once. A full channel does the same on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::memory::SharedMemory;

/// Numbers a channel holds: every entry of a queue twice, since a walk leaves its hint behind.
pub(super) const CAPACITY: u32 = 256;
/// Bytes of a channel: three cache lines (head, tail, flags) and the numbers.
pub(super) const CHANNEL_BYTES: usize = 192 + CAPACITY as usize * 4;

const TAIL: usize = 64;
const SLEEPS: usize = 128;
const LOST: usize = 132;
const ENTRIES: usize = 192;

/// What a reader finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Popped {
    /// This entry has changed its state, perhaps.
    Entry(u32),
    /// Numbers were lost: look at every slot.
    Lost,
    /// Nothing new.
    Empty,
}

/// One direction between the two processes.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    memory: Arc<SharedMemory>,
    base: usize,
}

impl Channel {
    pub(super) fn new(memory: Arc<SharedMemory>, base: usize) -> Self {
        Self { memory, base }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.memory.atomic_u32(self.base + offset)
    }

    fn entry(&self, position: u32) -> &AtomicU32 {
        self.word(ENTRIES + (position % CAPACITY) as usize * 4)
    }

    /// Writer: appends a number. A full channel marks itself as lost instead.
    pub(super) fn push(&self, entry: u32) {
        let tail = self.word(TAIL).load(Ordering::Relaxed);
        if tail.wrapping_sub(self.word(0).load(Ordering::Acquire)) >= CAPACITY {
            self.declare_lost();
            return;
        }
        self.entry(tail).store(entry, Ordering::Relaxed);
        // Sequentially consistent, as the look at `sleeps` that follows: either the reader sees this number before it
        // sleeps, or we see that it sleeps.
        self.word(TAIL).store(tail.wrapping_add(1), Ordering::SeqCst);
    }

    /// Writer: tells the reader to look at every slot.
    pub(super) fn declare_lost(&self) {
        self.word(LOST).store(1, Ordering::SeqCst);
    }

    /// Reader: takes the next number.
    pub(super) fn pop(&self) -> Popped {
        let head = self.word(0).load(Ordering::Relaxed);
        let tail = self.word(TAIL).load(Ordering::Acquire);
        if head == tail {
            if self.word(LOST).load(Ordering::Relaxed) != 0 && self.word(LOST).swap(0, Ordering::SeqCst) != 0 {
                return Popped::Lost;
            }
            return Popped::Empty;
        }
        // More than fits is damage by the other side; what it meant is found in the slots.
        if tail.wrapping_sub(head) > CAPACITY {
            self.skip();
            return Popped::Lost;
        }
        let entry = self.entry(head).load(Ordering::Relaxed);
        self.word(0).store(head.wrapping_add(1), Ordering::Release);
        Popped::Entry(entry)
    }

    /// Reader: forgets all numbers, to walk the slots instead.
    pub(super) fn skip(&self) {
        let tail = self.word(TAIL).load(Ordering::Acquire);
        self.word(LOST).store(0, Ordering::SeqCst);
        self.word(0).store(tail, Ordering::Release);
    }

    /// Whether a reader would find something.
    pub(super) fn has_news(&self) -> bool {
        self.word(0).load(Ordering::Relaxed) != self.word(TAIL).load(Ordering::SeqCst)
            || self.word(LOST).load(Ordering::SeqCst) != 0
    }

    /// The reader's word that it sleeps: to be set before [`has_news`](Self::has_news) is asked for the last time.
    pub(super) fn sleeps(&self) -> &AtomicU32 {
        self.word(SLEEPS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel() -> Channel {
        Channel::new(Arc::new(SharedMemory::create("channel", 8192).unwrap()), 64)
    }

    #[test]
    fn numbers_come_out_in_order_across_many_wraps() {
        let channel = channel();
        for round in 0..1000_u32 {
            for entry in 0..round % 7 {
                channel.push(entry);
            }
            for entry in 0..round % 7 {
                assert_eq!(channel.pop(), Popped::Entry(entry));
            }
            assert_eq!(channel.pop(), Popped::Empty);
            assert!(!channel.has_news());
        }
    }

    #[test]
    fn full_channel_says_lost_after_what_it_holds() {
        let channel = channel();
        for entry in 0..=CAPACITY {
            channel.push(entry);
        }
        for entry in 0..CAPACITY {
            assert_eq!(channel.pop(), Popped::Entry(entry));
        }
        assert!(channel.has_news());
        assert_eq!(channel.pop(), Popped::Lost);
        assert_eq!(channel.pop(), Popped::Empty);
    }

    #[test]
    fn impossible_tail_is_taken_as_lost() {
        let channel = channel();
        channel.word(TAIL).store(CAPACITY + 1, Ordering::SeqCst);
        assert_eq!(channel.pop(), Popped::Lost);
        assert_eq!(channel.pop(), Popped::Empty);
        channel.push(3);
        assert_eq!(channel.pop(), Popped::Entry(3));
    }

    #[test]
    fn writer_and_reader_on_two_threads_lose_nothing() {
        let channel = channel();
        let writer = channel.clone();
        let thread = std::thread::spawn(move || {
            for entry in 0..100_000 {
                while writer.word(TAIL).load(Ordering::Relaxed).wrapping_sub(writer.word(0).load(Ordering::Acquire))
                    >= CAPACITY
                {
                    std::thread::yield_now();
                }
                writer.push(entry);
            }
        });
        let mut expected = 0;
        while expected < 100_000 {
            match channel.pop() {
                Popped::Entry(entry) => {
                    assert_eq!(entry, expected);
                    expected += 1;
                }
                Popped::Empty => std::thread::yield_now(),
                Popped::Lost => panic!("the writer waited for room"),
            }
        }
        thread.join().unwrap();
    }
}

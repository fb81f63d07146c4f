//! The pending log as the front holds it: it outlives the engine, not a power cut.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use plywood::engine::PendingLog;
use plywood::units::Lsn;

/// Small, so that it fills; a part of it is the engine's reserve.
const BYTES: usize = 96 << 10;

#[derive(Clone, Default)]
struct Content {
    session: u128,
    used: usize,
    records: VecDeque<(Lsn, Rc<[u8]>)>,
    is_poisoned: bool,
    most_used: usize,
}

/// A handle to one log.
#[derive(Clone)]
pub struct Log(Rc<RefCell<Content>>);

impl Log {
    pub fn new(session: u128) -> Self {
        Self(Rc::new(RefCell::new(Content { session, ..Content::default() })))
    }

    /// Another log with the same content: what a successor finds.
    pub fn copy(&self) -> Self {
        Self(Rc::new(RefCell::new(self.0.borrow().clone())))
    }
}

impl PendingLog for Log {
    fn session(&self) -> u128 {
        self.0.borrow().session
    }

    fn free_bytes(&self) -> usize {
        BYTES - self.0.borrow().used
    }

    fn publish(&mut self, lsn: Lsn, record: &[u8]) {
        let mut content = self.0.borrow_mut();
        assert!(content.used + record.len() <= BYTES, "published into a full log");
        if let Some((last, _)) = content.records.back() {
            assert_eq!(lsn, last.next(), "published out of order");
        }
        content.used += record.len();
        content.most_used = content.most_used.max(content.used);
        content.records.push_back((lsn, record.into()));
    }

    fn release(&mut self, through: Lsn) {
        let mut content = self.0.borrow_mut();
        while content.records.front().is_some_and(|(lsn, _)| *lsn <= through) {
            let length = content.records.pop_front().map_or(0, |(_, record)| record.len());
            content.used -= length;
        }
    }

    fn poison(&mut self) {
        self.0.borrow_mut().is_poisoned = true;
    }

    fn is_poisoned(&self) -> bool {
        self.0.borrow().is_poisoned
    }

    fn published(&self) -> Vec<(Lsn, Vec<u8>)> {
        self.0.borrow().records.iter().map(|(lsn, record)| (*lsn, record.to_vec())).collect()
    }
}

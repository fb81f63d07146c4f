//! Making the medium durable, and when to believe that it is.
//!
//! A flush that fails says so once, to whoever asked, and what it was to make durable may be lost though others succeed
//! (A5). So flushes and durable writes that overlap are believed together: the answer to one waits until all that were in
//! flight at its end have ended, and where one has failed, no other has worked. One that begins later is none of its
//! business: it began after what this one covers was durable.

use std::cell::RefCell;
use std::future::Future;
use std::io;

use event_listener::Event;
use smallvec::SmallVec;

use super::Storage;
use super::pool::{Pool, until};
use crate::canary::{Canary, is_broken};
use crate::error::{Error, Result};
use crate::units::PoolBlock;

/// Flushes and durable writes in flight, each by a number.
#[derive(Default)]
pub(super) struct Barriers {
    numbers: RefCell<(u64, SmallVec<[u64; 4]>)>,
    ended: Event,
}

/// One of them, until it is dropped.
struct Barrier<'a> {
    barriers: &'a Barriers,
    number: u64,
}

impl Barriers {
    fn begin(&self) -> Barrier<'_> {
        let (last, in_flight) = &mut *self.numbers.borrow_mut();
        *last += 1;
        in_flight.push(*last);
        Barrier { barriers: self, number: *last }
    }

    /// Waits for the end of all that are in flight now.
    async fn settle(&self) {
        let last = self.numbers.borrow().0;
        until(&self.ended, || self.numbers.borrow().1.iter().all(|number| *number > last)).await;
    }
}

impl Drop for Barrier<'_> {
    fn drop(&mut self) {
        self.barriers.numbers.borrow_mut().1.retain(|number| *number != self.number);
        self.barriers.ended.notify(usize::MAX);
    }
}

impl<S: Storage> Pool<S> {
    /// Makes every write that has completed durable (A1). `what` says which flush this is.
    ///
    /// # Errors
    /// `Poisoned`, which the pool then is: when it fails, or another does that is in flight meanwhile.
    pub(super) async fn flush_medium(&self, what: &str) -> Result<()> {
        self.believe(self.inner.storage.flush(), || what.to_owned()).await
    }

    /// Writes whole blocks and has them durable.
    ///
    /// # Errors
    /// As of [`flush_medium`](Self::flush_medium).
    pub(super) async fn write_durable(&self, at: PoolBlock, from: &S::Memory, what: &str) -> Result<()> {
        let written = self.inner.storage.write_durable(at.offset_bytes(), from);
        self.believe(written, || format!("{what} at pool block {at}")).await
    }

    async fn believe(
        &self,
        operation: impl Future<Output = io::Result<()>>,
        what: impl FnOnce() -> String,
    ) -> Result<()> {
        let barrier = self.inner.barriers.begin();
        if let Err(error) = operation.await
            && !is_broken(Canary::FailedFlushIgnored)
        {
            // Before this one has ended for the others.
            return Err(self.poison(&Error::io(what(), error)));
        }
        drop(barrier);
        if !is_broken(Canary::FlushBelievedAlone) {
            self.inner.barriers.settle().await;
            if let Some(error) = self.poison_error() {
                return Err(error);
            }
        }
        Ok(())
    }
}

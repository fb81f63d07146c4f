//! Writes that wait for space instead of failing, where their volume asks for it.
//!
//! Who waits holds neither range nor epoch nor promise (O8): reads, flushes, discards and other volumes go on. How long, and
//! how many at a time, is bounded: a queue of the front must keep entries for those who need no space.

use std::cell::Cell;

use super::Storage;
use super::pool::Pool;
use crate::error::{Error, Result};
use crate::format::OnFull;
use crate::units::VolumeId;

/// Seconds that a write waits for space.
const WAIT_TICKS: u64 = 60;

/// What a change knows of its waiting for room.
pub(super) struct Waited {
    /// Whether it may wait when the pool is full: a discard does not.
    may_wait: bool,
    since: Option<u64>,
    /// How often room was made for it, and taken by others.
    pub(super) refusals: u32,
}

impl Waited {
    pub(super) fn new(may_wait: bool) -> Self {
        Self { may_wait, since: None, refusals: 0 }
    }
}

/// Bounds on writes that wait for space.
pub(super) struct Patience {
    waiting: Cell<u64>,
    most: Cell<u64>,
    ticks: Cell<u64>,
}

impl Default for Patience {
    fn default() -> Self {
        Self { waiting: Cell::new(0), most: Cell::new(u64::MAX), ticks: Cell::new(WAIT_TICKS) }
    }
}

/// One that waits.
struct Waiter<'a>(&'a Patience);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

impl<S: Storage> Pool<S> {
    /// Has writes to a volume wait when the pool is full, or fail at once.
    pub async fn set_on_full(&self, id: VolumeId, wait: bool) -> Result<()> {
        self.change(id, |_, record| {
            record.on_full = if wait { OnFull::Wait } else { OnFull::Error };
            Ok(())
        })
        .await
    }

    /// At most `most` writes wait for space at a time, each for `ticks` seconds; others fail at once.
    pub fn bound_waiting(&self, most: u64, ticks: u64) {
        self.inner.patience.most.set(most);
        self.inner.patience.ticks.set(ticks);
    }

    /// Writes that wait for space.
    pub fn waiting_for_space(&self) -> u64 {
        self.inner.patience.waiting.get()
    }

    /// Waits a second after a refusal, when the volume is one whose writes wait; the caller then tries again. Nothing may be
    /// held.
    ///
    /// # Errors
    /// The refusal, when it does not wait, has waited long enough, or too many do.
    pub(super) async fn wait_out(&self, id: VolumeId, refusal: Error, waited: &mut Waited) -> Result<()> {
        let inner = &self.inner;
        let patience = &inner.patience;
        let waits = {
            let state = inner.state.borrow();
            let volume = state.volumes.get(&id);
            let asked_for = volume.is_some_and(|volume| volume.record.on_full == OnFull::Wait);
            waited.may_wait && asked_for && !state.closing
        };
        let mut now = inner.ticks.get();
        let since = *waited.since.get_or_insert(now);
        if !waits || now - since >= patience.ticks.get() || patience.waiting.get() >= patience.most.get() {
            return Err(refusal);
        }
        if patience.waiting.get() == 0 && since == now {
            tracing::warn!(volume = %self.volume_name(id), "writes wait for space: {refusal}");
        }
        patience.waiting.set(patience.waiting.get() + 1);
        let _waiter = Waiter(patience);
        self.wait_for_tick(&mut now).await;
        Ok(())
    }
}

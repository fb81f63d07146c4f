//! When a walk is due, and how it gives way to requests.

use futures_lite::future::yield_now;

use super::walk::{Versions, Walk, Walked};
use crate::engine::Storage;
use crate::engine::info::ExclusiveBytes;
use crate::engine::pool::Pool;
use crate::engine::state::{Need, State, Volume};
use crate::error::Result;
use crate::format::Place;
use crate::units::{BLOCK_BYTES, VolumeId};

/// Leaves looked at before other tasks get their turn: some 100 microseconds.
const STEPS_AT_A_TIME: usize = 8;
/// Leaves looked at a tick while there are requests: one or two percent of a processor.
const STEPS_A_BUSY_TICK: usize = 1024;
/// Ticks after which a figure of a volume that changes all the time is found anew.
const AGE_TICKS: u64 = 8;
/// Such a figure may take one part in so many of the time.
const SHARE: u64 = 20;

/// How far a walk may go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// To the end, while somebody waits for it.
    Full,
    /// Slowly while there are requests.
    GivingWay,
}

impl<S: Storage> Pool<S> {
    /// The background task.
    pub(in crate::engine) async fn run_exclusive(&self) {
        let inner = &self.inner;
        let mut tick = inner.ticks.get();
        loop {
            self.wait_for_tick(&mut tick).await;
            if !self.goes_on() {
                return;
            }
            let due = inner.state.borrow_mut().figures_due(tick);
            for id in due {
                if !self.goes_on() {
                    return;
                }
                self.measure(id, Pace::GivingWay).await;
            }
        }
    }

    /// Finds what volumes hold alone, now: for a pool without background work. Begins no more after some `leaves_most` leaves.
    /// What cannot be found stays unknown.
    pub async fn measure_exclusive(&self, ids: &[VolumeId], leaves_most: u64) {
        let mut left = leaves_most;
        for id in ids {
            if left == 0 {
                return;
            }
            if !self.inner.state.borrow().is_figure_exact(*id) {
                left = left.saturating_sub(self.measure(*id, Pace::Full).await);
            }
        }
    }

    fn goes_on(&self) -> bool {
        let state = self.inner.state.borrow();
        !self.inner.stopped.get() && !state.closing && state.poisoned.is_none()
    }

    /// Walks a volume. Answers how many steps it took.
    async fn measure(&self, id: VolumeId, pace: Pace) -> u64 {
        let inner = &self.inner;
        let begun = inner.ticks.get();
        let Some(mut walk) = inner.state.borrow().begin_walk(id) else { return 0 };
        let mut steps = 0;
        match self.walk(&mut walk, pace, &mut steps).await {
            Ok(true) => inner.state.borrow_mut().end_walk(&walk, begun, inner.ticks.get()),
            Ok(false) => {}
            Err(error) => {
                tracing::error!(volume = %self.volume_name(id), "what it holds alone cannot be found: {error}");
                if let Some(volume) = inner.state.borrow_mut().volumes.get_mut(&id) {
                    volume.figure.failed = Some(walk.versions);
                    volume.figure.last = None;
                }
            }
        }
        steps
    }

    /// Answers false when the pool ended before the walk did.
    async fn walk(&self, walk: &mut Walk, pace: Pace, steps: &mut u64) -> Result<bool> {
        let inner = &self.inner;
        let mut tick = inner.ticks.get();
        let mut left = STEPS_A_BUSY_TICK;
        loop {
            if !self.goes_on() {
                return Ok(false);
            }
            let requests = inner.requests.get();
            {
                let _stay = self.enter();
                for _ in 0..STEPS_AT_A_TIME {
                    *steps += 1;
                    if self.walk_step(walk).await? {
                        return Ok(true);
                    }
                }
            }
            // Nothing is held from here on.
            yield_now().await;
            if pace == Pace::Full {
                continue;
            }
            left = left.saturating_sub(if inner.requests.get() == requests { 0 } else { STEPS_AT_A_TIME });
            if left == 0 {
                self.wait_for_tick(&mut tick).await;
                left = STEPS_A_BUSY_TICK;
            }
        }
    }

    async fn walk_step(&self, walk: &mut Walk) -> Result<bool> {
        let mut leaf = None;
        loop {
            let step = self.inner.state.borrow_mut().walk_on(walk);
            let need = match (step, leaf) {
                (Ok(done), None) => return Ok(done),
                (Ok(done), Some(leaf)) => {
                    // What was read for this walk alone takes nobody's place in memory.
                    self.inner.state.borrow_mut().cache.forget_clean(leaf);
                    return Ok(done);
                }
                (Err(need), _) => need,
            };
            if let Need::Node { address, place: Place::Node { level: 0, .. }, .. } = need {
                leaf = Some(address);
            }
            self.satisfy(need).await?;
        }
    }
}

impl State {
    /// Volumes whose figure is not that of now, and that have come to rest or were not looked at for long.
    fn figures_due(&mut self, now: u64) -> Vec<VolumeId> {
        let mut due = Vec::new();
        for (id, volume) in &mut self.volumes {
            let versions = volume.versions();
            let figure = &mut volume.figure;
            let rests = figure.seen.is_some_and(|seen| seen == versions);
            figure.seen = Some(versions);
            if figure.failed == Some(versions) {
                continue;
            }
            let is_due = match figure.last {
                None => true,
                Some(last) if last.versions == versions => false,
                Some(last) => rests || now - last.begun >= AGE_TICKS.max(last.took * SHARE),
            };
            if is_due {
                due.push(*id);
            }
        }
        due
    }

    /// Whether nothing has happened since the walk that could change what it found.
    fn is_figure_exact(&self, id: VolumeId) -> bool {
        let exact = |volume: &Volume| volume.figure.last.is_some_and(|last| last.versions == volume.versions());
        self.carcasses.is_empty() && self.volumes.get(&id).is_some_and(exact)
    }

    /// What a volume holds alone, as far as it is known.
    pub(in crate::engine) fn exclusive_bytes(&self, id: VolumeId, now: u64) -> Option<ExclusiveBytes> {
        let volume = self.volumes.get(&id)?;
        let Walked { sum, begun, .. } = volume.figure.last?;
        let record_blocks = volume.record_blocks + volume.record.attributes.len() as u64;
        let since = now.saturating_sub(begun);
        let exact = self.is_figure_exact(id);
        Some(ExclusiveBytes {
            bytes: (sum.data + sum.nodes + record_blocks) * BLOCK_BYTES,
            data_bytes: sum.data * BLOCK_BYTES,
            age_seconds: if exact { 0 } else { since },
            unchanged_seconds: exact.then_some(since),
        })
    }
}

impl Volume {
    pub(super) fn versions(&self) -> Versions {
        Versions { own: self.changes.version(), family: self.family.borrow().version() }
    }
}

//! The engine's side of the export: takes requests from the queues and has volumes do them.
//!
//! One task a request, in the place that its slot has for it (`tasks.rs`); no thread, no blocking call. What is rare and
//! large in a task is boxed, since there are as many places as slots. The server is the [`Poller`] of the thread's
//! loop, which looks at the queues and has woken tasks go on, and tells the front to ring before the thread sleeps.

pub mod counters;
mod operations;
mod tasks;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use event_listener::Event;

use self::counters::{AllCounters, IoCounters, VolumeCounters};
use self::tasks::{SlotTasks, Tasks};
use super::device::{Device, Volumes};
use super::fuse::request::{NAME_BYTES, Request, parse};
use super::loopdev::WaitingWrites;
use super::shared::{EngineQueues, INLINE_BYTES, OpenFile, OpenTable, Reply};
use crate::error::Result;
use crate::io::Poller;
use crate::units::VolumeId;

type MemoryOf<V> = <<V as Volumes>::Device as Device>::Memory;
/// A file's number, its device, and what its requests are counted in.
type Opened<V> = (u64, Rc<<V as Volumes>::Device>, VolumeCounters);

/// Serves the volumes `V` to the front.
pub struct Server<V: Volumes> {
    state: Rc<State<V>>,
    tasks: Rc<dyn Tasks>,
}

struct State<V: Volumes> {
    queues: EngineQueues,
    /// All payloads, one piece a slot.
    payloads: MemoryOf<V>,
    payload_bytes: usize,
    volumes: V,
    opens: OpenTable,
    /// Devices of open files, by entry of the table, with the file's number.
    devices: RefCell<Vec<Option<Opened<V>>>>,
    counters: AllCounters,
    in_flight: Cell<usize>,
    stopped: Cell<bool>,
    /// Something was closed, or nothing is in flight any more.
    changed: Event,
}

/// An answer, kept until it is handed over.
enum Answer {
    Inline([u8; INLINE_BYTES], usize),
    Payload(usize),
}

impl Answer {
    const EMPTY: Self = Self::Payload(0);

    fn inline<T: bytemuck::NoUninit>(value: &T) -> Self {
        let mut bytes = [0; INLINE_BYTES];
        bytes[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(value));
        Self::Inline(bytes, size_of::<T>())
    }
}

impl<V: Volumes> Server<V> {
    /// Takes over the queues, with whatever a predecessor left in them: its open files are opened again, and what it was
    /// sent and did not answer is done when the thread's loop runs. `payloads` is the memory of all payloads.
    ///
    /// # Panics
    /// When `payloads` has another length than the payloads of the queues.
    pub fn new(queues: EngineQueues, payloads: MemoryOf<V>, volumes: V) -> Self {
        use crate::engine::Memory;

        let geometry = queues.memory().geometry();
        let payload_bytes = geometry.payload_bytes();
        assert_eq!(payloads.len(), payload_bytes * geometry.slot_count());
        let opens = OpenTable::new(queues.memory());
        let state = State {
            payloads,
            payload_bytes,
            volumes,
            opens,
            devices: RefCell::default(),
            counters: AllCounters::default(),
            in_flight: Cell::new(0),
            stopped: Cell::new(false),
            changed: Event::new(),
            queues,
        };
        for (number, file) in state.opens.all() {
            match state.volumes.open(file.volume, file.read_only) {
                Ok(device) => state.keep(number, file.volume, device),
                // Its requests get an error; the others' must be served.
                Err(error) => tracing::error!(volume = %file.volume, %error, "cannot open an attached volume again"),
            }
        }
        let state = Rc::new(state);
        let of_tasks = Rc::clone(&state);
        let slot_count = state.queues.memory().geometry().slot_count();
        let tasks = SlotTasks::new(slot_count, move |slot, begun| Rc::clone(&of_tasks).serve(slot, begun));
        Self { state, tasks: Rc::new(tasks) }
    }

    /// Tells the front that this engine serves from now on.
    pub fn declare_serving(&self) {
        self.state.queues.declare_serving();
    }

    /// Volumes whose file is open, as it is under an attached device.
    pub fn open_volumes(&self) -> Vec<VolumeId> {
        let mut volumes: Vec<_> = self.state.opens.all().map(|(_, file)| file.volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        volumes
    }

    /// Whether the file of this volume is open.
    pub fn is_open(&self, id: VolumeId) -> bool {
        self.state.opens.all().any(|(_, file)| file.volume == id)
    }

    /// Completes when the file of this volume is closed: the kernel tells so a moment after a device is detached.
    pub async fn closed(&self, id: VolumeId) {
        self.wait_until(|server| !server.is_open(id)).await;
    }

    /// Takes no more requests: those that come wait for a successor.
    pub fn stop(&self) {
        self.state.stopped.set(true);
    }

    /// Requests that were taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.state.in_flight.get()
    }

    /// What may wait for space at a time: a quarter of the entries of the smallest queue, each with what an entry carries.
    pub fn waiting_writes(&self) -> WaitingWrites {
        let geometry = self.state.queues.memory().geometry();
        let depth = (0..geometry.queue_count()).map(|queue| geometry.depth(queue)).min().unwrap_or(1);
        let bytes = u32::try_from(self.state.payload_bytes).unwrap_or(u32::MAX);
        WaitingWrites { most: (depth / 4).max(1), bytes }
    }

    /// Completes when every request that was taken has been answered.
    pub async fn idle(&self) {
        self.wait_until(|server| server.state.in_flight.get() == 0).await;
    }

    /// What the requests of the volumes came to that were in use since this engine process began to serve.
    pub fn counters(&self) -> Vec<(VolumeId, IoCounters)> {
        self.state.counters.all()
    }

    /// Forgets the counters of all volumes but those that `keep` names.
    pub fn retain_counters(&self, keep: impl Fn(VolumeId) -> bool) {
        self.state.counters.retain(keep);
    }

    /// The volumes.
    pub fn volumes(&self) -> &V {
        &self.state.volumes
    }

    async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            let listener = self.state.changed.listen();
            if !condition(self) {
                listener.await;
            }
        }
    }
}

impl<V: Volumes> Clone for Server<V> {
    fn clone(&self) -> Self {
        Self { state: Rc::clone(&self.state), tasks: Rc::clone(&self.tasks) }
    }
}

impl<V: Volumes> Poller for Server<V> {
    fn poll(&self) -> bool {
        let went_on = self.tasks.run();
        self.state.queues.ring();
        if self.state.stopped.get() {
            return went_on;
        }
        // One look at the clock for all that have come.
        let mut begun = None;
        self.state.queues.take(|slot| {
            let begun = *begun.get_or_insert_with(Instant::now);
            self.state.in_flight.set(self.state.in_flight.get() + 1);
            self.tasks.start(slot, begun);
        });
        went_on || begun.is_some()
    }

    fn prepare_sleep(&self) -> bool {
        self.state.queues.ring();
        self.state.queues.prepare_sleep() || self.state.stopped.get()
    }

    fn woken(&self) {
        self.state.queues.awake();
    }
}

impl<V: Volumes> State<V> {
    /// Does one request and hands its answer over.
    async fn serve(self: Rc<Self>, slot: usize, begun: Instant) {
        let done = match self.parsed(slot) {
            Ok(request) => self.execute(slot, request, begun).await,
            Err(errno) => Err(errno),
        };
        let held = match done {
            Ok((answer, held)) => {
                match answer {
                    Answer::Inline(bytes, len) => self.queues.answer(slot, Reply::Inline(&bytes[..len])),
                    Answer::Payload(len) => self.queues.answer(slot, Reply::Payload(len)),
                }
                held
            }
            Err(errno) => {
                self.queues.answer(slot, Reply::Error(errno));
                None
            }
        };
        // Rule O8: an overlapping change may start only now that the answer is the front's. Were this process to die
        // before, the successor would do this request again, and must not undo a later one.
        drop(held);
        self.in_flight.set(self.in_flight.get() - 1);
        if self.in_flight.get() == 0 {
            self.changed.notify(usize::MAX);
        }
    }

    /// The request in a slot. By itself, so that its bytes are no part of the task.
    fn parsed(&self, slot: usize) -> Result<Request, i32> {
        let raw = self.queues.request(slot);
        let mut name = [0; NAME_BYTES];
        // Of other requests it would be a look at memory that this processor does not have at hand.
        if raw.has_name() {
            self.queues.read_payload(slot, &mut name);
        }
        parse(&raw, self.queues.memory().geometry().arrangement(), &name, self.payload_bytes)
    }

    fn keep(&self, number: u64, volume: VolumeId, device: V::Device) {
        let entry = OpenTable::entry(number);
        let mut devices = self.devices.borrow_mut();
        if devices.len() <= entry {
            devices.resize_with(entry + 1, || None);
        }
        devices[entry] = Some((number, Rc::new(device), self.counters.of(volume)));
    }

    /// The device of an open file.
    fn device(&self, number: u64) -> Result<(Rc<V::Device>, VolumeCounters), i32> {
        match self.devices.borrow().get(OpenTable::entry(number)) {
            Some(Some((same, device, counters))) if *same == number => Ok((Rc::clone(device), Rc::clone(counters))),
            // It is open, and could not be opened again after a restart.
            _ if self.opens.find(number).is_some() => Err(libc::EIO),
            _ => Err(libc::EBADF),
        }
    }

    fn open(&self, volume: VolumeId, read_only: bool, unique: u64) -> Result<u64, i32> {
        let device = self.volumes.open(volume, read_only).map_err(|error| refused(volume, "open", &error))?;
        let number = self.opens.insert(OpenFile { volume, read_only, unique }).ok_or(libc::ENFILE)?;
        self.keep(number, volume, device);
        Ok(number)
    }

    fn close(&self, number: u64) {
        let device = match self.devices.borrow_mut().get_mut(OpenTable::entry(number)) {
            Some(slot) if slot.as_ref().is_some_and(|(same, ..)| *same == number) => slot.take(),
            _ => None,
        };
        self.opens.remove(number);
        drop(device);
        self.changed.notify(usize::MAX);
    }
}

/// The errno of an error, which is logged: nobody else sees more than the number.
fn refused(volume: VolumeId, operation: &str, error: &crate::error::Error) -> i32 {
    tracing::warn!(%volume, operation, %error, "request refused");
    error.errno()
}

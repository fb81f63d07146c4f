//! Where everything stands in the memory that front and engine share, and the header that says so.
//!
//! Two memfds. *Control*: a header page, one page a queue (a channel in each direction), the request slots, the table of
//! open files. *Payloads*: one piece of equal size for each slot. A newer build of the engine checks magic, version and
//! geometry before it touches anything; all later offsets follow from the checked geometry.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::channel::{CHANNEL_BYTES, Channel};
use super::geometry::{Arrangement, Geometry, MOST_QUEUES};
use super::memory::SharedMemory;
use crate::error::{Error, Result};

const MAGIC: u64 = u64::from_le_bytes(*b"plywoodQ");
/// Version of this layout. Another number means another layout: an engine that does not know it must not serve.
pub const LAYOUT_VERSION: u32 = 1;

/// Bytes of a request slot.
const SLOT_BYTES: usize = 512;
/// The kernel's part of a slot: in_out, op_in and ring_ent_in_out (`struct fuse_uring_req_header`).
pub(crate) const HEADER_BYTES: usize = 288;
/// Longest reply that a slot carries beside the payload.
pub const INLINE_BYTES: usize = 128;
/// Files that can be open at a time.
pub(super) const OPENS: usize = 16384;
/// Bytes of an entry of the table of open files.
pub(super) const OPEN_BYTES: usize = 32;

const PAGE: usize = 4096;
const DEPTHS: usize = 1024;
const _: () = assert!(DEPTHS + MOST_QUEUES * 2 <= PAGE);
const _: () = assert!(2 * CHANNEL_BYTES <= PAGE);
// A channel holds each entry of the deepest queue twice.
const _: () = assert!(super::channel::CAPACITY >= 2 * super::geometry::MOST_DEPTH);

/// State of a slot: who owns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    /// The front, or the kernel: no request of the engine's.
    Idle,
    /// The engine: a request waits or is worked on.
    Sent,
    /// The front: the answer is there.
    Answered,
}

impl SlotState {
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Idle => 0,
            Self::Sent => 1,
            Self::Answered => 2,
        }
    }
}

/// Offsets within a slot.
pub(super) mod slot {
    /// Start of `op_in`.
    pub const OP_IN: usize = 128;
    /// `payload_sz` of `ring_ent_in_out`.
    pub const RING_PAYLOAD_LEN: usize = 272;
    /// State, an atomic number.
    pub const STATE: usize = 288;
    /// Of the answer: 0 or a negative errno.
    pub const ERROR: usize = 292;
    /// Of the answer: length of the reply in the payload.
    pub const REPLY_PAYLOAD_LEN: usize = 296;
    /// Of the answer: length of the reply in the slot.
    pub const REPLY_INLINE_LEN: usize = 300;
    /// Of the request, arrangement `Stream`: length of the body read.
    pub const STREAM_LEN: usize = 304;
    /// The reply in the slot.
    pub const INLINE: usize = 320;
}
const _: () = assert!(slot::STATE == HEADER_BYTES && slot::INLINE + INLINE_BYTES <= SLOT_BYTES);

/// The two memories of a session, mapped and checked.
#[derive(Clone, Debug)]
pub struct SessionMemory {
    pub(super) control: Arc<SharedMemory>,
    pub(super) payloads: Arc<SharedMemory>,
    geometry: Geometry,
    first_slots: Vec<usize>,
}

impl SessionMemory {
    /// New memory of this geometry, all slots idle.
    ///
    /// # Errors
    /// What the host answers.
    pub fn create(geometry: Geometry) -> Result<Self> {
        let control = SharedMemory::create("plywood-queues", control_bytes(&geometry))?;
        let payloads = SharedMemory::create("plywood-payloads", geometry.slot_count() * geometry.payload_bytes())?;
        let word = |offset: usize, value: usize| {
            control.atomic_u32(offset).store(u32::try_from(value).unwrap_or(u32::MAX), Ordering::Relaxed);
        };
        word(8, LAYOUT_VERSION as usize);
        word(12, usize::from(geometry.arrangement() == Arrangement::Stream));
        word(16, geometry.payload_bytes());
        word(20, geometry.queue_count());
        word(24, geometry.slot_count());
        word(28, OPENS);
        for queue in 0..geometry.queue_count() {
            let depth = u16::try_from(geometry.depth(queue)).unwrap_or(u16::MAX);
            control.write(DEPTHS + queue * 2, &depth.to_ne_bytes());
        }
        control.atomic_u64(0).store(MAGIC, Ordering::Release);
        Ok(Self::assemble(control, payloads, geometry))
    }

    /// Maps the memory of a front.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when the header is not what this build knows or does not match the size.
    pub fn open(control: SharedMemory, payloads: SharedMemory) -> Result<Self> {
        let refuse = |what: String| Err(Error::Incompatible(format!("the front's queues: {what}")));
        if control.len() < PAGE || control.atomic_u64(0).load(Ordering::Acquire) != MAGIC {
            return refuse("magic number is wrong".into());
        }
        let word = |offset: usize| control.atomic_u32(offset).load(Ordering::Relaxed);
        if word(8) != LAYOUT_VERSION {
            return refuse(format!("version is {}, this build knows {LAYOUT_VERSION}", word(8)));
        }
        let arrangement = match word(12) {
            0 => Arrangement::Ring,
            1 => Arrangement::Stream,
            other => return refuse(format!("arrangement {other} is undefined")),
        };
        let queue_count = word(20) as usize;
        if queue_count > MOST_QUEUES || word(28) as usize != OPENS {
            return refuse(format!("{queue_count} queues, {} open files are out of bounds", word(28)));
        }
        let depths = (0..queue_count).map(|queue| {
            let mut depth = [0; 2];
            control.read(DEPTHS + queue * 2, &mut depth);
            u32::from(u16::from_ne_bytes(depth))
        });
        let geometry = Geometry::new(arrangement, word(16) as usize, depths.collect())?;
        if geometry.slot_count() != word(24) as usize
            || control.len() != control_bytes(&geometry)
            || payloads.len() != geometry.slot_count() * geometry.payload_bytes()
        {
            return refuse("sizes do not match the geometry".into());
        }
        Ok(Self::assemble(control, payloads, geometry))
    }

    fn assemble(control: SharedMemory, payloads: SharedMemory, geometry: Geometry) -> Self {
        let first_slots = geometry.first_slots();
        Self { control: Arc::new(control), payloads: Arc::new(payloads), geometry, first_slots }
    }

    /// The sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The memory of the queues.
    pub fn control(&self) -> &SharedMemory {
        &self.control
    }

    /// The memory of the payloads: slot `n` has the `n`-th piece of `payload_bytes`.
    pub fn payloads(&self) -> &Arc<SharedMemory> {
        &self.payloads
    }

    /// Whether the engine sleeps until its doorbell rings.
    pub(super) fn engine_sleeps(&self) -> &AtomicU32 {
        self.control.atomic_u32(128)
    }

    /// Whether an engine has begun to serve.
    pub(crate) fn is_served(&self) -> bool {
        self.control.atomic_u32(192).load(Ordering::Acquire) != 0
    }

    /// Notes whether an engine has begun to serve.
    pub(crate) fn set_served(&self, served: bool) {
        self.control.atomic_u32(192).store(u32::from(served), Ordering::Release);
    }

    pub(super) fn to_engine(&self, queue: usize) -> Channel {
        Channel::new(Arc::clone(&self.control), PAGE * (1 + queue))
    }

    pub(super) fn to_front(&self, queue: usize) -> Channel {
        Channel::new(Arc::clone(&self.control), PAGE * (1 + queue) + CHANNEL_BYTES)
    }

    /// Requests that the engine has and has not answered, as of now.
    pub(crate) fn requests_sent(&self) -> u32 {
        let is_sent = |slot: &usize| self.state(*slot).load(Ordering::Acquire) == SlotState::Sent.number();
        u32::try_from((0..self.geometry.slot_count()).filter(is_sent).count()).unwrap_or(u32::MAX)
    }

    /// Number of the slot of entry `entry` of a queue, when there is one.
    pub(super) fn slot(&self, queue: usize, entry: u32) -> Option<usize> {
        (entry < self.geometry.depth(queue)).then(|| self.first_slots[queue] + entry as usize)
    }

    /// Offset of `field` of a slot in the control memory.
    pub(super) fn at(&self, slot: usize, field: usize) -> usize {
        PAGE * (1 + self.geometry.queue_count()) + slot * SLOT_BYTES + field
    }

    pub(super) fn state(&self, slot: usize) -> &AtomicU32 {
        self.control.atomic_u32(self.at(slot, slot::STATE))
    }

    pub(super) fn word(&self, slot: usize, field: usize) -> &AtomicU32 {
        self.control.atomic_u32(self.at(slot, field))
    }

    /// Offset of the table of open files in the control memory.
    pub(super) fn opens(&self) -> usize {
        self.at(self.geometry.slot_count(), 0)
    }
}

fn control_bytes(geometry: &Geometry) -> usize {
    let bytes = PAGE * (1 + geometry.queue_count()) + geometry.slot_count() * SLOT_BYTES + OPENS * OPEN_BYTES;
    bytes.next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> SessionMemory {
        SessionMemory::create(Geometry::new(Arrangement::Ring, 8192, vec![4, 2]).unwrap()).unwrap()
    }

    fn reopened(memory: &SessionMemory) -> Result<SessionMemory> {
        let again = |memory: &SharedMemory| SharedMemory::open(memory.descriptor().try_clone_to_owned().unwrap());
        SessionMemory::open(again(memory.control())?, again(memory.payloads())?)
    }

    #[test]
    fn memory_opens_with_the_geometry_it_was_made_with() {
        let memory = memory();
        assert_eq!(reopened(&memory).unwrap().geometry(), memory.geometry());
    }

    #[test]
    fn header_with_any_field_changed_is_refused() {
        for (offset, value) in [(0, 1), (8, 2), (12, 7), (16, 0), (16, 4096), (20, 1), (20, 9999), (24, 7), (28, 1)] {
            let memory = memory();
            memory.control.atomic_u32(offset).store(value, Ordering::Relaxed);
            assert!(matches!(reopened(&memory), Err(Error::Incompatible(_))), "field at {offset}");
        }
        let memory = memory();
        memory.control.write(DEPTHS, &[0, 0]);
        assert!(reopened(&memory).is_err());
    }

    #[test]
    fn every_slot_and_the_table_of_open_files_lie_inside() {
        let memory = memory();
        assert_eq!(memory.slot(1, 1), Some(5));
        assert_eq!(memory.slot(1, 2), None);
        assert!(memory.opens() + OPENS * OPEN_BYTES <= memory.control.len());
    }
}

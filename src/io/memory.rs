//! The memory that I/O is done on: buffers of the engine's own and payloads shared with the front.
//!
//! Both are one type, [`IoMemory`], because a volume's data may stand in either: a 4 KiB write of a client goes from its
//! payload straight to the pool, a smaller one is merged in a buffer first. A handle is a pointer, a length and a share
//! in what keeps the bytes alive, so that an operation in flight owns what the kernel reads or fills.

use std::alloc::Layout;
use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use super::mapping::Mapping;
use crate::engine::Memory;

/// Alignment of owned buffers: enough for direct I/O on every host that is accepted.
pub const MEMORY_ALIGNMENT: usize = 4096;

/// The kernel takes at most 1 GiB as one registered buffer.
const REGISTERED_REGION_BYTES: usize = 1 << 30;

/// A piece of memory for I/O. A clone, and a [`slice`](Memory::slice), is another handle to the same bytes.
#[derive(Clone)]
pub struct IoMemory {
    start: NonNull<u8>,
    len: usize,
    backing: Backing,
}

#[derive(Clone)]
enum Backing {
    Owned(#[expect(dead_code, reason = "held to keep the bytes alive")] Rc<Allocation>),
    Payload(Rc<PayloadArea>),
}

/// Heap memory aligned for direct I/O, freed with its last handle.
struct Allocation {
    start: NonNull<u8>,
    layout: Layout,
}

impl Allocation {
    fn zeroed(len: usize) -> Self {
        // An empty allocation is undefined behaviour; one unit stands in for it.
        let layout = Layout::from_size_align(len.max(1), MEMORY_ALIGNMENT).expect("buffer is far below isize::MAX");
        // SAFETY: the layout's size is not 0.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
            .unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        Self { start, layout }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with this layout; the last handle is gone.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// The part of a shared [`Mapping`] that holds clients' payloads, as the engine's thread sees it.
///
/// A [`Reactor`](super::Reactor) may register it, so that the kernel pins its pages once instead of at every transfer.
pub struct PayloadArea {
    mapping: Arc<Mapping>,
    start: usize,
    len: usize,
    /// The ring's index of the first registered region; none while it is not registered.
    registered: Cell<Option<u16>>,
}

impl PayloadArea {
    /// Takes `range` (bytes) of a mapping as the area of payloads. Begin on a page, so that payloads are aligned.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn new(mapping: Arc<Mapping>, range: Range<usize>) -> Rc<Self> {
        assert!(range.start <= range.end && range.end <= mapping.len(), "payload area {range:?} is not inside");
        Rc::new(Self { start: range.start, len: range.end - range.start, mapping, registered: Cell::new(None) })
    }

    /// A handle to `range`, in bytes from the start of the area: a slot, or what a request uses of it.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn memory(self: &Rc<Self>, range: Range<usize>) -> IoMemory {
        assert!(range.start <= range.end && range.end <= self.len, "payload {range:?} is not inside");
        // SAFETY: the area is inside the mapping and the range is inside the area.
        let start = unsafe { NonNull::new_unchecked(self.mapping.as_ptr().add(self.start + range.start)) };
        IoMemory { start, len: range.end - range.start, backing: Backing::Payload(Rc::clone(self)) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether its length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The regions to be registered: address and length, each at most 1 GiB.
    pub(super) fn regions(&self) -> Vec<(*mut u8, usize)> {
        (0..self.len)
            .step_by(REGISTERED_REGION_BYTES)
            .map(|offset| {
                // SAFETY: the area is inside the mapping.
                let address = unsafe { self.mapping.as_ptr().add(self.start + offset) };
                (address, (self.len - offset).min(REGISTERED_REGION_BYTES))
            })
            .collect()
    }

    pub(super) fn set_registered(&self, first_index: Option<u16>) {
        self.registered.set(first_index);
    }

    /// The registered buffer that holds all of `len` bytes at `address`, if one does.
    fn registered_index(&self, address: usize, len: usize) -> Option<u16> {
        let first = self.registered.get()?;
        let offset = address - (self.mapping.as_ptr() as usize + self.start);
        let region = offset / REGISTERED_REGION_BYTES;
        let straddles = len > 0 && (offset + len - 1) / REGISTERED_REGION_BYTES != region;
        if straddles { None } else { first.checked_add(u16::try_from(region).ok()?) }
    }
}

impl IoMemory {
    /// Owned zeroed memory of `len` bytes, aligned to [`MEMORY_ALIGNMENT`].
    pub fn zeroed(len: usize) -> Self {
        let allocation = Allocation::zeroed(len);
        Self { start: allocation.start, len, backing: Backing::Owned(Rc::new(allocation)) }
    }

    /// Owned memory that holds a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let memory = Self::zeroed(bytes.len());
        memory.write(0, bytes);
        memory
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// Where the bytes are, for the kernel. Valid as long as a handle lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The ring's registered buffer that these bytes lie in.
    pub(super) fn registered_index(&self) -> Option<u16> {
        match &self.backing {
            Backing::Owned(_) => None,
            Backing::Payload(area) => area.registered_index(self.start.as_ptr() as usize, self.len),
        }
    }

    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at offset {offset} are not inside {} bytes of memory",
            self.len
        );
        // SAFETY: the offset is inside these bytes, which are inside one allocation or mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Memory for IoMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end, "range ends before it starts");
        let len = range.end - range.start;
        let start = NonNull::new(self.pointer(range.start, len)).expect("a pointer inside memory is not null");
        Self { start, len, backing: self.backing.clone() }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.pointer(offset, into.len());
        // SAFETY: `pointer` checked the range; no reference into the memory exists, so `into` does not overlap it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        let into = self.pointer(offset, from.len());
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }

    fn zero(&self, range: Range<usize>) {
        assert!(range.start <= range.end, "range ends before it starts");
        let len = range.end - range.start;
        // SAFETY: `pointer` checked the range.
        unsafe { std::ptr::write_bytes(self.pointer(range.start, len), 0, len) }
    }

    fn copy_from(&self, offset: usize, from: &Self) {
        let into = self.pointer(offset, from.len);
        // SAFETY: both ranges are checked; two handles may share bytes, which `copy` allows.
        unsafe { std::ptr::copy(from.start.as_ptr(), into, from.len) }
    }
}

impl fmt::Debug for IoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.backing {
            Backing::Owned(_) => "owned",
            Backing::Payload(_) => "payload",
        };
        f.debug_struct("IoMemory").field("kind", &kind).field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_the_bytes_of_their_whole() {
        let whole = IoMemory::zeroed(8192);
        assert_eq!(whole.as_ptr() as usize % MEMORY_ALIGNMENT, 0);
        let part = whole.slice(4096..8192).slice(100..200);
        part.write(0, &[7; 100]);
        let bytes = whole.to_vec();
        assert!(bytes[4196..4296].iter().all(|&byte| byte == 7));
        assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), 100);
        drop(whole);
        part.zero(50..100);
        assert_eq!(part.to_vec(), [[7; 50], [0; 50]].concat());
    }

    #[test]
    fn overlapping_copy_within_one_memory_moves_the_bytes() {
        let memory = IoMemory::from_bytes(&(0..100).collect::<Vec<u8>>());
        memory.copy_from(10, &memory.slice(0..50));
        assert_eq!(memory.to_vec()[10..60], (0..50).collect::<Vec<u8>>());
    }

    #[test]
    fn payload_outlives_other_handles_of_its_mapping() {
        let mapping = Arc::new(Mapping::anonymous(16384).unwrap());
        let area = PayloadArea::new(Arc::clone(&mapping), 4096..16384);
        let slot = area.memory(4096..8192);
        slot.write(0, b"payload");
        let mut seen = [0; 7];
        mapping.read(8192, &mut seen);
        assert_eq!(&seen, b"payload");
        drop((area, mapping));
        assert_eq!(&slot.to_vec()[..7], b"payload");
    }

    #[test]
    fn registered_index_follows_the_region() {
        // Never touched, so the 2 GiB take no memory.
        let mapping = Arc::new(Mapping::anonymous((2 << 30) + 8192).unwrap());
        let area = PayloadArea::new(Arc::clone(&mapping), 4096..mapping.len());
        assert_eq!(area.memory(0..4096).registered_index(), None);
        area.set_registered(Some(5));
        assert_eq!(area.regions().len(), 3);
        assert_eq!(area.memory(0..4096).registered_index(), Some(5));
        assert_eq!(area.memory((1 << 30) - 4096..1 << 30).registered_index(), Some(5));
        assert_eq!(area.memory((1 << 30) - 4096..(1 << 30) + 1).registered_index(), None);
        assert_eq!(area.memory(2 << 30..(2 << 30) + 4096).registered_index(), Some(7));
        assert_eq!(IoMemory::zeroed(4096).registered_index(), None);
    }

    #[test]
    fn empty_memory_is_harmless() {
        let empty = IoMemory::zeroed(0);
        assert!(empty.is_empty());
        empty.zero(0..0);
        assert!(empty.slice(0..0).to_vec().is_empty());
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn slice_beyond_the_end_panics() {
        let _ = IoMemory::zeroed(512).slice(0..513);
    }
}

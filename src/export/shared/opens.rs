//! The table of open files, in memory that outlives the engine.
//!
//! The kernel opens a volume's file once and uses it across any number of engines; each must know what is in use before
//! it serves the first request, or a command could delete a volume under its device. An entry carries the `unique` of the
//! OPEN that made it: an OPEN done again by a successor finds the entry that its predecessor made.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::layout::{OPEN_BYTES, OPENS, SessionMemory};
use super::memory::SharedMemory;
use crate::units::VolumeId;

/// An open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// The volume.
    pub volume: VolumeId,
    /// Whether it was opened for reading only.
    pub read_only: bool,
    /// The request that opened it.
    pub unique: u64,
}

/// The table. Written by the engine only, on one thread.
#[derive(Debug)]
pub struct OpenTable {
    control: Arc<SharedMemory>,
    base: usize,
}

/// Offset of the number of entries that were ever used, in the control memory.
const HIGH_WATER: usize = 256;

/// A file's number for the kernel: its entry, and what the OPEN was called. So a RELEASE done again by a successor cannot
/// close the file that got the entry meanwhile.
fn number_of(entry: usize, unique: u64) -> u64 {
    entry as u64 | unique << 16
}
const _: () = assert!(OPENS <= 1 << 16);

impl OpenTable {
    /// The table of a session.
    pub fn new(memory: &SessionMemory) -> Self {
        Self { control: Arc::clone(&memory.control), base: memory.opens() }
    }

    fn used(&self) -> usize {
        (self.control.atomic_u32(HIGH_WATER).load(Ordering::Relaxed) as usize).min(OPENS)
    }

    /// The open file with this number, when there is one.
    pub fn find(&self, number: u64) -> Option<OpenFile> {
        let entry = Self::entry(number);
        self.at(entry).filter(|file| number_of(entry, file.unique) == number)
    }

    /// Index of the entry of a file's number, below 65536.
    pub fn entry(number: u64) -> usize {
        (number & 0xffff) as usize
    }

    fn at(&self, entry: usize) -> Option<OpenFile> {
        if entry >= self.used() {
            return None;
        }
        let at = self.base + entry * OPEN_BYTES;
        let volume = VolumeId(self.control.atomic_u64(at).load(Ordering::Acquire));
        let unique = self.control.atomic_u64(at + 8).load(Ordering::Relaxed);
        let read_only = self.control.atomic_u32(at + 16).load(Ordering::Relaxed) != 0;
        (volume.0 != 0).then_some(OpenFile { volume, read_only, unique })
    }

    /// All open files with their numbers.
    pub fn all(&self) -> impl Iterator<Item = (u64, OpenFile)> + '_ {
        let numbered = |entry| self.at(entry).map(|file| (number_of(entry, file.unique), file));
        (0..self.used()).filter_map(numbered)
    }

    /// Enters a file and returns its number; the same number when the same request did so before. None when the table is
    /// full.
    pub fn insert(&self, file: OpenFile) -> Option<u64> {
        if let Some((number, _)) = self.all().find(|(_, other)| other.unique == file.unique) {
            return Some(number);
        }
        let used = self.used();
        let entry = (0..used).find(|&entry| self.at(entry).is_none()).unwrap_or(used);
        if entry >= OPENS {
            return None;
        }
        let at = self.base + entry * OPEN_BYTES;
        self.control.atomic_u64(at + 8).store(file.unique, Ordering::Relaxed);
        self.control.atomic_u32(at + 16).store(u32::from(file.read_only), Ordering::Relaxed);
        // Last, and one step: an entry is there whole or not at all.
        self.control.atomic_u64(at).store(file.volume.0, Ordering::Release);
        let high_water = u32::try_from(used.max(entry + 1)).unwrap_or(0);
        self.control.atomic_u32(HIGH_WATER).store(high_water, Ordering::Release);
        Some(number_of(entry, file.unique))
    }

    /// Takes an entry out; does nothing when it is out already.
    pub fn remove(&self, number: u64) {
        if self.find(number).is_some() {
            let at = self.base + Self::entry(number) * OPEN_BYTES;
            self.control.atomic_u64(at).store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::shared::{Arrangement, Geometry};

    fn table() -> OpenTable {
        let geometry = Geometry::new(Arrangement::Ring, 4096, vec![1]).unwrap();
        OpenTable::new(&SessionMemory::create(geometry).unwrap())
    }

    fn file(volume: u64, unique: u64) -> OpenFile {
        OpenFile { volume: VolumeId(volume), read_only: volume.is_multiple_of(2), unique }
    }

    #[test]
    fn open_repeated_by_a_successor_finds_its_entry() {
        let table = table();
        let first = table.insert(file(5, 100)).unwrap();
        assert_ne!(table.insert(file(5, 102)), Some(first));
        assert_eq!(table.insert(file(5, 100)), Some(first));
        assert_eq!(table.all().count(), 2);
    }

    #[test]
    fn release_repeated_by_a_successor_spares_the_file_that_took_the_entry() {
        let table = table();
        let numbers: Vec<_> = (0..3).map(|unique| table.insert(file(unique + 1, unique)).unwrap()).collect();
        table.remove(numbers[1]);
        assert_eq!(table.find(numbers[1]), None);
        let heir = table.insert(file(9, 77)).unwrap();
        assert_eq!(OpenTable::entry(heir), OpenTable::entry(numbers[1]));
        table.remove(numbers[1]);
        table.remove(u64::MAX);
        assert_eq!(table.find(heir), Some(file(9, 77)));
        assert_eq!(table.all().count(), 3);
    }

    #[test]
    fn full_table_refuses() {
        let table = table();
        table.control.atomic_u32(HIGH_WATER).store(u32::MAX, Ordering::Relaxed);
        for entry in 0..OPENS {
            table.control.atomic_u64(table.base + entry * OPEN_BYTES).store(1, Ordering::Relaxed);
        }
        assert_eq!(table.insert(file(1, 1 << 40)), None);
    }
}

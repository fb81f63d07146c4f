//! Each fault that `tools/damage` can make, made by the same code, and exactly it seen by a check; and for each pair of a
//! structure and a check such a fault, or the reason why there is none on a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::ops::Range;

use futures_lite::future::block_on;
use plywood::engine::{Memory as _, Storage, check_metadata};
use plywood::error::{Check, Error, Structure};
use plywood::format::Place;
use plywood::io::{IoMemory, MemoryImage, MemoryStorage};
use plywood::units::PoolBlock;

use super::damage::{opens, repair};
use super::sample::{assert_sound, check, contents, sample, with_pool};
use super::structures::live_blocks;
use crate::damage::{Made, damage, faults};

/// The sample without what waits in it.
fn settled() -> MemoryImage {
    let (image, ()) = with_pool(sample(), true, async |pool| pool.settle().await.unwrap());
    image
}

/// A sample with the fault, and what a check must find there.
fn damaged(name: &str) -> (MemoryImage, Made) {
    let mut why = Vec::new();
    for mut image in [sample(), settled()] {
        match damage(&mut image, name) {
            Ok(made) => return (image, made),
            Err(error) => why.push(error.to_string()),
        }
    }
    panic!("{name}: {why:?}");
}

/// What a check says: each fault, and the volumes that it touches.
fn found(image: &MemoryImage) -> BTreeMap<String, BTreeSet<String>> {
    match check(image) {
        Ok(report) => {
            assert_eq!(report.fault_count, report.faults.len() as u64);
            let names =
                |fault: &plywood::engine::Fault| fault.touched.iter().map(|touched| touched.name.clone()).collect();
            report.faults.iter().map(|fault| (format!("{:?}", fault.found), names(fault))).collect()
        }
        // There is no superblock to begin with.
        Err(Error::Corrupt(found)) => [(format!("{found:?}"), BTreeSet::new())].into(),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn each_fault_is_found_exactly() {
    let mut made = 0;
    for fault in faults() {
        let (image, expected) = damaged(fault.name);
        let expected: BTreeMap<String, BTreeSet<String>> =
            expected.found.iter().map(|(found, touched)| (format!("{found:?}"), touched.clone())).collect();
        let (structure, check) = (format!("structure: {:?},", fault.structure), format!("check: {}", fault.check));
        assert!(expected.keys().any(|found| found.contains(&structure) && found.contains(&check)), "{}", fault.name);
        assert_eq!(found(&image), expected, "{}", fault.name);
        made += 1;
    }
    println!("{made} faults made, each found");
    assert!(made > 60);
}

/// What has been damaged opens in its old state, or not at all; and whatever a repair makes of it is sound.
#[test]
fn each_fault_is_repaired() {
    let before = contents(&sample());
    for fault in faults() {
        let (image, _) = damaged(fault.name);
        let opens = opens(&image);
        if check(&image).is_err() {
            assert!(!opens, "{}: no superblock counts, and the pool opens", fault.name);
            continue;
        }
        let (repaired, report) = repair(&image);
        assert_sound(&repaired);
        assert!(report.fault_count > 0, "{}", fault.name);
        let is_late = fault.name.ends_with("-birth");
        if is_late || fault.name.ends_with("-copy") || fault.name.ends_with("-count") || fault.name.ends_with("-total")
        {
            assert!(report.lost.is_empty() && report.lost_ids.is_empty(), "{}: {report:?}", fault.name);
            assert_eq!(contents(&repaired), before, "{}", fault.name);
        }
    }
}

/// A node that two entries of one node point at keeps its right place; the other one reads as zeros, as it did, and is listed.
#[test]
fn node_reached_at_two_places_keeps_the_right_one() {
    let before = contents(&sample());
    for name in ["node-inconsistent-places", "node-inconsistent-leaf", "node-checksum-place"] {
        let (image, made) = damaged(name);
        let (repaired, report) = repair(&image);
        assert_sound(&repaired);
        assert_eq!(contents(&repaired), before, "{name}");
        let lost: BTreeSet<String> = report.lost.iter().map(|lost| lost.name.clone()).collect();
        assert_eq!(lost, made.found[0].1, "{name}");
        assert!(report.lost.iter().all(|lost| lost.ranges.len() == 1), "{name}: {:?}", report.lost);
    }
}

/// A storage some of whose blocks cannot be read.
#[derive(Clone)]
struct BadSectors {
    inner: MemoryStorage,
    bad: u64,
}

impl Storage for BadSectors {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        self.inner.allocate(len)
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        let is_bad = (offset / 4096..(offset + into.len() as u64).div_ceil(4096)).contains(&self.bad);
        let read = self.inner.read(offset, into);
        async move { if is_bad { Err(io::Error::from_raw_os_error(libc::EIO)) } else { read.await } }
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.write(offset, from)
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.write_durable(offset, from)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.flush()
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.extend(range)
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.punch(range)
    }
}

fn structure_of(place: Option<Place>, block: u64) -> Structure {
    match place {
        Some(Place::Node { .. } | Place::TableNode { .. }) => Structure::Node,
        Some(Place::VolumeRecord(_)) => Structure::VolumeRecord,
        Some(Place::Attributes { .. }) => Structure::Attributes,
        Some(Place::CarcassPage(_)) => Structure::CarcassPage,
        Some(Place::GroupIndex(_)) => Structure::GroupIndex,
        Some(Place::GroupDescriptor(_)) => Structure::GroupDescriptor,
        Some(Place::SpaceMapPage { .. }) => Structure::SpaceMapPage,
        Some(Place::ChecksumPage { .. }) => Structure::ChecksumPage,
        None if block < 512 => Structure::Superblock,
        None => Structure::Batch,
    }
}

/// `tools/damage` cannot make a sector of a file unreadable; a medium in memory can.
#[test]
fn unreadable_block_of_each_structure_is_found() {
    let mut with_sums = sample();
    let page = damage(&mut with_sums, "checksum-page-checksum").unwrap().found[0].0.address;
    let mut structures = BTreeSet::new();
    let blocks = live_blocks(&sample()).into_iter().map(|block| (block.block, structure_of(block.place, block.block)));
    for (bad, structure) in blocks.chain([(page.0, Structure::ChecksumPage)]) {
        let image = if structure == Structure::ChecksumPage { with_sums.clone() } else { sample() };
        let storage = BadSectors { inner: MemoryStorage::from_image(image), bad };
        let report = block_on(check_metadata(&storage, &mut |_| ())).unwrap();
        let is_it = |fault: &plywood::engine::Fault| {
            let at = if structure == Structure::Batch { fault.found.address } else { PoolBlock(bad) };
            (fault.found.structure, fault.found.address) == (structure, at)
                && matches!(fault.found.check, Check::Unreadable(_))
        };
        assert!(report.faults.iter().any(is_it), "block {bad}, {structure}: {:#?}", report.faults);
        assert!(structure == Structure::VolumeRecord || report.fault_count == 1, "{:#?}", report.faults);
        structures.insert(structure);
    }
    assert_eq!(structures.len(), 10, "{structures:?}");
}

/// Why no pool on a disk shows this check of this structure.
fn absent(structure: &str, check: &str) -> Option<&'static str> {
    Some(match (structure, check) {
        ("Data", "Checksum" | "Unreadable") => "a check reads no data; `pool scrub` and verify on read do",
        ("Data", "Magic" | "Reserved" | "Undefined" | "Truncated" | "Text" | "Total" | "Count") => "data has no fields",
        ("Attributes" | "Record", "Truncated") => return None,
        ("Batch", "Truncated") => "as many blocks are read as the header says",
        (_, "Truncated") => "it is a block, and blocks are read whole",
        ("Batch", "Uuid") => return None,
        ("Superblock", "Uuid") => "copies of different pools contradict each other: Inconsistent",
        (_, "Uuid") => "the pool's uuid is in the seed of its checksum",
        ("Batch", "Stamp" | "JournalGap" | "NewerGeneration") => return None,
        (_, "Stamp" | "NewerGeneration") => "only batches have them",
        ("Record", "JournalGap") => "of the pending log, which is in memory",
        (_, "JournalGap") => "of the journal only",
        ("Node" | "SpaceMapPage" | "ChecksumPage" | "GroupIndex", "Magic") => "it has none: its parent says what it is",
        ("Superblock" | "VolumeRecord" | "Attributes" | "Record", "Text") => return None,
        (_, "Text") => "it holds no text",
        ("SpaceMapPage", "Count") => return None,
        (_, "Count") => "counts are those of the space map",
        ("Superblock" | "GroupIndex" | "VolumeRecord", "Total") => return None,
        (_, "Total") => "it keeps no number about others",
        ("SpaceMapPage" | "ChecksumPage", "Reserved" | "OutOfBounds" | "Undefined") => "any number can stand in it",
        ("SpaceMapPage", "Inconsistent") => "its numbers are counts: Count",
        ("Attributes" | "Batch", "Undefined") => "it has no field with defined values",
        ("GroupIndex" | "GroupDescriptor", "Inconsistent") => "no two of its fields say the same",
        ("Record", "Checksum" | "Unreadable") => "records are covered by their batch",
        _ => return None,
    })
}

/// Names of the variants of an enum in `src/error.rs`. Both are open to additions, so the compiler does not help here.
fn variants(name: &str) -> Vec<String> {
    let text = include_str!("../../../src/error.rs");
    let start = text.find(&format!("pub enum {name} {{")).expect("the enum is there");
    let body = &text[start..];
    let body = &body[..body.find("\n}").expect("it ends")];
    let lines = body.lines().filter(|line| line.starts_with("    ") && !line.starts_with("     "));
    let word = |line: &str| line.trim().chars().take_while(|letter| letter.is_alphanumeric()).collect::<String>();
    lines.map(word).filter(|word| word.starts_with(char::is_uppercase)).collect()
}

#[test]
fn every_structure_and_check_has_a_fault_or_a_reason() {
    let (structures, checks) = (variants("Structure"), variants("Check"));
    assert!(structures.len() >= 12 && checks.len() >= 15, "{structures:?} {checks:?}");
    // Seen by the test above.
    let unreadable = |structure: &str, check: &str| check == "Unreadable" && !["Record", "Data"].contains(&structure);
    let mut wrong = Vec::new();
    for structure in &structures {
        for check in &checks {
            let made = faults().any(|fault| format!("{:?}", fault.structure) == *structure && fault.check == check)
                || unreadable(structure, check);
            if made == absent(structure, check).is_some() {
                wrong.push(format!("{structure} x {check}: {}", if made { "made, and absent" } else { "neither" }));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let names: BTreeSet<&str> = faults().map(|fault| fault.name).collect();
    assert_eq!(names.len(), faults().count(), "two faults have one name");
}

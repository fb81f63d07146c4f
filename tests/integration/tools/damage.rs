//! One bit flipped in every live block of metadata: always found by check or by opening, never returned as data; and what
//! repair makes of each.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_lite::future::block_on;
use plywood::engine::{OpenOptions, Pool, PrivateLog, RepairReport, repair_metadata};
use plywood::format::{Place, SUPERBLOCK_COPIES};
use plywood::io::{MemoryImage, MemoryStorage};

use super::sample::{Contents, assert_sound, check, contents, discarded, sample};
use super::structures::{Block, live_blocks};

/// First index of the carcass table's nodes, as their seeds have it.
const CARCASS_TABLE: u64 = 1 << 62;

pub fn flip(image: &MemoryImage, block: u64, bit: usize) -> MemoryImage {
    let mut flipped = image.clone();
    let mut byte = [0];
    flipped.read(block * 4096 + bit as u64 / 8, &mut byte);
    flipped.write(block * 4096 + bit as u64 / 8, &[byte[0] ^ 1 << (bit % 8)]);
    flipped
}

pub fn opens(image: &MemoryImage) -> bool {
    let storage = MemoryStorage::from_image(image.clone());
    block_on(Pool::open(storage, Box::new(PrivateLog::new(0)), OpenOptions::default())).is_ok()
}

/// Repairs, and holds a repair to what it promises of any pool.
pub fn repair(image: &MemoryImage) -> (MemoryImage, RepairReport) {
    let storage = MemoryStorage::from_image(image.clone());
    let mut saved = BTreeMap::new();
    let mut save = |blocks: &[(plywood::units::PoolBlock, Vec<u8>)]| {
        for (block, bytes) in blocks {
            saved.entry(block.0).or_insert_with(|| bytes.clone());
        }
        Ok(())
    };
    let report = block_on(repair_metadata(&storage, Some(&mut save), &mut |_| ())).unwrap();
    let repaired = storage.snapshot_image();
    // What was saved, put back, is the pool as it was.
    let mut undone = repaired.clone();
    for (block, bytes) in saved {
        undone.write(block * 4096, &bytes);
    }
    for block in undone.written_blocks() {
        let (mut before, mut after) = ([0; 4096], [0; 4096]);
        image.read(block * 4096, &mut before);
        undone.read(block * 4096, &mut after);
        assert!(before == after, "block {block} was written over and not saved");
    }
    (repaired, report)
}

/// Nothing that is there is another volume's, or what it never was: each block is as it was, or an error.
fn assert_never_wrong(before: &Contents, after: &Contents, what: &dyn std::fmt::Display) {
    for (name, blocks) in after {
        // What the journal says of a volume whose record is lost has another name.
        let id = name.strip_prefix("lost-").map(|id| if id == "1" { "one" } else { "clone" });
        let before = &before[id.unwrap_or(name)];
        for (block, content) in blocks {
            if content == b"error" {
                continue;
            }
            assert_eq!(Some(content), before.get(block), "{what}: block {block} of {name} is wrong");
        }
    }
}

#[test]
fn every_flipped_bit_is_found_and_none_is_data() {
    let image = sample();
    assert_sound(&image);
    let before = contents(&image);
    let mut random = fastrand::Rng::with_seed(5);
    let (mut found_by_check, mut still_open) = (0, 0);
    let live = live_blocks(&image);
    for Block { block, place, used_bytes } in &live {
        let flipped = flip(&image, *block, random.usize(..used_bytes * 8));
        let what = format!("bit in block {block}, {place:?}");
        let report = check(&flipped).expect("another superblock is good");
        assert!(!report.is_clean(), "{what}: not found");
        found_by_check += 1;
        if opens(&flipped) {
            still_open += 1;
            assert_never_wrong(&before, &contents(&flipped), &what);
        }
    }
    println!("{found_by_check} of {} found, {still_open} pools open", live.len());
    assert!(still_open > 0 && live.len() > 80, "{} live blocks", live.len());
}

#[test]
fn repair_keeps_what_no_fault_touches() {
    let image = sample();
    let before = contents(&image);
    let mut random = fastrand::Rng::with_seed(6);
    let (mut whole, mut lossy) = (0, 0);
    for Block { block, place, used_bytes } in live_blocks(&image) {
        let flipped = flip(&image, block, random.usize(..used_bytes * 8));
        let what = format!("bit in block {block}, {place:?}");
        let (repaired, report) = repair(&flipped);
        assert!(report.fault_count > 0, "{what}: nothing found");
        let checked = assert_sound(&repaired);
        assert_eq!(checked.unaccounted_blocks, 0, "{what}");
        let after = contents(&repaired);
        // The journal's last changes are lost with it, and what was before them is back; else only what is listed may be.
        if report.changes_lost_from.is_some() {
            lossy += 1;
            continue;
        }
        assert_never_wrong(&before, &after, &what);
        for (name, blocks) in &before {
            if report.lost_ids.iter().any(|_| !after.contains_key(name)) {
                continue;
            }
            let lost = report.lost.iter().find(|lost| lost.name == *name);
            let is_lost = |block: &u64| {
                lost.is_some_and(|lost| {
                    lost.ranges.is_empty()
                        || lost.ranges.iter().any(|range| {
                            (range.offset_bytes..range.offset_bytes + range.length_bytes).contains(&(block * 4096))
                        })
                })
            };
            for (block, content) in blocks {
                match after[name].get(block) {
                    None => {
                        assert!(is_lost(block), "{what}: block {block} of {name} is gone and not listed: {report:?}");
                    }
                    Some(kept) => assert_eq!(kept, content, "{what}: block {block} of {name}"),
                }
            }
        }
        if report.lost.is_empty() && report.lost_ids.is_empty() { whole += 1 } else { lossy += 1 }
    }
    println!("{whole} repaired whole, {lossy} with losses");
    assert!(whole > 0 && lossy > 0);
}

#[test]
fn sound_pool_is_not_touched_by_repair() {
    let image = sample();
    let (repaired, report) = repair(&image);
    assert_eq!((report.fault_count, report.blocks_written), (0, 0));
    assert_eq!(repaired.written_blocks(), image.written_blocks());
}

/// Volumes and carcasses stand in tables all blocks of which are pairs: with one bad block the pool opens, and holds what
/// it held.
#[test]
fn one_bad_block_of_the_tables_loses_nothing() {
    let mut seen = BTreeSet::new();
    for image in [sample(), discarded()] {
        let expected = contents(&image);
        for Block { block, place, .. } in live_blocks(&image) {
            let Some(place @ (Place::VolumeRecord(_) | Place::TableNode { .. } | Place::CarcassPage(_))) = place else {
                continue;
            };
            let flipped = flip(&image, block, 99);
            assert!(!check(&flipped).unwrap().is_clean(), "{place:?}");
            assert_eq!(contents(&flipped), expected, "{place:?}");
            seen.insert(match place {
                Place::TableNode { first: CARCASS_TABLE.., .. } => "node above carcasses",
                Place::TableNode { .. } => "node above records",
                Place::CarcassPage(_) => "carcasses",
                _ => "record",
            });
        }
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}

/// What the discarded volume still counts as its own is what a carcass has not given back yet.
#[test]
fn carcass_that_is_lost_leaves_its_volume_counted_right() {
    let image = discarded();
    let mut pairs: HashMap<Place, Vec<u64>> = HashMap::new();
    for Block { block, place, .. } in live_blocks(&image) {
        if let Some(place @ (Place::CarcassPage(_) | Place::TableNode { first: CARCASS_TABLE.., .. })) = place {
            pairs.entry(place).or_default().push(block);
        }
    }
    assert!(!pairs.is_empty(), "the carcass was caught");
    for pair in pairs.into_values() {
        let lost = pair.iter().fold(image.clone(), |image, block| flip(&image, *block, 99));
        let (repaired, report) = repair(&lost);
        assert!(report.fault_count > 0 && report.lost.is_empty(), "{report:?}");
        assert_sound(&repaired);
    }
}

/// A repair that is cut short after any number of writes has made nothing worse: what is repaired then is as good.
#[test]
fn repair_cut_short_and_begun_again_loses_no_more() {
    let image = sample();
    let leaf = live_blocks(&image).into_iter().find(|block| matches!(block.place, Some(Place::Node { level: 0, .. })));
    let flipped = flip(&image, leaf.expect("a leaf").block, 100);
    let (repaired, report) = repair(&flipped);
    let expected = contents(&repaired);
    let (mut cut, mut was_done) = (0, false);
    for after in 0..400 {
        let storage = MemoryStorage::from_image(flipped.clone());
        let mut left = after;
        let mut save = |blocks: &[(plywood::units::PoolBlock, Vec<u8>)]| {
            // Writes come in batches, and each is asked for first.
            if left == 0 {
                return Err(plywood::error::Error::Busy("cut short".into()));
            }
            left -= 1;
            let _ = blocks;
            Ok(())
        };
        if block_on(repair_metadata(&storage, Some(&mut save), &mut |_| ())).is_ok() {
            break;
        }
        cut += 1;
        let (again, second) = repair(&storage.snapshot_image());
        assert_eq!(contents(&again), expected);
        // At last only the second copy of the new superblock is missing: what is lost is lost.
        was_done |= second.lost.is_empty();
        assert!(was_done && second.lost.is_empty() || second.lost == report.lost, "{:?}", second.lost);
    }
    assert!(cut >= 2, "it was cut short {cut} times");
}

#[test]
fn superblock_of_the_newest_generation_is_repaired_from_its_copy() {
    let image = sample();
    for copy in SUPERBLOCK_COPIES.into_iter().flatten() {
        let flipped = flip(&image, copy.0, 4000);
        if check(&flipped).unwrap().is_clean() {
            // Of the slot that is not current.
            continue;
        }
        let (repaired, _) = repair(&flipped);
        assert_eq!(contents(&repaired), contents(&image));
    }
}

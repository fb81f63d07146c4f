//! Dump and restore: the round trip is exact, what is no dump changes nothing.

use std::io::Cursor;

use futures_lite::future::block_on;
use plywood::engine::{DumpReport, dump_metadata, restore_metadata};
use plywood::error::{Error, Result};
use plywood::io::{MemoryImage, MemoryStorage};

use super::sample::{assert_sound, contents, empty, sample};

pub fn dump(image: &MemoryImage) -> (String, DumpReport) {
    let storage = MemoryStorage::from_image(image.clone());
    let mut text = Vec::new();
    let report = block_on(dump_metadata(&storage, &mut text, &mut |_| ())).unwrap();
    (String::from_utf8(text).unwrap(), report)
}

pub fn restore(image: &MemoryImage, text: &str) -> Result<MemoryImage> {
    let storage = MemoryStorage::from_image(image.clone());
    let restored = block_on(restore_metadata(&storage, || Ok(Cursor::new(text.as_bytes().to_vec()))));
    if restored.is_err() {
        assert_eq!(storage.statistics().writes, 0, "what is refused has written something");
    }
    restored.map(|_| storage.snapshot_image())
}

#[test]
fn dump_restored_and_dumped_is_the_same() {
    for image in [empty(), sample()] {
        let (text, report) = dump(&image);
        assert_eq!(report.fault_count, 0);
        let restored = restore(&image, &text).unwrap();
        assert_eq!(dump(&restored).0, text);
        assert_sound(&restored);
        assert_eq!(contents(&restored), contents(&image));
    }
}

#[test]
fn dump_with_features_that_cannot_be_written_is_refused() {
    let image = sample();
    let (text, _) = dump(&image);
    let text = text.replacen("\"read_only_compatible\":0", "\"read_only_compatible\":4", 1);
    assert!(matches!(restore(&image, &text), Err(Error::Incompatible(_))));
}

#[test]
fn destroyed_metadata_comes_back() {
    let image = sample();
    let (text, _) = dump(&image);
    let mut destroyed = image.clone();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        if let Some(block) = line["node"]["block"].as_u64() {
            destroyed.write(block * 4096, &[0x55; 4096]);
        }
    }
    for superblock in [0, 128, 256, 384] {
        destroyed.write(superblock * 4096, &[0; 4096]);
    }
    let restored = restore(&destroyed, &text).unwrap();
    assert_sound(&restored);
    assert_eq!(contents(&restored), contents(&image));
    assert_eq!(dump(&restored).0, text);
}

#[test]
fn restored_pool_goes_on() {
    let image = sample();
    let restored = restore(&image, &dump(&image).0).unwrap();
    let (after, ()) = super::sample::with_pool(restored, true, async |pool| {
        pool.settle().await.unwrap();
        let one = pool.volume("one").unwrap().id;
        super::sample::write(pool, one, 3, 1).await;
        assert!(pool.check().await.unwrap().is_clean());
        assert_eq!(pool.attributes(one).await.unwrap()["long"].len(), 9000);
    });
    assert_sound(&after);
}

/// Every single line left out, and many single characters changed: refused, or restored to a sound pool.
#[test]
fn damaged_dumps_are_refused_or_make_sound_pools() {
    let image = sample();
    let (text, _) = dump(&image);
    let lines: Vec<&str> = text.lines().collect();
    let mut refused = 0;
    for left_out in 0..lines.len() {
        let text: Vec<&str> =
            lines.iter().enumerate().filter(|(number, _)| *number != left_out).map(|(_, line)| *line).collect();
        let outcome = restore(&image, &(text.join("\n") + "\n"));
        assert!(matches!(outcome, Err(Error::InvalidInput(_))), "without line {left_out}");
        refused += 1;
    }
    assert_eq!(refused, lines.len());
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..300 {
        let mut bytes = text.clone().into_bytes();
        let at = random.usize(..bytes.len());
        bytes[at] = b'0' + random.u8(..10);
        let Ok(text) = String::from_utf8(bytes) else { continue };
        // Numbers that nothing can be held against may be other ones now; structure may not.
        if let Ok(restored) = restore(&image, &text) {
            let report = super::sample::check(&restored).unwrap();
            let is_structure = |fault: &&plywood::engine::Fault| {
                !matches!(
                    fault.found.check,
                    plywood::error::Check::Total { .. } | plywood::error::Check::Inconsistent(_)
                )
            };
            assert_eq!(report.faults.iter().find(is_structure), None, "{:#?}", report.faults);
        }
    }
}

#[test]
fn foreign_and_newer_dumps_are_refused() {
    let image = sample();
    let (text, _) = dump(&image);
    let other = text.replace(&super::sample::POOL.to_string(), "00000000-0000-0000-0000-00000000ffff");
    assert!(matches!(restore(&image, &other), Err(Error::InvalidInput(reason)) if reason.contains("holds pool")));
    let newer = text.replacen("\"dump_version\":1", "\"dump_version\":2", 1);
    assert!(matches!(restore(&image, &newer), Err(Error::Incompatible(_))));
    assert!(matches!(restore(&image, "dear sir\n"), Err(Error::InvalidInput(_))));
    assert!(matches!(restore(&image, ""), Err(Error::InvalidInput(_))));
}

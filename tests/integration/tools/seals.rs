//! Sealed snapshots: the tools keep what is sealed, and never call sealed what cannot be verified.

use plywood::error::{Check, Error, Structure};
use plywood::format::Place;
use plywood::io::{IoMemory, MemoryImage};
use plywood::units::BLOCK_BYTES;

use super::damage::{flip, repair};
use super::dump::{dump, restore};
use super::sample::{Contents, assert_sound, check, contents, sample, with_pool};
use super::structures::live_blocks;

/// Names of what is sealed, all of it verified: every block against its checksum, the whole against its digest.
fn sealed(image: &MemoryImage) -> Vec<String> {
    let (_, names) = with_pool(image.clone(), false, async |pool| {
        let mut names = Vec::new();
        for volume in pool.volumes().into_iter().filter(|volume| volume.sealed) {
            pool.verify_sealed(volume.id).await.unwrap_or_else(|error| panic!("{}: {error}", volume.name));
            names.push(volume.name);
        }
        names
    });
    names
}

#[test]
fn seals_survive_a_dump_and_its_restoring() {
    let image = sample();
    assert_eq!(sealed(&image), ["kept", "low-kept"]);
    let (text, _) = dump(&image);
    assert!(text.contains("{\"checksums\":"), "checksums are metadata");
    assert_eq!(sealed(&restore(&image, &text).unwrap()), ["kept", "low-kept"]);
}

#[test]
fn repair_takes_the_seal_from_what_has_lost_checksums_and_from_nothing_else() {
    let image = sample();
    let before = contents(&image);
    let mut unsealed = 0;
    for block in live_blocks(&image) {
        let Some(Place::ChecksumPage { .. }) = block.place else { continue };
        let (repaired, report) = repair(&flip(&image, block.block, 999));
        assert_sound(&repaired);
        assert_eq!(contents(&repaired), before);
        assert_eq!((report.lost.len(), report.fault_count), (0, 1));
        let left = sealed(&repaired);
        assert_eq!(left.len() + report.unsealed.len(), 2, "{report:?}");
        assert!(report.unsealed.iter().all(|name| !left.contains(name)));
        unsealed += report.unsealed.len();
    }
    assert!(unsealed > 2, "no page of checksums was missed");
}

/// A pool of which everything sealed has lost its checksums is dumped, too, and restored as not sealed.
#[test]
fn dump_without_checksums_is_restored_without_seals() {
    let image = sample();
    let page = live_blocks(&image).into_iter().find(|block| matches!(block.place, Some(Place::ChecksumPage { .. })));
    let damaged = flip(&image, page.expect("a page of checksums").block, 5);
    let (text, report) = dump(&damaged);
    assert_eq!(report.fault_count, 1);
    let restored = restore(&image, &text).unwrap();
    assert_sound(&restored);
    assert_eq!(sealed(&restored), Vec::<String>::new());
    assert_eq!(contents(&restored), contents(&image));
}

#[test]
fn flipped_bit_in_each_sealed_block_is_found_and_is_never_data() {
    let image = sample();
    let before = contents(&image);
    let mut random = fastrand::Rng::with_seed(8);
    // Where the blocks of the sealed snapshots stand: their content is found once.
    let mut flipped_blocks = 0;
    let by_content: std::collections::HashMap<Vec<u8>, u64> = image
        .written_blocks()
        .into_iter()
        .map(|block| {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            image.read(block * BLOCK_BYTES, &mut bytes);
            (bytes, block)
        })
        .collect();
    let kept: Contents = before
        .iter()
        .filter(|(name, _)| name.ends_with("kept"))
        .map(|(name, blocks)| (name.clone(), blocks.clone()))
        .collect();
    for (name, blocks) in &kept {
        for (at, content) in blocks {
            let place = by_content[content];
            let damaged = flip(&image, place, random.usize(..BLOCK_BYTES as usize * 8));
            assert!(check(&damaged).unwrap().is_clean(), "a check reads no data");
            with_pool(damaged, false, async |pool| {
                pool.verify_pool_on_read(true).await.unwrap();
                let id = pool.volume(name).unwrap().id;
                let read = async |at: u64| {
                    let handle = pool.open_volume(id, true).unwrap();
                    let memory = IoMemory::zeroed(BLOCK_BYTES as usize);
                    handle.read(at * BLOCK_BYTES, &memory).await.map(|()| memory.to_vec())
                };
                let Err(Error::Corrupt(found)) = read(*at).await else { panic!("block {at} of {name} was read") };
                assert_eq!((found.structure, found.address.0), (Structure::Data, place));
                let other = blocks.keys().find(|other| *other != at).expect("another block");
                assert_eq!(read(*other).await.unwrap(), blocks[other]);
                // A scrub finds exactly it.
                pool.scrub_metadata(1).await.unwrap();
                let mut damaged = Vec::new();
                loop {
                    let step = pool.scrub_data(64, 2).await.unwrap();
                    damaged.extend(step.damaged);
                    if step.next.is_none() {
                        break;
                    }
                }
                let [damage] = &damaged[..] else { panic!("{damaged:?}") };
                assert!(damage.address.0 == place && matches!(damage.check, Check::Checksum { .. }));
            });
            flipped_blocks += 1;
        }
    }
    println!("{flipped_blocks} blocks");
    assert!(flipped_blocks > 200);
}

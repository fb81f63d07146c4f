//! Scrubbing: what is bad is found and told by volume and range, what has a second copy is good afterwards.

use super::tests::{assert_clean, fill, new_clone, new_snapshot, new_volume, with_image, with_pool};
use super::*;
use crate::error::Structure;
use crate::io::{MemoryImage, MemoryStorage};
use crate::units::{BLOCK_BYTES, PoolBlock, VolumeId};

const MIB: u64 = 1 << 20;

async fn place_of(pool: &Pool<MemoryStorage>, id: VolumeId, offset: u64) -> PoolBlock {
    pool.attempt(|state| state.extents(id, offset, BLOCK_BYTES)).await.unwrap()[0].at.expect("mapped")
}

/// A pool with a sealed snapshot, its origin and a clone, closed; and where the snapshot's block at 8 KiB stands.
fn sealed_pool() -> (MemoryImage, PoolBlock) {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", 1024 * MIB)).await.unwrap().id;
        fill(&pool, volume, 0, 2 * MIB as usize, 1).await;
        fill(&pool, volume, 500 * MIB, 4096, 2).await;
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        pool.seal(snapshot, Pace::Full).await.unwrap();
        fill(&pool, volume, 8192, 4096, 3).await;
        pool.create_clone(snapshot, new_clone("c")).await.unwrap();
        pool.close().await.unwrap();
        let place = place_of(&pool, snapshot, 8192).await;
        (pool.inner.storage.snapshot_image(), place)
    })
}

/// Steps through the data to the end. Answers blocks read and damage found.
async fn scrub_data(pool: &Pool<MemoryStorage>, most: u64) -> (u64, Vec<crate::error::Corrupt>) {
    let (mut blocks, mut damaged) = (0, Vec::new());
    loop {
        let step = pool.scrub_data(most, 8).await.unwrap();
        assert!(step.blocks <= most);
        blocks += step.blocks;
        damaged.extend(step.damaged);
        if step.next.is_none() {
            return (blocks, damaged);
        }
    }
}

#[test]
fn damaged_data_is_told_by_volume_and_range() {
    let (mut image, bad) = sealed_pool();
    image.write(bad.offset_bytes(), &[9]);
    with_image(image, 2, |pool| async move {
        assert!(pool.scrub_data(1, 8).await.is_err(), "nothing was begun");
        let found = pool.scrub_metadata(7).await.unwrap();
        assert!(found.report.is_clean() && found.mended == 0);
        let (blocks, damaged) = scrub_data(&pool, 100).await;
        assert_eq!(blocks, 513);
        let [damage] = &damaged[..] else { panic!("{damaged:?}") };
        assert_eq!((damage.structure, damage.address), (Structure::Data, bad));
        let faults = pool.touched_by(damaged).await.unwrap();
        let touched: Vec<_> =
            faults[0].touched.iter().map(|touched| (&touched.name[..], &touched.ranges[..])).collect();
        let range = [TouchedRange { offset_bytes: 8192, length_bytes: 4096 }];
        // Not the volume: it has another block there now.
        assert_eq!(touched, [("s", &range[..]), ("c", &range[..])]);
        let state = pool.scrub_state();
        assert_eq!((state.next, state.faults, state.begun, state.ended), (PoolBlock(0), 1, 7, 8));
    });
}

#[test]
fn pass_goes_on_where_the_last_session_left_it() {
    let (image, _) = sealed_pool();
    let (image, before) = with_image(image, 2, |pool| async move {
        pool.scrub_metadata(7).await.unwrap();
        let step = pool.scrub_data(200, 8).await.unwrap();
        assert!(step.next.is_some());
        pool.close().await.unwrap();
        (pool.inner.storage.snapshot_image(), step.blocks)
    });
    with_image(image, 3, |pool| async move {
        assert_eq!(scrub_data(&pool, 50).await.0 + before, 513);
        assert_eq!(pool.scrub_state().ended, 8);
    });
}

#[test]
fn bad_copies_of_pairs_are_mended() {
    let (image, _) = sealed_pool();
    let (image, root) = with_image(image, 2, |pool| async move {
        // So that what is on the medium does not change when it is opened again.
        pool.close().await.unwrap();
        let root = pool.inner.state.borrow().volume(pool.volume("v").unwrap().id).unwrap().record.root;
        assert!(root.entry.mirrored && root.level > 0);
        (pool.inner.storage.snapshot_image(), root.entry.address)
    });
    for copy in [0, 1] {
        let mut image = image.clone();
        image.write(root.plus(copy).offset_bytes() + 99, &[0xa5]);
        with_image(image, 2, |pool| async move {
            let found = pool.scrub_metadata(7).await.unwrap();
            assert_eq!((found.report.fault_count, found.mended), (1, 1), "{:#?}", found.report.faults);
            assert_clean(&pool).await;
            assert_eq!(pool.scrub_metadata(7).await.unwrap().mended, 0);
        });
    }
}

#[test]
fn bad_copy_in_a_slot_that_is_current_is_mended() {
    let (image, _) = sealed_pool();
    with_image(image, 2, |pool| async move {
        pool.checkpoint().await.unwrap();
        // The checkpoint that is checked writes descriptor and index only where something changed: nothing does.
        let (descriptor, index) = {
            let state = pool.inner.state.borrow();
            (
                state.geometry.descriptor_block(0, state.index_entry(0).slot),
                state.geometry.index_block(0, state.index_refs[0].slot),
            )
        };
        pool.checkpoint().await.unwrap();
        for block in [descriptor.plus(1), index] {
            let bad = vec![0xee; BLOCK_BYTES as usize];
            pool.write_blocks([(block, std::rc::Rc::from(bad))].into()).await.unwrap();
        }
        let found = pool.scrub_metadata(7).await.unwrap();
        assert_eq!((found.report.fault_count, found.mended), (2, 2), "{:#?}", found.report.faults);
        assert_clean(&pool).await;
    });
}

//! Where things stand: nothing overlaps, nothing is left out, and sizes that cannot be are refused.

use crate::error::Error;
use crate::format::*;
use crate::units::{BLOCK_BYTES, PoolBlock};

const MIB: u64 = 1 << 20;

/// Every block that the layout gives a meaning to in `group`, in no order.
fn layout_of(geometry: &Geometry, group: u64) -> Vec<u64> {
    let mut blocks = Vec::new();
    for slot in [Slot::A, Slot::B] {
        if group.is_multiple_of(GROUPS_PER_INDEX) {
            let first = geometry.index_block(group / GROUPS_PER_INDEX, slot).0;
            blocks.extend([first, first + 1]);
        }
        let first = geometry.descriptor_block(group, slot).0;
        blocks.extend([first, first + 1]);
        blocks.extend((0..PAGES_PER_GROUP).map(|page| geometry.page_block(group, page, slot).0));
        blocks.extend((0..CHECKSUM_PAGES_PER_GROUP).map(|page| geometry.checksum_page_block(group, page, slot).0));
    }
    blocks
}

#[test]
fn layout_takes_the_head_of_each_group_without_gap_or_overlap() {
    let geometry = Geometry::new(80 << 30, 64 * MIB).expect("legal");
    for group in [0, 1, 511, 512, 513] {
        let mut blocks = layout_of(&geometry, group);
        blocks.sort_unstable();
        let start = geometry.group_start(group).0;
        let expected: Vec<u64> = (start..start + geometry.layout_blocks(group)).collect();
        assert_eq!(blocks, expected, "group {group}");
    }
    assert_eq!((geometry.layout_blocks(0), geometry.layout_blocks(1)), (138, 134));
    assert_eq!(geometry.index_count(), 2);
}

#[test]
fn pages_stand_side_by_side_with_their_other_slot() {
    let geometry = Geometry::new(1 << 30, 64 * MIB).expect("legal");
    let range = geometry.pages_range(3);
    assert_eq!(range.end - range.start, 64);
    for page in 0..PAGES_PER_GROUP {
        let first = range.start + u64::from(page) * 2;
        assert_eq!(geometry.page_block(3, page, Slot::A), PoolBlock(first));
        assert_eq!(geometry.page_block(3, page, Slot::B), PoolBlock(first + 1));
    }
}

#[test]
fn every_block_of_a_group_is_found_in_it() {
    let geometry = Geometry::new(64 * MIB + 2 * MIB + 128 * MIB + 5 * MIB, 64 * MIB).expect("legal");
    let first = geometry.first_group();
    assert_eq!(first, PoolBlock(512 + 16384));
    assert_eq!((geometry.group_count(), geometry.group_blocks(0), geometry.group_blocks(1)), (2, 32768, 1280));
    assert_eq!(geometry.group_of(PoolBlock(first.0 - 1)), None);
    assert_eq!(geometry.group_of(first), Some((0, 0)));
    assert_eq!(geometry.group_of(first.plus(32767)), Some((0, 32767)));
    assert_eq!(geometry.group_of(first.plus(32768)), Some((1, 0)));
    assert_eq!(geometry.group_of(PoolBlock(geometry.pool_blocks - 1)), Some((1, 1279)));
    assert_eq!(geometry.group_of(PoolBlock(geometry.pool_blocks)), None);
    assert_eq!(geometry.group_of(PoolBlock(u64::MAX)), None);
}

#[test]
fn rest_too_short_for_a_group_is_not_used() {
    let whole = 512 + 16384 + 32768;
    let geometry = |blocks| Geometry::new(blocks * BLOCK_BYTES, 64 * MIB).expect("legal");
    assert_eq!(geometry(whole + 1023).group_count(), 1);
    assert_eq!(geometry(whole + 1023).group_of(PoolBlock(whole + 5)), None);
    assert_eq!(geometry(whole + 1024).group_count(), 2);
    assert_eq!(geometry(whole + 1024).group_blocks(1), 1024);
}

#[track_caller]
fn assert_refused(size_bytes: u64, journal_bytes: u64, expected: &str) {
    match Geometry::new(size_bytes, journal_bytes) {
        Err(Error::InvalidInput(message)) => assert!(message.contains(expected), "{message}"),
        other => panic!("{size_bytes} with {journal_bytes}: {other:?}"),
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_with_the_reason() {
    assert_refused(0, 64 * MIB, "too small");
    assert_refused(64 * MIB, 64 * MIB, "too small");
    assert_refused(70 * MIB - 4096, 64 * MIB, "needs at least 73400320 bytes");
    assert!(Geometry::new(70 * MIB, 64 * MIB).is_ok());
    assert_refused((1 << 30) + 1, 64 * MIB, "not a multiple");
    assert_refused(1 << 30, 64 * MIB + 512, "not a multiple");
    assert_refused(1 << 30, 0, "journal size");
    assert_refused(1 << 30, MIB - 4096, "journal size");
    assert_refused(20 << 40, 64 * MIB, "at most 19 TiB");
    assert_refused(!4095, 64 * MIB, "at most 19 TiB");
    assert_refused(1 << 30, !4095, "too small");
    let largest = (19 << 40) + 64 * MIB + 2 * MIB;
    assert_eq!(Geometry::new(largest, 64 * MIB).expect("legal").index_count(), GROUP_INDEXES_MAX as u64);
    assert_refused(largest + 4 * MIB, 64 * MIB, "too large");
}

#[test]
fn slots_alternate() {
    assert_eq!((Slot::A.other(), Slot::B.other()), (Slot::B, Slot::A));
    assert_eq!((Slot::A.index(), Slot::B.index()), (0, 1));
}

#[test]
fn levels_span_what_the_design_says() {
    let spans: Vec<u64> = (0..=LEVEL_MAX).map(|level| span_blocks(level) * BLOCK_BYTES).collect();
    assert_eq!(spans, [MIB, 256 * MIB, 64 << 30, 16 << 40]);
    assert_eq!(span_blocks(LEVEL_MAX), VOLUME_BLOCKS_MAX);
}

//! One superblock, and the choice among four copies.

use fastrand::Rng;

use super::samples;
use crate::error::{Check, Corrupt, Error};
use crate::format::*;
use crate::units::{BLOCK_SIZE, Generation, Lsn, PoolBlock};

fn check_of(result: Result<Superblock, Error>) -> Check {
    match result {
        Err(Error::Corrupt(Corrupt { check, .. })) => check,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_flipped_bit_is_found_as_damage() {
    let bytes = samples::superblock(&mut Rng::with_seed(1)).encode();
    for bit in 0..BLOCK_SIZE * 8 {
        let mut flipped = bytes;
        flipped[bit / 8] ^= 1 << (bit % 8);
        let check = check_of(Superblock::decode(&flipped));
        assert!(matches!(check, Check::Checksum { .. } | Check::Magic), "bit {bit}: {check}");
    }
}

#[test]
fn block_of_something_else_has_no_magic() {
    assert_eq!(check_of(Superblock::decode(&[0; BLOCK_SIZE])), Check::Magic);
    assert_eq!(check_of(Superblock::decode(&[0x5a; BLOCK_SIZE])), Check::Magic);
}

#[track_caller]
fn assert_incompatible(change: impl FnOnce(&mut [u8; BLOCK_SIZE]), expected: &str) {
    let mut bytes = samples::superblock(&mut Rng::with_seed(2)).encode();
    change(&mut bytes);
    samples::fix_superblock(&mut bytes);
    match Superblock::decode(&bytes) {
        Err(Error::Incompatible(message)) => assert!(message.contains(expected), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_this_build_does_not_know_is_incompatible() {
    assert_incompatible(|bytes| bytes[8] = 2, "format version 2");
    assert_incompatible(|bytes| bytes[23] = 0x80, "features 0x8000000000000000");
    assert_incompatible(|bytes| bytes[122] = 2, "checksum 2");
    assert_incompatible(|bytes| bytes[123] = 9, "digest 9");
    // A newer version may have changed everything behind the envelope.
    assert_incompatible(|bytes| (bytes[8], bytes[2000]) = (3, 1), "format version 3");
}

#[test]
fn unknown_read_only_feature_forbids_writing_only() {
    let mut superblock = samples::superblock(&mut Rng::with_seed(3));
    superblock.compatible = u64::MAX;
    assert!(!superblock.is_read_only());
    superblock.read_only_compatible = 1 << 40;
    let read = Superblock::decode(&superblock.encode()).expect("readable");
    assert!(read.is_read_only());
}

type Copies = [[Result<Superblock, Error>; 2]; 2];

fn superblock(generation: u64) -> Result<Superblock, Error> {
    let mut superblock = samples::superblock(&mut Rng::with_seed(4));
    superblock.generation = Generation(generation);
    // So that generations differ in more than their number.
    superblock.lsn = Lsn(generation * 7);
    Ok(superblock)
}

fn damaged() -> Result<Superblock, Error> {
    let mut bytes = superblock(3).expect("sound").encode();
    bytes[200] ^= 1;
    Superblock::decode(&bytes)
}

fn empty() -> Result<Superblock, Error> {
    Superblock::decode(&[0; BLOCK_SIZE])
}

fn incompatible() -> Result<Superblock, Error> {
    Err(Error::Incompatible("newer".to_owned()))
}

fn unreadable() -> Result<Superblock, Error> {
    Err(Error::io("read", std::io::Error::other("bad sector")))
}

/// `anew` holds slot A's copies first: the generation that each is to get, if any.
#[track_caller]
fn assert_chosen(copies: Copies, generation: u64, slot: Slot, anew: [Option<u64>; 4]) {
    let chosen = choose_superblock(copies).expect("there is one");
    assert_eq!((chosen.superblock.generation.0, chosen.slot), (generation, slot));
    assert_eq!(chosen.superblock, superblock(generation).expect("sound"));
    let expected = anew.into_iter().zip(SUPERBLOCK_COPIES.into_iter().flatten());
    let expected = expected.filter_map(|(anew, address)| Some((address, superblock(anew?).expect("sound"))));
    assert_eq!(chosen.anew, expected.collect::<Vec<_>>());
}

#[test]
fn newest_generation_wins_in_either_slot() {
    assert_chosen([[superblock(6), superblock(6)], [superblock(5), superblock(5)]], 6, Slot::A, [None; 4]);
    assert_chosen([[superblock(6), superblock(6)], [superblock(7), superblock(7)]], 7, Slot::B, [None; 4]);
    assert_chosen([[superblock(1), superblock(1)], [empty(), empty()]], 1, Slot::A, [None; 4]);
}

#[test]
fn one_bad_or_old_copy_does_not_make_a_slot_lose() {
    let old = || [superblock(6), superblock(6)];
    assert_chosen([old(), [superblock(7), damaged()]], 7, Slot::B, [None, None, None, Some(7)]);
    assert_chosen([old(), [damaged(), superblock(7)]], 7, Slot::B, [None, None, Some(7), None]);
    assert_chosen([old(), [empty(), superblock(7)]], 7, Slot::B, [None, None, Some(7), None]);
    assert_chosen([old(), [unreadable(), superblock(7)]], 7, Slot::B, [None, None, Some(7), None]);
    // Cut between the two copies: the mirror still holds what the slot held before.
    assert_chosen([old(), [superblock(7), superblock(5)]], 7, Slot::B, [None, None, None, Some(7)]);
    assert_chosen([old(), [superblock(5), superblock(7)]], 7, Slot::B, [None, None, Some(7), None]);
}

#[test]
fn checkpoint_that_never_became_durable_leaves_the_former() {
    assert_chosen([[superblock(6), superblock(6)], [superblock(5), superblock(3)]], 6, Slot::A, [None; 4]);
    assert_chosen([[superblock(6), superblock(6)], [damaged(), damaged()]], 6, Slot::A, [None; 4]);
    assert_chosen([[superblock(6), damaged()], [damaged(), damaged()]], 6, Slot::A, [None, Some(6), None, None]);
}

#[test]
fn bad_copy_beside_an_older_one_does_not_come_back() {
    let newer = || [superblock(6), superblock(6)];
    assert_chosen([newer(), [damaged(), superblock(5)]], 6, Slot::A, [None, None, Some(5), None]);
    assert_chosen([newer(), [superblock(5), unreadable()]], 6, Slot::A, [None, None, None, Some(5)]);
    let both = [[damaged(), superblock(6)], [superblock(5), unreadable()]];
    assert_chosen(both, 6, Slot::A, [Some(6), None, None, Some(5)]);
}

#[test]
fn file_without_any_magic_is_not_a_pool() {
    let error = choose_superblock([[empty(), empty()], [empty(), empty()]]).expect_err("no pool");
    assert!(matches!(&error, Error::InvalidInput(message) if message.starts_with("not a plywood pool")), "{error}");
}

#[test]
fn damaged_copies_name_the_place_of_the_damage() {
    let error = choose_superblock([[empty(), empty()], [damaged(), empty()]]).expect_err("damaged");
    let Error::Corrupt(corrupt) = error else { panic!("{error}") };
    assert_eq!(corrupt.address, PoolBlock(128));
    assert!(matches!(corrupt.check, Check::Checksum { .. }));
}

#[test]
fn unreadable_copies_are_an_input_output_error() {
    let error = choose_superblock([[empty(), unreadable()], [unreadable(), empty()]]).expect_err("unreadable");
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn incompatible_copy_wins_over_damage_and_over_older_ones() {
    let older = || [superblock(6), superblock(6)];
    for copies in [[[damaged(), damaged()], [damaged(), incompatible()]], [older(), [incompatible(), damaged()]]] {
        let error = choose_superblock(copies).expect_err("refused");
        assert!(matches!(error, Error::Incompatible(_)), "{error}");
    }
}

#[track_caller]
fn assert_contradiction(copies: Copies, place: u64, expected: &str) {
    let error = choose_superblock(copies).expect_err("refused");
    let Error::Corrupt(corrupt) = error else { panic!("{error}") };
    assert_eq!(corrupt.address, PoolBlock(place));
    assert!(matches!(corrupt.check, Check::Inconsistent(text) if text.contains(expected)), "{}", corrupt.check);
}

#[test]
fn copies_that_contradict_each_other_are_damage() {
    let pair = |generation| [superblock(generation), superblock(generation)];
    let changed = |change: fn(&mut Superblock)| {
        let mut superblock = superblock(6).expect("sound");
        change(&mut superblock);
        Ok(superblock)
    };
    assert_contradiction([pair(6), pair(6)], 128, "same generation");
    let other_content = changed(|superblock| superblock.lsn.0 ^= 1);
    assert_contradiction([[superblock(6), other_content], pair(5)], 256, "differ");
    let other_pool = changed(|superblock| superblock.uuid = uuid::Uuid::from_u128(1));
    assert_contradiction([pair(7), [superblock(6), other_pool]], 384, "different pools");
}

//! What opening makes of what a crash has left: superblocks, journal, space map, groups (C3, C4, C7, C10, H11, N15, M3, M6).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use fastrand::Rng;
use plywood::engine::PendingLog;
use plywood::error::Error;
use plywood::format::SUPERBLOCK_COPIES;
use plywood::units::BLOCK_BYTES;

use super::order::{JOURNAL, begin_batch_that_is_only_written, is_journal, is_superblock};
use crate::action::Call;
use crate::engine::{Engine, MIB, at_once, new_pool, pool_of};
use crate::image::Image;
use crate::log::Log;

/// A pool whose first group ends and whose second has 8 MiB, and where that begins.
const TWO_GROUPS: u64 = 2 * MIB + MIB + 128 * MIB + 8 * MIB;
const SECOND_GROUP: u64 = 2 * MIB + MIB + 128 * MIB;

/// The places of the calls that are chosen, from now on.
fn watch(engine: &Engine, chosen: impl Fn(Call, &Range<u64>) -> bool + 'static) -> Rc<RefCell<Vec<Range<u64>>>> {
    let seen: Rc<RefCell<Vec<Range<u64>>>> = Rc::default();
    let into = Rc::clone(&seen);
    engine.medium.hold(move |call, range| {
        if chosen(call, range) {
            into.borrow_mut().push(range.clone());
        }
        false
    });
    seen
}

/// Puts the bytes back that `image` held before.
fn put_back(image: &mut Image, before: &Image, range: &Range<u64>) {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    before.read(range.start, &mut bytes);
    image.write(range.start, &bytes);
}

fn assert_refused_as_damage(image: Image, what: &str) {
    let refused = Engine::open(at_once(image.into()), Log::new(99)).err();
    assert!(matches!(refused, Some(Error::Corrupt(_))), "{what}: {refused:?}");
}

/// **C4.** Records map blocks that are free in the checkpoint. Replay needs nodes for the first of them, and must not put
/// these on what the later ones map.
#[test]
pub fn replay_puts_no_node_on_what_a_later_record_maps() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, 64 * MIB);
    // Each in a leaf of its own: as many nodes as blocks.
    for leaf in 0..60 {
        engine.write(volume, leaf * 256, leaf as u8 + 1).expect("written");
    }
    engine.flush(volume).expect("flushed");
    let engine = engine.lose_power();
    engine.checkpoint().expect("checkpoint");
    engine.pool.drop_caches();
    for leaf in 0..60 {
        assert_eq!(engine.read(volume, leaf * 256).expect("readable"), leaf as u8 + 1, "leaf {leaf}");
    }
    engine.assert_clean();
}

/// **N15.** A record says that a volume's attributes changed. Replay keeps off each of their blocks, not the first alone.
#[test]
pub fn replay_puts_no_node_on_attributes_that_a_record_names() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, 64 * MIB);
    engine.checkpoint().expect("checkpoint");
    let attributes: BTreeMap<String, Vec<u8>> = (0..15).map(|key| (key.to_string(), vec![key; 4000])).collect();
    let changes = attributes.clone().into_iter().map(|(key, value)| (key, Some(value))).collect();
    let pool = engine.pool.clone();
    engine.finish(async move { pool.set_attributes(volume, changes).await }).expect("set");
    for leaf in 0..60 {
        engine.write(volume, leaf * 256, 1).expect("written");
    }
    engine.flush(volume).expect("flushed");
    let engine = engine.lose_power();
    engine.checkpoint().expect("checkpoint");
    let pool = engine.pool.clone();
    let found = engine.finish(async move { pool.attributes(volume).await });
    assert_eq!(found.expect("whole"), attributes);
    engine.assert_clean();
}

/// **O9, C7b.** The engine dies while a batch is appended, and its successor finds it, though only in a cache. What it
/// appends behind is lost with that batch, unless this is durable first.
#[test]
pub fn batch_found_after_a_death_is_durable_before_another_follows() {
    for (seed, is_only_written) in (0..8).flat_map(|seed| [(seed, false), (seed, true)]) {
        let log = Log::new(1);
        let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
        let volume = engine.create(1, MIB);
        engine.write(volume, 1, 1).expect("written");
        engine.flush(volume).expect("flushed");
        engine.write(volume, 2, 2).expect("written");
        let flushed = if is_only_written {
            begin_batch_that_is_only_written(&engine, volume).to_vec()
        } else {
            engine.medium.hold(|call, range| call == Call::WriteDurable && is_journal(range));
            vec![engine.begin_flush(volume)]
        };
        assert!(flushed.iter().all(|flushed| flushed.borrow().is_none()) && engine.medium.waiting() == 1);
        let left = engine.medium.process_death(&mut Rng::with_seed(seed));
        drop((flushed, engine));
        let successor = Engine::open(at_once(left), log).expect("open");
        successor.write(volume, 3, 3).expect("written");
        successor.flush(volume).expect("flushed");
        let last = successor.lose_power();
        for block in 1..4 {
            assert_eq!(last.read(volume, block).expect("readable"), block as u8);
        }
        last.assert_clean();
    }
}

/// **C10a.** Both copies of a superblock are torn, again and again: the slot that is written is never the one that holds the
/// only valid superblock, however many checkpoints have failed.
#[test]
pub fn torn_superblock_is_never_the_only_one() {
    let mut engine = Engine::on(new_pool());
    let volume = engine.create(1, 8 * MIB);
    for round in 1..8u8 {
        for block in 0..50 {
            engine.write(volume, block, round).expect("written");
        }
        engine.flush(volume).expect("flushed");
        if round % 3 == 0 {
            engine.checkpoint().expect("checkpoint");
        }
        engine.medium.hold(|call, range| call == Call::WriteDurable && is_superblock(range));
        let _checkpointed = engine.begin_checkpoint();
        let torn = engine.medium.under_way();
        assert_eq!(torn.len(), 2);
        let mut image = engine.medium.power_cut_keeping(|_| true).settled();
        for (_, range, ..) in torn {
            image.write(range.start + 512, &[0xee; 1024]);
        }
        drop(engine);
        engine = Engine::open(at_once(image.into()), Log::new(1 + u128::from(round))).expect("the former one is whole");
        assert_eq!(engine.read(volume, 49).expect("readable"), round);
        engine.assert_clean();
    }
}

/// **C10b.** One of several batches is damaged, or its write was lost. What follows proves that it was durable, so this is
/// damage and not the journal's end: nothing that was acknowledged is dropped without a word.
#[test]
pub fn damaged_batch_in_the_middle_is_damage_not_the_end() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    let batches = watch(&engine, |call, range| call == Call::WriteDurable && range.start >= JOURNAL);
    for block in 0..5 {
        engine.write(volume, block, 1).expect("written");
        engine.flush(volume).expect("flushed");
    }
    let image = engine.medium.power_cut_keeping(|_| false).settled();
    let batches = batches.borrow();
    assert_eq!(batches.len(), 5);
    for (number, batch) in batches.iter().enumerate() {
        for at in [9, 40, 100, 700, 4000] {
            let mut damaged = image.clone();
            let mut sector = [0; 512];
            let start = batch.start + at / 512 * 512;
            damaged.read(start, &mut sector);
            sector[at as usize % 512] ^= 4;
            damaged.write(start, &sector);
            assert_refused_as_damage(damaged, &format!("batch {number}, byte {at}"));
        }
        if number < 4 {
            let mut lost = image.clone();
            lost.zero(batch.clone());
            assert_refused_as_damage(lost, &format!("batch {number} lost"));
        }
    }
}

/// **C10a.** Every copy of the newest superblock is bad, so only an older state could be opened. A batch that knows of the
/// newer one gives it away.
#[test]
pub fn batch_of_a_newer_generation_than_the_superblock_is_damage() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    let before = engine.medium.power_cut_keeping(|_| true).settled();
    engine.checkpoint().expect("checkpoint");
    engine.write(volume, 1, 1).expect("written");
    engine.flush(volume).expect("flushed");
    let mut image = engine.medium.power_cut_keeping(|_| true).settled();
    for copy in SUPERBLOCK_COPIES.iter().flatten() {
        put_back(&mut image, &before, &(copy.offset_bytes()..copy.offset_bytes() + BLOCK_BYTES));
    }
    assert_refused_as_damage(image, "an older superblock");
}

/// **C3c.** The write of a page of counts, of a descriptor or of an index was lost: what stands there is valid, and older.
/// The parent says which it must be.
#[test]
pub fn lost_write_of_the_space_map_is_found() {
    let engine = Engine::on(pool_of(16 * MIB));
    let volume = engine.create(1, 8 * MIB);
    // Every slot has been written before.
    for round in 0..4 {
        for block in 0..200 {
            engine.write(volume, round * 200 + block, 1).expect("written");
        }
        engine.checkpoint().expect("checkpoint");
    }
    let before = engine.medium.power_cut_keeping(|_| true).settled();
    let layout = JOURNAL + MIB..engine.pool.info().layout_bytes;
    let written = watch(&engine, move |call, range| call == Call::Write && layout.contains(&range.start));
    engine.discard(volume, 0, 300).expect("discarded");
    engine.checkpoint().expect("checkpoint");
    let image = engine.medium.power_cut_keeping(|_| true).settled();
    let written = written.borrow();
    assert!(written.len() >= 3, "a page, a descriptor and an index: {written:?}");
    for lost in written.iter() {
        let mut image = image.clone();
        put_back(&mut image, &before, lost);
        assert_refused_as_damage(image, &format!("write of {lost:?}"));
    }
}

/// **H11.** A record maps a block in a group that was taken into use after the last checkpoint, of which no superblock and
/// no index knows. After a power cut the journal says so, after a death the pending log.
#[test]
pub fn group_taken_into_use_after_the_checkpoint_is_found_by_its_record() {
    for is_death in [false, true] {
        let log = Log::new(1);
        let engine = Engine::open(at_once(pool_of(TWO_GROUPS)), log.clone()).expect("open");
        let (ballast, volume) = (engine.create(1, 256 * MIB), engine.create(2, 64 * MIB));
        for at in 0..94 {
            engine.zero(ballast, at * MIB, MIB).expect("there is room");
        }
        engine.checkpoint().expect("checkpoint");
        assert_eq!(engine.pool.info().groups_in_use, 1);
        let checkpoints = engine.pool.counters().checkpoints;
        let reached = Rc::new(Cell::new(false));
        let reaches = Rc::clone(&reached);
        engine.medium.hold(move |call, range| {
            reaches.set(reaches.get() || (call == Call::Write && range.start >= SECOND_GROUP));
            false
        });
        let mut at = 94 * MIB;
        while !reached.get() {
            engine.zero(ballast, at, 64 * 4096).expect("there is room");
            at += 64 * 4096;
        }
        engine.write(volume, 5, 7).expect("written");
        assert_eq!((engine.pool.info().groups_in_use, engine.pool.counters().checkpoints), (2, checkpoints));
        let engine = if is_death {
            assert!(!log.published().is_empty());
            let left = engine.medium.process_death(&mut Rng::with_seed(1));
            drop(engine);
            Engine::open(at_once(left), log).expect("the group is known")
        } else {
            engine.flush(volume).expect("flushed");
            engine.lose_power()
        };
        assert_eq!(engine.read(volume, 5).expect("readable"), 7);
        engine.assert_clean();
        // And is used on.
        engine.write(volume, 6, 8).expect("written");
        engine.checkpoint().expect("checkpoint");
        let engine = engine.lose_power();
        assert_eq!(engine.read(volume, 6).expect("readable"), 8);
        engine.assert_clean();
    }
}

/// **M3.** Opening reads the journal, the space map's indexes and the records: the same of a pool with more data, and of
/// each further volume one record.
#[test]
pub fn opening_reads_no_more_of_a_pool_with_more_data() {
    let reads = |volumes: u64, leaves: u64| {
        let engine = Engine::on(pool_of(64 * MIB));
        for volume in 0..volumes {
            let volume = engine.create(u128::from(volume) + 1, 4096 * MIB);
            for leaf in 0..leaves {
                engine.write(volume, leaf * 256, 1).expect("written");
            }
        }
        let medium = engine.medium.clone();
        engine.close();
        let medium = at_once(medium.power_cut_keeping(|_| false));
        let engine = Engine::open(medium, Log::new(2)).expect("open");
        engine.medium.calls(Call::Read)
    };
    let least = reads(1, 1);
    assert_eq!(reads(1, 2000), least);
    let more = reads(150, 1) - least;
    assert!(more <= 150 + 4, "{more} reads more for 149 volumes more");
}

/// **M6.** LSNs are used again after a batch that was torn, and places of the ring in every lap. What stands there of former
/// times never follows a new batch.
#[test]
pub fn batches_of_former_laps_and_torn_tails_are_never_taken_for_new_ones() {
    let log = Log::new(1);
    let mut engine = Engine::open(at_once(pool_of(16 * MIB)), log.clone()).expect("open");
    let volume = engine.create(1, 8 * MIB);
    let mut laps = 0;
    for round in 0..900u64 {
        engine.write(volume, round % 200, (round / 200) as u8 + 1).expect("written");
        engine.discard(volume, 1000, 1).expect("discarded");
        if round % 200 == 199 {
            engine.snapshot(volume, 100 + u128::from(round));
        }
        if round % 29 != 28 {
            engine.flush(volume).expect("flushed");
            continue;
        }
        // Of this batch only the first sectors land. The successor knows what it held, and appends it with more.
        engine.medium.hold(|call, range| call == Call::WriteDurable && range.start >= JOURNAL);
        let flushed = engine.begin_flush(volume);
        let [(_, torn, ..)] = &engine.medium.under_way()[..] else { panic!("one batch") };
        let mut image = engine.medium.power_cut_keeping(|_| true).settled();
        image.write(torn.start + 1024, &[0; 512]);
        laps += engine.pool.counters().ring_wraps;
        drop((flushed, engine));
        engine = Engine::open(at_once(image.into()), log.clone()).expect("open");
        for back in 0..200.min(round + 1) {
            let (block, byte) = ((round - back) % 200, ((round - back) / 200) as u8 + 1);
            assert_eq!(engine.read(volume, block).expect("readable"), byte, "round {round}");
        }
    }
    assert!(laps > 1, "{laps} laps");
    engine.lose_power().assert_clean();
}

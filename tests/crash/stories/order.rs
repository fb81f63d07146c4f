//! What must be durable, or have landed, before what (O1, O2, O4, O5, O10).

use std::ops::Range;

use plywood::error::Error;
use plywood::format::{Geometry, SUPERBLOCK_COPIES};
use plywood::units::{BLOCK_BYTES, VolumeId};

use crate::action::Call;
use crate::engine::{Begun, Engine, MIB, at_once, new_pool};
use crate::log::Log;

/// First byte of the journal.
pub const JOURNAL: u64 = 512 * BLOCK_BYTES;

pub fn is_superblock(range: &Range<u64>) -> bool {
    SUPERBLOCK_COPIES.iter().flatten().any(|copy| copy.offset_bytes() == range.start)
}

/// Whether it is in the ring.
pub fn is_journal(range: &Range<u64>) -> bool {
    (JOURNAL..JOURNAL + MIB).contains(&range.start)
}

/// Whether it is a descriptor or a page of the first group of a pool of that size: only checkpoints write there.
pub fn is_layout(pool_bytes: u64) -> impl Fn(&Range<u64>) -> bool {
    let geometry = Geometry::new(pool_bytes, MIB).expect("a pool");
    let start = geometry.group_start(0);
    let layout = start.offset_bytes()..start.plus(geometry.layout_blocks(0)).offset_bytes();
    move |range| layout.contains(&range.start)
}

/// **O1, C6a.** A write completes while the flush of a commit runs. Its record is not in that commit's batch: its data may
/// not be durable.
#[test]
pub fn write_that_lands_during_a_flush_is_not_in_its_batch() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.medium.hold(|call, _| call == Call::Flush);
    let flushed = engine.begin_flush(volume);
    engine.write(volume, 1, 2).expect("written");
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*flushed.borrow(), Some(Ok(()))));
    let left = engine.medium.power_cut_keeping(|_| false);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    assert_eq!(engine.read(volume, 0).expect("readable"), 1);
    // Mapped without its data it would show what the block held before; here that is zeros too, so ask the map.
    let handle = engine.handle(volume);
    let end = engine.finish(async move { handle.seek(0, false).await }).expect("seek");
    assert_eq!(end, Some(BLOCK_BYTES), "a block is mapped whose data was not durable");
}

/// **O2, C6b.** A write overwrites in place, mapped by a change whose batch is still being appended. A FLUSH after it may
/// not skip the journal: the block is not reachable before the batch is durable.
#[test]
pub fn flush_during_a_commit_waits_for_the_batch() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.medium.hold(|call, range| call == Call::WriteDurable && range.start >= JOURNAL);
    let first = engine.begin_flush(volume);
    engine.write(volume, 0, 2).expect("written in place");
    let second = engine.begin_flush(volume);
    engine.turns();
    assert!(first.borrow().is_none() && second.borrow().is_none(), "answered before the batch is durable");
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*first.borrow(), Some(Ok(()))) && matches!(*second.borrow(), Some(Ok(()))));
    let left = engine.medium.power_cut_keeping(|_| false);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    assert_eq!(engine.read(volume, 0).expect("readable"), 2);
}

/// Two FLUSHes, the second of which waits for the commit after the first one's: so the first one's batch is only written. It is
/// on its way, and so is nothing else.
pub fn begin_batch_that_is_only_written(engine: &Engine, volume: VolumeId) -> [Begun<Result<(), Error>>; 2] {
    engine.medium.hold(|call, _| call == Call::Flush);
    let flushed = [engine.begin_flush(volume), engine.begin_flush(volume)];
    engine.medium.hold(|call, range| call == Call::Write && is_journal(range));
    engine.medium.end_what_waits();
    engine.turns();
    assert_eq!(engine.medium.waiting(), 1, "the batch, a plain write");
    assert!(flushed.iter().all(|flushed| flushed.borrow().is_none()), "answered before the batch has landed");
    flushed
}

/// The same, and the batch has landed: the flush of the next commit is on its way.
fn begin_flush_of_a_batch(engine: &Engine, volume: VolumeId) -> [Begun<Result<(), Error>>; 2] {
    let flushed = begin_batch_that_is_only_written(engine, volume);
    engine.medium.hold(|call, _| call == Call::Flush);
    engine.medium.end_what_waits();
    engine.turns();
    assert_eq!(engine.medium.waiting(), 1, "the next commit has begun");
    flushed
}

/// **O2, shared flush.** What makes a batch durable that was only written is the flush of the next commit. Nobody is answered
/// before that has ended, and a flush has been saved.
#[test]
pub fn batch_that_was_only_written_is_not_answered() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.commit();
    let calls = |call| engine.medium.calls(call);
    let before = (calls(Call::Flush), calls(Call::WriteDurable));
    engine.write(volume, 0, 1).expect("written");
    let flushed = begin_flush_of_a_batch(&engine, volume);
    assert!(flushed.iter().all(|flushed| flushed.borrow().is_none()), "a FLUSH is answered whose batch may be lost");
    engine.medium.let_go();
    engine.turns();
    assert!(flushed.iter().all(|flushed| matches!(*flushed.borrow(), Some(Ok(())))));
    assert_eq!((calls(Call::Flush), calls(Call::WriteDurable)), (before.0 + 2, before.1));
    let engine = engine.lose_power();
    assert_eq!(engine.read(volume, 0).expect("readable"), 1);
    engine.assert_clean();
}

/// A power cut while a batch that was only written waits for its flush: there or not, and whole.
#[test]
fn batch_that_was_only_written_is_there_or_not() {
    for is_kept in [false, true] {
        let engine = Engine::on(new_pool());
        let volume = engine.create(1, MIB);
        engine.commit();
        engine.write(volume, 0, 1).expect("written");
        let _flushed = begin_flush_of_a_batch(&engine, volume);
        engine.write(volume, 1, 2).expect("written");
        let left = engine.medium.power_cut_keeping(|_| is_kept);
        drop(engine);
        let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
        assert_eq!(engine.read(volume, 0).expect("readable"), u8::from(is_kept));
        assert_eq!(engine.read(volume, 1).expect("readable"), 0, "its batch was not appended");
        engine.write(volume, 1, 3).expect("written");
        engine.flush(volume).expect("flushed");
        let engine = engine.lose_power();
        assert_eq!(engine.read(volume, 0).expect("readable"), u8::from(is_kept));
        assert_eq!(engine.read(volume, 1).expect("readable"), 3);
        engine.assert_clean();
    }
}

/// **O2, C6c.** Two changes of one block are pending at a checkpoint's instant and are appended after it. Replayed over
/// the new trees the first would bring a block back that has been given to somebody else.
#[test]
pub fn records_at_or_below_the_checkpoint_are_not_replayed() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let (volume, other) = (engine.create(1, MIB), engine.create(2, 64 * MIB));
    engine.write(volume, 0, 1).expect("written");
    engine.snapshot(volume, 3);
    engine.commit();
    // The batch of what follows is cut before the checkpoint's instant, and is on its way until behind its superblock: it was
    // only written, since somebody waits for the next one.
    engine.write(volume, 0, 2).expect("redirected");
    engine.discard(volume, 0, 1).expect("discarded");
    engine.write(volume, 0, 3).expect("written anew");
    let flushed = begin_batch_that_is_only_written(&engine, volume);
    let batches = engine.pool.counters().batches;
    engine.checkpoint().expect("checkpoint");
    engine.medium.let_go();
    engine.turns();
    assert!(flushed.iter().all(|flushed| matches!(*flushed.borrow(), Some(Ok(())))));
    assert!(engine.pool.counters().batches > batches, "nothing stands in the ring that must not be replayed");
    engine.fill(other, 9);
    engine.flush(other).expect("flushed");
    let left = engine.medium.power_cut_keeping(|_| false);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    assert_eq!(engine.read(volume, 0).expect("readable"), 3);
    engine.assert_clean();
}

/// **O2, C6d.** A clone shares what its origin mapped a moment ago, and only the clone is flushed. One log in one order:
/// the origin's changes are durable with it.
#[test]
pub fn flush_of_a_clone_makes_what_it_shares_durable() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    let snapshot = engine.snapshot(volume, 2);
    let clone = engine.clone_of(snapshot, 3);
    engine.write(volume, 1, 2).expect("written");
    engine.write(clone, 2, 3).expect("written");
    engine.flush(clone).expect("flushed");
    let left = engine.medium.power_cut_keeping(|_| false);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    for of in [volume, snapshot, clone] {
        assert_eq!(engine.read(of, 0).expect("readable"), 1);
    }
    assert_eq!(engine.read(clone, 2).expect("readable"), 3);
    engine.assert_clean();
}

/// **O4, C10a.** Death between the two copies of a superblock: one is durable, the other not yet, and the durable one goes
/// bad. Nothing of the former generation was reused before both were there, so it is still whole.
#[test]
pub fn death_between_the_two_copies_of_a_superblock_leaves_the_former_whole() {
    for bad in 0..2 {
        let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
        let (volume, other) = (engine.create(1, MIB), engine.create(2, 64 * MIB));
        for block in 0..200 {
            engine.write(volume, block, 1).expect("written");
        }
        engine.checkpoint().expect("checkpoint");
        engine.flush(volume).expect("flushed");
        for block in 0..200 {
            engine.discard(volume, block, 1).expect("discarded");
        }
        // One of the copies of whichever slot is next waits.
        let copies = [128 * BLOCK_BYTES, 384 * BLOCK_BYTES, 0, 256 * BLOCK_BYTES];
        let held = [copies[1 - bad], copies[3 - bad]];
        engine.medium.hold(move |call, range| call == Call::WriteDurable && held.contains(&range.start));
        let pool = engine.pool.clone();
        let checkpointed = engine.begin(async move { pool.checkpoint().await });
        assert_eq!(engine.medium.waiting(), 1);
        assert!(checkpointed.borrow().is_none(), "one copy was enough");
        // Somebody wants all the room there is.
        let mut writes = Vec::new();
        for block in 0..40 {
            writes.push(engine.begin_write(other, block, 9));
        }
        let mut left = engine.medium.power_cut_keeping(|range| !is_superblock(range)).settled();
        drop(engine);
        // The copy that is there goes bad; the other was never written.
        for copy in [copies[bad], copies[2 + bad]] {
            let mut sector = [0; 512];
            left.read(copy, &mut sector);
            if !held.contains(&copy) && crate::stories::is_newest_superblock(&left, copy) {
                sector[100] ^= 1;
                left.write(copy, &sector);
            }
        }
        let engine = Engine::open(at_once(left.into()), Log::new(2)).expect("open with the former superblock");
        for block in 0..200 {
            let found = engine.read(volume, block).expect("readable");
            assert!(found <= 1, "block {block} holds {found}, which another volume wrote");
        }
        engine.assert_clean();
    }
}

/// **O5.** A redirected write is in flight: whoever reads sees the old block, whole; and a death leaves the old one or the
/// new one.
#[test]
pub fn redirected_block_is_mapped_when_its_data_has_landed() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.snapshot(volume, 2);
    engine.medium.hold(|call, _| call == Call::Write);
    let written = engine.begin_write(volume, 0, 2);
    assert!(written.borrow().is_none());
    assert_eq!(engine.read(volume, 0).expect("readable"), 1);
    let left = engine.medium.power_cut_keeping(|_| true);
    drop(engine);
    // The write itself never landed.
    let engine = Engine::open(at_once(left), log).expect("open");
    assert_eq!(engine.read(volume, 0).expect("readable"), 1);
    engine.assert_clean();
}

/// **O10, C2.** The engine dies under a mounted file system that holds a page as clean: whatever was answered is there,
/// flushed or not, discards and snapshots too.
#[test]
pub fn death_loses_nothing_that_was_answered() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let volume = engine.create(1, 8 * MIB);
    for block in 0..20 {
        engine.write(volume, block, 1).expect("written");
    }
    let snapshot = engine.snapshot(volume, 2);
    engine.write(volume, 0, 2).expect("written");
    engine.discard(volume, 1, 2).expect("discarded");
    let left = engine.medium.process_death(&mut fastrand::Rng::with_seed(1));
    drop(engine);
    let engine = Engine::open(at_once(left), log).expect("open");
    assert!(engine.pool.counters().records_recovered > 0);
    let found: Vec<u8> = (0..4).map(|block| engine.read(volume, block).expect("readable")).collect();
    assert_eq!(found, [2, 0, 0, 1]);
    assert_eq!(engine.read(snapshot, 1).expect("readable"), 1);
    engine.assert_clean();
}

/// **O10, N4.** Two volumes publish at the same time and the engine dies between: what is published is a prefix of what
/// happened, and of it nothing is missing.
#[test]
pub fn two_volumes_publishing_at_once_leave_a_prefix() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let (first, second) = (engine.create(1, MIB), engine.create(2, MIB));
    for round in 0..8 {
        // The data of the first volume waits, so its record comes later though its write was begun earlier.
        engine.medium.hold(|call, _| call == Call::Write);
        let slow = engine.begin_write(first, round, 1);
        engine.medium.hold(|_, _| false);
        engine.write(second, round, 2).expect("written");
        assert!(slow.borrow().is_none());
        if round < 7 {
            engine.medium.let_go();
            engine.turns();
        }
    }
    let left = engine.medium.power_cut_keeping(|_| true);
    let published = log.copy();
    drop(engine);
    let engine = Engine::open(at_once(left), published).expect("open");
    for round in 0..8 {
        assert_eq!(engine.read(second, round).expect("readable"), 2);
        assert_eq!(engine.read(first, round).expect("readable"), u8::from(round < 7));
    }
    engine.assert_clean();
}

/// **Slots, C3.** A checkpoint is aborted after its pages and descriptors are written. Later checkpoints do not touch that
/// page, and its leftover must never be taken for current.
#[test]
pub fn leftovers_of_an_aborted_checkpoint_are_never_adopted() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, 8 * MIB);
    for block in 0..300 {
        engine.write(volume, block, 1).expect("written");
    }
    engine.checkpoint().expect("checkpoint");
    let mut left = engine.medium.power_cut_keeping(|_| true);
    drop(engine);
    for round in 0..6 {
        let engine = Engine::open(at_once(left), Log::new(2 + round)).expect("open");
        engine.assert_clean();
        for block in 0..20 {
            engine.write(volume, 300 + block, 2).expect("written");
        }
        engine.discard(volume, 10 * round as u64, 5).expect("discarded");
        // Everything of the checkpoint lands but its superblock.
        engine.medium.hold(|call, range| call == Call::WriteDurable && range.start < JOURNAL);
        let pool = engine.pool.clone();
        let _checkpointed = engine.begin(async move { pool.checkpoint().await });
        assert_eq!(engine.medium.waiting(), 2);
        left = engine.medium.power_cut_keeping(|_| true);
        drop(engine);
        // A clean cycle that changes little.
        let engine = Engine::open(at_once(left), Log::new(100 + round)).expect("open");
        engine.assert_clean();
        engine.write(volume, 700, 3).expect("written");
        engine.checkpoint().expect("checkpoint");
        engine.assert_clean();
        left = engine.medium.power_cut_keeping(|_| true);
    }
    let engine = Engine::open(at_once(left), Log::new(200)).expect("open");
    engine.assert_clean();
    assert_eq!(engine.read(volume, 100).expect("readable"), 1);
}

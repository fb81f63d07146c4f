//! Sealing over crashes and changes (C11, N7, N8).

use plywood::engine::{Pace, SealReport};
use plywood::error::Error;
use plywood::units::VolumeId;

use super::order::is_layout;
use crate::action::Call;
use crate::engine::{Begun, Engine, MIB, POOL_BYTES, at_once, new_pool, pool_of};
use crate::log::Log;

fn begin_seal(engine: &Engine, snapshot: VolumeId) -> Begun<Result<SealReport, Error>> {
    let pool = engine.pool.clone();
    engine.begin(async move { pool.seal(snapshot, Pace::Full).await })
}

fn seal(engine: &Engine, snapshot: VolumeId) -> SealReport {
    let pool = engine.pool.clone();
    engine.finish(async move { pool.seal(snapshot, Pace::Full).await }).expect("sealed")
}

/// Holds every block of a sealed snapshot against its checksum, and all of it against its digest.
fn verify(engine: &Engine, snapshot: VolumeId) -> SealReport {
    let pool = engine.pool.clone();
    engine.finish(async move { pool.verify_sealed(snapshot).await }).expect("sealed, and whole")
}

/// From now on what has a checksum is held against it whenever it is read.
fn verify_reads(engine: &Engine) {
    let pool = engine.pool.clone();
    engine.finish(async move { pool.verify_pool_on_read(true).await }).expect("done");
}

/// **N8.** Power is lost while the checkpoint with the checksums is written: the snapshot is not sealed, and is read again.
/// After the call has returned it is, each of its blocks has its checksum, and so have those of a relative that skips them.
#[test]
pub fn snapshot_is_called_sealed_after_its_checksums_are_durable() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, 8 * MIB);
    for block in 0..300 {
        engine.write(volume, block, 1).expect("written");
    }
    let first = engine.snapshot(volume, 2);
    let is_layout = is_layout(POOL_BYTES);
    engine.medium.hold(move |call, range| call == Call::Write && is_layout(range));
    let sealed = begin_seal(&engine, first);
    let writes = engine.medium.waiting();
    engine.commit();
    let too_early = matches!(*sealed.borrow(), Some(Ok(_)));
    drop(sealed);
    let engine = engine.lose_power();
    assert!(!too_early && !engine.info(first).sealed, "sealed, and nothing can be held against anything");
    assert!(writes > 0, "no checkpoint was under way");
    assert_eq!(seal(&engine, first).blocks_sealed, 300);
    let engine = engine.lose_power();
    assert!(engine.info(first).sealed);
    assert_eq!(verify(&engine, first).blocks_read, 300);
    // The next one takes over what it shares.
    engine.write(volume, 7, 2).expect("written");
    let second = engine.snapshot(volume, 3);
    assert_eq!(seal(&engine, second).blocks_sealed, 1);
    let engine = engine.lose_power();
    assert_eq!(verify(&engine, second).blocks_read, 300);
    engine.assert_clean();
}

/// **N9.** A snapshot is sealed on a host that is full or gets full: the pages for its checksums are not there yet. The sealing is
/// refused, and a checkpoint never meets a place that the host does not have; with room it goes on.
#[test]
pub fn sealing_on_a_full_host_fails_and_no_checkpoint_does() {
    const PAGES: u64 = 66;
    const FIRST_GROUP: u64 = 3 * MIB;
    let mut refused = 0;
    for room in [0, 30, PAGES - 1, PAGES, 2 * PAGES] {
        let medium = at_once(new_pool());
        medium.limit_host(FIRST_GROUP, 1 << 40);
        let engine = Engine::open(medium, Log::new(1)).expect("open");
        let volume = engine.create(1, 8 * MIB);
        for block in 0..40 {
            engine.write(volume, block, 1).expect("written");
        }
        let first = engine.snapshot(volume, 2);
        engine.checkpoint().expect("checkpoint");
        // The host has what was taken so far, and no place for the pages of the only group.
        engine.medium.fill_host(room * 4096);
        let pool = engine.pool.clone();
        let sealed = engine.finish(async move { pool.seal(first, Pace::Full).await });
        engine.checkpoint().expect("a checkpoint needs nothing of the host");
        match sealed {
            Ok(report) => assert_eq!(report.blocks_sealed, 40),
            Err(Error::NoSpace(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        assert_eq!(engine.info(first).sealed, room >= PAGES, "with room for {room} blocks");
        engine.write(volume, 0, 5).expect("written where the pool has room");
        let engine = engine.lose_power();
        seal(&engine, first);
        assert_eq!(verify(&engine, first).blocks_read, 40);
        engine.assert_clean();
    }
    assert_eq!(refused, 3);
}

/// **C11a.** Sealing copies no node and unshares nothing, and the next snapshot is not read as a whole.
#[test]
pub fn sealing_unshares_nothing_and_reads_a_block_once() {
    let engine = Engine::on(pool_of(32 * MIB));
    let volume = engine.create(1, 64 * MIB);
    for block in 0..2000 {
        engine.write(volume, block, 1).expect("written");
    }
    let first = engine.snapshot(volume, 2);
    engine.checkpoint().expect("checkpoint");
    let (before, used) = (engine.pool.counters(), engine.pool.info().used_bytes);
    assert_eq!(seal(&engine, first).blocks_read, 2000);
    engine.checkpoint().expect("checkpoint");
    assert_eq!(engine.pool.counters().nodes_shadowed, before.nodes_shadowed);
    let more = engine.pool.info().used_bytes - used;
    assert!(more <= 8 * 4096, "{more} bytes more for a digest and its state");
    engine.write(volume, 700, 2).expect("written");
    assert_eq!(engine.pool.counters().nodes_shadowed, before.nodes_shadowed + 2, "a root and a leaf");
    let second = engine.snapshot(volume, 3);
    let report = seal(&engine, second);
    assert_eq!((report.blocks_read, report.blocks_sealed), (2, 1), "the old block and the new one");
    engine.assert_clean();
}

/// **C11b.** Sealed snapshots go, their blocks get other owners, other content, and are sealed again. No checksum outlives
/// what it was taken of: good data is never reported as damage, over losses of power too.
#[test]
pub fn checksum_goes_with_the_content_it_was_taken_of() {
    let mut engine = Engine::on(new_pool());
    let volume = engine.create(1, 64 * MIB);
    for round in 1..6u8 {
        let mut blocks = 0;
        while blocks < 500 && engine.write(volume, blocks, round).is_ok() {
            blocks += 1;
        }
        assert!(blocks > 200, "{blocks} blocks in round {round}");
        let snapshot = engine.snapshot(volume, 100 + u128::from(round));
        seal(&engine, snapshot);
        verify(&engine, snapshot);
        verify_reads(&engine);
        engine.delete(snapshot).expect("deleted");
        engine.settle();
        if round % 2 == 0 {
            // What the volume has alone now it writes over, and so on.
            engine.write(volume, 0, 77).expect("written");
            assert_eq!(engine.read(volume, 0).expect("no damage"), 77);
        } else {
            engine.discard(volume, 0, 500).expect("discarded");
        }
        engine.checkpoint().expect("checkpoint");
        engine = engine.lose_power();
        engine.assert_clean();
    }
}

/// **C11d.** A block is being read to be sealed when its snapshot is deleted, its origin has let go of it, and others want
/// it. Nothing is recorded for what it holds afterwards.
#[test]
pub fn seal_of_a_snapshot_that_goes_records_nothing() {
    let engine = Engine::on(new_pool());
    let (volume, other) = (engine.create(1, MIB), engine.create(2, 64 * MIB));
    for block in 0..100 {
        engine.write(volume, block, 1).expect("written");
    }
    let snapshot = engine.snapshot(volume, 3);
    engine.checkpoint().expect("checkpoint");
    // The reads of data: of as many blocks at a time as stand next to each other.
    engine.medium.hold(|call, range| call == Call::Read && range.end - range.start > 4096);
    let sealed = begin_seal(&engine, snapshot);
    assert!(sealed.borrow().is_none() && engine.medium.waiting() == 1, "{:?}", engine.medium.under_way());
    engine.medium.hold(|_, _| false);
    engine.discard(volume, 0, 100).expect("discarded");
    engine.delete(snapshot).expect("deleted");
    engine.settle();
    engine.checkpoint().expect("checkpoint");
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*sealed.borrow(), Some(Err(Error::NotFound(_)))), "{sealed:?}");
    engine.fill(other, 2);
    let of_other = engine.snapshot(other, 4);
    engine.checkpoint().expect("checkpoint");
    seal(&engine, of_other);
    verify(&engine, of_other);
    engine.assert_clean();
}

/// **N7.** A write in place is in flight over the tick: while it may still land the snapshot is not to be sealed.
#[test]
pub fn snapshot_is_not_sealed_while_writes_in_place_may_land_in_it() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.medium.hold(|call, _| call == Call::Write);
    let slow = engine.begin_write(volume, 0, 2);
    engine.medium.hold(|_, _| false);
    let taken = engine.begin_snapshot(volume, 2);
    let snapshot = engine.pool.volume("v2").expect("it is there already").id;
    let refused = begin_seal(&engine, snapshot);
    let sealed_early = matches!(*refused.borrow(), Some(Ok(_)));
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*slow.borrow(), Some(Ok(()))) && matches!(*taken.borrow(), Some(Ok(_))));
    if !sealed_early {
        assert!(matches!(*refused.borrow(), Some(Err(Error::Busy(_)))), "{refused:?}");
        seal(&engine, snapshot);
    }
    verify(&engine, snapshot);
}

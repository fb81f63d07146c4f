//! Snapshots, clones, deletion and rollback, over crashes (O2, O6, and the sequences about counts).

use std::cell::Cell;

use plywood::error::Error;
use plywood::units::VolumeId;

use crate::action::Call;
use crate::engine::{Engine, MIB, at_once, new_pool};
use crate::log::Log;

/// **O6, C1.** V and its clone share a block; the clone redirects, not yet recorded, and V overwrites. Power cut: the clone
/// reads its old block, not V's new data. The same when the clone discards, is deleted, or is rolled back.
#[test]
pub fn block_that_became_exclusive_is_not_overwritten_in_place() {
    for how in 0..4 {
        let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
        let volume = engine.create(1, MIB);
        engine.write(volume, 0, 1).expect("written");
        let snapshot = engine.snapshot(volume, 2);
        let clone = engine.clone_of(snapshot, 3);
        // A snapshot of the clone that does not have the block.
        let full = engine.snapshot(clone, 4);
        engine.discard(clone, 0, 1).expect("discarded");
        let empty = engine.snapshot(clone, 5);
        engine.roll_back(clone, full).expect("rolled back");
        for done in [snapshot, full] {
            engine.delete(done).expect("deleted");
        }
        engine.settle();
        // Leaves are private, counts durable.
        engine.write(volume, 1, 1).expect("written");
        engine.write(clone, 1, 1).expect("written");
        engine.flush(volume).expect("flushed");
        engine.checkpoint().expect("checkpoint");
        engine.medium.hold(|call, range| call == Call::WriteDurable && range.start >= 512 * 4096);
        match how {
            0 => engine.write(clone, 0, 2).expect("redirected"),
            1 => engine.discard(clone, 0, 1).expect("discarded"),
            2 => {
                let pool = engine.pool.clone();
                drop(engine.begin(async move { pool.delete_volume(clone).await }));
            }
            _ => {
                let pool = engine.pool.clone();
                drop(engine.begin(async move { pool.roll_back(clone, empty, None).await }));
            }
        }
        engine.write(volume, 0, 3).expect("written");
        let left = engine.medium.power_cut_keeping(|_| true);
        drop(engine);
        let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
        let found = engine.read(clone, 0).expect("the clone is there: its deletion was not acknowledged");
        assert!(found <= 2, "the clone reads {found}, which its origin wrote");
        engine.assert_clean();
    }
}

/// **O2, N7.** A write in place is in flight when a snapshot ticks. The snapshot is not acknowledged before it has landed
/// and is durable; what it shows then it shows for ever.
#[test]
pub fn snapshot_waits_for_writes_in_place_from_before_its_tick() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.medium.hold(|call, _| call == Call::Write);
    let slow = engine.begin_write(volume, 0, 2);
    engine.medium.hold(|_, _| false);
    let taken = engine.begin_snapshot(volume, 2);
    let shown = match &*taken.borrow() {
        Some(Ok(snapshot)) => Some(engine.read(*snapshot, 0).expect("readable")),
        _ => None,
    };
    // Written after the tick, so redirected: it must not wait.
    engine.write(volume, 1, 5).expect("written");
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*slow.borrow(), Some(Ok(()))));
    let Some(Ok(snapshot)) = *taken.borrow() else { panic!("{taken:?}") };
    let now = engine.read(snapshot, 0).expect("readable");
    assert!(shown.is_none_or(|shown| shown == now), "the snapshot changed from {shown:?} to {now}");
    let left = engine.medium.power_cut_keeping(|_| false);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    assert_eq!(engine.read(snapshot, 0).expect("readable"), now, "an acknowledged snapshot changed");
    engine.assert_clean();
}

/// **O2, of several volumes.** A log and the table that it is about, on two volumes: the table is written after the log has
/// answered. Whenever both are snapshotted at one instant, the log's snapshot is not behind the table's, and each shows for
/// ever what it showed first.
#[test]
pub fn snapshots_of_one_instant_hold_whatever_was_answered_before() {
    for begun_before in [false, true] {
        let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
        let (log, table) = (engine.create(1, MIB), engine.create(2, MIB));
        for volume in [log, table] {
            engine.write(volume, 0, 1).expect("written");
        }
        let slow = begun_before.then(|| {
            engine.medium.hold(|call, _| call == Call::Write);
            let slow = engine.begin_write(table, 1, 7);
            engine.medium.hold(|_, _| false);
            slow
        });
        // The instant has been, and the snapshots are not durable.
        engine.medium.hold(|call, _| call == Call::Flush);
        let taken = engine.begin_snapshots(&[(table, 3), (log, 4)]);
        assert!(taken.borrow().is_none());
        engine.write(log, 0, 2).expect("written");
        engine.write(table, 0, 2).expect("written");
        engine.medium.hold(|_, _| false);
        engine.medium.let_go();
        engine.turns();
        assert!(slow.is_none_or(|slow| matches!(*slow.borrow(), Some(Ok(())))));
        let Some(Ok(taken)) = taken.borrow().clone() else { panic!("{taken:?}") };
        let shown = [engine.read(taken[0], 0).expect("table"), engine.read(taken[1], 0).expect("log")];
        assert_eq!(shown, [1, 1], "before both writes, or after both");
        let left = engine.medium.power_cut_keeping(|_| false);
        drop(engine);
        let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
        let now = [engine.read(taken[0], 0).expect("table"), engine.read(taken[1], 0).expect("log")];
        assert_eq!(now, shown, "acknowledged snapshots changed");
        engine.assert_clean();
    }
}

/// **O2, C4, of several volumes.** A power cut while they are taken: what is there afterwards is of that instant. Who asks
/// again gets the same, or hears which are left and not the others.
#[test]
pub fn snapshots_of_one_instant_cut_short_are_of_that_instant_or_not_there() {
    for lost in 0..16_usize {
        let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
        let volumes: Vec<VolumeId> = (0..6).map(|number| engine.create(10 + number, MIB)).collect();
        for volume in &volumes {
            engine.write(*volume, 0, 1).expect("written");
        }
        engine.commit();
        let wanted: Vec<_> = volumes.iter().zip(50..).map(|(volume, number)| (*volume, number)).collect();
        engine.medium.hold(|call, _| call == Call::WriteDurable);
        let taken = engine.begin_snapshots(&wanted);
        assert!(taken.borrow().is_none());
        for volume in &volumes {
            engine.write(*volume, 0, 2).expect("written");
        }
        let number = Cell::new(0);
        let left = engine.medium.power_cut_keeping(|_| number.replace(number.get() + 1) % 16 != lost);
        drop((engine, taken));
        let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
        let there = engine.pool.volumes().iter().filter(|volume| volume.read_only).count();
        match engine.snapshots(&wanted) {
            Ok(taken) if there == wanted.len() => {
                for snapshot in taken {
                    assert_eq!(engine.read(snapshot, 0).expect("readable"), 1);
                }
            }
            Ok(taken) => assert!(there == 0 && taken.len() == wanted.len()),
            Err(Error::AlreadyExists(_)) => assert!(there > 0 && there < wanted.len()),
            Err(error) => panic!("{error}"),
        }
        engine.assert_clean();
    }
}

/// What makes no sense together is refused, and nothing is left of it.
#[test]
pub fn snapshots_of_one_instant_are_all_taken_or_none() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let (one, two) = (engine.create(1, MIB), engine.create(2, MIB));
    let take = |wanted: &[(VolumeId, u128)]| engine.snapshots(wanted);
    let many: Vec<_> = (100..200).map(|number| (VolumeId(number as u64), number)).collect();
    for wanted in [&[][..], &[(one, 3), (one, 4)], &[(one, 3), (two, 3)], &many] {
        assert!(matches!(take(wanted), Err(Error::InvalidInput(_))), "{wanted:?}");
    }
    let before = engine.pool.info().clock;
    assert!(matches!(take(&[(one, 3), (VolumeId(77), 4)]), Err(Error::NotFound(_))));
    assert!(matches!(take(&[(one, 3), (two, 1)]), Err(Error::AlreadyExists(_))), "its name is a volume's");
    assert_eq!((engine.pool.info().clock, engine.pool.volumes().len()), (before, 2));
    let taken = take(&[(one, 3), (two, 4)]).expect("taken");
    assert_eq!(take(&[(one, 3), (two, 4)]).expect("asked again"), taken);
    assert!(matches!(take(&[(one, 3), (two, 5)]), Err(Error::AlreadyExists(_))), "one of an earlier instant");
    engine.assert_clean();
}

/// **N14.** The blocks born last before a snapshot are the ones that an off-by-one in the clock overwrites.
#[test]
pub fn youngest_blocks_of_a_snapshot_are_not_overwritten() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, MIB);
    let mut snapshots = Vec::new();
    for round in 1..6 {
        engine.write(volume, 0, round).expect("written");
        snapshots.push((engine.snapshot(volume, 10 + u128::from(round)), round));
    }
    engine.write(volume, 0, 9).expect("written");
    for (snapshot, byte) in snapshots {
        assert_eq!(engine.read(snapshot, 0).expect("readable"), byte);
    }
}

/// **N1, N2.** Snapshot, write, delete the snapshot, write: over and over. The root's count falls back to 1 while its birth
/// says shared; counts are exact after every checkpoint, and nothing is lost in the end.
#[test]
pub fn snapshot_delete_write_over_and_over_keeps_counts_exact() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, 8 * MIB);
    for block in 0..600 {
        engine.write(volume, block, 1).expect("written");
    }
    let used = |engine: &Engine| {
        let pool = engine.pool.clone();
        engine.settle();
        engine.checkpoint().expect("checkpoint");
        engine.assert_clean();
        engine.finish(async move { pool.check().await }).expect("checked").used_blocks
    };
    let before = used(&engine);
    let mut kept: Vec<VolumeId> = Vec::new();
    for round in 0..30u8 {
        let snapshot = engine.snapshot(volume, 100 + u128::from(round));
        if round % 3 != 0 {
            engine.write(volume, u64::from(round) * 19, round | 1).expect("written");
        }
        if round % 4 == 1 {
            engine.checkpoint().expect("checkpoint");
            engine.assert_clean();
        }
        if round % 2 == 0 {
            engine.delete(snapshot).expect("deleted");
        } else {
            kept.push(snapshot);
        }
        engine.write(volume, u64::from(round) * 17, round | 1).expect("written");
        used(&engine);
        if kept.len() > 3 {
            engine.delete(kept.remove(0)).expect("deleted");
            used(&engine);
        }
    }
    for snapshot in kept {
        engine.delete(snapshot).expect("deleted");
    }
    assert_eq!(used(&engine), before);
}

/// **N5.** A full pool; blocks are discarded, and some of them are wanted again at once; then a crash. Replay may not use
/// what it frees, and must find room for its nodes.
#[test]
pub fn full_pool_opens_after_a_crash() {
    for kind in 0..2 {
        let log = Log::new(1);
        let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
        let (volume, other) = (engine.create(1, 8 * MIB), engine.create(2, 64 * MIB));
        for block in 0..500 {
            engine.write(volume, block, 1).expect("written");
        }
        engine.fill(other, 8);
        engine.checkpoint().expect("checkpoint");
        engine.discard(volume, 0, 200).expect("discarded");
        engine.flush(volume).expect("flushed");
        let snapshot = engine.snapshot(volume, 3);
        let again = engine.fill(volume, 2);
        assert!(again > 0, "nothing of what was freed could be used");
        let _ = engine.discard(volume, 300, 1);
        engine.flush(volume).expect("flushed");
        let left = if kind == 0 {
            engine.medium.power_cut_keeping(|_| false)
        } else {
            engine.medium.process_death(&mut fastrand::Rng::with_seed(4))
        };
        drop(engine);
        let log = if kind == 0 { Log::new(2) } else { log };
        let engine = Engine::open(at_once(left), log).expect("a full pool opens");
        engine.assert_clean();
        assert_eq!(engine.read(volume, 0).expect("readable"), 2);
        assert_eq!(engine.read(snapshot, 450).expect("readable"), 1);
        // And is not wedged: what is its own is overwritten, deletion gives room again.
        engine.write(other, 0, 7).expect("overwritten in place");
        engine.delete(snapshot).expect("deleted");
        engine.discard(other, 0, 256).expect("discarded");
        engine.commit();
        engine.write(volume, 600, 3).expect("there is room again");
        engine.assert_clean();
    }
}

/// **N6.** Fill the pool, take a snapshot, delete it: every overwrite is a redirect by birth, and needs a block that it
/// frees only later. The float keeps that going.
#[test]
pub fn full_pool_after_a_snapshot_came_and_went_is_not_wedged() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, 64 * MIB);
    let blocks = engine.fill(volume, 1);
    engine.checkpoint().expect("checkpoint");
    let snapshot = engine.snapshot(volume, 2);
    engine.delete(snapshot).expect("deleted");
    engine.settle();
    let mut refused = 0;
    for block in 0..blocks {
        match engine.write(volume, block, 2) {
            Ok(()) => {}
            Err(Error::NoSpace(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    println!("{refused} of {blocks} overwrites refused");
    assert_eq!(refused, 0, "of {blocks} overwrites that free what they cost so many were refused");
    engine.assert_clean();
}

/// **N10.** A subtree is discarded that a snapshot holds too: own and mapped bytes go down by what was the volume's, exactly,
/// also when an engine dies while it is counted.
#[test]
pub fn discard_of_a_shared_subtree_counts_own_bytes_exactly_over_a_death() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let volume = engine.create(1, 64 * MIB);
    for block in 0..600 {
        engine.write(volume, block, 1).expect("written");
    }
    engine.checkpoint().expect("checkpoint");
    engine.snapshot(volume, 2);
    engine.write(volume, 5, 2).expect("written");
    engine.discard(volume, 0, 512).expect("discarded");
    let left = engine.medium.process_death(&mut fastrand::Rng::with_seed(2));
    drop(engine);
    let engine = Engine::open(at_once(left), log).expect("open");
    engine.settle();
    let info = engine.pool.volumes().into_iter().find(|info| info.id == volume).expect("there");
    assert_eq!((info.own_bytes, info.mapped_bytes), (88 * 4096, 88 * 4096));
    let info = engine.pool.volumes().into_iter().find(|info| info.id != volume).expect("there");
    assert_eq!(info.mapped_bytes, 600 * 4096);
    engine.assert_clean();
}

/// **N21.** Snapshots S1 and S2, then back to S1: what changed between S2 and now is found, though every block is older;
/// also after a crash.
#[test]
pub fn difference_across_a_rollback_is_found() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, 8 * MIB);
    for block in 0..10 {
        engine.write(volume, block, 1).expect("written");
    }
    let first = engine.snapshot(volume, 2);
    engine.write(volume, 3, 2).expect("written");
    engine.discard(volume, 7, 1).expect("discarded");
    let second = engine.snapshot(volume, 3);
    let pool = engine.pool.clone();
    engine.finish(async move { pool.roll_back(volume, first, None).await }).expect("rolled back");
    let left = engine.medium.power_cut_keeping(|_| false);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    let third = engine.snapshot(volume, 4);
    let differing = |from: VolumeId, to: VolumeId| {
        let pool = engine.pool.clone();
        let ranges = engine.finish(async move { pool.changed_ranges(from, to).await }).expect("a difference");
        let blocks =
            ranges.iter().flat_map(|range| range.offset_bytes / 4096..(range.offset_bytes + range.length_bytes) / 4096);
        blocks.collect::<Vec<u64>>()
    };
    assert_eq!(differing(second, third), [3, 7]);
    assert_eq!(differing(first, third), [0u64; 0]);
}

/// **C7, N3.** Another process opens the pool between an engine's death and its successor, without the front's memory: it
/// goes on from what is durable, and the memory is refused afterwards, never merged. (That it cannot while a front lives is
/// the lock's: `io::pool_claim`.)
#[test]
pub fn memory_is_refused_when_somebody_else_was_there() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    let left = engine.medium.process_death(&mut fastrand::Rng::with_seed(2));
    drop(engine);
    let other = Engine::open(at_once(left), Log::new(7)).expect("open");
    assert_eq!(other.read(volume, 0).expect("readable"), 0);
    let left = other.medium.power_cut_keeping(|_| true);
    drop(other);
    let refused = Engine::open(at_once(left), log).err();
    assert!(matches!(refused, Some(Error::Incompatible(_))), "{refused:?}");
}

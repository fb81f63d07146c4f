//! Where there is hardly any room, in the pool or on its host (H3, H4, H6, M7, M10, M14, M16, N9, N11, N12, N13).

use std::cell::Cell;
use std::rc::Rc;

use plywood::engine::PendingLog;
use plywood::error::Error;

use super::order::{JOURNAL, is_layout};
use super::reuse::full_pool;
use crate::action::{Call, Fault};
use crate::engine::{Engine, MIB, at_once, new_pool, pool_of};
use crate::log::Log;

/// A pool whose second group, of 32 MiB, comes into use soon, and where that begins.
const TWO_GROUPS: u64 = SECOND_GROUP + 32 * MIB;
const SECOND_GROUP: u64 = 3 * MIB + 128 * MIB;

/// Whether a change was made; a refusal for any other reason than want of space is a failure.
fn is_done(outcome: Result<(), Error>) -> bool {
    match outcome {
        Ok(()) => true,
        Err(Error::NoSpace(_)) => false,
        Err(error) => panic!("{error}"),
    }
}

/// **N9.** A fresh group is taken into use on a host that gets full: before its pages are allocated, between them, or right
/// after. Changes are refused sooner or later; a checkpoint never meets a place that the host does not have.
#[test]
pub fn checkpoint_never_meets_a_full_host() {
    let engine = Engine::on(pool_of(TWO_GROUPS));
    let ballast = engine.create(1, 256 * MIB);
    engine.medium.limit_host(SECOND_GROUP, 0);
    for at in 0..120 {
        engine.zero(ballast, at * MIB, MIB).expect("there is room");
    }
    let medium = engine.medium.clone();
    engine.close();
    let left = medium.power_cut_keeping(|_| true);
    let mut groups = [0; 3];
    // The layout of a group has some 140 blocks; behind it 2048 are prepared at a time.
    for room in [0, 60, 130, 150, 400, 2048, 2052, 2100, 2180, 2250, 4100, 4300] {
        let medium = at_once(left.clone());
        medium.limit_host(SECOND_GROUP, room * 4096);
        let engine = Engine::open(medium, Log::new(2)).expect("open");
        let volume = engine.create(2, 256 * MIB);
        let mut at = 0;
        for length in [MIB, 32 * 4096, 4096] {
            while is_done(engine.zero(volume, at, length)) {
                at += length;
                engine.tick();
            }
        }
        engine.checkpoint().expect("a checkpoint needs nothing of the host");
        groups[engine.pool.info().groups_in_use as usize] += 1;
        assert!(at > 4 * MIB && (room < 2300 || at > 12 * MIB), "{at} bytes with room for {room} blocks");
        engine.write(volume, 0, 5).expect("written in place");
        engine.flush(volume).expect("flushed");
        let engine = engine.lose_power();
        assert_eq!(engine.read(volume, 0).expect("readable"), 5);
        engine.assert_clean();
    }
    assert!(groups[1] > 0 && groups[2] > 0, "with and without the second group: {groups:?}");
}

/// **N11.** On a fragmented pool pairs get rare, and a node for which there is none is written single. The second block of a
/// pair is counted as long as the first: it is neither handed out nor lost, while nodes move until there is no room.
#[test]
pub fn pairs_on_a_fragmented_pool_are_counted_to_the_last() {
    let engine = Engine::on(new_pool());
    let (volume, other) = (engine.create(1, 64 * MIB), engine.create(2, 1 << 40));
    let blocks = engine.fill(volume, 1);
    for block in (0..blocks).step_by(2) {
        engine.discard(volume, block, 1).expect("discarded");
    }
    engine.commit();
    // Leaves are single blocks. They take what is left for metadata, and every second one comes free, again and again: then
    // what is left are single blocks.
    for round in 0..6 {
        let written = (0..).find(|leaf| !is_done(engine.write(other, leaf * 256, 3))).expect("it is full sometime");
        for leaf in (round % 2..written).step_by(2) {
            engine.discard(other, leaf * 256, 1).expect("discarded");
        }
        engine.checkpoint().expect("checkpoint");
    }
    // Each of these wants a pair for the node above its leaf, and one more whenever that moves.
    let large = engine.create(3, 1 << 40);
    let written = (0..).find(|node| !is_done(engine.write(large, node * 65_536, 2))).expect("it is full sometime");
    assert!(written >= 20, "{written} nodes");
    assert!(engine.pool.counters().pairs_missed >= 20, "there are pairs: {:?}", engine.pool.counters());
    engine.assert_clean();
    engine.checkpoint().expect("checkpoint");
    let engine = engine.lose_power();
    engine.assert_clean();
    for node in 0..written {
        assert_eq!(engine.read(large, node * 65_536).expect("readable"), 2);
    }
    engine.delete(large).expect("deleted");
    engine.settle();
    engine.checkpoint().expect("checkpoint");
    engine.assert_clean();
}

/// **O8, N12.** A write wants a block; what was freed waits for a read that takes its time. Who waits for space holds
/// neither its range nor an epoch: others change the same blocks meanwhile, and nobody waits for each other.
#[test]
pub fn nothing_waits_for_space_while_it_holds_a_range_or_an_epoch() {
    let (engine, volume, other) = full_pool(300);
    engine.medium.hold(|call, _| call == Call::Read);
    let (_memory, read) = engine.begin_read(volume, 299);
    engine.medium.hold(|_, _| false);
    engine.discard(volume, 0, 299).expect("discarded");
    let waiting: Vec<_> = (0..20).map(|block| engine.begin_write(other, 10_000 + block, 9)).collect();
    assert!(read.borrow().is_none());
    assert!(waiting.iter().any(|write| write.borrow().is_none()), "nobody waits for space");
    // All of these are of the same blocks.
    let handle = engine.handle(other);
    let discarded = engine.begin(async move { handle.discard(10_000 * 4096, 20 * 4096).await.map(drop) });
    assert!(matches!(*discarded.borrow(), Some(Ok(()))), "a discard waits for who waits for space");
    engine.medium.let_go();
    engine.tick();
    assert!(waiting.iter().all(|write| matches!(*write.borrow(), Some(Ok(())))), "they wait for each other");
}

/// **N13.** A block held somebody's secret; the first write of its next owner is a sector. The rest of it reads as zeros,
/// never as what it was, also where zeros were written and are then written over in part.
#[test]
pub fn first_write_of_a_sector_shows_nothing_of_the_former_owner() {
    let (engine, volume, other) = full_pool(60);
    engine.discard(volume, 0, 60).expect("discarded");
    engine.commit();
    let mut written = 0;
    while written < 30 && is_done(engine.write_bytes(other, (10_000 + written) * 4096 + 512, &[9; 512])) {
        written += 1;
    }
    assert!(written > 10, "{written} blocks were used again");
    let (zeroed, reused) = (10_000 + written - 1, 10_000..10_000 + written - 1);
    engine.zero(other, zeroed * 4096, 4096).expect("zeroed");
    engine.write_bytes(other, zeroed * 4096 + 512, &[9; 512]).expect("written");
    for block in reused.chain([zeroed]) {
        let bytes = engine.read_block(other, block);
        assert!(bytes[512..1024].iter().all(|byte| *byte == 9));
        assert!(bytes[..512].iter().chain(&bytes[1024..]).all(|byte| *byte == 0), "block {block} shows its past");
    }
}

/// **M7.** Blocks that were zeroed and stay provisioned have their room: on a full pool they can be written.
#[test]
pub fn zeroed_blocks_stay_provisioned_on_a_full_pool() {
    let engine = Engine::on(new_pool());
    let (volume, other) = (engine.create(1, MIB), engine.create(2, 64 * MIB));
    engine.write(volume, 3, 1).expect("written");
    engine.zero(volume, 0, 64 * 4096).expect("zeroed");
    engine.fill(other, 8);
    engine.flush(volume).expect("flushed");
    for block in 0..64 {
        assert_eq!(engine.read(volume, block).expect("readable"), 0);
        engine.write(volume, block, 2).expect("has its room");
    }
    assert!(matches!(engine.write(volume, 100, 2), Err(Error::NoSpace(_))));
}

/// **H3.** A clone of a full pool is trimmed, a block of each of its leaves: each costs a leaf and gives nothing back. Some
/// are refused, and none of what must always work is broken by it.
#[test]
pub fn discards_that_copy_shared_leaves_on_a_full_pool_never_wedge_it() {
    let engine = Engine::on(pool_of(24 * MIB));
    let (volume, other) = (engine.create(1, 1024 * MIB), engine.create(2, 64 * MIB));
    for leaf in 0..1000 {
        engine.write_bytes(volume, leaf * MIB, &[1; 2 * 4096]).expect("written");
    }
    let snapshot = engine.snapshot(volume, 3);
    let clone = engine.clone_of(snapshot, 4);
    let ballast = engine.create(5, MIB);
    engine.fill(other, 8);
    let done = (0..1000).filter(|leaf| is_done(engine.discard(clone, leaf * 256, 1))).count();
    assert!(done < 1000, "none was refused");
    engine.checkpoint().expect("checkpoint");
    engine.write(other, 0, 7).expect("overwritten in place");
    engine.discard(other, 100, 10).expect("discard of what is its own");
    engine.delete(ballast).expect("deleted");
    let engine = engine.lose_power();
    engine.assert_clean();
    engine.delete(clone).expect("deleted");
    engine.settle();
    engine.assert_clean();
    for leaf in 0..1000 {
        assert_eq!(engine.read(snapshot, leaf * 256).expect("readable"), 1);
    }
}

/// **H4.** Each call that prepares or punches host space holds up all direct I/O of the file: preparing goes in large steps,
/// and blocks freed one by one are used again, not punched one by one.
#[test]
pub fn host_space_is_taken_and_given_back_in_few_large_calls() {
    let engine = Engine::on(pool_of(64 * MIB));
    let volume = engine.create(1, 64 * MIB);
    for block in 0..8000 {
        engine.write(volume, block, 1).expect("written");
    }
    let prepared = engine.medium.calls(Call::Extend);
    assert!(prepared <= 16, "{prepared} calls for 32 MiB");
    for block in (0..8000).step_by(2) {
        engine.discard(volume, block, 1).expect("discarded");
    }
    let rest = |engine: &Engine| {
        engine.commit();
        engine.checkpoint().expect("checkpoint");
        for _ in 0..10 {
            engine.tick();
        }
    };
    let before = engine.medium.calls(Call::Punch);
    rest(&engine);
    let scattered = engine.medium.calls(Call::Punch) - before;
    assert!(scattered <= 8, "{scattered} punches for 4000 blocks apart from each other");
    engine.discard(volume, 0, 8000).expect("discarded");
    rest(&engine);
    let punched = engine.pool.counters().blocks_punched;
    let calls = engine.medium.calls(Call::Punch) - before - scattered;
    assert!(punched > 6000 && calls <= 16, "{punched} blocks given back in {calls} calls");
}

/// **H6.** Nobody flushes. Changes are committed by themselves when a second has passed or much waits, so the log never
/// overflows (it asserts that itself) and what was freed is used again.
#[test]
pub fn changes_that_nobody_flushes_are_committed_by_themselves() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, 64 * MIB);
    engine.write(volume, 0, 1).expect("written");
    let pending = || engine.pool.info().last_lsn.0 - engine.pool.info().durable_lsn.0;
    assert_eq!(pending(), 1);
    engine.tick();
    assert_eq!(pending(), 0, "a second has passed");
    let batches = engine.pool.counters().batches;
    for round in 0..10_000u64 {
        engine.write(volume, round % 300, 1).expect("there is room");
        engine.discard(volume, round % 300, 1).expect("discarded");
    }
    assert!(engine.pool.counters().batches > batches, "nothing was committed");
    assert!(pending() < 3000);
}

/// **H6.** The ring is full and the checkpoint that will empty it takes its time. Changes of the mapping wait for it;
/// reads and writes in place go on.
#[test]
pub fn full_ring_holds_changes_of_the_mapping_and_nothing_else() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(pool_of(32 * MIB)), log.clone()).expect("open");
    let volume = engine.create(1, 64 * MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    let is_layout = is_layout(32 * MIB);
    engine.medium.hold(move |call, range| call == Call::Write && is_layout(range));
    let mut writes = Vec::new();
    let mut flushes = Vec::new();
    for block in 1..3000 {
        writes.push((block, engine.begin_write(volume, block, 2)));
        flushes.push(engine.begin_flush(volume));
        if writes.iter().any(|(_, write)| write.borrow().is_none()) {
            break;
        }
    }
    assert!(writes.len() < 2999, "nothing ever waits for the ring");
    let info = engine.pool.info();
    assert!(info.journal_used_bytes + 8192 >= info.journal_bytes, "{} are used", info.journal_used_bytes);
    assert!(flushes.iter().any(|flush| flush.borrow().is_none()));
    engine.write(volume, 0, 3).expect("written in place");
    assert_eq!(engine.read(volume, 0).expect("readable"), 3);
    engine.medium.let_go();
    engine.turns();
    assert!(flushes.iter().all(|flush| matches!(*flush.borrow(), Some(Ok(())))));
    assert!(writes.iter().all(|(_, write)| matches!(*write.borrow(), Some(Ok(())))));
    engine.flush(volume).expect("flushed");
    assert!(log.published().is_empty());
    let engine = engine.lose_power();
    for (block, _) in &writes {
        assert_eq!(engine.read(volume, *block).expect("readable"), 2);
    }
}

/// **M10.** Many volumes have a window of free blocks that they hardly use. When space is short these are taken back.
#[test]
pub fn windows_of_idle_volumes_are_taken_back_when_space_is_short() {
    let room = |idle: u64| {
        let engine = Engine::on(pool_of(16 * MIB));
        let big = engine.create(1, 64 * MIB);
        for number in 0..idle {
            let volume = engine.create(100 + u128::from(number), MIB);
            engine.write(volume, 0, 1).expect("written");
        }
        engine.fill(big, 2)
    };
    let (alone, beside) = (room(0), room(60));
    // A block, a leaf, a record and its mirror, and a little for the table; a window has 16 blocks at least.
    assert!(beside + 60 * 6 >= alone, "{beside} blocks beside idle windows, {alone} without");
}

/// **M14.** A write of data fails. That is an error of this write, its blocks are free again, and nothing is poisoned.
#[test]
pub fn failed_write_of_data_costs_nothing_and_poisons_nothing() {
    let room = |failures: u64| {
        let engine = Engine::on(new_pool());
        let volume = engine.create(1, 64 * MIB);
        engine.write(volume, 0, 1).expect("written");
        let snapshot = engine.snapshot(volume, 2);
        for round in 0..failures {
            for block in [0, 1000 + round] {
                let number = engine.medium.calls(Call::Write);
                engine.medium.fail(Fault { call: Call::Write, number, errno: libc::EIO, in_part: true });
                let failed = engine.write(volume, block, 2);
                assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
            }
        }
        assert_eq!(engine.pool.info().poisoned, None);
        assert_eq!((engine.read(volume, 0).expect("readable"), engine.read(volume, 1000).expect("readable")), (1, 0));
        engine.write(volume, 0, 3).expect("written");
        assert_eq!(engine.read(snapshot, 0).expect("readable"), 1);
        let blocks = engine.fill(volume, 4);
        engine.assert_clean();
        blocks
    };
    assert_eq!(room(50), room(0), "blocks of failed writes are lost");
}

/// **M16.** The blocks of a group's own layout count 1 for ever: no filling, emptying and opening makes them free.
#[test]
pub fn layout_of_a_group_is_never_handed_out() {
    let mut engine = Engine::on(new_pool());
    let volume = engine.create(1, 64 * MIB);
    let layout = engine.pool.info().layout_bytes;
    for _ in 0..3 {
        let into_layout = Rc::new(Cell::new(0));
        let count = Rc::clone(&into_layout);
        engine.medium.hold(move |call, range| {
            // A page stands alone or beside others of its slot; a run of 16 blocks is data.
            let is_data = call == Call::Write && range.end - range.start == 16 * 4096;
            count.set(count.get() + u64::from(is_data && range.start >= JOURNAL && range.start < layout));
            false
        });
        let mut at = 0;
        while is_done(engine.write_bytes(volume, at, &[1; 16 * 4096])) {
            at += 16 * 4096;
        }
        assert_eq!(into_layout.get(), 0);
        engine.assert_clean();
        engine.discard(volume, 0, 4096).expect("discarded");
        engine.settle();
        engine.checkpoint().expect("checkpoint");
        engine = engine.lose_power();
        engine.assert_clean();
    }
}

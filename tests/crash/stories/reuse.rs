//! When a freed block may be used again, and who may touch a block at a time (O3, O7, O8).

use crate::action::Call;
use crate::engine::{Engine, MIB, at_once, at_once_in_blocks, new_pool};
use crate::log::Log;

/// A pool so full that whatever comes free is used at once, with a volume of `blocks` blocks of its own in it.
pub fn full_pool(blocks: u64) -> (Engine, plywood::units::VolumeId, plywood::units::VolumeId) {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let (volume, other) = (engine.create(1, 8 * MIB), engine.create(2, 64 * MIB));
    for block in 0..blocks {
        engine.write(volume, block, 1).expect("written");
    }
    engine.fill(other, 8);
    engine.flush(volume).expect("flushed");
    engine.checkpoint().expect("checkpoint");
    (engine, volume, other)
}

/// **O3.** A discard frees a block and is not recorded; its block has another owner, whose data lands. Power cut: the old
/// mapping stands.
#[test]
pub fn block_freed_by_a_record_is_not_reused_before_that_is_durable() {
    let (engine, volume, other) = full_pool(40);
    engine.medium.hold(|call, _| call == Call::Flush);
    engine.discard(volume, 0, 40).expect("discarded");
    let writes: Vec<_> = (0..20).map(|block| engine.begin_write(other, 10_000 + block, 9)).collect();
    engine.turns();
    assert!(writes.iter().all(|write| write.borrow().is_none()), "a block was reused before its free was recorded");
    let left = engine.medium.power_cut_keeping(|_| true);
    drop(engine);
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    for block in 0..40 {
        let found = engine.read(volume, block).expect("readable");
        assert!(found <= 1, "block {block} holds {found}, which another volume wrote");
    }
    engine.assert_clean();
}

/// **O3, C8.** A deleted volume is eaten; what it held is not used again before a checkpoint that knows how far. Death in
/// between: the successor eats the same leaves again, and must find them.
#[test]
pub fn what_a_carcass_gives_back_waits_for_a_checkpoint() {
    let log = Log::new(1);
    let (engine, volume, other) = {
        let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
        let (volume, other) = (engine.create(1, 8 * MIB), engine.create(2, 64 * MIB));
        for block in 0..300 {
            engine.write(volume, block, 1).expect("written");
        }
        engine.fill(other, 8);
        engine.flush(other).expect("flushed");
        engine.checkpoint().expect("checkpoint");
        (engine, volume, other)
    };
    // No checkpoint ends.
    engine.medium.hold(|call, range| call == Call::WriteDurable && range.start < 512 * 4096);
    engine.delete(volume).expect("deleted");
    for _ in 0..20 {
        engine.tick();
    }
    let _writes: Vec<_> = (0..200).map(|block| engine.begin_write(other, 10_000 + block, 9)).collect();
    for _ in 0..20 {
        engine.tick();
    }
    let left = engine.medium.power_cut_keeping(|_| true);
    let log = log.copy();
    drop(engine);
    let engine = Engine::open(at_once(left), log).expect("open");
    engine.settle();
    engine.assert_clean();
    assert_eq!(engine.read(other, 0).expect("readable"), 8);
}

/// **O7, C5a.** A read is on its way to a block that is discarded, recorded, and given to another volume: it brings the
/// old content, not the other's.
#[test]
pub fn read_in_flight_over_a_free_does_not_see_the_next_owner() {
    let (engine, volume, other) = full_pool(40);
    engine.medium.hold(|call, _| call == Call::Read);
    let (memory, read) = engine.begin_read(volume, 7);
    engine.medium.hold(|_, _| false);
    assert!(read.borrow().is_none() && engine.medium.waiting() == 1);
    engine.discard(volume, 0, 40).expect("discarded");
    engine.commit();
    let writes: Vec<_> = (0..40).map(|block| engine.begin_write(other, 10_000 + block, 9)).collect();
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*read.borrow(), Some(Ok(()))));
    assert_eq!(memory.to_vec()[0], 1, "the read brought what another volume wrote");
    engine.tick();
    assert!(writes.iter().any(|write| matches!(*write.borrow(), Some(Ok(())))), "nothing was reused");
}

/// **O7, C5b.** The same with a write in place that is in flight over a deletion: it must not land on the next owner's
/// data. (A discard waits for it: O8. A snapshot's rollback does not.)
#[test]
pub fn write_in_flight_over_a_redirect_does_not_land_on_the_next_owner() {
    let (engine, volume, other) = full_pool(40);
    let handle = engine.handle(volume);
    engine.medium.hold(|call, range| call == Call::Write && range.end - range.start == 512);
    let memory = plywood::io::IoMemory::from_bytes(&[5; 512]);
    let slow = engine.begin(async move { handle.write(7 * 4096, &memory, false).await.map(drop) });
    assert!(slow.borrow().is_none() && engine.medium.waiting() == 1);
    let handle = engine.handle(volume);
    let discarded = engine.begin(async move { handle.discard(0, 40 * 4096).await.map(drop) });
    engine.commit();
    for block in 0..40 {
        drop(engine.begin_write(other, 10_000 + block, 9));
    }
    assert!(discarded.borrow().is_none(), "the discard did not wait for the write");
    engine.medium.let_go();
    for _ in 0..4 {
        engine.tick();
    }
    assert!(matches!(*slow.borrow(), Some(Ok(()))) && matches!(*discarded.borrow(), Some(Ok(()))));
    for block in 0..40 {
        let found = engine.read(other, 10_000 + block).expect("whole");
        assert!(found == 9 || found == 0, "block {block} of the other holds {found}");
    }
    engine.assert_clean();
}

/// **O7, C5c.** A block under punch is nobody's: it is not handed out before the punch has ended.
#[test]
pub fn block_under_punch_is_not_handed_out() {
    let (engine, volume, other) = full_pool(200);
    engine.discard(volume, 0, 200).expect("discarded");
    engine.commit();
    engine.medium.hold(|call, _| call == Call::Punch);
    engine.tick();
    assert!(engine.medium.waiting() > 0, "nothing is punched");
    // A change of bytes under punch is what the medium refuses.
    let writes: Vec<_> = (0..200).map(|block| engine.begin_write(other, 10_000 + block, 9)).collect();
    engine.medium.let_go();
    for _ in 0..4 {
        engine.tick();
    }
    let done = (0u64..).zip(&writes).filter(|(_, write)| matches!(*write.borrow(), Some(Ok(()))));
    let done: Vec<u64> = done.map(|(block, _)| block).collect();
    assert!(done.len() > 100, "{} writes found room", done.len());
    for block in done {
        assert_eq!(engine.read(other, 10_000 + block).expect("readable"), 9);
    }
}

/// **O8, C9.** Sectors of one block are written at the same time, each by copying the rest of it: none of them is lost.
/// The block is shared, or not there yet, or the volume's own on a host that writes whole blocks only.
#[test]
pub fn two_writes_into_one_block_both_stay() {
    for (before, is_shared, alignment) in [(1, true, 512), (0, false, 512), (0, false, 4096), (1, false, 4096)] {
        let medium = if alignment == 512 { at_once(new_pool()) } else { at_once_in_blocks(new_pool()) };
        let engine = Engine::open(medium, Log::new(1)).expect("open");
        let volume = engine.create(1, MIB);
        if before > 0 {
            engine.write(volume, 0, before).expect("written");
        }
        if is_shared {
            engine.snapshot(volume, 2);
        }
        engine.medium.hold(|call, _| call == Call::Read || call == Call::Write);
        let begin = |sector: u64, byte: u8| {
            let handle = engine.handle(volume);
            let memory = plywood::io::IoMemory::from_bytes(&[byte; 512]);
            engine.begin(async move { handle.write(sector * 512, &memory, false).await.map(drop) })
        };
        let writes = [begin(0, 2), begin(1, 3), begin(5, 4)];
        engine.medium.let_go();
        engine.turns();
        assert!(writes.iter().all(|write| matches!(*write.borrow(), Some(Ok(())))));
        let sectors: Vec<u8> = engine.read_block(volume, 0).chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(sectors, [2, 3, before, before, before, 4, before, before], "shared {is_shared}, {alignment}");
    }
}

/// **O8, C9.** A sector is written by copying the rest of its block, while the block is discarded, or written whole: what
/// came later is not undone by what was copied before.
#[test]
pub fn discard_or_whole_write_beside_a_copied_sector_stays() {
    for is_discard in [true, false] {
        let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
        let volume = engine.create(1, MIB);
        engine.write(volume, 0, 1).expect("written");
        engine.snapshot(volume, 2);
        engine.medium.hold(|call, _| call == Call::Read || call == Call::Write);
        let handle = engine.handle(volume);
        let memory = plywood::io::IoMemory::from_bytes(&[2; 512]);
        let sector = engine.begin(async move { handle.write(0, &memory, false).await.map(drop) });
        let later = if is_discard {
            let handle = engine.handle(volume);
            engine.begin(async move { handle.discard(0, 4096).await.map(drop) })
        } else {
            engine.begin_write(volume, 0, 3)
        };
        engine.medium.let_go();
        engine.turns();
        assert!(matches!(*sector.borrow(), Some(Ok(()))) && matches!(*later.borrow(), Some(Ok(()))));
        assert_eq!(engine.read(volume, 0).expect("whole"), if is_discard { 0 } else { 3 });
        engine.assert_clean();
    }
}

/// **O8, N17.** A write is done and its reply not yet handed over. A later write of the same block may not be answered
/// before it: when the engine dies, the first is sent again.
#[test]
pub fn request_sent_again_never_lands_on_a_later_one() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let volume = engine.create(1, MIB);
    let handle = engine.handle(volume);
    let first = plywood::io::IoMemory::from_bytes(&[1; 4096]);
    let held = engine.finish(async move { handle.write(0, &first, false).await }).expect("written");
    // The reply to the first waits; a read may see it already.
    assert_eq!(engine.read(volume, 0).expect("readable"), 1);
    let second = engine.begin_write(volume, 0, 2);
    let answered = second.borrow().is_some();
    let left = engine.medium.process_death(&mut fastrand::Rng::with_seed(1));
    drop((held, second));
    drop(engine);
    let engine = Engine::open(at_once(left), log).expect("open");
    // The front sends what it has no answer for.
    engine.write(volume, 0, 1).expect("written again");
    if answered {
        assert_eq!(engine.read(volume, 0).expect("readable"), 2, "a write that was answered is gone");
    }
    assert!(!answered);
}

/// Found by random worlds. Two writes and a checkpoint waited for the same page of counts. What was read of it was of
/// before the checkpoint, so one of them read it again, and the others, woken, went on waiting for the first reading, which
/// had ended: for ever, and with the checkpoint the whole pool.
#[test]
pub fn who_waits_for_a_page_is_not_left_behind_when_it_is_read_again() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let (volume, other) = (engine.create(1, 8 * MIB), engine.create(2, MIB));
    engine.write(volume, 0, 1).expect("written");
    engine.write(volume, 300, 1).expect("written");
    engine.snapshot(volume, 3);
    engine.checkpoint().expect("checkpoint");
    engine.pool.drop_caches();
    engine.read(volume, 0).expect("readable");
    engine.read(volume, 300).expect("readable");
    engine.write(other, 0, 1).expect("written");
    let group = 768 * 4096;
    let pages = group + 8 * 4096..group + 72 * 4096;
    engine.medium.hold(move |call, range| call == Call::Read && pages.contains(&range.start));
    let writes = [engine.begin_write(volume, 0, 2), engine.begin_write(volume, 300, 2)];
    assert_eq!(engine.medium.waiting(), 1, "the writes want no page");
    let pool = engine.pool.clone();
    let checkpointed = engine.begin(async move { pool.checkpoint().await });
    engine.medium.end_what_waits();
    engine.turns();
    assert_eq!(engine.medium.waiting(), 1, "the page is not read again");
    engine.medium.let_go();
    engine.tick();
    assert!(writes.iter().all(|write| matches!(*write.borrow(), Some(Ok(())))), "a write waits for ever");
    assert!(matches!(*checkpointed.borrow(), Some(Ok(()))), "the checkpoint waits for ever");
}

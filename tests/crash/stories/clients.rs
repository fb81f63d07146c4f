//! What clients see of it: atomicity, accounts, commands that are sent twice (H12, M2, M4, M17, M18).

use fastrand::Rng;
use plywood::error::Error;
use plywood::io::IoMemory;
use plywood::units::BLOCK_BYTES;

use crate::action::Call;
use crate::engine::{Engine, MIB, at_once, new_pool};
use crate::log::Log;

/// **H12.** Power is lost while three sectors are overwritten in place and two blocks are redirected. Of the first each
/// sector is old or new and no other byte has changed; of the others each is old, whole: no record maps the new ones yet.
#[test]
pub fn write_in_place_is_torn_inside_its_own_range_only() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    for block in 0..2 {
        engine.write(volume, block, 1).expect("written");
    }
    engine.snapshot(volume, 2);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    engine.medium.hold(|call, _| call == Call::Write);
    let handle = engine.handle(volume);
    let memory = IoMemory::from_bytes(&[2; 3 * 512]);
    let in_place = engine.begin(async move { handle.write(3 * 512, &memory, false).await.map(drop) });
    let redirected = [engine.begin_write(volume, 1, 2), engine.begin_write(volume, 2, 2)];
    assert!(in_place.borrow().is_none() && redirected.iter().all(|write| write.borrow().is_none()));
    let mut torn = 0;
    for seed in 0..100 {
        let left = engine.medium.power_cut(&mut Rng::with_seed(seed));
        let after = Engine::open(at_once(left), Log::new(2)).expect("open");
        let bytes = after.read_block(volume, 0);
        let sectors: Vec<u8> = bytes.chunks(512).map(|sector| sector[0]).collect();
        assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
        assert!(sectors[3..6].iter().all(|sector| [1, 2].contains(sector)), "{sectors:?}");
        assert!(sectors[..3].iter().chain(&sectors[6..]).all(|sector| *sector == 1), "{sectors:?}");
        torn += u32::from(sectors.contains(&2) && sectors[3..6].contains(&1));
        assert_eq!((after.read(volume, 1).expect("whole"), after.read(volume, 2).expect("whole")), (1, 0));
    }
    assert!(torn > 0, "no cut tore the write");
}

/// **M2.** A block is overwritten in place, which changes no mapping, and then a snapshot is taken. What that shows is durable
/// when it is acknowledged, though nobody has flushed.
#[test]
pub fn snapshot_makes_writes_in_place_durable() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    engine.write(volume, 0, 2).expect("written in place");
    let snapshot = engine.snapshot(volume, 2);
    let engine = engine.lose_power();
    assert_eq!(engine.read(snapshot, 0).expect("readable"), 2, "an acknowledged snapshot has changed");
    assert_eq!(engine.read(volume, 0).expect("readable"), 2);
}

/// **M4.** Own bytes are about what was born in a volume: they stay as they are when others are deleted, so a quota does not
/// fill up by what somebody else does.
#[test]
pub fn own_bytes_do_not_change_when_others_are_deleted() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, 8 * MIB);
    for block in 0..20 {
        engine.write(volume, block, 1).expect("written");
    }
    let snapshot = engine.snapshot(volume, 2);
    let clone = engine.clone_of(snapshot, 3);
    let sibling = engine.clone_of(snapshot, 4);
    for block in 15..25 {
        engine.write(clone, block, 2).expect("written");
    }
    let own = |engine: &Engine| [volume, clone].map(|id| engine.info(id).own_bytes / BLOCK_BYTES);
    assert_eq!(own(&engine), [20, 10]);
    engine.delete(sibling).expect("deleted");
    engine.settle();
    assert_eq!(own(&engine), [20, 10]);
    engine.delete(snapshot).expect("deleted");
    engine.settle();
    assert_eq!(own(&engine), [20, 10]);
    let engine = engine.lose_power();
    engine.delete(volume).expect("deleted");
    engine.settle();
    // All of it is the clone's alone now, and still it owns what was born in it.
    assert_eq!(engine.info(clone).own_bytes, 10 * BLOCK_BYTES);
    assert_eq!(engine.info(clone).mapped_bytes, 25 * BLOCK_BYTES);
    engine.assert_clean();
}

/// **M17.** A hundred volumes are flushed and let go of, as when a hundred devices are detached: commits, and no checkpoint.
#[test]
pub fn letting_go_of_a_hundred_volumes_takes_no_checkpoint() {
    let engine = Engine::on(new_pool());
    let volumes: Vec<_> = (0..100).map(|number| engine.create(100 + number, MIB)).collect();
    for volume in &volumes {
        engine.write(*volume, 0, 1).expect("written");
    }
    let before = engine.pool.counters();
    for volume in &volumes {
        engine.flush(*volume).expect("flushed");
    }
    let after = engine.pool.counters();
    assert_eq!(after.checkpoints, before.checkpoints);
    // What one commit has made durable the next ones find done.
    assert_eq!(after.batches - before.batches, 1);
    let engine = engine.lose_power();
    assert!(volumes.iter().all(|volume| engine.read(*volume, 0).expect("readable") == 1));
}

/// **M18.** The engine dies before its answers are read, and every command is sent again. Each says what the first time
/// would have said, and happens once.
#[test]
pub fn command_repeated_after_a_death_happens_once() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    let snapshot = engine.snapshot(volume, 2);
    let clone = engine.clone_of(snapshot, 3);
    let doomed = engine.create(4, MIB);
    engine.delete(doomed).expect("deleted");
    engine.resize(volume, 2 * MIB).expect("grown");
    engine.discard(clone, 0, 1).expect("discarded");
    let clock = engine.pool.info().clock;
    let left = engine.medium.process_death(&mut Rng::with_seed(1));
    drop(engine);
    let engine = Engine::open(at_once(left), log).expect("open");
    assert_eq!(
        (engine.create(1, MIB), engine.snapshot(volume, 2), engine.clone_of(snapshot, 3)),
        (volume, snapshot, clone)
    );
    assert!(matches!(engine.delete(doomed), Err(Error::NotFound(_))));
    engine.resize(volume, 2 * MIB).expect("grown");
    engine.discard(clone, 0, 1).expect("discarded");
    assert_eq!((engine.pool.volumes().len(), engine.pool.info().clock), (3, clock), "something happened twice");
    assert_eq!(engine.info(volume).size_bytes, 2 * MIB);
    engine.settle();
    engine.assert_clean();
}

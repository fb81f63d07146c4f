//! Trees while they change: what sharing costs, what a checkpoint writes beside changes, sizes and heights (C5d, H1, H2, H7,
//! H8, M8, M9, M13).

use std::collections::BTreeMap;

use plywood::units::{BLOCK_BYTES, VolumeId};

use super::order::{JOURNAL, is_superblock};
use crate::action::Call;
use crate::engine::{Engine, MIB, at_once, new_pool, pool_of};
use crate::log::Log;

/// **O7, C5d.** Metadata is on its way from the medium when what it stands on is given up, checkpointed, and wanted by
/// others. What comes is still what was asked for: no damage is reported where there is none. (A node cannot be given up
/// while it is being read: who gives it up has read it, and waits for the same read.)
#[test]
pub fn metadata_read_in_flight_over_a_free_is_not_taken_for_damage() {
    let engine = Engine::on(new_pool());
    let (volume, other) = (engine.create(1, MIB), engine.create(2, 64 * MIB));
    let pool = engine.pool.clone();
    let changes = BTreeMap::from([("key".to_owned(), Some(vec![1; 20_000]))]);
    engine.finish(async move { pool.set_attributes(volume, changes).await }).expect("set");
    // There is no room but where something comes free, and that is in single blocks.
    engine.fill(other, 8);
    engine.checkpoint().expect("checkpoint");
    let pool = engine.pool.clone();
    engine.medium.hold(|call, range| call == Call::Read && range.end - range.start == BLOCK_BYTES);
    let read = engine.begin(async move { pool.attributes(volume).await });
    assert!(read.borrow().is_none() && engine.medium.waiting() == 1);
    engine.medium.hold(|_, _| false);
    engine.delete(volume).expect("deleted");
    for block in (0..100).step_by(2) {
        engine.discard(other, block, 1).expect("discarded");
    }
    engine.checkpoint().expect("checkpoint");
    let writes: Vec<_> = (0..50).map(|block| engine.begin_write(other, 10_000 + block, 9)).collect();
    engine.medium.let_go();
    engine.tick();
    let read = read.take().expect("it has ended").expect("no damage");
    assert_eq!(read["key"], vec![1; 20_000]);
    assert!(writes.iter().all(|write| matches!(*write.borrow(), Some(Ok(())))));
}

/// **H1.** A leaf is copied whose blocks are counted in as many pages as it maps blocks: none of these is read to write.
#[test]
pub fn first_write_to_a_clone_reads_no_page_of_what_it_shares() {
    let engine = Engine::on(pool_of(3 * MIB + 128 * MIB));
    let (volume, ballast) = (engine.create(1, MIB), engine.create(2, 256 * MIB));
    for block in 0..24 {
        engine.write(volume, block, 1).expect("written");
        for part in 0..4 {
            engine.zero(ballast, (4 * block + part) * MIB, MIB).expect("there is room");
        }
        // Its window of neighbouring blocks is taken back.
        engine.checkpoint().expect("checkpoint");
    }
    let snapshot = engine.snapshot(volume, 3);
    let clone = engine.clone_of(snapshot, 4);
    engine.checkpoint().expect("checkpoint");
    engine.pool.drop_caches();
    let before = engine.pool.counters();
    engine.write(clone, 7, 2).expect("written");
    let after = engine.pool.counters();
    assert_eq!(after.nodes_shadowed - before.nodes_shadowed, 1);
    let pages = after.pages_read - before.pages_read;
    assert!(pages <= 1, "{pages} pages read: the node's own is enough");
    engine.checkpoint().expect("checkpoint");
    assert!(engine.pool.counters().pages_read - after.pages_read >= 20, "its blocks are not scattered");
    engine.assert_clean();
}

/// **H2.** Each write dirties a leaf of its own. What is dirty stays within a bound that follows from the cache, and so does
/// what a replay reads and dirties.
#[test]
pub fn dirty_nodes_have_a_bound_and_so_has_replay() {
    let engine = Engine::on(pool_of(64 * MIB));
    let volume = engine.create(1, 4096 * MIB);
    let mut most = 0;
    for leaf in 0..4000 {
        engine.write(volume, leaf * 256, 1).expect("written");
        most = most.max(engine.pool.info().dirty_nodes);
    }
    // A cache of 256 nodes: 320 of them, and what one plan adds.
    assert!((100..=340).contains(&most), "{most} nodes dirty");
    engine.flush(volume).expect("flushed");
    let engine = engine.lose_power();
    let read = engine.pool.counters().nodes_read;
    assert!(read <= 2 * 340, "replay read {read} nodes");
}

/// **H7.** A tebibyte is discarded, with everything cold: one record, a
/// carcass for each subtree of 64 GiB, and nothing is read but the path. A death
/// right after, and the rest is given back all the same.
#[test]
pub fn discard_of_a_tebibyte_is_one_record_and_reads_nothing() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(pool_of(32 * MIB)), log.clone()).expect("open");
    let volume = engine.create(1, 1 << 40);
    for leaf in 0..500 {
        engine.write(volume, leaf * 520_000, 1).expect("written");
    }
    engine.checkpoint().expect("checkpoint");
    engine.pool.drop_caches();
    let (lsn, before) = (engine.pool.info().last_lsn, engine.pool.counters());
    // No step of the worker that gives it back before the death.
    engine.medium.hold(|call, range| call == Call::WriteDurable && range.start >= JOURNAL);
    engine.discard(volume, 0, (1 << 40) / BLOCK_BYTES).expect("discarded");
    let (info, after) = (engine.pool.info(), engine.pool.counters());
    assert_eq!(info.last_lsn.0, lsn.0 + 1);
    assert!(after.nodes_read - before.nodes_read <= 4, "{} nodes read", after.nodes_read - before.nodes_read);
    assert_eq!(info.carcasses, 16);
    assert_eq!(engine.read(volume, 520_000).expect("readable"), 0);
    let left = engine.medium.process_death(&mut fastrand::Rng::with_seed(3));
    drop(engine);
    let engine = Engine::open(at_once(left), log).expect("open");
    engine.settle();
    assert_eq!(engine.info(volume).mapped_bytes, 0);
    engine.checkpoint().expect("checkpoint");
    engine.assert_clean();
}

/// **H8.** A checkpoint writes its nodes; one of them changes meanwhile, its sibling does not. The image is that of its
/// instant; afterwards the changed parent knows where the sibling stands and what its checksum is.
#[test]
pub fn node_changed_while_it_is_written_is_whole_in_both() {
    for is_flushed in [false, true] {
        let engine = Engine::on(new_pool());
        let volume = engine.create(1, 8 * MIB);
        for block in [0, 1, 300, 301] {
            engine.write(volume, block, 1).expect("written");
        }
        engine.flush(volume).expect("flushed");
        engine.medium.hold(|call, _| call == Call::Write);
        let checkpointed = engine.begin_checkpoint();
        assert!(checkpointed.borrow().is_none() && engine.medium.waiting() > 0);
        engine.medium.hold(|_, _| false);
        // Two new blocks: one leaf and the node above it change, in the middle of being written.
        engine.write(volume, 2, 2).expect("written");
        engine.write(volume, 3, 2).expect("written");
        engine.medium.let_go();
        engine.turns();
        assert!(matches!(*checkpointed.borrow(), Some(Ok(()))));
        engine.pool.drop_caches();
        let blocks =
            |engine: &Engine| [0, 1, 2, 3, 300, 301].map(|block| engine.read(volume, block).expect("no damage"));
        assert_eq!(blocks(&engine), [1, 1, 2, 2, 1, 1]);
        if is_flushed {
            engine.checkpoint().expect("checkpoint");
            engine.pool.drop_caches();
            assert_eq!(blocks(&engine), [1, 1, 2, 2, 1, 1]);
        }
        let engine = engine.lose_power();
        let new = if is_flushed { 2 } else { 0 };
        assert_eq!(blocks(&engine), [1, 1, new, new, 1, 1]);
        engine.assert_clean();
    }
}

/// **H8.** Data is in flight, and windows are set aside, at a checkpoint's instant. Its image knows of neither: when the
/// power goes, nothing of them is lost for ever.
#[test]
pub fn blocks_in_flight_and_windows_are_not_in_a_checkpoint() {
    let engine = Engine::on(new_pool());
    let (volume, other) = (engine.create(1, 8 * MIB), engine.create(2, 8 * MIB));
    engine.write(other, 0, 1).expect("written");
    engine.checkpoint().expect("checkpoint");
    let used = engine.pool.info().used_bytes;
    engine.medium.hold(|call, _| call == Call::Write);
    let writes: Vec<_> = (0..50).map(|block| engine.begin_write(volume, block, 2)).collect();
    engine.medium.hold(|_, _| false);
    engine.checkpoint().expect("a checkpoint waits for no write");
    assert!(writes.iter().all(|write| write.borrow().is_none()));
    let left = engine.medium.power_cut_keeping(|_| true);
    engine.medium.let_go();
    engine.turns();
    engine.checkpoint().expect("checkpoint");
    let grown = engine.pool.info().used_bytes - used;
    drop(writes);
    let after = engine.lose_power();
    assert_eq!(after.read(volume, 49).expect("readable"), 2, "what landed after the instant is not lost either");
    after.assert_clean();
    drop(after);
    let engine = Engine::open(at_once(left), Log::new(9)).expect("open");
    engine.checkpoint().expect("checkpoint");
    engine.assert_clean();
    let kept = engine.pool.info().used_bytes.abs_diff(used);
    assert!(kept <= 4 * BLOCK_BYTES && grown >= 50 * BLOCK_BYTES, "{kept} bytes are lost, {grown} were written");
}

/// **M8.** A volume is shrunk and grown again; power is lost, or the engine dies, before what was cut off is given back. What
/// it lost it does not show again, and own bytes are exact.
#[test]
pub fn shrunk_and_grown_volume_shows_nothing_after_a_crash() {
    for is_death in [false, true] {
        let log = Log::new(1);
        let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
        let volume = engine.create(1, 8 * MIB);
        for block in 0..600 {
            engine.write(volume, block, 1).expect("written");
        }
        engine.checkpoint().expect("checkpoint");
        engine.resize(volume, 100 * BLOCK_BYTES).expect("shrunk");
        engine.resize(volume, 300 * MIB).expect("grown");
        engine.write(volume, 70_000, 2).expect("written");
        let engine = if is_death {
            let left = engine.medium.process_death(&mut fastrand::Rng::with_seed(5));
            drop(engine);
            Engine::open(at_once(left), log).expect("open")
        } else {
            engine.flush(volume).expect("flushed");
            engine.lose_power()
        };
        for block in 0..700 {
            assert_eq!(engine.read(volume, block).expect("readable"), u8::from(block < 100), "block {block}");
        }
        assert_eq!(engine.read(volume, 70_000).expect("readable"), 2);
        engine.settle();
        assert_eq!(engine.info(volume).own_bytes, 101 * BLOCK_BYTES);
        engine.assert_clean();
    }
}

/// **M8.** The height belongs to the tree and not to the size: a difference, and a rollback, between trees of two heights.
#[test]
pub fn trees_of_two_heights_are_compared_and_rolled_back() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 1, 1).expect("written");
    let low = engine.snapshot(volume, 2);
    engine.resize(volume, 600 * MIB).expect("grown");
    engine.write(volume, 2, 2).expect("written");
    engine.write(volume, 140_000, 3).expect("written");
    let high = engine.snapshot(volume, 3);
    let engine = engine.lose_power();
    let changed = |from: VolumeId, to: VolumeId| {
        let pool = engine.pool.clone();
        let ranges = engine.finish(async move { pool.changed_ranges(from, to).await }).expect("a difference");
        let within = |at: u64| {
            let mut found = ranges.iter().filter(|range| {
                (range.offset_bytes..range.offset_bytes + range.length_bytes).contains(&(at * BLOCK_BYTES))
            });
            found.next().is_some()
        };
        [1, 2, 3, 139_999, 140_000].map(within)
    };
    assert_eq!(changed(low, high), [false, true, false, false, true]);
    engine.roll_back(volume, low).expect("rolled back");
    let engine = engine.lose_power();
    assert_eq!(engine.info(volume).size_bytes, MIB);
    assert_eq!((engine.read(volume, 1).expect("readable"), engine.read(volume, 2).expect("readable")), (1, 0));
    engine.resize(volume, 600 * MIB).expect("grown");
    assert_eq!(engine.read(volume, 140_000).expect("readable"), 0);
    engine.roll_back(volume, high).expect("rolled back");
    assert_eq!(engine.read(volume, 140_000).expect("readable"), 3);
    engine.settle();
    engine.assert_clean();
}

/// **M9.** Nodes take blocks next to each other and not those between data: a checkpoint writes many with one call, and
/// random writes of data leave no holes of one block behind.
#[test]
pub fn checkpoint_writes_its_nodes_in_long_runs() {
    let engine = Engine::on(pool_of(64 * MIB));
    let volume = engine.create(1, 1024 * MIB);
    // Not so many that a checkpoint comes by itself.
    for leaf in 0..150 {
        engine.write(volume, leaf * 37 % 150 * 256, 1).expect("written");
    }
    let (calls, nodes) = (engine.medium.calls(Call::Write), engine.pool.counters().nodes_written);
    engine.checkpoint().expect("checkpoint");
    let (calls, nodes) = (engine.medium.calls(Call::Write) - calls, engine.pool.counters().nodes_written - nodes);
    assert!(nodes >= 150 && calls * 8 <= nodes, "{nodes} nodes in {calls} calls");
}

/// **M13.** A plan needs more nodes than the cache may keep beside what is dirty or being written. It is made again from the
/// root whenever one was missing, and none drops what another has just read: all come to an end.
#[test]
pub fn plans_end_in_a_cache_full_of_what_cannot_be_dropped() {
    // 64 nodes: that is the least.
    let engine = Engine::open_with(at_once(pool_of(64 * MIB)), Log::new(1), 1 << 14).expect("open");
    let (volume, busy) = (engine.create(1, 64 * MIB), engine.create(2, 4096 * MIB));
    let blocks = 7 * 256;
    engine.write_bytes(volume, 100 * BLOCK_BYTES, &vec![1; (blocks * BLOCK_BYTES) as usize]).expect("written");
    engine.snapshot(volume, 3);
    engine.checkpoint().expect("checkpoint");
    engine.pool.drop_caches();
    engine.medium.hold(|call, range| call == Call::WriteDurable && is_superblock(range));
    let dirty: Vec<_> = (0..100).map(|leaf| engine.begin_write(busy, leaf * 256, 2)).collect();
    assert!(dirty.iter().any(|write| write.borrow().is_none()), "there was room for all");
    let read = |byte: u8| {
        let handle = engine.pool.open_volume(volume, true).expect("open");
        let memory = plywood::io::IoMemory::zeroed((blocks * BLOCK_BYTES) as usize);
        let into = memory.clone();
        let outcome = engine.begin(async move { handle.read(100 * BLOCK_BYTES, &into).await });
        assert!(matches!(*outcome.borrow(), Some(Ok(()))), "a read of eight leaves never ends");
        assert!(memory.to_vec().iter().all(|found| *found == byte));
    };
    read(1);
    engine.medium.let_go();
    engine.tick();
    assert!(dirty.iter().all(|write| matches!(*write.borrow(), Some(Ok(())))), "a write never ends");
    // All of it is shared: as many nodes are copied as are read.
    engine.write_bytes(volume, 100 * BLOCK_BYTES, &vec![3; (blocks * BLOCK_BYTES) as usize]).expect("written");
    engine.pool.drop_caches();
    read(3);
    engine.assert_clean();
}

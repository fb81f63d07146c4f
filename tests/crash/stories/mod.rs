//! Rules as stories: what random worlds do not reach, or would not say by name.

mod clients;
mod order;
mod replay;
mod reuse;
mod sealed;
mod sharing;
mod space;
mod trees;

#[cfg(feature = "canary")]
pub use order::{
    batch_that_was_only_written_is_not_answered, death_between_the_two_copies_of_a_superblock_leaves_the_former_whole,
    death_loses_nothing_that_was_answered, flush_during_a_commit_waits_for_the_batch,
    leftovers_of_an_aborted_checkpoint_are_never_adopted, redirected_block_is_mapped_when_its_data_has_landed,
    write_that_lands_during_a_flush_is_not_in_its_batch,
};
#[cfg(feature = "canary")]
pub use replay::replay_puts_no_node_on_what_a_later_record_maps;
#[cfg(feature = "canary")]
pub use reuse::{
    block_freed_by_a_record_is_not_reused_before_that_is_durable, block_under_punch_is_not_handed_out,
    read_in_flight_over_a_free_does_not_see_the_next_owner, request_sent_again_never_lands_on_a_later_one,
    two_writes_into_one_block_both_stay, what_a_carcass_gives_back_waits_for_a_checkpoint,
};
#[cfg(feature = "canary")]
pub use sealed::{
    checksum_goes_with_the_content_it_was_taken_of, sealing_on_a_full_host_fails_and_no_checkpoint_does,
    snapshot_is_called_sealed_after_its_checksums_are_durable,
};
#[cfg(feature = "canary")]
pub use sharing::{
    block_that_became_exclusive_is_not_overwritten_in_place, snapshot_waits_for_writes_in_place_from_before_its_tick,
    youngest_blocks_of_a_snapshot_are_not_overwritten,
};

use async_executor::LocalExecutor;
use fastrand::Rng;
use plywood::engine::{OpenOptions, PendingLog, Pool};
use plywood::error::Error;
use plywood::format::{self, ChosenSuperblock, EntryKind, Node, Place, SUPERBLOCK_COPIES, Superblock, VolumeRecord};
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, PoolBlock, VirtualBlock, VolumeId};

use crate::action::{Call, Fault};
use crate::engine::{Engine, MIB, at_once, new_pool, stopping};
use crate::image::Image;
use crate::log::Log;
use crate::medium::{Left, Medium};
use crate::verify::run;

fn fail_next_flush(engine: &Engine) {
    let number = engine.medium.calls(Call::Flush);
    engine.medium.fail(Fault { call: Call::Flush, number, errno: libc::EIO, in_part: false });
}

/// **A5, poisoning.** A flush fails, and what it was to make durable is lost though later flushes work. Whoever asks again
/// must not be told that all is well, and no successor may go on from the memory of this one.
#[test]
pub fn failed_flush_is_never_taken_for_one_that_worked() {
    let log = Log::new(1);
    let engine = Engine::open(at_once(new_pool()), log.copy()).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    engine.write(volume, 0, 2).expect("written");
    fail_next_flush(&engine);
    let first = engine.flush(volume);
    let second = engine.flush(volume);
    // The host has forgotten what it lost: the second flush of the medium itself works.
    let left = engine.medium.power_cut_keeping(|_| false);
    let reopened = Engine::open(at_once(left), Log::new(2)).expect("open after the loss of power");
    if first.is_ok() || second.is_ok() {
        let found = reopened.read(volume, 0).expect("readable");
        assert_eq!(found, 2, "a FLUSH was acknowledged, and what it covered is gone");
    }
    assert!(matches!(first, Err(Error::Poisoned(_))), "{first:?}");
    assert!(matches!(second, Err(Error::Poisoned(_))), "{second:?}");
}

/// **A5, overlapping.** The flush of a checkpoint fails while that of a FLUSH is under way, and takes with it what both were
/// to make durable. The FLUSH's own then works, having nothing left to do, and says so before the other says anything.
#[test]
pub fn flush_beside_one_that_fails_is_not_believed() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    engine.write(volume, 0, 2).expect("written in place");
    engine.medium.hold(|call, _| call == Call::Flush);
    let flushed = engine.begin_flush(volume);
    assert!(flushed.borrow().is_none(), "its flush is under way");
    fail_next_flush(&engine);
    let checkpointed = engine.begin_checkpoint();
    assert!(engine.medium.waiting() == 2, "the checkpoint flushes, too");
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*checkpointed.borrow(), Some(Err(Error::Poisoned(_)))));
    assert!(matches!(*flushed.borrow(), Some(Err(Error::Poisoned(_)))), "a FLUSH is answered, and its data is lost");
}

/// The same with the batch of a FLUSH on its way.
#[test]
fn batch_beside_a_flush_that_fails_is_not_believed() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.medium.hold(|call, _| call == Call::WriteDurable);
    let flushed = engine.begin_flush(volume);
    assert!(engine.medium.waiting() == 1, "its batch is on its way");
    engine.medium.hold(|call, _| call == Call::Flush);
    fail_next_flush(&engine);
    let _checkpointed = engine.begin_checkpoint();
    assert!(engine.medium.waiting() == 2, "the checkpoint flushes");
    engine.medium.let_go();
    engine.turns();
    assert!(
        matches!(*flushed.borrow(), Some(Err(Error::Poisoned(_)))),
        "a FLUSH is answered, and its batch may be lost"
    );
}

/// The same the other way round: what a checkpoint has written is lost by the failed flush of a commit, and the
/// checkpoint's own works. Its superblock would lead to nodes that are not there.
#[test]
pub fn checkpoint_beside_a_flush_that_fails_writes_no_superblock() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.flush(volume).expect("flushed");
    engine.medium.hold(|call, _| call == Call::Flush);
    let checkpointed = engine.begin_checkpoint();
    assert!(checkpointed.borrow().is_none(), "its flush is under way");
    fail_next_flush(&engine);
    let flushed = engine.begin_flush(volume);
    assert!(engine.medium.waiting() == 2, "the commit flushes, too");
    engine.medium.let_go();
    engine.turns();
    assert!(matches!(*flushed.borrow(), Some(Err(Error::Poisoned(_)))));
    assert!(matches!(*checkpointed.borrow(), Some(Err(Error::Poisoned(_)))), "a superblock over nodes that are lost");
    let engine = engine.lose_power();
    assert_eq!(engine.read(volume, 0).expect("readable"), 1);
    engine.assert_clean();
}

/// **O10, sessions.** The memory that one front holds says nothing about what another engine has made of the pool since.
#[test]
pub fn memory_of_another_session_is_refused() {
    let old = Log::new(1);
    let left = new_pool();
    let engine = Engine::open(at_once(left), old.clone()).expect("open");
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    assert!(!old.published().is_empty());
    let left = engine.medium.power_cut_keeping(|_| true);
    drop(engine);
    // Somebody else opens the pool, without that memory, and goes on.
    let other = Engine::open(at_once(left), Log::new(2)).expect("open");
    other.write(volume, 0, 9).expect("written");
    other.flush(volume).expect("flushed");
    let left = other.medium.power_cut_keeping(|_| true);
    drop(other);
    let refused = Engine::open(at_once(left.clone()), old.copy()).err();
    assert!(matches!(refused, Some(Error::Incompatible(_))), "{refused:?}");
    let engine = Engine::open(at_once(left), Log::new(2)).expect("open");
    assert_eq!(engine.read(volume, 0).expect("readable"), 9);
}

/// An engine that has written a superblock which is not durable yet: by it the blocks of the first volume are free, by the
/// one before they hold ones.
fn with_superblock_in_a_cache(log: &Log) -> (Engine, VolumeId, VolumeId) {
    let engine = Engine::open(at_once(new_pool()), log.clone()).expect("open");
    let (first, second) = (engine.create(1, MIB), engine.create(2, 64 * MIB));
    for block in 0..256 {
        engine.write(first, block, 1).expect("written");
    }
    engine.checkpoint().expect("checkpoint");
    let handle = engine.pool.open_volume(first, false).expect("open");
    engine.finish(async move { handle.discard(0, MIB).await.map(drop) }).expect("discard");
    engine.medium.withhold_superblocks();
    engine.checkpoint().expect("checkpoint");
    (engine, first, second)
}

/// What a power cut leaves when of all that is in the cache only superblocks are lost.
fn lost_superblocks(medium: &Medium) -> Left {
    medium.power_cut_keeping(|range| !SUPERBLOCK_COPIES.iter().flatten().any(|copy| copy.offset_bytes() == range.start))
}

/// **O9, C7.** An engine dies while its superblock is being written; the next one finds it, though only in the medium's
/// cache. Acting on it before it is durable lets a power cut bring the former one back, whose blocks are used by then.
#[test]
pub fn superblock_found_after_a_death_is_durable_before_its_free_blocks_are_used() {
    let mut random = Rng::with_seed(3);
    let log = Log::new(1);
    let (engine, first, second) = with_superblock_in_a_cache(&log);
    let left = engine.medium.process_death(&mut random);
    drop(engine);
    let successor = Engine::open(at_once(left), log).expect("open");
    for count in 1.. {
        // Every free block is used, and the power may go at any time.
        if successor.write(second, random.u64(..16_000), 2).is_err() {
            assert!(count > 200);
            break;
        }
        if count % 16 != 0 {
            continue;
        }
        let last = Engine::open(at_once(lost_superblocks(&successor.medium)), Log::new(3));
        let last = last.expect("open after the loss of power");
        for block in 0..256 {
            let found = last.read(first, block).expect("readable");
            assert!(found <= 1, "block {block} of one volume shows {found}, which was written to another");
        }
    }
}

/// **O9, C7.** The same, and the power goes while the next engine opens: at each of its operations. Replay makes zeros of
/// blocks that are free by the superblock it found.
#[test]
pub fn superblock_found_after_a_death_is_durable_before_replay_writes() {
    let log = Log::new(1);
    let (engine, first, second) = with_superblock_in_a_cache(&log);
    // Something to be replayed, so that room is made for its nodes.
    engine.write(second, 5, 2).expect("written");
    let left = engine.medium.process_death(&mut Rng::with_seed(3));
    drop(engine);
    let mut former = None;
    cut_at_each_operation_of_opening(&left, &log, |stop_after, medium, is_open| {
        let last = Engine::open(at_once(lost_superblocks(medium)), Log::new(3)).expect("open after the loss of power");
        // By the former superblock the volume is as it was before the discard, by the later one it is empty.
        let generation = last.pool.info().generation;
        let expected = u8::from(generation == *former.get_or_insert(generation));
        for block in 0..256 {
            let found = last.read(first, block).expect("readable");
            assert_eq!(found, expected, "cut after {stop_after} operations: block {block} at {generation:?}");
        }
        assert!(!is_open || Some(generation) != former, "what was opened is durable");
    });
}

/// **C10a.** Power goes between the two copies of a superblock, and the one that is there cannot be read, this once. The
/// next engine goes on from the former superblock and dies as well, and the copy can be read again: it leads to what has
/// been used for something else by then.
#[test]
pub fn superblock_that_was_unreadable_once_does_not_come_back() {
    let engine = Engine::on(new_pool());
    let volume = engine.create(1, MIB);
    engine.write(volume, 0, 1).expect("written");
    engine.checkpoint().expect("checkpoint");
    engine.write(volume, 1, 2).expect("written");
    engine.flush(volume).expect("flushed");
    let seconds = SUPERBLOCK_COPIES.map(|[_, second]| second.offset_bytes());
    engine.medium.hold(move |call, range| call == Call::WriteDurable && seconds.contains(&range.start));
    let _checkpointed = engine.begin_checkpoint();
    let [(_, held, ..)] = &engine.medium.under_way()[..] else { panic!("one copy was enough") };
    let copy = held.start - seconds[0];
    let image = engine.medium.power_cut_keeping(|_| true).settled();
    drop(engine);
    let (mut good, mut bad) = ([0; BLOCK_SIZE], image.clone());
    image.read(copy, &mut good);
    bad.write(copy, &[0xee; BLOCK_SIZE]);
    cut_at_each_operation_of_opening(&bad.into(), &Log::new(2), |stop_after, medium, _| {
        let mut left = medium.power_cut_keeping(|_| true).settled();
        let mut found = [0; BLOCK_SIZE];
        left.read(copy, &mut found);
        if found == [0xee; BLOCK_SIZE] {
            left.write(copy, &good);
        }
        let last = Engine::open(at_once(left.into()), Log::new(3));
        let last = last.unwrap_or_else(|error| panic!("cut after {stop_after} operations: {error}"));
        assert_eq!([0, 1].map(|block| last.read(volume, block).expect("readable")), [1, 2]);
        last.assert_clean();
    });
}

/// Opens what was `left` again and again, the medium stopping after one operation more each time, until that is an opening
/// to its end; hands over after how many it stopped, the medium, and whether the pool was open.
fn cut_at_each_operation_of_opening(left: &Left, log: &Log, mut judge: impl FnMut(u64, &Medium, bool)) {
    for stop_after in 0.. {
        let medium = stopping(left.clone(), stop_after);
        let (storage, successor) = (medium.clone(), log.copy());
        let opening = async move { Pool::open(storage, Box::new(successor), OpenOptions::default()).await.map(drop) };
        let opened = run(&LocalExecutor::new(), || None, opening);
        let is_open = opened.map(|opened| opened.expect("open")).is_some();
        judge(stop_after, &medium, is_open);
        if is_open {
            return;
        }
    }
}

/// **Seeded checksums.** A leaf stands where another belongs, with everything above it made to fit: it is a good node and
/// has the checksum that is asked for, were it not for its place.
#[test]
pub fn node_in_a_wrong_place_is_found() {
    let engine = Engine::open(at_once(new_pool()), Log::new(1)).expect("open");
    let volume = engine.create(1, 8 * MIB);
    engine.write(volume, 3, 1).expect("written");
    engine.write(volume, 256 + 3, 2).expect("written");
    let medium = engine.medium.clone();
    engine.close();
    let mut image = medium.power_cut_keeping(|_| true).settled();
    misplace_leaf(&mut image, volume);
    let engine = Engine::open(at_once(image.into()), Log::new(2)).expect("open");
    let found = engine.read(volume, 256 + 3);
    assert!(matches!(found, Err(Error::Corrupt(_))), "a leaf of another place was believed: {found:?}");
    assert_eq!(engine.read(volume, 3).expect("readable"), 1);
}

/// Puts the leaf of the volume's first MiB in the place of its second, and new checksums into all that leads there.
fn misplace_leaf(image: &mut Image, volume: VolumeId) {
    let block = |image: &Image, address: PoolBlock| {
        let mut bytes = [0; BLOCK_BYTES as usize];
        image.read(address.offset_bytes(), &mut bytes);
        bytes
    };
    let copies = SUPERBLOCK_COPIES.map(|slot| slot.map(|copy| Superblock::decode(&block(image, copy))));
    let ChosenSuperblock { mut superblock, slot, .. } = format::choose_superblock(copies).expect("a superblock");
    let (uuid, blocks) = (superblock.uuid, superblock.geometry.pool_blocks);
    let table = superblock.volume_table;
    assert_eq!(table.level, 0);
    let mut leaf = Node::decode_table(&block(image, table.entry.address), 0, blocks).expect("the table");
    let record_entry = leaf.entry(volume.0 as usize);
    let mut record = VolumeRecord::decode(&block(image, record_entry.address)).expect("a record");
    let root = record.root;
    assert_eq!((root.level, root.entry.kind), (1, EntryKind::Node));
    let mut node = Node::decode(&block(image, root.entry.address), 1, blocks).expect("the root");
    node.set(1, node.entry(0));
    let mut put = |address: PoolBlock, mirrored: bool, bytes: &[u8]| {
        image.write(address.offset_bytes(), bytes);
        if mirrored {
            image.write(address.plus(1).offset_bytes(), bytes);
        }
    };
    let place = Place::Node { level: 1, first: VirtualBlock(0) };
    put(root.entry.address, root.entry.mirrored, node.bytes());
    record.root.entry.checksum = format::checksum(&uuid, place, node.bytes());
    let bytes = record.encode();
    put(record_entry.address, record_entry.mirrored, &bytes);
    let checksum = format::checksum(&uuid, Place::VolumeRecord(volume), &bytes);
    leaf.set(volume.0 as usize, format::Entry { checksum, ..record_entry });
    put(table.entry.address, table.entry.mirrored, leaf.bytes());
    let place = Place::TableNode { level: 0, first: 0 };
    superblock.volume_table.entry.checksum = format::checksum(&uuid, place, leaf.bytes());
    for copy in SUPERBLOCK_COPIES[slot.index()] {
        put(copy, false, &superblock.encode());
    }
}

/// Whether the copy of a superblock at byte `at` is one of the newest.
fn is_newest_superblock(image: &Image, at: u64) -> bool {
    let decode = |offset: u64| {
        let mut bytes = [0; BLOCK_BYTES as usize];
        image.read(offset, &mut bytes);
        Superblock::decode(&bytes).ok().map(|superblock| superblock.generation)
    };
    let newest = SUPERBLOCK_COPIES.iter().flatten().filter_map(|copy| decode(copy.offset_bytes())).max();
    decode(at) == newest
}

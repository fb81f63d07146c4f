//! Volumes with a reservation on a pool that others fill.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use super::reservation::map_blocks;
use super::tests::{assert_clean, bytes, fill, memory, new_clone, new_snapshot, new_volume, with_image};
use super::*;
use crate::error::Error;
use crate::io::{MemoryImage, MemoryStorage};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};

const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 224 * MIB;

type Memories = Pool<MemoryStorage>;

fn empty_pool() -> MemoryImage {
    let storage = MemoryStorage::new(POOL_BYTES);
    futures_lite::future::block_on(async {
        let (uuid, journal_bytes) = (uuid::Uuid::from_u128(1), 4 << 20);
        let options = CreateOptions { uuid, name: "pool".into(), size_bytes: POOL_BYTES, journal_bytes };
        Pool::create(&storage, &options).await.unwrap();
    });
    storage.snapshot_image()
}

fn reserved(name: &str, size_bytes: u64, reservation_bytes: u64) -> NewVolume {
    NewVolume { reservation_bytes, ..new_volume(name, size_bytes) }
}

/// Blocks of the volume that it overwrites in place, and how many it has reserved.
fn in_place(pool: &Memories, id: VolumeId) -> (u64, u64) {
    let state = pool.inner.state.borrow();
    let record = &state.volume(id).unwrap().record;
    (record.in_place_blocks, record.reservation_bytes / BLOCK_BYTES)
}

/// What is kept up to date is what it would be found to be.
fn assert_reckoned(pool: &Memories) {
    let mut state = pool.inner.state.borrow_mut();
    let (owed, outside) = (state.owed_blocks, state.outside_blocks);
    state.reckon_all();
    assert_eq!(state.owed_blocks, owed);
    assert_eq!(state.owed_to_others(None), state.volumes.values().map(|volume| volume.owed_blocks).sum::<u64>());
    if owed > 0 {
        state.count_outside();
        assert_eq!(state.outside_blocks, outside);
    }
}

async fn write(pool: &Memories, id: VolumeId, offset: u64, length: u64, byte: u8) -> Result<(), Error> {
    let handle = pool.open_volume(id, false)?;
    handle.write(offset, &memory(&vec![byte; length as usize]), false).await.map(drop)
}

/// Writes new blocks to `id` until there is no room, first in long runs, then block by block.
async fn fill_until_full(pool: &Memories, id: VolumeId) {
    let size = pool.volume_by_id(id).unwrap().size_bytes;
    let mut at = 0;
    for length in [MIB, 64 << 10, BLOCK_BYTES] {
        while at + length <= size {
            match write(pool, id, at, length, 0xbb).await {
                Ok(()) => at += length,
                Err(Error::NoSpace(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(at < size, "the pool is larger than the volume that is to fill it");
}

type Writing<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;

/// All futures at once.
async fn join(mut futures: Vec<Writing<'_>>) -> Result<(), Error> {
    std::future::poll_fn(move |context| {
        let mut failed = None;
        futures.retain_mut(|future| match future.as_mut().poll(context) {
            Poll::Pending => true,
            Poll::Ready(outcome) => {
                failed = failed.take().or(outcome.err());
                false
            }
        });
        match failed {
            Some(error) => Poll::Ready(Err(error)),
            None if futures.is_empty() => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    })
    .await
}

/// One random change of a pool: of the volume with the reservation, or of its neighbours. Refusals are part of it.
async fn happen(pool: &Memories, id: VolumeId, neighbour: VolumeId, random: &mut fastrand::Rng) {
    let size = pool.volume_by_id(id).unwrap().size_bytes;
    let snapshots = |of: VolumeId| {
        let volumes = pool.volumes().into_iter();
        let of_it =
            volumes.filter(move |volume| volume.read_only && volume.origin.as_ref().is_some_and(|o| o.id == of));
        of_it.map(|volume| volume.id).collect::<Vec<_>>()
    };
    let target = if random.u32(..4) > 0 { id } else { neighbour };
    let length = if random.bool() { random.u64(1..64) * 512 } else { random.u64(1..256) * BLOCK_BYTES };
    let offset = random.u64(..(size - length) / 512) * 512;
    let outcome = match random.u32(..16) {
        0..8 => write(pool, target, offset, length, random.u8(1..)).await,
        8..11 => {
            let length = if random.u32(..4) == 0 { random.u64(1..8) * MIB } else { length }.min(size - offset);
            pool.open_volume(target, false).unwrap().discard(offset, length).await.map(drop)
        }
        11 | 12 => pool.create_snapshot(target, new_snapshot(&format!("s{}", random.u64(..)))).await.map(drop),
        13 => match random.choice(snapshots(target)) {
            Some(snapshot) => pool.roll_back(target, snapshot, None).await,
            None => Ok(()),
        },
        14 => match random.choice(snapshots(target)) {
            Some(snapshot) => pool.delete_volume(snapshot).await,
            None => Ok(()),
        },
        _ => match random.choice(snapshots(target)) {
            Some(snapshot) => {
                let clone = pool.create_clone(snapshot, new_clone(&format!("c{}", random.u64(..)))).await;
                match clone {
                    Ok(clone) => write(pool, clone.id, 0, MIB, 9).await,
                    Err(error) => Err(error),
                }
            }
            None => Ok(()),
        },
    };
    match outcome {
        Ok(()) | Err(Error::NoSpace(_)) => {}
        Err(error) => panic!("{error}"),
    }
    assert_reckoned(pool);
}

/// Writes new blocks at random places until as many are the volume's own as it has reserved; `refuse` says what to do in
/// between, which may fail.
async fn claim_all(pool: &Memories, id: VolumeId, neighbour: VolumeId, random: &mut fastrand::Rng, seed: u64) {
    let size = pool.volume_by_id(id).unwrap().size_bytes;
    let mut tries = 0;
    loop {
        let (has, wants) = in_place(pool, id);
        if has >= wants {
            return;
        }
        tries += 1;
        assert!(tries < 10_000, "seed {seed}");
        if wants - has < 64 {
            // Chance alone would take long to find the last ones.
            let mut blocks: Vec<u64> = (0..size / BLOCK_BYTES).collect();
            random.shuffle(&mut blocks);
            for block in blocks {
                if in_place(pool, id).0 < wants {
                    let written = write(pool, id, block * BLOCK_BYTES, BLOCK_BYTES, random.u8(1..)).await;
                    assert!(written.is_ok(), "seed {seed}: {written:?}");
                }
            }
            assert_eq!(in_place(pool, id).0, wants, "seed {seed}");
            return;
        }
        // Several at once, but never more than is owed: of what goes beyond, nothing is said.
        let mut left = (wants - has).min(random.u64(1..=512));
        let mut writes: Vec<Writing<'_>> = Vec::new();
        while left > 0 {
            let blocks = if random.u32(..8) == 0 { random.u64(1..=left.min(256)) } else { 1 };
            left -= blocks;
            let block = random.u64(..=size / BLOCK_BYTES - blocks);
            // Parts of blocks are merged; two writes of one block wait for one another.
            let (skip, length) =
                if random.bool() { (0, blocks * BLOCK_BYTES) } else { (512, blocks * BLOCK_BYTES - 512) };
            writes.push(Box::pin(write(pool, id, block * BLOCK_BYTES + skip, length, random.u8(1..))));
        }
        let written = join(writes).await;
        assert!(written.is_ok(), "seed {seed}: {written:?} with {has} of {wants} blocks");
        match random.u32(..32) {
            // What it gives up it can have again.
            0 => {
                let (offset, length) = (random.u64(..size / MIB) * MIB + BLOCK_BYTES, random.u64(1..200) * BLOCK_BYTES);
                let discarded = pool.open_volume(id, false).unwrap().discard(offset, length).await;
                assert!(matches!(discarded, Ok(_) | Err(Error::NoSpace(_))), "seed {seed}");
            }
            1..4 => {
                let block = random.u64(..size / BLOCK_BYTES);
                drop(write(pool, neighbour, block * BLOCK_BYTES, BLOCK_BYTES, 1).await);
            }
            4 => drop(pool.create_snapshot(neighbour, new_snapshot(&format!("n{}", random.u64(..)))).await),
            _ => {}
        }
        assert_reckoned(pool);
    }
}

async fn story(pool: &Memories, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let size = random.u64(2..=32) * MIB;
    let reservation = if random.bool() { size } else { random.u64(1..=size / BLOCK_BYTES) * BLOCK_BYTES };
    let id = pool.create_volume(reserved("v", size, reservation)).await.unwrap().id;
    let neighbour = pool.create_volume(new_volume("w", 1 << 30)).await.unwrap().id;
    for _ in 0..random.u32(..80) {
        happen(pool, id, neighbour, &mut random).await;
    }
    let ballast = pool.create_volume(new_volume("ballast", 1 << 30)).await;
    let Ok(ballast) = ballast else { panic!("seed {seed}: the pool is full before anybody filled it") };
    fill_until_full(pool, ballast.id).await;
    for _ in 0..random.u32(..40) {
        happen(pool, id, neighbour, &mut random).await;
    }
    fill_until_full(pool, ballast.id).await;
}

#[test]
fn reserved_bytes_can_be_written_when_others_have_filled_the_pool() {
    for seed in 0..24 {
        let image = with_image(empty_pool(), 1, |pool| async move {
            story(&pool, seed).await;
            assert!(pool.counters().space_refusals > 0, "seed {seed}: the pool was never full");
            if seed % 2 == 0 {
                let (id, neighbour) = (pool.volume("v").unwrap().id, pool.volume("w").unwrap().id);
                claim_all(&pool, id, neighbour, &mut fastrand::Rng::with_seed(!seed), seed).await;
                assert_clean(&pool).await;
            }
            pool.close().await.unwrap();
            pool.inner.storage.snapshot_image()
        });
        with_image(image, 2, |pool| async move {
            let (id, neighbour) = (pool.volume("v").unwrap().id, pool.volume("w").unwrap().id);
            assert_reckoned(&pool);
            let random = &mut fastrand::Rng::with_seed(!seed);
            claim_all(&pool, id, neighbour, random, seed).await;
            // All of it again, after it has been given up.
            let size = pool.volume_by_id(id).unwrap().size_bytes;
            drop(pool.open_volume(id, false).unwrap().discard(0, size).await.unwrap());
            claim_all(&pool, id, neighbour, random, seed).await;
            assert_clean(&pool).await;
        });
    }
}

/// The worst for the map: blocks in leaves that are shared, given up again, and written in others. Each leaf is the volume's
/// own from then on, with nothing of its own in it.
#[test]
fn map_of_scattered_blocks_never_eats_what_is_reserved() {
    const LEAVES: u64 = 2048;
    const RESERVED_BLOCKS: u64 = 64;
    with_image(empty_pool(), 1, |pool| async move {
        let id = pool.create_volume(new_volume("v", LEAVES * MIB)).await.unwrap().id;
        for leaf in 0..LEAVES {
            write(&pool, id, leaf * MIB, BLOCK_BYTES, 1).await.unwrap();
        }
        pool.create_snapshot(id, new_snapshot("s")).await.unwrap();
        pool.set_reservation(id, RESERVED_BLOCKS * BLOCK_BYTES).await.unwrap();
        let ballast = pool.create_volume(new_volume("ballast", 1 << 30)).await.unwrap().id;
        fill_until_full(&pool, ballast).await;
        for round in 0..LEAVES / RESERVED_BLOCKS {
            let leaves = round * RESERVED_BLOCKS..(round + 1) * RESERVED_BLOCKS;
            for leaf in leaves.clone() {
                write(&pool, id, leaf * MIB + 8192, BLOCK_BYTES, 2).await.unwrap();
            }
            assert_eq!(in_place(&pool, id), (RESERVED_BLOCKS, RESERVED_BLOCKS));
            for leaf in leaves {
                drop(pool.open_volume(id, false).unwrap().discard(leaf * MIB + 8192, BLOCK_BYTES).await.unwrap());
            }
            assert!(write(&pool, ballast, 512 * MIB, BLOCK_BYTES, 1).await.is_err(), "round {round}");
        }
        assert_clean(&pool).await;
    });
}

#[test]
fn reservation_that_cannot_be_kept_is_refused_and_changes_nothing() {
    with_image(empty_pool(), 1, |pool| async move {
        let too_much = pool.create_volume(reserved("v", 512 * MIB, 512 * MIB)).await;
        let Err(Error::NoSpace(said)) = too_much else { panic!("{too_much:?}") };
        assert!(said.contains("536870912 bytes ready for v") && said.contains("are missing"), "{said}");
        assert!(pool.volumes().is_empty());
        for (size, reservation, quota) in [(MIB, 2 * MIB, 0), (MIB, MIB + 1, 0), (MIB, MIB, MIB / 2), (MIB, 100, 0)] {
            let new = NewVolume { quota_bytes: quota, ..reserved("v", size, reservation) };
            assert!(matches!(pool.create_volume(new).await, Err(Error::InvalidInput(_))), "{size} {reservation}");
        }
        let id = pool.create_volume(reserved("v", 128 * MIB, 96 * MIB)).await.unwrap().id;
        assert_eq!(pool.volume("v").unwrap().reservation_bytes, 96 * MIB);
        let second = pool.create_volume(reserved("w", 128 * MIB, 128 * MIB)).await;
        assert!(matches!(second, Err(Error::NoSpace(_))));
        assert!(matches!(pool.set_reservation(id, 129 * MIB).await, Err(Error::InvalidInput(_))));
        assert!(matches!(pool.set_quota(id, 64 * MIB).await, Err(Error::InvalidInput(_))));
        pool.set_quota(id, 100 * MIB).await.unwrap();
        assert!(matches!(pool.set_reservation(id, 101 * MIB).await, Err(Error::InvalidInput(_))));
        // A larger map is owed more.
        let ballast = pool.create_volume(new_volume("ballast", 1 << 30)).await.unwrap().id;
        fill_until_full(&pool, ballast).await;
        assert!(matches!(pool.resize_volume(id, 1 << 40).await, Err(Error::NoSpace(_))));
        let info = pool.volume("v").unwrap();
        assert_eq!((info.size_bytes, info.reservation_bytes), (128 * MIB, 96 * MIB));
        pool.resize_volume(id, 32 * MIB).await.unwrap();
        assert_eq!(pool.volume("v").unwrap().reservation_bytes, 32 * MIB, "no more than it can write");
        assert_clean(&pool).await;
    });
}

#[test]
fn snapshot_that_would_break_the_promise_is_refused_until_there_is_room() {
    with_image(empty_pool(), 1, |pool| async move {
        let id = pool.create_volume(reserved("v", 32 * MIB, 32 * MIB)).await.unwrap().id;
        fill(&pool, id, 0, 16 * MIB as usize, 1).await;
        assert_eq!(in_place(&pool, id).0, 16 * 256);
        let ballast = pool.create_volume(new_volume("ballast", 1 << 30)).await.unwrap().id;
        fill_until_full(&pool, ballast).await;
        let before = (pool.info().clock, pool.info().volumes);
        let refused = pool.create_snapshot(id, new_snapshot("s")).await;
        let Err(Error::NoSpace(said)) = refused else { panic!("{refused:?}") };
        assert!(said.contains("are missing") && said.contains("plywood pool grow"), "{said}");
        assert_eq!((pool.info().clock, pool.info().volumes), before, "nothing has changed");
        // What was deleted a moment ago is waited for.
        pool.delete_volume(ballast).await.unwrap();
        let snapshot = pool.create_snapshot(id, new_snapshot("s")).await.unwrap().id;
        assert_eq!(in_place(&pool, id).0, 0);
        assert!(matches!(pool.set_reservation(snapshot, MIB).await, Err(Error::ReadOnly(_))));
        assert_eq!(pool.volume("s").unwrap().reservation_bytes, 0);
        // A clone of it has none either, and touches nobody's.
        let clone = NewClone { size_bytes: Some(1 << 30), ..new_clone("c") };
        let clone = pool.create_clone(snapshot, clone).await.unwrap().id;
        assert_eq!(pool.volume("c").unwrap().reservation_bytes, 0);
        // Rolling back gives back what is owed anew: it needs no more room than there is.
        fill(&pool, id, 0, 32 * MIB as usize, 2).await;
        fill_until_full(&pool, clone).await;
        pool.roll_back(id, snapshot, None).await.unwrap();
        assert_eq!(bytes(&pool, id, 0, BLOCK_SIZE).await, vec![1; BLOCK_SIZE]);
        fill(&pool, id, 0, 32 * MIB as usize, 3).await;
        assert_clean(&pool).await;
    });
}

#[test]
fn snapshots_at_one_instant_are_refused_when_there_is_room_for_each_and_not_for_both() {
    with_image(empty_pool(), 1, |pool| async move {
        let mut wanted = Vec::new();
        for name in ["v", "w"] {
            let id = pool.create_volume(reserved(name, 32 * MIB, 32 * MIB)).await.unwrap().id;
            fill(&pool, id, 0, 32 * MIB as usize, 1).await;
            wanted.push((id, new_snapshot(&format!("{name}-s"))));
        }
        let ballast = pool.create_volume(new_volume("ballast", 1 << 30)).await.unwrap().id;
        fill_until_full(&pool, ballast).await;
        drop(pool.open_volume(ballast, false).unwrap().discard(0, 48 * MIB).await.unwrap());
        pool.settle().await.unwrap();
        let before = (pool.info().clock, pool.info().volumes);
        let refused = pool.create_snapshots(wanted.clone()).await;
        assert!(matches!(refused, Err(Error::NoSpace(_))), "{refused:?}");
        assert_eq!((pool.info().clock, pool.info().volumes), before, "nothing has changed");
        let (id, new) = wanted[0].clone();
        let alone = pool.create_snapshot(id, new).await.unwrap();
        pool.delete_volume(alone.id).await.unwrap();
        pool.delete_volume(ballast).await.unwrap();
        pool.settle().await.unwrap();
        assert_eq!(pool.create_snapshots(wanted).await.unwrap().len(), 2);
        assert_clean(&pool).await;
    });
}

#[test]
fn neighbours_of_a_reservation_still_overwrite_discard_and_delete() {
    with_image(empty_pool(), 1, |pool| async move {
        let id = pool.create_volume(reserved("v", 64 * MIB, 64 * MIB)).await.unwrap().id;
        let other = pool.create_volume(new_volume("w", 1 << 30)).await.unwrap().id;
        fill(&pool, other, 0, 8 * MIB as usize, 1).await;
        let snapshot = pool.create_snapshot(other, new_snapshot("s")).await.unwrap().id;
        pool.delete_volume(snapshot).await.unwrap();
        pool.settle().await.unwrap();
        let ballast = pool.create_volume(new_volume("ballast", 1 << 30)).await.unwrap().id;
        fill_until_full(&pool, ballast).await;
        let refused = write(&pool, other, 512 * MIB, BLOCK_BYTES, 1).await;
        let Err(Error::NoSpace(said)) = refused else { panic!("{refused:?}") };
        assert!(said.contains("reserved for other volumes"), "{said}");
        // In place, and redirected where the old block comes free by it.
        write(&pool, ballast, 0, MIB, 5).await.unwrap();
        for block in 0..2048 {
            write(&pool, other, block * BLOCK_BYTES, BLOCK_BYTES, 6).await.unwrap();
        }
        drop(pool.open_volume(other, false).unwrap().discard(0, MIB).await.unwrap());
        // What a neighbour gave up it can have again, and nobody has had of what is reserved.
        write(&pool, other, 600 * MIB, MIB / 2, 7).await.unwrap();
        // Administration takes what it can get; asking for less works all the same.
        for number in 0.. {
            match pool.create_snapshot(other, new_snapshot(&format!("n{number}"))).await {
                Ok(_) => {}
                Err(Error::NoSpace(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
        pool.set_reservation(id, 64 * MIB).await.unwrap();
        let info = pool.info();
        assert_eq!(info.reserved_bytes, 64 * MIB);
        assert!(info.owed_bytes >= 64 * MIB + map_blocks(64 * MIB) * BLOCK_BYTES, "{}", info.owed_bytes);
        pool.set_reservation(id, 60 * MIB).await.unwrap();
        write(&pool, other, 700 * MIB, MIB / 2, 7).await.unwrap();
        pool.delete_volume(ballast).await.unwrap();
        pool.settle().await.unwrap();
        write(&pool, other, 512 * MIB, MIB, 1).await.unwrap();
        pool.delete_volume(id).await.unwrap();
        assert_eq!(pool.info().owed_bytes, 0);
        assert_clean(&pool).await;
    });
}

#[test]
fn map_has_a_leaf_for_each_mebibyte_and_pairs_above() {
    assert_eq!(map_blocks(4096), 1 + 3 * 2);
    assert_eq!(map_blocks(MIB), 1 + 3 * 2);
    assert_eq!(map_blocks(MIB + 4096), 2 + 3 * 2);
    assert_eq!(map_blocks(1 << 40), (1 << 20) + 2 * ((1 << 12) + 16 + 1));
}

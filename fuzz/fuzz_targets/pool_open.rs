//! An arbitrary file opened as a pool and used through every call of the engine: a sample pool with the patches that the
//! input says, checksums made right again along the parents where it says so.
//!
//! * Nothing panics, however wrong the numbers behind right checksums are: damage is an error, or a fault of `check`.
//! * Every call ends, in a bounded number of steps, and so does the background work.
//! * A pool that opens and was not changed by a patch is clean, and still is after all calls.
//! * Memory: bounded by the pool, whatever lengths and counts it claims.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use plywood::engine::{DIGEST_STATE_ATTRIBUTE, Memory, Pace, Pool, Storage};
use plywood::error::Error;
use plywood::units::{BLOCK_SIZE, VolumeId};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::Structure;
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::samples::{POOL_BYTES, Sample, new_clone, new_snapshot, new_volume};
use plywood_fuzz::session::{Session, SharedLog};
use plywood_fuzz::storage::FuzzStorage;
use plywood_fuzz::{patches, seeds};

/// The whole pool in memory, its metadata decoded, and a walk's counts.
const BOUND: Bound = Bound { fixed_bytes: 3 * POOL_BYTES as usize, multiple: 0 };
/// Volumes used of one pool.
const VOLUMES_MAX: usize = 4;
/// Stretches of data looked for in one volume.
const SEEKS_MAX: usize = 8;
const CHUNK: usize = 8 * BLOCK_SIZE;
/// Seconds in which the background seals snapshots, small ones: it begins with those that are a minute old.
const SEAL_TICKS: u32 = 70;
/// Steps of scrubbing.
const SCRUB_STEPS_MAX: usize = 64;

/// Runs one call; what it answers does not matter, that it ends does.
macro_rules! call {
    ($session:expr, $pool:expr, |$handle:ident| $body:expr) => {{
        let $handle = $pool.clone();
        $session.run(async move { $body.await }).expect("the storage answers")
    }};
}

fn read_volume(session: &Session, pool: &Pool<FuzzStorage>, storage: &FuzzStorage, id: VolumeId) {
    let Ok(handle) = pool.open_volume(id, true) else { return };
    let storage = storage.clone();
    let read = session.run(async move {
        let end = handle.size_bytes();
        let mut offset = 0;
        for _ in 0..SEEKS_MAX {
            let Ok(Some(data)) = handle.seek(offset, true).await else { break };
            let len = (CHUNK as u64).min(end - data.min(end)) & !511;
            let memory = storage.allocate(len as usize);
            let _ = handle.read(data & !511, &memory).await;
            offset = handle.seek(data, false).await.ok().flatten().unwrap_or(end).max(data + 1);
        }
        let last = storage.allocate(512.min(end) as usize & !511);
        let _ = handle.read((end & !511) - last.len() as u64, &last).await;
    });
    read.expect("the storage answers");
}

fn change_volume(session: &Session, pool: &Pool<FuzzStorage>, storage: &FuzzStorage, id: VolumeId, block: u64) {
    let Ok(handle) = pool.open_volume(id, false) else { return };
    let storage = storage.clone();
    let changed = session.run(async move {
        let size = handle.size_bytes();
        let offset = block * BLOCK_SIZE as u64;
        let memory = storage.allocate(CHUNK);
        memory.write(0, &[0x5a; CHUNK]);
        drop(handle.write(offset, &memory, true).await);
        drop(handle.write(offset + 512, &memory.slice(0..512), false).await);
        drop(handle.write_zeroes(offset, 2 * BLOCK_SIZE as u64, false).await);
        drop(handle.discard(offset, BLOCK_SIZE as u64).await);
        drop(handle.discard(0, size / 2 & !4095).await);
        let _ = handle.flush().await;
    });
    changed.expect("the storage answers");
}

/// Seals snapshots, as fast as it goes, slowly and in the background; what was read unverified is read again.
fn seal(session: &Session, pool: &Pool<FuzzStorage>, storage: &FuzzStorage, ids: &[VolumeId], chance: u8) {
    if chance & 1 != 0 {
        let _ = call!(session, pool, |pool| pool.verify_pool_on_read(chance & 2 != 0));
    }
    for id in ids.iter().copied() {
        if chance & 4 != 0 {
            // The next one begins with what the last one left, whatever it is.
            let state = BTreeMap::from([(DIGEST_STATE_ATTRIBUTE.to_owned(), Some(vec![chance; 2048]))]);
            let _ = call!(session, pool, |pool| pool.set_attributes(id, state));
        }
        let pace = if chance & 8 != 0 { Pace::Full } else { Pace::BytesPerTick(1 << 18) };
        if let Ok(report) = call!(session, pool, |pool| pool.seal(id, pace)) {
            let info = pool.volume_by_id(id).expect("it was sealed");
            assert!(info.read_only && info.sealed && info.digest == Some(report.digest), "{info:?}");
        }
        let _ = call!(session, pool, |pool| pool.verify_volume_on_read(id, chance & 16 != 0));
    }
    if chance & 32 != 0 {
        pool.seal_in_background(1 << 16);
        for _ in 0..SEAL_TICKS {
            session.tick();
        }
    }
    for id in ids.iter().copied() {
        let _ = call!(session, pool, |pool| pool.verify_sealed(id));
        read_volume(session, pool, storage, id);
    }
}

/// A pass of scrubbing, or a part of one; of a pool that nothing happened to it finds nothing.
fn scrub(session: &Session, pool: &Pool<FuzzStorage>, chance: u8) {
    let mut whole = false;
    if chance & 1 == 0 {
        whole = call!(session, pool, |pool| pool.scrub_metadata(1)).is_ok_and(|found| found.report.is_clean());
    }
    for _ in 0..SCRUB_STEPS_MAX {
        let most = u64::from(chance) * 8 + 1;
        let Ok(step) = call!(session, pool, |pool| pool.scrub_data(most, 2)) else { break };
        assert!(step.blocks <= most && step.damaged.len() as u64 <= step.damaged_count, "{step:?}");
        if !step.damaged.is_empty() {
            let damaged = step.damaged.clone();
            let _ = call!(session, pool, |pool| pool.touched_by(damaged));
        }
        if step.next.is_none() {
            assert!(!whole || pool.scrub_state().ended == 2, "a pass that is over has ended");
            break;
        }
    }
    let _ = pool.scrub_state();
}

fn control(session: &Session, pool: &Pool<FuzzStorage>, ids: &[VolumeId]) {
    let _ = call!(session, pool, |pool| pool.create_volume(new_volume(100, 1 << 24)));
    let Some((first, last)) = ids.first().copied().zip(ids.last().copied()) else { return };
    let snapshot = call!(session, pool, |pool| pool.create_snapshot(first, new_snapshot(101)));
    if let Ok(snapshot) = snapshot {
        let _ = call!(session, pool, |pool| pool.create_clone(snapshot.id, new_clone(102)));
        let _ = call!(session, pool, |pool| pool.changed_ranges(snapshot.id, last));
        let _ = call!(session, pool, |pool| pool.roll_back(first, snapshot.id, Some(new_snapshot(103))));
    }
    for id in ids.iter().copied() {
        let _ = call!(session, pool, |pool| pool.attributes(id));
        let changes = BTreeMap::from([("fuzz".to_owned(), Some(vec![1; 5000])), ("label".to_owned(), None)]);
        let _ = call!(session, pool, |pool| pool.set_attributes(id, changes));
        let name = format!("renamed-{id}");
        let _ = call!(session, pool, |pool| pool.rename_volume(id, &name));
        let _ = call!(session, pool, |pool| pool.set_quota(id, 1 << 20));
        let _ = call!(session, pool, |pool| pool.changed_ranges(first, id));
        let _ = call!(session, pool, |pool| pool.roll_back(first, id, None));
        let _ = call!(session, pool, |pool| pool.resize_volume(id, 1 << 22));
        let _ = call!(session, pool, |pool| pool.protect_volume(id, false));
    }
    let _ = call!(session, pool, |pool| pool.delete_volume(last));
}

/// Uses the pool in every way. Answers whether `check` found it clean when it was opened and when it was left.
fn use_pool(session: &mut Session, storage: &FuzzStorage, rest: &mut Fields<'_>, tell: bool) -> Option<(bool, bool)> {
    let pool = session.open(&SharedLog::new(9), true).expect("the storage answers").ok()?;
    let is_clean = |session: &Session, pool: &Pool<FuzzStorage>| {
        let report = call!(session, pool, |pool| pool.check());
        if tell {
            println!("{report:?}");
        }
        report.is_ok_and(|report| report.is_clean())
    };
    let (_, _, infos) = (pool.info(), pool.counters(), pool.volumes());
    let ids: Vec<VolumeId> = infos.iter().map(|info| info.id).take(VOLUMES_MAX).collect();
    for info in infos.iter().take(VOLUMES_MAX) {
        let _ = (pool.volume(&info.name), pool.volume_by_id(info.id));
    }
    let before = is_clean(session, &pool);
    for id in ids.iter().copied() {
        read_volume(session, &pool, storage, id);
    }
    for id in ids.iter().copied() {
        change_volume(session, &pool, storage, id, u64::from(rest.u16()));
    }
    seal(session, &pool, storage, &ids, rest.byte());
    control(session, &pool, &ids);
    pool.drop_caches();
    for id in ids.iter().copied() {
        read_volume(session, &pool, storage, id);
    }
    scrub(session, &pool, rest.byte());
    let _ = call!(session, pool, |pool| pool.settle());
    let _ = call!(session, pool, |pool| pool.trim());
    let _ = call!(session, pool, |pool| pool.enlarge(POOL_BYTES));
    let after = is_clean(session, &pool);
    for _ in 0..4 {
        session.tick();
    }
    if let Some(id) = ids.first().copied() {
        let _: Result<(), Error> = call!(session, pool, |pool| pool.delete_volume(id));
    }
    let _ = call!(session, pool, |pool| pool.close());
    Some((before, after))
}

fuzz_target!(
    init: seeds::offer(|| {
        let mut all = Vec::new();
        for sample in Sample::ALL {
            for repair in [false, true] {
                all.push(patches::encode(sample, repair, &[], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]));
            }
            // Each structure once, in a place where much stands: the fuzzer has the bytes to play with.
            for (number, found) in patches::structures(sample) {
                let offset = match found.structure {
                    Structure::Superblock => 128,
                    Structure::GroupIndex => 0,
                    Structure::GroupDescriptor => 64,
                    Structure::Page => 140 * 4,
                    Structure::ChecksumPage => 0,
                    Structure::Node | Structure::TableNode => 0,
                    Structure::VolumeRecord => 32,
                    Structure::Attributes => 8,
                    Structure::CarcassPage => 64,
                    Structure::Journal => 72,
                };
                let image = sample.image();
                let bytes = image.block(found.block)[offset..offset + 64].to_vec();
                all.push(patches::encode(sample, true, &[(number, offset, &bytes)], &[1, 0, 2, 0]));
            }
        }
        all
    }),
    |input: &[u8]| bounded(BOUND, input.len(), || {
        let mut patched = patches::apply(input);
        let storage = FuzzStorage::new(patched.image, u64::MAX);
        let mut session = Session::new(&storage);
        let clean = use_pool(&mut session, &storage, &mut patched.rest, std::env::var_os("PLYWOOD_FUZZ_TELL").is_some());
        if input.get(1) == Some(&0) {
            assert_eq!(clean, Some((true, true)), "a pool that nothing happened to is clean");
        }
        // What it left is a pool again or refused, and never a panic.
        let mut again = Session::new(&storage);
        drop(session);
        if let Ok(Ok(pool)) = again.open(&SharedLog::new(10), true) {
            let _ = call!(again, pool, |pool| pool.check());
            let _ = call!(again, pool, |pool| pool.close());
        }
    })
);

// Half of the inputs are libFuzzer's own mutations, the others fields changed to what hurts.
fuzz_mutator!(|input: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2) {
        return fuzzer_mutate(input, size, max_size);
    }
    let invented = patches::invent(seed.into());
    let len = invented.len().min(max_size);
    input[..len].copy_from_slice(&invented[..len]);
    len
});

//! What volumes are said to hold alone, held against what their deletion frees.

use std::collections::BTreeSet;

use futures_lite::future::yield_now;

use crate::engine::Pool;
use crate::engine::state::{Need, State};
use crate::engine::tests::{fill, new_clone, new_snapshot, new_volume, with_image, with_pool, without_worker};
use crate::engine::tree::entry_span;
use crate::format::{Entry, EntryKind, Place};
use crate::io::MemoryStorage;
use crate::units::{BLOCK_BYTES, PoolBlock, VirtualBlock, VolumeId};

const MIB: u64 = 1 << 20;
/// Four parts.
const VOLUME_BYTES: u64 = 1 << 30;

/// Random work on a family or two.
struct Churn {
    random: fastrand::Rng,
    volumes: Vec<VolumeId>,
    snapshots: Vec<VolumeId>,
    names: u32,
    met: [u32; 8],
}

impl Churn {
    fn name(&mut self) -> String {
        self.names += 1;
        format!("v{}", self.names)
    }

    fn any(&mut self, of: &[VolumeId]) -> Option<VolumeId> {
        (!of.is_empty()).then(|| of[self.random.usize(..of.len())])
    }

    async fn turn(&mut self, pool: &Pool<MemoryStorage>) {
        let name = self.name();
        let (volumes, snapshots) = (self.volumes.clone(), self.snapshots.clone());
        let (Some(volume), snapshot) = (self.any(&volumes), self.any(&snapshots)) else {
            self.volumes.push(pool.create_volume(new_volume(&name, VOLUME_BYTES)).await.unwrap().id);
            return;
        };
        let kind = self.random.usize(..16);
        match (kind, snapshot) {
            (0, _) if volumes.len() < 6 => {
                self.volumes.push(pool.create_volume(new_volume(&name, VOLUME_BYTES)).await.unwrap().id);
            }
            (1 | 2, _) if snapshots.len() < 8 => {
                self.snapshots.push(pool.create_snapshot(volume, new_snapshot(&name)).await.unwrap().id);
                self.met[0] += 1;
            }
            (3 | 4, Some(snapshot)) if volumes.len() < 8 => {
                self.volumes.push(pool.create_clone(snapshot, new_clone(&name)).await.unwrap().id);
                self.met[1] += 1;
            }
            (5, Some(snapshot)) => {
                pool.delete_volume(snapshot).await.unwrap();
                self.snapshots.retain(|id| *id != snapshot);
                self.met[2] += 1;
            }
            (6, _) if volumes.len() > 3 => {
                pool.delete_volume(volume).await.unwrap();
                self.volumes.retain(|id| *id != volume);
                self.met[3] += 1;
            }
            (7, Some(snapshot)) => {
                // Of another family it is refused.
                self.met[4] += u32::from(pool.roll_back(volume, snapshot, None).await.is_ok());
            }
            (8, _) => {
                let size = if self.random.bool() { VOLUME_BYTES } else { VOLUME_BYTES / 8 * self.random.u64(1..8) };
                pool.resize_volume(volume, size).await.unwrap();
                self.met[5] += 1;
            }
            (9, _) => {
                let handle = pool.open_volume(volume, false).unwrap();
                let size = handle.size_bytes();
                let (at, length) = (self.random.u64(..size / MIB) * MIB, self.random.u64(1..=300) * MIB);
                drop(handle.discard(at, length.min(size - at)).await.unwrap());
                self.met[6] += 1;
            }
            _ => {
                let size = pool.volume_by_id(volume).unwrap().size_bytes / BLOCK_BYTES;
                let blocks = self.random.u64(1..=64);
                // Close together, so that volumes meet.
                let around = size / 8 * self.random.u64(..8) + self.random.u64(..512);
                let at = around.min(size - blocks);
                fill(pool, volume, at * BLOCK_BYTES, (blocks * BLOCK_BYTES) as usize, self.random.u8(1..)).await;
                self.met[7] += 1;
            }
        }
    }

    /// Deletes one volume and compares.
    async fn delete_one(&mut self, pool: &Pool<MemoryStorage>) {
        rest(pool).await;
        assert_sums(pool).await;
        let all: Vec<VolumeId> = self.volumes.iter().chain(&self.snapshots).copied().collect();
        pool.measure_exclusive(&all, u64::MAX).await;
        for id in &all {
            let info = pool.volume_by_id(*id).unwrap();
            let found = info.exclusive.expect("it was measured");
            assert_eq!((found.age_seconds, found.unchanged_seconds.is_some()), (0, true));
            assert!(found.data_bytes <= info.mapped_bytes);
        }
        let Some(id) = self.any(&all) else { return };
        let info = pool.volume_by_id(id).unwrap();
        let before = pool.info().used_bytes;
        pool.delete_volume(id).await.unwrap();
        rest(pool).await;
        let freed = before - pool.info().used_bytes;
        assert_eq!(info.exclusive.map(|found| found.bytes), Some(freed), "of {info:?}");
        self.volumes.retain(|other| *other != id);
        self.snapshots.retain(|other| *other != id);
    }
}

/// What the pool says that its blocks are for is what a walk over all volumes finds.
async fn assert_sums(pool: &Pool<MemoryStorage>) {
    let info = pool.info();
    let (mut all, mut own) = (BTreeSet::new(), BTreeSet::new());
    let (mut own_of_all, mut nodes) = (0, BTreeSet::new());
    for volume in pool.volumes() {
        let created_at = pool.inner.state.borrow().volume(volume.id).unwrap().record.created_at;
        let mapped = mapped(pool, volume.id, &mut nodes).await;
        let owned = mapped.iter().filter(|entry| entry.birth >= created_at).map(|entry| entry.address);
        let owned: BTreeSet<PoolBlock> = owned.collect();
        assert_eq!(volume.own_bytes, owned.len() as u64 * BLOCK_BYTES, "{volume:?}");
        assert_eq!(volume.mapped_bytes, mapped.len() as u64 * BLOCK_BYTES, "{volume:?}");
        all.extend(mapped.iter().map(|entry| entry.address));
        if !volume.read_only {
            own_of_all += owned.len() as u64 * BLOCK_BYTES;
            own.extend(owned);
        }
    }
    assert_eq!(own.len() as u64 * BLOCK_BYTES, own_of_all, "no block is two volumes' own");
    assert_eq!(info.own_bytes, own_of_all);
    let kept = all.difference(&own).count() as u64 * BLOCK_BYTES;
    assert_eq!(info.kept_bytes, Some(kept));
    let metadata = info.metadata_bytes.expect("it is counted from the beginning");
    let records: u64 = pool.inner.state.borrow().volumes.values().map(|volume| volume.record_blocks).sum();
    let tables = metadata / BLOCK_BYTES - nodes.len() as u64 - records;
    assert!(tables <= 4, "one table of one level, and one that may be there: {tables}");
    assert_eq!(info.used_bytes, own_of_all + kept + metadata + info.layout_bytes - info.head_bytes);
}

/// Everything that a volume maps; its nodes' blocks are added to `nodes`.
async fn mapped(pool: &Pool<MemoryStorage>, id: VolumeId, nodes: &mut BTreeSet<PoolBlock>) -> Vec<Entry> {
    let root = pool.inner.state.borrow().volume(id).unwrap().record.root;
    let (mut waiting, mut found) = (vec![(root.entry, root.level, 0)], Vec::new());
    while let Some((entry, level, first)) = waiting.pop() {
        match entry.kind {
            EntryKind::Hole => continue,
            EntryKind::Block => {
                found.push(entry);
                continue;
            }
            EntryKind::Node => {}
        }
        nodes.extend((0..=u64::from(entry.mirrored)).map(|copy| entry.address.plus(copy)));
        let place = Place::Node { level, first: VirtualBlock(first) };
        let Entry { address, mirrored, checksum, .. } = entry;
        let node = |state: &mut State| match state.cache.node_at(address, place) {
            Some(node) => Ok(node.clone()),
            None => Err(Need::Node { address, mirrored, checksum, place }),
        };
        let node = pool.attempt(node).await.unwrap();
        let span = entry_span(level);
        waiting
            .extend((0..256).map(|index| (node.entry(index as usize), level.saturating_sub(1), first + index * span)));
    }
    found
}

/// Nothing waits any more, and a checkpoint says so.
async fn rest(pool: &Pool<MemoryStorage>) {
    pool.commit().await.unwrap();
    pool.settle().await.unwrap();
    pool.checkpoint().await.unwrap();
}

/// Ten seconds.
async fn ten_ticks(pool: &Pool<MemoryStorage>) {
    for _ in 0..10 {
        pool.tick();
        for _ in 0..2000 {
            yield_now().await;
        }
    }
}

#[test]
fn exclusive_is_what_deletion_frees_after_random_work() {
    let mut met = [0; 8];
    for seed in 0..8 {
        let mut churn = Churn {
            random: fastrand::Rng::with_seed(seed),
            volumes: Vec::new(),
            snapshots: Vec::new(),
            names: 0,
            met: [0; 8],
        };
        let mut image = None;
        for life in 1..=3 {
            let body = async |pool: Pool<MemoryStorage>| {
                for _ in 0..6 {
                    for _ in 0..12 {
                        churn.turn(&pool).await;
                    }
                    churn.delete_one(&pool).await;
                }
                while life == 3 && churn.volumes.len() + churn.snapshots.len() > 0 {
                    churn.delete_one(&pool).await;
                }
                let report = pool.check().await.unwrap();
                assert!(report.is_clean(), "seed {seed}: {:#?}", report.faults);
                pool.close().await.unwrap();
                pool.inner.storage.snapshot_image()
            };
            image = Some(match image {
                None => with_pool(body),
                Some(image) => with_image(image, life, body),
            });
        }
        for (all, one) in met.iter_mut().zip(churn.met) {
            *all += one;
        }
    }
    println!("{met:?}");
    assert!(met.iter().all(|count| *count > 0), "{met:?}");
}

#[test]
fn figures_are_exact_within_ten_seconds_of_rest() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", VOLUME_BYTES)).await.unwrap().id;
        let figure = |id| pool.volume_by_id(id).unwrap().exclusive;
        assert_eq!(figure(volume), None);
        fill(&pool, volume, 0, 8 << 20, 1).await;
        ten_ticks(&pool).await;
        let alone = figure(volume).expect("it was found");
        assert_eq!((alone.data_bytes, alone.age_seconds), (8 << 20, 0));
        // All of it is shared, then half of it is the snapshot's alone.
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        assert_eq!(figure(volume).unwrap().unchanged_seconds, None, "it is known to be old");
        ten_ticks(&pool).await;
        assert_eq!([volume, snapshot].map(|id| figure(id).unwrap().data_bytes), [0, 0]);
        fill(&pool, volume, 0, 4 << 20, 2).await;
        ten_ticks(&pool).await;
        assert_eq!([volume, snapshot].map(|id| figure(id).unwrap().data_bytes), [4 << 20, 4 << 20]);
        // What a deleted relative lets go is the other's.
        pool.delete_volume(volume).await.unwrap();
        ten_ticks(&pool).await;
        let last = figure(snapshot).unwrap();
        assert_eq!((last.data_bytes, last.age_seconds), (8 << 20, 0));
        ten_ticks(&pool).await;
        let later = figure(snapshot).unwrap();
        assert!(later.unchanged_seconds >= last.unchanged_seconds.map(|seconds| seconds + 10), "{later:?}");
    });
}

/// A figure that was found costs nothing more: what changes elsewhere is read, and no leaf beside it.
#[test]
fn only_parts_that_changed_are_read_again() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", VOLUME_BYTES)).await.unwrap().id;
        for at in 0..1024 {
            fill(&pool, volume, at * MIB, 4096, 1).await;
        }
        let snapshot = pool.create_snapshot(volume, new_snapshot("s")).await.unwrap().id;
        for at in 0..1024 {
            fill(&pool, volume, at * MIB, 4096, 2).await;
        }
        rest(&pool).await;
        let measure = async || {
            pool.drop_caches();
            let before = pool.counters().nodes_read;
            pool.measure_exclusive(&[volume, snapshot], u64::MAX).await;
            pool.counters().nodes_read - before
        };
        let first = measure().await;
        assert!(first >= 2048, "all leaves of both: {first}");
        assert_eq!(measure().await, 0);
        fill(&pool, volume, 5 * MIB, 8192, 3).await;
        rest(&pool).await;
        let again = measure().await;
        assert!((256..600).contains(&again), "one part of each at most: {again}");
    });
}

/// No other volume ever held anything of it: its leaves need not be read.
#[test]
fn volume_that_was_never_shared_is_known_by_its_upper_nodes() {
    with_pool(|pool| async move {
        let volume = pool.create_volume(new_volume("v", VOLUME_BYTES)).await.unwrap().id;
        for at in 0..1024 {
            fill(&pool, volume, at * MIB, 8192, 1).await;
        }
        rest(&pool).await;
        pool.drop_caches();
        let before = pool.counters().nodes_read;
        pool.measure_exclusive(&[volume], u64::MAX).await;
        assert!(pool.counters().nodes_read - before < 10);
        let info = pool.volume_by_id(volume).unwrap();
        let found = info.exclusive.unwrap();
        assert_eq!(found.data_bytes, info.mapped_bytes);
        let used = pool.info().used_bytes;
        pool.delete_volume(volume).await.unwrap();
        rest(&pool).await;
        assert_eq!(used - pool.info().used_bytes, found.bytes);
    });
}

/// A chain, root, first, middle, second, with two branches at its end; each layer has overwritten a part of the one below.
async fn chain(pool: &Pool<MemoryStorage>) {
    let write = async |id: VolumeId, from: u64, to: u64, byte: u8| {
        for at in from..to {
            fill(pool, id, at * MIB, 8192, byte).await;
        }
    };
    let root = pool.create_volume(new_volume("root", VOLUME_BYTES)).await.unwrap().id;
    write(root, 0, 800, 1).await;
    let first = pool.create_snapshot(root, new_snapshot("first")).await.unwrap().id;
    write(root, 0, 300, 2).await;
    let middle = pool.create_clone(first, new_clone("middle")).await.unwrap().id;
    write(middle, 200, 500, 3).await;
    let second = pool.create_snapshot(middle, new_snapshot("second")).await.unwrap().id;
    write(middle, 400, 600, 4).await;
    for (name, from) in [("left", 100), ("right", 450)] {
        let branch = pool.create_clone(second, new_clone(name)).await.unwrap().id;
        write(branch, from, from + 250, 5).await;
    }
}

/// Each deletion is cut short, the engine ends without a checkpoint, and the next one goes on.
#[test]
fn deletion_in_the_middle_at_a_branch_and_at_the_root_frees_what_nothing_else_holds() {
    let mut image = with_pool(|pool| async move {
        chain(&pool).await;
        rest(&pool).await;
        pool.inner.storage.snapshot_image()
    });
    let mut resumed = 0;
    // The middle of the chain, where it branches, its root, and then from all sides.
    let victims = ["first", "second", "root", "middle", "right", "left"];
    for (life, name) in victims.into_iter().enumerate() {
        let session = 2 * life as u128 + 2;
        let (left, cut) = without_worker(image, session, |pool| async move {
            let id = pool.volume(name).unwrap().id;
            pool.measure_exclusive(&[id], u64::MAX).await;
            let exclusive = pool.volume(name).unwrap().exclusive.expect("it was measured");
            let left = pool.info().used_bytes - exclusive.bytes;
            pool.delete_volume(id).await.unwrap();
            pool.eat_something().await.unwrap();
            pool.checkpoint().await.unwrap();
            (left, pool.inner.storage.snapshot_image())
        });
        let rested;
        (rested, image) = with_image(cut, session + 1, |pool| async move {
            let resumed = pool.counters().carcasses_resumed;
            rest(&pool).await;
            assert_sums(&pool).await;
            assert_eq!(pool.info().used_bytes, left, "{name} frees what it alone held");
            (resumed, pool.inner.storage.snapshot_image())
        });
        resumed += rested;
    }
    assert!(resumed >= victims.len() as u64, "some deletion was not cut short");
}

//! Promise P5: freed space goes back to the host, whatever freed it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use plywood::engine::{Memory, Pool};
use plywood::io::{FileStorage, IoMemory};
use plywood::units::VolumeId;
use uuid::Uuid;

use crate::file_pool::{Ending, FilePool, MIB, bytes_of, new_clone, new_snapshot, new_volume, read, write};

const KIB: u64 = 1 << 10;
const POOL_BYTES: u64 = 3 << 30;
const VOLUME_BYTES: u64 = 256 * MIB;
/// Runs of this length and more are given back by themselves, shorter ones by `trim`.
const RUN_BYTES: u64 = 64 * KIB;
/// Ticks without anything given back after which the pool is at rest. They come faster here than once a second, so most of
/// them find the work of an earlier one still going on.
const TICKS_AT_REST: usize = 200;

/// What is freed in units of `unit_bytes`: written and discarded, overwritten in clones, rolled back, shrunk, deleted.
struct Churn {
    random: fastrand::Rng,
    unit_bytes: u64,
    /// Volumes and clones.
    volumes: Vec<VolumeId>,
    snapshots: Vec<VolumeId>,
    met: [u32; 7],
}

impl Churn {
    async fn turn(&mut self, pool: &Pool<FileStorage>) {
        let kind = if self.volumes.len() < 2 { 0 } else { self.random.usize(..14) };
        match kind {
            0 if self.volumes.len() < 8 => {
                self.volumes.push(pool.create_volume(new_volume(&name(), VOLUME_BYTES)).await.expect("created").id);
            }
            1 => {
                let id = pool.create_snapshot(self.volume(), new_snapshot(&name())).await.expect("a snapshot").id;
                self.snapshots.push(id);
                self.met[0] += 1;
            }
            2 if !self.snapshots.is_empty() && self.volumes.len() < 8 => {
                let of = self.snapshots[self.random.usize(..self.snapshots.len())];
                self.volumes.push(pool.create_clone(of, new_clone(&name())).await.expect("a clone").id);
                self.met[1] += 1;
            }
            3 if !self.snapshots.is_empty() => {
                let id = self.snapshots.swap_remove(self.random.usize(..self.snapshots.len()));
                pool.delete_volume(id).await.expect("deleted");
                self.met[2] += 1;
            }
            4 if self.volumes.len() > 3 => {
                let id = self.volumes.swap_remove(self.random.usize(..self.volumes.len()));
                pool.delete_volume(id).await.expect("deleted");
                self.met[3] += 1;
            }
            5 => {
                let (volume, smaller) = (self.volume(), self.random.bool());
                pool.resize_volume(volume, if smaller { VOLUME_BYTES / 4 } else { VOLUME_BYTES })
                    .await
                    .expect("resized");
                self.met[4] += u32::from(smaller);
            }
            6 if !self.snapshots.is_empty() => {
                let of = self.snapshots[self.random.usize(..self.snapshots.len())];
                let volume = self.volume();
                // Of another family it is refused.
                self.met[5] += u32::from(pool.roll_back(volume, of, None).await.is_ok());
            }
            7 | 8 => {
                let handle = pool.open_volume(self.volume(), false).expect("not in use");
                let (at, length) = self.range(handle.size_bytes(), 16 * MIB);
                drop(handle.discard(at, length).await.expect("discarded"));
                self.met[6] += 1;
            }
            _ => {
                let handle = pool.open_volume(self.volume(), false).expect("not in use");
                let (at, length) = self.range(handle.size_bytes(), 8 * MIB);
                let memory = IoMemory::zeroed(length as usize);
                memory.write(0, &vec![self.random.u8(1..); length as usize]);
                drop(handle.write(at, &memory, false).await.expect("there is room"));
            }
        }
    }

    fn volume(&mut self) -> VolumeId {
        self.volumes[self.random.usize(..self.volumes.len())]
    }

    fn range(&mut self, size_bytes: u64, most: u64) -> (u64, u64) {
        let units = size_bytes / self.unit_bytes;
        let count = self.random.u64(1..=(most / self.unit_bytes).min(64));
        let at = self.random.u64(..units - count);
        (at * self.unit_bytes, count * self.unit_bytes)
    }
}

fn name() -> String {
    Uuid::new_v4().to_string()
}

/// Churns, lets the pool come to rest, with `trims` by a trim, and compares what the host has allocated with what is promised.
fn hold_promise(seed: u64, unit_bytes: u64, trims: bool) {
    let file = FilePool::create(POOL_BYTES);
    file.step(Ending::Closed, async |pool| {
        let random = fastrand::Rng::with_seed(seed);
        let mut churn = Churn { random, unit_bytes, volumes: Vec::new(), snapshots: Vec::new(), met: [0; 7] };
        for _ in 0..if trims { 4000 } else { 400 } {
            churn.turn(pool).await;
        }
        assert!(churn.met.iter().all(|count| *count > 0), "{:?}", churn.met);
        let full = allocated(&file);
        for id in churn.snapshots.drain(..).chain(churn.volumes.drain(2..)) {
            pool.delete_volume(id).await.expect("deleted");
        }
        pool.commit().await.expect("a commit");
        pool.settle().await.expect("nothing is left to be eaten");
        pool.checkpoint().await.expect("a checkpoint");
        if trims {
            pool.trim().await.expect("trimmed");
        } else {
            let (mut at_rest, mut punched) = (0, 0);
            while at_rest < TICKS_AT_REST {
                pool.tick();
                // Time goes by.
                pool.checkpoint().await.expect("a checkpoint");
                let now = pool.counters().blocks_punched;
                at_rest = if now == punched { at_rest + 1 } else { 0 };
                punched = now;
            }
        }
        let info = pool.info();
        let (rest, extents) = (allocated(&file), extents(&file));
        let slack = if trims { 16 * MIB } else { 64 * MIB };
        let kept = info.layout_bytes + info.journal_bytes + info.reserve_bytes + slack;
        let promised = info.used_bytes * 102 / 100 + kept;
        println!(
            "{} MiB, then {} MiB, promised {} MiB; {extents} extents; {info:?}",
            full / MIB,
            rest / MIB,
            promised / MIB
        );
        assert!(rest < full / 4 * 3, "little was freed: {full}, then {rest}");
        assert!(rest <= promised, "{rest} bytes stay allocated, {promised} are promised: {info:?}");
        assert!(extents <= rest / RUN_BYTES + 64, "{extents} extents");
    });
}

fn allocated(file: &FilePool) -> u64 {
    fs::metadata(file.path()).expect("the file").blocks() * 512
}

/// How many pieces the host has of the file.
fn extents(file: &FilePool) -> u64 {
    let output = Command::new("filefrag").arg(file.path()).output().expect("filefrag of e2fsprogs");
    let text = String::from_utf8(output.stdout).expect("text");
    let count = text.rsplit_once(": ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    count.unwrap_or_else(|| panic!("filefrag says {text}"))
}

#[test]
fn freed_runs_go_back_to_the_host_by_themselves() {
    hold_promise(1, RUN_BYTES, false);
}

#[test]
fn trim_gives_back_what_is_in_pieces() {
    hold_promise(2, 4 * KIB, true);
}

/// What was given back, in this session or a former one, is prepared before it is written: a first write to a hole costs the
/// host several times as much.
#[test]
fn what_was_given_back_is_prepared_before_it_is_used_again() {
    let file = FilePool::create(POOL_BYTES);
    let fill = async |pool: &Pool<FileStorage>, name: &str, length: u64| {
        let id = pool.create_volume(new_volume(name, VOLUME_BYTES)).await.expect("created").id;
        let handle = pool.open_volume(id, false).expect("a handle");
        for at in (0..VOLUME_BYTES).step_by(length as usize) {
            write(&handle, at, length as usize, at + 1).await.expect("there is room");
        }
        id
    };
    let give_back = async |pool: &Pool<FileStorage>, id| {
        pool.delete_volume(id).await.expect("deleted");
        pool.settle().await.expect("nothing is left to be eaten");
        pool.trim().await.expect("trimmed");
        let (ready, on_host) = (pool.info().ready_bytes, allocated(&file));
        assert!(ready <= 16 * MIB, "{ready} bytes count as ready, the host has {on_host}");
    };
    file.step(Ending::Closed, async |pool| {
        let first = fill(pool, "first", MIB).await;
        give_back(pool, first).await;
        let second = fill(pool, "second", MIB).await;
        assert!(pool.info().ready_bytes > 0);
        give_back(pool, second).await;
    });
    let before = allocated(&file);
    file.step(Ending::Closed, async |pool| {
        let is_written = async |id, length: u64| {
            for at in (0..VOLUME_BYTES).step_by(length as usize) {
                assert!(read(pool, id, at, length as usize).await == bytes_of(at + 1, length as usize), "at {at}");
            }
        };
        let extended = || pool.counters().blocks_extended * 4 * KIB;
        // Short writes go to blocks that the host has written.
        let third = fill(pool, "third", 16 * KIB).await;
        let (bytes, grown) = (extended(), allocated(&file) - before);
        assert!(bytes >= VOLUME_BYTES - 64 * MIB, "{bytes} bytes were prepared, the file has {grown} more");
        is_written(third, 16 * KIB).await;
        // Long ones would have everything written twice.
        let before = extended();
        let fourth = fill(pool, "fourth", MIB).await;
        assert!(extended() - before <= 64 * MIB, "{} bytes were written twice", extended() - before);
        is_written(fourth, MIB).await;
    });
    file.sound();
}

//! Every call that fails: the n-th read, write, durable write, flush, extension or punch, for every n of a workload that
//! does a little of everything. Whatever fails, nothing panics, nothing that was acknowledged as flushed is lost, a
//! failed write of metadata or a failed flush poisons the pool, and what is left opens and checks clean.

use std::collections::BTreeMap;

use plywood::engine::{NewClone, NewSnapshot, NewVolume, PendingLog};
use plywood::error::{Error, Result};
use plywood::io::IoMemory;
use plywood::units::{BLOCK_BYTES, VolumeId};
use uuid::Uuid;

use crate::action::{Call, Fault};
use crate::engine::{Engine, at_once, new_pool};
use crate::log::Log;
use crate::medium::{Left, Medium};
use crate::verify::check;

const MIB: u64 = 1 << 20;

/// What the workload knows to be there: of each block what was acknowledged last, and what was durable for certain.
#[derive(Clone, Default)]
struct Known {
    /// By volume and block: the values it may have, the durable one first.
    blocks: BTreeMap<(Uuid, u64), Vec<u8>>,
    /// Names of volumes whose creation was acknowledged, and those whose deletion was asked for.
    made: BTreeMap<Uuid, VolumeId>,
    deleted: Vec<Uuid>,
    /// Volumes whose rollback was asked for: their content is not followed further.
    lost_track: Vec<Uuid>,
}

/// The workload: goes on whatever fails, as its clients do.
struct Workload<'a> {
    engine: &'a Engine,
    known: Known,
    errors: Vec<Error>,
}

impl Workload<'_> {
    fn note<T>(&mut self, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                self.errors.push(error);
                None
            }
        }
    }

    fn create(&mut self, number: u128, size_bytes: u64) -> Option<(Uuid, VolumeId)> {
        let uuid = Uuid::from_u128(number);
        let new = NewVolume {
            uuid,
            name: format!("v{number}"),
            size_bytes,
            sector_size: 512,
            quota_bytes: 0,
            reservation_bytes: 0,
            created: 0,
            attributes: BTreeMap::from([("key".to_owned(), vec![1; 6000])]),
        };
        let pool = self.engine.pool.clone();
        let made = self.engine.finish(async move { pool.create_volume(new).await });
        let id = self.note(made)?.id;
        self.known.made.insert(uuid, id);
        Some((uuid, id))
    }

    fn share(&mut self, (from, origin): (Uuid, VolumeId), number: u128, clone: bool) -> Option<(Uuid, VolumeId)> {
        let uuid = Uuid::from_u128(number);
        let (pool, name) = (self.engine.pool.clone(), format!("v{number}"));
        let made = self.engine.finish(async move {
            if clone {
                let new = NewClone { uuid, name, created: 0, size_bytes: None, attributes: BTreeMap::new() };
                pool.create_clone(origin, new).await
            } else {
                let new = NewSnapshot { uuid, name, created: 0, attributes: BTreeMap::new() };
                pool.create_snapshot(origin, new).await
            }
        });
        let id = self.note(made)?.id;
        if !clone {
            self.settle(from);
        }
        let blocks: Vec<(u64, Vec<u8>)> = self.blocks_of(from);
        for (block, values) in blocks {
            self.known.blocks.insert((uuid, block), values);
        }
        self.known.made.insert(uuid, id);
        Some((uuid, id))
    }

    fn blocks_of(&self, volume: Uuid) -> Vec<(u64, Vec<u8>)> {
        let blocks = self.known.blocks.iter().filter(|((of, _), _)| *of == volume);
        blocks.map(|((_, block), values)| (*block, values.clone())).collect()
    }

    /// A FLUSH of `volume` was acknowledged: only what was acknowledged last is possible now. (A write that failed may be
    /// there or not; it stays possible.)
    fn settle(&mut self, volume: Uuid) {
        for ((of, _), values) in &mut self.known.blocks {
            if *of == volume
                && let Some(last) = values.iter().rposition(|value| value & 0x80 == 0)
            {
                values.drain(..last);
            }
        }
    }

    /// Values have bit 7 set in `known` when the call that wrote them failed.
    fn change(&mut self, volume: Option<(Uuid, VolumeId)>, block: u64, byte: u8, count: u64) {
        let Some((uuid, id)) = volume else { return };
        let Ok(handle) = self.engine.pool.open_volume(id, false) else { return };
        let done = self.engine.finish(async move {
            if byte == 0 {
                return handle.discard(block * BLOCK_BYTES, count * BLOCK_BYTES).await.map(drop);
            }
            let memory = IoMemory::from_bytes(&vec![byte; (count * BLOCK_BYTES) as usize]);
            handle.write(block * BLOCK_BYTES, &memory, false).await.map(drop)
        });
        let mark = if done.is_ok() { 0 } else { 0x80 };
        for block in block..block + count {
            self.known.blocks.entry((uuid, block)).or_insert_with(|| vec![0]).push(byte | mark);
        }
        self.note(done);
    }

    fn flush(&mut self, volume: Option<(Uuid, VolumeId)>) {
        let Some((uuid, id)) = volume else { return };
        let flushed = self.engine.flush(id);
        if self.note(flushed).is_some() {
            self.settle(uuid);
        }
    }

    fn read(&mut self, volume: Option<(Uuid, VolumeId)>, block: u64) {
        let Some((uuid, id)) = volume else { return };
        let found = self.engine.read(id, block);
        let Some(found) = self.note(found) else { return };
        if self.known.lost_track.contains(&uuid) {
            return;
        }
        let expected = self.known.blocks.get(&(uuid, block)).cloned().unwrap_or_else(|| vec![0]);
        let acknowledged = expected.iter().rposition(|value| value & 0x80 == 0).unwrap_or(0);
        let may = expected[acknowledged..].iter().any(|value| value & 0x7f == found);
        assert!(may, "block {block} of {uuid} reads {found}, expected one of {expected:?}");
    }

    fn checkpoint(&mut self) {
        let done = self.engine.checkpoint();
        self.note(done);
    }

    fn delete(&mut self, volume: Option<(Uuid, VolumeId)>) {
        let Some((uuid, id)) = volume else { return };
        let pool = self.engine.pool.clone();
        self.known.deleted.push(uuid);
        let done = self.engine.finish(async move { pool.delete_volume(id).await });
        self.note(done);
    }

    fn roll_back(&mut self, volume: Option<(Uuid, VolumeId)>, snapshot: Option<(Uuid, VolumeId)>) {
        let (Some((uuid, id)), Some((_, snapshot))) = (volume, snapshot) else { return };
        let pool = self.engine.pool.clone();
        self.known.lost_track.push(uuid);
        let done = self.engine.finish(async move { pool.roll_back(id, snapshot, None).await });
        self.note(done);
    }

    fn tick(&mut self) {
        for _ in 0..4 {
            self.engine.pool.tick();
            for _ in 0..2000 {
                if !self.engine.executor.try_tick() {
                    break;
                }
            }
        }
    }

    fn settle_carcasses(&mut self) {
        let pool = self.engine.pool.clone();
        let done = self.engine.finish(async move { pool.settle().await });
        self.note(done);
    }

    fn run(&mut self) {
        let volume = self.create(1, 80 * MIB);
        for block in 0..40 {
            self.change(volume, block, 1, 1);
        }
        self.change(volume, 1000, 2, 64);
        self.flush(volume);
        let snapshot = volume.and_then(|volume| self.share(volume, 2, false));
        self.change(volume, 3, 3, 2);
        self.change(volume, 500, 4, 1);
        self.checkpoint();
        let clone = snapshot.and_then(|snapshot| self.share(snapshot, 3, true));
        self.change(clone, 0, 5, 8);
        self.change(volume, 0, 6, 1);
        self.flush(clone);
        self.change(volume, 1000, 0, 64);
        self.read(snapshot, 3);
        self.checkpoint();
        self.tick();
        self.engine.pool.drop_caches();
        self.read(volume, 4);
        self.read(clone, 1);
        self.change(clone, 1, 7, 1);
        self.change(volume, 10, 8, 1);
        self.flush(volume);
        self.roll_back(clone, snapshot);
        self.delete(snapshot);
        self.settle_carcasses();
        self.checkpoint();
        self.tick();
        self.change(volume, 2050, 9, 128);
        self.change(volume, 2050, 0, 128);
        self.flush(volume);
        // What a record freed is punched; what a checkpoint counts free is kept for metadata in so small a pool.
        self.tick();
        self.checkpoint();
        self.read(volume, 10);
    }
}

/// What was met over all faults.
#[derive(Debug, Default)]
struct Met {
    faults: u64,
    poisoned: u64,
    refused: u64,
    unnoticed: u64,
}

/// Opens what a fault left and holds it against what is known.
fn judge(left: Left, log: Log, known: &Known, lost_power: bool) -> std::result::Result<(), String> {
    let engine = Engine::open(at_once(left), log).map_err(|error| format!("does not open: {error}"))?;
    check(&engine.executor, &engine.pool)?;
    for (uuid, id) in &known.made {
        let known_of = known.deleted.contains(uuid) || known.lost_track.contains(uuid);
        if !engine.pool.volumes().iter().any(|info| info.uuid == *uuid) {
            if known.deleted.contains(uuid) {
                continue;
            }
            return Err(format!("volume {uuid} is gone"));
        }
        if known_of {
            continue;
        }
        for ((_, block), values) in known.blocks.iter().filter(|((of, _), _)| of == uuid) {
            let found = engine.read(*id, *block).map_err(|error| format!("block {block} of {uuid}: {error}"))?;
            let from = if lost_power { 0 } else { values.iter().rposition(|value| value & 0x80 == 0).unwrap_or(0) };
            if !values[from..].iter().any(|value| value & 0x7f == found) {
                return Err(format!("block {block} of {uuid} holds {found}, expected one of {:?}", &values[from..]));
            }
        }
    }
    Ok(())
}

/// One run of the workload with one fault.
fn run_with(pool: &Left, fault: Fault, met: &mut Met) {
    let medium = at_once(pool.clone());
    medium.fail(fault);
    let log = Log::new(1);
    let told = format!("{fault:?}");
    met.faults += 1;
    let engine = match Engine::open(medium.clone(), log.clone()) {
        Ok(engine) => engine,
        Err(error) => {
            // Opening says what failed; the next try finds all as it was.
            assert!(matches!(error, Error::Io { .. } | Error::NoSpace(_) | Error::Poisoned(_)), "{told}: {error}");
            met.refused += 1;
            judge(medium.power_cut_keeping(|_| true), Log::new(2), &Known::default(), true)
                .unwrap_or_else(|error| panic!("{told}: {error}"));
            return;
        }
    };
    let mut workload = Workload { engine: &engine, known: Known::default(), errors: Vec::new() };
    workload.run();
    let Workload { known, errors, .. } = workload;
    let poisoned = engine.pool.info().poisoned;
    for error in &errors {
        let fits = match error {
            Error::Io { .. } | Error::Busy(_) | Error::NotFound(_) => true,
            Error::NoSpace(_) => fault.errno == libc::ENOSPC,
            Error::Poisoned(_) => poisoned.is_some(),
            _ => false,
        };
        assert!(fits, "{told}: unexpected error {error:?}");
    }
    met.poisoned += u64::from(poisoned.is_some());
    met.unnoticed += u64::from(errors.is_empty() && poisoned.is_none());
    if matches!(fault.call, Call::Flush | Call::WriteDurable) {
        assert!(poisoned.is_some(), "{told}: not poisoned");
    }
    if matches!(fault.call, Call::Punch | Call::Extend) {
        assert!(poisoned.is_none(), "{told}: poisoned though nothing of the pool's state failed: {poisoned:?}");
    }
    if poisoned.is_some() {
        assert!(log.is_poisoned(), "{told}: a successor would go on");
        let volume = known.made.iter().find(|(uuid, _)| !known.deleted.contains(uuid));
        if let Some((_, id)) = volume {
            let refused = engine.write(*id, 0, 1);
            assert!(matches!(refused, Err(Error::Poisoned(_)) | Err(Error::ReadOnly(_))), "{told}: {refused:?}");
            // Reads go on.
            if fault.call != Call::Read {
                engine.read(*id, 0).unwrap_or_else(|error| panic!("{told}: read of a poisoned pool: {error}"));
            }
        }
    }
    let successor = log.copy();
    let (all, none) = (medium.power_cut_keeping(|_| true), medium.power_cut_keeping(|_| false));
    drop(engine);
    if poisoned.is_some() {
        let refused = Engine::open(at_once(all.clone()), successor).err();
        assert!(matches!(refused, Some(Error::Poisoned(_))), "{told}: the successor goes on: {refused:?}");
    } else {
        judge(all.clone(), successor, &known, false).unwrap_or_else(|error| panic!("{told}, after a death: {error}"));
    }
    for (what, left) in [("all", all), ("nothing", none)] {
        judge(left, Log::new(3), &known, true)
            .unwrap_or_else(|error| panic!("{told}, power lost with {what} of the cache kept: {error}"));
    }
}

fn count_calls(pool: &Left) -> Medium {
    let medium = at_once(pool.clone());
    let engine = Engine::open(medium.clone(), Log::new(1)).expect("open");
    let mut workload = Workload { engine: &engine, known: Known::default(), errors: Vec::new() };
    workload.run();
    assert!(workload.errors.is_empty(), "without a fault: {:?}", workload.errors);
    medium
}

/// Fails each call of one kind in turn.
fn sweep(call: Call, errors: &[(i32, bool)]) {
    let pool = new_pool();
    let calls = count_calls(&pool).calls(call);
    assert!(calls > 0, "the workload makes no {call:?}");
    let mut met = Met::default();
    for number in 0..calls {
        for (errno, in_part) in errors.iter().copied() {
            run_with(&pool, Fault { call, number, errno, in_part }, &mut met);
        }
    }
    println!("{calls} calls of {call:?}: {met:?}");
    assert!(met.faults == calls * errors.len() as u64);
}

#[test]
fn failed_read_is_told_and_loses_nothing() {
    sweep(Call::Read, &[(libc::EIO, false)]);
}

#[test]
fn failed_or_short_write_is_told_and_loses_nothing() {
    sweep(Call::Write, &[(libc::EIO, false), (libc::EIO, true), (libc::ENOSPC, false)]);
}

#[test]
fn failed_or_short_durable_write_poisons_and_loses_nothing() {
    sweep(Call::WriteDurable, &[(libc::EIO, false), (libc::EIO, true), (libc::ENOSPC, false)]);
}

#[test]
fn failed_flush_poisons_and_loses_nothing_acknowledged() {
    sweep(Call::Flush, &[(libc::EIO, false)]);
}

#[test]
fn refused_extension_is_told_and_loses_nothing() {
    sweep(Call::Extend, &[(libc::ENOSPC, false), (libc::EIO, false)]);
}

#[test]
fn failed_punch_costs_space_only() {
    sweep(Call::Punch, &[(libc::EIO, false), (libc::EOPNOTSUPP, false)]);
}

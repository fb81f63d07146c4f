//! Opening what a crash left, and judging it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use async_executor::LocalExecutor;
use fastrand::Rng;
use plywood::engine::{Memory, OpenOptions, PendingLog, Pool, VolumeInfo};
use plywood::io::IoMemory;
use uuid::Uuid;

use crate::content::{SECTOR, SECTORS, Sectors, parse_block};
use crate::log::Log;
use crate::medium::{Left, Medium};
use crate::met::Met;
use crate::model::{BALLAST_BYTES, Block, Control, Hold, Model, Volume, rolled_back};
use crate::request::{Request, carry_out};
use crate::seals::verify_seals;
use crate::task::Panicked;

const BLOCK_BYTES: u64 = SECTOR * SECTORS;
/// Blocks read at a time.
const READ_BLOCKS: u64 = 64;
/// Rounds without progress after which an engine is taken to be stuck.
const PATIENCE: u32 = 100;
/// Ticks after which it is, too: each wakes tasks that look and wait again. The slowest sealing takes thousands.
const TICKS: u32 = 1_000_000;

/// How an engine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    PowerCut,
    ProcessDeath,
}

/// What every opening of a world's pool has in common.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub alignment: usize,
    pub journal_bytes: u64,
    pub cache_bytes: usize,
}

/// What a crash left, to be opened.
#[derive(Clone)]
pub struct Remains {
    pub image: Left,
    pub log: Log,
    /// What the front sends again.
    pub unanswered: BTreeMap<u64, Request>,
    /// Whether power was lost since the model's last certainty.
    pub lost_power: bool,
}

/// Runs `future` on `executor` until it is done. None when the medium stopped answering.
pub fn run<T: 'static>(
    executor: &LocalExecutor<'static>,
    pool: impl Fn() -> Option<Pool<Medium>>,
    future: impl Future<Output = T> + 'static,
) -> Option<T> {
    let result: Rc<RefCell<Option<T>>> = Rc::default();
    let slot = Rc::clone(&result);
    let panicked = Panicked::default();
    panicked.spawn(executor, async move {
        let value = future.await;
        *slot.borrow_mut() = Some(value);
    });
    let (mut idle, mut ticks) = (0, 0);
    while result.borrow().is_none() {
        panicked.check().unwrap_or_else(|error| panic!("{error}"));
        if executor.try_tick() {
            idle = 0;
            continue;
        }
        idle += 1;
        if let Some(pool) = pool() {
            pool.tick();
            ticks += 1;
        }
        if idle > PATIENCE || ticks > TICKS {
            return None;
        }
    }
    result.take()
}

/// Blocks that hold data, ascending.
pub type Blocks = Vec<(u64, Sectors)>;

/// What was found in a pool.
pub struct Observed {
    pub volumes: BTreeMap<Uuid, (VolumeInfo, Blocks)>,
}

/// Opens what a crash left and holds it against the model; now and then with another crash while it is being opened.
///
/// # Errors
/// What is wrong with it.
pub fn verify(
    remains: &Remains,
    setting: Setting,
    model: &Model,
    random: &mut Rng,
    met: &mut Met,
) -> Result<(), String> {
    let mut remains = remains.clone();
    let mut depth = 0;
    loop {
        // Only now is it known how many operations opening takes, so the one that is interrupted comes second.
        let begun = verify_once(&remains, setting, model, random, met)?;
        depth += 1;
        if depth > 2 || random.u32(..4) != 0 || begun == 0 {
            return Ok(());
        }
        remains = interrupt(&remains, setting, random.u64(..begun), random);
        met.replays_interrupted += 1;
    }
}

/// Opens and has the medium stop after `stop_after` operations; answers what that leaves.
fn interrupt(remains: &Remains, setting: Setting, stop_after: u64, random: &mut Rng) -> Remains {
    let log = remains.log.copy();
    let medium =
        Medium::at_once(remains.image.clone(), random.u64(..), setting.alignment, setting.journal_bytes, stop_after);
    let executor = LocalExecutor::new();
    let (storage, opened) = (medium.clone(), log.clone());
    let options = OpenOptions { cache_bytes: setting.cache_bytes };
    let pool = run(&executor, || None, async move { Pool::open(storage, Box::new(opened), options).await.ok() });
    drop(pool);
    drop(executor);
    if random.bool() {
        let session = random.u128(..);
        let image = medium.power_cut(random);
        Remains { image, log: Log::new(session), lost_power: true, unanswered: BTreeMap::new() }
    } else {
        let image = medium.process_death(random);
        Remains { image, log, lost_power: remains.lost_power, unanswered: remains.unanswered.clone() }
    }
}

fn verify_once(
    remains: &Remains,
    setting: Setting,
    model: &Model,
    random: &mut Rng,
    met: &mut Met,
) -> Result<u64, String> {
    let log = remains.log.copy();
    let medium =
        Medium::at_once(remains.image.clone(), random.u64(..), setting.alignment, setting.journal_bytes, u64::MAX);
    let executor = LocalExecutor::new();
    let (storage, options) = (medium.clone(), OpenOptions { cache_bytes: setting.cache_bytes });
    let pool = run(&executor, || None, async move { Pool::open(storage, Box::new(log), options).await })
        .ok_or("opening is stuck")?
        .map_err(|error| format!("the pool does not open: {error}"))?;
    let begun = medium.begun();
    met.states += 1;
    met.opened(&pool);
    let background = pool.clone();
    let panicked = Panicked::default();
    panicked.spawn(&executor, async move { background.run().await });
    if !remains.lost_power {
        send_again(&executor, &pool, &remains.unanswered)?;
    }
    let observed = observe(&executor, &pool)?;
    accept(model, &observed, remains.lost_power)?;
    verify_sealed(&executor, &pool)?;
    check(&executor, &pool)?;
    panicked.check()?;
    if random.u32(..12) == 0 {
        verify_seals(&executor, &pool, &medium, &observed, random, met)?;
        panicked.check()?;
    } else if random.u32(..4) == 0 {
        // What was seen once stays, over an orderly end too.
        let closing = pool.clone();
        run(&executor, || Some(pool.clone()), async move { closing.close().await })
            .ok_or("closing is stuck")?
            .map_err(|error| format!("close: {error}"))?;
        drop(pool);
        let executor = LocalExecutor::new();
        let (storage, options) = (medium.clone(), OpenOptions { cache_bytes: setting.cache_bytes });
        let log = Log::new(random.u128(..));
        let pool = run(&executor, || None, async move { Pool::open(storage, Box::new(log), options).await })
            .ok_or("opening is stuck")?
            .map_err(|error| format!("the pool does not open after an orderly end: {error}"))?;
        let again = observe(&executor, &pool)?;
        if again.volumes.len() != observed.volumes.len()
            || again
                .volumes
                .iter()
                .any(|(uuid, (_, blocks))| observed.volumes.get(uuid).is_none_or(|(_, before)| *blocks != *before))
        {
            return Err("volumes changed over closing and opening".to_owned());
        }
    }
    Ok(begun)
}

/// Sends those requests again that had been carried out and were not answered: it must change nothing.
fn send_again(
    executor: &LocalExecutor<'static>,
    pool: &Pool<Medium>,
    unanswered: &BTreeMap<u64, Request>,
) -> Result<(), String> {
    for (number, request) in unanswered.iter().filter(|(_, request)| request.is_done_apart(unanswered)) {
        let Some(info) = pool.volumes().into_iter().find(|info| info.uuid == request.volume) else { continue };
        let handle = pool.open_volume(info.id, false).map_err(|error| error.to_string())?;
        let done = run(executor, || Some(pool.clone()), carry_out(handle, *number, *request));
        match done.ok_or("a request sent again is stuck")? {
            Ok(_) | Err(plywood::error::Error::NoSpace(_)) => {}
            Err(error) => return Err(format!("sent again: {request:?}: {error}")),
        }
    }
    Ok(())
}

/// How often a check may be given up because the pool is full.
const CHECKS: u32 = 20;

/// Has the carcasses eaten and the counts compared.
pub fn check(executor: &LocalExecutor<'static>, pool: &Pool<Medium>) -> Result<(), String> {
    let checked = pool.clone();
    let report = run(executor, || Some(pool.clone()), async move {
        let mut attempts = 0;
        loop {
            checked.settle().await?;
            match checked.check().await {
                // A full pool comes first: it took the blocks back that the check needs as they were.
                Err(plywood::error::Error::Busy(_)) if attempts < CHECKS => attempts += 1,
                checked => return checked,
            }
        }
    })
    .ok_or("settling is stuck")?
    .map_err(|error| format!("check: {error}"))?;
    if report.is_clean() {
        return Ok(());
    }
    let faults: Vec<String> = report.faults.iter().take(8).map(ToString::to_string).collect();
    Err(format!("{} faults: {}", report.fault_count, faults.join("; ")))
}

/// Holds every sealed snapshot against its checksums and its digest.
fn verify_sealed(executor: &LocalExecutor<'static>, pool: &Pool<Medium>) -> Result<(), String> {
    let verified = pool.clone();
    let sealed: Vec<VolumeInfo> = pool.volumes().into_iter().filter(|info| info.sealed).collect();
    run(executor, || Some(pool.clone()), async move {
        for info in sealed {
            verified.verify_sealed(info.id).await.map_err(|error| format!("{}: {error}", info.name))?;
        }
        Ok(())
    })
    .ok_or("verifying is stuck")?
}

/// Reads everything that is mapped.
pub fn observe(executor: &LocalExecutor<'static>, pool: &Pool<Medium>) -> Result<Observed, String> {
    let reader = pool.clone();
    run(executor, || Some(pool.clone()), async move {
        let mut volumes = BTreeMap::new();
        for info in reader.volumes() {
            let blocks = read_volume(&reader, &info).await.map_err(|error| format!("{}: {error}", info.name))?;
            volumes.insert(info.uuid, (info, blocks));
        }
        Ok(Observed { volumes })
    })
    .ok_or("reading is stuck")?
}

async fn read_volume(pool: &Pool<Medium>, info: &VolumeInfo) -> Result<Blocks, String> {
    let mut blocks = Vec::new();
    if info.size_bytes == BALLAST_BYTES {
        return Ok(blocks);
    }
    let handle = pool.open_volume(info.id, true).map_err(|error| error.to_string())?;
    let room = IoMemory::zeroed((READ_BLOCKS * BLOCK_BYTES) as usize);
    let mut bytes = [0; BLOCK_BYTES as usize];
    let mut at = 0;
    while at < info.size_bytes {
        let Some(data) = handle.seek(at, true).await.map_err(|error| error.to_string())? else { break };
        let end = handle.seek(data, false).await.map_err(|error| error.to_string())?.unwrap_or(info.size_bytes);
        let mut from = data;
        while from < end {
            let length = (end - from).min(READ_BLOCKS * BLOCK_BYTES);
            let memory = room.slice(0..length as usize);
            memory.zero(0..memory.len());
            handle.read(from, &memory).await.map_err(|error| error.to_string())?;
            for number in from / BLOCK_BYTES..(from + length) / BLOCK_BYTES {
                memory.read((number * BLOCK_BYTES - from) as usize, &mut bytes);
                blocks.push((number, parse_block(&bytes, number)?));
            }
            from += length;
        }
        at = end;
    }
    Ok(blocks)
}

/// Holds what was found against the model, and answers the model that it settles.
///
/// # Errors
/// What is not a good outcome.
pub fn judge(model: &Model, observed: &Observed, lost_power: bool) -> Result<Model, String> {
    let mut settled = Model::default();
    settled.continue_from(model);
    for (volume, info, blocks) in accept(model, observed, lost_power)? {
        settled.volumes.insert(volume.uuid, settle(model, volume.into_owned(), info, blocks));
    }
    Ok(settled)
}

/// The state of a volume that explains what was found in it.
type Accepted<'a> = (Cow<'a, Volume>, &'a VolumeInfo, &'a Blocks);

/// Holds what was found against the model, and answers of each volume which of its possible states it is in.
///
/// # Errors
/// What is not a good outcome.
fn accept<'a>(model: &'a Model, observed: &'a Observed, lost_power: bool) -> Result<Vec<Accepted<'a>>, String> {
    let mut all = Vec::new();
    let gone = |uuid: Uuid| {
        model.controls.values().any(|control| matches!(control, Control::Delete(deleted) if *deleted == uuid))
    };
    for volume in model.volumes.values() {
        let Some((info, blocks)) = observed.volumes.get(&volume.uuid) else {
            if gone(volume.uuid) {
                continue;
            }
            return Err(format!("{} is gone", volume.name));
        };
        let mut wrong = Vec::new();
        let accepted =
            candidates(model, volume).find_map(|candidate| match fits(model, &candidate, info, blocks, lost_power) {
                Ok(()) => Some(candidate),
                Err(error) => {
                    wrong.push(error);
                    None
                }
            });
        let Some(accepted) = accepted else { return Err(wrong.join("; or: ")) };
        all.push((accepted, info, blocks));
    }
    for (uuid, (info, blocks)) in &observed.volumes {
        if model.volumes.contains_key(uuid) {
            continue;
        }
        let Some(volume) = being_made(model, *uuid) else {
            return Err(format!("{} is there, and nobody made it, or it was deleted", info.name));
        };
        fits(model, &volume, info, blocks, lost_power)?;
        all.push((Cow::Owned(volume), info, blocks));
    }
    Ok(all)
}

/// The states that calls in flight may have given a volume.
fn candidates<'a>(model: &'a Model, volume: &'a Volume) -> impl Iterator<Item = Cow<'a, Volume>> {
    let changed = model.controls.values().filter_map(|control| match control {
        Control::RollBack { volume: rolled, snapshot, .. } if *rolled == volume.uuid => {
            let source = model.volumes.get(snapshot)?;
            let mut after = volume.clone();
            rolled_back(&mut after, source);
            Some(after)
        }
        Control::Resize { volume: resized, size_bytes } if *resized == volume.uuid => {
            let mut after = volume.clone();
            after.truncate(*size_bytes);
            Some(after)
        }
        Control::Reserve { volume: reserved, reservation_bytes } if *reserved == volume.uuid => {
            Some(Volume { reservation_bytes: *reservation_bytes, ..volume.clone() })
        }
        Control::Rename { volume: renamed, name } if *renamed == volume.uuid => {
            Some(Volume { name: name.clone(), ..volume.clone() })
        }
        _ => None,
    });
    std::iter::once(Cow::Borrowed(volume)).chain(changed.map(Cow::Owned))
}

/// A volume that a call in flight may have made.
fn being_made(model: &Model, uuid: Uuid) -> Option<Volume> {
    model.controls.values().find_map(|control| match control {
        Control::Create(volume) | Control::Clone(volume) if volume.uuid == uuid => Some(volume.clone()),
        Control::Snapshot { observer, volume } | Control::RollBack { keep: Some((observer, volume)), .. }
            if volume.uuid == uuid =>
        {
            Some(Volume { blocks: model.observed(*observer), ..volume.clone() })
        }
        _ => None,
    })
}

fn fits(model: &Model, volume: &Volume, info: &VolumeInfo, blocks: &Blocks, lost_power: bool) -> Result<(), String> {
    let expected = (&volume.name, volume.size_bytes, volume.reservation_bytes, volume.sector_size, volume.read_only);
    let found = (&info.name, info.size_bytes, info.reservation_bytes, info.sector_size, info.read_only);
    if expected != found {
        return Err(format!("{found:?} is there, expected {expected:?}"));
    }
    if volume.digest.is_some() && (volume.digest != info.digest || !info.sealed) {
        return Err(format!("{} was sealed, and is not any more", volume.name));
    }
    for (number, known, found) in beside(&volume.blocks, blocks) {
        let found = found.copied().unwrap_or_default();
        if !model.allows(volume, number, known, &found, lost_power) {
            return Err(format!(
                "{} (id {}), block {number}: found {found:?}, expected {}",
                volume.name,
                info.id,
                model.expectation(volume, number)
            ));
        }
    }
    Ok(())
}

/// Every block that the model or the pool knows, once: its number, what the model knows of it, what was found.
fn beside<'a>(
    known: &'a BTreeMap<u64, Block>,
    found: &'a Blocks,
) -> impl Iterator<Item = (u64, Option<&'a Block>, Option<&'a Sectors>)> {
    let (mut known, mut found) = (known.iter().peekable(), found.iter().peekable());
    std::iter::from_fn(move || {
        let next = [known.peek().map(|(number, _)| **number), found.peek().map(|(number, _)| *number)];
        let number = next.into_iter().flatten().min()?;
        let block = known.next_if(|(known, _)| **known == number).map(|(_, block)| block);
        let sectors = found.next_if(|(found, _)| *found == number).map(|(_, sectors)| sectors);
        Some((number, block, sectors))
    })
}

fn settle(model: &Model, volume: Volume, info: &VolumeInfo, found: &Blocks) -> Volume {
    let mut blocks = BTreeMap::new();
    for (number, before, sectors) in beside(&volume.blocks, found) {
        let quiet = before.is_some_and(Block::is_quiet) && !model.is_in_flight(volume.uuid, number);
        let hold = match before {
            _ if sectors.is_none() => Hold::Hole,
            Some(block) if quiet && block.hold != Hold::Hole => block.hold,
            _ => Hold::Unknown,
        };
        blocks.insert(number, Block::settled(sectors.copied().unwrap_or_default(), hold));
    }
    Volume { id: info.id, blocks, digest: info.digest, ..volume.quiet() }
}

/// What a successor's log must be after the loss of power.
pub fn log_after(crash: Crash, log: &Log, random: &mut Rng) -> Log {
    match crash {
        Crash::PowerCut => Log::new(random.u128(..)),
        Crash::ProcessDeath => {
            debug_assert!(!log.is_poisoned());
            log.clone()
        }
    }
}

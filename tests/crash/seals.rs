//! Sealed snapshots after a crash: what is called sealed has a checksum for every block, the digest is that of the content,
//! and damage is never read as data.

use async_executor::LocalExecutor;
use fastrand::Rng;
use plywood::engine::{Memory, Pace, Pool, VolumeInfo};
use plywood::error::Error;
use plywood::format::DigestState;
use plywood::io::IoMemory;
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, VirtualBlock, VolumeId};

use crate::content::{Sectors, fill_block, parse_block};
use crate::medium::Medium;
use crate::met::Met;
use crate::verify::{Blocks, Observed, run};

/// Holds what a crash left of seals against what was `observed`; now and then also seals what is not sealed, and damages
/// all data at the end. Nothing may be asked of the pool afterwards.
///
/// # Errors
/// What is wrong.
pub fn verify_seals(
    executor: &LocalExecutor<'static>,
    pool: &Pool<Medium>,
    medium: &Medium,
    observed: &Observed,
    random: &mut Rng,
    met: &mut Met,
) -> Result<(), String> {
    if random.bool() {
        for info in pool.volumes().iter().filter(|info| info.read_only) {
            seal(executor, pool, info)?;
        }
    }
    let sealed: Vec<VolumeInfo> = pool.volumes().into_iter().filter(|info| info.sealed).collect();
    for info in &sealed {
        let Some((_, blocks)) = observed.volumes.get(&info.uuid) else { continue };
        if info.digest != Some(digest(info, blocks)) {
            return Err(format!("{} is sealed, and its digest is not that of its content", info.name));
        }
        met.digests += 1;
    }
    let verified = pool.clone();
    match run(executor, || Some(pool.clone()), async move { verified.verify_pool_on_read(true).await }) {
        None => return Err("a checkpoint is stuck".to_owned()),
        Some(outcome) => outcome.map_err(|error| format!("checkpoint: {error}"))?,
    }
    medium.damage_data(random);
    for info in &sealed {
        let Some((_, blocks)) = observed.volumes.get(&info.uuid) else { continue };
        for (number, content) in blocks {
            if read_damaged(executor, pool, info.id, *number, content)? {
                met.damage_found += 1;
            }
        }
    }
    Ok(())
}

fn seal(executor: &LocalExecutor<'static>, pool: &Pool<Medium>, info: &VolumeInfo) -> Result<(), String> {
    let (sealing, id) = (pool.clone(), info.id);
    let outcome = run(executor, || Some(pool.clone()), async move { sealing.seal(id, Pace::Full).await });
    match outcome.ok_or("sealing is stuck")? {
        Ok(_) | Err(Error::NoSpace(_)) => Ok(()),
        Err(error) => Err(format!("{} cannot be sealed: {error}", info.name)),
    }
}

fn digest(info: &VolumeInfo, blocks: &Blocks) -> [u8; 32] {
    let mut state = DigestState::default();
    for (number, content) in blocks {
        state.add(VirtualBlock(*number), &fill_block(content, *number));
    }
    state.digest(info.size_bytes)
}

/// Reads a block of a sealed snapshot where the medium lies. Answers whether that was noticed; zeros were not damaged.
fn read_damaged(
    executor: &LocalExecutor<'static>,
    pool: &Pool<Medium>,
    id: VolumeId,
    number: u64,
    content: &Sectors,
) -> Result<bool, String> {
    let handle = pool.open_volume(id, true).map_err(|error| error.to_string())?;
    let memory = IoMemory::zeroed(BLOCK_SIZE);
    let into = memory.clone();
    let outcome = run(executor, || Some(pool.clone()), async move { handle.read(number * BLOCK_BYTES, &into).await });
    match outcome.ok_or("reading is stuck")? {
        Err(Error::Corrupt(_)) => Ok(true),
        Err(error) => Err(format!("a damaged block is {error}")),
        Ok(()) => {
            let mut bytes = [0; BLOCK_SIZE];
            memory.read(0, &mut bytes);
            match parse_block(&bytes, number) {
                Ok(found) if found == *content => Ok(false),
                _ => Err(format!("sealed snapshot {id}: damage in block {number} was read as data")),
            }
        }
    }
}

//! A scrub, as it is asked for: step by step, so that whoever asks sets the pace and shows how far it is.

use super::execute::now_ns;
use super::protocol::{Check, Damaged, Reply, Scrub, ScrubStatus};
use crate::engine::{Pool, Storage};
use crate::error::{self, Corrupt, Error, Result, Structure};
use crate::units::{BLOCK_BYTES, PoolBlock};

/// Most damaged blocks that are looked for at a time.
const DAMAGED_MAX: usize = 1000;
/// Most blocks of one step: 256 MiB.
const BLOCKS_MAX: u64 = 1 << 16;

/// Checks the metadata, and begins anew with the data.
pub(super) async fn begin<S: Storage>(pool: &Pool<S>) -> Result<Reply> {
    let found = pool.scrub_metadata(now_ns()).await?;
    let check = Some(Check::from(found.report));
    let position_bytes = pool.scrub_state().next.offset_bytes();
    let end_bytes = pool.info().size_bytes;
    Ok(Reply::Scrub(Box::new(Scrub {
        check,
        mended: found.mended,
        position_bytes,
        end_bytes,
        more: true,
        ..Scrub::default()
    })))
}

/// Reads on.
pub(super) async fn step<S: Storage>(pool: &Pool<S>, blocks: u64) -> Result<Reply> {
    let found = pool.scrub_data(blocks.clamp(1, BLOCKS_MAX), now_ns()).await?;
    Ok(Reply::Scrub(Box::new(Scrub {
        blocks: found.blocks,
        damaged: found.damaged.iter().map(told).collect(),
        damaged_count: found.damaged_count,
        position_bytes: found.next.unwrap_or(found.end).offset_bytes(),
        end_bytes: found.end.offset_bytes(),
        more: found.next.is_some(),
        ..Scrub::default()
    })))
}

/// Finds what damaged blocks touch.
pub(super) async fn touched<S: Storage>(pool: &Pool<S>, damaged: Vec<Damaged>) -> Result<Reply> {
    if damaged.len() > DAMAGED_MAX {
        return Err(Error::InvalidInput(format!("{} damaged blocks; at most {DAMAGED_MAX} at a time", damaged.len())));
    }
    let faults = pool.touched_by(damaged.into_iter().map(heard).collect()).await?;
    Ok(Reply::Faults(faults.into_iter().map(Into::into).collect()))
}

/// Where scrubbing stands.
pub(super) fn status<S: Storage>(pool: &Pool<S>) -> Option<ScrubStatus> {
    let state = pool.scrub_state();
    (state.begun > 0).then(|| ScrubStatus {
        under_way: state.next.0 > 0,
        position_bytes: state.next.0 * BLOCK_BYTES,
        fault_count: state.faults,
        begun_ns: state.begun,
        ended_ns: state.ended,
    })
}

fn told(damage: &Corrupt) -> Damaged {
    let (expected, found) = match &damage.check {
        error::Check::Checksum { expected, found } => (*expected, Some(*found)),
        _ => (0, None),
    };
    let reason = damage.check.to_string();
    Damaged { block: damage.address.0, expected, found, reason }
}

fn heard(damaged: Damaged) -> Corrupt {
    let check = match damaged.found {
        Some(found) => error::Check::Checksum { expected: damaged.expected, found },
        None => error::Check::Unreadable(damaged.reason),
    };
    Corrupt { structure: Structure::Data, address: PoolBlock(damaged.block), check }
}

//! The superblock around work on a pool's metadata: before anything that the present one may still lead to is written
//! over, copies of the slot that is not current say what was begun; the new superblock takes their place at the end.
//!
//! All copies are written one after the other, each durable before the next: at any instant at most one is torn, and one
//! says what the pool is.

use super::Writer;
use crate::engine::Storage;
use crate::engine::pool::read_bytes;
use crate::error::Result;
use crate::format::{SUPERBLOCK_COPIES, Slot, Superblock, Unfinished};
use crate::units::BLOCK_SIZE;

/// Says in `slot`, which is not that of `current`, that `what` was begun. After that `current` is the pool's only one: what
/// its own slot has of other work cut short is written over with it, or with nothing where there is no current one.
/// `described` is any superblock of the pool.
pub(in crate::engine) async fn begin_unfinished<S: Storage>(
    storage: &S,
    writer: &mut Writer<'_, S>,
    described: &Superblock,
    current: Option<&Superblock>,
    slot: Slot,
    what: Unfinished,
) -> Result<()> {
    let mark = Superblock { incompatible: what.feature(), ..described.clone() };
    for address in SUPERBLOCK_COPIES[slot.index()] {
        writer.put_durable(address, &mark.encode()).await?;
    }
    let instead = current.map_or([0; BLOCK_SIZE], Superblock::encode);
    for address in SUPERBLOCK_COPIES[slot.other().index()] {
        let Ok(found) = read_bytes(storage, address, 1).await else { continue };
        let is_contradiction = current.is_none() && Superblock::decode(&found).is_ok();
        if is_contradiction || Superblock::decode_unfinished(&found).is_some() {
            writer.put_durable(address, &instead).await?;
        }
    }
    Ok(())
}

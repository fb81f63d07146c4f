//! The four copies of the superblock, and which of them counts.

use super::fault::Faults;
use crate::engine::Storage;
use crate::engine::pool::read_bytes;
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{SUPERBLOCK_COPIES, Slot, Superblock, choose_superblock};
use crate::units::BLOCK_BYTES;

/// Reads all copies and chooses. Of the slot that counts, a copy that is damaged is a fault; an older one is what a crash
/// between the two leaves. The other slot holds whatever the last checkpoint but one, or one that was cut short, left.
pub(in crate::engine) async fn read_superblocks<S: Storage>(
    storage: &S,
    faults: &mut Faults,
) -> Result<(Superblock, Slot)> {
    let mut copies = Vec::new();
    for address in SUPERBLOCK_COPIES.into_iter().flatten() {
        if storage.size_bytes() < (address.0 + 1) * BLOCK_BYTES {
            return Err(Error::InvalidInput("not a plywood pool: it is too small".into()));
        }
        copies.push(match read_bytes(storage, address, 1).await {
            Ok(bytes) => Superblock::decode(&bytes).map_err(|error| match error {
                Error::Corrupt(found) => Corrupt { address, ..found }.into(),
                error => error,
            }),
            Err(error) => Err(error),
        });
    }
    let mut copies = copies.into_iter();
    let mut next = || copies.next().unwrap_or_else(|| Err(Error::InvalidInput("not read".into())));
    let copies = [[next(), next()], [next(), next()]];
    let bad = copies.clone().map(|slot| slot.map(Result::err));
    let (superblock, slot, _) = choose_superblock(copies)?;
    for (copy, address) in bad[slot.index()].iter().zip(SUPERBLOCK_COPIES[slot.index()]) {
        let check = match copy {
            None => continue,
            Some(Error::Corrupt(found)) => found.check.clone(),
            Some(error) => Check::Unreadable(error.to_string()),
        };
        faults.add_found(Corrupt { structure: Structure::Superblock, address, check }, true, None);
    }
    Ok((superblock, slot))
}

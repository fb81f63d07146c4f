//! The four copies of the superblock, and which of them counts.

use super::fault::Faults;
use crate::engine::Storage;
use crate::engine::pool::read_bytes;
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{ChosenSuperblock, SUPERBLOCK_COPIES, Slot, Superblock, Unfinished, choose_superblock};
use crate::units::{BLOCK_BYTES, Generation};
use uuid::Uuid;

type Copies = [[Result<Superblock>; 2]; 2];

/// What the copies say when those that stand for work cut short are passed over.
pub(in crate::engine) struct Passed {
    /// The superblock that counts and its slot, or why there is none.
    pub(in crate::engine) chosen: Result<(Superblock, Slot)>,
    /// The work that was cut short, if any was.
    pub(in crate::engine) unfinished: Option<Unfinished>,
    /// Pools that any copy names, those passed over among them.
    pub(in crate::engine) pools: Vec<Uuid>,
    /// The highest generation of any copy.
    pub(in crate::engine) newest: Generation,
}

/// Reads all copies and chooses. Of the slot that counts, a copy that is damaged is a fault; an older one is what a crash
/// between the two leaves. The other slot holds whatever the last checkpoint but one, or one that was cut short, left.
pub(in crate::engine) async fn read_superblocks<S: Storage>(
    storage: &S,
    faults: &mut Faults,
) -> Result<(Superblock, Slot)> {
    choose(read_copies(storage).await?.0, faults)
}

/// Reads all copies and chooses among those that stand for no work cut short.
pub(in crate::engine) async fn pass_unfinished<S: Storage>(storage: &S, faults: &mut Faults) -> Result<Passed> {
    let (mut copies, marks) = read_copies(storage).await?;
    let mut unfinished = None;
    let (mut pools, mut newest) = (Vec::new(), Generation(0));
    for (copies, (marks, addresses)) in copies.iter_mut().zip(marks.iter().zip(SUPERBLOCK_COPIES)) {
        for (copy, (mark, address)) in copies.iter_mut().zip(marks.iter().zip(addresses)) {
            if let Some((what, _)) = mark {
                unfinished = unfinished.or(Some(*what));
                *copy = Err(Corrupt { structure: Structure::Superblock, address, check: UNFINISHED }.into());
            }
            let named = copy.as_ref().ok().or(mark.as_ref().map(|(_, superblock)| superblock));
            pools.extend(named.map(|superblock| superblock.uuid));
            newest = newest.max(named.map_or(Generation(0), |superblock| superblock.generation));
        }
    }
    Ok(Passed { chosen: choose(copies, faults), unfinished, pools, newest })
}

/// A copy that stands for work cut short.
pub(in crate::engine) const UNFINISHED: Check = Check::Inconsistent("what was begun on the pool was not finished");

type Marks = [[Option<(Unfinished, Superblock)>; 2]; 2];

async fn read_copies<S: Storage>(storage: &S) -> Result<(Copies, Marks)> {
    let unread = || Err(Error::InvalidInput("not read".into()));
    let mut copies = [[unread(), unread()], [unread(), unread()]];
    let mut marks = Marks::default();
    for ((copies, marks), addresses) in copies.iter_mut().zip(&mut marks).zip(SUPERBLOCK_COPIES) {
        for ((copy, mark), address) in copies.iter_mut().zip(marks).zip(addresses) {
            if storage.size_bytes() < (address.0 + 1) * BLOCK_BYTES {
                return Err(Error::InvalidInput("not a plywood pool: it is too small".into()));
            }
            *copy = match read_bytes(storage, address, 1).await {
                Ok(bytes) => {
                    *mark = Superblock::decode_unfinished(&bytes);
                    Superblock::decode(&bytes).map_err(|error| match error {
                        Error::Corrupt(found) => Corrupt { address, ..found }.into(),
                        error => error,
                    })
                }
                Err(error) => Err(error),
            };
        }
    }
    Ok((copies, marks))
}

fn choose(copies: Copies, faults: &mut Faults) -> Result<(Superblock, Slot)> {
    let bad = copies.clone().map(|slot| slot.map(Result::err));
    let ChosenSuperblock { superblock, slot, .. } = choose_superblock(copies)?;
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

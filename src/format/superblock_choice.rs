//! Which of the four copies of the superblock is the pool's state.

use super::geometry::{SUPERBLOCK_COPIES, Slot};
use super::superblock::Superblock;
use crate::error::{Check, Corrupt, Error, Structure};
use crate::units::PoolBlock;

/// What four copies come to.
#[derive(Clone, Debug)]
pub struct ChosenSuperblock {
    /// The newest that is sound.
    pub superblock: Superblock,
    /// Where it is.
    pub slot: Slot,
    /// Copies that are to be written, and be durable, before anything else is done with the pool.
    pub anew: Vec<(PoolBlock, Superblock)>,
}

/// Picks the newest superblock, given what reading each copy gave (slot A's two, then slot B's).
///
/// A slot one copy of which is bad is as good as one that is whole: both copies are durable before anything of the former
/// generation is reused, so falling back to the other slot is right only when *both* are bad or old, and then the
/// checkpoint never was durable. Written anew are, with what the slot's sound copy holds,
///
/// * of the slot that is chosen a copy that is old or bad: one more fault must not make an older state the newest;
/// * of the other slot a copy that is bad beside a sound one: it may be of a newer generation and only this once
///   unreadable, and must not come back when another state has been gone on from.
///
/// # Errors
/// [`Error::InvalidInput`] when no copy even has the magic: not a pool. [`Error::Incompatible`] as soon as one sound copy
/// says so, because it may be the newest; [`Error::Unfinished`] likewise. Else [`Error::Corrupt`] with the place of the
/// first bad copy (or the [`Error::Io`] that hid it) when none is good, or when good ones contradict each other.
#[expect(clippy::needless_pass_by_value, reason = "what was read is used up by the choice; nobody chooses twice")]
pub fn choose_superblock(copies: [[Result<Superblock, Error>; 2]; 2]) -> Result<ChosenSuperblock, Error> {
    let refusing = |refuses: fn(&Error) -> bool| errors(&copies).find(|error| refuses(error)).cloned();
    let newer = refusing(|error| matches!(error, Error::Incompatible(_)));
    if let Some(error) = newer.or_else(|| refusing(|error| matches!(error, Error::Unfinished(_)))) {
        return Err(error);
    }
    let Some(newest) = copies.iter().flatten().flatten().max_by_key(|superblock| superblock.generation) else {
        return Err(no_superblock(&copies));
    };
    check_agreement(&copies)?;
    // Agreement leaves the newest generation to one slot.
    let slot = if copies[0].iter().flatten().any(|superblock| superblock == newest) { Slot::A } else { Slot::B };
    let mut anew = Vec::new();
    for (pair, addresses) in copies.iter().zip(SUPERBLOCK_COPIES) {
        for (copy, address) in [0, 1].into_iter().zip(addresses) {
            match (&pair[copy], &pair[1 - copy]) {
                (Err(_), Ok(sound)) => anew.push((address, sound.clone())),
                (Ok(old), Ok(sound)) if old != sound && sound == newest => anew.push((address, sound.clone())),
                _ => {}
            }
        }
    }
    Ok(ChosenSuperblock { superblock: newest.clone(), slot, anew })
}

fn errors(copies: &[[Result<Superblock, Error>; 2]; 2]) -> impl Iterator<Item = &Error> {
    copies.iter().flatten().filter_map(|copy| copy.as_ref().err())
}

fn corrupt(slot: usize, copy: usize, check: Check) -> Error {
    Corrupt { structure: Structure::Superblock, address: SUPERBLOCK_COPIES[slot][copy], check }.into()
}

/// The most telling error of four bad copies.
fn no_superblock(copies: &[[Result<Superblock, Error>; 2]; 2]) -> Error {
    let mut unreadable = None;
    for (slot, copy) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        match &copies[slot][copy] {
            Err(Error::Corrupt(Corrupt { check: Check::Magic, .. })) | Ok(_) => {}
            Err(Error::Corrupt(found)) => return corrupt(slot, copy, found.check.clone()),
            Err(other) => unreadable = unreadable.or(Some(other.clone())),
        }
    }
    unreadable
        .unwrap_or_else(|| Error::InvalidInput("not a plywood pool: no superblock where one should be".to_owned()))
}

/// Refuses sound copies that cannot belong together, rather than choosing between them.
fn check_agreement(copies: &[[Result<Superblock, Error>; 2]; 2]) -> Result<(), Error> {
    let sound = || {
        [(0, 0), (0, 1), (1, 0), (1, 1)]
            .into_iter()
            .filter_map(|(slot, copy)| copies[slot][copy].as_ref().ok().map(|superblock| (slot, copy, superblock)))
    };
    for (slot, copy, superblock) in sound() {
        for (earlier_slot, earlier_copy, earlier) in sound() {
            if (earlier_slot, earlier_copy) >= (slot, copy) {
                break;
            }
            let contradiction = if earlier.uuid != superblock.uuid {
                "its copies belong to different pools"
            } else if earlier.generation != superblock.generation {
                continue;
            } else if earlier_slot != slot {
                "both slots have the same generation"
            } else if earlier != superblock {
                "its copies differ and have the same generation"
            } else {
                continue;
            };
            return Err(corrupt(slot, copy, Check::Inconsistent(contradiction)));
        }
    }
    Ok(())
}

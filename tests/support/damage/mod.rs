//! Damage by name: one fault at a time, made in a sound pool that nobody uses, and what a check must say of it.
//! `tools/damage` and the tests of the tools make it by the same code.

pub mod anatomy;
mod journal;
pub mod medium;
mod nodes;
mod space;
mod tables;

use std::collections::BTreeSet;
use std::io;

use plywood::error::{Check, Corrupt, Structure};
use plywood::units::PoolBlock;

use anatomy::{Anatomy, invalid};
use medium::Medium;

/// A fault that can be made.
pub struct Fault {
    /// `structure-check`, and a word more where there are several of them.
    pub name: &'static str,
    pub structure: Structure,
    /// The variant of `Check` that must find it.
    pub check: &'static str,
    make: fn(&mut Anatomy<'_>) -> io::Result<Made>,
}

/// What was made: what a check must find, and the volumes that it must say are touched by each.
#[derive(Debug)]
pub struct Made {
    pub found: Vec<(Corrupt, BTreeSet<String>)>,
}

impl Made {
    fn one(structure: Structure, address: PoolBlock, check: Check) -> Self {
        Self { found: vec![(Corrupt { structure, address, check }, BTreeSet::new())] }
    }

    fn touching(mut self, names: impl IntoIterator<Item = String>) -> Self {
        let names: BTreeSet<String> = names.into_iter().collect();
        self.found.iter_mut().for_each(|(_, touched)| touched.extend(names.clone()));
        self
    }

    fn and(mut self, other: Self) -> Self {
        self.found.extend(other.found);
        self
    }
}

const fn fault(
    name: &'static str,
    structure: Structure,
    check: &'static str,
    make: fn(&mut Anatomy<'_>) -> io::Result<Made>,
) -> Fault {
    Fault { name, structure, check, make }
}

/// All faults.
pub fn faults() -> impl Iterator<Item = &'static Fault> {
    tables::FAULTS.iter().chain(space::FAULTS).chain(nodes::FAULTS).chain(journal::FAULTS)
}

/// Makes the fault of this name.
///
/// # Errors
/// `InvalidInput` for a name that there is not, and for a pool that is not sound or has no such structure; then nothing has
/// changed. Those of the medium.
pub fn damage(medium: &mut dyn Medium, name: &str) -> io::Result<Made> {
    let fault =
        faults().find(|fault| fault.name == name).ok_or_else(|| invalid(format!("there is no fault {name}")))?;
    (fault.make)(&mut Anatomy::of(medium)?)
}

/// Makes a checksum wrong: of a block, and of its second copy where there is one.
fn wrong_sum(pool: &mut Anatomy<'_>, structure: Structure, block: PoolBlock) -> io::Result<Made> {
    let mirrored = pool.parts.get(&block).is_some_and(|part| part.mirrored);
    let mut made = wrong_copy(pool, structure, block)?;
    if mirrored {
        made = made.and(wrong_copy(pool, structure, block.plus(1))?);
    }
    Ok(made)
}

/// Makes the checksum of one block wrong.
fn wrong_copy(pool: &mut Anatomy<'_>, structure: Structure, block: PoolBlock) -> io::Result<Made> {
    pool.spoil(block, |bytes| bytes[3000] ^= 0x10)?;
    let (expected, found) = pool.sums(block)?;
    Ok(Made::one(structure, block, Check::Checksum { expected, found }))
}

/// Changes a structure so that its decoder refuses it.
fn undecodable(
    pool: &mut Anatomy<'_>,
    structure: Structure,
    block: PoolBlock,
    check: Check,
    edit: impl FnOnce(&mut [u8]),
) -> io::Result<Made> {
    pool.change(block, edit)?;
    Ok(Made::one(structure, block, check))
}

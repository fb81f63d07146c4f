//! What is wrong with a pool, where, and whom it concerns.

use serde::{Deserialize, Serialize};

use crate::engine::tail::Tail;
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::JOURNAL_FIRST;
use crate::units::{PoolBlock, VolumeId};

/// Faults kept at most; the rest is counted.
const FAULTS_MAX: usize = 1000;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The structure, where it stands, and which check failed.
    pub found: Corrupt,
    /// Blocks from there on of which the same is true, at least 1.
    pub blocks: u64,
    /// Whether the other block of its pair is good: then nothing is lost.
    pub has_copy: bool,
    /// Volumes that it concerns, as far as that is known.
    pub touched: Vec<Touched>,
    /// Whether more volumes, or more ranges of those listed, are touched.
    pub touches_more: bool,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Corrupt { structure, address, check } = &self.found;
        match self.blocks {
            1 => write!(f, "block {address}: {structure}: {check}")?,
            blocks => write!(f, "blocks {address} to {}: {structure}: {check}", address.0 + blocks - 1)?,
        }
        if self.has_copy { f.write_str(" (its second copy is good)") } else { Ok(()) }
    }
}

/// A volume that a fault touches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// The ranges of it; none where the fault concerns its record or its attributes.
    pub ranges: Vec<TouchedRange>,
}

/// A range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TouchedRange {
    /// Where it starts.
    pub offset_bytes: u64,
    /// How long it is.
    pub length_bytes: u64,
}

/// The faults found so far.
#[derive(Clone, Debug, Default)]
pub(in crate::engine) struct Faults {
    list: Vec<Fault>,
    total: u64,
    /// Blocks of pairs that are bad, and the other one, which is good.
    copies: Vec<(PoolBlock, PoolBlock)>,
}

impl Faults {
    pub(in crate::engine) fn add(&mut self, structure: Structure, address: PoolBlock, check: Check) {
        self.add_found(Corrupt { structure, address, check }, false, None);
    }

    /// A fault of one volume's own.
    pub(super) fn add_of(
        &mut self,
        volume: &(VolumeId, String),
        structure: Structure,
        address: PoolBlock,
        check: Check,
    ) {
        self.add_found(Corrupt { structure, address, check }, false, Some(volume));
    }

    pub(super) fn add_found(&mut self, found: Corrupt, has_copy: bool, volume: Option<&(VolumeId, String)>) {
        self.total += 1;
        // The same of the next block is one fault: a page of counts holds a thousand.
        if let Some(last) = self.list.last_mut()
            && last.found.address.0.checked_add(last.blocks) == Some(found.address.0)
            && matches!(found.check, Check::Count { .. })
            && (last.found.structure, &last.found.check) == (found.structure, &found.check)
        {
            last.blocks += 1;
            return;
        }
        if self.list.len() < FAULTS_MAX {
            let touched = volume.map(|(id, name)| Touched { volume: *id, name: name.clone(), ranges: Vec::new() });
            let touched = touched.into_iter().collect();
            self.list.push(Fault { found, blocks: 1, has_copy, touched, touches_more: false });
        }
    }

    /// Takes over what was found of one volume's own.
    pub(super) fn add_all_of(&mut self, volume: &(VolumeId, String), found: Self) {
        self.copies.extend(found.copies);
        for fault in found.list {
            self.add_found(fault.found, fault.has_copy, Some(volume));
        }
    }

    /// Adds those of `other`.
    pub(in crate::engine) fn extend(&mut self, other: Self) {
        self.total += other.total;
        let room = FAULTS_MAX.saturating_sub(self.list.len());
        self.list.extend(other.list.into_iter().take(room));
        self.copies.extend(other.copies);
    }

    /// Remembers that `bad` is to be what `good` is.
    pub(super) fn add_copy(&mut self, bad: PoolBlock, good: PoolBlock) {
        self.copies.push((bad, good));
    }

    /// Bad blocks of pairs, and their good copies.
    pub(in crate::engine) fn copies(&self) -> &[(PoolBlock, PoolBlock)] {
        &self.copies
    }

    /// Where and why the journal's chain breaks off, if it does.
    pub(in crate::engine) fn add_journal(&mut self, tail: &Tail, ended: Result<()>) {
        match ended {
            Ok(()) => {}
            Err(Error::Corrupt(found)) => self.add_found(found, false, None),
            Err(error) => {
                let address = JOURNAL_FIRST.plus(tail.position.append);
                self.add(Structure::Batch, address, Check::Unreadable(error.to_string()));
            }
        }
    }

    pub(in crate::engine) fn total(&self) -> u64 {
        self.total
    }

    pub(in crate::engine) fn list(&self) -> &[Fault] {
        &self.list
    }

    pub(super) fn list_mut(&mut self) -> &mut [Fault] {
        &mut self.list
    }

    pub(in crate::engine) fn into_list(self) -> Vec<Fault> {
        self.list
    }
}

//! What a volume should hold, sector by sector, without an idea of how a pool does it.
//!
//! A sector holds zeros or what one numbered operation wrote; its bytes follow from that number and the sector's own,
//! so that a sector in the wrong place shows. Where operations were in flight when a snapshot was taken or the engine
//! died, a sector may hold one of several values until somebody looks: from then on it must stay what was seen.

use std::collections::BTreeMap;
use std::ops::Range;

pub const SECTOR: u64 = 512;
pub const SECTORS_PER_BLOCK: u64 = 8;

/// The number of the operation that wrote a sector; 0 for zeros.
pub type Value = u64;

/// Writes the bytes of `value` at sector `number` into `sector`.
pub fn fill_sector(sector: &mut [u8], value: Value, number: u64) {
    if value == 0 {
        sector.fill(0);
        return;
    }
    let mixed = mix(value, number).to_le_bytes();
    for word in sector.chunks_exact_mut(8) {
        word.copy_from_slice(&mixed);
    }
    sector[..8].copy_from_slice(&value.to_le_bytes());
    sector[8..16].copy_from_slice(&number.to_le_bytes());
}

/// The value that `sector`, read as sector `number`, holds; an explanation where these bytes were never written there.
pub fn parse_sector(sector: &[u8], number: u64) -> Result<Value, String> {
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let value = u64::from_le_bytes(sector[..8].try_into().unwrap());
    let place = u64::from_le_bytes(sector[8..16].try_into().unwrap());
    if place != number {
        return Err(format!("sector {number} holds what operation {value} wrote to sector {place}"));
    }
    let mixed = mix(value, number).to_le_bytes();
    if value == 0 || sector[16..].chunks_exact(8).any(|word| word != mixed) {
        return Err(format!("sector {number} holds a mixture that starts like operation {value}"));
    }
    Ok(value)
}

fn mix(value: Value, number: u64) -> u64 {
    (value ^ number.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A change of some sectors that an operation makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// All of them get this value; blocks that were holes are provisioned.
    Write(Value),
    /// They read as zeros; blocks inside become holes.
    Discard,
    /// They read as zeros and stay, or become, provisioned.
    Zero,
}

impl Change {
    pub fn value(&self) -> Value {
        match self {
            Self::Write(value) => *value,
            Self::Discard | Self::Zero => 0,
        }
    }
}

/// One mapped block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    sectors: [Value; SECTORS_PER_BLOCK as usize],
    /// Written since the volume was created: counts for its own bytes.
    own: bool,
}

/// What a volume holds. Cheap enough to copy for every snapshot, which is all the idea of sharing that it has.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    blocks: BTreeMap<u64, Block>,
    /// Sectors that may hold any of these values.
    doubts: BTreeMap<u64, Vec<Value>>,
}

impl Contents {
    /// Makes `change` to `sectors`.
    pub fn apply(&mut self, sectors: Range<u64>, change: &Change) {
        if sectors.is_empty() {
            return;
        }
        let doubted: Vec<u64> = self.doubts.range(sectors.clone()).map(|(sector, _)| *sector).collect();
        for sector in doubted {
            self.doubts.remove(&sector);
        }
        match change {
            Change::Write(_) | Change::Zero => {
                for block in blocks_touched(&sectors) {
                    let entry = self.blocks.entry(block).or_insert(Block { sectors: [0; 8], own: true });
                    entry.own = true;
                    entry.set(block, &sectors, change.value());
                }
            }
            Change::Discard => {
                let whole = sectors.start.div_ceil(SECTORS_PER_BLOCK)..sectors.end / SECTORS_PER_BLOCK;
                if !whole.is_empty() {
                    let mut beyond = self.blocks.split_off(&whole.start);
                    let mut kept = beyond.split_off(&whole.end);
                    self.blocks.append(&mut kept);
                }
                for edge in [sectors.start / SECTORS_PER_BLOCK, (sectors.end - 1) / SECTORS_PER_BLOCK] {
                    if !whole.contains(&edge)
                        && let Some(entry) = self.blocks.get_mut(&edge)
                    {
                        entry.own = true;
                        entry.set(edge, &sectors, 0);
                    }
                }
            }
        }
    }

    /// From now on it is not known whether `change` reached any of `sectors`.
    pub fn doubt(&mut self, sectors: Range<u64>, change: &Change) {
        let value = change.value();
        if matches!(change, Change::Write(_)) {
            for sector in sectors {
                self.doubt_sector(sector, value);
            }
        } else {
            // A discard may span terabytes: only what may be something else than zeros comes into doubt by it.
            let mut candidates: Vec<u64> = self.doubts.range(sectors.clone()).map(|(sector, _)| *sector).collect();
            for (block, entry) in self.blocks.range(sectors.start / SECTORS_PER_BLOCK..) {
                if *block * SECTORS_PER_BLOCK >= sectors.end {
                    break;
                }
                for (index, held) in entry.sectors.iter().enumerate() {
                    let sector = block * SECTORS_PER_BLOCK + index as u64;
                    if *held != 0 && sectors.contains(&sector) {
                        candidates.push(sector);
                    }
                }
            }
            for sector in candidates {
                self.doubt_sector(sector, 0);
            }
        }
    }

    fn doubt_sector(&mut self, sector: u64, value: Value) {
        let certain = self.certain(sector);
        let values = self.doubts.entry(sector).or_insert_with(|| vec![certain]);
        if !values.contains(&value) {
            values.push(value);
        }
    }

    fn certain(&self, sector: u64) -> Value {
        self.blocks
            .get(&(sector / SECTORS_PER_BLOCK))
            .map_or(0, |block| block.sectors[(sector % SECTORS_PER_BLOCK) as usize])
    }

    /// Whether `sector` may hold `value`.
    pub fn allows(&self, sector: u64, value: Value) -> bool {
        self.doubts.get(&sector).map_or_else(|| self.certain(sector) == value, |values| values.contains(&value))
    }

    /// What `sector` may hold, for a message.
    pub fn expectation(&self, sector: u64) -> Vec<Value> {
        self.doubts.get(&sector).cloned().unwrap_or_else(|| vec![self.certain(sector)])
    }

    /// Somebody saw `value` in `sector` with nothing in flight: it must stay.
    pub fn settle(&mut self, sector: u64, value: Value) {
        if self.doubts.remove(&sector).is_some() && self.certain(sector) != value {
            let block = sector / SECTORS_PER_BLOCK;
            let entry = self.blocks.entry(block).or_insert(Block { sectors: [0; 8], own: true });
            entry.sectors[(sector % SECTORS_PER_BLOCK) as usize] = value;
        }
    }

    /// Whether any sector may still hold one of several values.
    pub fn is_doubtful(&self) -> bool {
        !self.doubts.is_empty()
    }

    /// Cuts off everything from `sector` on.
    pub fn truncate(&mut self, sector: u64) {
        self.blocks.split_off(&sector.div_ceil(SECTORS_PER_BLOCK));
        self.doubts.split_off(&sector);
    }

    /// What a clone of this holds: the same, and nothing its own.
    #[must_use]
    pub fn cloned(&self) -> Self {
        let mut clone = self.clone();
        for block in clone.blocks.values_mut() {
            block.own = false;
        }
        clone
    }

    /// Only what concerns `sectors`.
    #[must_use]
    pub fn part(&self, sectors: &Range<u64>) -> Self {
        Self {
            blocks: self.blocks.range(blocks_touched(sectors)).map(|(block, entry)| (*block, *entry)).collect(),
            doubts: self.doubts.range(sectors.clone()).map(|(sector, values)| (*sector, values.clone())).collect(),
        }
    }

    /// Runs of blocks that may hold something, in order: first block and number of blocks, at most `most` a run.
    pub fn runs(&self, most: u64) -> Vec<(u64, u64)> {
        let mut blocks: Vec<u64> =
            self.blocks.keys().copied().chain(self.doubts.keys().map(|sector| sector / SECTORS_PER_BLOCK)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in blocks {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block && *count < most => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }

    pub fn mapped_blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    pub fn own_blocks(&self) -> u64 {
        self.blocks.values().filter(|block| block.own).count() as u64
    }

    pub fn is_mapped(&self, block: u64) -> bool {
        self.blocks.contains_key(&block)
    }

    /// Blocks whose content differs between the two, where both are certain.
    pub fn differing_blocks(&self, other: &Self) -> Vec<u64> {
        let zeros = [0; 8];
        let mut differing: Vec<u64> = self
            .blocks
            .keys()
            .chain(other.blocks.keys())
            .copied()
            .filter(|block| {
                let here = self.blocks.get(block).map_or(&zeros, |entry| &entry.sectors);
                let there = other.blocks.get(block).map_or(&zeros, |entry| &entry.sectors);
                here != there
            })
            .collect();
        differing.sort_unstable();
        differing.dedup();
        differing
    }
}

impl Block {
    fn set(&mut self, block: u64, sectors: &Range<u64>, value: Value) {
        let first = block * SECTORS_PER_BLOCK;
        for (index, held) in self.sectors.iter_mut().enumerate() {
            if sectors.contains(&(first + index as u64)) {
                *held = value;
            }
        }
    }
}

fn blocks_touched(sectors: &Range<u64>) -> Range<u64> {
    sectors.start / SECTORS_PER_BLOCK..sectors.end.div_ceil(SECTORS_PER_BLOCK)
}

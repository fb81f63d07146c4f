//! An input as changes of a sample pool: which sample, whether checksums are made right afterwards, then one patch after
//! the other. A patch names a structure that the pool has, so that few bytes go to where they matter, or any block.

use std::rc::Rc;

use crate::fields::{Fields, put_counted};
use crate::image::{Block, Image};
use crate::layout::{self, Found, Structure};
use crate::samples::Sample;

/// Most patches of one input.
const PATCHES_MAX: usize = 64;

/// A changed pool, and what is left of the input.
pub struct Patched<'a> {
    /// The pool.
    pub image: Image,
    /// Whether its checksums were made right.
    pub repaired: bool,
    /// Bytes that are no patches.
    pub rest: Fields<'a>,
}

/// Which byte of the first one of an input means what.
const REPAIR: u8 = 0x80;
/// A patch of any block, not of the n-th structure.
const ANY_BLOCK: u16 = 0x8000;
/// A patch whose bytes are combined with what stands there by exclusive or.
const FLIP: u16 = 0x4000;

/// Applies the patches of `input`: a byte for the sample, a byte for their number, and for each where, at which byte, and
/// the bytes.
pub fn apply(input: &[u8]) -> Patched<'_> {
    let mut fields = Fields(input);
    let head = fields.byte();
    let mut image = Sample::ALL[usize::from(head & 0x7f) % Sample::ALL.len()].image();
    let structures = layout::walk(&mut image, false);
    for _ in 0..usize::from(fields.byte()).min(PATCHES_MAX) {
        let (place, offset) = (fields.u16(), usize::from(fields.u16() & 0xfff));
        let index = place & !(ANY_BLOCK | FLIP);
        let block = if place & ANY_BLOCK != 0 {
            u64::from(index)
        } else {
            structures.get(usize::from(index) % structures.len().max(1)).map_or(0, |found| found.block)
        };
        let len = usize::from(fields.byte());
        let bytes = fields.bytes(len);
        image.change(block, |content| {
            for (old, new) in content[offset..].iter_mut().zip(bytes) {
                *old = if place & FLIP != 0 { *old ^ new } else { *new };
            }
        });
    }
    let repaired = head & REPAIR != 0;
    if repaired {
        layout::walk(&mut image, true);
    }
    Patched { image, repaired, rest: fields }
}

/// An input: `sample` with `patches`, each a structure by number, an offset and bytes, then `rest`.
pub fn encode(sample: Sample, repair: bool, patches: &[(usize, usize, &[u8])], rest: &[u8]) -> Vec<u8> {
    let mut input = vec![sample as u8 | if repair { REPAIR } else { 0 }, patches.len() as u8];
    for (structure, offset, bytes) in patches {
        input.extend_from_slice(&(*structure as u16).to_le_bytes());
        input.extend_from_slice(&(*offset as u16).to_le_bytes());
        input.push(bytes.len() as u8);
        input.extend_from_slice(bytes);
    }
    input.extend_from_slice(rest);
    input
}

/// Most structures of one kind that become seeds.
const KIND_MAX: usize = 6;

/// The structures of a sample by their numbers, a few of each kind.
pub fn structures(sample: Sample) -> Vec<(usize, Found)> {
    let mut kinds: Vec<Structure> = Vec::new();
    let found = layout::walk(&mut sample.image(), false);
    let mut some: Vec<(usize, Found)> = found.into_iter().enumerate().collect();
    some.retain(|(_, found)| {
        kinds.push(found.structure);
        kinds.iter().filter(|kind| **kind == found.structure).count() <= KIND_MAX
    });
    some
}

/// A generator for [`invent`] (splitmix64; Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (value ^ (value >> 31)) % bound
    }
}

/// An input whose checksums are right, with one to three fields changed to what hurts: extremes, neighbours of limits,
/// addresses and whole entries of other structures. Bytes alone would take long to find these.
pub fn invent(seed: u64) -> Vec<u8> {
    thread_local! {
        static KNOWN: Vec<Vec<(Found, Rc<Block>)>> = Sample::ALL.map(|sample| {
            let mut image = sample.image();
            let found = layout::walk(&mut image, false);
            found.into_iter().map(|found| (found, image.block(found.block))).collect()
        }).to_vec();
    }
    let chance = &mut Chance(seed);
    let sample = Sample::ALL[chance.below(Sample::ALL.len() as u64) as usize];
    KNOWN.with(|known| {
        let known = &known[sample as usize];
        let mut patches = Vec::new();
        for _ in 0..=chance.below(3) {
            // Each kind as often, however many there are of it.
            let like = known[chance.below(known.len() as u64) as usize].0.structure;
            let kinds = [like, known[0].0.structure, known[known.len() - 1].0.structure];
            let kind = kinds[chance.below(3) as usize];
            let of_kind: Vec<usize> = (0..known.len()).filter(|number| known[*number].0.structure == kind).collect();
            let number = of_kind[chance.below(of_kind.len() as u64) as usize];
            let other = known[chance.below(known.len() as u64) as usize].clone();
            patches.push((number, field(kind, chance), value(&other, chance)));
        }
        let patches: Vec<(usize, usize, &[u8])> = patches.iter().map(|(n, at, bytes)| (*n, *at, &bytes[..])).collect();
        let rest: Vec<u8> = (0..12).map(|_| chance.below(256) as u8).collect();
        encode(sample, true, &patches, &rest)
    })
}

/// Where a field of a structure may begin.
fn field(kind: Structure, chance: &mut Chance) -> usize {
    let words = |from: u64, to: u64, chance: &mut Chance| (from + chance.below((to - from) / 4) * 4) as usize;
    match kind {
        Structure::Superblock if chance.below(4) == 0 => words(1664, 1680, chance),
        Structure::Superblock => words(128, 384, chance),
        Structure::GroupIndex => words(0, 8, chance),
        Structure::GroupDescriptor => words(64, 584, chance),
        Structure::Page | Structure::ChecksumPage => words(0, 4096, chance),
        // Address, kind, birth of an entry; most of what is mapped stands at the front.
        Structure::Node | Structure::TableNode => {
            let entries = if chance.below(2) == 0 { 16 } else { 256 };
            let entry = chance.below(entries) as usize;
            entry * 16 + [0, 0, 6, 11][chance.below(4) as usize]
        }
        Structure::VolumeRecord if chance.below(4) == 0 => words(528, 1632, chance),
        Structure::VolumeRecord => words(8, 272, chance),
        Structure::Attributes => words(8, 48, chance),
        Structure::CarcassPage => words(8, 256, chance),
        Structure::Journal => words(24, 1024, chance),
    }
}

/// What is put there.
fn value(other: &(Found, Rc<Block>), chance: &mut Chance) -> Vec<u8> {
    let len = [1, 2, 4, 5, 6, 8][chance.below(6) as usize];
    match chance.below(8) {
        0 => vec![0; len],
        1 => vec![0xff; len],
        2 => chance.below(300).to_le_bytes()[..len].to_vec(),
        3 => (u64::MAX - chance.below(3)).to_le_bytes()[..len].to_vec(),
        4 => (1_u64 << chance.below(64)).wrapping_sub(chance.below(2)).to_le_bytes()[..len].to_vec(),
        5 => other.0.block.to_le_bytes()[..6].to_vec(),
        6 => {
            let at = chance.below(256) as usize * 16;
            other.1[at..at + 16].to_vec()
        }
        _ => (0..len).map(|_| chance.below(256) as u8).collect(),
    }
}

/// A counted string, for targets whose input is made of several.
pub fn counted(parts: &[&[u8]]) -> Vec<u8> {
    let mut input = Vec::new();
    for part in parts {
        put_counted(&mut input, part);
    }
    input
}

//! An input as changes of a sample pool: which sample, whether checksums are made right afterwards, then one patch after
//! the other. A patch names a structure that the pool has, so that few bytes go to where they matter, or any block.

use crate::fields::{Fields, put_counted};
use crate::image::Image;
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

/// A counted string, for targets whose input is made of several.
pub fn counted(parts: &[&[u8]]) -> Vec<u8> {
    let mut input = Vec::new();
    for part in parts {
        put_counted(&mut input, part);
    }
    input
}

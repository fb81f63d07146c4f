//! Pages of a group: 1024 numbers of four bytes. Reference counts in the space map, CRC-32 in the checksum pages; the last
//! checksum page holds the "has one" bits of the group's 32768 blocks, bit `n % 32` of number `n / 32`.

use super::geometry::COUNTS_PER_PAGE;
use super::layout::{raw, raw_struct};
use super::little_endian::U32;
use crate::error::Check;
use crate::units::BLOCK_SIZE;

const NUMBERS: usize = COUNTS_PER_PAGE as usize;

raw_struct! {
    /// A page as it stands in its block.
    RawPage: 4096 {
        0 numbers: [U32; NUMBERS],
    }
}

/// The block of a page of counts or checksums.
pub fn encode_counts(counts: &[u32; NUMBERS]) -> Box<[u8; BLOCK_SIZE]> {
    Box::new(bytemuck::cast(RawPage { numbers: counts.map(U32::new) }))
}

/// Reads a page of counts or checksums; every number is legal.
///
/// # Errors
/// [`Check::Truncated`] when `bytes` are not one block.
pub fn decode_counts(bytes: &[u8]) -> Result<Box<[u32; NUMBERS]>, Check> {
    let raw: &RawPage = raw(bytes)?;
    Ok(Box::new(raw.numbers.map(U32::get)))
}

//! Pages of a group: 1024 numbers of four bytes. Reference counts in the space map, CRC-32 in the checksum pages; the last
//! checksum page holds the "has one" bits of the group's 32768 blocks, bit `n % 32` of number `n / 32`.

use super::geometry::{CHECKSUM_PAGES_PER_GROUP, COUNTS_PER_PAGE};
use super::layout::{raw, raw_struct};
use super::little_endian::U32;
use crate::error::Check;
use crate::units::BLOCK_SIZE;

const NUMBERS: usize = COUNTS_PER_PAGE as usize;
/// Among a group's checksum pages, the one that says which blocks have one.
pub const HAS_CHECKSUM_PAGE: u32 = CHECKSUM_PAGES_PER_GROUP - 1;

/// Whether the group's block `block` has a checksum, by the page that says so.
pub fn has_checksum(page: &[u32; NUMBERS], block: usize) -> bool {
    page[block / 32] >> (block % 32) & 1 == 1
}

/// Says in that page whether the group's block `block` has a checksum.
pub fn set_has_checksum(page: &mut [u32; NUMBERS], block: usize, has_one: bool) {
    let bit = 1 << (block % 32);
    page[block / 32] = if has_one { page[block / 32] | bit } else { page[block / 32] & !bit };
}

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

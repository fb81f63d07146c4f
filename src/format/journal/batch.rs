//! A batch: records appended together, in whole blocks, each sector stamped.
//!
//! The content of a batch - header, records, zeros - is a stream that is cut into pieces of 504 bytes; each piece and a
//! stamp make a sector. Batches stand one after the other in the ring and never wrap. Each carries the checksum of the one
//! before it, so that a ring is one chain.

use std::mem::offset_of;

use uuid::Uuid;

use super::stamp::{BatchStamp, CONTENT_BYTES, Stamp};
use crate::error::Check;
use crate::format::checksum::seeded;
use crate::format::layout::{at_most, raw_prefix, raw_struct, zero};
use crate::format::little_endian::{U32, U64};
use crate::format::superblock::COUNTER_MAX;
use crate::units::{BLOCK_SIZE, Generation, Lsn, SECTOR_SIZE};

/// Most blocks of a batch, 1 MiB.
pub const BATCH_BLOCKS_MAX: usize = 256;
/// Most bytes of records in a batch.
pub const BATCH_RECORD_BYTES_MAX: usize = BATCH_BLOCKS_MAX * CONTENT_BYTES_PER_BLOCK - HEADER_BYTES;

const MAGIC: [u8; 8] = *b"plywjrn\0";
const CONTENT_BYTES_PER_BLOCK: usize = BLOCK_SIZE / SECTOR_SIZE * CONTENT_BYTES;
const HEADER_BYTES: usize = size_of::<RawBatchHeader>();

raw_struct! {
    /// Head of a batch's content.
    RawBatchHeader: 72 {
        0 magic: [u8; 8],
        8 pool: [u8; 16],
        24 generation: U64,
        32 first: U64,
        40 last: U64,
        48 blocks: U32,
        52 record_bytes: U32,
        56 previous: U32,
        60 checksum: U32,
        64 header_checksum: U32,
        68 reserved: U32,
    }
}

/// What a batch says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchHeader {
    /// Generation of the last durable superblock when it was written.
    pub generation: Generation,
    /// Its first change.
    pub first: Lsn,
    /// Its last change.
    pub last: Lsn,
    /// Its length in blocks, 1 to [`BATCH_BLOCKS_MAX`].
    pub blocks: u64,
    /// Bytes of its records.
    pub record_bytes: usize,
    /// Checksum of the batch before it.
    pub previous: u32,
    /// Its checksum: over the header up to this field, and the records.
    pub checksum: u32,
}

/// Why bytes are not a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BatchFault {
    /// No batch starts here: nothing was ever written, or a sector of another batch stands here.
    Absent,
    /// It starts here, and some of its sectors never arrived: its write did not finish.
    Torn,
    /// It was written, and is not what it was.
    Damaged(Check),
}

/// The blocks of a batch, and its checksum, which is the next one's `previous`.
///
/// # Panics
/// When `records` are longer than [`BATCH_RECORD_BYTES_MAX`], or `first` and `last` are not a range of changes.
pub fn encode_batch(
    pool: &Uuid,
    generation: Generation,
    first: Lsn,
    last: Lsn,
    previous: u32,
    records: &[u8],
) -> (Vec<u8>, u32) {
    assert!(records.len() <= BATCH_RECORD_BYTES_MAX, "the committer cuts batches to size");
    assert!(first.0 > 0 && first <= last, "a batch holds changes");
    let blocks = blocks_for(records.len());
    let mut raw = RawBatchHeader {
        magic: MAGIC,
        pool: *pool.as_bytes(),
        generation: U64::new(generation.0),
        first: U64::new(first.0),
        last: U64::new(last.0),
        blocks: U32::new(blocks as u32),
        record_bytes: U32::new(records.len() as u32),
        previous: U32::new(previous),
        checksum: U32::new(0),
        header_checksum: U32::new(0),
        reserved: U32::new(0),
    };
    let checksum = checksum_of(&raw, records);
    raw.checksum = U32::new(checksum);
    raw.header_checksum = U32::new(header_checksum_of(&raw));

    let mut bytes = vec![0; blocks * BLOCK_SIZE];
    let (sectors, _) = bytes.as_chunks_mut::<SECTOR_SIZE>();
    let (head, body) = records.split_at(records.len().min(CONTENT_BYTES - HEADER_BYTES));
    sectors[0][..HEADER_BYTES].copy_from_slice(bytemuck::bytes_of(&raw));
    sectors[0][HEADER_BYTES..HEADER_BYTES + head.len()].copy_from_slice(head);
    for (sector, piece) in sectors[1..].iter_mut().zip(body.chunks(CONTENT_BYTES)) {
        sector[..piece.len()].copy_from_slice(piece);
    }
    let stamp = BatchStamp::new(first, checksum, false).encode();
    for sector in &mut sectors[1..] {
        sector[CONTENT_BYTES..].copy_from_slice(&stamp);
    }
    sectors[0][CONTENT_BYTES..].copy_from_slice(&BatchStamp::new(first, checksum, true).encode());
    (bytes, checksum)
}

/// The header of a batch of `pool` that starts with `first_block`: verified by a checksum of its own, its records not yet.
/// None for anything else; [`batch_start`] tells why.
pub fn decode_batch_header(pool: &Uuid, first_block: &[u8]) -> Option<BatchHeader> {
    batch_start(pool, first_block).ok().flatten()
}

/// Whether a batch starts with `first_block`: its verified header, or none where nothing was ever written or the middle of
/// another batch stands. A header that is not the one due (by `previous` and `first`) is an older batch's.
///
/// # Errors
/// The check that failed, when a batch was started here and its header is not what was written, or when the sector's
/// stamp no longer tells.
pub fn batch_start(pool: &Uuid, first_block: &[u8]) -> Result<Option<BatchHeader>, Check> {
    match header(pool, first_block.first_chunk().ok_or(Check::Truncated)?) {
        Ok(header) => Ok(Some(header)),
        Err(BatchFault::Damaged(check)) => Err(check),
        Err(BatchFault::Absent | BatchFault::Torn) => Ok(None),
    }
}

/// The batch that `bytes` are, as many blocks as its header says, and its records.
///
/// # Errors
/// The [`BatchFault`] found; [`Check::Truncated`] when there are more or fewer bytes.
pub fn decode_batch(pool: &Uuid, bytes: &[u8]) -> Result<(BatchHeader, Vec<u8>), BatchFault> {
    let (sectors, rest) = bytes.as_chunks::<SECTOR_SIZE>();
    let head = sectors.first().ok_or(BatchFault::Damaged(Check::Truncated))?;
    let header = header(pool, head)?;
    if !rest.is_empty() || bytes.len() as u64 != header.blocks * BLOCK_SIZE as u64 {
        return Err(BatchFault::Damaged(Check::Truncated));
    }
    check_stamps(&header, sectors)?;
    let mut content = Vec::with_capacity(sectors.len() * CONTENT_BYTES);
    for sector in sectors {
        content.extend_from_slice(&sector[..CONTENT_BYTES]);
    }
    let (raw, rest) = raw_prefix::<RawBatchHeader>(&content).map_err(BatchFault::Damaged)?;
    let (records, padding) = rest.split_at_checked(header.record_bytes).ok_or(BatchFault::Damaged(Check::Truncated))?;
    let found = checksum_of(raw, records);
    if found != header.checksum {
        return Err(BatchFault::Damaged(Check::Checksum { expected: header.checksum, found }));
    }
    zero(padding, "padding").map_err(BatchFault::Damaged)?;
    Ok((header, records.to_vec()))
}

/// Blocks that hold a header and so many bytes of records.
fn blocks_for(record_bytes: usize) -> usize {
    (HEADER_BYTES + record_bytes).div_ceil(CONTENT_BYTES_PER_BLOCK)
}

/// Over the header up to the checksums, which names the pool and so is the seed, and the records.
fn checksum_of(header: &RawBatchHeader, records: &[u8]) -> u32 {
    seeded(&bytemuck::bytes_of(header)[..offset_of!(RawBatchHeader, checksum)], &[records])
}

/// Over the header up to this checksum. Without it, a flipped bit in `previous` or `first` would make the newest batch look
/// like an older one, and with `record_bytes` it would look torn: both mean the end of the chain, and would lose it.
fn header_checksum_of(header: &RawBatchHeader) -> u32 {
    seeded(&bytemuck::bytes_of(header)[..offset_of!(RawBatchHeader, header_checksum)], &[])
}

/// The header in the first sector of a batch.
fn header(pool: &Uuid, sector: &[u8; SECTOR_SIZE]) -> Result<BatchHeader, BatchFault> {
    let stamp = match Stamp::of(sector) {
        Stamp::Blank => return Err(BatchFault::Absent),
        Stamp::Damaged => return Err(BatchFault::Damaged(Check::Stamp(0))),
        Stamp::Intact(stamp) if !stamp.is_head() => return Err(BatchFault::Absent),
        Stamp::Intact(stamp) => stamp,
    };
    let (raw, _) = raw_prefix::<RawBatchHeader>(sector).map_err(BatchFault::Damaged)?;
    let header = decode_header(pool, raw).map_err(BatchFault::Damaged)?;
    if stamp != BatchStamp::new(header.first, header.checksum, true) {
        return Err(BatchFault::Damaged(Check::Inconsistent("header and stamp name different batches")));
    }
    Ok(header)
}

fn decode_header(pool: &Uuid, raw: &RawBatchHeader) -> Result<BatchHeader, Check> {
    if raw.magic != MAGIC {
        return Err(Check::Magic);
    }
    if raw.pool != *pool.as_bytes() {
        return Err(Check::Uuid);
    }
    let (expected, found) = (raw.header_checksum.get(), header_checksum_of(raw));
    if expected != found {
        return Err(Check::Checksum { expected, found });
    }
    zero(bytemuck::bytes_of(&raw.reserved), "reserved")?;
    let (first, last) = (raw.first.get(), raw.last.get());
    if first == 0 {
        return Err(Check::OutOfBounds { field: "first", value: 0 });
    }
    if last < first || last > COUNTER_MAX {
        return Err(Check::OutOfBounds { field: "last", value: last });
    }
    let record_bytes = at_most(raw.record_bytes.get().into(), BATCH_RECORD_BYTES_MAX as u64, "record_bytes")? as usize;
    let blocks = u64::from(raw.blocks.get());
    if blocks != blocks_for(record_bytes) as u64 {
        return Err(Check::OutOfBounds { field: "blocks", value: blocks });
    }
    Ok(BatchHeader {
        generation: Generation(raw.generation.get()),
        first: Lsn(first),
        last: Lsn(last),
        blocks,
        record_bytes,
        previous: raw.previous.get(),
        checksum: raw.checksum.get(),
    })
}

/// Looks at all stamps before it says *torn*: a damaged one is damage wherever it stands.
fn check_stamps(header: &BatchHeader, sectors: &[[u8; SECTOR_SIZE]]) -> Result<(), BatchFault> {
    let own = BatchStamp::new(header.first, header.checksum, false);
    let mut is_torn = false;
    for (index, sector) in sectors.iter().enumerate().skip(1) {
        match Stamp::of(sector) {
            Stamp::Damaged => return Err(BatchFault::Damaged(Check::Stamp(index))),
            Stamp::Intact(stamp) if stamp == own => {}
            Stamp::Intact(_) | Stamp::Blank => is_torn = true,
        }
    }
    if is_torn { Err(BatchFault::Torn) } else { Ok(()) }
}

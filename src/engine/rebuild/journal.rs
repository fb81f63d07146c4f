//! The changes that no checkpoint holds, written as a new chain of batches.

use uuid::Uuid;

use super::Writer;
use crate::engine::Storage;
use crate::error::{Error, Result};
use crate::format::{self, BATCH_RECORD_BYTES_MAX, Geometry, JOURNAL_FIRST, Record};
use crate::units::{BLOCK_SIZE, Generation, Lsn};

/// Batches of these changes, whose numbers follow each other, from the start of the ring.
fn batches(uuid: &Uuid, generation: Generation, records: &[(Lsn, Record)]) -> Vec<Vec<u8>> {
    let mut batches = Vec::new();
    let (mut bytes, mut first, mut previous) = (Vec::new(), Lsn(0), 0);
    let mut one = Vec::new();
    for (position, (lsn, record)) in records.iter().enumerate() {
        one.clear();
        record.encode(&mut one);
        if bytes.is_empty() {
            first = *lsn;
        }
        bytes.extend_from_slice(&one);
        // A record is a block and a little at most.
        let is_full = bytes.len() + 2 * BLOCK_SIZE > BATCH_RECORD_BYTES_MAX;
        if is_full || position + 1 == records.len() {
            let (batch, checksum) = format::encode_batch(uuid, generation, first, *lsn, previous, &bytes);
            batches.push(batch);
            previous = checksum;
            bytes.clear();
        }
    }
    batches
}

/// Refuses changes that the ring has no room for.
pub(in crate::engine) fn check_fits(geometry: &Geometry, records: &[(Lsn, Record)]) -> Result<()> {
    let blocks: u64 =
        batches(&Uuid::nil(), Generation(1), records).iter().map(|batch| (batch.len() / BLOCK_SIZE) as u64).sum();
    if blocks <= geometry.journal_blocks {
        return Ok(());
    }
    Err(Error::InvalidInput(format!(
        "the changes take {blocks} blocks of journal, and there are {}",
        geometry.journal_blocks
    )))
}

/// Where in the ring a chain of these changes has room beside what is `taken` (first block and length, in order); none where
/// it has not.
pub(in crate::engine) fn find_place(
    geometry: &Geometry,
    records: &[(Lsn, Record)],
    taken: &[(u64, u64)],
) -> Option<u64> {
    let all = batches(&Uuid::nil(), Generation(1), records);
    let needed: u64 = all.iter().map(|batch| (batch.len() / BLOCK_SIZE) as u64).sum();
    let mut taken: Vec<(u64, u64)> = taken.to_vec();
    taken.sort_unstable();
    taken.push((geometry.journal_blocks, 0));
    let mut at = 0;
    for (first, blocks) in taken {
        if first.saturating_sub(at) >= needed {
            return Some(at);
        }
        at = at.max(first + blocks);
    }
    None
}

/// Writes the changes as batches from block `at` of the ring on. Answers first block and length of each.
pub(in crate::engine) async fn write_batches<S: Storage>(
    writer: &mut Writer<'_, S>,
    uuid: &Uuid,
    generation: Generation,
    mut at: u64,
    records: &[(Lsn, Record)],
) -> Result<Vec<(u64, u64)>> {
    let mut written = Vec::new();
    for batch in batches(uuid, generation, records) {
        written.push((at, (batch.len() / BLOCK_SIZE) as u64));
        for block in batch.chunks(BLOCK_SIZE) {
            writer.put(JOURNAL_FIRST.plus(at), false, block).await?;
            at += 1;
        }
    }
    Ok(written)
}

/// Writes the changes to the start of the ring, and zeros to the rest of it, so that nothing there is taken for more of them.
pub(in crate::engine) async fn write_journal<S: Storage>(
    writer: &mut Writer<'_, S>,
    uuid: &Uuid,
    generation: Generation,
    geometry: &Geometry,
    records: &[(Lsn, Record)],
) -> Result<()> {
    let written = write_batches(writer, uuid, generation, 0, records).await?;
    for at in written.last().map_or(0, |(first, blocks)| first + blocks)..geometry.journal_blocks {
        writer.put(JOURNAL_FIRST.plus(at), false, &[0; BLOCK_SIZE]).await?;
    }
    Ok(())
}

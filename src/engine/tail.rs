//! The tail of the journal: the batches that were appended after the checkpoint, as opening, checking and repairing find
//! them.

use std::collections::VecDeque;

use super::journal::JournalPosition;
use super::pool::read_bytes;
use super::{Memory, Storage};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{self, BATCH_BLOCKS_MAX, BatchFault, JOURNAL_FIRST, Record, Superblock};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Lsn, PoolBlock, SECTOR_SIZE};

/// What the journal holds above the checkpoint.
#[derive(Default)]
pub(super) struct Tail {
    /// The changes that the checkpoint does not have, in order.
    pub(super) records: Vec<(Lsn, Record)>,
    /// Where the next batch goes.
    pub(super) position: JournalPosition,
    /// The last change.
    pub(super) last: Lsn,
    /// Where the chain's batches stand in the ring: first block and length.
    pub(super) batches: Vec<(u64, u64)>,
}

/// A batch of the chain: header, records, and where in the ring it stands.
type Batch = (format::BatchHeader, Vec<u8>, u64);

/// Follows the chain of batches from the superblock's position. What was found up to the damage comes with the error.
pub(super) async fn read_tail<S: Storage>(storage: &S, superblock: &Superblock) -> (Tail, Result<()>) {
    let (tail, ended) = read_chain(storage, superblock).await;
    if ended.is_err() {
        return (tail, ended);
    }
    let ended = check_end(storage, superblock, &tail).await;
    (tail, ended)
}

/// The same, without looking for what would prove that the chain went on.
pub(super) async fn read_chain<S: Storage>(storage: &S, superblock: &Superblock) -> (Tail, Result<()>) {
    let position = JournalPosition { append: superblock.journal_append, chain: superblock.journal_chain, total: 0 };
    let mut tail = Tail { records: Vec::new(), position, last: superblock.lsn, batches: Vec::new() };
    let mut expected: Option<Lsn> = None;
    loop {
        match next_batch(storage, superblock, &tail, expected).await {
            Ok(Some((found, skipped))) => match tail.append(superblock, found, skipped) {
                Ok(next) => expected = Some(next),
                Err(error) => return (tail, Err(error)),
            },
            Ok(None) => return (tail, Ok(())),
            Err(error) => return (tail, Err(error)),
        }
    }
}

impl Tail {
    /// Takes a batch that follows. Answers the change that the next one may begin with; after an error nothing is changed.
    fn append(&mut self, superblock: &Superblock, (header, bytes, at): Batch, skipped: u64) -> Result<Lsn> {
        let address = PoolBlock(JOURNAL_FIRST.0 + at);
        let damage = |check| Corrupt { structure: Structure::Batch, address, check };
        if header.generation > superblock.generation {
            return Err(damage(Check::NewerGeneration(header.generation.0)).into());
        }
        let mut lsn = header.first;
        let mut rest = &bytes[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let (record, used) =
                Record::decode(rest).map_err(|check| Corrupt { structure: Structure::Record, address, check })?;
            rest = rest.get(used..).unwrap_or_default();
            if lsn > superblock.lsn {
                records.push((lsn, record));
            }
            lsn = lsn.next();
        }
        if lsn != header.last.next() {
            return Err(damage(Check::Inconsistent("it holds another number of records than it says")).into());
        }
        self.records.append(&mut records);
        self.batches.push((at, header.blocks));
        self.last = self.last.max(header.last);
        let total = self.position.total + skipped + header.blocks;
        self.position = JournalPosition { append: at + header.blocks, chain: header.checksum, total };
        Ok(lsn)
    }
}

/// The batch that goes on where `tail` ends, and the blocks before the ring's end that were skipped for it.
async fn next_batch<S: Storage>(
    storage: &S,
    superblock: &Superblock,
    tail: &Tail,
    expected: Option<Lsn>,
) -> Result<Option<(Batch, u64)>> {
    let ring = superblock.geometry.journal_blocks;
    let mut found = read_batch(storage, superblock, tail.position.append, tail, expected).await;
    let mut skipped = 0;
    // A batch that did not fit before the ring's end starts at its beginning.
    let may_wrap = tail.position.append > 0 && tail.position.append + BATCH_BLOCKS_MAX as u64 > ring;
    if may_wrap && !matches!(found, Ok(Some(_))) {
        match read_batch(storage, superblock, 0, tail, expected).await {
            // Then what stands behind the last batch is dead, whatever it looks like.
            Ok(Some(wrapped)) => (found, skipped) = (Ok(Some(wrapped)), ring - tail.position.append),
            Ok(None) => {}
            Err(error) => found = found.and(Err(error)),
        }
    }
    Ok(found?.map(|found| (found, skipped)))
}

/// The batch at `at` of the ring, if it goes on where `tail` ends.
async fn read_batch<S: Storage>(
    storage: &S,
    superblock: &Superblock,
    at: u64,
    tail: &Tail,
    expected: Option<Lsn>,
) -> Result<Option<Batch>> {
    let (uuid, ring) = (&superblock.uuid, superblock.geometry.journal_blocks);
    if at >= ring {
        return Ok(None);
    }
    let address = PoolBlock(JOURNAL_FIRST.0 + at);
    let first = read_bytes(storage, address, 1).await?;
    // A destroyed header is damage, not the end: the newest batch must not vanish with it.
    let damage = |check| Corrupt { structure: Structure::Batch, address, check };
    let Some(header) = format::batch_start(uuid, &first).map_err(damage)? else { return Ok(None) };
    let fits = at + header.blocks <= ring;
    let follows = match expected {
        // Changes between a batch and the next may be missing where a checkpoint holds them: it ended before they were
        // appended.
        Some(lsn) => lsn <= header.first && header.first <= tail.last.next(),
        // The first batch may hold records that the checkpoint has already.
        None => header.first <= tail.last.next(),
    };
    if !fits || !follows || header.previous != tail.position.chain {
        return Ok(None);
    }
    let bytes = read_bytes(storage, address, header.blocks as usize).await?;
    match format::decode_batch(uuid, &bytes) {
        Ok((header, records)) => Ok(Some((header, records, at))),
        Err(BatchFault::Absent | BatchFault::Torn) => Ok(None),
        Err(BatchFault::Damaged(check)) => Err(damage(check).into()),
    }
}

/// After the chain's end nothing of it may be found: a later batch would prove that it went on and was damaged.
async fn check_end<S: Storage>(storage: &S, superblock: &Superblock, tail: &Tail) -> Result<()> {
    const STEP: u64 = 256;
    const READS_MAX: usize = 8;
    let ring = superblock.geometry.journal_blocks;
    let mut under_way = VecDeque::new();
    let mut starts = (0..ring).step_by(STEP as usize).peekable();
    let mut head = vec![0; SECTOR_SIZE];
    loop {
        while under_way.len() < READS_MAX
            && let Some(at) = starts.next()
        {
            let memory = storage.allocate((STEP.min(ring - at) * BLOCK_BYTES) as usize);
            let read = storage.read(PoolBlock(JOURNAL_FIRST.0 + at).offset_bytes(), &memory);
            under_way.push_back((at, memory, read));
        }
        let Some((at, memory, read)) = under_way.pop_front() else { return Ok(()) };
        read.await.map_err(|error| Error::io("read of the journal", error))?;
        for offset in 0..memory.len() / BLOCK_SIZE {
            memory.read(offset * BLOCK_SIZE, &mut head);
            let Some(header) = format::decode_batch_header(&superblock.uuid, &head) else { continue };
            let start = at + offset as u64;
            if header.first <= tail.last.next() || start + header.blocks > ring {
                continue;
            }
            let address = PoolBlock(JOURNAL_FIRST.0 + start);
            let whole = read_bytes(storage, address, header.blocks as usize).await?;
            if format::decode_batch(&superblock.uuid, &whole).is_ok() {
                let check = Check::JournalGap(tail.last.next().0);
                return Err(Corrupt { structure: Structure::Batch, address, check }.into());
            }
        }
    }
}

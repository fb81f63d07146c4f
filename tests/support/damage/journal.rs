//! Faults of the journal: of batches, and of the records in them.

use std::io;

use plywood::error::Check::{
    self, Inconsistent, JournalGap, Magic, NewerGeneration, OutOfBounds, Reserved, Text, Undefined,
};
use plywood::error::Structure::{Batch, Record};
use plywood::format::{self, BatchFault, Record as Change, VolumeRecord};
use plywood::units::{Generation, PoolBlock, VirtualBlock};

use super::anatomy::{self, Anatomy, invalid};
use super::tables::put;
use super::{Fault, Made, fault};

pub const FAULTS: &[Fault] = &[
    fault("batch-stamp", Batch, "Stamp", |pool| of_batch(pool, Check::Stamp(3), |bytes| bytes[4 * 512 - 5] ^= 1)),
    fault("batch-stamp-first", Batch, "Stamp", |pool| of_batch(pool, Check::Stamp(0), |bytes| bytes[512 - 5] ^= 1)),
    fault("batch-checksum", Batch, "Checksum", |pool| {
        let batch = last(pool)?;
        pool.spoil(batch.address, |bytes| bytes[80] ^= 1)?;
        let mut bytes = Vec::new();
        for block in 0..batch.blocks {
            bytes.extend(pool.block(batch.address.plus(block))?);
        }
        match format::decode_batch(&pool.superblock.uuid, &bytes) {
            Err(BatchFault::Damaged(check)) => Ok(Made::one(Batch, batch.address, check)),
            _ => Err(invalid("the last batch holds nothing")),
        }
    }),
    fault("batch-magic", Batch, "Magic", |pool| of_batch(pool, Magic, |bytes| bytes[0] = 0)),
    fault("batch-uuid", Batch, "Uuid", |pool| of_batch(pool, Check::Uuid, |bytes| bytes[8] ^= 1)),
    fault("batch-reserved", Batch, "Reserved", |pool| of_batch(pool, Reserved("reserved"), |bytes| bytes[68] = 1)),
    fault("batch-out-of-bounds", Batch, "OutOfBounds", |pool| {
        of_batch(pool, OutOfBounds { field: "blocks", value: 200 }, |bytes| {
            put(bytes, 48, 200, 4);
            seal_header(bytes);
        })
    }),
    fault("batch-inconsistent", Batch, "Inconsistent", |pool| {
        of_batch(pool, Inconsistent("header and stamp name different batches"), |bytes| {
            bytes[60] ^= 1;
            seal_header(bytes);
        })
    }),
    fault("batch-inconsistent-records", Batch, "Inconsistent", |pool| {
        let (records, generation) = (harmless(pool)?, pool.superblock.generation);
        let address = pool.append_batch(generation, 2, &records)?;
        Ok(Made::one(Batch, address, Inconsistent("it holds another number of records than it says")))
    }),
    fault("batch-newer-generation", Batch, "NewerGeneration", |pool| {
        let (records, newer) = (harmless(pool)?, pool.superblock.generation.0 + 5);
        let address = pool.append_batch(Generation(newer), 1, &records)?;
        Ok(Made::one(Batch, address, NewerGeneration(newer)))
    }),
    fault("batch-journal-gap", Batch, "JournalGap", |pool| {
        let [.., gone, after] = pool.batches[..] else { return Err(invalid("the journal has fewer than two batches")) };
        pool.spoil(gone.address, |bytes| bytes.fill(0))?;
        Ok(Made::one(Batch, after.address, JournalGap(gone.first.0)))
    }),
    fault("record-undefined", Record, "Undefined", |pool| {
        of_record(pool, Undefined { field: "record.kind", value: 77 }, |bytes| bytes[0] = 77)
    }),
    fault("record-reserved", Record, "Reserved", |pool| {
        of_record(pool, Reserved("record.flags"), |bytes| bytes[1] = 1)
    }),
    fault("record-out-of-bounds", Record, "OutOfBounds", |pool| {
        of_record(pool, OutOfBounds { field: "count", value: 0 }, |bytes| put(bytes, 24, 0, 8))
    }),
    fault("record-out-of-bounds-volume", Record, "OutOfBounds", |pool| {
        let unknown = pool.superblock.next_volume.0 + 1000;
        let mut records = harmless(pool)?;
        put(&mut records, 8, unknown, 8);
        append(pool, &records, PoolBlock(0), OutOfBounds { field: "volume", value: unknown })
    }),
    fault("record-out-of-bounds-block", Record, "OutOfBounds", |pool| {
        let (volume, layout) = (volume(pool)?.id, pool.superblock.geometry.first_group());
        let mut records = Vec::new();
        let virtual_block = VirtualBlock(0);
        Change::Map { volume, virtual_block, pool_block: layout, count: 1 }.encode(&mut records);
        let name = volume_name(pool)?;
        let made = append(pool, &records, layout, OutOfBounds { field: "pool_block", value: layout.0 })?;
        Ok(made.touching([name]))
    }),
    fault("record-truncated", Record, "Truncated", |pool| {
        of_record(pool, Check::Truncated, |bytes| put(bytes, 2, 64, 2))
    }),
    fault("record-magic", Record, "Magic", |pool| of_created(pool, Magic, |bytes| bytes[8] = 0)),
    fault("record-text", Record, "Text", |pool| of_created(pool, Text("name"), |bytes| bytes[8 + 272] = 0xff)),
    fault("record-inconsistent", Record, "Inconsistent", |pool| {
        of_created(pool, Inconsistent("a volume's record ends in zeros"), |bytes| {
            let length = bytes.len();
            bytes.resize(length + 8, 0);
            put(bytes, 2, length as u64 + 8, 2);
        })
    }),
    fault("record-inconsistent-name", Record, "Inconsistent", |pool| {
        let mut created = volume(pool)?;
        created.id = plywood::units::VolumeId(pool.superblock.next_volume.0 + 100);
        (created.attributes, created.attributes_bytes) = (Vec::new(), 0);
        let mut records = Vec::new();
        let name = created.name.clone();
        Change::VolumeCreated(Box::new(created)).encode(&mut records);
        let check = Inconsistent("a new volume is there already");
        Ok(append(pool, &records, PoolBlock(0), check)?.touching([name]))
    }),
];

fn last(pool: &Anatomy<'_>) -> io::Result<anatomy::Batch> {
    pool.batches.last().copied().ok_or_else(|| invalid("the journal holds nothing"))
}

fn of_batch(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let batch = last(pool)?;
    pool.spoil(batch.address, edit)?;
    Ok(Made::one(Batch, batch.address, check))
}

/// Makes the header's own checksum right.
fn seal_header(bytes: &mut [u8]) {
    let sum = crc32fast::hash(&bytes[..64]);
    put(bytes, 64, sum.into(), 4);
}

/// A volume that no change in the journal is about, as far as a check minds.
fn volume(pool: &Anatomy<'_>) -> io::Result<VolumeRecord> {
    Ok(pool.records.first().ok_or_else(|| invalid("the pool has no volume"))?.1.clone())
}

fn volume_name(pool: &Anatomy<'_>) -> io::Result<String> {
    Ok(volume(pool)?.name)
}

/// A change that unmaps a block.
fn harmless(pool: &Anatomy<'_>) -> io::Result<Vec<u8>> {
    let mut records = Vec::new();
    Change::Unmap { volume: volume(pool)?.id, virtual_block: VirtualBlock(0), count: 1 }.encode(&mut records);
    Ok(records)
}

fn append(pool: &mut Anatomy<'_>, records: &[u8], address: PoolBlock, check: Check) -> io::Result<Made> {
    let generation = pool.superblock.generation;
    pool.append_batch(generation, 1, records)?;
    Ok(Made::one(Record, address, check))
}

/// Appends a change whose bytes are then others.
fn of_record(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut [u8])) -> io::Result<Made> {
    let (mut records, address) = (harmless(pool)?, pool.journal_end().0);
    edit(&mut records);
    append(pool, &records, address, check)
}

/// The same with one that makes a volume.
fn of_created(pool: &mut Anatomy<'_>, check: Check, edit: impl FnOnce(&mut Vec<u8>)) -> io::Result<Made> {
    let (mut records, address) = (Vec::new(), pool.journal_end().0);
    Change::VolumeCreated(Box::new(volume(pool)?)).encode(&mut records);
    edit(&mut records);
    append(pool, &records, address, check)
}

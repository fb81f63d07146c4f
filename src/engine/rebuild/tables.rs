//! The volume table with its records, and the carcass table, written to new blocks.

use uuid::Uuid;

use super::Writer;
use crate::engine::Storage;
use crate::engine::carcass_table::CARCASS_TABLE;
use crate::error::Result;
use crate::format::{
    self, CARCASSES_PER_PAGE, Carcass, ENTRIES_PER_NODE, Entry, Node, Place, Root, VolumeRecord, span_blocks,
};
use crate::units::{BLOCK_SIZE, Clock, PoolBlock};

/// What is to stand in the tables.
pub(in crate::engine) struct NewTables<'a> {
    pub(in crate::engine) uuid: Uuid,
    pub(in crate::engine) clock: Clock,
    /// By id.
    pub(in crate::engine) records: &'a [VolumeRecord],
    pub(in crate::engine) carcasses: &'a [Carcass],
}

/// Writes both tables. `take` hands out blocks: a pair where there is one. Answers the roots.
pub(in crate::engine) async fn write_tables<S: Storage>(
    new: &NewTables<'_>,
    writer: &mut Writer<'_, S>,
    mut take: impl FnMut() -> Result<(PoolBlock, bool)>,
) -> Result<(Root, Root)> {
    let mut entries = Vec::with_capacity(new.records.len());
    for record in new.records {
        let entry = put(new, writer, take()?, Place::VolumeRecord(record.id), &record.encode()).await?;
        entries.push((record.id.0, entry));
    }
    let volumes = write_tree(new, entries, 0, writer, &mut take).await?;
    let mut entries = Vec::new();
    for (number, page) in new.carcasses.chunks(CARCASSES_PER_PAGE).enumerate() {
        let bytes = format::encode_carcasses(page);
        let place = Place::CarcassPage(number as u64);
        entries.push((number as u64, put(new, writer, take()?, place, &bytes).await?));
    }
    let carcasses = write_tree(new, entries, CARCASS_TABLE, writer, &mut take).await?;
    Ok((volumes, carcasses))
}

async fn put<S: Storage>(
    new: &NewTables<'_>,
    writer: &mut Writer<'_, S>,
    (address, mirrored): (PoolBlock, bool),
    place: Place,
    bytes: &[u8; BLOCK_SIZE],
) -> Result<Entry> {
    writer.put(address, mirrored, bytes).await?;
    Ok(Entry::node(address, mirrored, format::checksum(&new.uuid, place, bytes), new.clock))
}

/// Writes the nodes above `entries`, which are in ascending order of their numbers.
async fn write_tree<S: Storage>(
    new: &NewTables<'_>,
    entries: Vec<(u64, Entry)>,
    base: u64,
    writer: &mut Writer<'_, S>,
    take: &mut impl FnMut() -> Result<(PoolBlock, bool)>,
) -> Result<Root> {
    if entries.is_empty() {
        return Ok(Root::empty(new.clock));
    }
    let (mut below, mut level) = (entries, 0);
    loop {
        let mut above = Vec::new();
        let span = span_blocks(level);
        for chunk in below.chunk_by(|(one, _), (other, _)| one / span == other / span) {
            let Some(first) = chunk.first().map(|(number, _)| number / span * span) else { continue };
            let mut node = Node::new(new.clock);
            for (number, entry) in chunk {
                node.set(((number - first) / (span / ENTRIES_PER_NODE as u64)) as usize, *entry);
            }
            let place = Place::TableNode { level, first: base + first };
            above.push((first, put(new, writer, take()?, place, node.bytes()).await?));
        }
        match above[..] {
            [(0, entry)] => return Ok(Root { entry, level }),
            _ => (below, level) = (above, level + 1),
        }
    }
}

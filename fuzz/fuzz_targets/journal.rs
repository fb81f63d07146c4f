//! A batch of the journal, and the records in it. The first byte chooses: bytes as they are, a stream of records, or a batch
//! made of the input and then damaged.
//!
//! * Decoding never panics. A batch that is accepted encodes to the same bytes, and so does each record.
//! * A batch that was made is accepted as it was; damaged, it is refused or still the same.
//! * Walking records ends: each takes bytes. The blocks that they name are not address 0.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{BATCH_RECORD_BYTES_MAX, Record, batch_start, decode_batch, decode_batch_header, encode_batch};
use plywood::units::{Generation, Lsn};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::{Structure, number};
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::seeds;
use uuid::Uuid;

/// A volume's record may be cut to 280 bytes, and is a struct with a name and lists in memory.
const BOUND: Bound = Bound { fixed_bytes: 256 << 10, multiple: 16 };
const POOL: Uuid = Uuid::from_u128(0x0066_757a_7a00);

fn batch(bytes: &[u8]) {
    let _ = batch_start(&POOL, bytes);
    let header = decode_batch_header(&POOL, bytes);
    if let Ok((found, records)) = decode_batch(&POOL, bytes) {
        assert_eq!(header, Some(found));
        let (again, chain) = encode_batch(&POOL, found.generation, found.first, found.last, found.previous, &records);
        assert_eq!((again.as_slice(), chain), (bytes, found.checksum), "one encoding");
    }
}

fn records(mut rest: &[u8]) {
    let mut encoded = Vec::new();
    while let Ok((record, used)) = Record::decode(rest) {
        encoded.clear();
        record.encode(&mut encoded);
        assert_eq!(encoded, rest[..used], "one encoding");
        record.named_blocks(|block, count| assert!(count > 0 && block.0 > 0 || !matches!(record, Record::Map { .. })));
        rest = &rest[used..];
    }
}

fn damaged_batch(input: &[u8]) {
    let mut fields = Fields(input);
    let (generation, first, more, previous) = (fields.u64(), (fields.u64() >> 3).max(1), fields.u16(), fields.u32());
    let flips = fields.byte() % 4;
    let flips: Vec<(usize, u8)> = (0..flips).map(|_| (fields.u32() as usize, fields.byte())).collect();
    let bytes = fields.bytes(BATCH_RECORD_BYTES_MAX);
    let last = first + u64::from(more);
    let (mut batch, _) = encode_batch(&POOL, Generation(generation), Lsn(first), Lsn(last), previous, bytes);
    let original = batch.clone();
    for (at, flip) in flips {
        let at = at % batch.len();
        batch[at] ^= flip;
    }
    match decode_batch(&POOL, &batch) {
        Ok((header, found)) => {
            assert!(batch == original, "damage is found");
            assert_eq!((header.first.0, header.last.0, found.as_slice()), (first, last, bytes));
        }
        Err(_) => assert!(batch != original, "what was written is read"),
    }
}

fuzz_target!(
    init: seeds::offer(|| {
        let blocks: Vec<Vec<u8>> = seeds::blocks(Structure::Journal).into_iter().map(|(_, block)| block).collect();
        let mut all: Vec<Vec<u8>> = blocks.iter().map(|block| [&[0][..], block].concat()).collect();
        for block in &blocks {
            let content: Vec<u8> =
                block.as_chunks::<512>().0.iter().flat_map(|sector| sector[..504].to_vec()).collect();
            if content[..8] == *b"plywjrn\0" {
                let length = (number(&content, 52, 4) as usize).min(content.len() - 72);
                all.push([&[1][..], &content[72..72 + length]].concat());
                all.push([&[2][..], &[1; 22], &[1, 9, 0, 0, 0, 4], &content[72..72 + length]].concat());
            }
        }
        all
    }),
    |input: &[u8]| bounded(BOUND, input.len(), || {
        let mut fields = Fields(input);
        match fields.byte() % 3 {
            0 => batch(fields.0),
            1 => records(fields.0),
            _ => damaged_batch(fields.0),
        }
    })
);

//! The record of a volume, and its attributes. The first four bytes are the length of the attributes.
//!
//! * Decoding never panics; what is accepted encodes to the same bytes.
//! * Attributes that were accepted and changed are accepted again.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{
    ACCOUNT_SPANS_MAX, ATTRIBUTE_BLOCKS_MAX, VOLUME_NAME_BYTES_MAX, VolumeRecord, check_name, decode_attributes,
    encode_attributes,
};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::Structure;
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::seeds;

/// An empty value takes as little as nine bytes of input; in memory a key, a value and their place in the map.
const BOUND: Bound = Bound { fixed_bytes: 128 << 10, multiple: 64 };

fuzz_target!(
    init: seeds::offer(|| {
        let records = seeds::blocks(Structure::VolumeRecord).into_iter().map(|(_, block)| [&[0; 4][..], &block].concat());
        let mut all: Vec<Vec<u8>> = records.collect();
        let streams = seeds::blocks(Structure::Attributes).into_iter().map(|(_, block)| block);
        let streams: Vec<Vec<u8>> = streams.collect();
        for blocks in streams.iter().cloned().chain([streams.concat()]) {
            let length = u32::from_le_bytes(blocks[8..12].try_into().expect("four bytes"));
            all.push([&length.to_le_bytes()[..], &blocks].concat());
        }
        all
    }),
    |input: &[u8]| bounded(BOUND, input.len(), || {
        let mut fields = Fields(input);
        let length = fields.u32() as usize;
        let bytes = fields.0;
        if let Ok(record) = VolumeRecord::decode(bytes) {
            assert_eq!(record.encode()[..], *bytes, "one encoding");
            assert!(record.name.len() <= VOLUME_NAME_BYTES_MAX && record.size_bytes > 0);
            assert!(record.attributes.len() <= ATTRIBUTE_BLOCKS_MAX && record.account_spans.len() <= ACCOUNT_SPANS_MAX);
            let _ = record.check_addresses(1 << 20);
            let _ = check_name(&record.name);
        }
        if let Ok(mut attributes) = decode_attributes(bytes, length) {
            assert_eq!(encode_attributes(&attributes).expect("as large as it was"), bytes, "one encoding");
            if attributes.pop_first().is_some() {
                let shorter = encode_attributes(&attributes).expect("shorter than it was");
                let length = if shorter.is_empty() { 0 } else { shorter.len() };
                assert_eq!(decode_attributes(&shorter, length), Ok(attributes));
            }
        }
    })
);

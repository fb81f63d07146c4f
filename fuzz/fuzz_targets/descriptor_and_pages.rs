//! A group's descriptor, and a page of counts. The first byte is the group's number.
//!
//! * Decoding never panics; what is accepted encodes to the same bytes.
//! * A descriptor is of the group that it was asked for; a block of any numbers is a page, and nothing shorter is.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{GroupDescriptor, decode_counts, encode_counts};
use plywood::units::BLOCK_SIZE;
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::{Structure, number};
use plywood_fuzz::memory::{DECODER, bounded};
use plywood_fuzz::seeds;

fuzz_target!(
    init: seeds::offer(|| {
        let found = [Structure::GroupDescriptor, Structure::Page].into_iter().flat_map(seeds::blocks);
        found.map(|(_, block)| [&[0][..], &block].concat()).collect()
    }),
    |input: &[u8]| bounded(DECODER, input.len(), || {
        let mut fields = Fields(input);
        let group = u64::from(fields.byte());
        let block = fields.0;
        if let Ok(descriptor) = GroupDescriptor::decode(block, group) {
            assert_eq!(descriptor.group, group);
            assert_eq!(descriptor.encode()[..], *block, "one encoding");
        }
        match decode_counts(block) {
            Ok(counts) => {
                assert_eq!(encode_counts(&counts)[..], *block, "one encoding");
                assert_eq!(u64::from(counts[7]), number(block, 28, 4));
            }
            Err(_) => assert_ne!(block.len(), BLOCK_SIZE, "every number is legal"),
        }
    })
);

//! A group-index block.
//!
//! * Decoding never panics; what is accepted encodes to the same bytes and names no more free blocks than a group has.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{GROUP_BLOCKS, GroupIndex};
use plywood_fuzz::layout::Structure;
use plywood_fuzz::memory::{DECODER, bounded};
use plywood_fuzz::seeds;

fuzz_target!(
    init: seeds::offer(|| seeds::blocks(Structure::GroupIndex).into_iter().map(|(_, block)| block).collect()),
    |input: &[u8]| bounded(DECODER, input.len(), || {
        if let Ok(index) = GroupIndex::decode(input) {
            assert_eq!(index.encode()[..], *input, "one encoding");
            assert!(index.entries.iter().all(|entry| u64::from(entry.free_blocks) <= GROUP_BLOCKS));
        }
    })
);

//! A target with a planted bug, which must be found within a minute: when it is not, the other targets finding nothing
//! means nothing.
//!
//! The bug is that of a reader who keeps the end of a range in 31 bits, although a range may end at up to 2^32: an
//! `unmap` record that ends in the upper half of the largest volume makes it panic. No seed holds one, a fuzzer that
//! decodes records makes one within seconds. It stands here, not in the engine.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::Record;
use plywood_fuzz::layout::{Structure, number};
use plywood_fuzz::seeds;

/// The planted bug. `tools/fuzz-smoke` knows it by this message.
fn end_in_31_bits(virtual_block: u64, count: u64) -> i32 {
    i32::try_from(virtual_block + count).expect("the end of a range in 31 bits")
}

fuzz_target!(
    init: seeds::offer(|| {
        let found = seeds::blocks(Structure::Journal).into_iter();
        let contents = found.map(|(_, block)| {
            let content: Vec<u8> =
                block.as_chunks::<512>().0.iter().flat_map(|sector| sector[..504].to_vec()).collect();
            (number(&content, 52, 4) as usize, content)
        });
        contents.filter(|(len, content)| *len < 4000 && content[..8] == *b"plywjrn\0").map(|(len, content)| {
            content[72..(72 + len).min(content.len())].to_vec()
        }).collect()
    }),
    |input: &[u8]| {
        let mut rest = input;
        while let Ok((record, used)) = Record::decode(rest) {
            if let Record::Unmap { virtual_block, count, .. } = record {
                assert!(end_in_31_bits(virtual_block.0, count) > 0);
            }
            rest = &rest[used..];
        }
    }
);

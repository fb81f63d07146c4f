//! A page of carcasses. Blocks of the pool, then the page.
//!
//! * Decoding never panics; what is accepted encodes to the same bytes.
//! * Each carcass lies inside the largest volume, its cursor inside itself, its node inside the pool.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{CARCASSES_PER_PAGE, VOLUME_BLOCKS_MAX, decode_carcasses, encode_carcasses, span_blocks};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::Structure;
use plywood_fuzz::memory::{DECODER, bounded};
use plywood_fuzz::samples::POOL_BYTES;
use plywood_fuzz::seeds;

fuzz_target!(
    init: seeds::offer(|| {
        let blocks = ((POOL_BYTES / 4096) as u32).to_le_bytes();
        let found = seeds::blocks(Structure::CarcassPage).into_iter();
        found.map(|(_, block)| [&blocks[..], &block].concat()).collect()
    }),
    |input: &[u8]| bounded(DECODER, input.len(), || {
        let mut fields = Fields(input);
        let pool_blocks = u64::from(fields.u32());
        if let Ok(carcasses) = decode_carcasses(fields.0, pool_blocks) {
            assert_eq!(encode_carcasses(&carcasses)[..], *fields.0, "one encoding");
            assert!(carcasses.len() <= CARCASSES_PER_PAGE);
            for carcass in carcasses {
                let span = span_blocks(carcass.level);
                assert!(carcass.first.0 + span <= VOLUME_BLOCKS_MAX && carcass.cursor <= span);
                assert!(carcass.entry.address.0 < pool_blocks && carcass.cut <= carcass.id);
            }
        }
    })
);

//! A group's descriptor, a page of counts or checksums, and the state of a digest. The first byte is the group's number.
//!
//! * Decoding never panics; what is accepted encodes to the same bytes.
//! * A descriptor is of the group that it was asked for; a block of any numbers is a page, and nothing shorter is. The
//!   page of the bits that say which blocks have a checksum is one of numbers too.
//! * A page that a descriptor does not claim is described by zeros.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{
    CHECKSUM_PAGES_PER_GROUP, DIGEST_STATE_BYTES, DigestState, GROUP_BLOCKS, GroupDescriptor, PAGES_PER_GROUP,
    decode_counts, encode_counts,
};
use plywood::units::BLOCK_SIZE;
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::{Structure, number};
use plywood_fuzz::memory::{DECODER, bounded};
use plywood_fuzz::seeds;

fuzz_target!(
    init: seeds::offer(|| {
        let kinds = [Structure::GroupDescriptor, Structure::Page, Structure::ChecksumPage];
        let found = kinds.into_iter().flat_map(seeds::blocks);
        found.map(|(_, block)| [&[0][..], &block].concat()).collect()
    }),
    |input: &[u8]| bounded(DECODER, input.len(), || {
        let mut fields = Fields(input);
        let group = u64::from(fields.byte());
        let block = fields.0;
        if let Ok(descriptor) = GroupDescriptor::decode(block, group) {
            assert_eq!(descriptor.group, group);
            assert_eq!(descriptor.encode()[..], *block, "one encoding");
            let pages = descriptor.pages.iter().chain(&descriptor.checksum_pages);
            assert_eq!(pages.clone().count() as u32, PAGES_PER_GROUP + CHECKSUM_PAGES_PER_GROUP);
            for (number, page) in pages.enumerate().filter(|(_, page)| !page.present) {
                assert_eq!(block[64 + number * 8..72 + number * 8], [0; 8], "nothing is said of what is not there: {page:?}");
            }
        }
        match decode_counts(block) {
            Ok(counts) => {
                assert_eq!(encode_counts(&counts)[..], *block, "one encoding");
                assert_eq!(u64::from(counts[7]), number(block, 28, 4));
                // As "has one" bits: bit `n % 32` of number `n / 32` is bit `n % 8` of byte `n / 8`.
                for at in (0..GROUP_BLOCKS as usize).step_by(37) {
                    assert_eq!(counts[at / 32] >> (at % 32) & 1, u32::from(block[at / 8] >> (at % 8) & 1));
                }
            }
            Err(_) => assert_ne!(block.len(), BLOCK_SIZE, "every number is legal"),
        }
        match DigestState::decode(block.get(..DIGEST_STATE_BYTES).unwrap_or(block)) {
            Ok(state) => assert_eq!(state.encode()[..], block[..DIGEST_STATE_BYTES], "one encoding"),
            Err(_) => assert!(block.len() < DIGEST_STATE_BYTES, "every sum is legal"),
        }
    })
);

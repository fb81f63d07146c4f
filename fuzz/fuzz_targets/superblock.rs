//! The superblock, and the choice between its four copies; the claim of a host.
//!
//! * Neither decoding nor choosing panics, whatever the bytes.
//! * What is accepted encodes to the same bytes, with its checksum made right and as it is.
//! * The chosen one is a sound copy of the highest generation; when the copies that are to be written anew have been, it is chosen
//!   again, and none is left to be written.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::error::Error;
use plywood::format::{HostClaim, SUPERBLOCK_COPIES, Superblock, choose_superblock};
use plywood::units::BLOCK_SIZE;
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::Structure;
use plywood_fuzz::memory::{DECODER, bounded};
use plywood_fuzz::seeds;
use uuid::Uuid;

/// Bytes of a copy that the input gives, and of the group-index references: the rest is rarely not zero.
const HEAD: usize = 384;
const REFERENCES: usize = 168;
const GIVEN: usize = HEAD + REFERENCES;

fn decode(bytes: &[u8]) -> Result<Superblock, Error> {
    let decoded = Superblock::decode(bytes);
    if let Ok(superblock) = &decoded {
        assert_eq!(superblock.encode()[..], *bytes, "one encoding");
    }
    decoded
}

fn repaired(bytes: &[u8]) -> [u8; BLOCK_SIZE] {
    let mut block = [0; BLOCK_SIZE];
    let len = bytes.len().min(BLOCK_SIZE);
    block[..len].copy_from_slice(&bytes[..len]);
    block[12..16].fill(0);
    let own = crc32fast::hash(&block);
    block[12..16].copy_from_slice(&own.to_le_bytes());
    block
}

fn decode_claim(bytes: &[u8]) {
    let mut block = [0; BLOCK_SIZE];
    let len = bytes.len().min(512);
    block[..len].copy_from_slice(&bytes[..len]);
    let own = crc32fast::hash(&[&block[..12], &[0; 4], &block[16..512]].concat());
    for checksum in [[block[12], block[13], block[14], block[15]], own.to_le_bytes()] {
        block[12..16].copy_from_slice(&checksum);
        if let Ok(Some(claim)) = HostClaim::decode(&block) {
            assert_eq!(claim.encode()[..], block, "one encoding");
        }
    }
}

fn choose(input: &[u8]) {
    let mut fields = Fields(input);
    let mut copy = || {
        let head = fields.bytes(GIVEN);
        let mut bytes = repaired(head);
        if head.len() > HEAD {
            // What lies behind the reserved bytes: the references.
            bytes[HEAD..GIVEN].fill(0);
            bytes[1664..1664 + REFERENCES].copy_from_slice(&repaired(head)[HEAD..GIVEN]);
            bytes = repaired(&bytes);
        }
        decode(&bytes)
    };
    let copies = [[copy(), copy()], [copy(), copy()]];
    let sound: Vec<Superblock> = copies.iter().flatten().flatten().cloned().collect();
    let Ok(chosen) = choose_superblock(copies.clone()) else { return };
    assert!(sound.contains(&chosen.superblock));
    assert!(sound.iter().all(|copy| copy.generation <= chosen.superblock.generation));
    let mut written = copies;
    for (address, superblock) in chosen.anew {
        assert!(sound.contains(&superblock));
        let places = written.as_flattened_mut().iter_mut().zip(SUPERBLOCK_COPIES.as_flattened());
        for (copy, _) in places.filter(|(_, place)| **place == address) {
            *copy = Ok(superblock.clone());
        }
    }
    let again = choose_superblock(written).expect("it is still there");
    assert_eq!((again.superblock, again.slot, again.anew), (chosen.superblock, chosen.slot, Vec::new()));
}

fuzz_target!(
    init: seeds::offer(|| {
        let blocks: Vec<Vec<u8>> = seeds::blocks(Structure::Superblock).into_iter().map(|(_, block)| block).collect();
        let heads = blocks.iter().map(|block| [&block[..HEAD], &block[1664..1664 + REFERENCES]].concat());
        let heads: Vec<Vec<u8>> = heads.collect();
        let choices = heads.windows(2).map(|pair| [&pair[0][..], &pair[0], &pair[1], &pair[1]].concat());
        let claim = HostClaim { machine: Uuid::nil(), boot: Uuid::max(), beat: 1, time: 2, name: "node".to_owned() };
        choices.chain(blocks.clone()).chain([claim.encode()[..512].to_vec()]).collect()
    }),
    |input: &[u8]| bounded(DECODER, input.len(), || {
        let _ = decode(input);
        let _ = decode(&repaired(input));
        choose(input);
        decode_claim(input);
    })
);

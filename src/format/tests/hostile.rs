//! Arbitrary bytes: no decoder panics, and what one accepts encodes back to the same bytes.

use fastrand::Rng;

use super::samples::{self, CODECS};
use crate::error::Error;
use crate::format::*;
use crate::units::BLOCK_SIZE;

#[test]
fn legal_structures_come_back_byte_for_byte() {
    let mut random = Rng::with_seed(1);
    for codec in CODECS {
        for round in 0..200 {
            let bytes = (codec.sample)(&mut random);
            assert_eq!((codec.recode)(&bytes).as_ref(), Ok(&bytes), "{} {round}", codec.name);
        }
    }
}

#[test]
fn legal_values_come_back() {
    let mut random = Rng::with_seed(2);
    for kind in 0..400 {
        let superblock = samples::superblock(&mut random);
        assert_eq!(Superblock::decode(&superblock.encode()).expect("legal"), superblock);
        let record = samples::volume_record(&mut random);
        assert_eq!(VolumeRecord::decode(&record.encode()), Ok(record));
        let carcasses = samples::carcasses(&mut random);
        assert_eq!(decode_carcasses(&*encode_carcasses(&carcasses), samples::POOL_BLOCKS), Ok(carcasses));
        let entry = samples::entry(&mut random);
        assert_eq!(Entry::decode(&entry.encode()), Ok(entry));
        let index = samples::group_index(&mut random);
        assert_eq!(GroupIndex::decode(&*index.encode()), Ok(index));
        let descriptor = samples::group_descriptor(&mut random);
        assert_eq!(GroupDescriptor::decode(&*descriptor.encode(), samples::GROUP), Ok(descriptor));
        let attributes = samples::attributes(&mut random);
        let encoded = encode_attributes(&attributes).expect("small");
        assert_eq!(decode_attributes(&encoded, encoded.len()), Ok(attributes));
        let (record, mut encoded) = (samples::record(&mut random, kind), Vec::new());
        record.encode(&mut encoded);
        assert_eq!(Record::decode(&encoded), Ok((record, encoded.len())));
    }
}

/// Changes some bits, bytes or words, mostly few, so that decoders are entered deeply.
fn disturb(random: &mut Rng, bytes: &mut [u8]) {
    for _ in 0..random.usize(1..=4) {
        let at = random.usize(..bytes.len());
        match random.u8(..4) {
            0 => bytes[at] ^= 1 << random.u8(..8),
            1 => bytes[at] = random.u8(..),
            2 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
            _ => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0),
        }
    }
}

#[test]
fn disturbed_structures_are_refused_or_come_back_unchanged() {
    let mut random = Rng::with_seed(3);
    for codec in CODECS {
        let (mut accepted, mut refused) = (0, 0);
        for _ in 0..4000 {
            let mut bytes = (codec.sample)(&mut random);
            disturb(&mut random, &mut bytes);
            match (codec.recode)(&bytes) {
                Ok(encoded) => {
                    assert_eq!(encoded, bytes, "{}", codec.name);
                    accepted += 1;
                }
                Err(_) => refused += 1,
            }
        }
        // Every number is legal in a page.
        let refuses = codec.name == "page" || refused > 100;
        assert!(accepted > 10 && refuses, "{}: {accepted} accepted, {refused} refused", codec.name);
    }
}

#[test]
fn random_bytes_of_any_length_never_panic() {
    let mut random = Rng::with_seed(4);
    let pool = samples::uuid(&mut random);
    for round in 0..4000 {
        let length = if round % 2 == 0 { BLOCK_SIZE } else { random.usize(..3 * BLOCK_SIZE) };
        let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(length).collect();
        for codec in CODECS {
            if let Ok(encoded) = (codec.recode)(&bytes) {
                assert_eq!(encoded, bytes, "{}", codec.name);
            }
        }
        assert!(Superblock::decode(&bytes).is_err());
        assert_eq!(decode_batch_header(&pool, &bytes), None);
        assert!(decode_batch(&pool, &bytes).is_err());
    }
}

#[test]
fn cut_structures_are_refused() {
    let mut random = Rng::with_seed(5);
    for codec in CODECS {
        let bytes = (codec.sample)(&mut random);
        for length in 0..bytes.len() {
            // No bytes are no attributes. Any others are whole blocks: a fuzzer found that a stream whose padding was cut
            // was accepted, and encoded to other bytes.
            if codec.name == "attributes" && length == 0 {
                continue;
            }
            assert!((codec.recode)(&bytes[..length]).is_err(), "{} cut to {length}", codec.name);
        }
    }
    let bytes = samples::superblock(&mut random).encode();
    for length in 0..bytes.len() {
        assert!(Superblock::decode(&bytes[..length]).is_err());
    }
}

/// Superblocks with right checksums and wrong content: past the checksum, the bounds must hold.
#[test]
fn disturbed_superblock_with_right_checksum_is_refused_or_comes_back_unchanged() {
    let mut random = Rng::with_seed(6);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..6000 {
        let mut bytes = samples::superblock(&mut random).encode();
        disturb(&mut random, &mut bytes[16..]);
        // Fields of the head are a small part: aim at them, too.
        disturb(&mut random, &mut bytes[16..344]);
        samples::fix_superblock(&mut bytes);
        match Superblock::decode(&bytes) {
            Ok(superblock) => {
                assert_eq!(superblock.encode(), bytes);
                accepted += 1;
            }
            Err(Error::Corrupt(_) | Error::Incompatible(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(accepted > 100 && refused > 100, "{accepted} accepted, {refused} refused");
}

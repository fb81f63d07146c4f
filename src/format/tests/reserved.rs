//! Reserved fields are written as zero and refused when they are not.

use fastrand::Rng;

use super::samples::{self, CODECS};
use crate::error::{Check, Corrupt, Error};
use crate::format::carcass::{RawCarcass, RawCarcassPage};
use crate::format::group_descriptor::RawGroupDescriptor;
use crate::format::layout::Layout;
use crate::format::superblock::RawSuperblock;
use crate::format::volume_record::RawVolumeRecord;
use crate::format::*;

/// Offset and size of the reserved fields of `T`.
fn reserved<T: Layout>() -> Vec<(&'static str, usize, usize)> {
    const OTHERS: [&str; 4] = ["journal_uuid", "external_source", "encryption_key", "compression"];
    let fields = T::FIELDS.iter().copied();
    let reserved: Vec<_> = fields.filter(|(name, ..)| name.starts_with("reserved") || OTHERS.contains(name)).collect();
    assert!(!reserved.is_empty(), "{} has reserved fields", T::NAME);
    reserved
}

#[test]
fn reserved_fields_are_zero_and_checked() {
    let mut random = Rng::with_seed(1);
    let structures = [
        ("volume record", reserved::<RawVolumeRecord>(), 0),
        ("group descriptor", reserved::<RawGroupDescriptor>(), 0),
        ("carcass page", reserved::<RawCarcassPage>(), 0),
        ("carcass page", reserved::<RawCarcass>(), 64),
    ];
    for (name, fields, base) in structures {
        let codec = CODECS.iter().find(|codec| codec.name == name).expect("listed");
        for (field, offset, size) in fields {
            // A page of carcasses has at least one.
            let sound = if name == "carcass page" {
                encode_carcasses(&[samples::carcass(&mut random)]).to_vec()
            } else {
                (codec.sample)(&mut random)
            };
            let range = base + offset..base + offset + size;
            assert!(sound[range.clone()].iter().all(|byte| *byte == 0), "{name}.{field}");
            for at in range {
                let mut bytes = sound.clone();
                bytes[at] = 1 << random.u8(..8);
                assert!(matches!((codec.recode)(&bytes), Err(Check::Reserved(_))), "{name}.{field} at {at}");
            }
        }
    }
}

#[test]
fn reserved_fields_of_the_superblock_are_zero_and_checked() {
    let mut random = Rng::with_seed(2);
    for (field, offset, size) in reserved::<RawSuperblock>() {
        let sound = samples::superblock(&mut random).encode();
        assert!(sound[offset..offset + size].iter().all(|byte| *byte == 0), "{field}");
        for at in offset..offset + size {
            let mut bytes = sound;
            bytes[at] = 1 << random.u8(..8);
            samples::fix_superblock(&mut bytes);
            let error = Superblock::decode(&bytes).expect_err("refused");
            assert!(matches!(error, Error::Corrupt(Corrupt { check: Check::Reserved(_), .. })), "{field} at {at}");
        }
    }
}

#[test]
fn reserved_kinds_of_entries_are_undefined() {
    let mut random = Rng::with_seed(3);
    for kind in 3..16 {
        let mut bytes = samples::entry(&mut random).encode();
        bytes[6] = kind;
        assert_eq!(Entry::decode(&bytes), Err(Check::Undefined { field: "kind", value: kind.into() }));
    }
    for flag in [0x20, 0x40, 0x80] {
        let mut bytes = samples::node_entry(&mut random).encode();
        bytes[6] |= flag;
        assert!(matches!(Entry::decode(&bytes), Err(Check::Undefined { field: "flags", .. })));
    }
}

#[test]
fn reserved_types_of_records_are_undefined() {
    let mut random = Rng::with_seed(4);
    for kind in (0..=255).filter(|kind| ![1, 2, 4, 5, 6, 7, 8, 9].contains(kind)) {
        let mut bytes = Vec::new();
        samples::record(&mut random, 0).encode(&mut bytes);
        bytes[0] = kind;
        assert_eq!(Record::decode(&bytes), Err(Check::Undefined { field: "record.kind", value: kind.into() }));
    }
}

//! Records: sizes, ranges, and the blocks they name.

use fastrand::Rng;

use super::Record;
use crate::error::Check;
use crate::format::tests::samples;
use crate::units::{PoolBlock, VirtualBlock, VolumeId};

fn encoded(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    bytes
}

fn map(virtual_block: u64, pool_block: u64, count: u32) -> Record {
    let (virtual_block, pool_block) = (VirtualBlock(virtual_block), PoolBlock(pool_block));
    Record::Map { volume: VolumeId(1), virtual_block, pool_block, count }
}

#[test]
fn map_takes_32_bytes() {
    assert_eq!(encoded(&map(1, 2, 3)).len(), 32);
}

#[test]
fn records_follow_each_other_in_one_stream() {
    let mut random = Rng::with_seed(1);
    let records: Vec<Record> = (0..80).map(|kind| samples::record(&mut random, kind)).collect();
    let mut stream = Vec::new();
    for record in &records {
        record.encode(&mut stream);
        assert_eq!(stream.len() % 8, 0);
    }
    let mut rest = stream.as_slice();
    for record in &records {
        let (decoded, length) = Record::decode(rest).expect("legal");
        assert_eq!(decoded, *record);
        rest = &rest[length..];
    }
    assert!(rest.is_empty());
}

#[test]
fn volume_record_travels_without_the_zeros_at_its_end() {
    let mut record = samples::volume_record(&mut Rng::with_seed(2));
    record.name = "v".to_owned();
    (record.attributes, record.attributes_bytes) = (Vec::new(), 0);
    (record.account_spans, record.accounts_from, record.in_place_blocks) = (Vec::new(), 0, 0);
    let bytes = encoded(&Record::VolumeCreated(Box::new(record)));
    assert_eq!(bytes.len(), 8 + 280);
    let mut longer = bytes;
    longer.extend([0; 8]);
    let length = longer.len() as u16;
    longer[2..4].copy_from_slice(&length.to_le_bytes());
    assert!(matches!(Record::decode(&longer), Err(Check::Inconsistent(_))));
}

#[test]
fn ranges_are_bounded() {
    let field = |record: &Record| match Record::decode(&encoded(record)) {
        Ok(_) => "",
        Err(Check::OutOfBounds { field, .. }) => field,
        Err(other) => panic!("{other}"),
    };
    let last = (1 << 32) - 1;
    assert_eq!(field(&map(last, 1, 1)), "");
    assert_eq!(field(&map(last, 1, 2)), "count");
    assert_eq!(field(&map(last + 1, 1, 1)), "virtual_block");
    assert_eq!(field(&map(0, 1, 0)), "count");
    assert_eq!(field(&map(0, 0, 1)), "pool_block");
    assert_eq!(field(&map(0, (1 << 48) - 2, 2)), "");
    assert_eq!(field(&map(0, (1 << 48) - 1, 2)), "pool_block");
    assert_eq!(field(&map(0, u64::MAX, 1)), "pool_block");
    let unmap = |first, count| Record::Unmap { volume: VolumeId(1), virtual_block: VirtualBlock(first), count };
    assert_eq!(field(&unmap(0, 1 << 32)), "");
    assert_eq!(field(&unmap(1, 1 << 32)), "count");
    assert_eq!(field(&unmap(1, u64::MAX)), "count");
    assert_eq!(field(&unmap(1, 0)), "count");
    assert_eq!(field(&Record::VolumeDeleted { volume: VolumeId(0) }), "volume");
}

#[test]
fn length_is_that_of_the_type() {
    for length in [0_u16, 4, 7, 8, 24, 31, 33, 40, 65528] {
        let mut bytes = encoded(&map(1, 2, 3));
        bytes.resize(70_000, 0);
        bytes[2..4].copy_from_slice(&length.to_le_bytes());
        assert!(Record::decode(&bytes).is_err(), "{length}");
    }
    let mut bytes = encoded(&Record::VolumeDeleted { volume: VolumeId(1) });
    bytes[4] = 1;
    assert_eq!(Record::decode(&bytes), Err(Check::Reserved("record.count")));
    bytes[1] = 1;
    assert_eq!(Record::decode(&bytes), Err(Check::Reserved("record.flags")));
}

#[test]
fn named_blocks_are_data_and_attributes_never_nodes() {
    let named = |record: &Record| {
        let mut named = Vec::new();
        record.named_blocks(|block, count| named.push((block, count)));
        named
    };
    assert_eq!(named(&map(1, 200, 3)), [(PoolBlock(200), 3)]);
    let mut random = Rng::with_seed(3);
    let volume = Box::new(samples::volume_record(&mut random));
    let expected: Vec<_> = volume.attributes.iter().map(|reference| (reference.address, 1)).collect();
    assert!(!expected.is_empty());
    assert_eq!(named(&Record::VolumeCreated(volume.clone())), expected);
    assert_eq!(named(&Record::VolumeChanged(volume.clone())), expected);
    let clock = volume.created_at;
    assert_eq!(named(&Record::VolumeShared { origin: VolumeId(1), clock, created: volume }), expected);
    for kind in [1, 4, 6, 7] {
        assert_eq!(named(&samples::record(&mut random, kind)), []);
    }
}

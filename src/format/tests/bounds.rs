//! Each bound of each structure, one step beyond it.

use std::collections::BTreeMap;

use fastrand::Rng;

use super::samples::{self, POOL_BLOCKS};
use crate::error::{Check, Corrupt, Error};
use crate::format::*;
use crate::units::{Clock, PoolBlock, VirtualBlock, VolumeId};

#[track_caller]
fn assert_out_of_bounds<T: std::fmt::Debug>(result: Result<T, Check>, expected: &str) {
    match result {
        Err(Check::OutOfBounds { field, .. }) => assert_eq!(field, expected),
        other => panic!("{expected}: {other:?}"),
    }
}

#[test]
fn address_outside_the_pool_is_refused() {
    let node = |entry| {
        let mut node = Node::new(Clock(1));
        node.set(255, entry);
        node
    };
    let leaf = |address| Node::decode(node(Entry::block(PoolBlock(address), Clock(1))).bytes(), 0, POOL_BLOCKS);
    assert!(leaf(POOL_BLOCKS - 1).is_ok() && leaf(1).is_ok());
    assert_out_of_bounds(leaf(POOL_BLOCKS), "address");
    assert_out_of_bounds(leaf(0), "address");
    assert_out_of_bounds(leaf((1 << 48) - 1), "address");
    let inner = |address, mirrored| {
        Node::decode(node(Entry::node(PoolBlock(address), mirrored, 5, Clock(1))).bytes(), 1, POOL_BLOCKS)
    };
    assert!(inner(POOL_BLOCKS - 1, false).is_ok());
    // The second block of the pair would be outside.
    assert_out_of_bounds(inner(POOL_BLOCKS - 1, true), "address");
}

#[test]
fn kinds_stay_on_their_levels() {
    let mut random = Rng::with_seed(1);
    let (leaf, inner) = (samples::node(&mut random, true), samples::node(&mut random, false));
    assert!(Node::decode(leaf.bytes(), 0, POOL_BLOCKS).is_ok());
    assert!(matches!(Node::decode(leaf.bytes(), 1, POOL_BLOCKS), Err(Check::Inconsistent(_))));
    assert!(matches!(Node::decode(inner.bytes(), 0, POOL_BLOCKS), Err(Check::Inconsistent(_))));
    assert!(Node::decode(inner.bytes(), LEVEL_MAX, POOL_BLOCKS).is_ok());
    assert_out_of_bounds(Node::decode(inner.bytes(), LEVEL_MAX + 1, POOL_BLOCKS), "level");
    assert!(Node::decode_table(inner.bytes(), 0, POOL_BLOCKS).is_ok());
    assert!(matches!(Node::decode_table(leaf.bytes(), 0, POOL_BLOCKS), Err(Check::Inconsistent(_))));
}

#[test]
fn new_node_is_empty_and_keeps_its_birth() {
    let mut node = Node::new(Clock(9));
    assert!(node.is_empty());
    assert_eq!(node.entry(255), Entry::hole(Clock(9)));
    let entry = Entry::block(PoolBlock(7), Clock(10));
    node.set(3, entry);
    assert!(!node.is_empty());
    assert_eq!((node.entry(3), node.entry(2).kind), (entry, EntryKind::Hole));
    assert!(Node::decode(node.bytes(), 0, POOL_BLOCKS).is_ok());
}

#[test]
fn fields_that_a_kind_does_not_have_are_refused() {
    let block = Entry::block(PoolBlock(7), Clock(1));
    let hole = Entry::hole(Clock(1));
    for (entry, field) in [
        (Entry { checksum: 1, ..block }, "checksum"),
        (Entry { mirrored: true, ..block }, "mirrored"),
        (Entry { checksum: 1, ..hole }, "checksum"),
        (Entry { mirrored: true, ..hole }, "mirrored"),
        (Entry { address: PoolBlock(7), ..hole }, "address"),
    ] {
        assert_eq!(Entry::decode(&entry.encode()), Err(Check::Reserved(field)), "{entry:?}");
    }
}

fn decoded(change: impl FnOnce(&mut VolumeRecord)) -> Result<VolumeRecord, Check> {
    let mut record = samples::volume_record(&mut Rng::with_seed(2));
    record.sector_size = 4096;
    record.size_bytes = 1 << 20;
    change(&mut record);
    VolumeRecord::decode(&record.encode())
}

#[test]
fn volume_record_is_bounded() {
    assert!(decoded(|_| {}).is_ok());
    assert_out_of_bounds(decoded(|record| record.id = VolumeId(0)), "id");
    assert_out_of_bounds(decoded(|record| record.id = VolumeId(1 << 32)), "id");
    assert_out_of_bounds(decoded(|record| record.name.clear()), "name_length");
    assert_out_of_bounds(decoded(|record| record.size_bytes = 0), "size_bytes");
    assert_out_of_bounds(decoded(|record| record.size_bytes = 4096 + 512), "size_bytes");
    assert!(decoded(|record| record.size_bytes = 1 << 44).is_ok());
    assert_out_of_bounds(decoded(|record| record.size_bytes = (1 << 44) + 4096), "size_bytes");
    assert_out_of_bounds(decoded(|record| record.sector_size = 1024), "sector_size");
    assert_out_of_bounds(decoded(|record| record.created_at = Clock(1 << 40)), "created_at");
    assert_out_of_bounds(decoded(|record| record.shared_at = Clock(u64::MAX)), "shared_at");
    assert_out_of_bounds(decoded(|record| record.rolled_at = Clock(1 << 40)), "rolled_at");
    assert_out_of_bounds(decoded(|record| record.rolled_to = Clock(1 << 40)), "rolled_to");
    assert_out_of_bounds(decoded(|record| record.own_blocks = (1 << 32) + 1), "own_blocks");
    assert_out_of_bounds(decoded(|record| record.mapped_blocks = (1 << 32) + 1), "mapped_blocks");
    assert_out_of_bounds(decoded(|record| record.in_place_blocks = (1 << 32) + 1), "in_place_blocks");
    let root = Root { entry: Entry::node(PoolBlock(5), true, 0, Clock(1)), level: LEVEL_MAX + 1 };
    assert_out_of_bounds(decoded(|record| record.root = root), "root.level");
    let root = Root { level: 1, ..Root::empty(Clock(1)) };
    assert!(matches!(decoded(|record| record.root = root), Err(Check::Inconsistent(_))));
    let root = Root { entry: Entry::block(PoolBlock(5), Clock(1)), level: 0 };
    assert!(matches!(decoded(|record| record.root = root), Err(Check::Inconsistent(_))));
}

#[test]
fn attribute_blocks_of_a_record_are_bounded() {
    let reference = AttributeBlockRef { address: PoolBlock(POOL_BLOCKS), checksum: 1 };
    let with = |bytes, references: &[AttributeBlockRef]| {
        decoded(|record| (record.attributes_bytes, record.attributes) = (bytes, references.to_vec()))
    };
    assert!(with(0, &[]).is_ok() && with(4096, &[reference]).is_ok() && with(4097, &[reference; 2]).is_ok());
    assert!(matches!(with(4096, &[]), Err(Check::Inconsistent(_))));
    assert!(matches!(with(0, &[reference]), Err(Check::Inconsistent(_))));
    assert!(with(ATTRIBUTES_BYTES_MAX as u32, &[reference; ATTRIBUTE_BLOCKS_MAX]).is_ok());
    assert_out_of_bounds(with(ATTRIBUTES_BYTES_MAX as u32 + 1, &[reference; 64]), "attributes_bytes");
    let at = |address| AttributeBlockRef { address: PoolBlock(address), checksum: 1 };
    assert_out_of_bounds(with(1, &[at(0)]), "attributes.address");
    assert_out_of_bounds(with(1, &[at(1 << 48)]), "attributes.address");
    let record = with(1, &[reference]).expect("48 bits");
    assert_out_of_bounds(record.check_addresses(POOL_BLOCKS), "attributes.address");
    assert_eq!(record.check_addresses(POOL_BLOCKS + 1), Ok(()));
}

#[test]
fn name_of_a_record_is_text() {
    let mut bytes = decoded(|_| {}).expect("legal").encode();
    bytes[272] = 0xff;
    assert_eq!(VolumeRecord::decode(&bytes), Err(Check::Text("name")));
}

fn superblock_check(change: impl FnOnce(&mut Superblock)) -> Result<(), Check> {
    let mut superblock = samples::superblock(&mut Rng::with_seed(3));
    superblock.geometry = Geometry { pool_blocks: 1 << 20, journal_blocks: 256 };
    superblock.groups_in_use = 1;
    superblock.group_index.truncate(1);
    (superblock.journal_append, superblock.used_blocks, superblock.scrub.next) = (0, 0, PoolBlock(0));
    superblock.volume_table = Root::empty(Clock(0));
    superblock.carcass_table = Root::empty(Clock(0));
    change(&mut superblock);
    match Superblock::decode(&superblock.encode()) {
        Ok(_) => Ok(()),
        Err(Error::Corrupt(Corrupt { check, .. })) => Err(check),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn superblock_is_bounded() {
    assert_eq!(superblock_check(|_| {}), Ok(()));
    assert_out_of_bounds(superblock_check(|block| block.scrub.next.0 = (1 << 20) + 1), "scrub_next");
    assert_out_of_bounds(superblock_check(|block| block.generation.0 = 0), "generation");
    assert_out_of_bounds(superblock_check(|block| block.clock.0 = 1 << 40), "clock");
    // The next one must still be a number.
    assert_eq!(superblock_check(|block| block.lsn.0 = 1 << 62), Ok(()));
    assert_out_of_bounds(superblock_check(|block| block.generation.0 = u64::MAX), "generation");
    assert_out_of_bounds(superblock_check(|block| block.lsn.0 = (1 << 62) + 1), "lsn");
    assert_out_of_bounds(superblock_check(|block| block.next_carcass = u64::MAX), "next_carcass");
    assert_out_of_bounds(superblock_check(|block| block.geometry.pool_blocks = 1000), "pool_blocks");
    assert_out_of_bounds(superblock_check(|block| block.geometry.pool_blocks = u64::MAX), "pool_blocks");
    assert_out_of_bounds(superblock_check(|block| block.geometry.journal_blocks = 255), "journal_blocks");
    assert_out_of_bounds(superblock_check(|block| block.geometry.journal_blocks = u64::MAX), "pool_blocks");
    assert_eq!(superblock_check(|block| block.groups_in_use = 32), Ok(()));
    assert_out_of_bounds(superblock_check(|block| block.groups_in_use = 33), "groups_in_use");
    assert_eq!(superblock_check(|block| block.journal_append = 256), Ok(()));
    assert_out_of_bounds(superblock_check(|block| block.journal_append = 257), "journal_append");
    assert_out_of_bounds(superblock_check(|block| block.used_blocks = (1 << 20) + 1), "used_blocks");
    assert_out_of_bounds(superblock_check(|block| block.next_volume.0 = (1 << 32) + 1), "next_volume");
    assert_out_of_bounds(superblock_check(|block| block.volume_count = (1 << 32) + 1), "volume_count");
    let outside = Root { entry: Entry::node(PoolBlock(1 << 20), false, 0, Clock(0)), level: 0 };
    assert_out_of_bounds(superblock_check(|block| block.volume_table = outside), "address");
    assert_out_of_bounds(superblock_check(|block| block.carcass_table = outside), "address");
    let reference = GroupIndexRef { checksum: 1, slot: Slot::A, level: 0 };
    assert_out_of_bounds(superblock_check(|block| block.group_index.push(reference)), "group_index_count");
    assert!(matches!(superblock_check(|block| block.group_index.clear()), Err(Check::Inconsistent(_))));
    assert!(matches!(superblock_check(|block| block.group_index[0].level = 1), Err(Check::Undefined { .. })));
}

#[test]
fn carcass_is_bounded() {
    let decoded = |change: fn(&mut Carcass)| {
        let entry = Entry::node(PoolBlock(9), true, 3, Clock(2));
        let (first, volume) = (VirtualBlock(1 << 16), VolumeId(4));
        let (created_at, cut) = (Clock(1), 1);
        let (account, counting) = (true, false);
        let mut carcass = Carcass {
            id: 1,
            entry,
            level: 1,
            first,
            cursor: (1 << 16) - 1,
            volume,
            created_at,
            account,
            counting,
            cut,
        };
        change(&mut carcass);
        decode_carcasses(&*encode_carcasses(&[carcass]), POOL_BLOCKS)
    };
    assert!(decoded(|_| {}).is_ok());
    assert_out_of_bounds(decoded(|carcass| carcass.cursor += 1), "carcass.cursor");
    assert_out_of_bounds(decoded(|carcass| carcass.first.0 += 256), "carcass.first");
    assert_out_of_bounds(decoded(|carcass| carcass.first.0 = 1 << 32), "carcass.first");
    assert_out_of_bounds(decoded(|carcass| carcass.level = 4), "carcass.level");
    assert_out_of_bounds(decoded(|carcass| carcass.volume.0 = 0), "carcass.volume");
    assert_out_of_bounds(decoded(|carcass| carcass.cut = 2), "carcass.cut");
    assert_out_of_bounds(decoded(|carcass| carcass.entry.address.0 = POOL_BLOCKS), "address");
    assert!(matches!(decoded(|carcass| carcass.entry = Entry::hole(Clock(1))), Err(Check::Inconsistent(_))));
}

#[test]
fn group_structures_are_bounded() {
    let mut bytes = GroupIndex::new().encode();
    bytes[4..6].copy_from_slice(&32769_u16.to_le_bytes());
    assert_out_of_bounds(GroupIndex::decode(&*bytes), "group.free_blocks");
    let bytes = GroupDescriptor::new(5).encode();
    assert!(GroupDescriptor::decode(&*bytes, 5).is_ok());
    assert_out_of_bounds(GroupDescriptor::decode(&*bytes, 6), "group");
}

#[test]
fn attributes_fill_their_space_and_no_more() {
    let encode = |length| encode_attributes(&BTreeMap::from([("key".to_owned(), vec![7; length])]));
    let most = ATTRIBUTES_BYTES_MAX - 16 - 8 - 3;
    let encoded = encode(most).expect("just fits");
    assert_eq!(encoded.len(), ATTRIBUTES_BYTES_MAX);
    assert_eq!(decode_attributes(&encoded, encoded.len()).expect("legal")["key"].len(), most);
    assert!(matches!(encode(most + 1), Err(Error::InvalidInput(_))));
    let empty_key = encode_attributes(&BTreeMap::from([(String::new(), Vec::new())]));
    assert!(matches!(empty_key, Err(Error::InvalidInput(_))));
}

#[test]
fn no_attributes_take_no_block() {
    assert_eq!(encode_attributes(&BTreeMap::new()).expect("legal"), Vec::<u8>::new());
    assert_eq!(decode_attributes(&[], 0), Ok(BTreeMap::new()));
}

#[test]
fn attributes_out_of_order_are_refused() {
    let map = BTreeMap::from([("a".to_owned(), vec![]), ("b".to_owned(), vec![])]);
    let mut encoded = encode_attributes(&map).expect("legal");
    let length = 16 + 2 * 9;
    assert_eq!(decode_attributes(&encoded, length), Ok(map));
    encoded.swap(24, 33);
    assert!(matches!(decode_attributes(&encoded, length), Err(Check::Inconsistent(_))));
    encoded[33] = encoded[24];
    assert!(matches!(decode_attributes(&encoded, length), Err(Check::Inconsistent(_))));
    assert_eq!(decode_attributes(&encoded, 9000), Err(Check::Truncated));
}

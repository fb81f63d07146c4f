//! The bytes themselves. A change here is a change of the format: it comes with `docs/format.md`, a fixture and a feature
//! bit, never alone.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::format::*;
use crate::units::{Clock, Generation, Lsn, PoolBlock, VirtualBlock, VolumeId};

const POOL: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
const NODE: Entry = Entry::node(PoolBlock(0x0102_0304_0506), true, 0x0708_090a, Clock(0x0b_0c0d_0e0f));
const ROOT: Root = Root { entry: NODE, level: 2 };

fn volume_record() -> VolumeRecord {
    VolumeRecord {
        id: VolumeId(3),
        uuid: Uuid::from_u128(4),
        name: "debian".to_owned(),
        size_bytes: 5 << 30,
        sector_size: 512,
        flags: VolumeFlags { read_only: true, ephemeral: true, ..VolumeFlags::default() },
        root: ROOT,
        created_at: Clock(6),
        shared_at: Clock(7),
        rolled_at: Clock(8),
        rolled_to: Clock(9),
        origin: Some(OriginRef { id: VolumeId(10), uuid: Uuid::from_u128(11), clock: Clock(12) }),
        received_from: Some((Uuid::from_u128(13), Clock(14))),
        own_blocks: 15,
        mapped_blocks: 16,
        in_place_blocks: 25,
        quota_bytes: 17,
        reservation_bytes: 18,
        on_full: OnFull::Wait,
        digest: Some([19; 32]),
        created_time: 20,
        depth: 21,
        attributes: vec![AttributeBlockRef { address: PoolBlock(22), checksum: 23 }],
        attributes_bytes: 24,
        account_spans: vec![AccountSpan { volume: VolumeId(5), first: 3, end: 6 }],
        accounts_from: 7,
    }
}

fn superblock() -> Superblock {
    Superblock {
        uuid: POOL,
        name: "tank".to_owned(),
        read_only_compatible: 1,
        compatible: 2,
        incompatible: 0,
        generation: Generation(3),
        clock: Clock(4),
        lsn: Lsn(5),
        geometry: Geometry { pool_blocks: 1 << 20, journal_blocks: 1 << 14 },
        groups_in_use: 6,
        journal_append: 7,
        journal_chain: 8,
        session: 9,
        volume_table: ROOT,
        carcass_table: Root::empty(Clock(12)),
        next_volume: VolumeId(13),
        next_carcass: 14,
        transaction_id: 15,
        size_limit_bytes: 0,
        verify_on_read: false,
        scrub: ScrubState::default(),
        volume_count: 16,
        used_blocks: 17,
        metadata_blocks: None,
        group_index: vec![GroupIndexRef { checksum: 18, slot: Slot::B, level: 0 }],
    }
}

#[test]
fn entry_has_these_bytes() {
    let expected = [6, 5, 4, 3, 2, 1, 0x12, 0x0a, 9, 8, 7, 0x0f, 0x0e, 0x0d, 0x0c, 0x0b];
    assert_eq!(NODE.encode(), expected);
    assert_eq!(Entry::block(PoolBlock(1), Clock(2)).encode(), [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
    assert_eq!(Entry::hole(Clock(3)).encode(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0]);
}

#[test]
fn checksum_is_crc32_over_pool_place_and_block() {
    let mut bytes = POOL.as_bytes().to_vec();
    bytes.extend([8, 0, 0, 0, 5, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, b'x', b'y']);
    assert_eq!(checksum(&POOL, Place::SpaceMapPage { group: 7, page: 5 }, b"xy"), crc32fast::hash(&bytes));
    // CRC-32 itself: the check value of the catalogues.
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
}

#[test]
fn places_have_checksums_of_their_own() {
    let places = [
        Place::Node { level: 0, first: VirtualBlock(0) },
        Place::Node { level: 1, first: VirtualBlock(0) },
        Place::Node { level: 0, first: VirtualBlock(256) },
        Place::TableNode { level: 0, first: 0 },
        Place::VolumeRecord(VolumeId(0)),
        Place::Attributes { volume: VolumeId(0), index: 0 },
        Place::Attributes { volume: VolumeId(0), index: 1 },
        Place::CarcassPage(0),
        Place::GroupIndex(0),
        Place::GroupDescriptor(0),
        Place::SpaceMapPage { group: 0, page: 0 },
        Place::SpaceMapPage { group: 0, page: 1 },
        Place::ChecksumPage { group: 0, page: 0 },
    ];
    let pools = [POOL, Uuid::from_u128(1)];
    let of = |pool| places.map(|place| checksum(pool, place, &[0; 4096]));
    let mut checksums = [of(&pools[0]), of(&pools[1])].concat();
    checksums.sort_unstable();
    checksums.dedup();
    assert_eq!(checksums.len(), 2 * places.len());
}

#[test]
fn encodings_are_those_of_version_1() {
    let mut index = GroupIndex::new();
    index.entries[1] = GroupIndexEntry { checksum: 1, slot: Slot::B, empty: false, free_blocks: 2 };
    let mut descriptor = GroupDescriptor::new(3);
    descriptor.pages[1] = PageRef { checksum: 4, slot: Slot::B, present: true };
    descriptor.checksum_pages[2] = PageRef { checksum: 5, slot: Slot::A, present: true };
    let carcass = Carcass {
        id: 1,
        entry: NODE,
        level: 1,
        first: VirtualBlock(1 << 16),
        cursor: 2,
        volume: VolumeId(3),
        created_at: Clock(4),
        account: true,
        counting: true,
        cut: 1,
    };
    let attributes = BTreeMap::from([("key".to_owned(), b"value".to_vec()), ("z".to_owned(), Vec::new())]);
    let (volume, origin, clock) = (VolumeId(1), VolumeId(2), Clock(3));
    let created = Box::new(volume_record());
    let mut records = Vec::new();
    for record in [
        Record::Map { volume, virtual_block: VirtualBlock(2), pool_block: PoolBlock(3), count: 4 },
        Record::Unmap { volume, virtual_block: VirtualBlock(2), count: 5 },
        Record::VolumeCreated(created.clone()),
        Record::VolumeChanged(created.clone()),
        Record::VolumeDeleted { volume },
        Record::VolumeShared { origin, clock, created },
        Record::VolumeRolledBack { volume, snapshot: origin, clock },
        Record::PoolGrown { groups_in_use: 6 },
    ] {
        record.encode(&mut records);
    }
    let (batch, _) = encode_batch(&POOL, Generation(1), Lsn(2), Lsn(3), 4, &records);
    let claim = HostClaim { machine: POOL, boot: Uuid::from_u128(1), beat: 2, time: 3, name: "node-1".to_owned() };
    let hash = |bytes: &[u8]| format!("{:08x}", crc32fast::hash(bytes));
    let found = [
        ("superblock", hash(&superblock().encode())),
        ("volume record", hash(&volume_record().encode())),
        ("group index", hash(&*index.encode())),
        ("group descriptor", hash(&*descriptor.encode())),
        ("page", hash(&*encode_counts(&std::array::from_fn(|index| index as u32)))),
        ("carcass page", hash(&*encode_carcasses(&[carcass]))),
        ("attributes", hash(&encode_attributes(&attributes).expect("small"))),
        ("records", hash(&records)),
        ("batch", hash(&batch)),
        ("host claim", hash(&*claim.encode())),
    ];
    let expected = [
        ("superblock", "eec0b238"),
        ("volume record", "5595f3de"),
        ("group index", "42e6af8b"),
        ("group descriptor", "651daef2"),
        ("page", "f15f689b"),
        ("carcass page", "d10ab567"),
        ("attributes", "6b304391"),
        ("records", "45cde12e"),
        ("batch", "885cb13f"),
        ("host claim", "3023b289"),
    ];
    let found: Vec<(&str, &str)> = found.iter().map(|(name, hash)| (*name, hash.as_str())).collect();
    assert_eq!(found, expected);
}

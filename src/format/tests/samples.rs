//! Random values of every checked type, all of them legal, and a table of all codecs.

use std::collections::BTreeMap;

use fastrand::Rng;
use uuid::Uuid;

use crate::error::Check;
use crate::format::*;
use crate::units::{BLOCK_SIZE, Clock, Generation, Lsn, PoolBlock, VirtualBlock, VolumeId};

/// Size of the pool that samples belong to.
pub(in crate::format) const POOL_BLOCKS: u64 = 1 << 30;
/// The group that sample descriptors describe.
pub(in crate::format) const GROUP: u64 = 77;

pub(in crate::format) fn uuid(random: &mut Rng) -> Uuid {
    Uuid::from_u128(random.u128(1..))
}

fn clock(random: &mut Rng) -> Clock {
    Clock(random.u64(..1 << 40))
}

fn address(random: &mut Rng) -> PoolBlock {
    PoolBlock(random.u64(1..POOL_BLOCKS - 1))
}

fn slot(random: &mut Rng) -> Slot {
    if random.bool() { Slot::A } else { Slot::B }
}

fn volume_id(random: &mut Rng) -> VolumeId {
    VolumeId(random.u64(1..VOLUME_BLOCKS_MAX))
}

pub(in crate::format) fn node_entry(random: &mut Rng) -> Entry {
    Entry::node(address(random), random.bool(), random.u32(..), clock(random))
}

pub(in crate::format) fn entry(random: &mut Rng) -> Entry {
    match random.u8(..3) {
        0 => Entry::hole(clock(random)),
        1 => Entry::block(address(random), clock(random)),
        _ => node_entry(random),
    }
}

pub(in crate::format) fn root(random: &mut Rng) -> Root {
    if random.bool() {
        Root::empty(clock(random))
    } else {
        Root { entry: node_entry(random), level: random.u8(..=LEVEL_MAX) }
    }
}

pub(in crate::format) fn node(random: &mut Rng, leaf: bool) -> Node {
    let mut node = Node::new(clock(random));
    for index in 0..ENTRIES_PER_NODE {
        if random.bool() {
            let mapped = if leaf { Entry::block(address(random), clock(random)) } else { node_entry(random) };
            node.set(index, mapped);
        }
    }
    node
}

pub(in crate::format) fn superblock(random: &mut Rng) -> Superblock {
    let geometry = Geometry { pool_blocks: POOL_BLOCKS, journal_blocks: random.u64(256..100_000) };
    let index_count = random.u64(1..=geometry.index_count());
    Superblock {
        uuid: uuid(random),
        name: "n".repeat(random.usize(..=POOL_NAME_BYTES_MAX)),
        read_only_compatible: 0,
        compatible: random.u64(..),
        incompatible: 0,
        generation: Generation(random.u64(1..=1 << 62)),
        clock: clock(random),
        lsn: Lsn(random.u64(..=1 << 62)),
        geometry,
        groups_in_use: random.u64(..=geometry.group_count().min(index_count * GROUPS_PER_INDEX)),
        journal_append: random.u64(..=geometry.journal_blocks),
        journal_chain: random.u32(..),
        session: random.u128(..),
        volume_table: root(random),
        carcass_table: root(random),
        next_volume: volume_id(random),
        next_carcass: random.u64(..=1 << 62),
        transaction_id: random.u64(..),
        size_limit_bytes: random.u64(..),
        verify_on_read: random.bool(),
        scrub: ScrubState {
            next: PoolBlock(random.u64(..geometry.pool_blocks)),
            faults: random.u64(..1 << 40),
            begun: random.u64(..),
            ended: random.u64(..),
        },
        volume_count: random.u64(..1000),
        used_blocks: random.u64(..POOL_BLOCKS),
        metadata_blocks: random.bool().then(|| random.u64(..POOL_BLOCKS)),
        group_index: (0..index_count)
            .map(|_| GroupIndexRef { checksum: random.u32(..), slot: slot(random), level: 0 })
            .collect(),
    }
}

pub(in crate::format) fn group_index(random: &mut Rng) -> GroupIndex {
    let mut index = GroupIndex::new();
    for entry in index.entries.iter_mut() {
        entry.free_blocks = random.u32(..=GROUP_BLOCKS as u32);
        if random.bool() {
            (entry.empty, entry.checksum, entry.slot) = (false, random.u32(..), slot(random));
        }
    }
    index
}

fn page_ref(random: &mut Rng) -> PageRef {
    if random.bool() {
        PageRef::ABSENT
    } else {
        PageRef { checksum: random.u32(..), slot: slot(random), present: true }
    }
}

pub(in crate::format) fn group_descriptor(random: &mut Rng) -> GroupDescriptor {
    let mut descriptor = GroupDescriptor::new(GROUP);
    descriptor.pages.fill_with(|| page_ref(random));
    descriptor.checksum_pages.fill_with(|| page_ref(random));
    descriptor
}

pub(in crate::format) fn volume_record(random: &mut Rng) -> VolumeRecord {
    let sector_size = if random.bool() { 512 } else { 4096 };
    let attributes_bytes = random.u32(..=ATTRIBUTES_BYTES_MAX as u32);
    let attribute_count = attributes_bytes.div_ceil(BLOCK_SIZE as u32);
    VolumeRecord {
        id: volume_id(random),
        uuid: uuid(random),
        name: "v".repeat(random.usize(1..=VOLUME_NAME_BYTES_MAX)),
        size_bytes: random.u64(1..1 << 30) * u64::from(sector_size),
        sector_size,
        flags: VolumeFlags {
            read_only: random.bool(),
            sealed: random.bool(),
            protected: random.bool(),
            skip_activation: random.bool(),
            verify_on_read: random.bool(),
            ephemeral: random.bool(),
            detect_zeroes: random.bool(),
        },
        root: root(random),
        created_at: clock(random),
        shared_at: clock(random),
        rolled_at: clock(random),
        rolled_to: clock(random),
        origin: random.bool().then(|| OriginRef { id: volume_id(random), uuid: uuid(random), clock: clock(random) }),
        received_from: random.bool().then(|| (uuid(random), clock(random))),
        own_blocks: random.u64(..1 << 32),
        mapped_blocks: random.u64(..=1 << 32),
        in_place_blocks: random.u64(..=1 << 32),
        quota_bytes: random.u64(..),
        reservation_bytes: random.u64(..),
        on_full: if random.bool() { OnFull::Error } else { OnFull::Wait },
        digest: random.bool().then(|| [random.u8(..); 32]),
        created_time: random.u64(..),
        depth: random.u32(..),
        attributes: (0..attribute_count)
            .map(|_| AttributeBlockRef { address: address(random), checksum: random.u32(..) })
            .collect(),
        attributes_bytes,
        account_spans: (0..random.usize(..=ACCOUNT_SPANS_MAX))
            .map(|_| {
                let first = random.u64(..1 << 40);
                AccountSpan { volume: volume_id(random), first, end: first + random.u64(1..100) }
            })
            .collect(),
        accounts_from: random.u64(..),
    }
}

pub(in crate::format) fn attributes(random: &mut Rng) -> BTreeMap<String, Vec<u8>> {
    (0..random.usize(1..40))
        .map(|index| {
            let key = format!("{index}{}", "k".repeat(random.usize(..100)));
            let length = random.usize(..2000);
            (key, std::iter::repeat_with(|| random.u8(..)).take(length).collect())
        })
        .collect()
}

pub(in crate::format) fn carcass(random: &mut Rng) -> Carcass {
    let level = random.u8(..=LEVEL_MAX);
    let span = span_blocks(level);
    let id = random.u64(..);
    Carcass {
        id,
        entry: node_entry(random),
        level,
        first: VirtualBlock(random.u64(..VOLUME_BLOCKS_MAX / span) * span),
        cursor: random.u64(..span),
        volume: volume_id(random),
        created_at: clock(random),
        account: random.bool(),
        counting: random.bool(),
        cut: random.u64(..=id),
    }
}

pub(in crate::format) fn carcasses(random: &mut Rng) -> Vec<Carcass> {
    (0..random.usize(..=CARCASSES_PER_PAGE)).map(|_| carcass(random)).collect()
}

/// A record of each kind in turn.
pub(in crate::format) fn record(random: &mut Rng, kind: usize) -> Record {
    let volume = volume_id(random);
    let virtual_block = VirtualBlock(random.u64(..VOLUME_BLOCKS_MAX / 2));
    match kind % 8 {
        0 => Record::Map { volume, virtual_block, pool_block: address(random), count: random.u32(1..1 << 20) },
        1 => Record::Unmap { volume, virtual_block, count: random.u64(1..VOLUME_BLOCKS_MAX / 2) },
        2 => Record::VolumeCreated(Box::new(volume_record(random))),
        3 => Record::VolumeChanged(Box::new(volume_record(random))),
        4 => Record::VolumeDeleted { volume },
        5 => Record::VolumeShared { origin: volume, clock: clock(random), created: Box::new(volume_record(random)) },
        6 => Record::VolumeRolledBack { volume, snapshot: volume_id(random), clock: clock(random) },
        _ => Record::PoolGrown { groups_in_use: random.u64(..) },
    }
}

fn host_claim(random: &mut Rng) -> HostClaim {
    let name = "node-1.example".chars().take(random.usize(..15)).collect();
    HostClaim { machine: uuid(random), boot: uuid(random), beat: random.u64(..), time: random.u64(..), name }
}

/// One structure's codec as bytes to bytes: a random legal encoding, and decoding followed by encoding.
pub(in crate::format) struct Codec {
    pub(in crate::format) name: &'static str,
    pub(in crate::format) sample: fn(&mut Rng) -> Vec<u8>,
    pub(in crate::format) recode: fn(&[u8]) -> Result<Vec<u8>, Check>,
}

/// All structures that fill blocks or stand in one, but for superblock and batch, whose own checksums keep them from
/// being changed at random.
pub(in crate::format) const CODECS: &[Codec] = &[
    Codec {
        name: "entry",
        sample: |random| entry(random).encode().to_vec(),
        recode: |bytes| {
            Entry::decode(bytes.try_into().map_err(|_| Check::Truncated)?).map(|entry| entry.encode().to_vec())
        },
    },
    Codec {
        name: "leaf",
        sample: |random| node(random, true).bytes().to_vec(),
        recode: |bytes| Node::decode(bytes, 0, POOL_BLOCKS).map(|node| rebuilt(&node)),
    },
    Codec {
        name: "inner node",
        sample: |random| node(random, false).bytes().to_vec(),
        recode: |bytes| Node::decode(bytes, 1, POOL_BLOCKS).map(|node| rebuilt(&node)),
    },
    Codec {
        name: "table leaf",
        sample: |random| node(random, false).bytes().to_vec(),
        recode: |bytes| Node::decode_table(bytes, 0, POOL_BLOCKS).map(|node| rebuilt(&node)),
    },
    Codec {
        name: "group index",
        sample: |random| group_index(random).encode().to_vec(),
        recode: |bytes| GroupIndex::decode(bytes).map(|index| index.encode().to_vec()),
    },
    Codec {
        name: "group descriptor",
        sample: |random| group_descriptor(random).encode().to_vec(),
        recode: |bytes| GroupDescriptor::decode(bytes, GROUP).map(|descriptor| descriptor.encode().to_vec()),
    },
    Codec {
        name: "page",
        sample: |random| encode_counts(&std::array::from_fn(|_| random.u32(..))).to_vec(),
        recode: |bytes| decode_counts(bytes).map(|counts| encode_counts(&counts).to_vec()),
    },
    Codec {
        name: "volume record",
        sample: |random| volume_record(random).encode().to_vec(),
        recode: |bytes| VolumeRecord::decode(bytes).map(|record| record.encode().to_vec()),
    },
    Codec {
        name: "carcass page",
        sample: |random| encode_carcasses(&carcasses(random)).to_vec(),
        recode: |bytes| decode_carcasses(bytes, POOL_BLOCKS).map(|carcasses| encode_carcasses(&carcasses).to_vec()),
    },
    Codec {
        name: "host claim",
        sample: |random| host_claim(random).encode().to_vec(),
        recode: |bytes| {
            HostClaim::decode(bytes).map(|claim| claim.map_or(vec![0; BLOCK_SIZE], |claim| claim.encode().to_vec()))
        },
    },
    Codec {
        name: "attributes",
        sample: |random| encode_attributes(&attributes(random)).expect("samples are small"),
        recode: |bytes| {
            let attributes = decode_attributes(bytes, bytes.len())?;
            Ok(encode_attributes(&attributes).expect("what was read can be written"))
        },
    },
    Codec {
        name: "record",
        sample: |random| {
            let kind = random.usize(..);
            let mut bytes = Vec::new();
            record(random, kind).encode(&mut bytes);
            bytes
        },
        recode: |bytes| {
            let (record, length) = Record::decode(bytes)?;
            let mut encoded = Vec::new();
            record.encode(&mut encoded);
            assert_eq!(encoded.len(), length, "the length taken is the length written");
            encoded.extend_from_slice(&bytes[length..]);
            Ok(encoded)
        },
    },
];

/// The node with every entry taken out and put back, so that reading entries is part of the test.
fn rebuilt(node: &Node) -> Vec<u8> {
    let mut copy = Node::new(Clock(0));
    for index in 0..ENTRIES_PER_NODE {
        copy.set(index, node.entry(index));
    }
    copy.bytes().to_vec()
}

/// Gives a changed superblock the checksum that `docs/format.md` describes, computed without the code under test.
pub(in crate::format) fn fix_superblock(bytes: &mut [u8; BLOCK_SIZE]) {
    bytes[12..16].fill(0);
    let checksum = crc32fast::hash(bytes);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
}

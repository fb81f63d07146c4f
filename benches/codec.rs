//! What do coding and checking a block of metadata cost?

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use plywood::format::{ENTRIES_PER_NODE, Entry, Node, Place, Record, checksum, decode_batch, encode_batch};
use plywood::units::{BLOCK_SIZE, Clock, Generation, Lsn, PoolBlock, VirtualBlock, VolumeId};
use uuid::Uuid;

const SEED: u64 = 1;
const POOL: Uuid = Uuid::from_u128(1);
const POOL_BLOCKS: u64 = 1 << 28;

/// A leaf whose entries all map something.
fn full_leaf() -> Node {
    let mut random = Rng::with_seed(SEED);
    let mut node = Node::new(Clock(1));
    for index in 0..ENTRIES_PER_NODE {
        node.set(index, Entry::block(PoolBlock(random.u64(100_000..POOL_BLOCKS)), Clock(random.u64(1..100))));
    }
    node
}

fn block(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(BLOCK_SIZE as u64));
    let leaf = full_leaf();
    let place = Place::Node { level: 0, first: VirtualBlock(0) };
    group.bench_function("checksum of a node", |bencher| {
        bencher.iter(|| checksum(&POOL, place, black_box(leaf.bytes())));
    });
    group.bench_function("decode of a leaf", |bencher| {
        bencher.iter(|| Node::decode(black_box(leaf.bytes()), 0, POOL_BLOCKS).expect("a leaf"));
    });
    group.bench_function("entry set in a leaf", |bencher| {
        let mut node = full_leaf();
        bencher.iter(|| node.set(black_box(77), Entry::block(PoolBlock(123_456), Clock(7))));
    });
    group.finish();
}

/// Map records of single blocks, encoded.
fn records(count: usize) -> Vec<u8> {
    let mut random = Rng::with_seed(SEED);
    let mut bytes = Vec::new();
    for _ in 0..count {
        let record = Record::Map {
            volume: VolumeId(1),
            virtual_block: VirtualBlock(random.u64(..1 << 20)),
            pool_block: PoolBlock(random.u64(100_000..POOL_BLOCKS)),
            count: 1,
        };
        record.encode(&mut bytes);
    }
    bytes
}

fn batch(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("batch");
    for count in [1, 64, 4096] {
        let encoded = records(count);
        let last = Lsn(count as u64);
        let (bytes, _) = encode_batch(&POOL, Generation(1), Lsn(1), last, 0, &encoded);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("encode", count), |bencher| {
            bencher.iter(|| encode_batch(&POOL, Generation(1), Lsn(1), last, 0, black_box(&encoded)));
        });
        group.bench_function(BenchmarkId::new("decode, with its records", count), |bencher| {
            bencher.iter(|| {
                let (_, records) = decode_batch(&POOL, black_box(&bytes)).expect("a batch");
                let mut rest = records.as_slice();
                while !rest.is_empty() {
                    let (record, length) = Record::decode(rest).expect("a record");
                    black_box(record);
                    rest = &rest[length..];
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, block, batch);
criterion_main!(benches);

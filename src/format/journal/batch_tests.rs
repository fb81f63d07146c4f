//! Batches: absent, torn and damaged ones are told apart.

use fastrand::Rng;
use uuid::Uuid;

use super::batch::{BATCH_BLOCKS_MAX, BATCH_RECORD_BYTES_MAX, BatchFault, RawBatchHeader, batch_start};
use super::{decode_batch, decode_batch_header, encode_batch};
use crate::error::Check;
use crate::units::{BLOCK_SIZE, Generation, Lsn, SECTOR_SIZE};

const POOL: Uuid = Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788);
const FIRST: Lsn = Lsn(1000);
const HEADER_BYTES: usize = size_of::<RawBatchHeader>();
/// Three blocks.
const RECORD_BYTES: usize = 9000;

fn records(random: &mut Rng, length: usize) -> Vec<u8> {
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

fn batch(first: Lsn, records: &[u8]) -> Vec<u8> {
    encode_batch(&POOL, Generation(4), first, Lsn(first.0 + 9), 77, records).0
}

fn decoded(bytes: &[u8]) -> Result<Vec<u8>, BatchFault> {
    decode_batch(&POOL, bytes).map(|(_, records)| records)
}

#[test]
fn batches_of_every_shape_come_back() {
    let mut random = Rng::with_seed(1);
    // Around the ends of the first sector, the second, and the first block.
    let sizes = [0, 8, 424, 432, 440, 928, 936, 944, 3952, 3960, 3968, 8000, BATCH_RECORD_BYTES_MAX];
    for size in sizes {
        let records = records(&mut random, size);
        let (bytes, checksum) = encode_batch(&POOL, Generation(4), FIRST, Lsn(1005), 77, &records);
        let header = decode_batch_header(&POOL, &bytes[..BLOCK_SIZE]).expect("a batch starts here");
        assert_eq!(header.blocks as usize * BLOCK_SIZE, bytes.len(), "{size}");
        assert_eq!((header.generation, header.first, header.last), (Generation(4), FIRST, Lsn(1005)));
        assert_eq!((header.previous, header.checksum, header.record_bytes), (77, checksum, size));
        assert_eq!(decode_batch(&POOL, &bytes), Ok((header, records)));
        assert_eq!(batch_start(&POOL, &bytes), Ok(Some(header)));
    }
    assert_eq!(batch(FIRST, &[0; 3960]).len(), BLOCK_SIZE);
    assert_eq!(batch(FIRST, &[0; 3961]).len(), 2 * BLOCK_SIZE);
    assert_eq!(batch(FIRST, &vec![0; BATCH_RECORD_BYTES_MAX]).len(), BATCH_BLOCKS_MAX * BLOCK_SIZE);
}

#[test]
fn checksum_follows_every_field_of_the_header() {
    let checksum = |pool: u128, generation, first, last, previous| {
        encode_batch(&Uuid::from_u128(pool), Generation(generation), Lsn(first), Lsn(last), previous, &[1; 8]).1
    };
    let one = checksum(1, 2, 3, 4, 5);
    for other in [
        checksum(9, 2, 3, 4, 5),
        checksum(1, 9, 3, 4, 5),
        checksum(1, 2, 4, 4, 5),
        checksum(1, 2, 3, 9, 5),
        checksum(1, 2, 3, 4, 9),
    ] {
        assert_ne!(one, other);
    }
}

#[test]
fn ring_without_a_batch_is_absent() {
    let zeros = [0; BLOCK_SIZE];
    assert_eq!(decode_batch_header(&POOL, &zeros), None);
    assert_eq!(decoded(&zeros), Err(BatchFault::Absent));
    assert_eq!(batch_start(&POOL, &zeros), Ok(None));
    // The middle of an older batch.
    let older = batch(Lsn(500), &[7; RECORD_BYTES]);
    let middle = &older[BLOCK_SIZE..2 * BLOCK_SIZE];
    assert_eq!(decode_batch_header(&POOL, middle), None);
    assert_eq!(decoded(middle), Err(BatchFault::Absent));
    assert_eq!(batch_start(&POOL, middle), Ok(None));
}

/// What the ring may hold where a batch goes: nothing, an older batch, and a former attempt at the same batch that was
/// torn and never replayed, so that its LSN is given again.
fn grounds(random: &mut Rng) -> [Vec<u8>; 3] {
    let length = 3 * BLOCK_SIZE;
    let older = batch(Lsn(500), &records(random, 3 * RECORD_BYTES))[BLOCK_SIZE..][..length].to_vec();
    let former = batch(FIRST, &records(random, RECORD_BYTES));
    [vec![0; length], older, former]
}

#[test]
fn write_cut_at_any_sector_is_torn() {
    let mut random = Rng::with_seed(2);
    let whole = batch(FIRST, &records(&mut random, RECORD_BYTES));
    for ground in grounds(&mut random) {
        for sectors in 1..whole.len() / SECTOR_SIZE {
            let mut bytes = ground.clone();
            bytes[..sectors * SECTOR_SIZE].copy_from_slice(&whole[..sectors * SECTOR_SIZE]);
            assert_eq!(decoded(&bytes), Err(BatchFault::Torn), "{sectors} sectors");
        }
    }
}

#[test]
fn any_sector_missing_is_torn_and_the_first_missing_is_absent() {
    let mut random = Rng::with_seed(3);
    let whole = batch(FIRST, &records(&mut random, RECORD_BYTES));
    for (kind, ground) in grounds(&mut random).into_iter().enumerate() {
        for sector in 0..whole.len() / SECTOR_SIZE {
            let range = sector * SECTOR_SIZE..(sector + 1) * SECTOR_SIZE;
            let mut bytes = whole.clone();
            bytes[range.clone()].copy_from_slice(&ground[range]);
            // The head of a former attempt is a head: what it begins is torn.
            let expected = if sector == 0 && kind != 2 { BatchFault::Absent } else { BatchFault::Torn };
            assert_eq!(decoded(&bytes), Err(expected), "sector {sector} on ground {kind}");
            if sector == 0 && kind != 2 {
                assert_eq!(batch_start(&POOL, &bytes), Ok(None));
            }
        }
    }
}

#[test]
fn sectors_in_any_combination_are_never_taken_for_damage() {
    let mut random = Rng::with_seed(4);
    let (mut torn, mut absent) = (0, 0);
    for _ in 0..2000 {
        let whole = batch(FIRST, &records(&mut random, RECORD_BYTES));
        let grounds = grounds(&mut random);
        let mut bytes = grounds[random.usize(..3)].clone();
        let mut all = true;
        for (new, old) in whole.chunks(SECTOR_SIZE).zip(bytes.chunks_mut(SECTOR_SIZE)) {
            if random.u8(..8) > 0 {
                old.copy_from_slice(new);
            } else {
                all = false;
            }
        }
        match decoded(&bytes) {
            Ok(_) => assert!(all),
            Err(BatchFault::Torn) => torn += 1,
            Err(BatchFault::Absent) => absent += 1,
            Err(BatchFault::Damaged(check)) => panic!("{check}"),
        }
    }
    assert!(torn > 100 && absent > 100, "{torn} torn, {absent} absent");
}

#[test]
fn every_flipped_bit_of_a_written_batch_is_damage() {
    let mut random = Rng::with_seed(5);
    // Half a block: padding is covered, too.
    let whole = batch(FIRST, &records(&mut random, 2000));
    let header = decode_batch_header(&POOL, &whole).expect("a batch starts here");
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(decoded(&bytes), Err(BatchFault::Damaged(_))), "bit {bit}");
        // A destroyed header must look neither like the end of the chain nor like an older batch's.
        let in_header = bit / 8 < HEADER_BYTES || (504..512).contains(&(bit / 8));
        let expected = if in_header { Err(()) } else { Ok(Some(header)) };
        assert_eq!(batch_start(&POOL, &bytes).map_err(|_| ()), expected, "bit {bit}");
    }
}

#[test]
fn damaged_stamp_names_its_sector_even_when_others_are_missing() {
    let mut bytes = batch(FIRST, &[3; RECORD_BYTES]);
    bytes[5 * SECTOR_SIZE - 3] ^= 0x10;
    assert_eq!(decoded(&bytes), Err(BatchFault::Damaged(Check::Stamp(4))));
    bytes[2 * SECTOR_SIZE..3 * SECTOR_SIZE].fill(0);
    assert_eq!(decoded(&bytes), Err(BatchFault::Damaged(Check::Stamp(4))));
}

#[test]
fn sectors_of_one_batch_in_wrong_order_are_damage() {
    let mut random = Rng::with_seed(6);
    let mut bytes = batch(FIRST, &records(&mut random, RECORD_BYTES));
    let (left, right) = bytes.split_at_mut(5 * SECTOR_SIZE);
    left[3 * SECTOR_SIZE..4 * SECTOR_SIZE].swap_with_slice(&mut right[..SECTOR_SIZE]);
    assert!(matches!(decoded(&bytes), Err(BatchFault::Damaged(Check::Checksum { .. }))));
}

#[test]
fn batch_of_another_pool_is_not_ours() {
    let (bytes, _) = encode_batch(&Uuid::from_u128(5), Generation(1), FIRST, FIRST, 0, &[1; 8]);
    assert_eq!(decode_batch_header(&POOL, &bytes), None);
    assert_eq!(decoded(&bytes), Err(BatchFault::Damaged(Check::Uuid)));
}

#[test]
fn wrong_number_of_bytes_is_refused() {
    let bytes = batch(FIRST, &[3; RECORD_BYTES]);
    for length in [0, 1, 511, 512, BLOCK_SIZE, 2 * BLOCK_SIZE, bytes.len() - 1] {
        assert!(decoded(&bytes[..length]).is_err(), "{length}");
    }
    let mut longer = bytes;
    longer.extend([0; BLOCK_SIZE]);
    assert_eq!(decoded(&longer), Err(BatchFault::Damaged(Check::Truncated)));
    assert_eq!(batch_start(&POOL, &longer[..100]), Err(Check::Truncated));
}

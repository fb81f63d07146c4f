//! A stream of `plywood send`, read as `plywood receive` does.
//!
//! * Reading never panics and always ends.
//! * What is told lies in the snapshot, in ascending order, and no range reaches into the one before.
//! * Memory: the largest header or frame that is allowed, and a small multiple of the input.
//!
//! An even first byte makes numbers and checksums of the frames right, as far as there are frames: a stream of somebody who
//! means harm has right ones.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::cli::transfer::stream::{DATA_BYTES, Frame, HEAD_BYTES, Header, Identity, Reader, VERSION, Writer};
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::seeds;
use uuid::Uuid;

const BOUND: Bound = Bound { fixed_bytes: 8 << 20, multiple: 64 };
const MIB: u64 = 1 << 20;

fuzz_target!(
    init: seeds::offer(|| vec![sample(None, 0), sample(Some(identity(3, 64 * MIB)), 4096)]),
    |input: &[u8]| {
        let Some((kind, stream)) = input.split_first() else { return };
        let mut stream = stream.to_vec();
        if kind.is_multiple_of(2) {
            make_right(&mut stream);
        }
        bounded(BOUND, input.len(), || read(&stream));
    }
);

fn read(stream: &[u8]) {
    let Ok((mut reader, header)) = Reader::begin(stream) else { return };
    assert_eq!(header.version, VERSION);
    let mut end = header.start_bytes;
    loop {
        let (offset, length) = match reader.next_frame() {
            Ok(Frame::Data(offset, content)) => {
                assert!(content.len() <= DATA_BYTES);
                (offset, content.len() as u64)
            }
            Ok(Frame::Zero(offset, length)) => (offset, length),
            Ok(Frame::Done) | Err(_) => return,
        };
        assert!(offset >= end && length > 0 && offset % 4096 == 0);
        end = offset + length;
        assert!(end <= header.snapshot.size_bytes);
    }
}

fn make_right(stream: &mut [u8]) {
    let (mut at, mut number, mut before) = (0, 0_u64, 0_u32);
    while let Some(head) = stream.get(at..at + HEAD_BYTES) {
        let length = u32::from_le_bytes(head[4..8].try_into().expect("four bytes")) as usize;
        let end = at + HEAD_BYTES + length;
        let Some(frame) = stream.get_mut(at..end) else { return };
        frame[8..16].copy_from_slice(&number.to_le_bytes());
        frame[16..20].copy_from_slice(&before.to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&frame[..20]);
        hasher.update(&frame[HEAD_BYTES..]);
        before = hasher.finalize();
        frame[20..HEAD_BYTES].copy_from_slice(&before.to_le_bytes());
        number += 1;
        at = end;
    }
}

fn identity(number: u128, size_bytes: u64) -> Identity {
    Identity { uuid: Uuid::from_u128(number), name: format!("s{number}"), size_bytes, digest: "5a".repeat(32) }
}

fn sample(base: Option<Identity>, start_bytes: u64) -> Vec<u8> {
    let attributes = [("label".to_owned(), "value".into())].into();
    let build = "test".to_owned();
    let snapshot = identity(1, 64 * MIB);
    let header = Header { version: VERSION, build, snapshot, base, sector_size: 512, attributes, start_bytes };
    let mut writer = Writer::begin(vec![0], &header).expect("a stream");
    writer.data(4096, &[7; 600]).expect("a stream");
    writer.zero(MIB, 3 * MIB).expect("a stream");
    writer.data(63 * MIB, &[9; 100]).expect("a stream");
    writer.end().expect("a stream")
}

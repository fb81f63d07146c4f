//! A request of the kernel, as the engine process parses it: header, fixed struct, name, lengths.
//!
//! * Parsing never panics. What is accepted is about a node that exists, its range ends where a file can end, and its data
//!   are no more than the payload holds.
//! * A refusal is an errno. FSYNC is never refused as unknown, which the kernel would take for success.
//! * Nothing is allocated.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::export::fuse::request::{NAME_BYTES, Operation, parse};
use plywood::export::shared::{Arrangement, RawRequest};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::seeds;

const PAYLOAD_BYTES: usize = 128 << 10;
const FSYNC: u32 = 20;
const ENOSYS: i32 = 38;

fn ends_in_a_file(offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok())
}

fn check(operation: Operation, payload_len: usize) {
    match operation {
        Operation::Read { offset, len, .. } => {
            assert!(len <= PAYLOAD_BYTES && ends_in_a_file(offset, len as u64));
        }
        Operation::Write { offset, len, .. } => {
            assert!(len <= PAYLOAD_BYTES && len == payload_len && ends_in_a_file(offset, len as u64));
        }
        Operation::ReadDirectory { len, .. } => assert!(len <= PAYLOAD_BYTES),
        Operation::Punch { offset, len, .. } | Operation::Zero { offset, len, .. } => {
            assert!(ends_in_a_file(offset, len));
        }
        Operation::Lookup(volume) => assert!(volume.is_none_or(|id| id.0 < u64::MAX)),
        _ => {}
    }
}

fuzz_target!(
    init: seeds::offer(|| {
        // Opcodes of linux/fuse.h that are understood.
        let opcodes = [1_u32, 3, 4, 14, 15, 16, 17, 18, 20, 27, 28, 29, 38, 43, 46];
        let seed = |opcode: &u32| {
            let mut input = vec![0, 128, 0, 16, 0, 0];
            input.extend_from_slice(&[40, 0, 0, 0]);
            input.extend_from_slice(&opcode.to_le_bytes());
            input.extend_from_slice(&[9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
            input.resize(6 + 40, 0);
            // File 3, offset 4096, 4096 bytes: the head of most structs.
            for number in [3_u64, 4096, 4096] {
                input.extend_from_slice(&number.to_le_bytes());
            }
            input.resize(6 + 40 + 128, 0);
            input.extend_from_slice(b"17\0");
            input
        };
        opcodes.iter().map(seed).collect()
    }),
    |input: &[u8]| bounded(Bound { fixed_bytes: 0, multiple: 0 }, 0, || {
        let mut fields = Fields(input);
        let arrangement = if fields.byte() & 1 == 0 { Arrangement::Ring } else { Arrangement::Stream };
        let op_in_len = usize::from(fields.byte()).min(128);
        let payload_len = fields.u32() as usize;
        let raw = RawRequest { header: fields.array(), op_in: fields.array(), op_in_len, payload_len };
        let name = fields.array::<NAME_BYTES>();
        match parse(&raw, arrangement, &name, PAYLOAD_BYTES) {
            Ok(request) => check(request.operation, payload_len),
            Err(errno) => {
                assert!((1..4096).contains(&errno));
                let opcode = u32::from_le_bytes([raw.header[4], raw.header[5], raw.header[6], raw.header[7]]);
                assert!(opcode != FSYNC || errno != ENOSYS);
            }
        }
    })
);

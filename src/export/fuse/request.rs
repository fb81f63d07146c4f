//! A request of the kernel, from its bytes: every field is checked here, once.
//!
//! [`parse`] is a pure function of bytes that an attacker with root could choose; it never panics.

use super::abi::{
    FallocateIn, FsyncIn, InHeader, LseekIn, OpenIn, ROOT_ID, ReadIn, ReleaseIn, SETATTR_OWNERSHIP, SETATTR_SIZE,
    SetAttrIn, WriteIn, opcode,
};
use crate::export::shared::{Arrangement, RawRequest};
use crate::units::VolumeId;

/// Who a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// The directory of all volumes.
    Root,
    /// The file of a volume.
    Volume(VolumeId),
}

/// What the kernel wants. Offsets and lengths are bytes, and offset + length does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Find a volume by the name of its file; none when no volume can have that name.
    Lookup(Option<VolumeId>),
    /// Attributes of the node.
    GetAttributes,
    /// Change of attributes; only the size matters, when one is given.
    SetAttributes(Option<u64>),
    /// Open the file, for reading only or not.
    Open {
        /// Nothing will be written.
        read_only: bool,
    },
    /// The last descriptor of an open file is gone.
    Release {
        /// Number that OPEN answered.
        file: u64,
    },
    /// Open or close the directory.
    Directory,
    /// List the directory.
    ReadDirectory {
        /// After the entry with this cookie.
        after: u64,
        /// At most so many bytes.
        len: usize,
    },
    /// About the file system.
    Statistics,
    /// Read.
    Read {
        /// Number that OPEN answered.
        file: u64,
        /// Where.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Write what the payload begins with.
    Write {
        /// Number that OPEN answered.
        file: u64,
        /// Where.
        offset: u64,
        /// How much.
        len: usize,
        /// The answer means that it is durable (O_DSYNC).
        durable: bool,
    },
    /// Make everything durable that was written.
    Flush {
        /// Number that OPEN answered.
        file: u64,
    },
    /// Give a range back; it reads as zeros afterwards.
    Punch {
        /// Number that OPEN answered.
        file: u64,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Fill a range with zeros that stay provisioned.
    Zero {
        /// Number that OPEN answered.
        file: u64,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Where data, or a hole, begins.
    Seek {
        /// Number that OPEN answered.
        file: u64,
        /// From where on.
        offset: u64,
        /// Data, or a hole.
        data: bool,
    },
    /// The session ends.
    Destroy,
}

/// A request whose fields are sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names the request within its session.
    pub unique: u64,
    /// Whom it is about.
    pub node: Node,
    /// What is wanted.
    pub operation: Operation,
}

/// Longest name that a volume's file can have: 20 digits.
pub const NAME_BYTES: usize = 24;

impl Node {
    /// The node's number for the kernel.
    pub fn number(self) -> u64 {
        match self {
            Self::Root => ROOT_ID,
            Self::Volume(id) => id.0 + 1,
        }
    }

    fn parse(number: u64) -> Result<Self, i32> {
        match number {
            0 => Err(libc::ENOENT),
            ROOT_ID => Ok(Self::Root),
            number => Ok(Self::Volume(VolumeId(number - 1))),
        }
    }
}

/// The name of a LOOKUP: NUL-terminated decimal digits without a leading zero.
fn volume_of_name(name: &[u8]) -> Option<VolumeId> {
    let name = name.split(|&byte| byte == 0).next()?;
    if name.len() == NAME_BYTES || name.first() == Some(&b'0') || !name.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // The highest id has no node number.
    let id = std::str::from_utf8(name).ok()?.parse().ok()?;
    (id < u64::MAX).then_some(VolumeId(id))
}

/// Reads a request. `name` is what the payload begins with, `payload_bytes` what it holds at most.
///
/// # Errors
/// The errno to be answered.
pub fn parse(
    raw: &RawRequest,
    arrangement: Arrangement,
    name: &[u8; NAME_BYTES],
    payload_bytes: usize,
) -> Result<Request, i32> {
    let header: InHeader = bytemuck::pod_read_unaligned(&raw.header);
    let body = Body { raw, payload_bytes };
    let operation = match header.opcode {
        opcode::LOOKUP => {
            let mut in_stream = [0; NAME_BYTES];
            let len = raw.op_in_len.min(NAME_BYTES);
            in_stream[..len].copy_from_slice(&raw.op_in[..len]);
            Operation::Lookup(volume_of_name(if arrangement == Arrangement::Ring { name } else { &in_stream }))
        }
        opcode::GETATTR => Operation::GetAttributes,
        opcode::SETATTR => body.set_attributes()?,
        opcode::OPEN => {
            let flags = body.fixed::<OpenIn>()?.flags.cast_signed();
            Operation::Open { read_only: flags & libc::O_ACCMODE == libc::O_RDONLY }
        }
        opcode::RELEASE => Operation::Release { file: body.fixed::<ReleaseIn>()?.fh },
        opcode::OPENDIR | opcode::RELEASEDIR => Operation::Directory,
        opcode::READDIR => {
            let ReadIn { offset, size, .. } = body.fixed()?;
            Operation::ReadDirectory { after: offset, len: body.transfer(0, size)? }
        }
        opcode::STATFS => Operation::Statistics,
        opcode::READ => {
            let ReadIn { fh, offset, size, .. } = body.fixed()?;
            Operation::Read { file: fh, offset, len: body.transfer(offset, size)? }
        }
        opcode::WRITE => {
            let WriteIn { fh, offset, size, flags, .. } = body.fixed()?;
            let len = body.transfer(offset, size)?;
            if raw.payload_len != len {
                return Err(libc::EINVAL);
            }
            // O_SYNC contains O_DSYNC.
            let durable = flags.cast_signed() & libc::O_DSYNC != 0;
            Operation::Write { file: fh, offset, len, durable }
        }
        opcode::FSYNC => Operation::Flush { file: body.fixed::<FsyncIn>()?.fh },
        opcode::FALLOCATE => body.fallocate()?,
        opcode::LSEEK => {
            let LseekIn { fh, offset, whence, .. } = body.fixed()?;
            let data = match whence.cast_signed() {
                libc::SEEK_DATA => true,
                libc::SEEK_HOLE => false,
                _ => return Err(libc::EINVAL),
            };
            Operation::Seek { file: fh, offset, data }
        }
        opcode::DESTROY => Operation::Destroy,
        // Once for each kind of request: the kernel then does without. Never for FSYNC, whose lack it takes for success.
        _ => return Err(libc::ENOSYS),
    };
    Ok(Request { unique: header.unique, node: Node::parse(header.nodeid)?, operation })
}

struct Body<'a> {
    raw: &'a RawRequest,
    payload_bytes: usize,
}

impl Body<'_> {
    fn fixed<T: bytemuck::AnyBitPattern>(&self) -> Result<T, i32> {
        // Older kernels send shorter forms of none of these structs.
        if self.raw.op_in_len < size_of::<T>() {
            return Err(libc::EINVAL);
        }
        self.raw.op_in.get(..size_of::<T>()).map(bytemuck::pod_read_unaligned).ok_or(libc::EINVAL)
    }

    /// Length of a transfer that the payload holds and whose end is a number.
    fn transfer(&self, offset: u64, size: u32) -> Result<usize, i32> {
        let len = size as usize;
        let end = offset.checked_add(u64::from(size)).filter(|&end| i64::try_from(end).is_ok());
        if len > self.payload_bytes || end.is_none() { Err(libc::EINVAL) } else { Ok(len) }
    }

    fn set_attributes(&self) -> Result<Operation, i32> {
        let SetAttrIn { valid, size, .. } = self.fixed()?;
        if valid & SETATTR_OWNERSHIP != 0 {
            return Err(libc::EPERM);
        }
        Ok(Operation::SetAttributes((valid & SETATTR_SIZE != 0).then_some(size)))
    }

    fn fallocate(&self) -> Result<Operation, i32> {
        let FallocateIn { fh: file, offset, length: len, mode, .. } = self.fixed()?;
        if offset.checked_add(len).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(libc::EFBIG);
        }
        match mode.cast_signed() & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => Ok(Operation::Punch { file, offset, len }),
            libc::FALLOC_FL_ZERO_RANGE => Ok(Operation::Zero { file, offset, len }),
            // ENOSYS would switch FALLOCATE off for the whole session.
            _ => Err(libc::EOPNOTSUPP),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: usize = 128 << 10;

    fn raw(opcode: u32, node: u64, fixed: &[u8], payload_len: usize) -> RawRequest {
        let header = InHeader { opcode, unique: 9, nodeid: node, ..InHeader::default() };
        let mut raw = RawRequest { header: [0; 40], op_in: [0; 128], op_in_len: 128, payload_len };
        raw.header.copy_from_slice(bytemuck::bytes_of(&header));
        raw.op_in[..fixed.len()].copy_from_slice(fixed);
        raw
    }

    fn parsed(raw: &RawRequest) -> Result<Operation, i32> {
        parse(raw, Arrangement::Ring, &[0; NAME_BYTES], PAYLOAD).map(|request| request.operation)
    }

    fn named(name: &[u8]) -> Option<VolumeId> {
        let mut bytes = [0; NAME_BYTES];
        bytes[..name.len()].copy_from_slice(name);
        let ring = raw(opcode::LOOKUP, 1, &[0xff; 128], name.len());
        let Ok(request) = parse(&ring, Arrangement::Ring, &bytes, PAYLOAD) else { panic!("refused") };
        let mut stream = raw(opcode::LOOKUP, 1, name, 0);
        stream.op_in_len = name.len() + 1;
        let same = parse(&stream, Arrangement::Stream, &[0xff; NAME_BYTES], PAYLOAD);
        assert_eq!(same, Ok(request), "both arrangements mean the same");
        let Operation::Lookup(volume) = request.operation else { panic!("another operation") };
        volume
    }

    #[test]
    fn names_are_decimal_ids_and_nothing_else() {
        assert_eq!(named(b"17"), Some(VolumeId(17)));
        assert_eq!(named(b"18446744073709551614"), Some(VolumeId(u64::MAX - 1)));
        for name in
            [&b""[..], b"0", b"017", b"+1", b"1a", b"..", b"18446744073709551615", b"99999999999999999999", &[b'1'; 24]]
        {
            assert_eq!(named(name), None, "{name:?}");
        }
    }

    #[test]
    fn writes_carry_their_data_whole_or_are_refused() {
        let write = |offset, size, flags: i32| {
            let fixed = WriteIn { fh: 3, offset, size, flags: flags.cast_unsigned(), ..WriteIn::default() };
            bytemuck::bytes_of(&fixed).to_vec()
        };
        let dsync = write(8192, 4096, libc::O_DSYNC | libc::O_WRONLY);
        assert_eq!(
            parsed(&raw(opcode::WRITE, 2, &dsync, 4096)),
            Ok(Operation::Write { file: 3, offset: 8192, len: 4096, durable: true })
        );
        assert_eq!(parsed(&raw(opcode::WRITE, 2, &dsync, 4095)), Err(libc::EINVAL));
        assert_eq!(parsed(&raw(opcode::WRITE, 2, &write(0, PAYLOAD as u32 + 1, 0), PAYLOAD + 1)), Err(libc::EINVAL));
        assert_eq!(parsed(&raw(opcode::WRITE, 2, &write(u64::MAX - 10, 4096, 0), 4096)), Err(libc::EINVAL));
    }

    #[test]
    fn fallocate_knows_two_modes() {
        let with_mode = |mode: i32, length| {
            let fixed = FallocateIn { offset: 4096, length, mode: mode.cast_unsigned(), ..FallocateIn::default() };
            parsed(&raw(opcode::FALLOCATE, 2, bytemuck::bytes_of(&fixed), 0))
        };
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(
            with_mode(libc::FALLOC_FL_PUNCH_HOLE | keep, 8192),
            Ok(Operation::Punch { file: 0, offset: 4096, len: 8192 })
        );
        assert_eq!(
            with_mode(libc::FALLOC_FL_ZERO_RANGE | keep, 8192),
            Ok(Operation::Zero { file: 0, offset: 4096, len: 8192 })
        );
        assert_eq!(with_mode(0, 8192), Err(libc::EOPNOTSUPP));
        assert_eq!(with_mode(libc::FALLOC_FL_PUNCH_HOLE | keep, u64::MAX - 100), Err(libc::EFBIG));
    }

    #[test]
    fn unknown_operations_are_enosys_and_known_ones_never() {
        let mut known = 0;
        for number in 0..5000 {
            let fixed = [0; 128];
            known += u32::from(parsed(&raw(number, 1, &fixed, 0)) != Err(libc::ENOSYS));
        }
        assert_eq!(known, 15);
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        let (mut accepted, mut refused) = (0, 0);
        for _ in 0..200_000 {
            let mut raw = RawRequest {
                header: std::array::from_fn(|_| random.u8(..)),
                op_in: std::array::from_fn(|_| random.u8(..)),
                op_in_len: random.usize(0..=128),
                payload_len: random.usize(..),
            };
            raw.header[4..8].copy_from_slice(&random.u32(0..60).to_ne_bytes());
            if random.bool() {
                raw.op_in[12..24].fill(0);
            }
            let arrangement = if random.bool() { Arrangement::Ring } else { Arrangement::Stream };
            let name = std::array::from_fn(|_| random.u8(..));
            match parse(&raw, arrangement, &name, PAYLOAD) {
                Ok(_) => accepted += 1,
                Err(_) => refused += 1,
            }
        }
        assert!(accepted > 1000 && refused > 1000);
    }
}

//! Which host has a pool on a block device open, in a block of its own.
//!
//! It is no part of the pool's state: nothing of the pool is found through it, and it is written in place, again and again,
//! which no structure of the state ever is. A claim that cannot be read is no claim. All of it fits into one sector of 512
//! bytes, so a write of it is seen whole or not at all.

use std::fmt;

use uuid::Uuid;

use super::layout::{padded, raw_prefix, raw_struct, text, zero};
use super::little_endian::{U16, U32, U64};
use crate::error::Check;
use crate::units::{BLOCK_SIZE, PoolBlock};

/// Where it stands: between the first superblock and the second.
pub const HOST_CLAIM: PoolBlock = PoolBlock(64);
/// Longest name of a host, as in uname(2).
pub const HOST_NAME_BYTES_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"plywhst\0";
const VERSION: u32 = 1;

raw_struct! {
    /// The claim at the head of its block; the rest of the block is zero.
    RawHostClaim: 512 {
        0 magic: [u8; 8],
        8 version: U32,
        12 checksum: U32,
        16 machine: [u8; 16],
        32 boot: [u8; 16],
        48 beat: U64,
        56 time: U64,
        64 name_length: U16,
        66 reserved_head: [u8; 6],
        72 name: [u8; HOST_NAME_BYTES_MAX],
        136 reserved: [u8; 376],
    }
}

/// A host that has the pool open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostClaim {
    /// The machine; nil where it has no id. It stays over a reboot.
    pub machine: Uuid,
    /// This run of its kernel.
    pub boot: Uuid,
    /// Counts up while it lives.
    pub beat: u64,
    /// When it was written, by the host's clock, in nanoseconds since 1970.
    pub time: u64,
    /// The host's name, for people.
    pub name: String,
}

impl HostClaim {
    /// Its block.
    ///
    /// # Panics
    /// When the name is longer than [`HOST_NAME_BYTES_MAX`].
    pub fn encode(&self) -> Box<[u8; BLOCK_SIZE]> {
        let mut raw = RawHostClaim {
            magic: MAGIC,
            version: U32::new(VERSION),
            checksum: U32::new(0),
            machine: *self.machine.as_bytes(),
            boot: *self.boot.as_bytes(),
            beat: U64::new(self.beat),
            time: U64::new(self.time),
            name_length: U16::new(self.name.len() as u16),
            reserved_head: [0; 6],
            name: padded(self.name.as_bytes()),
            reserved: [0; 376],
        };
        raw.checksum = U32::new(own_checksum(&raw));
        let mut block = Box::new([0; BLOCK_SIZE]);
        block[..size_of::<RawHostClaim>()].copy_from_slice(bytemuck::bytes_of(&raw));
        block
    }

    /// Reads the block. None when nobody has the pool open.
    ///
    /// # Errors
    /// A wrong length, magic, version or checksum, a name that is no text, and what is reserved and not zero.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Check> {
        let (raw, rest): (&RawHostClaim, _) = raw_prefix(bytes)?;
        if bytes.len() != BLOCK_SIZE {
            return Err(Check::Truncated);
        }
        zero(rest, "rest")?;
        if bytemuck::bytes_of(raw).iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if raw.magic != MAGIC {
            return Err(Check::Magic);
        }
        let (expected, found) = (raw.checksum.get(), own_checksum(raw));
        if expected != found {
            return Err(Check::Checksum { expected, found });
        }
        if raw.version.get() != VERSION {
            return Err(Check::Undefined { field: "version", value: raw.version.get().into() });
        }
        zero(&raw.reserved_head, "reserved_head")?;
        zero(&raw.reserved, "reserved")?;
        Ok(Some(Self {
            machine: Uuid::from_bytes(raw.machine),
            boot: Uuid::from_bytes(raw.boot),
            beat: raw.beat.get(),
            time: raw.time.get(),
            name: text(&raw.name, raw.name_length.get().into(), "name")?,
        }))
    }
}

impl fmt::Display for HostClaim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.is_empty() { write!(formatter, "{}", self.machine) } else { write!(formatter, "{}", self.name) }
    }
}

/// The checksum of the claim with its own field zero.
fn own_checksum(raw: &RawHostClaim) -> u32 {
    crc32fast::hash(bytemuck::bytes_of(&RawHostClaim { checksum: U32::new(0), ..*raw }))
}

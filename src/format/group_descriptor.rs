//! A group's descriptor: which version of each of its pages is current, and its checksum.

use super::geometry::{CHECKSUM_PAGES_PER_GROUP, PAGES_PER_GROUP, Slot};
use super::layout::{raw, raw_struct, zero};
use super::little_endian::{U32, U64};
use crate::error::Check;
use crate::units::BLOCK_SIZE;

const MAGIC: [u8; 8] = *b"plywgrp\0";
const PAGES: usize = PAGES_PER_GROUP as usize;
const CHECKSUM_PAGES: usize = CHECKSUM_PAGES_PER_GROUP as usize;
const SLOT_B: u8 = 1;
const PRESENT: u8 = 2;

raw_struct! {
    /// A reference to a page.
    RawPageRef: 8 {
        0 checksum: U32,
        4 flags: u8,
        5 reserved: [u8; 3],
    }
}

raw_struct! {
    /// A descriptor as it stands in its block.
    RawGroupDescriptor: 4096 {
        0 magic: [u8; 8],
        8 group: U64,
        16 reserved_head: [u8; 48],
        64 pages: [RawPageRef; PAGES],
        320 checksum_pages: [RawPageRef; CHECKSUM_PAGES],
        584 reserved: [u8; 3512],
    }
}

/// Which version of a page is current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRef {
    /// Checksum of the page; meaningless, and written as 0, for one that is not present.
    pub checksum: u32,
    /// Where it stands; meaningless, and written as A, for one that is not present.
    pub slot: Slot,
    /// Whether it was ever written since the group was empty. An absent page of counts says: only the layout's blocks
    /// are in use; an absent page of checksums: there are none.
    pub present: bool,
}

impl PageRef {
    /// A page that was never written.
    pub const ABSENT: Self = Self { checksum: 0, slot: Slot::A, present: false };

    fn to_raw(self) -> RawPageRef {
        let (checksum, flags) = match (self.present, self.slot) {
            (false, _) => (0, 0),
            (true, Slot::A) => (self.checksum, PRESENT),
            (true, Slot::B) => (self.checksum, PRESENT | SLOT_B),
        };
        RawPageRef { checksum: U32::new(checksum), flags, reserved: [0; 3] }
    }

    fn from_raw(raw: &RawPageRef) -> Result<Self, Check> {
        zero(&raw.reserved, "page.reserved")?;
        let slot = match raw.flags {
            0 => {
                zero(bytemuck::bytes_of(&raw.checksum), "page.checksum")?;
                return Ok(Self::ABSENT);
            }
            PRESENT => Slot::A,
            flags if flags == PRESENT | SLOT_B => Slot::B,
            flags => return Err(Check::Undefined { field: "page.flags", value: flags.into() }),
        };
        Ok(Self { checksum: raw.checksum.get(), slot, present: true })
    }
}

/// The pages of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupDescriptor {
    /// The group it describes.
    pub group: u64,
    /// Its pages of reference counts.
    pub pages: [PageRef; PAGES],
    /// Its pages of data checksums, the last one that of the "has one" bits.
    pub checksum_pages: [PageRef; CHECKSUM_PAGES],
}

impl GroupDescriptor {
    /// The descriptor of a group none of whose pages was written yet.
    pub const fn new(group: u64) -> Self {
        Self { group, pages: [PageRef::ABSENT; PAGES], checksum_pages: [PageRef::ABSENT; CHECKSUM_PAGES] }
    }

    /// Its block.
    pub fn encode(&self) -> Box<[u8; BLOCK_SIZE]> {
        Box::new(bytemuck::cast(RawGroupDescriptor {
            magic: MAGIC,
            group: U64::new(self.group),
            reserved_head: [0; 48],
            pages: self.pages.map(PageRef::to_raw),
            checksum_pages: self.checksum_pages.map(PageRef::to_raw),
            reserved: [0; 3512],
        }))
    }

    /// Reads the descriptor of `group`.
    ///
    /// # Errors
    /// A wrong length, magic or group, an undefined flag, a reserved field that is not zero.
    pub fn decode(bytes: &[u8], group: u64) -> Result<Self, Check> {
        let raw: &RawGroupDescriptor = raw(bytes)?;
        if raw.magic != MAGIC {
            return Err(Check::Magic);
        }
        if raw.group.get() != group {
            return Err(Check::OutOfBounds { field: "group", value: raw.group.get() });
        }
        zero(&raw.reserved_head, "reserved_head")?;
        zero(&raw.reserved, "reserved")?;
        let mut descriptor = Self::new(group);
        for (page, raw) in descriptor.pages.iter_mut().zip(&raw.pages) {
            *page = PageRef::from_raw(raw)?;
        }
        for (page, raw) in descriptor.checksum_pages.iter_mut().zip(&raw.checksum_pages) {
            *page = PageRef::from_raw(raw)?;
        }
        Ok(descriptor)
    }
}

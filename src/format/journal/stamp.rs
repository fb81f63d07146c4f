//! The stamp at the end of each 512-byte sector of a batch: which batch wrote this sector.
//!
//! A disk writes a sector whole or not at all, so after a power cut the stamps tell which sectors of a batch arrived. That
//! makes the last batch checkable, too: all stamps present and a wrong checksum is damage; a sector that another batch
//! stamped, or none, is a write that did not finish.
//!
//! The stamp names the batch by its first LSN *and* by bits of its checksum: a batch that was torn is never replayed, and
//! the next life writes another one with the same first LSN to the same place. Had that one been torn as well, the LSN
//! alone would take sectors of the former attempt for its own, and call damage what is a tear.
//!
//! Check bits keep a damaged stamp from passing for another batch's. CRC-16 finds any three flipped bits in six bytes.

use crate::format::layout::raw_struct;
use crate::format::little_endian::{U16, U32};
use crate::units::{Lsn, SECTOR_SIZE};

raw_struct! {
    /// A stamp as it stands in the last bytes of a sector.
    RawStamp: 8 {
        0 first_lsn: U32,
        4 batch: U16,
        6 check: U16,
    }
}

/// Bytes of a sector before its stamp.
pub(super) const CONTENT_BYTES: usize = SECTOR_SIZE - size_of::<RawStamp>();
/// Set in the first sector of a batch, so that no sector from its middle is ever taken for a head.
const HEAD: u16 = 0x8000;

/// What a sector's last eight bytes say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stamp {
    /// Zeros: no batch was written here.
    Blank,
    /// A whole stamp.
    Intact(BatchStamp),
    /// Its check bits are wrong.
    Damaged,
}

/// The batch a sector belongs to, and whether it is that batch's first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BatchStamp {
    first_lsn: u32,
    batch: u16,
}

impl BatchStamp {
    /// The stamp of a sector of the batch whose first change is `first` and whose checksum is `checksum`.
    pub(super) fn new(first: Lsn, checksum: u32, is_head: bool) -> Self {
        let folded = (checksum ^ (checksum >> 16)) as u16;
        Self { first_lsn: first.0 as u32, batch: (folded & !HEAD) | if is_head { HEAD } else { 0 } }
    }

    pub(super) fn is_head(self) -> bool {
        self.batch & HEAD != 0
    }

    pub(super) fn encode(self) -> [u8; 8] {
        bytemuck::cast(self.to_raw())
    }

    fn to_raw(self) -> RawStamp {
        let (first_lsn, batch) = (U32::new(self.first_lsn), U16::new(self.batch));
        RawStamp { first_lsn, batch, check: U16::new(check_bits(self.first_lsn, self.batch)) }
    }
}

impl Stamp {
    /// The stamp of `sector`.
    pub(super) fn of(sector: &[u8; SECTOR_SIZE]) -> Self {
        let mut bytes = [0; size_of::<RawStamp>()];
        bytes.copy_from_slice(&sector[CONTENT_BYTES..]);
        if bytes == [0; size_of::<RawStamp>()] {
            return Self::Blank;
        }
        let raw: RawStamp = bytemuck::cast(bytes);
        let stamp = BatchStamp { first_lsn: raw.first_lsn.get(), batch: raw.batch.get() };
        if raw.check.get() == check_bits(stamp.first_lsn, stamp.batch) { Self::Intact(stamp) } else { Self::Damaged }
    }
}

/// CRC-16/CCITT-FALSE over the six bytes before them. Its start value keeps eight zero bytes from being a stamp.
fn check_bits(first_lsn: u32, batch: u16) -> u16 {
    const POLYNOMIAL: u16 = 0x1021;
    let bytes = first_lsn.to_le_bytes().into_iter().chain(batch.to_le_bytes());
    bytes.fold(0xffff, |crc, byte| {
        (0..8).fold(
            crc ^ (u16::from(byte) << 8),
            |crc, _| {
                if crc & 0x8000 != 0 { (crc << 1) ^ POLYNOMIAL } else { crc << 1 }
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(stamp: [u8; 8]) -> [u8; SECTOR_SIZE] {
        let mut sector = [0; SECTOR_SIZE];
        sector[CONTENT_BYTES..].copy_from_slice(&stamp);
        sector
    }

    #[test]
    fn stamp_comes_back() {
        let stamp = BatchStamp::new(Lsn(0x1_2345_6789), 0xdead_beef, true);
        assert_eq!(Stamp::of(&sector(stamp.encode())), Stamp::Intact(stamp));
        assert!(stamp.is_head() && !BatchStamp::new(Lsn(1), 0x8000, false).is_head());
    }

    #[test]
    fn zeros_are_blank() {
        assert_eq!(Stamp::of(&[0; SECTOR_SIZE]), Stamp::Blank);
        assert_ne!(check_bits(0, 0), 0);
    }

    #[test]
    fn up_to_two_flipped_bits_are_damage_never_another_batch() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..100 {
            let stamp = BatchStamp::new(Lsn(random.u64(1..1 << 40)), random.u32(..), random.bool());
            let word = u64::from_le_bytes(stamp.encode());
            for first in 0..64 {
                for second in 0..64 {
                    let flips = (1 << first) | (1 << second);
                    assert_eq!(Stamp::of(&sector((word ^ flips).to_le_bytes())), Stamp::Damaged);
                }
            }
        }
    }
}

//! Quantities that must not be mixed: block numbers, sizes, ids and counters, each a type of its own.
//!
//! Arithmetic is explicit: a number enters with `new` (or the tuple constructor) and leaves with `.0`; nothing converts
//! by itself.

use std::fmt;

/// Size of a block in bytes: the unit of mapping, allocation and checksum, for data and metadata alike.
pub const BLOCK_SIZE: usize = 4096;
/// [`BLOCK_SIZE`] for arithmetic on 64-bit offsets.
pub const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;
/// Smallest unit a disk writes whole, in bytes.
pub const SECTOR_SIZE: usize = 512;

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        #[derive(serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

quantity! {
    /// Number of a block within a volume.
    VirtualBlock
}
quantity! {
    /// Number of a block within the pool file; 48 bits are used.
    PoolBlock
}
quantity! {
    /// Number of a change in the journal: pool-wide, without gaps, the first is 1.
    Lsn
}
quantity! {
    /// Number of a checkpoint. Nothing but the superblock is chosen by it.
    Generation
}
quantity! {
    /// The pool's counter of sharings; 40 bits are used. A mapping's *birth* is its value when the mapping was made.
    Clock
}
quantity! {
    /// Identity of a volume within its pool; never reused; the first is 1.
    VolumeId
}

impl PoolBlock {
    /// Offset of this block in the pool file, in bytes.
    pub const fn offset_bytes(self) -> u64 {
        self.0 * BLOCK_BYTES
    }

    /// The block `count` blocks further on.
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl VirtualBlock {
    /// The block `count` blocks further on.
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl Lsn {
    /// The change after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

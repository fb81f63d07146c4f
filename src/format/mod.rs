//! Bytes of the pool file <-> values: every structure on disk, decoded with all its bounds checked.
//!
//! `docs/format.md` is the normative text; a test compares its tables with the structs here. The flow is always bytes ->
//! raw struct (little-endian, alignment 1, no padding) -> `decode` into a checked type -> `encode`, and what `decode`
//! accepts `encode` gives back byte for byte. No I/O, clock, threads, randomness or unsafe code. Decoders take any
//! bytes and never panic; encoders panic on values that no decoder would give, because writing them would be damage.

#![forbid(unsafe_code)]

mod attributes;
mod carcass;
mod checksum;
mod digest;
mod entry;
mod geometry;
mod group_descriptor;
mod group_index;
mod host_claim;
mod journal;
mod layout;
mod little_endian;
mod node;
mod space_map;
mod superblock;
mod superblock_choice;
#[cfg(test)]
mod tests;
mod unfinished;
mod volume_name;
mod volume_record;

pub use attributes::{ATTRIBUTES_BYTES_MAX, decode_attributes, encode_attributes};
pub use carcass::{CARCASSES_PER_PAGE, Carcass, decode_carcasses, encode_carcasses};
pub use checksum::{Place, checksum};
pub use digest::{DIGEST_STATE_BYTES, DigestState};
pub use entry::{CLOCK_MAX, Entry, EntryKind, Root};
pub use geometry::{
    CHECKSUM_PAGES_PER_GROUP, COUNTS_PER_PAGE, GROUP_BLOCKS, GROUP_BLOCKS_MIN, GROUP_INDEXES_MAX, GROUPS_PER_INDEX,
    Geometry, JOURNAL_BLOCKS_MIN, JOURNAL_FIRST, PAGES_PER_GROUP, SUPERBLOCK_COPIES, Slot,
};
pub use group_descriptor::{GroupDescriptor, PageRef};
pub use group_index::{GroupIndex, GroupIndexEntry};
pub use host_claim::{HOST_CLAIM, HOST_NAME_BYTES_MAX, HostClaim};
pub use journal::{
    BATCH_BLOCKS_MAX, BATCH_RECORD_BYTES_MAX, BatchFault, BatchHeader, Record, batch_start, decode_batch,
    decode_batch_header, encode_batch,
};
pub use node::{ENTRIES_PER_NODE, LEVEL_MAX, Node, VOLUME_BLOCKS_MAX, span_blocks};
pub use space_map::{HAS_CHECKSUM_PAGE, decode_counts, encode_counts, has_checksum, set_has_checksum};
pub use superblock::{
    FORMAT_VERSION, GroupIndexRef, INCOMPATIBLE_KNOWN, POOL_NAME_BYTES_MAX, READ_ONLY_COMPATIBLE_KNOWN, ScrubState,
    Superblock,
};
pub use superblock_choice::{ChosenSuperblock, choose_superblock};
pub use unfinished::Unfinished;
pub use volume_name::{VOLUME_NAME_BYTES_MAX, check_name};
pub use volume_record::{
    ACCOUNT_SPANS_MAX, ATTRIBUTE_BLOCKS_MAX, AccountSpan, AttributeBlockRef, OnFull, OriginRef, VolumeFlags,
    VolumeRecord,
};

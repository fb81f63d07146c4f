//! The journal: records of changes, and the batches they are appended in.

mod batch;
#[cfg(test)]
mod batch_tests;
mod record;
#[cfg(test)]
mod record_tests;
mod stamp;

pub use batch::{
    BATCH_BLOCKS_MAX, BATCH_RECORD_BYTES_MAX, BatchFault, BatchHeader, batch_start, decode_batch, decode_batch_header,
    encode_batch,
};
pub use record::Record;
#[cfg(test)]
pub(super) use {batch::RawBatchHeader, record::raw as raw_records, stamp::RawStamp};

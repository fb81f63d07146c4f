//! Attributes of a volume: keys and values, up to 256 KiB in all. Labels, an image's configuration, a container's
//! description.
//!
//! One stream over the volume's attribute blocks: a header, then each pair as lengths, key, value, in ascending order of
//! the keys. No attributes, no blocks.

use std::collections::BTreeMap;

use super::layout::{raw_prefix, raw_struct, zero};
use super::little_endian::{U16, U32};
use crate::error::{Check, Error};
use crate::units::BLOCK_SIZE;

/// Most bytes of a volume's encoded attributes.
pub const ATTRIBUTES_BYTES_MAX: usize = 256 << 10;

const MAGIC: [u8; 8] = *b"plywatt\0";
const EMPTY_BLOCK: &str = "attributes leave a block empty";

raw_struct! {
    /// Head of the stream of attributes.
    RawAttributesHeader: 16 {
        0 magic: [u8; 8],
        8 length: U32,
        12 count: U32,
    }
}

raw_struct! {
    /// What precedes the key and value of each attribute.
    RawAttributeHeader: 8 {
        0 value_length: U32,
        4 key_length: U16,
        6 reserved: U16,
    }
}

/// The attributes as a stream, padded with zeros to whole blocks; empty for none.
///
/// # Errors
/// [`Error::InvalidInput`] for a key that is empty or longer than 65535 bytes, or more than 256 KiB in all.
pub fn encode_attributes(attributes: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>, Error> {
    if attributes.is_empty() {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; size_of::<RawAttributesHeader>()];
    for (key, value) in attributes {
        let key_length = u16::try_from(key.len()).ok().filter(|length| *length > 0).ok_or_else(|| {
            Error::InvalidInput(format!("an attribute's key has {} bytes; it must have 1 to 65535", key.len()))
        })?;
        let used = bytes.len() + size_of::<RawAttributeHeader>() + key.len();
        if value.len() > ATTRIBUTES_BYTES_MAX.saturating_sub(used) {
            return Err(Error::InvalidInput(format!(
                "attributes have more than {} KiB in all, at {key:?}",
                ATTRIBUTES_BYTES_MAX >> 10
            )));
        }
        let header = RawAttributeHeader {
            value_length: U32::new(value.len() as u32),
            key_length: U16::new(key_length),
            reserved: U16::new(0),
        };
        bytes.extend_from_slice(bytemuck::bytes_of(&header));
        bytes.extend_from_slice(key.as_bytes());
        bytes.extend_from_slice(value);
    }
    let header = RawAttributesHeader {
        magic: MAGIC,
        length: U32::new(bytes.len() as u32),
        count: U32::new(attributes.len() as u32),
    };
    bytes[..size_of::<RawAttributesHeader>()].copy_from_slice(bytemuck::bytes_of(&header));
    bytes.resize(bytes.len().next_multiple_of(BLOCK_SIZE), 0);
    Ok(bytes)
}

/// Reads the attributes out of the volume's attribute blocks, `length` of whose bytes the record says are used.
///
/// # Errors
/// Bytes that are not whole blocks, a stream that ends too early or too late, keys out of order or not UTF-8, reserved fields and padding that are not
/// zero.
pub fn decode_attributes(bytes: &[u8], length: usize) -> Result<BTreeMap<String, Vec<u8>>, Check> {
    if !bytes.len().is_multiple_of(BLOCK_SIZE) {
        return Err(Check::Truncated);
    }
    let (stream, padding) = bytes.split_at_checked(length).ok_or(Check::Truncated)?;
    zero(padding, "padding")?;
    let mut attributes = BTreeMap::new();
    if stream.is_empty() {
        return if padding.is_empty() { Ok(attributes) } else { Err(Check::Inconsistent(EMPTY_BLOCK)) };
    }
    let (header, _) = raw_prefix::<RawAttributesHeader>(stream)?;
    if header.magic != MAGIC {
        return Err(Check::Magic);
    }
    let (stream, padding) = stream.split_at_checked(header.length.get() as usize).ok_or(Check::Truncated)?;
    zero(padding, "padding")?;
    if bytes.len() - stream.len() >= BLOCK_SIZE {
        return Err(Check::Inconsistent(EMPTY_BLOCK));
    }
    let (_, mut rest) = raw_prefix::<RawAttributesHeader>(stream)?;
    let count = header.count.get();
    if count == 0 {
        return Err(Check::OutOfBounds { field: "count", value: 0 });
    }
    for _ in 0..count {
        let (key, value);
        (key, value, rest) = next_attribute(rest)?;
        if attributes.last_key_value().is_some_and(|(last, _): (&String, _)| last.as_str() >= key) {
            return Err(Check::Inconsistent("attributes are not in order"));
        }
        attributes.insert(key.to_owned(), value.to_vec());
    }
    if rest.is_empty() { Ok(attributes) } else { Err(Check::OutOfBounds { field: "count", value: count.into() }) }
}

/// Key and value at the head of `bytes`, and what follows.
fn next_attribute(bytes: &[u8]) -> Result<(&str, &[u8], &[u8]), Check> {
    let (header, rest) = raw_prefix::<RawAttributeHeader>(bytes)?;
    zero(bytemuck::bytes_of(&header.reserved), "attribute.reserved")?;
    let (key, rest) = rest.split_at_checked(header.key_length.get().into()).ok_or(Check::Truncated)?;
    let (value, rest) = rest.split_at_checked(header.value_length.get() as usize).ok_or(Check::Truncated)?;
    if key.is_empty() {
        return Err(Check::OutOfBounds { field: "key_length", value: 0 });
    }
    Ok((std::str::from_utf8(key).map_err(|_| Check::Text("key"))?, value, rest))
}

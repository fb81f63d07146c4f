//! How raw structs are declared and read: offsets beside the fields, asserted when compiled.

use bytemuck::AnyBitPattern;

use crate::error::Check;

/// Declares a raw struct: `size`, then `offset name: type` for each field. Padding cannot compile (`Pod` refuses it), nor
/// can an offset or a size that is not what is written beside it.
macro_rules! raw_struct {
    ($(#[$doc:meta])* $name:ident: $size:literal { $($(#[$field_doc:meta])* $offset:literal $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub(in crate::format) struct $name {
            $($(#[$field_doc])* pub(in crate::format) $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size && align_of::<$name>() == 1);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
        };

        #[cfg(test)]
        impl $crate::format::layout::Layout for $name {
            const NAME: &'static str = stringify!($name);
            const SIZE: usize = size_of::<$name>();
            const FIELDS: &'static [(&'static str, usize, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$type>()),)*];
        }
    };
}
pub(super) use raw_struct;

/// What the test of `docs/format.md` compares: name, offset and size of each field.
#[cfg(test)]
pub(super) trait Layout {
    const NAME: &'static str;
    const SIZE: usize;
    const FIELDS: &'static [(&'static str, usize, usize)];
}

/// `bytes` as the raw struct `T`, which they are exactly as long as.
pub(super) fn raw<T: AnyBitPattern>(bytes: &[u8]) -> Result<&T, Check> {
    // The alignment of every raw struct is 1, so only a wrong length is refused.
    bytemuck::try_from_bytes(bytes).map_err(|_| Check::Truncated)
}

/// The raw struct `T` at the head of `bytes`, and what follows it.
pub(super) fn raw_prefix<T: AnyBitPattern>(bytes: &[u8]) -> Result<(&T, &[u8]), Check> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>()).ok_or(Check::Truncated)?;
    Ok((raw(head)?, rest))
}

/// Refuses a reserved field that is not zero: a later version may give it a meaning.
pub(super) fn zero(bytes: &[u8], field: &'static str) -> Result<(), Check> {
    if bytes.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(Check::Reserved(field)) }
}

/// Refuses a value above `maximum`.
pub(super) fn at_most(value: u64, maximum: u64, field: &'static str) -> Result<u64, Check> {
    if value <= maximum { Ok(value) } else { Err(Check::OutOfBounds { field, value }) }
}

/// Text of `length` bytes at the head of a field whose rest is zero.
pub(super) fn text(bytes: &[u8], length: usize, field: &'static str) -> Result<String, Check> {
    let (content, rest) = bytes.split_at_checked(length).ok_or(Check::OutOfBounds { field, value: length as u64 })?;
    zero(rest, field)?;
    std::str::from_utf8(content).map(str::to_owned).map_err(|_| Check::Text(field))
}

/// A field of `N` bytes with `content` at its head and zeros after it.
///
/// # Panics
/// When it does not fit.
pub(super) fn padded<const N: usize>(content: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..content.len()].copy_from_slice(content);
    bytes
}

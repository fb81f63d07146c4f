//! Integers as they stand in the pool file: little-endian, alignment 1, so that structs of them have no padding.

use bytemuck::{Pod, Zeroable};

macro_rules! little_endian {
    ($name:ident, $bytes:literal, $value:ty) => {
        #[doc = concat!("A little-endian integer of ", stringify!($bytes), " bytes.")]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
        #[repr(transparent)]
        pub(super) struct $name([u8; $bytes]);

        impl $name {
            /// The bytes of `value`, which fits: more than these bytes hold is a bug of the caller.
            #[inline]
            pub(super) const fn new(value: $value) -> Self {
                const WIDTH: usize = size_of::<$value>();
                assert!(WIDTH == $bytes || value >> ($bytes * 8 % (WIDTH * 8)) == 0, "value is too wide for its field");
                let all = value.to_le_bytes();
                let mut bytes = [0; $bytes];
                let mut index = 0;
                while index < $bytes {
                    bytes[index] = all[index];
                    index += 1;
                }
                Self(bytes)
            }

            /// The value of these bytes.
            #[inline]
            pub(super) const fn get(self) -> $value {
                let mut all = [0; size_of::<$value>()];
                let mut index = 0;
                while index < $bytes {
                    all[index] = self.0[index];
                    index += 1;
                }
                <$value>::from_le_bytes(all)
            }
        }
    };
}

little_endian!(U16, 2, u16);
little_endian!(U32, 4, u32);
little_endian!(U40, 5, u64);
little_endian!(U48, 6, u64);
little_endian!(U64, 8, u64);
little_endian!(U128, 16, u128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_with_the_low_byte_first() {
        assert_eq!(U16::new(0x0102).0, [2, 1]);
        assert_eq!(U40::new(0x01_0203_0405).0, [5, 4, 3, 2, 1]);
        assert_eq!(U48::new(0xffff_ffff_ffff).get(), 0xffff_ffff_ffff);
        assert_eq!(U64::new(u64::MAX).get(), u64::MAX);
        assert_eq!(U128::new(u128::MAX - 1).get(), u128::MAX - 1);
    }

    #[test]
    #[should_panic(expected = "too wide")]
    fn value_wider_than_its_field_panics() {
        let _ = U40::new(1 << 40);
    }
}

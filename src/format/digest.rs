//! The digest of a volume's content: equal content, equal digest, in any pool, and kept up to date from what changed.
//!
//! It is a homomorphic hash (LtHash: Bellare and Micciancio 1997; Lewi, Kim, Maykov and Weis, "Securing Update Propagation
//! with Homomorphic Hashing", 2019): each block that is not all zero gives 1024 numbers of 16 bits, the first 2048 bytes
//! that BLAKE3 puts out over virtual block and content; the state is their sum, modulo 2^16 each. So a block is taken out
//! as it was put in, the order does not matter, and the digest of the next snapshot follows from that of the last and the
//! blocks that differ. The digest itself is BLAKE3 over the volume's size and the state.

use crate::error::Check;
use crate::units::{BLOCK_SIZE, VirtualBlock};

/// Bytes of a state.
pub const DIGEST_STATE_BYTES: usize = 2048;
const NUMBERS: usize = DIGEST_STATE_BYTES / 2;

/// Sum over the blocks of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DigestState(Box<[u16; NUMBERS]>);

impl Default for DigestState {
    fn default() -> Self {
        Self(Box::new([0; NUMBERS]))
    }
}

impl DigestState {
    /// Puts a block in. One that is all zero is as good as none.
    pub fn add(&mut self, block: VirtualBlock, content: &[u8; BLOCK_SIZE]) {
        self.combine(block, content, u16::wrapping_add);
    }

    /// Takes a block out that was put in.
    pub fn remove(&mut self, block: VirtualBlock, content: &[u8; BLOCK_SIZE]) {
        self.combine(block, content, u16::wrapping_sub);
    }

    fn combine(&mut self, block: VirtualBlock, content: &[u8; BLOCK_SIZE], with: impl Fn(u16, u16) -> u16) {
        if content.iter().all(|byte| *byte == 0) {
            return;
        }
        let mut bytes = [0; DIGEST_STATE_BYTES];
        blake3::Hasher::new().update(&block.0.to_le_bytes()).update(content).finalize_xof().fill(&mut bytes);
        for (sum, number) in self.0.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *sum = with(*sum, u16::from_le_bytes(*number));
        }
    }

    /// The digest of a volume of `size_bytes` with these blocks.
    pub fn digest(&self, size_bytes: u64) -> [u8; 32] {
        *blake3::Hasher::new().update(&size_bytes.to_le_bytes()).update(&self.encode()).finalize().as_bytes()
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; DIGEST_STATE_BYTES] {
        let mut bytes = [0; DIGEST_STATE_BYTES];
        for (place, number) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(self.0.iter()) {
            *place = number.to_le_bytes();
        }
        bytes
    }

    /// Reads a state.
    ///
    /// # Errors
    /// A wrong length.
    pub fn decode(bytes: &[u8]) -> Result<Self, Check> {
        let (numbers, []) = bytes.as_chunks::<2>() else { return Err(Check::Truncated) };
        if numbers.len() != NUMBERS {
            return Err(Check::Truncated);
        }
        let mut state = Self::default();
        for (place, number) in state.0.iter_mut().zip(numbers) {
            *place = u16::from_le_bytes(*number);
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(fill: u8) -> [u8; BLOCK_SIZE] {
        [fill; BLOCK_SIZE]
    }

    #[test]
    fn order_and_history_do_not_matter() {
        let mut one = DigestState::default();
        one.add(VirtualBlock(1), &block(1));
        one.add(VirtualBlock(2), &block(2));
        let mut other = DigestState::default();
        other.add(VirtualBlock(2), &block(2));
        other.add(VirtualBlock(7), &block(9));
        other.add(VirtualBlock(1), &block(1));
        other.add(VirtualBlock(8), &block(0));
        assert_ne!(one, other);
        other.remove(VirtualBlock(7), &block(9));
        assert_eq!(one, other);
        assert_eq!(one.digest(4096 * 9), other.digest(4096 * 9));
    }

    #[test]
    fn place_content_and_size_matter() {
        let digest = |at, fill, size| {
            let mut state = DigestState::default();
            state.add(VirtualBlock(at), &block(fill));
            state.digest(size)
        };
        let known = digest(1, 1, 8192);
        assert_ne!(known, digest(0, 1, 8192));
        assert_ne!(known, digest(1, 2, 8192));
        assert_ne!(known, digest(1, 1, 12288));
    }

    #[test]
    fn digest_is_pinned() {
        let mut state = DigestState::default();
        assert_eq!(
            hex::encode(state.digest(1 << 30)),
            "03741bd0cb01e7ea22e1db53cb3bd978ad1fb9a8ce1bee47f17746aa162d82aa"
        );
        state.add(VirtualBlock(3), &block(5));
        assert_eq!(
            hex::encode(state.digest(1 << 30)),
            "39cbe826daf58d1b31cfaf11c4ff93c445d1fbe9988b83a9d6734fba421bd743"
        );
    }

    #[test]
    fn state_survives_its_bytes() {
        let mut state = DigestState::default();
        state.add(VirtualBlock(3), &block(5));
        assert_eq!(DigestState::decode(&state.encode()), Ok(state));
        for len in [0, 1, 2047, 2050] {
            assert_eq!(DigestState::decode(&vec![0; len]), Err(Check::Truncated));
        }
    }
}

//! A set of the blocks of one group.

use crate::format::GROUP_BLOCKS;

const WORDS: usize = GROUP_BLOCKS as usize / 64;

/// One bit for each block of a group.
#[derive(Clone)]
pub(crate) struct Bitmap {
    words: Box<[u64; WORDS]>,
}

impl Bitmap {
    pub(crate) fn new() -> Self {
        Self { words: Box::new([0; WORDS]) }
    }

    #[inline]
    pub(crate) fn contains(&self, index: u32) -> bool {
        self.words[index as usize / 64] >> (index % 64) & 1 == 1
    }

    /// Answers whether the bit was clear before.
    #[inline]
    pub(crate) fn insert(&mut self, index: u32) -> bool {
        let word = &mut self.words[index as usize / 64];
        let bit = 1 << (index % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// Answers whether the bit was set before.
    #[inline]
    pub(crate) fn remove(&mut self, index: u32) -> bool {
        let word = &mut self.words[index as usize / 64];
        let bit = 1 << (index % 64);
        let there = *word & bit != 0;
        *word &= !bit;
        there
    }

    /// The first set bit at or after `from`.
    pub(crate) fn next_set(&self, from: u32) -> Option<u32> {
        let mut position = from as usize / 64;
        let mut word = *self.words.get(position)? & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                return Some(position as u32 * 64 + word.trailing_zeros());
            }
            position += 1;
            word = *self.words.get(position)?;
        }
    }

    /// The first clear bit at or after `from`, or the group's end.
    pub(crate) fn next_clear(&self, from: u32) -> u32 {
        let mut position = from as usize / 64;
        let Some(first) = self.words.get(position) else { return GROUP_BLOCKS as u32 };
        let mut word = !*first & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                return position as u32 * 64 + word.trailing_zeros();
            }
            position += 1;
            let Some(next) = self.words.get(position) else { return GROUP_BLOCKS as u32 };
            word = !*next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_across_words() {
        let mut bitmap = Bitmap::new();
        for index in 60..130 {
            assert!(bitmap.insert(index));
        }
        assert_eq!(bitmap.next_set(0), Some(60));
        assert_eq!(bitmap.next_clear(60), 130);
        assert!(bitmap.remove(64));
        assert_eq!(bitmap.next_clear(60), 64);
        assert_eq!(bitmap.next_set(130), None);
        assert_eq!(bitmap.next_clear(32767), 32767);
    }
}

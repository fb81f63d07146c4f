//! A pool file as sparse blocks. Copies are cheap: they share what neither has changed.

use std::rc::Rc;

use plywood::units::{BLOCK_BYTES, BLOCK_SIZE};
use rustc_hash::FxHashMap;

/// The content of a block.
pub type Block = [u8; BLOCK_SIZE];

/// A pool file.
#[derive(Clone, Default)]
pub struct Image {
    blocks: FxHashMap<u64, Rc<Block>>,
    /// Its size.
    pub size_bytes: u64,
}

impl Image {
    /// An empty file of `size_bytes`.
    pub fn new(size_bytes: u64) -> Self {
        Self { blocks: FxHashMap::default(), size_bytes }
    }

    /// The content of a block, zeros where nothing was written.
    pub fn block(&self, number: u64) -> Rc<Block> {
        self.blocks.get(&number).cloned().unwrap_or_else(|| Rc::new([0; BLOCK_SIZE]))
    }

    /// Gives a block another content; none for a hole.
    pub fn set(&mut self, number: u64, content: Option<Rc<Block>>) {
        match content {
            Some(content) => self.blocks.insert(number, content),
            None => self.blocks.remove(&number),
        };
    }

    /// Changes a block; one beyond the end is left alone.
    pub fn change(&mut self, number: u64, change: impl FnOnce(&mut Block)) {
        if number < self.size_bytes / BLOCK_BYTES {
            change(Rc::make_mut(self.blocks.entry(number).or_insert_with(|| Rc::new([0; BLOCK_SIZE]))));
        }
    }

    /// Numbers of the blocks that hold anything, ascending.
    pub fn written(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = self.blocks.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    /// Forgets blocks of zeros.
    pub fn compact(&mut self) {
        self.blocks.retain(|_, content| content.iter().any(|byte| *byte != 0));
    }
}

//! A pool file, or a picture of one in memory, whose bytes are changed behind the engine's back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use plywood::io::MemoryImage;
use plywood::units::{BLOCK_SIZE, PoolBlock};

/// What damage is made in.
pub trait Medium {
    /// Reads a block.
    fn block(&self, block: PoolBlock) -> io::Result<Vec<u8>>;

    /// Writes a block.
    fn set_block(&mut self, block: PoolBlock, bytes: &[u8]) -> io::Result<()>;
}

impl Medium for MemoryImage {
    fn block(&self, block: PoolBlock) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; BLOCK_SIZE];
        self.read(block.offset_bytes(), &mut bytes);
        Ok(bytes)
    }

    fn set_block(&mut self, block: PoolBlock, bytes: &[u8]) -> io::Result<()> {
        self.write(block.offset_bytes(), bytes);
        Ok(())
    }
}

impl Medium for File {
    fn block(&self, block: PoolBlock) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; BLOCK_SIZE];
        self.read_exact_at(&mut bytes, block.offset_bytes())?;
        Ok(bytes)
    }

    fn set_block(&mut self, block: PoolBlock, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, block.offset_bytes())
    }
}

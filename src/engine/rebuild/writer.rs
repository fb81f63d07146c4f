//! Writes of blocks, in order, each of whose old content can be saved before.

use crate::engine::pool::to_memory;
use crate::engine::{Memory, Storage};
use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, PoolBlock};

/// Blocks gathered before they are saved and written.
const BLOCKS_AT_A_TIME: usize = 256;

/// A block as it was before it was written over.
pub type SavedBlock = (PoolBlock, Vec<u8>);

/// Takes what is about to be overwritten. It is durable when this returns.
pub type SaveBlocks<'a> = &'a mut dyn FnMut(&[SavedBlock]) -> Result<()>;

/// Writes blocks of a pool.
pub(in crate::engine) struct Writer<'a, S: Storage> {
    storage: &'a S,
    save: Option<SaveBlocks<'a>>,
    waiting: Vec<(PoolBlock, Vec<u8>)>,
    /// Blocks written so far.
    pub(in crate::engine) written: u64,
}

impl<'a, S: Storage> Writer<'a, S> {
    pub(in crate::engine) fn new(storage: &'a S, save: Option<SaveBlocks<'a>>) -> Self {
        Self { storage, save, waiting: Vec::new(), written: 0 }
    }

    /// Writes a block, and with `mirrored` the next one the same.
    pub(in crate::engine) async fn put(&mut self, address: PoolBlock, mirrored: bool, bytes: &[u8]) -> Result<()> {
        for copy in 0..=u64::from(mirrored) {
            self.waiting.push((address.plus(copy), bytes.to_vec()));
        }
        if self.waiting.len() >= BLOCKS_AT_A_TIME { self.write_out().await } else { Ok(()) }
    }

    /// Writes out what waits and makes everything durable.
    pub(in crate::engine) async fn flush(&mut self) -> Result<()> {
        self.write_out().await?;
        self.storage.flush().await.map_err(|error| Error::io("flush of metadata", error))
    }

    /// Writes a block at once, before and after what is durable then.
    pub(in crate::engine) async fn put_durable(&mut self, address: PoolBlock, bytes: &[u8]) -> Result<()> {
        self.flush().await?;
        self.save(&[address]).await?;
        let written = self.storage.write_durable(address.offset_bytes(), &to_memory(self.storage, bytes)).await;
        written.map_err(|error| Error::io(format!("write of the superblock at pool block {address}"), error))?;
        self.written += 1;
        Ok(())
    }

    async fn save(&mut self, blocks: &[PoolBlock]) -> Result<()> {
        let Some(save) = &mut self.save else { return Ok(()) };
        let mut saved = Vec::with_capacity(blocks.len());
        for address in blocks {
            // What cannot be read is not there to be saved.
            let memory = self.storage.allocate(BLOCK_SIZE);
            if self.storage.read(address.offset_bytes(), &memory).await.is_ok() {
                let mut bytes = vec![0; BLOCK_SIZE];
                memory.read(0, &mut bytes);
                saved.push((*address, bytes));
            }
        }
        save(&saved)
    }

    async fn write_out(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let blocks: Vec<PoolBlock> = waiting.iter().map(|(address, _)| *address).collect();
        self.save(&blocks).await?;
        let mut under_way = Vec::with_capacity(waiting.len());
        for (address, bytes) in &waiting {
            let memory = self.storage.allocate(BLOCK_SIZE);
            memory.write(0, bytes);
            under_way.push((*address, self.storage.write(address.offset_bytes(), &memory)));
        }
        for (address, write) in under_way {
            write.await.map_err(|error| Error::io(format!("write of metadata at pool block {address}"), error))?;
        }
        self.written += waiting.len() as u64;
        Ok(())
    }
}

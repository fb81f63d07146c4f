//! Reading single blocks of metadata and holding them against their checksums.

use uuid::Uuid;

use super::fault::Faults;
use crate::engine::{Memory, Storage};
use crate::error::{Check, Corrupt, Structure};
use crate::format::{self, Geometry, Place};
use crate::units::{BLOCK_SIZE, PoolBlock};

/// A block of metadata, as what points at it names it.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Target {
    pub(in crate::engine) address: PoolBlock,
    pub(in crate::engine) mirrored: bool,
    pub(in crate::engine) checksum: u32,
    pub(in crate::engine) place: Place,
    pub(in crate::engine) structure: Structure,
}

/// The way to the blocks of one pool. One read at a time.
pub(in crate::engine) struct Reader<'a, S: Storage> {
    storage: &'a S,
    pub(in crate::engine) uuid: Uuid,
    pub(in crate::engine) geometry: Geometry,
    memory: S::Memory,
}

impl<'a, S: Storage> Reader<'a, S> {
    pub(in crate::engine) fn new(storage: &'a S, uuid: Uuid, geometry: Geometry) -> Self {
        Self { storage, uuid, geometry, memory: storage.allocate(BLOCK_SIZE) }
    }

    /// Reads a block.
    pub(in crate::engine) async fn read(&mut self, address: PoolBlock) -> Result<Vec<u8>, Check> {
        if address.0 >= self.geometry.pool_blocks {
            return Err(Check::OutOfBounds { field: "address", value: address.0 });
        }
        let read = self.storage.read(address.offset_bytes(), &self.memory).await;
        read.map_err(|error| Check::Unreadable(error.to_string()))?;
        let mut bytes = vec![0; BLOCK_SIZE];
        self.memory.read(0, &mut bytes);
        Ok(bytes)
    }

    /// Reads a block and verifies its checksum.
    async fn read_verified(&mut self, target: &Target, address: PoolBlock) -> Result<Vec<u8>, Check> {
        let bytes = self.read(address).await?;
        let found = format::checksum(&self.uuid, target.place, &bytes);
        if found == target.checksum { Ok(bytes) } else { Err(Check::Checksum { expected: target.checksum, found }) }
    }

    /// A good copy of a block, or none. Every bad copy of a pair is a fault, also where the other one is good.
    pub(in crate::engine) async fn verified(&mut self, target: &Target, faults: &mut Faults) -> Option<Vec<u8>> {
        let mut good = None;
        let mut bad = Vec::new();
        for copy in 0..=u64::from(target.mirrored) {
            let address = target.address.plus(copy);
            match self.read_verified(target, address).await {
                Ok(bytes) => good = good.or(Some(bytes)),
                Err(check) => bad.push(Corrupt { structure: target.structure, address, check }),
            }
        }
        for found in bad {
            if good.is_some() {
                let other = if found.address == target.address { target.address.plus(1) } else { target.address };
                faults.add_copy(found.address, other);
            }
            faults.add_found(found, good.is_some(), None);
        }
        good
    }

    /// A good copy of a block whose copies have all been looked at before.
    pub(in crate::engine) async fn verified_again(&mut self, target: &Target) -> Option<Vec<u8>> {
        for copy in 0..=u64::from(target.mirrored) {
            if let Ok(bytes) = self.read_verified(target, target.address.plus(copy)).await {
                return Some(bytes);
            }
        }
        None
    }
}

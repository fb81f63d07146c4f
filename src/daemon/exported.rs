//! The engine's pool and volumes as what an export serves.

use crate::engine::{Held, Pool, Storage, VolumeHandle};
use crate::error::Result;
use crate::export::device::{Device, VolumeFace, Volumes};
use crate::units::VolumeId;

impl<S: Storage> Device for VolumeHandle<S> {
    type Memory = S::Memory;
    type Held = Held<S>;

    fn size_bytes(&self) -> u64 {
        self.size_bytes()
    }

    async fn read(&self, offset: u64, into: &S::Memory) -> Result<()> {
        self.read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &S::Memory, fua: bool) -> Result<Held<S>> {
        self.write(offset, from, fua).await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<Held<S>> {
        self.discard(offset, length).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<Held<S>> {
        self.write_zeroes(offset, length, unmap).await
    }

    async fn flush(&self) -> Result<()> {
        self.flush().await
    }

    async fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>> {
        self.seek(offset, data).await
    }
}

impl<S: Storage> Volumes for Pool<S> {
    type Device = VolumeHandle<S>;

    fn find(&self, id: VolumeId) -> Option<VolumeFace> {
        let volume = self.volume_by_id(id).ok()?;
        Some(VolumeFace { size_bytes: volume.size_bytes, read_only: volume.read_only })
    }

    fn list(&self, after: VolumeId, count: usize) -> Vec<VolumeId> {
        self.volumes().into_iter().map(|volume| volume.id).filter(|id| *id > after).take(count).collect()
    }

    fn open(&self, id: VolumeId, read_only: bool) -> Result<VolumeHandle<S>> {
        self.open_volume(id, read_only)
    }
}

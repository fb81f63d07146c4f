//! The engine's volumes as devices to be exported.

use crate::engine::{Held, Pool, Storage, VolumeHandle};
use crate::error::Result;
use crate::units::VolumeId;

use super::device::{Device, VolumeFace, Volumes};

impl<S: Storage> Device for VolumeHandle<S> {
    type Memory = S::Memory;
    type Held = Held<S>;

    fn size_bytes(&self) -> u64 {
        VolumeHandle::size_bytes(self)
    }

    async fn read(&self, offset: u64, into: &S::Memory) -> Result<()> {
        VolumeHandle::read(self, offset, into).await
    }

    async fn write(&self, offset: u64, from: &S::Memory, fua: bool) -> Result<Held<S>> {
        VolumeHandle::write(self, offset, from, fua).await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<Held<S>> {
        VolumeHandle::discard(self, offset, length).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<Held<S>> {
        VolumeHandle::write_zeroes(self, offset, length, unmap).await
    }

    async fn flush(&self) -> Result<()> {
        VolumeHandle::flush(self).await
    }

    async fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>> {
        VolumeHandle::seek(self, offset, data).await
    }
}

impl<S: Storage> Volumes for Pool<S> {
    type Device = VolumeHandle<S>;

    fn find(&self, id: VolumeId) -> Option<VolumeFace> {
        let info = self.volume_by_id(id).ok()?;
        Some(VolumeFace { size_bytes: info.size_bytes, read_only: info.read_only })
    }

    fn list(&self, after: VolumeId, count: usize) -> Vec<VolumeId> {
        self.volume_ids(after, count)
    }

    fn open(&self, id: VolumeId, read_only: bool) -> Result<VolumeHandle<S>> {
        self.open_volume(id, read_only)
    }
}

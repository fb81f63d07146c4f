//! What an export serves: volumes, of which each is a device while it is open.
//!
//! These traits are the engine's `Pool` and `VolumeHandle` as far as an export needs them, so that the path can be run, and
//! measured, on something simpler ([`PlainDevice`]).

use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;

use crate::engine::{Memory, Storage};
use crate::error::{Error, Result};
use crate::units::VolumeId;

/// An open volume. Offsets and lengths are bytes, multiples of 512, and inside it.
pub trait Device: Clone + 'static {
    /// What it reads into and writes from.
    type Memory: Memory;
    /// Holds the range of a change until it is dropped: rule O8, not before the answer has been handed over.
    type Held: 'static;

    /// Its size at the moment.
    fn size_bytes(&self) -> u64;

    /// Fills `into` from `offset`.
    fn read(&self, offset: u64, into: &Self::Memory) -> impl Future<Output = Result<()>>;

    /// Writes all of `from` at `offset`; with `fua` it is durable afterwards.
    fn write(&self, offset: u64, from: &Self::Memory, fua: bool) -> impl Future<Output = Result<Self::Held>>;

    /// Gives a range back: it reads as zeros afterwards.
    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = Result<Self::Held>>;

    /// Fills a range with zeros, which stay provisioned unless `unmap`.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> impl Future<Output = Result<Self::Held>>;

    /// Makes durable what was answered before.
    fn flush(&self) -> impl Future<Output = Result<()>>;

    /// Where data (or else a hole) begins, at `offset` or after it.
    fn seek(&self, offset: u64, data: bool) -> impl Future<Output = Result<Option<u64>>>;
}

/// What one sees of a volume without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeFace {
    /// Its size.
    pub size_bytes: u64,
    /// It can be opened for reading only.
    pub read_only: bool,
}

/// The volumes that can be exported.
pub trait Volumes: 'static {
    /// A volume in use.
    type Device: Device;

    /// The volume with this id, when there is one.
    fn find(&self, id: VolumeId) -> Option<VolumeFace>;

    /// At most `count` ids above `after`, ascending.
    fn list(&self, after: VolumeId, count: usize) -> Vec<VolumeId>;

    /// Puts a volume into use, until the device and all its clones are dropped.
    ///
    /// # Errors
    /// Why it cannot be used (so).
    fn open(&self, id: VolumeId, read_only: bool) -> Result<Self::Device>;
}

/// A device straight on a storage, with nothing in between: what the path costs by itself. Its requests go to the same
/// offsets of the storage.
#[derive(Debug)]
pub struct PlainDevice<S> {
    storage: Rc<S>,
}

impl<S> Clone for PlainDevice<S> {
    fn clone(&self) -> Self {
        Self { storage: Rc::clone(&self.storage) }
    }
}

impl<S: Storage> PlainDevice<S> {
    /// All of `storage` as a device.
    pub fn new(storage: S) -> Self {
        Self { storage: Rc::new(storage) }
    }
}

fn failed(operation: &str, offset: u64) -> impl FnOnce(std::io::Error) -> Error {
    let operation = format!("{operation} at {offset}");
    move |error| Error::io(operation, error)
}

impl<S: Storage> Device for PlainDevice<S> {
    type Memory = S::Memory;
    type Held = ();

    fn size_bytes(&self) -> u64 {
        self.storage.size_bytes()
    }

    async fn read(&self, offset: u64, into: &S::Memory) -> Result<()> {
        self.storage.read(offset, into).await.map_err(|error| failed("read", offset)(error))
    }

    async fn write(&self, offset: u64, from: &S::Memory, fua: bool) -> Result<()> {
        let written =
            if fua { self.storage.write_durable(offset, from).await } else { self.storage.write(offset, from).await };
        written.map_err(|error| failed("write", offset)(error))
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.storage.punch(offset..offset + length).await.map_err(|error| failed("discard", offset)(error))
    }

    async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        const STEP: u64 = 1 << 20;
        if unmap {
            return self.discard(offset, length).await;
        }
        let zeros = self.storage.allocate(STEP.min(length) as usize);
        for start in (offset..offset + length).step_by(STEP as usize) {
            let len = STEP.min(offset + length - start) as usize;
            self.write(start, &zeros.slice(0..len), false).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.storage.flush().await.map_err(|error| failed("flush", 0)(error))
    }

    async fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>> {
        let size_bytes = self.storage.size_bytes();
        Ok((offset < size_bytes).then_some(if data { offset } else { size_bytes }))
    }
}

/// Plain devices by id.
#[derive(Debug)]
pub struct PlainVolumes<S>(pub BTreeMap<VolumeId, PlainDevice<S>>);

impl<S: Storage> Volumes for PlainVolumes<S> {
    type Device = PlainDevice<S>;

    fn find(&self, id: VolumeId) -> Option<VolumeFace> {
        self.0.get(&id).map(|device| VolumeFace { size_bytes: device.storage.size_bytes(), read_only: false })
    }

    fn list(&self, after: VolumeId, count: usize) -> Vec<VolumeId> {
        self.0.keys().copied().filter(|&id| id > after).take(count).collect()
    }

    fn open(&self, id: VolumeId, _read_only: bool) -> Result<PlainDevice<S>> {
        self.0.get(&id).cloned().ok_or_else(|| Error::NotFound(format!("volume {id} does not exist")))
    }
}

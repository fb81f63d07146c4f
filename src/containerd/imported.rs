//! Layers that the pool has already, which are then neither fetched nor unpacked.
//!
//! containerd names the layer that it is about to unpack by its chain id, a digest over the layer and all below it. A layer of
//! that id may be another snapshot of containerd's, unpacked for another namespace, or have come with `plywood image import`.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::error::{Error, Result};
use super::link::Link;
use super::record::PREFIX;
use crate::daemon::attributes;
use crate::daemon::protocol::Kind;

/// Layers of imported images. What a volume says of itself does not change, and ids are never used again, so each is asked
/// once.
#[derive(Debug, Default)]
pub struct Imported(Mutex<BTreeMap<u64, Option<Layer>>>);

/// A layer of an imported image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its chain id.
    chain: String,
    /// Name of its snapshot.
    pub volume: String,
    /// The file system on it.
    pub filesystem: String,
}

impl Imported {
    /// The layer of that chain id.
    ///
    /// # Errors
    /// What the pool answers.
    pub fn find(&self, link: &Link, chain: &str) -> Result<Option<Layer>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut there = BTreeMap::new();
        for volume in link.volumes()?.into_iter().filter(|volume| volume.snapshot && !volume.name.starts_with(PREFIX)) {
            let layer = match known.remove(&volume.id) {
                // It may have another name by now.
                Some(layer) => layer.map(|layer| Layer { volume: volume.name.clone(), ..layer }),
                None => layer_of(link, volume.name)?,
            };
            there.insert(volume.id, layer);
        }
        *known = there;
        Ok(known.values().flatten().find(|layer| layer.chain == chain).cloned())
    }
}

fn layer_of(link: &Link, volume: String) -> Result<Option<Layer>> {
    let found = match link.attributes(&volume) {
        // Deleted meanwhile.
        Err(Error::Pool(failure)) if failure.kind == Kind::NotFound => return Ok(None),
        found => found?,
    };
    let text = |key: &str| found.get(key).and_then(|value| String::from_utf8(value.0.clone()).ok());
    let layer = text(attributes::CHAIN_ID).zip(text(attributes::FILESYSTEM));
    Ok(layer.map(|(chain, filesystem)| Layer { chain, volume, filesystem }))
}

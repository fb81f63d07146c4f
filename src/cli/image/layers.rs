//! Which snapshots are the layers of which image.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use uuid::Uuid;

use super::import::chain_id;
use super::labels;
use crate::daemon::Client;
use crate::daemon::protocol::{Attributes, Kind, Volume};

/// A volume and its attributes.
#[derive(Clone, Debug)]
pub struct Known {
    /// The volume or snapshot.
    pub volume: Volume,
    /// Its attributes.
    pub attributes: Attributes,
}

impl Known {
    /// Whether it is an image.
    pub fn is_image(&self) -> bool {
        self.volume.snapshot && self.attributes.contains_key(labels::CONFIGURATION)
    }

    /// Whether nobody uses or protects it.
    pub fn is_free(&self) -> bool {
        let Volume { device, open, protected, .. } = &self.volume;
        device.is_none() && !open && !protected
    }
}

/// All there is in a pool.
///
/// # Errors
/// What the pool answers.
pub fn known(client: &Client) -> Result<Vec<Known>> {
    let mut found = Vec::new();
    for volume in client.volumes()? {
        match client.attributes(&volume.name) {
            Ok(attributes) => found.push(Known { volume, attributes }),
            // Deleted meanwhile.
            Err(failure) if failure.kind == Kind::NotFound => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Ok(found)
}

/// What tells one layer from others: its chain id, file system, size and sector size. The same content on another file system
/// or of another size is another layer.
pub type Layer = (String, Option<String>, u64, u32);

/// The layer that a snapshot is. None for what is no layer.
pub fn layer(known: &Known) -> Option<Layer> {
    let chain = labels::text(&known.attributes, labels::CHAIN_ID)?;
    known.volume.snapshot.then(|| layer_of(known, chain))
}

fn layer_of(known: &Known, chain: String) -> Layer {
    let Volume { size_bytes, sector_size, .. } = known.volume;
    (chain, labels::text(&known.attributes, labels::FILESYSTEM), size_bytes, sector_size)
}

/// The layers that an image's configuration names, the lowest first.
///
/// # Errors
/// The configuration is damaged.
pub fn named(image: &Known) -> Result<Vec<Layer>> {
    let configuration = labels::configuration(&image.attributes, &image.volume.name)
        .context("which layers are needed cannot be known; delete that image, or import it again")?;
    let mut chain: Option<String> = None;
    let mut layers = Vec::new();
    for diff_id in configuration.rootfs().diff_ids() {
        let id = chain_id(chain.as_deref(), diff_id);
        layers.push(layer_of(image, id.clone()));
        chain = Some(id);
    }
    Ok(layers)
}

/// Layers that no image has and nothing was cloned from; what is in `gone` does not count.
///
/// # Errors
/// The configuration of an image is damaged.
pub fn unneeded<'a>(all: &'a [Known], gone: &BTreeSet<Uuid>) -> Result<Vec<&'a Known>> {
    let stays = |known: &&Known| !gone.contains(&known.volume.uuid);
    let mut needed = BTreeSet::new();
    for image in all.iter().filter(stays).filter(|known| known.is_image()) {
        needed.extend(named(image)?);
    }
    let origins: BTreeSet<Uuid> = all.iter().filter(stays).filter_map(|known| known.volume.origin_uuid).collect();
    let is_unneeded = |known: &&Known| {
        !known.is_image()
            && known.attributes.contains_key(labels::LAYER)
            && !origins.contains(&known.volume.uuid)
            && layer(known).is_some_and(|layer| !needed.contains(&layer))
    };
    Ok(all.iter().filter(stays).filter(|known| known.is_free()).filter(is_unneeded).collect())
}

/// The snapshots that an image is made of, the lowest first and itself last. Those that the pool has not any more are
/// left out: what stands above one holds its content, too.
///
/// # Errors
/// The configuration of an image is damaged.
pub fn chain<'a>(all: &'a [Known], image: &'a Known) -> Result<Vec<&'a Known>> {
    let mut chain = vec![image];
    let mut at = image;
    // What was committed names what it stands on; what was imported names all its layers.
    while let Some(below) = labels::text(&at.attributes, labels::BELOW) {
        let is_below = |known: &&Known| known.volume.snapshot && known.volume.uuid.to_string() == below;
        match all.iter().find(is_below) {
            Some(found) if chain.iter().all(|known| known.volume.uuid != found.volume.uuid) => {
                chain.push(found);
                at = found;
            }
            _ => break,
        }
    }
    let own = layer(at);
    for wanted in named(at)?.into_iter().rev().filter(|wanted| own.as_ref() != Some(wanted)) {
        chain.extend(all.iter().find(|known| layer(known).as_ref() == Some(&wanted)));
    }
    chain.reverse();
    Ok(chain)
}

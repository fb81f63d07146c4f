//! Which snapshots are the layers of which image.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use uuid::Uuid;

use super::import::chain_id;
use super::labels;
use crate::containerd::{Kind, RECORD, REFERENCE, Record};
use crate::daemon::Client;
use crate::daemon::protocol::{self, Attributes, Volume};

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
    with_attributes(client, client.volumes()?)
}

/// All snapshots in a pool.
///
/// # Errors
/// What the pool answers.
pub fn known_snapshots(client: &Client) -> Result<Vec<Known>> {
    with_attributes(client, client.volumes()?.into_iter().filter(|volume| volume.snapshot))
}

fn with_attributes(client: &Client, volumes: impl IntoIterator<Item = Volume>) -> Result<Vec<Known>> {
    let mut found = Vec::new();
    for volume in volumes {
        match client.attributes(&volume.name) {
            Ok(attributes) => found.push(Known { volume, attributes }),
            // Deleted meanwhile.
            Err(failure) if failure.kind == protocol::Kind::NotFound => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Ok(found)
}

/// The file system of a layer, and the size of its sectors: the same content on another one is another layer. Its virtual
/// size is not among that: a clone of it can be larger.
pub type Ground = (Option<String>, u32);

/// What a layer stands on.
pub fn ground(known: &Known) -> Ground {
    (labels::text(&known.attributes, labels::FILESYSTEM), known.volume.sector_size)
}

/// Whether a snapshot is the layer of that chain id: as it was imported, or as it was exported.
pub fn is_layer(known: &Known, chain: &str) -> bool {
    let has = |key: &str| known.attributes.get(key).is_some_and(|value| value.0 == chain.as_bytes());
    known.volume.snapshot && (has(labels::CHAIN_ID) || has(labels::EXPORTED))
}

/// Whether a snapshot is the layer of that diff id on the layer `below`.
pub fn is_layer_on(known: &Known, below: Uuid, diff_id: &str) -> bool {
    known.volume.snapshot
        && labels::text(&known.attributes, labels::DIFF_ID).is_some_and(|known| known == diff_id)
        && labels::text(&known.attributes, labels::BELOW).is_some_and(|known| known == below.to_string())
}

/// The file system of what containerd has unpacked as the layer of that chain id, which is how it names layers.
pub fn unpacked_by_containerd(known: &Known, chain: &str) -> Option<String> {
    let record = Record::decode(&known.volume.name, &known.attributes.get(RECORD)?.0)?;
    // NAMESPACE/NUMBER/NAME.
    let is_named_so = || record.key.rsplit('/').next() == Some(chain);
    let is_it = record.kind == Kind::Committed
        && (record.labels.get(REFERENCE).is_some_and(|reference| reference == chain) || is_named_so());
    is_it.then_some(record.filesystem)
}

/// The number of a layer, the lowest is 1; of an image, its number of layers.
pub fn number(known: &Known) -> usize {
    labels::text(&known.attributes, labels::LAYER).and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Chain ids of the layers that an image's configuration names, the lowest first.
fn named(image: &Known) -> Result<Vec<String>> {
    let configuration = labels::configuration(&image.attributes, &image.volume.name)
        .context("which layers are needed cannot be known; delete that image, or import it again")?;
    let mut chain: Option<String> = None;
    let mut layers = Vec::new();
    for diff_id in configuration.rootfs().diff_ids() {
        let id = chain_id(chain.as_deref(), diff_id);
        layers.push(id.clone());
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
    let mut needed: BTreeSet<Uuid> = BTreeSet::new();
    for image in all.iter().filter(stays).filter(|known| known.is_image()) {
        needed.extend(chain(all, image)?.into_iter().map(|known| known.volume.uuid));
    }
    needed.extend(all.iter().filter(stays).filter_map(|known| known.volume.origin_uuid));
    let is_unneeded = |known: &&Known| {
        !known.is_image()
            && known.volume.snapshot
            && known.attributes.contains_key(labels::LAYER)
            && !needed.contains(&known.volume.uuid)
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
    // Each names what it stands on. Below one that has gone, the image's configuration tells what there was.
    let (mut at, mut teller) = (image, image);
    while let Some(below) = labels::text(&at.attributes, labels::BELOW) {
        let is_below = |known: &&Known| known.volume.snapshot && known.volume.uuid.to_string() == below;
        match all.iter().find(is_below) {
            Some(found) if chain.iter().all(|known| known.volume.uuid != found.volume.uuid) => {
                chain.push(found);
                at = found;
                teller = if found.is_image() { found } else { teller };
            }
            _ => break,
        }
    }
    let named = named(teller)?;
    let place = named.iter().position(|id| is_layer(at, id)).unwrap_or_else(|| number(at).saturating_sub(1));
    for wanted in named.iter().take(place).rev() {
        let is_new = |known: &&Known| chain.iter().all(|other| other.volume.uuid != known.volume.uuid);
        let is_it = |known: &&Known| is_layer(known, wanted) && ground(known) == ground(image) && is_new(known);
        // An image of the same content may be deleted by its name: the layer that was made of it is the better one.
        let merit = |known: &&Known| (!known.is_image(), known.volume.size_bytes == image.volume.size_bytes);
        let found = all.iter().filter(is_it).max_by_key(merit);
        chain.extend(found);
    }
    chain.reverse();
    Ok(chain)
}

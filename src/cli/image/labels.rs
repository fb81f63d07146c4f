//! The attributes by which images and containers are known: they are volumes like others.

use anyhow::{Context as _, Result, ensure};
use oci_spec::image::ImageConfiguration;
use serde_json::{Map, Value};

pub use crate::daemon::attributes::{CHAIN_ID, FILESYSTEM};
use crate::daemon::protocol::Attributes;

/// What the names of all of these begin with that are about images.
pub const PREFIX: &str = "plywood.image.";
/// The OCI configuration, JSON. What has it is an image.
pub const CONFIGURATION: &str = "plywood.image.config";
/// Where the image came from, as it was typed.
pub const SOURCE: &str = "plywood.image.source";
/// Digest of the layer's uncompressed archive.
pub const DIFF_ID: &str = "plywood.image.diff-id";
/// Chain id of the layer as it was exported last: written anew, it has another digest than the archive it came from.
pub const EXPORTED: &str = "plywood.image.exported";
/// The layer's number, the lowest is 1; at an image, its number of layers.
pub const LAYER: &str = "plywood.image.layer";
/// Uuid of the layer below; on an image made of a container, of the image that the container was started from.
pub const BELOW: &str = "plywood.image.below";
/// By what a layer is found that need not be unpacked again. That is worth what its writer is: no stream brings it from
/// another pool.
pub const FOUND_BY: [&str; 4] = [CHAIN_ID, DIFF_ID, EXPORTED, BELOW];
/// On a container: the image that it was started from.
pub const CONTAINER_IMAGE: &str = "plywood.container.image";
/// On a container: the command, a JSON list.
pub const CONTAINER_COMMAND: &str = "plywood.container.command";
/// On a container: how it is run, JSON.
pub const CONTAINER_TERMS: &str = "plywood.container.terms";
/// On a container: the id that its runtime knows it by.
pub const CONTAINER_ID: &str = "plywood.container.id";
/// On a container that has ended: the exit code of its command.
pub const CONTAINER_EXIT: &str = "plywood.container.exit";
/// On a container: uuids of the volumes of the pool that it has mounted, a JSON list.
pub const CONTAINER_VOLUMES: &str = "plywood.container.volumes";

/// Most bytes of a configuration: a volume has room for 256 KiB of attributes in all.
const CONFIGURATION_LIMIT_BYTES: usize = 192 << 10;

/// The configuration as it is kept: the very bytes that its digest is about, or without the history where they are too
/// many.
///
/// # Errors
///
/// It is too large even so.
pub fn configuration_to_keep(json: &[u8], parsed: &ImageConfiguration) -> Result<Vec<u8>> {
    if json.len() <= CONFIGURATION_LIMIT_BYTES {
        return Ok(json.to_vec());
    }
    let mut shortened = parsed.clone();
    shortened.set_history(None);
    let shortened = serde_json::to_vec(&shortened)?;
    ensure!(shortened.len() <= CONFIGURATION_LIMIT_BYTES, "the image's configuration is larger than 192 KiB");
    Ok(shortened)
}

/// An attribute as text.
pub fn text(attributes: &Attributes, key: &str) -> Option<String> {
    attributes.get(key).map(|value| String::from_utf8_lossy(&value.0).into_owned())
}

/// The image's configuration among its attributes, with all that is not known here.
///
/// # Errors
///
/// There is none, or it is damaged.
pub fn raw_configuration(attributes: &Attributes, name: &str) -> Result<Map<String, Value>> {
    let json = attributes.get(CONFIGURATION).with_context(|| format!("{name} is not an image"))?;
    serde_json::from_slice(&json.0).with_context(|| format!("{name}: its {CONFIGURATION} is damaged"))
}

/// The image's configuration among its attributes.
///
/// # Errors
///
/// There is none, or it is damaged.
pub fn configuration(attributes: &Attributes, name: &str) -> Result<ImageConfiguration> {
    let json = attributes.get(CONFIGURATION).with_context(|| format!("{name} is not an image"))?;
    serde_json::from_slice(&json.0).with_context(|| format!("{name}: its {CONFIGURATION} is damaged"))
}

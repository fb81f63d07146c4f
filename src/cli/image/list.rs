//! `plywood image list`.

use anyhow::Result;
use serde::Serialize;

use super::labels;
use super::layers::{Known, known_snapshots, number};
use crate::cli::{Context, output, size};
use crate::daemon::Client;

/// An image, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    /// Name.
    pub name: String,
    /// Number of layers.
    pub layers: usize,
    /// Bytes that its top layer brought.
    pub own_bytes: u64,
    /// Bytes of all layers together, each of which other images may share.
    pub mapped_bytes: u64,
    /// Of these, what others in the pool hold, too; none while that has not been found.
    pub shared_bytes: Option<u64>,
    /// The size that its containers see.
    pub size_bytes: u64,
    /// File system; none at a disk image.
    pub filesystem: Option<String>,
    /// Where it came from.
    pub source: Option<String>,
    /// When it was imported, in nanoseconds since 1970 UTC.
    pub created_ns: u64,
}

/// All images of a pool, by name.
///
/// # Errors
///
/// What the daemon answers.
pub fn images(client: &Client) -> Result<Vec<ImageInfo>> {
    let mut images = Vec::new();
    for known in known_snapshots(client)?.into_iter().filter(Known::is_image) {
        let layers = number(&known);
        let Known { volume, attributes } = known;
        images.push(ImageInfo {
            layers,
            filesystem: labels::text(&attributes, labels::FILESYSTEM),
            source: labels::text(&attributes, labels::SOURCE),
            name: volume.name,
            own_bytes: volume.own_bytes,
            mapped_bytes: volume.mapped_bytes,
            shared_bytes: volume.shared_bytes,
            size_bytes: volume.size_bytes,
            created_ns: volume.created_ns,
        });
    }
    images.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(images)
}

/// Prints them.
///
/// # Errors
///
/// Those of [`images`].
pub fn list(context: &Context) -> Result<()> {
    let images = images(&context.client()?)?;
    if context.json {
        return Ok(output::json("images", &images)?);
    }
    let rows = images.iter().map(|image| {
        vec![
            image.name.clone(),
            image.layers.to_string(),
            size::show(image.own_bytes),
            size::show(image.mapped_bytes),
            image.shared_bytes.map_or_else(|| "-".into(), size::show),
            size::show(image.size_bytes),
            image.filesystem.clone().unwrap_or_else(|| "disk".into()),
            created(image.created_ns),
        ]
    });
    let headings = ["NAME", "LAYERS", "TOP LAYER", "SIZE", "SHARED", "VIRTUAL", "FS", "CREATED"];
    Ok(output::table(&headings, &["LAYERS", "TOP LAYER", "SIZE", "SHARED", "VIRTUAL"], rows.collect())?)
}

fn created(nanoseconds: u64) -> String {
    let time = jiff::Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or_default();
    time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string()
}

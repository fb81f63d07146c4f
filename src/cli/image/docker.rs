//! What `docker save` and `skopeo copy ... docker-archive:` write: a tar of `manifest.json`, the image's configuration,
//! and its layers, each a tar or a compressed one, in any order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use indicatif::ProgressBar;
use oci_spec::image::Digest;
use serde::Deserialize;

use super::archive::{Archive, Kind};
use super::source::{Configuration, DOCUMENT_LIMIT_BYTES, Image, Layer, Part, open_file};
use super::stream::{Expected, Interrupt, LayerReader, digest_of};
use super::tree::components;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Opens the one image in the archive at `path`.
///
/// # Errors
///
/// The archive is damaged, or holds none or several images, or one for another machine.
pub(super) fn open(path: &Path) -> Result<Image> {
    let shown = path.display();
    let file = uncompressed(open_file(path)?).with_context(|| shown.to_string())?;
    let archive = Index::read(file).with_context(|| shown.to_string())?;
    archive.image().with_context(|| shown.to_string())
}

/// Layers are read in the manifest's order, not the archive's, so they must be reachable by offset: a compressed
/// archive is unpacked to a nameless file first.
fn uncompressed(mut file: File) -> Result<File> {
    let mut start = [0; 262];
    let mut filled = 0;
    while filled < start.len() {
        match file.read(&mut start[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    file.seek(SeekFrom::Start(0))?;
    if start[257..].starts_with(b"ustar") {
        return Ok(file);
    }
    let mut reader =
        LayerReader::open(Box::new(file), Expected::default(), ProgressBar::hidden(), Interrupt::default())?;
    let mut plain = tempfile::tempfile().context("no temporary file for the unpacked archive")?;
    io::copy(&mut reader, &mut plain).context("unpacking the archive")?;
    plain.seek(SeekFrom::Start(0))?;
    Ok(plain)
}

/// Where each file of the archive is.
struct Index {
    file: Arc<File>,
    /// Offset and length by name.
    files: HashMap<Vec<u8>, (u64, u64)>,
    /// Targets of symbolic links by name: older archives store a layer that occurs twice as a link.
    links: HashMap<Vec<u8>, Vec<u8>>,
}

impl Index {
    fn read(file: File) -> Result<Self> {
        let (mut files, mut links) = (HashMap::new(), HashMap::new());
        let mut archive = Archive::new(&file);
        while let Some(entry) = archive.next_entry()? {
            let offset_bytes = (&file).stream_position()?;
            let name = components(&entry.path)?.join(&b'/');
            match entry.kind {
                Kind::File => {
                    files.insert(name, (offset_bytes, entry.size_bytes));
                }
                Kind::Symlink => {
                    let directory = match entry.path.iter().rposition(|byte| *byte == b'/') {
                        Some(slash) => &entry.path[..=slash],
                        None => b"",
                    };
                    links.insert(name, components(&[directory, &entry.link].concat())?.join(&b'/'));
                }
                _ => {}
            }
        }
        Ok(Self { file: Arc::new(file), files, links })
    }

    fn find(&self, name: &str) -> Result<(u64, u64)> {
        let mut name = components(name.as_bytes())?.join(&b'/');
        if let Some(target) = self.links.get(&name) {
            name.clone_from(target);
        }
        let found = self.files.get(&name).copied();
        found.with_context(|| format!("{} is missing in the archive", String::from_utf8_lossy(&name)))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>> {
        let (offset_bytes, left_bytes) = self.find(name)?;
        ensure!(left_bytes <= DOCUMENT_LIMIT_BYTES, "{name} is larger than 4 MiB");
        let mut bytes = Vec::new();
        Part { file: Arc::clone(&self.file), offset_bytes, left_bytes }.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn image(&self) -> Result<Image> {
        let manifests = self.document("manifest.json").context("not an archive of docker save")?;
        let manifests: Vec<Manifest> = serde_json::from_slice(&manifests).context("manifest.json is damaged")?;
        let manifest = match manifests.as_slice() {
            [] => bail!("the archive holds no image"),
            [only] => only,
            several => {
                let tags: Vec<String> = several.iter().filter_map(|one| one.repo_tags.clone()).flatten().collect();
                bail!("the archive holds several images ({}); save the one that is wanted alone", tags.join(", "))
            }
        };
        let json = self.document(&manifest.config)?;
        // The configuration is named after its digest: `HEX.json`, or a blob.
        let hex = manifest.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
        if let Ok(digest) = Digest::from_str(&format!("sha256:{hex}")) {
            let found = digest_of(&json, &digest)?;
            ensure!(found == digest.as_ref(), "digest of the image's configuration is {found}, its name says {digest}");
        }
        let configuration = Configuration::parse(json)?;
        let diff_ids = configuration.parsed.rootfs().diff_ids();
        ensure!(
            diff_ids.len() == manifest.layers.len() && !diff_ids.is_empty(),
            "the manifest has {} layers, the image's configuration {}",
            manifest.layers.len(),
            diff_ids.len()
        );
        let layer = |(name, diff_id): (&String, &String)| -> Result<Layer> {
            let (offset_bytes, length_bytes) = self.find(name)?;
            let diff_id = Digest::from_str(diff_id).with_context(|| format!("diff id {diff_id}"))?;
            let expected = Box::new(Expected { diff_id: Some(diff_id), ..Expected::default() });
            let name = format!("layer {name}");
            Ok(Layer::Archive { file: Arc::clone(&self.file), name, offset_bytes, length_bytes, expected })
        };
        let layers = manifest.layers.iter().zip(diff_ids).map(layer).collect::<Result<Vec<_>>>()?;
        Ok(Image { configuration: Some(configuration), layers })
    }
}

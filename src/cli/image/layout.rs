//! OCI image layouts: `index.json` -> manifest -> configuration -> layers (image specification, image-layout.md).
//!
//! Everything that is named by a digest is held against it before it is believed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use oci_spec::image::{Descriptor, Digest, ImageIndex, ImageManifest, MediaType};

use super::source::{Configuration, DOCUMENT_LIMIT_BYTES, Image, Layer, open_file, platform};
use super::stream::{Expected, digest_of};

/// The annotation that holds an image's name within a layout.
pub(super) const REFERENCE: &str = "org.opencontainers.image.ref.name";
/// Most indexes within each other.
const NESTING: usize = 4;

/// Opens the image named `tag` in the layout at `directory`.
///
/// # Errors
///
/// The layout is damaged, has no such image, or none for this machine.
pub(super) fn open(directory: &Path, tag: Option<&str>) -> Result<Image> {
    let show = directory.display();
    ensure!(directory.is_dir(), "{show}: no such directory");
    let index_path = directory.join("index.json");
    ensure!(index_path.is_file(), "{show}: not an OCI image layout (it has no index.json)");
    let index = read_limited(&open_file(&index_path)?).with_context(|| index_path.display().to_string())?;
    let index: ImageIndex = serde_json::from_slice(&index).with_context(|| format!("{show}/index.json is damaged"))?;
    let layout = Layout { directory: directory.to_owned() };
    let chosen = choose(index.manifests(), tag).with_context(|| show.to_string())?;
    layout.image(&chosen, NESTING).with_context(|| show.to_string())
}

/// The entry that `tag` means.
fn choose(entries: &[Descriptor], tag: Option<&str>) -> Result<Descriptor> {
    let name = |entry: &Descriptor| entry.annotations().as_ref().and_then(|all| all.get(REFERENCE)).cloned();
    let named: Vec<String> = entries.iter().filter_map(name).collect();
    if let Some(tag) = tag {
        // Written twice under one name, the later one counts.
        let found = entries.iter().rfind(|entry| name(entry).as_deref() == Some(tag)).cloned();
        return found.with_context(|| format!("no image is called {tag} here; there are: {}", named.join(", ")));
    }
    match entries {
        [] => bail!("the layout holds no image"),
        [only] => Ok(only.clone()),
        // Several platforms of one image, without an index of their own.
        several if named.len() <= 1 => for_this_platform(several),
        _ => bail!("the layout holds several images; say which: oci:DIR:TAG with one of {}", named.join(", ")),
    }
}

fn for_this_platform(entries: &[Descriptor]) -> Result<Descriptor> {
    let describe = |entry: &Descriptor| match entry.platform() {
        Some(platform) => format!("{}/{}", platform.os(), platform.architecture()),
        None => "unknown".to_owned(),
    };
    // One without a platform is told by its configuration.
    let exact = entries.iter().find(|entry| describe(entry) == platform());
    let found = exact.or_else(|| entries.iter().find(|entry| entry.platform().is_none())).cloned();
    found.with_context(|| {
        let offered: Vec<String> = entries.iter().map(describe).collect();
        format!("the image is for {}, this machine is {}", offered.join(", "), platform())
    })
}

struct Layout {
    directory: PathBuf,
}

impl Layout {
    fn image(&self, descriptor: &Descriptor, nesting: usize) -> Result<Image> {
        let bytes = self.document(descriptor)?;
        match descriptor.media_type() {
            MediaType::ImageIndex => {}
            MediaType::Other(other) if other == "application/vnd.docker.distribution.manifest.list.v2+json" => {}
            MediaType::ImageManifest => return self.manifest(&bytes),
            MediaType::Other(other) if other == "application/vnd.docker.distribution.manifest.v2+json" => {
                return self.manifest(&bytes);
            }
            other => bail!("{} is of type {other}, not an image", descriptor.digest()),
        }
        ensure!(nesting > 0, "too many indexes within each other");
        let index: ImageIndex =
            serde_json::from_slice(&bytes).with_context(|| format!("index {} is damaged", descriptor.digest()))?;
        self.image(&for_this_platform(index.manifests())?, nesting - 1)
    }

    fn manifest(&self, bytes: &[u8]) -> Result<Image> {
        let manifest: ImageManifest = serde_json::from_slice(bytes).context("the manifest is damaged")?;
        match manifest.config().media_type() {
            MediaType::ImageConfig => {}
            MediaType::Other(other) if other == "application/vnd.docker.container.image.v1+json" => {}
            other => bail!("an artifact of type {other}, not an image"),
        }
        let configuration = Configuration::parse(self.document(manifest.config())?)?;
        let diff_ids = configuration.parsed.rootfs().diff_ids();
        ensure!(
            diff_ids.len() == manifest.layers().len(),
            "the manifest has {} layers, the image's configuration {}",
            manifest.layers().len(),
            diff_ids.len()
        );
        ensure!(!diff_ids.is_empty(), "the image has no layers");
        let layers = manifest.layers().iter().zip(diff_ids).map(|(layer, diff_id)| self.layer(layer, diff_id));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        Ok(Image { configuration: Some(configuration), layers })
    }

    fn layer(&self, descriptor: &Descriptor, diff_id: &str) -> Result<Layer> {
        let kind = descriptor.media_type().to_string();
        // Compression is told from the bytes; encryption is not to be seen there.
        ensure!(
            kind.contains("tar") && !kind.contains("encrypted"),
            "a layer is of type {kind}, which is not supported"
        );
        let expected = Expected {
            digest: Some(descriptor.digest().clone()),
            size_bytes: Some(descriptor.size()),
            diff_id: Some(Digest::from_str(diff_id).with_context(|| format!("diff id {diff_id}"))?),
        };
        let file = self.blob(descriptor.digest())?;
        let length_bytes = file.metadata()?.len();
        ensure!(
            length_bytes == descriptor.size(),
            "layer {} has {length_bytes} bytes, the manifest says {}: it is damaged or cut short",
            descriptor.digest(),
            descriptor.size()
        );
        let name = format!("layer {}", descriptor.digest());
        Ok(Layer::Archive { file: Arc::new(file), name, offset_bytes: 0, length_bytes, expected: Box::new(expected) })
    }

    /// A small blob, verified.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let digest = descriptor.digest();
        let bytes = read_limited(&self.blob(digest)?).with_context(|| format!("blob {digest}"))?;
        let found = digest_of(&bytes, digest)?;
        ensure!(found == digest.as_ref(), "digest of blob {digest} is {found}: it is damaged");
        Ok(bytes)
    }

    fn blob(&self, digest: &Digest) -> Result<File> {
        // Parsing a digest lets only letters, digits and `=_-` through: it cannot climb out of `blobs`.
        let path = self.directory.join("blobs").join(digest.algorithm().as_ref()).join(digest.digest());
        ensure!(path.symlink_metadata().is_ok(), "blob {digest} is missing");
        open_file(&path)
    }
}

pub(super) fn read_limited(file: &File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(DOCUMENT_LIMIT_BYTES + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= DOCUMENT_LIMIT_BYTES, "larger than 4 MiB");
    Ok(bytes)
}

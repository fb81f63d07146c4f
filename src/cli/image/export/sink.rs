//! Writes an image: the blobs and the index of an OCI image layout, or an archive that `docker load` reads.
//!
//! Nothing counts before it is whole. In a layout the index is replaced last, and blobs that were written for an image that
//! was not finished are taken away; an archive gets its name when it is durable.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use flate2::write::GzEncoder;
use rustix::fs::FlockOperation;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::Header;
use tempfile::NamedTempFile;

use super::super::layout::{REFERENCE, read_limited};
use super::super::source::open_file;
use super::super::stream::sha256_of;
use crate::cli::transfer::NewFile;

const INDEX: &str = "index.json";
const TAR_BLOCK_BYTES: u64 = 512;

/// How the layers of a layout are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// What everybody reads.
    #[default]
    Gzip,
    /// Faster and smaller; containerd 1.5 and Docker 23 read it.
    Zstd,
    /// Not at all.
    None,
}

/// A layer as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blob {
    /// Digest of the archive.
    pub(super) diff_id: String,
    /// Digest of what is stored.
    pub(super) digest: String,
    /// Its length.
    pub(super) size_bytes: u64,
}

/// An image that is being written.
pub(super) enum Sink {
    Oci(Layout),
    Docker(Archive),
}

impl Sink {
    /// Writes a layer: what `write` writes is the archive.
    pub(super) fn layer<T>(&mut self, write: impl FnOnce(&mut dyn Write) -> Result<T>) -> Result<(Blob, T)> {
        match self {
            Self::Oci(layout) => layout.layer(write),
            Self::Docker(archive) => archive.layer(write),
        }
    }

    /// Writes configuration and manifest, and answers the digest that the image is known by.
    pub(super) fn finish(self, configuration: &[u8], layers: &[Blob]) -> Result<String> {
        match self {
            Self::Oci(layout) => layout.finish(configuration, layers),
            Self::Docker(archive) => archive.finish(configuration, layers),
        }
    }
}

/// Counts and hashes what passes.
struct Tally<W> {
    to: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Tally<W> {
    fn new(to: W) -> Self {
        Self { to, hash: Sha256::new(), bytes: 0 }
    }

    fn finish(self) -> (W, String, u64) {
        (self.to, format!("sha256:{}", hex::encode(self.hash.finalize())), self.bytes)
    }
}

impl<W: Write> Write for Tally<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// An OCI image layout.
pub(super) struct Layout {
    directory: PathBuf,
    tag: String,
    compression: Compression,
    /// What was not there before; taken away again when the image is not finished.
    made: Vec<PathBuf>,
    /// Held: others change the same index, and would count on blobs that may be taken away again.
    turn: Option<File>,
}

impl Layout {
    /// Begins an image in the layout at `directory`, which is made if need be.
    pub(super) fn begin(directory: &Path, tag: &str, compression: Compression) -> Result<Self> {
        let mut layout =
            Self { directory: directory.to_owned(), tag: tag.to_owned(), compression, made: Vec::new(), turn: None };
        let shown = directory.display();
        layout.turn = loop {
            match fs::create_dir(directory) {
                Ok(()) => layout.made.push(directory.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| shown.to_string()),
            }
            let turn = File::open(directory).with_context(|| shown.to_string())?;
            rustix::fs::flock(&turn, FlockOperation::LockExclusive).with_context(|| format!("{shown}: locking"))?;
            // Whoever made it may have failed, and have taken it away.
            let own = turn.metadata()?;
            if fs::metadata(directory).is_ok_and(|now| (now.dev(), now.ino()) == (own.dev(), own.ino())) {
                break Some(turn);
            }
            layout.made.clear();
        };
        // Blobs without an index are what a process has left that was killed.
        let mut entries = fs::read_dir(directory).with_context(|| shown.to_string())?;
        let is_empty = entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == "blobs"));
        ensure!(is_empty || directory.join(INDEX).is_file(), "{shown}: is no OCI image layout, and not empty");
        if !is_empty {
            layout.index()?;
        }
        for part in ["blobs", "blobs/sha256"] {
            let path = directory.join(part);
            match fs::create_dir(&path) {
                Ok(()) => layout.made.push(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        }
        Ok(layout)
    }

    fn index(&self) -> Result<Value> {
        let path = self.directory.join(INDEX);
        let shown = path.display();
        if !path.exists() {
            let media_type = "application/vnd.oci.image.index.v1+json";
            return Ok(json!({"schemaVersion": 2, "mediaType": media_type, "manifests": []}));
        }
        let text = read_limited(&open_file(&path)?).with_context(|| shown.to_string())?;
        let index: Value = serde_json::from_slice(&text).with_context(|| format!("{shown} is damaged"))?;
        ensure!(index.get("manifests").is_some_and(Value::is_array), "{shown} is damaged: it lists no manifests");
        Ok(index)
    }

    fn blobs(&self) -> PathBuf {
        self.directory.join("blobs/sha256")
    }

    fn layer<T>(&mut self, write: impl FnOnce(&mut dyn Write) -> Result<T>) -> Result<(Blob, T)> {
        let draft = NamedTempFile::new_in(self.blobs()).with_context(|| self.directory.display().to_string())?;
        let stored = Tally::new(BufWriter::with_capacity(1 << 20, draft));
        let (stored, diff_id, told) = match self.compression {
            Compression::Gzip => {
                let mut plain = Tally::new(GzEncoder::new(stored, flate2::Compression::default()));
                let told = write(&mut plain)?;
                let (encoder, diff_id, _) = plain.finish();
                (encoder.finish()?, diff_id, told)
            }
            Compression::Zstd => {
                let mut plain = Tally::new(zstd::Encoder::new(stored, 0)?);
                let told = write(&mut plain)?;
                let (encoder, diff_id, _) = plain.finish();
                (encoder.finish()?, diff_id, told)
            }
            Compression::None => {
                let mut plain = Tally::new(stored);
                let told = write(&mut plain)?;
                let (stored, diff_id, _) = plain.finish();
                (stored, diff_id, told)
            }
        };
        let (buffered, digest, size_bytes) = stored.finish();
        let draft = buffered.into_inner().map_err(io::IntoInnerError::into_error)?;
        self.keep(draft, &digest)?;
        Ok((Blob { diff_id, digest, size_bytes }, told))
    }

    /// Gives a blob its name, durably.
    fn keep(&mut self, draft: NamedTempFile, digest: &str) -> Result<()> {
        let name = digest.strip_prefix("sha256:").context("a digest of another kind")?;
        let path = self.blobs().join(name);
        let is_new = !path.exists();
        open_to_all(draft.as_file())?;
        draft.as_file().sync_all().with_context(|| path.display().to_string())?;
        draft.persist(&path).with_context(|| path.display().to_string())?;
        if is_new {
            self.made.push(path);
        }
        Ok(())
    }

    fn document(&mut self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = sha256_of(bytes);
        let mut draft = NamedTempFile::new_in(self.blobs()).with_context(|| self.directory.display().to_string())?;
        draft.write_all(bytes)?;
        self.keep(draft, &digest)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }

    fn finish(mut self, configuration: &[u8], layers: &[Blob]) -> Result<String> {
        let layer_type = match self.compression {
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Compression::None => "application/vnd.oci.image.layer.v1.tar",
        };
        let layers: Vec<Value> = layers
            .iter()
            .map(|blob| json!({"mediaType": layer_type, "digest": blob.digest, "size": blob.size_bytes}))
            .collect();
        let configuration = self.document("application/vnd.oci.image.config.v1+json", configuration)?;
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": manifest_type, "config": configuration, "layers": layers});
        let mut descriptor = self.document(manifest_type, &serde_json::to_vec(&manifest)?)?;
        let digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
        descriptor["annotations"] = json!({ REFERENCE: self.tag });
        File::open(self.blobs())?.sync_all()?;
        self.replace("oci-layout", json!({"imageLayoutVersion": "1.0.0"}).to_string().as_bytes())?;
        let mut index = self.index()?;
        let manifests = index["manifests"].as_array_mut().context("index.json lists no manifests")?;
        // A name stands for one image.
        manifests.retain(|entry| entry["annotations"][REFERENCE].as_str() != Some(&self.tag));
        manifests.push(descriptor);
        self.replace(INDEX, &serde_json::to_vec(&index)?)?;
        self.made.clear();
        Ok(digest)
    }

    fn replace(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.directory.join(name);
        let is_new = !path.exists();
        let replace = || -> Result<()> {
            let mut draft = NamedTempFile::new_in(&self.directory)?;
            draft.write_all(bytes)?;
            open_to_all(draft.as_file())?;
            draft.as_file().sync_all()?;
            draft.persist(&path)?;
            Ok(File::open(&self.directory)?.sync_all()?)
        };
        replace().with_context(|| path.display().to_string())?;
        if is_new {
            self.made.push(path);
        }
        Ok(())
    }
}

/// A temporary file is for its owner only.
fn open_to_all(file: &File) -> io::Result<()> {
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
}

impl Drop for Layout {
    fn drop(&mut self) {
        for path in self.made.drain(..).rev() {
            let gone = if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) };
            if let Err(error) = gone {
                tracing::warn!("{} could not be taken away: {error}", path.display());
            }
        }
    }
}

/// An archive as `docker save` writes it.
pub(super) struct Archive {
    file: NewFile,
    reference: String,
    /// Layers it holds, each once: an empty one may come twice.
    held: BTreeSet<String>,
}

impl Archive {
    /// Begins a new file.
    pub(super) fn begin(path: &Path, reference: String) -> Result<Self> {
        Ok(Self { file: NewFile::begin(path)?, reference, held: BTreeSet::new() })
    }

    /// The length and digest of a layer are known when it has been written: its header is written then.
    fn layer<T>(&mut self, write: impl FnOnce(&mut dyn Write) -> Result<T>) -> Result<(Blob, T)> {
        let mut file = self.file.file();
        let start = file.stream_position()?;
        file.write_all(&[0; TAR_BLOCK_BYTES as usize])?;
        let mut plain = Tally::new(BufWriter::with_capacity(1 << 20, file));
        let told = write(&mut plain)?;
        let (mut buffered, diff_id, size_bytes) = plain.finish();
        buffered.flush()?;
        drop(buffered);
        let name = layer_name(&diff_id);
        if self.held.insert(name.clone()) {
            let end = pad(file, size_bytes)?;
            file.seek(SeekFrom::Start(start))?;
            file.write_all(header(&name, size_bytes)?.as_bytes())?;
            file.seek(SeekFrom::Start(end))?;
        } else {
            file.set_len(start)?;
            file.seek(SeekFrom::Start(start))?;
        }
        Ok((Blob { digest: diff_id.clone(), diff_id, size_bytes }, told))
    }

    fn document(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.file.file();
        file.write_all(header(name, bytes.len() as u64)?.as_bytes())?;
        file.write_all(bytes)?;
        pad(file, bytes.len() as u64)?;
        Ok(())
    }

    fn finish(self, configuration: &[u8], layers: &[Blob]) -> Result<String> {
        let digest = sha256_of(configuration);
        let name = format!("{}.json", digest.trim_start_matches("sha256:"));
        self.document(&name, configuration)?;
        let layers: Vec<String> = layers.iter().map(|blob| layer_name(&blob.diff_id)).collect();
        let manifest = json!([{"Config": name, "RepoTags": [self.reference], "Layers": layers}]);
        self.document("manifest.json", manifest.to_string().as_bytes())?;
        self.file.file().write_all(&[0; 2 * TAR_BLOCK_BYTES as usize])?;
        open_to_all(self.file.file())?;
        self.file.finish()?;
        Ok(digest)
    }
}

fn layer_name(diff_id: &str) -> String {
    format!("{}/layer.tar", diff_id.trim_start_matches("sha256:"))
}

fn header(name: &str, size_bytes: u64) -> Result<Header> {
    let mut header = Header::new_gnu();
    if name.len() > 100 {
        bail!("{name}: too long for an archive");
    }
    header.set_path(name)?;
    header.set_mode(0o644);
    header.set_size(size_bytes);
    for set in [Header::set_uid, Header::set_gid, Header::set_mtime] {
        set(&mut header, 0);
    }
    header.set_cksum();
    Ok(header)
}

/// Fills up what was written to whole blocks, and answers where the file is then.
fn pad(mut file: &File, size_bytes: u64) -> io::Result<u64> {
    let rest = size_bytes.next_multiple_of(TAR_BLOCK_BYTES) - size_bytes;
    file.write_all(&vec![0; rest as usize])?;
    file.stream_position()
}

#[cfg(test)]
mod tests {
    use super::super::super::source::Source;
    use super::*;

    fn configuration(layers: &[Blob]) -> Vec<u8> {
        let diff_ids: Vec<&str> = layers.iter().map(|blob| blob.diff_id.as_str()).collect();
        let platform = super::super::super::source::platform();
        let (os, architecture) = platform.split_once('/').unwrap();
        let rootfs = json!({"type": "layers", "diff_ids": diff_ids});
        json!({"os": os, "architecture": architecture, "rootfs": rootfs}).to_string().into_bytes()
    }

    fn tar_of(name: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut head = header(name, 3).unwrap();
        builder.append_data(&mut head, name, &b"abc"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn write_into(mut sink: Sink, names: &[&str]) -> String {
        let layers: Vec<Blob> = names
            .iter()
            .map(|name| sink.layer(|to| to.write_all(&tar_of(name)).map_err(Into::into)).unwrap().0)
            .collect();
        sink.finish(&configuration(&layers), &layers).unwrap()
    }

    /// What a killed export has left keeps nobody from the next; what others have there does.
    #[test]
    fn layout_is_begun_where_one_was_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("layout");
        fs::create_dir_all(place.join("blobs/sha256")).unwrap();
        fs::write(place.join("blobs/sha256/.tmpx"), "x").unwrap();
        let layout = Layout::begin(&place, "1", Compression::None).unwrap();
        write_into(Sink::Oci(layout), &["a"]);
        assert_eq!(layers_of(&format!("oci:{}:1", place.display())), 1);
        fs::write(folder.path().join("theirs"), "x").unwrap();
        assert!(Layout::begin(folder.path(), "1", Compression::None).is_err());
    }

    fn layers_of(source: &str) -> usize {
        Source::parse(source.as_ref()).unwrap().open().unwrap().unwrap().layers.len()
    }

    /// The way back in is the import's, which verifies all digests.
    fn unpacked(source: &str) -> Vec<String> {
        let image = Source::parse(source.as_ref()).unwrap().open().unwrap().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for layer in &image.layers {
            let root = super::super::super::tree::open_root(folder.path()).unwrap();
            layer.unpack(root, &Default::default()).unwrap();
        }
        let mut names: Vec<String> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn layout_is_read_again_and_takes_another_image() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("layout");
        for (compression, tag) in [
            (Compression::Gzip, "one"),
            (Compression::Zstd, "two"),
            (Compression::None, "three"),
            (Compression::None, "one"),
        ] {
            write_into(Sink::Oci(Layout::begin(&directory, tag, compression).unwrap()), &["a", "b"]);
            let source = format!("oci:{}:{tag}", directory.display());
            assert_eq!(unpacked(&source), ["a", "b"], "{compression:?}");
        }
        let index: Value = serde_json::from_slice(&fs::read(directory.join(INDEX)).unwrap()).unwrap();
        assert_eq!(index["manifests"].as_array().unwrap().len(), 3, "a name stands for one image");
    }

    #[test]
    fn image_that_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("layout");
        let mut begun = Sink::Oci(Layout::begin(&directory, "x", Compression::Gzip).unwrap());
        begun.layer(|to| to.write_all(b"half").map_err(Into::into)).unwrap();
        begun.layer(|_| -> Result<()> { bail!("no") }).unwrap_err();
        drop(begun);
        assert!(!directory.exists());
        write_into(Sink::Oci(Layout::begin(&directory, "x", Compression::Gzip).unwrap()), &["a"]);
        let files = || walkdir::WalkDir::new(&directory).into_iter().count();
        let before = files();
        let mut begun = Sink::Oci(Layout::begin(&directory, "y", Compression::Gzip).unwrap());
        begun.layer(|to| to.write_all(b"other").map_err(Into::into)).unwrap();
        drop(begun);
        assert_eq!(files(), before);
        assert_eq!(unpacked(&format!("oci:{}:x", directory.display())), ["a"]);
    }

    #[test]
    fn directory_of_something_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("mine"), "").unwrap();
        let refused = Layout::begin(folder.path(), "x", Compression::Gzip).err().unwrap();
        assert!(refused.to_string().contains("not empty"), "{refused}");
        fs::write(folder.path().join(INDEX), "{").unwrap();
        assert!(Layout::begin(folder.path(), "x", Compression::Gzip).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn archive_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.tar");
        write_into(Sink::Docker(Archive::begin(&path, "web:1".into()).unwrap()), &["a", "b", "b"]);
        let source = format!("docker-archive:{}", path.display());
        assert_eq!(layers_of(&source), 3);
        assert_eq!(unpacked(&source), ["a", "b"]);
        assert!(Archive::begin(&path, "web:1".into()).is_err(), "what is there stays");
        drop(Archive::begin(&folder.path().join("other"), "x:1".into()).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

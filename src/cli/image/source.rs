//! Where an image comes from: `oci:DIR[:TAG]`, `docker-archive:FILE`, `tar:FILE`, `dir:DIR`, `raw:FILE`, `qcow2:FILE`.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use indicatif::ProgressBar;
use oci_spec::image::ImageConfiguration;
use rustix::fs::{Mode, OFlags};

use super::apply::apply_archive;
use super::directory::copy_directory;
use super::stream::{Expected, Interrupt, LayerReader};
use super::{docker, layout};

/// Longest manifest, index or configuration that is read.
pub(super) const DOCUMENT_LIMIT_BYTES: u64 = 4 << 20;

/// An image's place, as it is typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An OCI image layout.
    Oci {
        /// Its directory.
        directory: PathBuf,
        /// The name of one of its images; none where it holds but one.
        tag: Option<String>,
    },
    /// What `docker save` writes.
    DockerArchive(PathBuf),
    /// A root file system as one archive.
    Tar(PathBuf),
    /// A root file system as a directory.
    Directory(PathBuf),
    /// A disk image, block for block.
    Raw(PathBuf),
    /// A disk image of QEMU's.
    Qcow2(PathBuf),
}

impl Source {
    /// Reads the notation above.
    ///
    /// # Errors
    ///
    /// It is another notation.
    pub fn parse(typed: &OsStr) -> Result<Self> {
        let bytes = typed.as_bytes();
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        let (scheme, rest) = match bytes.iter().position(|byte| *byte == b':') {
            Some(colon) if colon + 1 < bytes.len() => (&bytes[..colon], &bytes[colon + 1..]),
            _ => (b"".as_slice(), bytes),
        };
        Ok(match scheme {
            b"oci" => oci(rest),
            b"docker-archive" => Self::DockerArchive(path(rest)),
            b"tar" => Self::Tar(path(rest)),
            b"dir" => Self::Directory(path(rest)),
            b"raw" => Self::Raw(path(rest)),
            b"qcow2" => Self::Qcow2(path(rest)),
            _ => bail!(
                "{}: not a source; one of oci:DIR[:TAG], docker-archive:FILE, tar:FILE, dir:DIR, raw:FILE, qcow2:FILE",
                typed.display()
            ),
        })
    }

    /// The source as it is typed, in UTF-8.
    pub fn describe(&self) -> String {
        match self {
            Self::Oci { directory, tag: Some(tag) } => format!("oci:{}:{tag}", directory.display()),
            Self::Oci { directory, tag: None } => format!("oci:{}", directory.display()),
            Self::DockerArchive(path) => format!("docker-archive:{}", path.display()),
            Self::Tar(path) => format!("tar:{}", path.display()),
            Self::Directory(path) => format!("dir:{}", path.display()),
            Self::Raw(path) => format!("raw:{}", path.display()),
            Self::Qcow2(path) => format!("qcow2:{}", path.display()),
        }
    }

    /// Opens what is made of layers. `None` for a disk image.
    ///
    /// # Errors
    ///
    /// It cannot be read, is damaged, or is for another machine.
    pub fn open(&self) -> Result<Option<Image>> {
        Ok(Some(match self {
            Self::Oci { directory, tag } => layout::open(directory, tag.as_deref())?,
            Self::DockerArchive(path) => docker::open(path)?,
            Self::Tar(path) => Image { configuration: None, layers: vec![Layer::whole_file(path)?] },
            Self::Directory(path) => {
                ensure!(path.is_dir(), "{}: not a directory", path.display());
                Image { configuration: None, layers: vec![Layer::Directory(path.clone())] }
            }
            Self::Raw(_) | Self::Qcow2(_) => return Ok(None),
        }))
    }
}

/// A directory's name may hold colons, and so may a tag (`image:latest`): the first split that leaves a directory
/// counts.
fn oci(rest: &[u8]) -> Source {
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let whole = path(rest);
    if !whole.is_dir() {
        for (colon, _) in rest.iter().enumerate().filter(|(_, byte)| **byte == b':') {
            if let (true, Ok(tag)) = (path(&rest[..colon]).is_dir(), std::str::from_utf8(&rest[colon + 1..])) {
                return Source::Oci { directory: path(&rest[..colon]), tag: Some(tag.to_owned()) };
            }
        }
    }
    Source::Oci { directory: whole, tag: None }
}

/// An image made of layers.
#[derive(Debug)]
pub struct Image {
    /// The image's configuration, where it has one.
    pub configuration: Option<Configuration>,
    /// The layers, the lowest first.
    pub layers: Vec<Layer>,
}

impl Image {
    /// How many bytes reading all of it will report as progress; `None` where that is not known.
    pub fn stored_bytes(&self) -> Option<u64> {
        self.layers.iter().map(Layer::stored_bytes).sum()
    }
}

/// An image's configuration: the bytes that its digest is about, and what they say.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// The JSON text.
    pub json: Vec<u8>,
    /// The same, parsed.
    pub parsed: ImageConfiguration,
}

impl Configuration {
    /// Parses a configuration, and looks whether this machine can run it.
    ///
    /// # Errors
    ///
    /// It is none, or is for another machine.
    pub fn parse(json: Vec<u8>) -> Result<Self> {
        let parsed: ImageConfiguration =
            serde_json::from_slice(&json).context("the image's configuration is damaged, or none of an image")?;
        let found = format!("{}/{}", parsed.os(), parsed.architecture());
        ensure!(found == platform(), "the image is for {found}, this machine is {}", platform());
        Ok(Self { json, parsed })
    }
}

/// This machine, in the words of the image specification (Go's).
pub fn platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    };
    format!("linux/{architecture}")
}

/// One layer.
#[derive(Debug)]
pub enum Layer {
    /// An archive, compressed or not: a part of a file.
    Archive {
        /// The file.
        file: Arc<File>,
        /// What it is called in messages.
        name: String,
        /// Where the archive starts.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
        /// What it must be.
        expected: Box<Expected>,
    },
    /// A copy of a directory.
    Directory(PathBuf),
}

impl Layer {
    /// A file that is one archive.
    fn whole_file(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        let length_bytes = file.metadata()?.len();
        ensure!(length_bytes > 0, "{}: is empty", path.display());
        let name = path.display().to_string();
        Ok(Self::Archive { file: Arc::new(file), name, offset_bytes: 0, length_bytes, expected: Box::default() })
    }

    /// Bytes that reading it reports as progress.
    pub fn stored_bytes(&self) -> Option<u64> {
        match self {
            Self::Archive { length_bytes, .. } => Some(*length_bytes),
            Self::Directory(_) => None,
        }
    }

    /// What the layer is called in messages.
    pub fn name(&self) -> String {
        match self {
            Self::Archive { name, .. } => name.clone(),
            Self::Directory(path) => path.display().to_string(),
        }
    }

    /// The digest of the uncompressed archive, where it is known before reading it.
    pub fn diff_id(&self) -> Option<String> {
        match self {
            Self::Archive { expected, .. } => expected.diff_id.as_ref().map(ToString::to_string),
            Self::Directory(_) => None,
        }
    }

    /// Reads an archive.
    ///
    /// # Errors
    ///
    /// It is a directory, cannot be read, or is compressed in a way that is not supported.
    pub fn read(&self, progress: &ProgressBar, interrupt: &Interrupt) -> Result<LayerReader> {
        let Self::Archive { file, name, offset_bytes, length_bytes, expected } = self else {
            bail!("{} is not an archive", self.name());
        };
        let part = Part { file: Arc::clone(file), offset_bytes: *offset_bytes, left_bytes: *length_bytes };
        LayerReader::open(Box::new(part), expected.as_ref().clone(), progress.clone(), Arc::clone(interrupt))
            .with_context(|| name.clone())
    }
}

impl Layer {
    /// Unpacks it onto a directory.
    ///
    /// # Errors
    ///
    /// The layer is damaged, climbs out of the directory, or the file system refuses something.
    pub fn unpack(&self, root: OwnedFd, interrupt: &Interrupt) -> Result<()> {
        let progress = ProgressBar::hidden();
        if let Self::Directory(from) = self {
            copy_directory(root, from, &progress, interrupt)?;
            return Ok(());
        }
        let mut reader = self.read(&progress, interrupt)?;
        apply_archive(root, &mut reader).with_context(|| self.name())?;
        reader.verify().with_context(|| self.name())?;
        Ok(())
    }
}

/// A part of a file, read without moving a position that others share.
#[derive(Debug)]
pub struct Part {
    /// The file.
    pub file: Arc<File>,
    /// Where to read next.
    pub offset_bytes: u64,
    /// How much is left.
    pub left_bytes: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left_bytes).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..want], self.offset_bytes)?;
        self.offset_bytes += count as u64;
        self.left_bytes -= count as u64;
        Ok(count)
    }
}

/// Opens a regular file to read it.
pub(super) fn open_file(path: &Path) -> Result<File> {
    // Of a pipe it would wait for a writer, without end.
    let how = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, how, Mode::empty()).with_context(|| path.display().to_string())?;
    let file = File::from(file);
    ensure!(file.metadata()?.is_file(), "{}: not a file", path.display());
    Ok(file)
}

#[cfg(test)]
mod tests;

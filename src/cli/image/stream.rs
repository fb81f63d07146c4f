//! A layer's bytes on their way from the blob to the archive reader: counted, verified against their digest and size,
//! decompressed, and verified again against the digest of the uncompressed archive.
//!
//! Compression is told from the first bytes, not from the media type, which is wrong often enough. Nothing is held
//! back until it is verified: who reads must ask [`LayerReader::verify`] at the end, and throw away what was made of
//! the bytes where it fails.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail, ensure};
use indicatif::ProgressBar;
use oci_spec::image::{Digest, DigestAlgorithm};
use sha2::{Digest as _, Sha256, Sha384, Sha512};

const BUFFER_BYTES: usize = 256 << 10;

/// Set by a signal: the next read fails.
pub type Interrupt = Arc<AtomicBool>;

/// The error of a read that was interrupted by a signal.
pub fn interrupted() -> io::Error {
    io::Error::other("interrupted by a signal")
}

/// Which bytes are expected.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Digest of the blob as it is stored.
    pub digest: Option<Digest>,
    /// Its length.
    pub size_bytes: Option<u64>,
    /// Digest of the uncompressed archive.
    pub diff_id: Option<Digest>,
}

/// The uncompressed bytes of one layer.
pub struct LayerReader {
    decoded: Tap<Box<dyn Read>>,
    blob: Rc<RefCell<Tally>>,
    expected: Expected,
}

impl fmt::Debug for LayerReader {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("LayerReader").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl LayerReader {
    /// Reads the layer that `blob` holds. `progress` counts the stored bytes.
    ///
    /// # Errors
    ///
    /// The blob cannot be read, or is compressed in a way that is not supported.
    pub fn open(blob: Box<dyn Read>, expected: Expected, progress: ProgressBar, interrupt: Interrupt) -> Result<Self> {
        let tally = Rc::new(RefCell::new(Tally::new(expected.digest.as_ref())?));
        let counted = Tap { reader: Watched { blob, progress, interrupt }, tally: Rc::clone(&tally) };
        let mut buffered = BufReader::with_capacity(BUFFER_BYTES, counted);
        let start = buffered.fill_buf()?;
        let decoder: Box<dyn Read> = match start {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Box::new(zstd::stream::read::Decoder::with_buffer(buffered)?)
            }
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => bail!("compressed with xz: unpack it first (unxz)"),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => bail!("compressed with bzip2: unpack it first (bunzip2)"),
            _ => Box::new(buffered),
        };
        // Without an expected one its SHA-256 is worked out: layers are named after it.
        let decoded = Rc::new(RefCell::new(match &expected.diff_id {
            Some(_) => Tally::new(expected.diff_id.as_ref())?,
            None => Tally { hash: Some(Hash::Sha256(Sha256::new())), bytes: 0 },
        }));
        Ok(Self { decoded: Tap { reader: decoder, tally: decoded }, blob: tally, expected })
    }

    /// Reads what is left, and holds all that was read against what was expected. Answers the digest of the
    /// uncompressed archive.
    ///
    /// # Errors
    ///
    /// Digest or size is another, or the end of the blob is damaged.
    pub fn verify(mut self) -> Result<String> {
        io::copy(&mut self.decoded, &mut io::sink())?;
        let (found, bytes) = self.blob.borrow_mut().finish();
        if let Some(size_bytes) = self.expected.size_bytes {
            ensure!(bytes == size_bytes, "blob has {bytes} bytes, its descriptor says {size_bytes}");
        }
        if let (Some(expected), Some(found)) = (&self.expected.digest, found) {
            ensure!(expected.as_ref() == found, "digest of the blob is {found}, expected {expected}");
        }
        let (found, _) = self.decoded.tally.borrow_mut().finish();
        let found = found.unwrap_or_default();
        if let Some(expected) = &self.expected.diff_id {
            ensure!(
                expected.as_ref() == found,
                "digest of the uncompressed layer is {found}, the image's configuration says {expected}"
            );
        }
        Ok(found)
    }
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.decoded.read(buffer)
    }
}

/// The digest of `bytes` by the algorithm of `like`, as text.
pub fn digest_of(bytes: &[u8], like: &Digest) -> Result<String> {
    let mut tally = Tally::new(Some(like))?;
    tally.update(bytes);
    Ok(tally.finish().0.unwrap_or_default())
}

/// The SHA-256 of `bytes`, as `sha256:...`.
pub fn sha256_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

struct Watched {
    blob: Box<dyn Read>,
    progress: ProgressBar,
    interrupt: Interrupt,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(interrupted());
        }
        let count = self.blob.read(buffer)?;
        self.progress.inc(count as u64);
        Ok(count)
    }
}

struct Tap<R> {
    reader: R,
    tally: Rc<RefCell<Tally>>,
}

impl<R: Read> Read for Tap<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.tally.borrow_mut().update(&buffer[..count]);
        Ok(count)
    }
}

struct Tally {
    hash: Option<Hash>,
    bytes: u64,
}

enum Hash {
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Tally {
    fn new(like: Option<&Digest>) -> Result<Self> {
        let hash = match like.map(Digest::algorithm) {
            None => None,
            Some(DigestAlgorithm::Sha256) => Some(Hash::Sha256(Sha256::new())),
            Some(DigestAlgorithm::Sha384) => Some(Hash::Sha384(Sha384::new())),
            Some(DigestAlgorithm::Sha512) => Some(Hash::Sha512(Sha512::new())),
            Some(other) => bail!("digest algorithm {other} is not supported"),
        };
        Ok(Self { hash, bytes: 0 })
    }

    fn update(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        match &mut self.hash {
            None => {}
            Some(Hash::Sha256(hash)) => hash.update(bytes),
            Some(Hash::Sha384(hash)) => hash.update(bytes),
            Some(Hash::Sha512(hash)) => hash.update(bytes),
        }
    }

    fn finish(&mut self) -> (Option<String>, u64) {
        let digest = self.hash.take().map(|hash| match hash {
            Hash::Sha256(hash) => format!("sha256:{}", hex::encode(hash.finalize())),
            Hash::Sha384(hash) => format!("sha384:{}", hex::encode(hash.finalize())),
            Hash::Sha512(hash) => format!("sha512:{}", hex::encode(hash.finalize())),
        });
        (digest, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::str::FromStr;

    use super::*;

    fn open(blob: Vec<u8>, expected: Expected) -> Result<LayerReader> {
        LayerReader::open(Box::new(io::Cursor::new(blob)), expected, ProgressBar::hidden(), Interrupt::default())
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn content() -> Vec<u8> {
        (0..300_000_u32).flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn plain_gzip_of_two_members_and_zstd_read_alike() {
        let content = content();
        let (front, back) = content.split_at(777);
        let blobs =
            [content.clone(), [gzip(front), gzip(back)].concat(), zstd::encode_all(content.as_slice(), 1).unwrap()];
        for blob in blobs {
            let digest = Digest::from_str(&sha256_of(&blob)).unwrap();
            let expected = Expected {
                digest: Some(digest),
                size_bytes: Some(blob.len() as u64),
                diff_id: Some(Digest::from_str(&sha256_of(&content)).unwrap()),
            };
            let mut reader = open(blob, expected).unwrap();
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert_eq!(read, content);
            assert_eq!(reader.verify().unwrap(), sha256_of(&content));
        }
    }

    #[test]
    fn wrong_digest_size_or_diff_id_is_found() {
        let blob = gzip(&content());
        let wrong = Some(Digest::from_str(&sha256_of(b"other")).unwrap());
        let cases = [
            (Expected { digest: wrong.clone(), ..Expected::default() }, "digest of the blob"),
            (Expected { size_bytes: Some(1), ..Expected::default() }, "bytes, its descriptor says 1"),
            (Expected { diff_id: wrong, ..Expected::default() }, "uncompressed layer"),
        ];
        for (expected, message) in cases {
            let error = open(blob.clone(), expected).unwrap().verify().unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn damaged_or_cut_compression_is_found() {
        for blob in [gzip(&content()), zstd::encode_all(content().as_slice(), 1).unwrap()] {
            let half = blob.len() / 2;
            for broken in [blob[..half].to_vec(), blob[..blob.len() - 1].to_vec()] {
                assert!(open(broken, Expected::default()).unwrap().verify().is_err());
            }
            let mut flipped = blob.clone();
            flipped[half] ^= 0x10;
            let diff_id = Some(Digest::from_str(&sha256_of(&content())).unwrap());
            let expected = Expected { diff_id, ..Expected::default() };
            assert!(open(flipped, expected).unwrap().verify().is_err());
        }
    }

    #[test]
    fn interrupt_ends_the_read() {
        let interrupt = Interrupt::default();
        let blob = Box::new(io::Cursor::new(content()));
        let reader =
            LayerReader::open(blob, Expected::default(), ProgressBar::hidden(), Arc::clone(&interrupt)).unwrap();
        interrupt.store(true, Ordering::Relaxed);
        assert!(reader.verify().unwrap_err().to_string().contains("interrupted"));
    }

    #[test]
    fn foreign_compression_is_named() {
        let error = open(b"\xfd7zXZ\0 and more".to_vec(), Expected::default()).unwrap_err();
        assert!(error.to_string().contains("xz"), "{error}");
    }
}

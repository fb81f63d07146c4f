//! The stream of a snapshot: frames, of which nothing is used before it has been checked.
//!
//! Each frame has a head of [`HEAD_BYTES`], little-endian, and a payload:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | kind: `PLYW`, `DATA`, `ZERO` or `DONE` |
//! | 4 | 4 | bytes of the payload |
//! | 8 | 8 | number of the frame, from 0 |
//! | 16 | 4 | `checksum` of the frame before it; 0 in the first |
//! | 20 | 4 | `checksum`: CRC-32 of the 20 bytes above and the payload |
//!
//! A stream is one `PLYW` with a [`Header`] in JSON, any number of `DATA` (offset, then content) and `ZERO` (offset, length)
//! in ascending order, and one `DONE`. What lies between is as in the base, or zeros where there is none.

use std::io::{ErrorKind, Read, Write};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cli::image::labels;
use crate::daemon::protocol::Attributes;
use crate::format::check_name;
use crate::units::BLOCK_BYTES;

/// Version of the stream.
pub const VERSION: u32 = 1;
/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 24;
/// Most bytes of content in a frame.
pub const DATA_BYTES: usize = 1 << 20;
/// Most bytes of a header: attributes have at most 256 KiB, and JSON says a byte with four characters.
const HEADER_BYTES: usize = 2 << 20;
/// Bytes of two numbers.
const RANGE_BYTES: usize = 16;

const HEADER: [u8; 4] = *b"PLYW";
const DATA: [u8; 4] = *b"DATA";
const ZERO: [u8; 4] = *b"ZERO";
const DONE: [u8; 4] = *b"DONE";

/// A snapshot, as both sides know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its uuid in the pool that it was sent from.
    pub uuid: Uuid,
    /// Its name there.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// BLAKE3 over its content, in hexadecimal.
    pub digest: String,
}

/// What a stream is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// The sender's program.
    pub build: String,
    /// The snapshot.
    pub snapshot: Identity,
    /// What is there already; none: nothing.
    pub base: Option<Identity>,
    /// Sector size of the volume that it is of.
    pub sector_size: u32,
    /// Its attributes, those apart that mean something in one pool only.
    pub attributes: Attributes,
    /// Where the stream begins; what comes before was received earlier.
    pub start_bytes: u64,
}

/// Leaves of attributes what users and images have noted; other notes of plywood's own mean something in one pool only.
pub fn retain_portable(attributes: &mut Attributes) {
    let is_of_images = |key: &str| key.starts_with(labels::PREFIX) && !labels::FOUND_BY.contains(&key);
    attributes.retain(|key, _| !key.starts_with("plywood.") || is_of_images(key));
    // A layer that came without its image is a snapshot like others: no image here is known to need it, and prune would delete it.
    if !attributes.contains_key(labels::CONFIGURATION) {
        attributes.remove(labels::LAYER);
    }
}

/// What one frame says.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Content at an offset.
    Data(u64, &'a [u8]),
    /// Zeros: offset and length.
    Zero(u64, u64),
    /// All has been said.
    Done,
}

/// Writes a stream.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    number: u64,
    before: u32,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// What the writer says.
    pub fn begin(to: W, header: &Header) -> Result<Self> {
        let mut writer = Self { to, number: 0, before: 0 };
        let header = serde_json::to_vec(header)?;
        ensure!(
            header.len() <= HEADER_BYTES,
            "the snapshot has {} bytes of attributes, which is too many",
            header.len()
        );
        writer.frame(HEADER, &[&header])?;
        Ok(writer)
    }

    /// Content of at most [`DATA_BYTES`] at an offset.
    ///
    /// # Errors
    /// What the writer says.
    pub fn data(&mut self, offset: u64, content: &[u8]) -> Result<()> {
        self.frame(DATA, &[&offset.to_le_bytes(), content])
    }

    /// Zeros.
    ///
    /// # Errors
    /// What the writer says.
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        self.frame(ZERO, &[&offset.to_le_bytes(), &length.to_le_bytes()])
    }

    /// Ends the stream, and answers where it went.
    ///
    /// # Errors
    /// What the writer says.
    pub fn end(mut self) -> Result<W> {
        self.frame(DONE, &[])?;
        self.to.flush().context("writing the stream")?;
        Ok(self.to)
    }

    fn frame(&mut self, kind: [u8; 4], payload: &[&[u8]]) -> Result<()> {
        let length: usize = payload.iter().map(|part| part.len()).sum();
        let mut head = [0; HEAD_BYTES];
        head[..4].copy_from_slice(&kind);
        head[4..8].copy_from_slice(&u32::try_from(length)?.to_le_bytes());
        head[8..16].copy_from_slice(&self.number.to_le_bytes());
        head[16..20].copy_from_slice(&self.before.to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&head[..20]);
        payload.iter().for_each(|part| hasher.update(part));
        let checksum = hasher.finalize();
        head[20..].copy_from_slice(&checksum.to_le_bytes());
        self.to.write_all(&head).context("writing the stream")?;
        for part in payload {
            self.to.write_all(part).context("writing the stream")?;
        }
        self.number += 1;
        self.before = checksum;
        Ok(())
    }
}

/// Reads a stream, and holds every frame against what the header says.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    number: u64,
    before: u32,
    payload: Vec<u8>,
    size_bytes: u64,
    /// Where the next content may begin.
    at: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// When it is no stream of ours, of another version, damaged, or makes no sense.
    pub fn begin(from: R) -> Result<(Self, Header)> {
        let mut reader = Self { from, number: 0, before: 0, payload: Vec::new(), size_bytes: 0, at: 0 };
        let kind = reader.frame()?;
        ensure!(kind == HEADER, "the stream is not one that plywood send writes");
        let header: Header = match serde_json::from_slice(&reader.payload) {
            Ok(header) => header,
            Err(error) => {
                // A later version may say something else altogether.
                #[derive(Deserialize)]
                struct Versioned {
                    version: u32,
                }
                if let Ok(Versioned { version }) = serde_json::from_slice(&reader.payload)
                    && version != VERSION
                {
                    bail!("the stream has version {version}; this program reads version {VERSION}");
                }
                return Err(error).context("the stream's header is damaged");
            }
        };
        ensure!(header.version == VERSION, "the stream has version {}; this program reads {VERSION}", header.version);
        ensure!(
            header.start_bytes.is_multiple_of(BLOCK_BYTES) && header.start_bytes <= header.snapshot.size_bytes,
            "the stream begins at byte {} of {}",
            header.start_bytes,
            header.snapshot.size_bytes
        );
        // They are shown, and become names here.
        for identity in [Some(&header.snapshot), header.base.as_ref()].into_iter().flatten() {
            check_name(&identity.name).context("the stream's header makes no sense")?;
        }
        reader.size_bytes = header.snapshot.size_bytes;
        reader.at = header.start_bytes;
        Ok((reader, header))
    }

    /// The next frame.
    ///
    /// # Errors
    /// When it is damaged, out of place, or makes no sense; and when the stream ends before its end.
    pub fn next_frame(&mut self) -> Result<Frame<'_>> {
        let kind = self.frame()?;
        let number = |at: usize| {
            let bytes = self.payload.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u64::from_le_bytes).context("a frame of the stream is too short")
        };
        let (offset, length) = match kind {
            DATA => (number(0)?, self.payload.len() as u64 - 8),
            ZERO => (number(0)?, number(8)?),
            DONE if self.payload.is_empty() => return Ok(Frame::Done),
            _ => bail!("the stream has a frame of unknown kind {:?}", kind.escape_ascii().to_string()),
        };
        let end = offset.checked_add(length).filter(|end| *end <= self.size_bytes);
        let fits = length > 0 && offset >= self.at && offset.is_multiple_of(BLOCK_BYTES);
        let (Some(end), true) = (end, fits) else {
            bail!("the stream has {length} bytes at byte {offset} of {}, where none can be", self.size_bytes);
        };
        self.at = end;
        Ok(if kind == DATA { Frame::Data(offset, &self.payload[8..]) } else { Frame::Zero(offset, length) })
    }

    /// Reads a frame's payload, and answers its kind.
    fn frame(&mut self) -> Result<[u8; 4]> {
        let mut head = [0; HEAD_BYTES];
        self.exact(|reader, _| reader.read_exact(&mut head))?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let kind = [head[0], head[1], head[2], head[3]];
        let most = match kind {
            HEADER if self.number == 0 => HEADER_BYTES,
            _ if self.number == 0 => bail!("the stream is not one that plywood send writes"),
            DATA => DATA_BYTES + 8,
            ZERO => RANGE_BYTES,
            _ => 0,
        };
        let length = word(4) as usize;
        // Before so much is read: a damaged length may be anything.
        ensure!(length <= most, self.damaged());
        self.payload.resize(length, 0);
        self.exact(|reader, payload| reader.read_exact(payload))?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&head[..20]);
        hasher.update(&self.payload);
        let number = u64::from(word(8)) | u64::from(word(12)) << 32;
        let is_next = number == self.number && word(16) == self.before;
        ensure!(is_next && word(20) == hasher.finalize(), self.damaged());
        self.number += 1;
        self.before = word(20);
        Ok(kind)
    }

    fn exact(&mut self, read: impl FnOnce(&mut R, &mut [u8]) -> std::io::Result<()>) -> Result<()> {
        match read(&mut self.from, &mut self.payload) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                bail!("the stream ends early, in frame {}", self.number)
            }
            other => other.context("reading the stream"),
        }
    }

    fn damaged(&self) -> String {
        format!("the stream is damaged in frame {}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn header() -> Header {
        let snapshot =
            Identity { uuid: Uuid::from_u128(1), name: "s".into(), size_bytes: 10 * MIB, digest: "00".repeat(32) };
        let attributes = [("label".to_owned(), "value".into())].into();
        let build = "test".into();
        Header { version: VERSION, build, snapshot, base: None, sector_size: 512, attributes, start_bytes: 4096 }
    }

    fn stream() -> Vec<u8> {
        let mut writer = Writer::begin(Vec::new(), &header()).unwrap();
        writer.data(4096, &[7; 8192]).unwrap();
        writer.zero(MIB, 3 * MIB).unwrap();
        writer.data(10 * MIB - 4096, &[9; 4096]).unwrap();
        writer.end().unwrap()
    }

    fn read(stream: &[u8]) -> Result<usize> {
        let (mut reader, header) = Reader::begin(stream)?;
        ensure!(header == self::header(), "another header");
        let mut frames = 0;
        while reader.next_frame()? != Frame::Done {
            frames += 1;
        }
        Ok(frames)
    }

    #[test]
    fn what_is_written_is_read() {
        let stream = stream();
        let (mut reader, found) = Reader::begin(&stream[..]).unwrap();
        assert_eq!(found, header());
        assert_eq!(reader.next_frame().unwrap(), Frame::Data(4096, &[7; 8192]));
        assert_eq!(reader.next_frame().unwrap(), Frame::Zero(MIB, 3 * MIB));
        assert_eq!(reader.next_frame().unwrap(), Frame::Data(10 * MIB - 4096, &[9; 4096]));
        assert_eq!(reader.next_frame().unwrap(), Frame::Done);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_an_error() {
        let stream = stream();
        assert_eq!(read(&stream).unwrap(), 3);
        for length in (0..stream.len()).filter(|length| length % 61 == 0 || *length < 700) {
            let error = read(&stream[..length]).unwrap_err().to_string();
            assert!(error.contains("ends early"), "{length}: {error}");
        }
        for byte in (0..stream.len()).filter(|byte| byte % 61 == 0 || *byte < 700) {
            let mut damaged = stream.clone();
            damaged[byte] ^= 1 << (byte % 8);
            read(&damaged).expect_err("a flipped bit");
        }
    }

    #[test]
    fn frames_left_out_repeated_or_of_another_stream_are_found() {
        let frames = |stream: &[u8]| {
            let mut frames = Vec::new();
            let mut rest = stream;
            while !rest.is_empty() {
                let length = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize + HEAD_BYTES;
                frames.push(rest[..length].to_vec());
                rest = &rest[length..];
            }
            frames
        };
        let whole = frames(&stream());
        let mut other = Writer::begin(Vec::new(), &header()).unwrap();
        other.data(4096, &[8; 8192]).unwrap();
        let other = frames(&other.end().unwrap());
        for broken in [
            [&whole[..1], &whole[2..]].concat(),
            [&whole[..2], &whole[1..]].concat(),
            [&other[..2], &whole[2..]].concat(),
            [&whole[..1], &whole[2..3], &whole[1..2], &whole[3..]].concat(),
        ] {
            let error = read(&broken.concat()).unwrap_err().to_string();
            assert!(error.contains("damaged in frame"), "{error}");
        }
    }

    #[test]
    fn content_where_none_can_be_is_refused() {
        type Write = fn(&mut Writer<Vec<u8>>) -> Result<()>;
        let cases: [Write; 7] = [
            |writer| writer.data(0, &[1; 4096]),
            |writer| writer.data(4097, &[1; 4096]),
            |writer| writer.data(10 * MIB, &[1; 4096]),
            |writer| writer.data(4096, &[]),
            |writer| writer.zero(4096, 11 * MIB),
            |writer| writer.zero(u64::MAX - 4095, 4096),
            |writer| writer.data(8192, &[1; 4096]).and_then(|()| writer.data(4096, &[1; 4096])),
        ];
        for (number, case) in cases.into_iter().enumerate() {
            let mut writer = Writer::begin(Vec::new(), &header()).unwrap();
            case(&mut writer).unwrap();
            let error = read(&writer.end().unwrap()).unwrap_err().to_string();
            assert!(error.contains("where none can be"), "{number}: {error}");
        }
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        for name in ["", "a/b", "\x1b[2J", ".x", &"x".repeat(300)] {
            let snapshot = Identity { name: name.into(), ..header().snapshot };
            for broken in
                [Header { snapshot: snapshot.clone(), ..header() }, Header { base: Some(snapshot.clone()), ..header() }]
            {
                let stream = Writer::begin(Vec::new(), &broken).unwrap().end().unwrap();
                let error = format!("{:#}", Reader::begin(&stream[..]).map(drop).unwrap_err());
                assert!(error.contains("makes no sense") && !error.contains('\x1b'), "{error}");
            }
        }
    }

    #[test]
    fn notes_of_one_pool_stay_there() {
        let mut attributes: Attributes =
            ["plywood.docker.options", labels::CONFIGURATION, labels::LAYER, "mine", "plywood.ephemeral"]
                .into_iter()
                .chain(labels::FOUND_BY)
                .map(|key| (key.to_owned(), "x".into()))
                .collect();
        retain_portable(&mut attributes);
        assert_eq!(attributes.keys().collect::<Vec<_>>(), ["mine", "plywood.image.config", "plywood.image.layer"]);
        attributes.remove(labels::CONFIGURATION);
        retain_portable(&mut attributes);
        assert_eq!(attributes.keys().collect::<Vec<_>>(), ["mine"], "a layer alone is a snapshot like others");
    }

    #[test]
    fn later_version_and_strange_bytes_are_named() {
        let later = Header { version: 2, ..header() };
        let stream = Writer::begin(Vec::new(), &later).unwrap().end().unwrap();
        assert!(read(&stream).unwrap_err().to_string().contains("version 2"));
        let error = read(&[0x1f; 100]).unwrap_err().to_string();
        assert!(error.contains("not one that plywood send writes"), "{error}");
    }
}

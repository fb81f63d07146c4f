//! Reads a tar stream entry by entry, in bounded memory.
//!
//! The header blocks are the `tar` crate's; the walk from one to the next is our own, because its entry iterator splits
//! PAX records at line feeds. A record's length is what delimits it: a binary attribute may hold the byte 0x0a, and one
//! crafted to hold a line `20 path=/etc/passwd` must not become a record of its own. It also reads extension headers
//! of any size into memory; here they have a bound.
//!
//! What is understood: ustar, old GNU (long names and links, base-256 numbers) and PAX. Sparse entries, which the image
//! specification advises against, are refused rather than unpacked wrongly.

use std::io::{self, Read};

use anyhow::{Context as _, Result, bail, ensure};
use tar::Header;

const BLOCK_BYTES: usize = 512;
/// Most bytes of extension headers (long names, PAX records) that one entry may have.
const EXTENSION_LIMIT_BYTES: u64 = 4 << 20;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file with content.
    File,
    /// A directory.
    Directory,
    /// A symbolic link; its text is [`Entry::link`].
    Symlink,
    /// A further name of an existing file; the file is [`Entry::link`], relative to the root.
    HardLink,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
}

/// Seconds and nanoseconds since 1970; the nanoseconds count upwards also before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Whole seconds.
    pub seconds: i64,
    /// Below 1 000 000 000.
    pub nanoseconds: i64,
}

/// One entry, its extension headers applied.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name as it stands in the archive; any bytes.
    pub path: Vec<u8>,
    /// Target of a symbolic or hard link, else empty.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last change.
    pub modified: Time,
    /// Time of last access, where the archive has one.
    pub accessed: Option<Time>,
    /// Extended attributes; values are any bytes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Bytes of content that follow.
    pub size_bytes: u64,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With the zero block that marks the end.
    Marked,
    /// Where the next header should have been.
    Unmarked,
}

/// A tar stream. `next` goes to the next entry; reading gives the content of the present one.
#[derive(Debug)]
pub struct Archive<R> {
    reader: R,
    /// Content of the present entry that has not been read.
    remaining_bytes: u64,
    /// Padding behind it.
    padding_bytes: u64,
    end: Option<End>,
}

impl<R: Read> Archive<R> {
    /// A stream that begins at `reader`'s position.
    pub const fn new(reader: R) -> Self {
        Self { reader, remaining_bytes: 0, padding_bytes: 0, end: None }
    }

    /// Goes to the next entry, over what is unread of the present one. `None` at the end.
    ///
    /// # Errors
    ///
    /// The stream ends inside an entry, a header is damaged, or holds what is not supported.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        if self.end.is_some() {
            return Ok(None);
        }
        let mut extensions = Extensions::default();
        loop {
            self.skip_content()?;
            let header = if self.end.is_some() { None } else { self.read_header()? };
            let Some(header) = header else {
                ensure!(extensions.bytes == 0, "archive ends behind an extension header: it is cut short");
                return Ok(None);
            };
            let kind = header.entry_type().as_byte();
            match kind {
                b'L' | b'K' | b'x' => {
                    let content = self.read_extension(&header, &mut extensions.bytes)?;
                    match kind {
                        b'L' => extensions.long_name = Some(until_nul(content)),
                        b'K' => extensions.long_link = Some(until_nul(content)),
                        _ => extensions.pax = Pax::parse(&content)?,
                    }
                }
                // Global records carry comments (git's commit id) or defaults that no layer writer uses.
                b'g' => {
                    self.read_extension(&header, &mut extensions.bytes)?;
                }
                _ => {
                    let entry = entry(&header, extensions)?;
                    self.set_content(entry.size_bytes);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads to the end of the stream, so that digests over all of it are complete, and tells how it ended.
    ///
    /// # Errors
    ///
    /// The stream cannot be read, or its end is damaged.
    pub fn finish(mut self) -> Result<End> {
        while self.next_entry()?.is_some() {}
        io::copy(&mut self.reader, &mut io::sink())?;
        Ok(self.end.unwrap_or(End::Unmarked))
    }

    fn set_content(&mut self, size_bytes: u64) {
        self.remaining_bytes = size_bytes;
        self.padding_bytes = size_bytes.next_multiple_of(BLOCK_BYTES as u64) - size_bytes;
    }

    fn skip_content(&mut self) -> Result<()> {
        let mut skip = |bytes: u64| io::copy(&mut (&mut self.reader).take(bytes), &mut io::sink());
        ensure!(skip(self.remaining_bytes)? == self.remaining_bytes, "archive ends inside an entry: it is cut short");
        // Umoci's `insert` leaves out the last padding, and everything behind it; Go's reader takes that for an end.
        if skip(self.padding_bytes)? < self.padding_bytes {
            self.end = Some(End::Unmarked);
        }
        (self.remaining_bytes, self.padding_bytes) = (0, 0);
        Ok(())
    }

    fn read_header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match self.reader.read(&mut header.as_mut_bytes()[filled..]) {
                Ok(0) if filled == 0 => {
                    self.end = Some(End::Unmarked);
                    return Ok(None);
                }
                Ok(0) => bail!("archive ends inside a header: it is cut short"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            self.end = Some(End::Marked);
            return Ok(None);
        }
        // The checksum counts its own eight bytes as spaces.
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let computed = sum(&bytes[..148]) + 8 * u32::from(b' ') + sum(&bytes[156..]);
        // The tar crate's own words quote the header, which may be any binary.
        let recorded = header.cksum().ok().context("not a tar archive, or a damaged one")?;
        ensure!(recorded == computed, "checksum of a tar header does not match: the archive is damaged");
        Ok(Some(header))
    }

    fn read_extension(&mut self, header: &Header, total_bytes: &mut u64) -> Result<Vec<u8>> {
        let size_bytes = header.entry_size()?;
        *total_bytes = total_bytes.saturating_add(size_bytes.max(BLOCK_BYTES as u64));
        ensure!(*total_bytes <= EXTENSION_LIMIT_BYTES, "extension headers of one entry exceed 4 MiB");
        self.set_content(size_bytes);
        let mut content = Vec::new();
        self.read_to_end(&mut content)?;
        ensure!(content.len() as u64 == size_bytes, "archive ends inside an extension header: it is cut short");
        Ok(content)
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.remaining_bytes).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let count = self.reader.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "archive ends inside a file's content: it is cut short",
            ));
        }
        self.remaining_bytes -= count as u64;
        Ok(count)
    }
}

#[derive(Default)]
struct Extensions {
    bytes: u64,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Pax,
}

/// The records of a PAX header that matter here.
#[derive(Debug, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size_bytes: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<Time>,
    accessed: Option<Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Pax {
    /// `LENGTH KEY=VALUE\n`, again and again; LENGTH counts the whole record.
    fn parse(mut bytes: &[u8]) -> Result<Self> {
        let mut pax = Self::default();
        while !bytes.is_empty() && bytes[0] != 0 {
            let (key, value, rest) = record(bytes).context("PAX header is damaged")?;
            pax.take(key, value)?;
            bytes = rest;
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let name = String::from_utf8_lossy(key);
        let number = || -> Result<u64> {
            std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok())
                .with_context(|| format!("PAX record {name} is not a number"))
        };
        if let Some(attribute) = key.strip_prefix(b"SCHILY.xattr.") {
            ensure!(!attribute.is_empty() && !attribute.contains(&0), "PAX header names an extended attribute wrongly");
            self.xattrs.retain(|(name, _)| name != attribute);
            self.xattrs.push((attribute.to_vec(), value.to_vec()));
            return Ok(());
        }
        ensure!(!key.starts_with(b"GNU.sparse."), "a sparse entry: write the archive without --sparse");
        // An empty value takes a record back; the header's own field counts then.
        match (key, value.is_empty()) {
            (b"path", true) => self.path = None,
            (b"linkpath", true) => self.link = None,
            (_, true) => {}
            (b"path", _) => self.path = Some(value.to_vec()),
            (b"linkpath", _) => self.link = Some(value.to_vec()),
            (b"size", _) => self.size_bytes = Some(number()?),
            (b"uid", _) => self.uid = Some(number()?),
            (b"gid", _) => self.gid = Some(number()?),
            (b"mtime", _) => self.modified = Some(time(value)?),
            (b"atime", _) => self.accessed = Some(time(value)?),
            _ => {}
        }
        Ok(())
    }
}

/// Splits the first record off: its key, its value, and what follows it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    // A length of more than seven digits exceeds the bound on extension headers.
    let space = bytes.iter().take(8).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    if length > bytes.len() || length < space + 3 || bytes[length - 1] != b'\n' {
        return None;
    }
    let content = &bytes[space + 1..length - 1];
    let equals = content.iter().position(|byte| *byte == b'=')?;
    Some((&content[..equals], &content[equals + 1..], &bytes[length..]))
}

/// `-12.25` is 13 seconds before 1970 and 750 milliseconds.
fn time(value: &[u8]) -> Result<Time> {
    let parse = || -> Option<Time> {
        let text = std::str::from_utf8(value).ok()?;
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let negative = whole.starts_with('-');
        let seconds: i64 = if whole.is_empty() || whole == "-" { 0 } else { whole.parse().ok()? };
        if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
        let nanoseconds: i64 = digits.parse().ok()?;
        Some(match (negative, nanoseconds) {
            (true, 1..) => Time { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds },
            _ => Time { seconds, nanoseconds },
        })
    };
    parse().with_context(|| format!("PAX header holds a time that is none: {:?}", String::from_utf8_lossy(value)))
}

fn until_nul(mut content: Vec<u8>) -> Vec<u8> {
    if let Some(end) = content.iter().position(|byte| *byte == 0) {
        content.truncate(end);
    }
    content
}

fn entry(header: &Header, extensions: Extensions) -> Result<Entry> {
    let Extensions { long_name, long_link, pax, .. } = extensions;
    let path = pax.path.or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
    let shown = || String::from_utf8_lossy(&path).into_owned();
    let link = pax.link.or(long_link).or_else(|| header.link_name_bytes().map(|name| name.into_owned()));
    let kind = match header.entry_type().as_byte() {
        // Before ustar a directory was a file whose name ends with a slash.
        b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Directory,
        b'0' | 0 | b'7' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::Character,
        b'4' => Kind::Block,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => bail!("{}: a sparse entry: write the archive without --sparse", shown()),
        other => bail!("{}: entry of unknown type {:?}", shown(), char::from(other)),
    };
    // A field that is all blank or NUL is 0: writers leave out what they do not know.
    let number = |field: std::ops::Range<usize>, value: io::Result<u64>| {
        let blank = header.as_bytes()[field].iter().all(|byte| matches!(byte, b' ' | 0));
        if blank { Ok(0) } else { value.with_context(|| format!("header of {} is damaged", shown())) }
    };
    let id = |value: u64, name: &str| u32::try_from(value).with_context(|| format!("{}: {name} {value}", shown()));
    let device = if matches!(kind, Kind::Character | Kind::Block) {
        (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0))
    } else {
        (0, 0)
    };
    let seconds = number(136..148, header.mtime())?;
    Ok(Entry {
        kind,
        mode: u32::try_from(number(100..108, header.mode().map(u64::from))?).unwrap_or(0) & 0o7777,
        uid: id(pax.uid.map_or_else(|| number(108..116, header.uid()), Ok)?, "owner")?,
        gid: id(pax.gid.map_or_else(|| number(116..124, header.gid()), Ok)?, "group")?,
        // Base-256 numbers are two's complement: times before 1970 come out right by wrapping.
        modified: pax.modified.unwrap_or(Time { seconds: seconds.cast_signed(), nanoseconds: 0 }),
        accessed: pax.accessed,
        xattrs: pax.xattrs,
        device,
        // Only files have content. Links and the rest have a size in some archives and nothing behind the header:
        // taking that size would show another archive than every other reader sees.
        size_bytes: match kind {
            Kind::File => pax.size_bytes.map_or_else(|| number(124..136, header.entry_size()), Ok)?,
            _ => 0,
        },
        link: link.unwrap_or_default(),
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, kind: u8, size_bytes: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(size_bytes);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn padded(content: &[u8]) -> Vec<u8> {
        let mut bytes = content.to_vec();
        bytes.resize(content.len().next_multiple_of(BLOCK_BYTES), 0);
        bytes
    }

    fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while body + length.to_string().len() != length {
            length = body + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn line_feed_in_attribute_does_not_start_a_record() {
        let value = b"\x01\n22 path=/etc/passwd00\n\0";
        let records = [pax_record("SCHILY.xattr.user.a", value), pax_record("mtime", b"-12.25")].concat();
        let bytes = [
            header("pax", b'x', records.len() as u64),
            padded(&records),
            header("file", b'0', 3),
            padded(b"abc"),
            vec![0; 1024],
        ]
        .concat();
        let mut archive = Archive::new(bytes.as_slice());
        let entry = archive.next_entry().unwrap().unwrap();
        assert_eq!(entry.path, b"file");
        assert_eq!(entry.xattrs, [(b"user.a".to_vec(), value.to_vec())]);
        assert_eq!(entry.modified, Time { seconds: -13, nanoseconds: 750_000_000 });
        let mut content = Vec::new();
        archive.read_to_end(&mut content).unwrap();
        assert_eq!(content, b"abc");
        assert!(archive.next_entry().unwrap().is_none());
        assert_eq!(archive.finish().unwrap(), End::Marked);
    }

    #[test]
    fn size_record_overrides_the_header() {
        let records = pax_record("size", b"600");
        let bytes =
            [header("pax", b'x', records.len() as u64), padded(&records), header("a", b'0', 0), vec![7; 1024]].concat();
        let mut archive = Archive::new([bytes, header("b", b'0', 0), vec![0; 512]].concat().leak() as &[u8]);
        assert_eq!(archive.next_entry().unwrap().unwrap().size_bytes, 600);
        assert_eq!(archive.next_entry().unwrap().unwrap().path, b"b");
    }

    #[test]
    fn cut_anywhere_is_an_error_or_an_unmarked_end() {
        let bytes = [header("a", b'0', 700), vec![7; 1024], header("b", b'5', 0), vec![0; 1024]].concat();
        for cut in 1..bytes.len() - 1024 {
            let mut archive = Archive::new(&bytes[..cut]);
            let outcome = loop {
                match archive.next_entry() {
                    Ok(Some(_)) => {}
                    Ok(None) => break archive.finish(),
                    Err(error) => break Err(error),
                }
            };
            match outcome {
                Ok(End::Unmarked) => assert!((1212..=1536).contains(&cut) || cut == 2048, "cut at {cut}"),
                Ok(End::Marked) => panic!("cut at {cut} went unseen"),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn every_flipped_header_bit_is_found() {
        let bytes = [header("a", b'0', 0), vec![0; 1024]].concat();
        for bit in 0..BLOCK_BYTES * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let damaged_checksum = (148..156).contains(&(bit / 8));
            match Archive::new(damaged.as_slice()).next_entry() {
                Err(_) => {}
                // Other spellings of the same number.
                Ok(Some(entry)) => assert!(damaged_checksum && entry.path == b"a", "bit {bit}"),
                Ok(None) => panic!("bit {bit}"),
            }
        }
    }

    #[test]
    fn huge_extension_header_is_refused() {
        let bytes = [header("pax", b'x', 1 << 30), vec![0; 1024]].concat();
        let error = Archive::new(bytes.as_slice()).next_entry().unwrap_err();
        assert!(error.to_string().contains("4 MiB"), "{error}");
        let many = header("pax", b'x', 0).repeat(5 << 20 >> 9);
        // Empty ones count too, or a stream of them would never end.
        assert!(Archive::new(many.as_slice()).next_entry().is_err());
    }

    #[test]
    fn sparse_entries_are_refused() {
        let bytes = [header("s", b'S', 0), vec![0; 1024]].concat();
        assert!(Archive::new(bytes.as_slice()).next_entry().unwrap_err().to_string().contains("sparse"));
        let records = pax_record("GNU.sparse.major", b"1");
        let bytes = [header("pax", b'x', records.len() as u64), padded(&records), header("a", b'0', 0)].concat();
        assert!(Archive::new(bytes.as_slice()).next_entry().unwrap_err().to_string().contains("sparse"));
    }
}

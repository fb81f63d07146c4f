//! What a container in the background prints, kept in files that do not grow without bound.
//!
//! A line is `TIME STREAM TAG TEXT`, as the container runtime interface of Kubernetes has it: TIME in RFC 3339, STREAM
//! `stdout` or `stderr`, TAG `F` for a line that is whole and `P` for a part of a longer one. `UUID.log` is written; when it
//! is full it becomes `UUID.log.1`, and what was that becomes `UUID.log.2`; what was that is gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::daemon::{LOG_DIRECTORY, make_private_directory};

/// Full files that are kept beside the one that is written.
const KEPT: u32 = 2;
/// Longest text in a line; what is longer is written in parts.
const LINE_BYTES: usize = 16 << 10;

/// Where the logs of a pool's containers are.
pub fn directory(pool: Uuid) -> PathBuf {
    Path::new(LOG_DIRECTORY).join("containers").join(pool.to_string())
}

/// The files of a container's log, the oldest first, whether they are there or not.
fn files(pool: Uuid, volume: Uuid) -> Vec<PathBuf> {
    let newest = directory(pool).join(format!("{volume}.log"));
    (1..=KEPT).rev().map(|number| numbered(&newest, number)).chain([newest.clone()]).collect()
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    PathBuf::from(format!("{}.{number}", path.display()))
}

/// Bytes that a container's log takes on the host.
pub fn bytes(pool: Uuid, volume: Uuid) -> u64 {
    files(pool, volume).iter().filter_map(|path| fs::metadata(path).ok()).map(|found| found.blocks() * 512).sum()
}

/// Removes a container's log; there may be none.
///
/// # Errors
/// What the host says.
pub fn remove(pool: Uuid, volume: Uuid) -> Result<()> {
    for path in files(pool, volume) {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the logs of containers that are no more. Answers the bytes that this freed.
///
/// # Errors
/// What the host says.
pub fn remove_all_but(pool: Uuid, volumes: &[Uuid]) -> Result<u64> {
    let mut freed = 0;
    let listed = match fs::read_dir(directory(pool)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        listed => listed?,
    };
    for entry in listed {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let whose = name.split_once(".log").and_then(|(uuid, _)| uuid.parse::<Uuid>().ok());
        if whose.is_some_and(|whose| !volumes.contains(&whose)) {
            freed += entry.metadata()?.blocks() * 512;
            fs::remove_file(entry.path())?;
        }
    }
    Ok(freed)
}

/// The last line of a container's log that says something.
pub fn last_line(pool: Uuid, volume: Uuid) -> Option<String> {
    let (mut reader, mut last) = (Reader::open(pool, volume)?, None);
    while let Ok(Some(line)) = reader.next_line() {
        let text = String::from_utf8_lossy(line.text).trim().to_owned();
        if !text.is_empty() {
            last = Some(text);
        }
    }
    last
}

/// A log that is written.
pub struct Log {
    path: PathBuf,
    most_bytes: u64,
    open: Mutex<Open>,
}

struct Open {
    file: File,
    bytes: u64,
}

impl Log {
    /// Begins a container's log. A file is full when it has about `most_bytes`.
    ///
    /// # Errors
    /// What the host says.
    pub fn begin(pool: Uuid, volume: Uuid, most_bytes: u64) -> Result<Self> {
        let directory = directory(pool);
        make_private_directory(Path::new(LOG_DIRECTORY))?;
        make_private_directory(&directory)?;
        Self::at(directory.join(format!("{volume}.log")), most_bytes)
    }

    fn at(path: PathBuf, most_bytes: u64) -> Result<Self> {
        let file = begin_file(&path).with_context(|| path.display().to_string())?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, most_bytes, open: Mutex::new(Open { file, bytes }) })
    }

    /// Writes what comes from a stream until it ends. What the host has no room for is lost: a container does not wait for
    /// its log.
    pub fn copy(&self, from: impl Read, stream: &str) {
        let mut from = BufReader::with_capacity(LINE_BYTES, from);
        let mut lost = false;
        loop {
            let mut text = Vec::new();
            match from.by_ref().take(LINE_BYTES as u64).read_until(b'\n', &mut text) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            if let Err(error) = self.write(stream, &text)
                && !std::mem::replace(&mut lost, true)
            {
                tracing::warn!(%error, "{}: output is lost", self.path.display());
            }
        }
    }

    fn write(&self, stream: &str, text: &[u8]) -> io::Result<()> {
        let (tag, text) = text.strip_suffix(b"\n").map_or(('P', text), |text| ('F', text));
        let mut line = format!("{} {stream} {tag} ", jiff::Timestamp::now()).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.bytes > 0 && open.bytes + line.len() as u64 > self.most_bytes {
            self.begin_next(&mut open)?;
        }
        open.file.write_all(&line)?;
        open.bytes += line.len() as u64;
        Ok(())
    }

    fn begin_next(&self, open: &mut Open) -> io::Result<()> {
        for number in (0..KEPT).rev() {
            let from = if number == 0 { self.path.clone() } else { numbered(&self.path, number) };
            match fs::rename(&from, numbered(&self.path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        *open = Open { file: begin_file(&self.path)?, bytes: 0 };
        Ok(())
    }
}

fn begin_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// A line of a log, without its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Line<'a> {
    /// When it was written.
    pub time: &'a str,
    /// Whether it was said on standard error.
    pub error: bool,
    /// Whether the text goes on in the next line of the stream.
    pub is_part: bool,
    /// What was said.
    #[serde(serialize_with = "as_text")]
    pub text: &'a [u8],
}

/// JSON has no bytes: what is no UTF-8 is replaced.
fn as_text<S: Serializer>(text: &&[u8], to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(&String::from_utf8_lossy(text))
}

impl<'a> Line<'a> {
    /// Takes a line apart; none when it is not one of ours, as the last before a power cut may be.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let time = std::str::from_utf8(parts.next()?).ok()?;
        let error = match parts.next()? {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        let is_part = match parts.next()? {
            b"F" => false,
            b"P" => true,
            _ => return None,
        };
        Some(Self { time, error, is_part, text: parts.next()? })
    }
}

/// Reads a log from its beginning, across the files that it is in, while it is written or not.
pub struct Reader {
    files: Vec<PathBuf>,
    at: Option<BufReader<File>>,
    /// What is read when the end of that has been.
    next: Option<File>,
    line: Vec<u8>,
}

impl Reader {
    /// The log of a container; none when it has none.
    pub fn open(pool: Uuid, volume: Uuid) -> Option<Self> {
        let files = files(pool, volume);
        files.iter().any(|path| path.exists()).then(|| Self::of(files))
    }

    fn of(files: Vec<PathBuf>) -> Self {
        let at = files.iter().find_map(|path| File::open(path).ok()).map(BufReader::new);
        Self { files, at, next: None, line: Vec::new() }
    }

    /// The next line, or none when nothing more has been written yet.
    ///
    /// # Errors
    /// What the host says.
    pub fn next_line(&mut self) -> io::Result<Option<Line<'_>>> {
        if self.line.ends_with(b"\n") {
            self.line.clear();
        }
        loop {
            let Some(file) = &mut self.at else { return Ok(None) };
            // A line that is being written is taken up again.
            let limit = (LINE_BYTES * 2).saturating_sub(self.line.len()) as u64;
            file.by_ref().take(limit).read_until(b'\n', &mut self.line)?;
            if self.line.ends_with(b"\n") || self.line.len() >= LINE_BYTES * 2 {
                if Line::parse(trimmed(&self.line)).is_some() {
                    break;
                }
                self.line.clear();
                continue;
            }
            // Between the last look and the change of names something may have been written.
            if let Some(next) = self.next.take() {
                self.line.clear();
                self.at = Some(BufReader::new(next));
            } else {
                self.next = self.file_after()?;
                if self.next.is_none() {
                    return Ok(None);
                }
            }
        }
        Ok(Line::parse(trimmed(&self.line)))
    }

    /// The file that was written after the one that is read: that with the next younger name now.
    fn file_after(&self) -> io::Result<Option<File>> {
        let Some(at) = &self.at else { return Ok(None) };
        let own = at.get_ref().metadata()?;
        let own = (own.dev(), own.ino());
        let mut younger = None;
        for path in self.files.iter().rev() {
            let file = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            let found = file.metadata()?;
            if (found.dev(), found.ino()) == own {
                return Ok(younger);
            }
            younger = Some(file);
        }
        // It has been removed meanwhile: what is left begins with the oldest.
        Ok(younger)
    }
}

fn trimmed(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\n").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(reader: &mut Reader) -> Vec<(bool, bool, String)> {
        let mut all = Vec::new();
        while let Some(line) = reader.next_line().unwrap() {
            all.push((line.error, line.is_part, String::from_utf8_lossy(line.text).into_owned()));
        }
        all
    }

    fn reader(path: &Path) -> Reader {
        Reader::of((1..=KEPT).rev().map(|number| numbered(path, number)).chain([path.to_owned()]).collect())
    }

    #[test]
    fn what_was_said_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let log = Log::at(path.clone(), 1 << 20).unwrap();
        log.copy(&b"one\n\n two and more\n"[..], "stdout");
        log.copy(&b"bad \xff\nno end"[..], "stderr");
        let long = vec![b'x'; LINE_BYTES + 10];
        log.copy(&long[..], "stdout");
        let read = texts(&mut reader(&path));
        assert_eq!(read[0], (false, false, "one".into()));
        assert_eq!(read[1], (false, false, String::new()));
        assert_eq!(read[2], (false, false, " two and more".into()));
        assert_eq!(read[3], (true, false, "bad \u{fffd}".into()));
        assert_eq!(read[4], (true, true, "no end".into()));
        assert_eq!(read[5].2.len() + read[6].2.len(), LINE_BYTES + 10);
        assert!(read[5].1);
    }

    #[test]
    fn log_is_bounded_and_its_reader_loses_nothing_that_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let log = Log::at(path.clone(), 4096).unwrap();
        log.write("stdout", b"0\n").unwrap();
        // One that follows has every line, across the changes of files.
        let mut following = reader(&path);
        let mut followed = texts(&mut following).len();
        for number in 1..1000 {
            log.write("stdout", format!("{number}\n").as_bytes()).unwrap();
            if number % 7 == 0 {
                let read = texts(&mut following);
                followed += read.len();
                assert_eq!(read.last().unwrap().2, number.to_string());
            }
        }
        followed += texts(&mut following).len();
        assert_eq!(followed, 1000);
        let all = texts(&mut reader(&path));
        assert_eq!(all.last().unwrap().2, "999");
        let first: usize = all[0].2.parse().unwrap();
        assert!(first > 0 && all.len() == 1000 - first, "{first}");
        let sizes: Vec<u64> =
            fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).collect();
        assert!(sizes.len() == 3 && sizes.iter().all(|size| *size <= 4096), "{sizes:?}");
    }

    #[test]
    fn line_that_is_not_ours_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        fs::write(&path, b"\0\0\0\nT stdout F good\nT stdin F x\nT stdout X y\nT stderr P cut").unwrap();
        let mut reader = reader(&path);
        assert_eq!(texts(&mut reader), [(false, false, "good".into())]);
        // What was being written comes when it is whole.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b" off\n").unwrap();
        assert_eq!(texts(&mut reader), [(true, true, "cut off".into())]);
    }
}

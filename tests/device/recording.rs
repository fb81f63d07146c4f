//! Everything that reached a disk, in the order in which it completed, and what a power cut may leave of it.
//!
//! `examples/plain_export --record` stands between the disk and its users and writes the log.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::command::{binary, run, wait_until};

const SECTOR_BYTES: usize = 512;
const HEADER_BYTES: u64 = 32;

/// A disk whose changes are recorded.
pub struct RecordedDisk {
    server: Child,
    pub device: String,
    pub image: PathBuf,
    pub log: PathBuf,
}

impl RecordedDisk {
    /// An empty disk of `size_bytes` in `folder`.
    ///
    /// # Panics
    /// When the example is not built, or does not serve.
    pub fn start(folder: &Path, size_bytes: u64) -> Self {
        Self::start_with(folder, size_bytes, &[])
    }

    /// The same, with further options.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn start_with(folder: &Path, size_bytes: u64, options: &[&OsStr]) -> Self {
        let (image, log) = (folder.join("disk"), folder.join("log"));
        File::create(&image).and_then(|file| file.set_len(size_bytes)).expect("an image");
        let program = binary().with_file_name("examples").join("plain_export");
        assert!(program.exists(), "{} is missing: cargo build --profile checked --examples", program.display());
        let mount = folder.join("recorder");
        fs::create_dir(&mount).expect("a folder");
        let mut server = Command::new(program)
            .args([image.as_os_str(), mount.as_os_str(), "auto".as_ref(), "--record".as_ref(), log.as_os_str()])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the recorder");
        let mut lines = BufReader::new(server.stdout.take().expect("piped")).lines();
        let device = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("device ").map(str::to_owned))
            .expect("the recorder names its device");
        // It says more, which somebody has to take.
        std::thread::spawn(move || lines.for_each(drop));
        Self { server, device, image, log }
    }

    /// Length of the log: what has completed by now.
    pub fn position(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |metadata| metadata.len())
    }

    fn terminate(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.server.id().to_string()]).status();
    }

    pub fn stop(mut self) -> (PathBuf, PathBuf) {
        wait_until("the end of the recorder", Duration::from_secs(60), || {
            let ended = matches!(self.server.try_wait(), Ok(Some(_)));
            if !ended {
                self.terminate();
            }
            ended
        });
        (self.image.clone(), self.log.clone())
    }
}

impl Drop for RecordedDisk {
    fn drop(&mut self) {
        // One that is asked while its device is still open must be asked again.
        for _ in 0..100 {
            if matches!(self.server.try_wait(), Ok(Some(_))) {
                return;
            }
            self.terminate();
            std::thread::sleep(Duration::from_millis(200));
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    DurableWrite,
    Flush,
    Punch,
}

/// What happened, and where in the log it stands.
#[derive(Clone, Debug)]
struct Event {
    at: u64,
    kind: Kind,
    offset: u64,
    length: u64,
    /// Of a flush: the log's length when it began.
    covered: u64,
}

impl Event {
    fn end(&self) -> u64 {
        let data = if matches!(self.kind, Kind::Write | Kind::DurableWrite) { self.length } else { 0 };
        self.at + HEADER_BYTES + data
    }
}

/// A recording, and an image that holds what is durable at the cuts made so far.
pub struct Recording {
    log: File,
    events: Vec<Event>,
    image: PathBuf,
    /// Events of which all that came before is in the image.
    applied: usize,
}

impl Recording {
    /// Reads the log at `log`; cuts are made with a new image of `size_bytes` at `image`.
    pub fn open(log: &Path, image: &Path, size_bytes: u64) -> Self {
        File::create(image).and_then(|file| file.set_len(size_bytes)).expect("an image");
        let log = File::open(log).expect("the log");
        let length = log.metadata().expect("its length").len();
        let mut events = Vec::new();
        let mut at = 0;
        while at + HEADER_BYTES <= length {
            let mut header = [0; HEADER_BYTES as usize];
            log.read_exact_at(&mut header, at).expect("an entry");
            let word =
                |index: usize| u64::from_le_bytes(header[8 * index..8 * index + 8].try_into().expect("eight bytes"));
            let kind = match word(0) {
                1 => Kind::Write,
                2 => Kind::DurableWrite,
                3 => Kind::Flush,
                4 => Kind::Punch,
                other => panic!("the log has an entry of kind {other} at {at}"),
            };
            let event = Event { at, kind, offset: word(1), length: word(2), covered: word(3) };
            at = event.end();
            events.push(event);
        }
        Self { log, events, image: image.to_owned(), applied: 0 }
    }

    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Events that stand at or behind `position` of the log.
    pub fn index_at(&self, position: u64) -> usize {
        self.events.partition_point(|event| event.at < position)
    }

    /// The log's length when the power fails behind the first `count` events.
    pub fn position(&self, count: usize) -> u64 {
        self.events[count - 1].end()
    }

    /// Indexes of events behind which a flush has just ended.
    pub fn flushes(&self) -> Vec<usize> {
        let flushes = self.events.iter().enumerate().filter(|(_, event)| event.kind == Kind::Flush);
        flushes.map(|(index, _)| index + 1).collect()
    }

    /// Makes `cut` what the disk may hold when the power fails behind the first `count` events. Cuts are made in
    /// ascending order.
    pub fn cut(&mut self, count: usize, cut: &Path, random: &mut fastrand::Rng) {
        let covered =
            self.events[..count].iter().filter(|event| event.kind == Kind::Flush).map(|event| event.covered).max();
        let durable = self.events[..count].partition_point(|event| event.end() <= covered.unwrap_or(0));
        let image = fs::OpenOptions::new().write(true).open(&self.image).expect("the image");
        for index in self.applied..durable {
            self.apply(&image, index, |_| true);
        }
        self.applied = self.applied.max(durable);
        run("cp", ["--sparse=always", &self.image.to_string_lossy(), &cut.to_string_lossy()]).expect();
        let file = fs::OpenOptions::new().write(true).open(cut).expect("the cut");
        for index in durable..count {
            let fate = if self.events[index].kind == Kind::DurableWrite { 0 } else { random.u32(..3) };
            match fate {
                0 => self.apply(&file, index, |_| true),
                1 => {}
                _ => self.apply(&file, index, |_| random.bool()),
            }
        }
    }

    /// Applies an event, sector by sector where `lands` says so.
    fn apply(&self, file: &File, index: usize, mut lands: impl FnMut(usize) -> bool) {
        let event = &self.events[index];
        match event.kind {
            Kind::Flush => {}
            Kind::Punch => {
                let range = (event.offset, event.length);
                rustix::fs::fallocate(
                    file,
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                    range.0,
                    range.1,
                )
                .expect("punching the image");
            }
            Kind::Write | Kind::DurableWrite => {
                let mut bytes = vec![0; event.length as usize];
                self.log.read_exact_at(&mut bytes, event.at + HEADER_BYTES).expect("the bytes of a write");
                for (sector, part) in bytes.chunks(SECTOR_BYTES).enumerate() {
                    if lands(sector) {
                        file.write_all_at(part, event.offset + (sector * SECTOR_BYTES) as u64).expect("the image");
                    }
                }
            }
        }
    }
}

//! A file as a block device over the whole path (loop, FUSE, front, engine process), with no engine behind it.
//!
//! ```text
//! plain_export FILE DIRECTORY auto|uring|classic [--read-only] [--sector-size 512|4096] [--record LOG] [--slow MS]
//!              [--faulty WHICH]
//! ```
//!
//! `plain_export loop-helper` does one command on loop devices, as JSON on its standard input.
//!
//! `--record` appends all that changes FILE to LOG, in the form that `tests/device/recording.rs` reads. `--slow` names a file: the
//! number in it is how many milliseconds every operation waits before it is done, none while the file is not there. A write that
//! comes while others still wait, and does not itself, is told in the file MS.overtaken (whoever looks at the device reads it, so
//! a read tells nothing); MS.waits says how many wait.
//! `--faulty` names a file as well: while it is there, operations that its text names fail with EIO (read, write, flush).
//!
//! Prints the loop device when it is ready, and the pid of each engine process. What this device reaches is the most that
//! an engine can reach over the same path. `tools/try-export` runs it under fio and kills its engines. Ends on SIGTERM.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use async_executor::LocalExecutor;
use plywood::engine::{Memory, PendingLog, Storage};
use plywood::export::device::{PlainDevice, PlainVolumes};
use plywood::export::front::{EngineCommand, Front, FrontEvent, FrontOptions};
use plywood::export::link::EngineLink;
use plywood::export::loopdev::{self, AttachRequest, helper};
use plywood::export::server::Server;
use plywood::io::{FileStorage, IoMemory, OpenOptions, PayloadArea, Reactor, ReactorOptions, block_on};
use plywood::units::{Lsn, VolumeId};
use signal_hook::consts::{SIGINT, SIGTERM};
use uuid::Uuid;

const POOL: Uuid = Uuid::from_u128(0x0070_6c79_776f_6f64);
const VOLUME: VolumeId = VolumeId(1);

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter("info").init();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(link) = EngineLink::inherit()? {
        let file = arguments.get(1).context("the front gives the file")?;
        let named = |index: usize| arguments.get(index).filter(|name| !name.is_empty()).map(Path::new);
        return engine(link, Path::new(file), [named(2), named(3), named(4)]);
    }
    if arguments.first().is_some_and(|word| word == "loop-helper") {
        return Ok(helper::serve()?);
    }
    front(&arguments)
}

fn front(arguments: &[OsString]) -> anyhow::Result<()> {
    let [file, directory, transport, rest @ ..] = arguments else {
        bail!(
            "usage: plain_export FILE DIRECTORY auto|uring|classic [--read-only] [--sector-size 512|4096] [--record LOG]"
        );
    };
    let sector_size = rest.iter().position(|word| word == "--sector-size").and_then(|at| rest.get(at + 1));
    let sector_size = sector_size.and_then(|word| word.to_str()).unwrap_or("4096").parse()?;
    let read_only = rest.iter().any(|word| word == "--read-only");
    let mut words = vec!["engine".into(), file.clone()];
    for option in ["--record", "--slow", "--faulty"] {
        let value = rest.iter().position(|word| word == option).and_then(|at| rest.get(at + 1));
        words.push(value.cloned().unwrap_or_default());
    }
    let engine = EngineCommand { program: std::env::current_exe()?, arguments: words, descriptors: Vec::new() };
    let directory = PathBuf::from(directory);
    let mut options = FrontOptions::new("plain", POOL, directory.clone(), engine);
    options.transport = transport.to_str().context("transport is not text")?.parse()?;
    if let Ok(budget) = std::env::var("BUDGET_MIB") {
        options.payload_budget_bytes = budget.parse::<usize>()? << 20;
    }
    if let Ok(queues) = std::env::var("CLASSIC_QUEUES") {
        options.classic_queues = queues.parse()?;
    }
    let front = Front::start(options)?;
    println!("transport {}", front.transport());
    println!("pool {POOL}");
    let stop = front.stop_handle();
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    let (serving, first) = mpsc::channel();
    // A thread that serves nothing: attaching waits for the engine.
    let control = std::thread::spawn(move || -> anyhow::Result<()> {
        if first.recv().is_err() {
            return Ok(());
        }
        let request = AttachRequest {
            file: directory.join(VOLUME.to_string()),
            pool: POOL,
            volume: VOLUME,
            sector_size,
            read_only,
            waiting: None,
        };
        let attached = loopdev::attach(&request);
        if let Ok(attached) = &attached {
            println!("device {}", attached.device.display());
            for _ in signals.forever() {
                match loopdev::detach(attached.number) {
                    Ok(()) => break,
                    Err(error) => println!("busy {error}"),
                }
            }
        }
        stop.stop();
        attached.map(drop).map_err(Into::into)
    });
    front.run(|event| match event {
        FrontEvent::Started { pid } => println!("engine {pid}"),
        FrontEvent::Serving { after, .. } => {
            println!("serving after {after:?}");
            let _ = serving.send(());
        }
        FrontEvent::Ended { status, .. } => println!("ended {status}"),
        FrontEvent::GaveUp => println!("gave up"),
    })?;
    drop(serving);
    match control.join() {
        Ok(done) => done,
        Err(_) => bail!("the control thread died"),
    }
}

fn engine(mut link: EngineLink, file: &Path, [log, slow, faulty]: [Option<&Path>; 3]) -> anyhow::Result<()> {
    let reactor = Reactor::new(ReactorOptions::default())?;
    // Waits until the predecessor's last I/O has ended, and only then looks at the queues.
    let wait = Duration::from_secs(10);
    let storage =
        FileStorage::open(&reactor, file, OpenOptions { wait, claimed_by_front: true, ..OpenOptions::default() })?;
    let mut pending = link.pending_log(POOL)?;
    let lives = pending.published().len() as u64;
    pending.publish(Lsn(lives + 1), b"an engine started");
    tracing::info!(life = lives + 1, "engine");
    let mapping = link.memory.payloads().mapping();
    let area = PayloadArea::new(mapping.clone(), 0..mapping.len());
    reactor.register_payload(&area)?;
    let executor = Rc::new(LocalExecutor::new());
    let slow =
        slow.map(|file| Rc::new(Slow { reactor: reactor.clone(), file: file.to_owned(), waiting: Cell::new(0) }));
    let faulty = faulty.map(Rc::from);
    let storage = Recorder { storage, log: log.map(Log::open).transpose()?, slow, faulty };
    let volumes = PlainVolumes(BTreeMap::from([(VOLUME, PlainDevice::new(storage))]));
    let payloads = area.memory(0..area.len());
    let server = Server::new(link.queues()?, payloads, volumes);
    let doorbell = reactor.watch_eventfd(Rc::new(link.doorbell.try_clone()?));
    let (ended, end) = std::os::unix::net::UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, ended)?;
    server.declare_serving();
    link.notify_supervisor();
    let end = Rc::new(end.into());
    block_on(&executor, &reactor, &server, async {
        reactor.readable(&end).await?;
        server.stop();
        server.idle().await;
        anyhow::Ok(())
    })??;
    drop(doorbell);
    Ok(())
}

/// A storage that writes down what changes, when it has completed and before it is answered.
struct Recorder {
    storage: FileStorage,
    log: Option<Log>,
    slow: Option<Rc<Slow>>,
    faulty: Option<Rc<Path>>,
}

/// Fails an operation that is to fail, or waits where the disk is slow.
async fn before(operation: &'static str, faulty: Option<Rc<Path>>, slow: Option<Rc<Slow>>) -> std::io::Result<()> {
    let failing = faulty.and_then(|file| std::fs::read_to_string(file).ok());
    if failing.is_some_and(|words| words.split_whitespace().any(|word| word == operation)) {
        return Err(std::io::Error::from_raw_os_error(libc::EIO));
    }
    match slow {
        Some(slow) => slow.wait(operation == "write").await,
        None => Ok(()),
    }
}

/// What makes a disk slow, and tells when somebody overtakes what waits.
struct Slow {
    reactor: Reactor,
    file: PathBuf,
    waiting: Cell<u64>,
}

impl Slow {
    async fn wait(&self, writes: bool) -> std::io::Result<()> {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let Ok(milliseconds) = text.trim().parse() else {
            if writes && self.waiting.get() > 0 {
                let mut overtaken = self.file.clone().into_os_string();
                overtaken.push(".overtaken");
                let mut file = std::fs::OpenOptions::new().create(true).append(true).open(overtaken)?;
                std::io::Write::write_all(&mut file, b"overtaken\n")?;
            }
            return Ok(());
        };
        self.waiting.set(self.waiting.get() + 1);
        std::fs::write(self.file.with_extension("waits"), self.waiting.get().to_string())?;
        let slept = self.reactor.sleep(Duration::from_millis(milliseconds)).await;
        self.waiting.set(self.waiting.get() - 1);
        slept
    }
}

/// Entries: kind, offset, length, and what a flush covers, as little-endian u64; the bytes of a write follow.
#[derive(Clone)]
struct Log(Rc<std::fs::File>);

const WRITE: u64 = 1;
const DURABLE_WRITE: u64 = 2;
const FLUSH: u64 = 3;
const PUNCH: u64 = 4;

impl Log {
    fn open(path: &Path) -> std::io::Result<Self> {
        std::fs::OpenOptions::new().create(true).append(true).open(path).map(|file| Self(Rc::new(file)))
    }

    fn len(&self) -> std::io::Result<u64> {
        self.0.metadata().map(|metadata| metadata.len())
    }

    fn append(&self, kind: u64, range: Range<u64>, covered: u64, data: &[u8]) -> std::io::Result<()> {
        let mut entry = Vec::with_capacity(32 + data.len());
        for word in [kind, range.start, range.end - range.start, covered] {
            entry.extend(word.to_le_bytes());
        }
        entry.extend(data);
        std::io::Write::write_all(&mut &*self.0, &entry)
    }

    fn append_write(&self, kind: u64, offset: u64, from: &IoMemory) -> std::io::Result<()> {
        let mut bytes = vec![0; from.len()];
        from.read(0, &mut bytes);
        self.append(kind, offset..offset + bytes.len() as u64, 0, &bytes)
    }
}

impl Storage for Recorder {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        self.storage.allocate(len)
    }

    fn alignment(&self) -> usize {
        self.storage.alignment()
    }

    fn size_bytes(&self) -> u64 {
        self.storage.size_bytes()
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = std::io::Result<()>> + 'static {
        let (before, storage, into) =
            (before("read", self.faulty.clone(), self.slow.clone()), self.storage.clone(), into.clone());
        async move {
            before.await?;
            storage.read(offset, &into).await
        }
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = std::io::Result<()>> + 'static {
        let (before, storage) = (before("write", self.faulty.clone(), self.slow.clone()), self.storage.clone());
        let (log, from) = (self.log.clone(), from.clone());
        async move {
            before.await?;
            storage.write(offset, &from).await?;
            log.map_or(Ok(()), |log| log.append_write(WRITE, offset, &from))
        }
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = std::io::Result<()>> + 'static {
        let (before, storage) = (before("write", self.faulty.clone(), self.slow.clone()), self.storage.clone());
        let (log, from) = (self.log.clone(), from.clone());
        async move {
            before.await?;
            storage.write_durable(offset, &from).await?;
            log.map_or(Ok(()), |log| log.append_write(DURABLE_WRITE, offset, &from))
        }
    }

    fn flush(&self) -> impl Future<Output = std::io::Result<()>> + 'static {
        // It covers what had completed when it began. A slow disk is slow in reading and writing.
        let covered = self.log.as_ref().map(Log::len).transpose();
        let before = before("flush", self.faulty.clone(), None);
        let (done, log) = (self.storage.flush(), self.log.clone());
        async move {
            before.await?;
            done.await?;
            match (log, covered?) {
                (Some(log), Some(covered)) => log.append(FLUSH, 0..0, covered, &[]),
                _ => Ok(()),
            }
        }
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = std::io::Result<()>> + 'static {
        self.storage.extend(range)
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = std::io::Result<()>> + 'static {
        let (done, log) = (self.storage.punch(range.clone()), self.log.clone());
        async move {
            done.await?;
            log.map_or(Ok(()), |log| log.append(PUNCH, range, 0, &[]))
        }
    }
}

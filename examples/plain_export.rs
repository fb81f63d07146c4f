//! A file as a block device over the whole path (loop, FUSE, front, engine process), with no engine behind it.
//!
//! ```text
//! plain_export FILE DIRECTORY auto|uring|classic [--read-only] [--sector-size 512|4096]
//! ```
//!
//! `plain_export loop-helper` does one command on loop devices, as JSON on its standard input.
//!
//! Prints the loop device when it is ready, and the pid of each engine process. What this device reaches is the most that
//! an engine can reach over the same path. `tools/try-export` runs it under fio and kills its engines. Ends on SIGTERM.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use async_executor::LocalExecutor;
use plywood::engine::PendingLog;
use plywood::export::device::{PlainDevice, PlainVolumes};
use plywood::export::front::{EngineCommand, Front, FrontEvent, FrontOptions};
use plywood::export::link::EngineLink;
use plywood::export::loopdev::{self, AttachRequest, helper};
use plywood::export::server::Server;
use plywood::io::{FileStorage, OpenOptions, PayloadArea, Reactor, ReactorOptions, block_on};
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
        return engine(link, Path::new(file));
    }
    if arguments.first().is_some_and(|word| word == "loop-helper") {
        return Ok(helper::serve_one()?);
    }
    front(&arguments)
}

fn front(arguments: &[OsString]) -> anyhow::Result<()> {
    let [file, directory, transport, rest @ ..] = arguments else {
        bail!("usage: plain_export FILE DIRECTORY auto|uring|classic [--read-only] [--sector-size 512|4096]");
    };
    let sector_size = rest.iter().position(|word| word == "--sector-size").and_then(|at| rest.get(at + 1));
    let sector_size = sector_size.and_then(|word| word.to_str()).unwrap_or("4096").parse()?;
    let read_only = rest.iter().any(|word| word == "--read-only");
    let engine = EngineCommand {
        program: std::env::current_exe()?,
        arguments: vec!["engine".into(), file.clone()],
        descriptors: Vec::new(),
    };
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

fn engine(mut link: EngineLink, file: &Path) -> anyhow::Result<()> {
    let reactor = Reactor::new(ReactorOptions::default())?;
    // Waits until the predecessor's last I/O has ended, and only then looks at the queues.
    let wait = Duration::from_secs(10);
    let storage = FileStorage::open(&reactor, file, OpenOptions { wait, claimed_by_front: true, force: false })?;
    let mut pending = link.pending_log(POOL)?;
    let lives = pending.published().len() as u64;
    pending.publish(Lsn(lives + 1), b"an engine started");
    tracing::info!(life = lives + 1, "engine");
    let mapping = link.memory.payloads().mapping();
    let area = PayloadArea::new(mapping.clone(), 0..mapping.len());
    reactor.register_payload(&area)?;
    let executor = Rc::new(LocalExecutor::new());
    let volumes = PlainVolumes(BTreeMap::from([(VOLUME, PlainDevice::new(storage))]));
    let payloads = area.memory(0..area.len());
    let server = Server::new(link.queues()?, payloads, volumes, Rc::clone(&executor));
    let doorbell = reactor.watch_eventfd(Rc::new(link.doorbell.try_clone()?))?;
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

//! A FUSE session of the front: mount, negotiation, the threads of its transport.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::classic::{StreamQueue, drain};
use super::init::{MAX_BACKGROUND, Offer, Wishes};
use super::mount::Mount;
use super::self_test::background_depth;
use super::switch::UringSwitch;
use super::uring::RingQueue;
use crate::error::{Error, Result};
use crate::export::shared::{Arrangement, FrontQueue, Geometry, SessionMemory, possible_processors, ring};

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// FUSE over io_uring (kernel 6.14).
    Uring,
    /// read and write on /dev/fuse.
    Classic,
}

/// Which transport is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportChoice {
    /// io_uring where the kernel has it and passes the self-test, classic elsewhere.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Classic.
    Classic,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Uring => "uring",
            Self::Classic => "classic",
        })
    }
}

impl std::str::FromStr for TransportChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "classic" => Ok(Self::Classic),
            _ => Err(Error::InvalidInput(format!("transport {text:?} is none of auto, uring, classic"))),
        }
    }
}

/// What a session is made of.
#[derive(Clone, Debug)]
pub(crate) struct SessionOptions {
    pub name: String,
    pub directory: PathBuf,
    pub transport: TransportChoice,
    pub payload_budget_bytes: usize,
    /// Queues of the classic transport, of two threads each.
    pub classic_queues: usize,
}

/// A running session.
#[derive(Debug)]
pub(crate) struct Session {
    mount: Mount,
    memory: SessionMemory,
    transport: Transport,
    fallback: Option<String>,
    engine_doorbell: Arc<OwnedFd>,
    doorbells: Vec<Arc<OwnedFd>>,
    given_up: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

fn new_doorbell() -> Result<Arc<OwnedFd>> {
    // A blocking one: a ring's read of a non-blocking eventfd ends at once instead of waiting.
    let doorbell = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| Error::io("making an eventfd", errno.into()))?;
    Ok(Arc::new(doorbell))
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    Builder::new().name(name).spawn(body).map_err(|error| Error::io("starting a thread of the front", error))
}

/// Reads INIT.
pub(super) fn read_offer(fuse: BorrowedFd<'_>) -> Result<Offer> {
    let mut buffer = vec![0; super::abi::LEAST_READ_BUFFER];
    let len = loop {
        match rustix::io::read(fuse, &mut buffer) {
            Ok(len) => break len,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::io("reading the first request of FUSE", errno.into())),
        }
    };
    Offer::parse(&buffer[..len])
}

/// Answers INIT.
pub(super) fn answer_offer(fuse: BorrowedFd<'_>, offer: &Offer, wishes: &Wishes) -> Result<()> {
    let answer = offer.answer(wishes)?;
    rustix::io::write(fuse, &answer).map_err(|errno| Error::io("answering FUSE's INIT", errno.into()))?;
    Ok(())
}

impl Session {
    /// Mounts and starts to move requests into the queues. No engine is needed for that.
    ///
    /// # Errors
    /// Why neither the wanted transport nor, with `Auto`, the classic one could be had.
    pub(crate) fn start(options: &SessionOptions) -> Result<Self> {
        let fallback = match options.transport {
            TransportChoice::Classic => None,
            TransportChoice::Uring => return Self::start_uring(options),
            TransportChoice::Auto => match Self::start_uring(options) {
                Ok(session) => return Ok(session),
                Err(error) => {
                    tracing::warn!(reason = %error, "FUSE over io_uring is not used, the classic transport is");
                    Some(error.to_string())
                }
            },
        };
        let mut session = Self::start_classic(options)?;
        session.fallback = fallback;
        Ok(session)
    }

    fn start_uring(options: &SessionOptions) -> Result<Self> {
        let _on = UringSwitch::on()?;
        let depth = background_depth(&options.directory.with_extension("self-test"))?;
        if depth < 2 {
            return Err(Error::Incompatible(
                "this kernel's FUSE over io_uring works off background requests one at a time (fixed in April 2026)"
                    .into(),
            ));
        }
        let processors = possible_processors()?;
        let geometry = Geometry::within_budget(Arrangement::Ring, &processors, options.payload_budget_bytes)?;
        let mut session = Self::prepare(options, geometry, Transport::Uring)?;
        let offer = read_offer(session.mount.fuse())?;
        if !offer.has_io_uring() {
            return Err(Error::Incompatible("this kernel does not offer FUSE over io_uring".into()));
        }
        let mut queues = Vec::new();
        for front in session.front_queues() {
            queues.push(RingQueue::new(front, session.mount.fuse())?);
        }
        session.negotiate(&offer, true)?;
        let (ready, outcome) = sync_channel(queues.len());
        let queue_count = queues.len();
        for (number, queue) in queues.into_iter().enumerate() {
            let ready = ready.clone();
            session.threads.push(spawn(format!("front-ring-{number}"), move || queue.run(&ready))?);
        }
        for _ in 0..queue_count {
            let registered = outcome.recv().unwrap_or_else(|_| Err(io::Error::other("a thread of the front died")));
            registered.map_err(|error| Error::io("registering FUSE entries with io_uring", error))?;
        }
        let fuse = session.fuse_file()?;
        let transfer_bytes = session.memory.geometry().payload_bytes();
        session.threads.push(spawn("front-fuse".into(), move || drain(&fuse, transfer_bytes))?);
        Ok(session)
    }

    fn start_classic(options: &SessionOptions) -> Result<Self> {
        let busy = vec![true; options.classic_queues.max(1)];
        let geometry = Geometry::within_budget(Arrangement::Stream, &busy, options.payload_budget_bytes)?;
        let mut session = Self::prepare(options, geometry, Transport::Classic)?;
        let offer = read_offer(session.mount.fuse())?;
        session.negotiate(&offer, false)?;
        for front in session.front_queues() {
            let number = front.queue();
            let queue = Arc::new(StreamQueue::new(front, session.mount.fuse())?);
            let same = Arc::clone(&queue);
            session.threads.push(spawn(format!("front-read-{number}"), move || queue.read_requests())?);
            session.threads.push(spawn(format!("front-write-{number}"), move || same.write_answers())?);
        }
        Ok(session)
    }

    fn prepare(options: &SessionOptions, geometry: Geometry, transport: Transport) -> Result<Self> {
        let memory = SessionMemory::create(geometry)?;
        let doorbells = (0..memory.geometry().queue_count()).map(|_| new_doorbell()).collect::<Result<_>>()?;
        let name = format!("plywood:{}", options.name);
        let mount = Mount::new(&name, &options.directory, memory.geometry().payload_bytes())?;
        Ok(Self {
            mount,
            memory,
            transport,
            fallback: None,
            engine_doorbell: new_doorbell()?,
            doorbells,
            given_up: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        })
    }

    fn front_queues(&self) -> Vec<FrontQueue> {
        let queue = |(number, doorbell): (usize, &Arc<OwnedFd>)| {
            FrontQueue::new(
                self.memory.clone(),
                number,
                Arc::clone(&self.engine_doorbell),
                Arc::clone(doorbell),
                Arc::clone(&self.given_up),
            )
        };
        self.doorbells.iter().enumerate().map(queue).collect()
    }

    fn negotiate(&self, offer: &Offer, over_io_uring: bool) -> Result<()> {
        let transfer_bytes = self.memory.geometry().payload_bytes();
        let wishes = Wishes { transfer_bytes, max_background: MAX_BACKGROUND, over_io_uring };
        answer_offer(self.mount.fuse(), offer, &wishes)
    }

    fn fuse_file(&self) -> Result<File> {
        let fuse = self.mount.fuse().try_clone_to_owned();
        Ok(fuse.map_err(|error| Error::io("duplicating /dev/fuse", error))?.into())
    }

    /// The transport in use.
    pub(crate) fn transport(&self) -> Transport {
        self.transport
    }

    /// Why io_uring is not used although it might have been.
    pub(crate) fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// The shared memory.
    pub(crate) fn memory(&self) -> &SessionMemory {
        &self.memory
    }

    /// What wakes the engine.
    pub(crate) fn engine_doorbell(&self) -> BorrowedFd<'_> {
        self.engine_doorbell.as_fd()
    }

    /// What wakes each queue of the front.
    pub(crate) fn doorbells(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.doorbells.iter().map(|doorbell| doorbell.as_fd())
    }

    /// Where it is mounted.
    pub(crate) fn directory(&self) -> &Path {
        self.mount.directory()
    }

    /// Before an engine is started: nobody serves yet.
    pub(crate) fn forget_serving(&self) {
        self.memory.set_served(false);
    }

    /// Whether the engine has said that it serves.
    pub(crate) fn is_served(&self) -> bool {
        self.memory.is_served()
    }

    /// Requests that the engine has and has not answered.
    pub(crate) fn requests_sent(&self) -> u32 {
        self.memory.requests_sent()
    }

    /// From now on everything is answered with EIO.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        self.doorbells.iter().for_each(|doorbell| ring(doorbell));
    }

    /// Unmounts and waits until all threads have ended. No engine is needed: what comes late, as the kernel's word that a
    /// file was closed, is answered with an error that nobody sees.
    ///
    /// # Errors
    /// [`Error::Busy`] while a volume is attached.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.give_up();
        self.mount.unmount()?;
        // The kernel ends the session with its last mount; a mount namespace made meanwhile may hold a copy of ours.
        if !self.threads_end_within(Duration::from_millis(500)) {
            self.mount.abort();
            if !self.threads_end_within(Duration::from_millis(500)) {
                tracing::warn!("the FUSE session is still held by another mount namespace; it ends with this process");
                return Ok(());
            }
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        Ok(())
    }

    fn threads_end_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while !self.threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

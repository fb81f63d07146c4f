//! The engine process: the pool, its volumes for the front, and the control socket.
//!
//! The main thread is the engine's: it runs tasks and sleeps in its ring. Threads beside it speak with clients, listen to
//! signals and see to devices; what they want of the engine they hand over by a `Remote`. None of them outlives the
//! process, and none has to: what was acknowledged is durable or in the memory that the front holds.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_executor::LocalExecutor;
use event_listener::Event;

use super::devices::{self, Daemon, Serving};
use super::events::Draft;
use super::execute::{Control, DaemonFacts};
use super::heritage::Heritage;
use super::lookup::identify;
use super::protocol::EventKind;
use super::thresholds::{Crossing, Runner};
use super::watch::{Look, Told, Watcher};
use super::{logging, metrics_port, process, remote};
use crate::engine::{OpenOptions, Pool, Underway, Work};
use crate::error::{Error, Result};
use crate::export::fuse::Transport;
use crate::export::link::{EXIT_FINISHED, EXIT_INCOMPATIBLE, EXIT_SUCCEED_ME, EngineLink, versions};
use crate::export::server::Server;
use crate::export::shared::{Plight, SharedBoard};
use crate::io::{self, FileStorage, PayloadArea, Reactor, ReactorOptions, block_on};

/// Name of the listening socket among the front's descriptors.
pub(super) const CONTROL: &str = "control";
/// Name of the memory that counts engine processes.
pub(super) const STARTS: &str = "starts";
/// Name of the listening socket for metrics, where there is one.
pub(super) const METRICS: &str = "metrics";
/// How long a write waits for space, where its volume asks for that.
const FULL_WAIT_SECONDS: u64 = 60;
/// Seconds between checkpoints that only find out whether a threshold is reached.
const CHECKPOINT_LOOKS: u64 = 5;
/// Time between two looks at what is still in flight when another engine is to succeed this one.
const HAND_OVER_LOOK: Duration = Duration::from_millis(2);
/// How long the last I/O of a predecessor may take to end: a disk that answers at all does so by then.
const FENCE: Duration = Duration::from_secs(60);

/// Options of the engine process.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineArguments {
    /// Attach what was attached when the daemon stopped
    #[arg(long)]
    pub(super) attach_all: bool,

    /// What sealing in the background may read a second
    #[arg(long, default_value_t = 0)]
    pub(super) seal_bytes: u64,

    /// Memory for mapping nodes
    #[arg(long, default_value_t = 64 << 20)]
    pub(super) cache_bytes: u64,

    /// Command for the shell that is run when the pool crosses a threshold
    #[arg(long)]
    pub(super) on_threshold: Option<String>,

    /// Only say whether this build can succeed one that reads these versions
    #[arg(long, value_name = "VERSIONS", hide = true)]
    pub(super) succeeds: Option<String>,
}

impl EngineArguments {
    /// The answer, when all that is asked is whether this build can succeed another one.
    pub fn can_succeed(&self) -> Option<ExitCode> {
        let theirs = self.succeeds.as_ref()?;
        Some(exit_code(if *theirs == versions() { EXIT_FINISHED } else { EXIT_INCOMPATIBLE }))
    }
}

/// What the engine thread works on.
pub(super) struct Engine {
    /// The pool, and what is attached.
    pub(super) control: Control<FileStorage>,
    /// Its volumes for the front.
    pub(super) server: Server<Pool<FileStorage>>,
    reactor: Reactor,
    heritage: Heritage,
    board: SharedBoard,
    finished: Cell<Option<i32>>,
    finish: Event,
}

impl Engine {
    /// Serves no more, makes everything durable, and lets the process end.
    pub(super) async fn finish(&self, status: i32) -> Result<()> {
        self.server.stop();
        // Who waits for space waits no longer.
        self.control.pool.bound_waiting(0, 0);
        self.server.idle().await;
        let closed = self.control.pool.close().await;
        self.control.medium.keep_host_claim(closed.is_err() || status != EXIT_FINISHED);
        self.exit(status);
        closed
    }

    /// Lets the process end, to be succeeded at once. What is in flight is answered; what waits, and what was acknowledged
    /// and is not recorded yet, is in the memory that the front holds.
    pub(super) async fn hand_over(&self) -> Result<()> {
        let _work = Underway::new(&self.board, Work::HandOver);
        // The successor has little to replay then. I/O goes on meanwhile.
        self.control.pool.checkpoint().await?;
        self.server.stop();
        // What waits for space holds nothing: the successor is given it again.
        while self.server.in_flight() as u64 > self.control.pool.waiting_for_space() {
            let pause = self.reactor.sleep(HAND_OVER_LOOK).await;
            pause.map_err(|error| Error::io("io_uring", error))?;
        }
        self.heritage.hand_over();
        self.exit(EXIT_SUCCEED_ME);
        Ok(())
    }

    fn exit(&self, code: i32) {
        self.finished.set(Some(code));
        self.finish.notify(usize::MAX);
    }

    /// Waits for the end, and answers the exit status.
    async fn finished(&self) -> i32 {
        loop {
            if let Some(code) = self.finished.get() {
                return code;
            }
            let listener = self.finish.listen();
            if self.finished.get().is_none() {
                listener.await;
            }
        }
    }
}

/// The engine process's main.
///
/// # Errors
/// What keeps it from serving.
pub fn run_engine(path: &Path, arguments: &EngineArguments) -> Result<ExitCode> {
    logging::start(logging::DAEMON);
    let link = match EngineLink::inherit() {
        Ok(Some(link)) => link,
        Ok(None) => return Err(Error::InvalidInput("this is started by plywood serve, and by nobody else".into())),
        Err(error @ Error::Incompatible(_)) => {
            tracing::error!("{error}");
            return Ok(exit_code(EXIT_INCOMPATIBLE));
        }
        Err(error) => return Err(error),
    };
    process::stay_in_memory();
    Ok(exit_code(serve(path, arguments, link)?))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn serve(path: &Path, arguments: &EngineArguments, mut link: EngineLink) -> Result<i32> {
    // An executor keeps the panic of a task for whoever awaits it, and nobody awaits these: requests would wait for ever.
    // The death of the process has the front start another, which goes on from what was published.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
    let ring = |error| Error::io("io_uring", error);
    let found = identify(path)?;
    let heritage = Heritage::take(File::from(link.take_extra(STARTS)?))?;
    let restarts = heritage.before;
    let listener = UnixListener::from(link.take_extra(CONTROL)?);
    let metrics = link.take_extra(METRICS).ok().map(TcpListener::from);
    let reactor = Reactor::new(ReactorOptions::default()).map_err(ring)?;
    let executor = Rc::new(LocalExecutor::new());

    // Rule O9: nothing of the shared memory is looked at before the predecessor's last I/O has ended.
    let fence = io::OpenOptions { wait: FENCE, claimed_by_front: true, ..io::OpenOptions::default() };
    let storage = FileStorage::open(&reactor, &found.path, fence)?;
    // What was acknowledged and is not recorded is in memory of this host: until it is, no other one has the pool.
    storage.keep_host_claim(true);
    let log = link.pending_log(found.uuid)?;
    let board = log.board_of_engine();
    let options = OpenOptions { cache_bytes: usize::try_from(arguments.cache_bytes).unwrap_or(usize::MAX) };
    let opening = Pool::open(storage.clone(), Box::new(log), options);
    let pool = block_on(&executor, &reactor, &(), opening).map_err(ring)??;

    let payloads = link.memory.payloads().mapping();
    let area = PayloadArea::new(payloads.clone(), 0..payloads.len());
    if let Err(error) = reactor.register_payload(&area) {
        tracing::warn!(%error, "payloads are not registered with the ring; I/O is slower");
    }
    let server = Server::new(link.queues()?, area.memory(0..area.len()), pool.clone());
    let facts = DaemonFacts {
        front_pid: link.front_pid,
        engine_pid: std::process::id(),
        engine_restarts: restarts,
        transport: transport_words(&link),
    };
    let told = Told::new(restarts);
    let events = Arc::clone(&told.events);
    events.post(introduction(&heritage, board.predecessor()));
    let runner = arguments.on_threshold.clone().filter(|command| !command.is_empty());
    let runner = runner.map(|command| Runner::start(command, found.name, found.path.clone())).transpose()?;
    let control = Control {
        pool: pool.clone(),
        medium: storage,
        path: found.path,
        devices: RefCell::new(BTreeMap::new()),
        checking: Cell::new(None),
        told,
        daemon: Some(facts),
    };
    pool.bound_waiting(server.waiting_writes().most.into(), FULL_WAIT_SECONDS);
    let (finished, finish) = (Cell::new(None), Event::new());
    let (server_of_engine, reactor_of_engine) = (server.clone(), reactor.clone());
    let engine = Rc::new(Engine {
        control,
        server: server_of_engine,
        reactor: reactor_of_engine,
        heritage,
        board: board.clone(),
        finished,
        finish,
    });

    pool.seal_in_background(arguments.seal_bytes);
    let medium = engine.control.medium.clone();
    pool.enlarge_with(move |size_bytes| medium.grow(size_bytes));
    let background = pool.clone();
    executor.spawn(async move { background.run().await }).detach();
    executor.spawn(watch(Rc::clone(&engine), runner, Rc::clone(&executor))).detach();
    let (remote, mailbox) = remote::mailbox()?;
    let wakeup = reactor.watch_eventfd(mailbox.descriptor()?);
    let doorbell = Rc::new(link.doorbell.try_clone().map_err(|error| Error::io("duplicating a descriptor", error))?);
    let _doorbell = reactor.watch_eventfd(doorbell);
    let (deliver_to, deliver_on) = (Rc::clone(&engine), Rc::clone(&executor));
    let delivery = async move { mailbox.deliver(&wakeup, &deliver_on, &deliver_to).await };
    executor.spawn(async { drop(delivery.await) }).detach();

    server.declare_serving();
    link.notify_supervisor();
    if let Some(listener) = metrics {
        metrics_port::serve(listener, devices::metrics_of(remote.clone()))?;
    }
    let (front_pid, attach_all) = (link.front_pid, arguments.attach_all);
    let serving = Serving { pool: found.uuid, front_pid, restarts, attach_all, board, replaceable: link.replaceable };
    Daemon::start(remote, events, serving, listener)?;
    let code = block_on(&executor, &reactor, &server, engine.finished()).map_err(ring)?;
    if code == EXIT_FINISHED {
        // The engine's tasks go no further: what is in flight is the last.
        block_on(&LocalExecutor::new(), &reactor, &(), engine.control.medium.leave_host())
            .map_err(ring)?
            .map_err(ring)?;
    }
    Ok(code)
}

/// What comes first of an engine process.
fn introduction(heritage: &Heritage, predecessor: Plight) -> Draft {
    let pid = std::process::id();
    let text = match (heritage.before, heritage.handed_over) {
        (0, _) => format!("process {pid} serves the pool"),
        (_, true) => format!("process {pid} serves the pool; its predecessor has handed over"),
        (_, false) => format!("process {pid} serves the pool; its predecessor has died, {predecessor}"),
    };
    Draft::new(EventKind::Engine, text)
}

/// Once a second: tells the engine, which has no clock, looks at the pool, and tells what is new.
async fn watch(engine: Rc<Engine>, runner: Option<Runner>, executor: Rc<LocalExecutor<'static>>) {
    let control = &engine.control;
    let mut watcher = Watcher::new(Look::at(control, &[]), engine.heritage.level);
    let mut looks = 0_u64;
    loop {
        let seen = watcher.look(Look::at(control, &engine.server.counters()));
        control.told.level.set(Some(watcher.level()));
        control.told.sealing.set(watcher.is_sealing());
        for Crossing { percent, upwards } in &seen.crossed {
            let filled = watcher.percent();
            if *upwards {
                tracing::warn!(threshold = percent, filled, "the pool gets full");
            } else {
                tracing::info!(threshold = percent, filled, "the pool has space again");
            }
        }
        if !seen.crossed.is_empty() {
            engine.heritage.told(watcher.level());
        }
        if let Some(runner) = &runner {
            seen.crossed.iter().for_each(|crossing| runner.crossed(*crossing));
        }
        for (volume, draft) in seen.drafts {
            let named = volume.and_then(|volume| control.pool.volume_by_id(volume).ok()).map(|volume| volume.name);
            control.told.events.post(Draft { volume: named.or(draft.volume.clone()), ..draft });
        }
        if seen.wants_checkpoint && looks.is_multiple_of(CHECKPOINT_LOOKS) {
            let pool = control.pool.clone();
            // One that fails poisons the pool, which is told by others.
            executor.spawn(async move { drop(pool.checkpoint().await) }).detach();
        }
        engine.server.retain_counters(|volume| control.pool.volume_by_id(volume).is_ok());
        looks += 1;
        if engine.reactor.sleep(Duration::from_secs(1)).await.is_err() {
            return;
        }
        control.pool.tick();
    }
}

/// The transport, and why it is this one.
fn transport_words(link: &EngineLink) -> String {
    let reason = match (&link.fallback, link.transport) {
        (Some(reason), _) => reason.as_str(),
        (None, Transport::Uring) => "the kernel offers it, and it passed the self-test",
        (None, Transport::Classic) => "asked for",
    };
    format!("{} ({reason})", link.transport)
}

//! The front: the process that must not die.
//!
//! It holds what outlives an engine (the FUSE session, the queues, the pending log, the second lock of rule O9), starts
//! the engine process and the next one whenever it dies. It does no I/O on the pool. Its serving threads allocate nothing;
//! the supervisor, which runs on the thread that called [`Front::run`], prepares its commands at start.

mod engine_process;
mod process;

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use uuid::Uuid;

use self::engine_process::{Engine, Launcher};
pub use self::process::{become_io_flusher, enter_own_mount_namespace, lock_memory};
use super::fuse::{Session, SessionOptions, Transport, TransportChoice};
use super::link::{EXIT_FINISHED, EXIT_INCOMPATIBLE, EXIT_REPLACE_FRONT, EXIT_SUCCEED_ME};
use super::shared::{DEFAULT_BUDGET_BYTES, Plight, SharedBoard, SharedPendingLog, ring};
use crate::error::{Error, Result};
use crate::io::PoolClaim;

/// What to start as the engine.
#[derive(Debug)]
pub struct EngineCommand {
    /// The program; normally [`std::env::current_exe`], so that a newer build in its place takes over.
    pub program: PathBuf,
    /// Its arguments: the hidden subcommand and what it needs.
    pub arguments: Vec<OsString>,
    /// Descriptors that every engine inherits, by name: the control socket, for one.
    pub descriptors: Vec<(String, OwnedFd)>,
}

/// When the front gives up on its engine.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Deaths before the engine served.
    pub unserved_deaths: usize,
    /// Deaths at all.
    pub deaths: usize,
    /// Within this time.
    pub within: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { unserved_deaths: 5, deaths: 50, within: Duration::from_secs(10) }
    }
}

/// How a front is set up.
#[derive(Debug)]
pub struct FrontOptions {
    /// Name of the pool, for /proc/mounts.
    pub name: String,
    /// The pool.
    pub pool: Uuid,
    /// Where the FUSE file system is mounted; made, and made private.
    pub directory: PathBuf,
    /// Which transport.
    pub transport: TransportChoice,
    /// Memory for payloads.
    pub payload_budget_bytes: usize,
    /// Queues of the classic transport.
    pub classic_queues: usize,
    /// The engine.
    pub engine: EngineCommand,
    /// The second lock of rule O9, held as long as the front lives.
    pub claim: Option<PoolClaim>,
    /// When to give up.
    pub patience: Patience,
    /// Memory of pending changes that an earlier front of this pool has left; new memory without.
    pub pending: Option<SharedPendingLog>,
}

impl FrontOptions {
    /// The usual settings.
    pub fn new(name: &str, pool: Uuid, directory: PathBuf, engine: EngineCommand) -> Self {
        Self {
            name: name.to_owned(),
            pool,
            directory,
            transport: TransportChoice::Auto,
            payload_budget_bytes: DEFAULT_BUDGET_BYTES,
            classic_queues: 2,
            engine,
            claim: None,
            patience: Patience::default(),
            pending: None,
        }
    }
}

/// What happens to the engine, for the log.
#[derive(Debug)]
pub enum FrontEvent {
    /// An engine process was started.
    Started {
        /// Its pid.
        pid: u32,
    },
    /// It serves requests.
    Serving {
        /// Its pid.
        pid: u32,
        /// Since its predecessor's death was seen.
        after: Duration,
    },
    /// It ended, and is succeeded.
    Ended {
        /// Its pid.
        pid: u32,
        /// How.
        status: ExitStatus,
        /// What it was at.
        plight: Plight,
    },
    /// Too many deaths: every request is answered with EIO from now on.
    GaveUp,
}

/// A front that has a FUSE session and no engine yet.
#[derive(Debug)]
pub struct Front {
    session: Session,
    launcher: Launcher,
    supervisor: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    pending: SharedPendingLog,
    board: SharedBoard,
    _claim: Option<PoolClaim>,
    patience: Patience,
}

/// Asks a running front to stop, from another thread.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<OwnedFd>);

impl StopHandle {
    /// The engine gets SIGTERM; when it has finished, the front does. Asked again, the engine gets it again.
    pub fn stop(&self) {
        ring(&self.0);
    }
}

/// Deaths within the time that counts.
#[derive(Debug, Default)]
struct Deaths {
    seen: Vec<(Instant, bool)>,
}

impl Deaths {
    /// Counts one; true when it was one too many.
    fn count(&mut self, now: Instant, served: bool, patience: &Patience) -> bool {
        self.seen.retain(|(at, _)| now.duration_since(*at) < patience.within);
        self.seen.push((now, served));
        let unserved = self.seen.iter().rev().take_while(|(_, served)| !served).count();
        self.seen.len() >= patience.deaths || unserved >= patience.unserved_deaths
    }

    /// One has served and ended in good order: those before it that did not serve say nothing about the next.
    fn forget_unserved(&mut self) {
        self.seen.retain(|(_, served)| *served);
    }
}

/// How a front has ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Nobody wants it any more.
    Finished,
    /// To be replaced by the program on disk: its engine has found that nothing is attached.
    Replace,
}

enum Step {
    Again,
    Finished(Ending),
    GiveUp,
}

fn new_pending(pool: Uuid) -> Result<SharedPendingLog> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::io("naming the session", errno.into()))?;
    SharedPendingLog::create(pool, u128::from_ne_bytes(id))
}

fn new_event() -> Result<Arc<OwnedFd>> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    Ok(Arc::new(event.map_err(|errno| Error::io("making an eventfd", errno.into()))?))
}

impl Front {
    /// Makes the shared memory and starts the FUSE session.
    ///
    /// # Errors
    /// Why the session cannot be had.
    pub fn start(options: FrontOptions) -> Result<Self> {
        let pending = match options.pending {
            Some(pending) => pending,
            None => new_pending(options.pool)?,
        };
        let session = Session::start(&SessionOptions {
            name: options.name,
            directory: options.directory,
            transport: options.transport,
            payload_budget_bytes: options.payload_budget_bytes,
            classic_queues: options.classic_queues,
        })?;
        let supervisor = new_event()?;
        let launcher = Launcher::new(options.engine, &session, pending.descriptor(), supervisor.as_fd())?;
        let geometry = session.memory().geometry();
        tracing::info!(
            transport = %session.transport(),
            queues = geometry.queue_count(),
            depth = geometry.depth(0),
            payload_kib = geometry.payload_bytes() >> 10,
            directory = %session.directory().display(),
            "front is ready"
        );
        Ok(Self {
            session,
            launcher,
            supervisor,
            stop: new_event()?,
            board: pending.board_of_engine(),
            pending,
            _claim: options.claim,
            patience: options.patience,
        })
    }

    /// The transport in use.
    pub fn transport(&self) -> Transport {
        self.session.transport()
    }

    /// Why io_uring is not used although it might have been.
    pub fn fallback(&self) -> Option<&str> {
        self.session.fallback()
    }

    /// The memory of pending changes, for whoever shall keep it beyond this process.
    pub fn pending_memory(&self) -> BorrowedFd<'_> {
        self.pending.descriptor()
    }

    /// For asking [`run`](Self::run) to stop.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// Runs engines until one finishes in good order, then unmounts. `on_event` is told what happens.
    ///
    /// # Errors
    /// When the first engine ends before it has served; when the front gave up and was stopped; when the session cannot
    /// be ended because a volume is still attached.
    pub fn run(mut self, mut on_event: impl FnMut(&FrontEvent)) -> Result<Ending> {
        let mut deaths = Deaths { seen: Vec::with_capacity(self.patience.deaths + 1) };
        let mut stopping = false;
        let mut ever_served = false;
        let mut died = Instant::now();
        loop {
            self.session.forget_serving();
            let (status, pid, served) = match self.launcher.launch() {
                Ok(engine) => {
                    on_event(&FrontEvent::Started { pid: engine.pid() });
                    self.watch(engine, died, &mut stopping, &mut on_event)?
                }
                Err(error) if !ever_served => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "cannot start an engine");
                    std::thread::sleep(Duration::from_millis(100));
                    (None, 0, false)
                }
            };
            died = Instant::now();
            ever_served |= served;
            if let Some(status) = status {
                let plight = self.board.plight(self.session.requests_sent());
                self.board.bury(plight);
                on_event(&FrontEvent::Ended { pid, status, plight });
                if !ever_served && status.code() != Some(EXIT_FINISHED) && !self.can_fall_back(status) {
                    return Err(Error::Busy(format!("the engine did not start ({status}); its own message says why")));
                }
            }
            match self.judge(status, served, &mut deaths) {
                Step::Again => {}
                Step::Finished(ending) => return self.session.end().map(|()| ending),
                Step::GiveUp => {
                    on_event(&FrontEvent::GaveUp);
                    tracing::error!("the engine keeps dying: every request is answered with EIO");
                    self.session.give_up();
                    return self.wait_given_up(stopping);
                }
            }
        }
    }

    fn can_fall_back(&mut self, status: ExitStatus) -> bool {
        status.code() == Some(EXIT_INCOMPATIBLE) && !self.launcher.uses_own_build()
    }

    fn judge(&mut self, status: Option<ExitStatus>, served: bool, deaths: &mut Deaths) -> Step {
        match status.and_then(|status| status.code()) {
            Some(EXIT_FINISHED) => return Step::Finished(Ending::Finished),
            Some(EXIT_REPLACE_FRONT) => return Step::Finished(Ending::Replace),
            Some(EXIT_SUCCEED_ME) => {
                if served {
                    deaths.forget_unserved();
                }
                self.launcher.use_program();
                return Step::Again;
            }
            // A newer build in our place that does not know our memory: our own is still there, even if deleted.
            Some(EXIT_INCOMPATIBLE) if self.launcher.use_own_build() => {
                tracing::warn!("the program on disk cannot serve this front; its own build is started instead");
            }
            _ => tracing::warn!(?status, served, "the engine died; its successor is started"),
        }
        if deaths.count(Instant::now(), served, &self.patience) { Step::GiveUp } else { Step::Again }
    }

    /// Waits for the end of an engine: its status, pid, and whether it served.
    fn watch(
        &self,
        mut engine: Engine,
        since: Instant,
        stopping: &mut bool,
        on_event: &mut impl FnMut(&FrontEvent),
    ) -> Result<(Option<ExitStatus>, u32, bool)> {
        let mut served = false;
        if *stopping {
            engine.terminate();
        }
        loop {
            let mut ready = [
                PollFd::new(engine.pidfd(), PollFlags::IN),
                PollFd::new(&self.supervisor, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::io("waiting for the engine", errno.into())),
            }
            let [ended, told, stop] = ready.map(|descriptor| descriptor.revents().contains(PollFlags::IN));
            if told {
                drain(&self.supervisor);
            }
            if !served && self.session.is_served() {
                served = true;
                on_event(&FrontEvent::Serving { pid: engine.pid(), after: since.elapsed() });
            }
            if stop {
                drain(&self.stop);
                *stopping = true;
                engine.terminate();
            }
            if ended {
                let pid = engine.pid();
                return Ok((Some(engine.wait()?), pid, served));
            }
        }
    }

    /// Answers EIO until it is told to stop.
    fn wait_given_up(mut self, stopping: bool) -> Result<Ending> {
        if !stopping {
            let mut ready = [PollFd::new(&self.stop, PollFlags::IN)];
            while let Err(rustix::io::Errno::INTR) = poll(&mut ready, None) {}
        }
        self.session.end()?;
        Err(Error::Poisoned("the engine kept dying".into()))
    }
}

fn drain(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience() -> Patience {
        Patience { unserved_deaths: 3, deaths: 6, within: Duration::from_secs(10) }
    }

    #[test]
    fn deaths_before_serving_end_patience_soon_and_others_later() {
        let (start, mut deaths) = (Instant::now(), Deaths::default());
        assert!(!deaths.count(start, false, &patience()));
        assert!(!deaths.count(start, true, &patience()));
        assert!(!deaths.count(start, false, &patience()));
        assert!(!deaths.count(start, false, &patience()));
        assert!(deaths.count(start, false, &patience()));
        let mut deaths = Deaths::default();
        let verdicts: Vec<_> = (0..6).map(|_| deaths.count(start, true, &patience())).collect();
        assert_eq!(verdicts, [false, false, false, false, false, true]);
    }

    #[test]
    fn engine_that_hands_over_ends_a_row_of_deaths_before_serving() {
        let (start, mut deaths) = (Instant::now(), Deaths::default());
        for _ in 0..10 {
            assert!(!deaths.count(start, false, &patience()));
            assert!(!deaths.count(start, false, &patience()));
            deaths.forget_unserved();
        }
        assert!(!deaths.count(start, true, &patience()));
        deaths.forget_unserved();
        assert_eq!(deaths.seen.len(), 1, "others still count");
    }

    #[test]
    fn old_deaths_are_forgotten() {
        let (start, mut deaths) = (Instant::now(), Deaths::default());
        for second in 0..100 {
            assert!(!deaths.count(start + Duration::from_secs(second * 6), false, &patience()));
        }
    }
}

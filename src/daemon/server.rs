//! The listening side of the control socket: one thread a connection, bounded in number, root only.

use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::protocol::{self, Command, Failure, Kind, Outcome, REQUEST_BYTES, Reply, Request, Response, VERSION};

/// Most connections at a time; those that ask nothing make room for further ones.
const CONNECTIONS: usize = 64;

/// How often a connection that waits for events is looked at.
const FOLLOW_MS: u64 = 500;

/// Answers a command.
pub type Handler = dyn Fn(Command) -> Result<Reply, Failure> + Send + Sync;

/// Accepts connections and answers what comes on them, for ever, on threads of its own.
///
/// # Errors
/// When the thread cannot be made.
pub fn listen(listener: UnixListener, handler: Arc<Handler>) -> io::Result<()> {
    let accept = move || {
        let seats = Arc::default();
        loop {
            match listener.accept() {
                Ok((stream, _)) => admit(stream, &seats, &handler),
                // No descriptor left, most likely: others will be closed.
                Err(error) => {
                    tracing::warn!(%error, "control socket: accept");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(accept).map(drop)
}

/// The connections that are open.
#[derive(Default)]
struct Seats(Mutex<Vec<Arc<Seat>>>);

struct Seat {
    stream: UnixStream,
    /// Since when nothing was asked. None: something is being answered.
    idle_since: Mutex<Option<Instant>>,
}

impl Seats {
    fn taken(&self) -> MutexGuard<'_, Vec<Arc<Seat>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a seat. Where all are taken, whoever has asked nothing for the longest time has to leave: a command that waits
    /// for a container holds one for days, and opens another connection when it has something to ask.
    fn take(&self, stream: UnixStream) -> Arc<Seat> {
        let seat = Arc::new(Seat { stream, idle_since: Mutex::new(None) });
        loop {
            let mut taken = self.taken();
            if taken.len() < CONNECTIONS {
                taken.push(Arc::clone(&seat));
                return seat;
            }
            let idle = taken.iter().filter_map(|seat| seat.idle_since().map(|since| (since, seat)));
            if let Some((_, seat)) = idle.min_by_key(|(since, _)| *since) {
                // What has come already is read and answered all the same.
                let _ = seat.stream.shutdown(Shutdown::Read);
            }
            drop(taken);
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn leave(&self, seat: &Arc<Seat>) {
        self.taken().retain(|other| !Arc::ptr_eq(other, seat));
    }
}

impl Seat {
    fn idle_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.idle_since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn admit(stream: UnixStream, seats: &Arc<Seats>, handler: &Arc<Handler>) {
    if let Err(error) = check_peer(&stream) {
        tracing::warn!(%error, "control socket: refused");
        return;
    }
    let seat = seats.take(stream);
    let (ours, own, handler) = (Arc::clone(seats), Arc::clone(&seat), Arc::clone(handler));
    let spawned = thread::Builder::new().name("connection".into()).spawn(move || {
        if let Err(error) = converse(&own, &*handler) {
            tracing::debug!(%error, "control connection ended");
        }
        ours.leave(&own);
    });
    if let Err(error) = spawned {
        seats.leave(&seat);
        tracing::warn!(%error, "control socket: thread");
    }
}

/// The socket's mode keeps others out already; this holds when somebody has changed it.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if peer.uid == rustix::process::geteuid() || peer.uid.is_root() {
        return Ok(());
    }
    let reason = format!("process {} of user {} is not root", peer.pid.as_raw_nonzero(), peer.uid.as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
}

/// Answers requests until the other side has no more.
fn converse(seat: &Seat, handler: &Handler) -> io::Result<()> {
    let stream = &seat.stream;
    let mut from = BufReader::new(stream);
    loop {
        *seat.idle_since() = Some(Instant::now());
        let received = protocol::receive(&mut from, REQUEST_BYTES);
        *seat.idle_since() = None;
        let request: Request = match received {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData || error.get_ref().is_some() => {
                let failure = Failure::new(Kind::InvalidInput, format!("request is not understood: {error}"));
                // What follows a line that was cut off cannot be told from the rest of it.
                protocol::send(stream, &Response { version: VERSION, outcome: Outcome::Failed(failure) })?;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let outcome = match request.command {
            Command::Events { after, wait_ms } if request.version == VERSION => {
                follow(stream, after, wait_ms, handler)?
            }
            _ => answer(request, handler),
        };
        protocol::send(stream, &Response { version: VERSION, outcome })?;
    }
}

/// Waits for events in slices: a connection that has ended meanwhile shall not keep its thread.
fn follow(stream: &UnixStream, after: u64, wait_ms: u64, handler: &Handler) -> io::Result<Outcome> {
    let mut left_ms = wait_ms;
    loop {
        let slice_ms = left_ms.min(FOLLOW_MS);
        left_ms -= slice_ms;
        let command = Command::Events { after, wait_ms: slice_ms };
        let outcome = answer(Request { version: VERSION, command }, handler);
        let nothing = matches!(&outcome, Outcome::Done(Reply::Events(told)) if told.events.is_empty() && !told.lost);
        if !nothing || left_ms == 0 {
            return Ok(outcome);
        }
        let mut ended = [PollFd::new(stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut ended, Some(&now))? > 0 {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
    }
}

fn answer(request: Request, handler: &Handler) -> Outcome {
    if request.version != VERSION {
        let theirs = request.version;
        let message = format!("daemon speaks version {VERSION} of the control protocol, not {theirs}; restart it");
        return Outcome::Failed(Failure::new(Kind::Incompatible, message));
    }
    let what = request.command.describe();
    let changes = !request.command.is_read_only() && !request.command.is_step();
    match handler(request.command) {
        Ok(reply) => {
            if changes {
                tracing::info!("{what}: done");
            }
            Outcome::Done(reply)
        }
        Err(failure) => {
            tracing::info!("{what}: {}", failure.message);
            Outcome::Failed(failure)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn served() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let handler = |command: Command| match command {
            Command::PoolInfo => Ok(Reply::Done),
            _ => Err(Failure::new(Kind::NotFound, "nothing here")),
        };
        listen(UnixListener::bind(&path).unwrap(), Arc::new(handler)).unwrap();
        (folder, path)
    }

    #[test]
    fn client_gets_answers_and_failures_over_one_connection() {
        let (_folder, path) = served();
        let client = crate::daemon::Client::connect(&path).unwrap();
        assert_eq!(client.call(Command::PoolInfo), Ok(Reply::Done));
        assert_eq!(client.call(Command::VolumeList), Err(Failure::new(Kind::NotFound, "nothing here")));
        assert_eq!(client.call(Command::PoolInfo), Ok(Reply::Done));
    }

    #[test]
    fn garbage_and_other_versions_are_answered_in_words() {
        let (_folder, path) = served();
        for (line, expected) in [
            ("{\"version\":99,\"command\":{\"command\":\"pool-info\"}}\n", "incompatible"),
            ("garbage\n", "not understood"),
            ("{\"version\":1,\"command\":{\"command\":\"no-such\"}}\n", "not understood"),
        ] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(line.as_bytes()).unwrap();
            let mut answer = String::new();
            BufReader::new(&stream).read_line(&mut answer).unwrap();
            assert!(answer.contains(expected), "{line} -> {answer}");
        }
    }

    #[test]
    fn follower_that_goes_away_ends_its_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let handler = move |command: Command| match command {
            Command::Events { wait_ms, .. } => {
                counted.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(wait_ms));
                Ok(Reply::Events(protocol::Events::default()))
            }
            _ => Ok(Reply::Done),
        };
        listen(UnixListener::bind(&path).unwrap(), Arc::new(handler)).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        let command = Command::Events { after: 0, wait_ms: u64::MAX };
        protocol::send(&mut stream, &Request { version: VERSION, command }).unwrap();
        while asked.load(Ordering::SeqCst) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(stream);
        thread::sleep(Duration::from_millis(2 * FOLLOW_MS));
        let then = asked.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(2 * FOLLOW_MS));
        assert_eq!(asked.load(Ordering::SeqCst), then, "nobody is there, and it still waits");
        // One that stays is answered when its time is over.
        let client = crate::daemon::Client::connect(&path).unwrap();
        let told = client.call(Command::Events { after: 0, wait_ms: FOLLOW_MS + 1 });
        assert_eq!(told, Ok(Reply::Events(protocol::Events::default())));
    }

    /// As the commands do that wait for a container each.
    #[test]
    fn clients_that_ask_nothing_keep_nobody_out() {
        let (_folder, path) = served();
        let connect = || crate::daemon::Client::connect(&path).unwrap();
        let clients: Vec<_> = (0..CONNECTIONS + 8).map(|_| connect()).collect();
        for _ in 0..2 {
            for client in &clients {
                assert_eq!(client.call(Command::PoolInfo), Ok(Reply::Done));
            }
        }
        // A deletion that was never heard is no success.
        let deletion = || Command::VolumeDelete { name: "nothing".into(), detach: false };
        for client in &clients {
            assert_eq!(client.call(deletion()).unwrap_err().kind, Kind::NotFound);
        }
    }

    #[test]
    fn endless_line_is_cut_off() {
        let (_folder, path) = served();
        let mut stream = UnixStream::connect(&path).unwrap();
        let chunk = vec![b'x'; 1 << 16];
        let sent = (0..64).take_while(|_| stream.write_all(&chunk).is_ok()).count();
        assert!(sent < 64, "{sent} chunks of a line without end were taken");
    }
}

//! The caller's side of a pool: commands go to the engine process of a pool in use, or are done on the file right here.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::lookup::FoundPool;
use super::offline::Offline;
use super::protocol::{
    self, Attachment, Attributes, Bytes, Command, Failure, Hello, Kind, Outcome, REQUEST_BYTES, RESPONSE_BYTES, Range,
    Reply, Request, Response, SnapshotOf, VERSION, Volume,
};
use super::start::running;
use crate::error::Error;

/// How long a client waits for a new engine process when the one it talked to died.
const SUCCESSION: Duration = Duration::from_secs(20);

/// How long a client waits for another command that works on the file.
const TURN: Duration = Duration::from_secs(10);

/// A pool that commands can be sent to. Each command is durable when [`call`](Client::call) returns.
pub struct Client(Way);

enum Way {
    Daemon(DaemonWay),
    File(Offline),
}

/// The way through a daemon's control socket.
struct DaemonWay {
    socket: PathBuf,
    /// Longest wait for an answer, where there is a bound.
    patience: Option<Duration>,
    connection: RefCell<Option<Connection>>,
}

#[derive(Debug)]
struct Connection {
    from: BufReader<UnixStream>,
    to: UnixStream,
}

impl Client {
    /// A client of the daemon that listens on `socket`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self::through(socket, None, Connection::open(socket, None)?))
    }

    /// The same, for a daemon that is asked who it is and must not be waited for without end.
    ///
    /// # Errors
    /// When nobody listens there.
    pub(crate) fn connect_for(socket: &Path, patience: Duration) -> io::Result<Self> {
        Ok(Self::through(socket, Some(patience), Connection::open(socket, Some(patience))?))
    }

    fn through(socket: &Path, patience: Option<Duration>, connection: Connection) -> Self {
        let connection = RefCell::new(Some(connection));
        Self(Way::Daemon(DaemonWay { socket: socket.to_owned(), patience, connection }))
    }

    /// A client of a pool: through its daemon when it is in use, on the file otherwise. A command that works on the file
    /// right now is waited for.
    ///
    /// # Errors
    /// [`Error::Busy`] when it does not end, or a copy of the pool is in use; and what keeps the pool from being opened.
    pub fn open(pool: &FoundPool) -> Result<Self, Error> {
        let began = Instant::now();
        loop {
            if let Some(client) = running(pool)? {
                return Ok(client);
            }
            match Offline::open(&pool.path) {
                // Another command has it, or a daemon that does not listen yet.
                Err(Error::Busy(_)) if began.elapsed() < TURN => thread::sleep(Duration::from_millis(10)),
                opened => return Ok(Self(Way::File(opened?))),
            }
        }
    }

    /// Whether a daemon does the commands.
    pub fn is_daemon(&self) -> bool {
        matches!(self.0, Way::Daemon(_))
    }

    /// Does one command.
    ///
    /// An engine process that dies meanwhile is waited for, and its successor is asked again: a creation carries the
    /// uuid of what it creates, a deletion of what is gone is done.
    ///
    /// # Errors
    /// What the engine answers, and [`Kind::Io`] when nobody answers.
    pub fn call(&self, command: Command) -> Result<Reply, Failure> {
        match &self.0 {
            Way::Daemon(way) => way.call(command),
            Way::File(file) => file.call(command),
        }
    }

    /// Who answers.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn hello(&self) -> Result<Hello, Failure> {
        match self.call(Command::Hello)? {
            Reply::Hello(hello) => Ok(hello),
            reply => Err(unexpected(&reply)),
        }
    }

    /// The volume or snapshot of that name.
    ///
    /// # Errors
    /// [`Kind::NotFound`], and as [`call`](Client::call).
    pub fn volume(&self, name: &str) -> Result<Volume, Failure> {
        self.for_volume(Command::VolumeInfo { name: name.into() })
    }

    /// All volumes and snapshots, by id.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn volumes(&self) -> Result<Vec<Volume>, Failure> {
        self.call(Command::VolumeList)?.volumes()
    }

    /// The name that a volume has now, which was `name` when it was looked at last. None: there is no such volume any more.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn name_of(&self, uuid: Uuid, name: &str) -> Result<Option<String>, Failure> {
        match self.volume(name) {
            Ok(volume) if volume.uuid == uuid => return Ok(Some(volume.name)),
            Err(failure) if failure.kind != Kind::NotFound => return Err(failure),
            _ => {}
        }
        Ok(self.volumes()?.into_iter().find(|volume| volume.uuid == uuid).map(|volume| volume.name))
    }

    /// Does a command that answers one volume.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn for_volume(&self, command: Command) -> Result<Volume, Failure> {
        self.call(command)?.volume()
    }

    /// Creates an empty volume without a quota or a reservation.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn create_volume(
        &self,
        name: &str,
        size_bytes: u64,
        sector_size: u32,
        attributes: Attributes,
    ) -> Result<Volume, Failure> {
        let (uuid, name) = (Uuid::new_v4(), name.into());
        let (quota_bytes, reservation_bytes) = (0, 0);
        self.for_volume(Command::VolumeCreate {
            uuid,
            name,
            size_bytes,
            sector_size,
            quota_bytes,
            reservation_bytes,
            attributes,
        })
    }

    /// Takes a snapshot of a volume.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn create_snapshot(&self, volume: &str, name: &str, attributes: Attributes) -> Result<Volume, Failure> {
        let (volume, name) = (volume.into(), name.into());
        self.for_volume(Command::SnapshotCreate { volume, uuid: Uuid::new_v4(), name, attributes })
    }

    /// Takes snapshots of several volumes at one instant, in the order of `wanted`: volume and name.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn create_snapshots(&self, wanted: &[(String, String)]) -> Result<Vec<Volume>, Failure> {
        let each = |(volume, name): &(String, String)| SnapshotOf {
            volume: volume.clone(),
            uuid: Uuid::new_v4(),
            name: name.clone(),
            attributes: Attributes::new(),
        };
        self.call(Command::SnapshotCreateAll { snapshots: wanted.iter().map(each).collect() })?.volumes()
    }

    /// Makes a clone of a snapshot.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn create_clone(&self, snapshot: &str, name: &str, attributes: Attributes) -> Result<Volume, Failure> {
        let (snapshot, name) = (snapshot.into(), name.into());
        self.for_volume(Command::CloneCreate { snapshot, uuid: Uuid::new_v4(), name, size_bytes: None, attributes })
    }

    /// Deletes a volume or snapshot.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn delete(&self, name: &str) -> Result<(), Failure> {
        self.call(Command::VolumeDelete { name: name.into(), detach: false }).map(drop)
    }

    /// Deletes a volume or snapshot, and takes its block device away first.
    ///
    /// # Errors
    /// As [`call`](Client::call); [`Kind::Busy`] when the device is in use.
    pub fn detach_and_delete(&self, name: &str) -> Result<(), Failure> {
        self.call(Command::VolumeDelete { name: name.into(), detach: true }).map(drop)
    }

    /// Makes a volume a block device. Only a daemon can.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn attach(&self, name: &str, read_only: bool) -> Result<Attachment, Failure> {
        self.call(Command::Attach { name: name.into(), read_only })?.attachment()
    }

    /// Undoes an attach.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn detach(&self, name: &str) -> Result<(), Failure> {
        self.call(Command::Detach { name: name.into() }).map(drop)
    }

    /// The attributes of a volume or snapshot.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn attributes(&self, name: &str) -> Result<Attributes, Failure> {
        self.call(Command::AttributesGet { name: name.into() })?.attributes()
    }

    /// Sets attributes, and deletes those without a value.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn set_attributes(&self, name: &str, changes: BTreeMap<String, Option<Bytes>>) -> Result<(), Failure> {
        self.call(Command::AttributesSet { name: name.into(), changes }).map(drop)
    }
}

impl Client {
    /// Goes through the ranges in which `to` differs from `from`, or that it has where there is no `from`, ascending.
    ///
    /// # Errors
    /// As [`call`](Client::call), and those of `each`.
    pub fn each_changed_range<E: From<Failure>>(
        &self,
        from: Option<&str>,
        to: &str,
        mut each: impl FnMut(Range) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut next_bytes = Some(0);
        // A range may be in two pages.
        let mut last: Option<Range> = None;
        while let Some(start_bytes) = next_bytes {
            let (from, to) = (from.map(str::to_owned), to.to_owned());
            let page = match self.call(Command::Diff { from, to, start_bytes })? {
                Reply::Diff(page) => page,
                reply => return Err(unexpected(&reply).into()),
            };
            // A page that does not move on would be asked for without end.
            if page.next_bytes.is_some_and(|next| next <= start_bytes) {
                let words = format!("daemon's answer does not move on from byte {start_bytes}");
                return Err(Failure::new(Kind::Io, words).into());
            }
            for range in page.ranges {
                match &mut last {
                    Some(last) if last.2 == range.2 && last.0 + last.1 == range.0 => last.1 += range.1,
                    _ => last.replace(range).map_or(Ok(()), &mut each)?,
                }
            }
            next_bytes = page.next_bytes;
        }
        last.map_or(Ok(()), each)
    }

    /// The pool's uuid, by which a daemon's socket is named: nobody is asked where that tells it.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn pool_uuid(&self) -> Result<Uuid, Failure> {
        let named = match &self.0 {
            Way::Daemon(way) => {
                way.socket.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok())
            }
            Way::File(_) => None,
        };
        named.map_or_else(|| Ok(self.hello()?.pool_uuid), Ok)
    }
}

impl DaemonWay {
    fn call(&self, command: Command) -> Result<Reply, Failure> {
        let asked_at = Instant::now();
        let deletes =
            matches!(command, Command::VolumeDelete { .. } | Command::SnapshotDelete { .. } | Command::Detach { .. });
        let request = Request { version: VERSION, command };
        let mut asked_before = false;
        loop {
            match self.ask(&request) {
                Ok(Outcome::Failed(failure)) if asked_before && deletes && failure.kind == Kind::NotFound => {
                    return Ok(Reply::Done);
                }
                Ok(Outcome::Done(reply)) => return Ok(reply),
                Ok(Outcome::Failed(failure)) => return Err(failure),
                Err(error) => {
                    *self.connection.borrow_mut() = None;
                    let gone = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
                    let broken = error.kind() == io::ErrorKind::InvalidData;
                    if gone || broken || asked_at.elapsed() >= self.patience.unwrap_or(SUCCESSION) {
                        let socket = self.socket.display();
                        return Err(Failure::new(Kind::Io, format!("daemon at {socket} does not answer: {error}")));
                    }
                    // The other side of a connection that cannot be written to has not heard the whole request.
                    let was_unheard = error.kind() == io::ErrorKind::BrokenPipe;
                    asked_before |= !was_unheard;
                    if !was_unheard {
                        thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
    }

    fn ask(&self, request: &Request) -> io::Result<Outcome> {
        let mut connection = self.connection.borrow_mut();
        let connection = match &mut *connection {
            Some(connection) => connection,
            empty => empty.insert(Connection::open(&self.socket, self.patience)?),
        };
        debug_assert!(serde_json::to_vec(request).is_ok_and(|line| (line.len() as u64) < REQUEST_BYTES));
        protocol::send(&mut connection.to, request)?;
        let response: Option<Response> = protocol::receive(&mut connection.from, RESPONSE_BYTES)?;
        Ok(response.ok_or(io::ErrorKind::UnexpectedEof)?.outcome)
    }
}

impl Connection {
    fn open(socket: &Path, patience: Option<Duration>) -> io::Result<Self> {
        let to = UnixStream::connect(socket)?;
        to.set_read_timeout(patience)?;
        Ok(Self { from: BufReader::new(to.try_clone()?), to })
    }
}

impl Reply {
    /// The volume that was asked for.
    pub(crate) fn volume(self) -> Result<Volume, Failure> {
        match self {
            Self::Volume(volume) => Ok(*volume),
            reply => Err(unexpected(&reply)),
        }
    }

    /// The volumes that were asked for.
    pub(crate) fn volumes(self) -> Result<Vec<Volume>, Failure> {
        match self {
            Self::Volumes(volumes) => Ok(volumes),
            reply => Err(unexpected(&reply)),
        }
    }

    /// The attributes that were asked for.
    pub(crate) fn attributes(self) -> Result<Attributes, Failure> {
        match self {
            Self::Attributes(attributes) => Ok(attributes),
            reply => Err(unexpected(&reply)),
        }
    }

    /// The one device that was asked for.
    pub(crate) fn attachment(self) -> Result<Attachment, Failure> {
        match self {
            Self::Attached(mut devices) if devices.len() == 1 => Ok(devices.remove(0)),
            reply => Err(unexpected(&reply)),
        }
    }
}

/// An answer of the right version and the wrong kind.
pub(crate) fn unexpected(reply: &Reply) -> Failure {
    Failure::new(Kind::Io, format!("daemon gave an answer that does not fit the question: {reply:?}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// The bound held for the first connection only, and the one after it waited for ever.
    #[test]
    fn daemon_that_never_answers_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("silent.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let client = Client::connect_for(&socket, Duration::from_millis(20)).unwrap();
        let failure = client.hello().unwrap_err();
        assert!(failure.message.contains("does not answer"), "{failure:?}");
    }
}

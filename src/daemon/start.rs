//! Starting a pool's daemon when a command needs it.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::lookup::{FoundPool, daemon_socket};
use super::{Client, places, process};
use crate::error::{Error, Result};
use crate::io::{OpenOptions, PoolFile};

/// How long a daemon may take until it answers: replay of a full journal, and the self-test of the transport.
const START: Duration = Duration::from_secs(60);

/// A client of the pool's daemon, when one runs.
///
/// # Errors
/// When it may not be used; [`Error::Busy`] when it serves a copy of the pool, which has the same uuid.
pub fn running(pool: &FoundPool) -> Result<Option<Client>> {
    let Some(socket) = daemon_socket(pool.uuid)? else { return Ok(None) };
    let client = Client::connect(&socket).map_err(|error| Error::io(socket.display().to_string(), error))?;
    match client.hello() {
        Ok(hello) if is_another_file(&hello.pool_path, &pool.path) => Err(Error::Busy(format!(
            "{} is a copy of {}, which is in use: one of them at a time can be used on one machine; stop that one first",
            pool.path.display(),
            hello.pool_path.display()
        ))),
        // An engine whose front has died takes connections to its very end, and answers none.
        Err(_) if daemon_socket(pool.uuid)?.is_none() => Ok(None),
        // One that cannot say what it serves says so to whatever it is asked next.
        _ => Ok(Some(client)),
    }
}

/// Whether two paths lead to different files, as far as can be seen from here: a daemon has mounts of its own.
fn is_another_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    identity(one).zip(identity(other)).is_some_and(|(one, other)| one != other)
}

/// Takes over a pool on a block device that another host did not leave and shows no sign of life on. Nothing is done about
/// one that is this host's, or nobody's. Answers the host that it was taken from.
///
/// # Errors
/// [`Error::Elsewhere`] when it shows one.
pub fn take_over(pool: &FoundPool) -> Result<Option<String>> {
    if running(pool)?.is_some() {
        return Ok(None);
    }
    PoolFile::claim_host(&pool.path, OpenOptions { take_over: true, ..OpenOptions::default() })
}

/// A client of the pool's daemon, which is started when it does not run.
///
/// # Errors
/// When it does not start: the last line of its log.
pub fn start(pool: &FoundPool) -> Result<Client> {
    if let Some(client) = running(pool)? {
        return Ok(client);
    }
    process::require_root("attaching and mounting")?;
    places::make_private_directory(Path::new(places::LOG_DIRECTORY))?;
    let log_path = places::log(&pool.name, pool.uuid);
    let failed = |error| Error::io(format!("{}: log of the daemon", log_path.display()), error);
    let mut log = File::options().create(true).append(true).read(true).open(&log_path).map_err(failed)?;
    let begin = log.seek(SeekFrom::End(0)).map_err(failed)?;
    let program = env::current_exe().map_err(|error| Error::io("finding the plywood program", error))?;
    let mut child = Command::new(&program)
        .arg("--pool")
        .arg(&pool.path)
        .args(["serve", "--background"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.try_clone().map_err(failed)?)
        .spawn()
        .map_err(|error| Error::io(format!("{}: starting the daemon", program.display()), error))?;
    let began = Instant::now();
    loop {
        // Connecting is not enough: the socket is there before the engine has opened the pool.
        if let Some(socket) = daemon_socket(pool.uuid)?
            && let Ok(client) = Client::connect(&socket)
            && client.hello().is_ok()
        {
            // Whoever lives longer than the daemon shall not keep it as a zombie.
            thread::spawn(move || child.wait());
            return Ok(client);
        }
        match child.try_wait() {
            // Another one was faster, or is: the next look at the socket tells.
            Ok(Some(status)) if daemon_socket(pool.uuid)?.is_none() => {
                let told = last_words(&mut log, begin).unwrap_or_else(|| format!("it ended with {status}"));
                return Err(Error::Busy(format!("daemon did not start: {told} (log: {})", log_path.display())));
            }
            Ok(_) if began.elapsed() < START => thread::sleep(Duration::from_millis(5)),
            Ok(_) => {
                let seconds = START.as_secs();
                return Err(Error::Busy(format!(
                    "daemon does not answer after {seconds} s; see {}",
                    log_path.display()
                )));
            }
            Err(error) => return Err(Error::io("waiting for the daemon", error)),
        }
    }
}

/// Why it did not start: the first line since `begin` with which one of its processes ended, or else the last of all. When
/// the engine fails, the front says so after it.
fn last_words(log: &mut File, begin: u64) -> Option<String> {
    let mut text = Vec::new();
    log.seek(SeekFrom::Start(begin)).ok()?;
    log.take(64 << 10).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let reason = text.lines().find_map(|line| line.strip_prefix("plywood: "));
    let last = || text.lines().rev().find(|line| !line.trim().is_empty());
    Some(reason.or_else(last)?.trim().to_owned())
}

/// Waits until nothing is left of a daemon that was told to stop.
///
/// # Errors
/// [`Error::Busy`] when it still answers after a minute.
pub fn wait_until_gone(front_pid: u32) -> Result<()> {
    let ended = process::wait_for_end(front_pid, START);
    if ended.map_err(|error| Error::io(format!("waiting for the daemon (process {front_pid})"), error))? {
        return Ok(());
    }
    Err(Error::Busy(format!("daemon (process {front_pid}) is still stopping; see its log")))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn last_words_are_those_of_this_start() {
        let mut log = tempfile::tempfile().unwrap();
        writeln!(log, "plywood: an older failure").unwrap();
        let begin = log.stream_position().unwrap();
        assert_eq!(last_words(&mut log, begin), None);
        log.seek(SeekFrom::End(0)).unwrap();
        write!(log, "INFO starting\nplywood: pool is truncated\nplywood: the engine did not start\n\n").unwrap();
        assert_eq!(last_words(&mut log, begin).as_deref(), Some("pool is truncated"));
    }
}

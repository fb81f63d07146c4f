//! Which pool a name or a path means, and whether a daemon serves it. Reads only.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::{Client, places};
use crate::error::{Error, Result};
use crate::format::{SUPERBLOCK_COPIES, Superblock, Unfinished, choose_superblock};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, PoolBlock};

/// How long a daemon may take to say its name.
const PATIENCE: Duration = Duration::from_secs(5);

/// A pool that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundPool {
    /// Its file, absolute and without symbolic links.
    pub path: PathBuf,
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Work on its metadata that was cut short: it can be finished, and nothing else can be done with the pool.
    pub unfinished: Option<Unfinished>,
}

/// Finds a pool. What has a `/` is a path; else it is the name of a pool in use, of an entry of
/// `/etc/plywood/pools.d`, of a pool in memory, or of a file in the current directory, in this order.
///
/// # Errors
/// [`Error::NotFound`], and those of [`identify`].
pub fn find_pool(named: &str) -> Result<FoundPool> {
    find(named, identify)
}

/// As [`find_pool`], also a pool of which work on its metadata was not finished.
///
/// # Errors
/// As [`find_pool`].
pub fn find_unfinished(named: &str) -> Result<FoundPool> {
    find(named, identify_any)
}

fn find(named: &str, identify: fn(&Path) -> Result<FoundPool>) -> Result<FoundPool> {
    if !named.contains('/') {
        if let Some(path) = daemon_paths().into_iter().find(|(name, _)| name == named).map(|(_, path)| path) {
            return identify(&path);
        }
        if let Some(path) = listed(Path::new(places::POOLS_DIRECTORY), named)? {
            return identify(&path);
        }
        let in_memory = places::path_in_memory(named);
        if in_memory.exists() {
            return identify(&in_memory);
        }
    }
    identify(Path::new(named)).map_err(|error| match error {
        Error::NotFound(_) if !named.contains('/') => Error::NotFound(format!(
            "no pool {named}: no daemon serves one of that name, {} has none, and there is no such file here; make one \
             with plywood pool create",
            places::POOLS_DIRECTORY
        )),
        error => error,
    })
}

/// The pool that a directory lists by this name: `NAME.conf` with a line `PLYWOOD_POOL=/path`, which is what the service
/// manager reads too (systemd's `EnvironmentFile=`), or a symbolic link `NAME`.
fn listed(directory: &Path, named: &str) -> Result<Option<PathBuf>> {
    let path = directory.join(format!("{named}.conf"));
    match fs::read_to_string(&path) {
        Ok(text) => pool_of_settings(&text).map(Some).ok_or_else(|| {
            Error::InvalidInput(format!("{} has no line PLYWOOD_POOL=/path/of/the/pool; add one", path.display()))
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let link = directory.join(named);
            Ok(link.exists().then_some(link))
        }
        Err(error) => Err(Error::io(path.display().to_string(), error)),
    }
}

/// What the last assignment says, as with systemd. A relative path would mean another file in each directory.
fn pool_of_settings(text: &str) -> Option<PathBuf> {
    let value = text.lines().rev().find_map(|line| line.trim_start().strip_prefix("PLYWOOD_POOL="))?.trim();
    let quoted = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
    value.starts_with('/').then(|| PathBuf::from(value))
}

/// Clients of all daemons that answer.
pub fn running_daemons() -> Vec<Client> {
    sockets().iter().filter_map(|socket| Client::connect(socket).ok()).collect()
}

/// Pool and volume of a loop device that is attached, or being attached: what its file is called says which. None for a
/// device that is not ours.
///
/// # Errors
/// When the pool's daemon does not answer, or knows no such volume.
pub fn name_of_device(device: &str) -> Result<Option<(String, String)>> {
    let path = format!("/sys/block/{device}/loop/backing_file");
    let file = match fs::read_to_string(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    let Some((pool, volume)) = places::pool_and_volume_of(Path::new(file.trim_end())) else { return Ok(None) };
    let socket = places::socket(pool);
    let failed = |error| Error::io(socket.display().to_string(), error);
    let client = Client::connect_for(&socket, PATIENCE).map_err(failed)?;
    let unanswered = |failure: super::protocol::Failure| Error::Busy(format!("pool {pool}: {}", failure.message));
    let name = client.hello().map_err(unanswered)?.pool_name;
    let volumes = client.volumes().map_err(unanswered)?;
    match volumes.into_iter().find(|known| known.id == volume) {
        Some(volume) => Ok(Some((name, volume.name))),
        None => Err(Error::NotFound(format!("pool {name} has no volume of id {volume}"))),
    }
}

/// Name and file of every pool that a daemon serves.
fn daemon_paths() -> Vec<(String, PathBuf)> {
    let hello = |socket: &PathBuf| {
        let client = Client::connect_for(socket, PATIENCE).ok()?;
        let hello = client.hello().ok()?;
        Some((hello.pool_name, hello.pool_path))
    };
    sockets().iter().filter_map(hello).collect()
}

fn sockets() -> Vec<PathBuf> {
    let entries = fs::read_dir(places::RUN_DIRECTORY).into_iter().flatten().flatten();
    let mut sockets: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "sock")).collect();
    sockets.sort();
    sockets
}

/// The control socket of a pool, when a daemon listens on it.
///
/// # Errors
/// [`Error::Io`] when it is there and may not be used, as by somebody who is not root.
pub fn daemon_socket(pool: Uuid) -> Result<Option<PathBuf>> {
    let socket = places::socket(pool);
    match UnixStream::connect(&socket) {
        Ok(_) => Ok(Some(socket)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(error) => {
            Err(Error::io(format!("{}: only root can use a pool in use; connecting", socket.display()), error))
        }
    }
}

/// Reads which pool a file or block device holds.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::InvalidInput`] for what is no pool, or a pool cut short; [`Error::Incompatible`] for a
/// newer format; [`Error::Unfinished`]; [`Error::Corrupt`]; [`Error::Io`].
pub fn identify(path: &Path) -> Result<FoundPool> {
    let found = identify_any(path)?;
    match found.unfinished {
        None => Ok(found),
        Some(what) => Err(Error::Unfinished(format!("{}: {}", path.display(), Error::from(what)))),
    }
}

fn identify_any(path: &Path) -> Result<FoundPool> {
    let shown = path.display();
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => {
            Error::NotFound(format!("{shown}: no such pool; make one with plywood pool create {shown} --size SIZE"))
        }
        io::ErrorKind::PermissionDenied => {
            Error::io(format!("{shown}: only root may open the pool; run as root"), error)
        }
        _ => Error::io(format!("{shown}: opening the pool"), error),
    };
    let path = fs::canonicalize(path).map_err(failed)?;
    let kind = fs::metadata(&path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::InvalidInput(format!("{shown} is neither a file nor a block device, so it holds no pool")));
    }
    let file = File::open(&path).map_err(failed)?;
    let size_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
    let (superblock, unfinished) = read_superblock(&file, size_bytes).map_err(|error| match error {
        Error::InvalidInput(_) => Error::InvalidInput(format!("{shown} is not a plywood pool; give another file")),
        Error::Incompatible(reason) => Error::Incompatible(format!("{shown}: {reason}")),
        error => error,
    })?;
    let needed = superblock.geometry.pool_blocks.saturating_mul(BLOCK_BYTES);
    if size_bytes < needed {
        return Err(Error::InvalidInput(format!(
            "{shown} is truncated: the pool has {needed} bytes, the file {size_bytes}; restore it from a copy"
        )));
    }
    Ok(FoundPool { path, uuid: superblock.uuid, name: superblock.name, unfinished })
}

/// The session that had the pool last, by its superblock.
///
/// # Errors
/// What keeps it from being read.
pub(super) fn last_session(path: &Path) -> Result<u128> {
    let failed = |error: io::Error| Error::io(path.display().to_string(), error);
    let file = File::open(path).map_err(failed)?;
    let size_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
    read_superblock(&file, size_bytes).map(|(superblock, _)| superblock.session)
}

fn read_superblock(file: &File, size_bytes: u64) -> Result<(Superblock, Option<Unfinished>)> {
    let unfinished = Cell::new(None);
    let read = |address: PoolBlock| {
        let mut block = vec![0; BLOCK_SIZE];
        if address.offset_bytes() + BLOCK_BYTES <= size_bytes {
            let what = || format!("reading block {address}");
            file.read_exact_at(&mut block, address.offset_bytes()).map_err(|error| Error::io(what(), error))?;
        }
        if let Some((what, superblock)) = Superblock::decode_unfinished(&block) {
            unfinished.set(Some((superblock, Some(what))));
        }
        Superblock::decode(&block)
    };
    let chosen = choose_superblock(SUPERBLOCK_COPIES.map(|slot| slot.map(read)));
    match (chosen, unfinished.take()) {
        (Err(Error::Unfinished(_)), Some(found)) => Ok(found),
        (chosen, _) => chosen.map(|chosen| (chosen.superblock, None)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_no_pool_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let missing = identify(&folder.path().join("missing")).unwrap_err();
        assert!(matches!(&missing, Error::NotFound(words) if words.contains("no such pool")), "{missing}");
        let directory = identify(folder.path()).unwrap_err();
        assert!(matches!(directory, Error::InvalidInput(_)), "{directory}");
        for content in [&b""[..], b"short", &[0xff; 3 << 20]] {
            let mut file = tempfile::NamedTempFile::new_in(&folder).unwrap();
            file.write_all(content).unwrap();
            let error = identify(file.path()).unwrap_err();
            assert!(matches!(&error, Error::InvalidInput(words) if words.contains("not a plywood pool")), "{error}");
        }
    }

    #[test]
    fn listed_pools_are_found_by_settings_and_by_link() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("plain.conf", "# a pool\nPLYWOOD_POOL=/srv/plain.pool\nPLYWOOD_SEAL_RATE=0\n");
        write("quoted.conf", "PLYWOOD_POOL=/srv/old\n  PLYWOOD_POOL=\"/srv/with space\"  \n");
        write("commented.conf", "#PLYWOOD_POOL=/srv/x\n");
        write("relative.conf", "PLYWOOD_POOL=pool\n");
        write("file", "");
        std::os::unix::fs::symlink("file", folder.path().join("link")).unwrap();
        let find = |name: &str| listed(folder.path(), name);
        assert_eq!(find("plain").unwrap().as_deref(), Some(Path::new("/srv/plain.pool")));
        assert_eq!(find("quoted").unwrap().as_deref(), Some(Path::new("/srv/with space")));
        assert_eq!(find("link").unwrap(), Some(folder.path().join("link")));
        assert_eq!(find("absent").unwrap(), None);
        for faulty in ["commented", "relative"] {
            let error = find(faulty).unwrap_err();
            assert!(matches!(&error, Error::InvalidInput(words) if words.contains("PLYWOOD_POOL=")), "{error}");
        }
    }

    #[test]
    fn name_without_pool_says_where_it_was_looked_for() {
        let error = find_pool("there-is-no-such-pool").unwrap_err();
        assert!(matches!(&error, Error::NotFound(words) if words.contains("pools.d")), "{error}");
    }
}

//! Who is making something in a pool: what is there for a moment without anything that refers to it, as the working volumes
//! of an import. Whoever makes holds a shared lock; who takes away what nothing refers to wants to be alone. The kernel
//! takes the lock of a dead process away.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use uuid::Uuid;

use super::places;
use crate::error::{Error, Result};

/// A lock that ends with its value.
#[derive(Debug)]
#[must_use]
pub struct Making {
    _file: File,
}

/// Something is being made from now on.
///
/// # Errors
/// When the lock cannot be had.
pub fn begin(pool: Uuid) -> Result<Making> {
    lock(pool, "making", FlockOperation::LockShared).map(|file| Making { _file: file })
}

/// Nothing is made while this is held. None when something is.
///
/// # Errors
/// When the lock cannot be had.
pub fn alone(pool: Uuid) -> Result<Option<Making>> {
    only(pool, "making")
}

/// This process alone does `what` for the pool, such as answering Docker. None when another does.
///
/// # Errors
/// When the lock cannot be had.
pub fn only(pool: Uuid, what: &str) -> Result<Option<Making>> {
    match lock(pool, what, FlockOperation::NonBlockingLockExclusive) {
        Ok(file) => Ok(Some(Making { _file: file })),
        Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::WOULDBLOCK.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Waits until nobody else mounts, unmounts or makes the volume of this name, and keeps others from it while it is held.
/// Names share 256 locks: whoever has one must not want another.
///
/// # Errors
/// When the lock cannot be had.
pub fn turn(pool: Uuid, name: &str) -> Result<Making> {
    let what = format!("turn-{:02x}", blake3::hash(name.as_bytes()).as_bytes()[0]);
    lock(pool, &what, FlockOperation::LockExclusive).map(|file| Making { _file: file })
}

fn lock(pool: Uuid, what: &str, how: FlockOperation) -> Result<File> {
    let directory = Path::new(places::RUN_DIRECTORY);
    places::make_private_directory(directory)?;
    let path = directory.join(format!("{pool}.{what}"));
    let failed = |error| Error::io(format!("{}: locking", path.display()), error);
    let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
    flock(&file, how).map_err(|error| failed(error.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_alone_while_something_is_made() {
        let pool = Uuid::new_v4();
        let first = match begin(pool) {
            Ok(first) => first,
            // Only root writes there.
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => return,
            Err(error) => panic!("{error}"),
        };
        let second = begin(pool).unwrap();
        assert!(alone(pool).unwrap().is_none());
        drop(first);
        assert!(alone(pool).unwrap().is_none());
        drop(second);
        // Another test's program, between fork and exec, may have it a moment longer.
        let again = std::iter::repeat_with(|| alone(pool).unwrap().is_some()).take(1000);
        let mut again = again.inspect(|_| std::thread::sleep(std::time::Duration::from_millis(10)));
        assert!(again.any(|is_alone| is_alone));
        std::fs::remove_file(Path::new(places::RUN_DIRECTORY).join(format!("{pool}.making"))).unwrap();
    }
}

//! Making a pool where nothing stands that somebody may want.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use async_executor::LocalExecutor;
use uuid::Uuid;

use super::lookup::identify;
use super::offline::reactor;
use super::protocol::{Command, Failure, Reply};
use super::{Client, protocol};
use crate::engine::{CreateOptions, JOURNAL_BYTES, Pool};
use crate::error::{Error, Result};
use crate::format::{Geometry, POOL_NAME_BYTES_MAX, check_name};
use crate::io::{FileStorage, block_on};
use crate::units::BLOCK_BYTES;

/// What pool to make, and where.
#[derive(Clone, Debug)]
pub struct NewPool {
    /// A file that is not there yet or is empty, or a block device.
    pub path: PathBuf,
    /// Size of the pool; a block device may be taken whole.
    pub size_bytes: Option<u64>,
    /// Its name; that of the file when not given.
    pub name: Option<String>,
    /// Overwrite what is there, and accept a host file system that is not fit.
    pub force: bool,
}

/// Creates a pool and answers what it is. When that fails, a file that was not there before is gone again.
///
/// # Errors
/// What is not possible, in words, before anything is changed; and what the host says.
pub fn create_pool(new: &NewPool) -> Result<protocol::Pool, Failure> {
    let name = pool_name(new)?;
    let size_bytes = pool_size(new)?;
    Geometry::new(size_bytes, JOURNAL_BYTES)?;
    let options = CreateOptions { uuid: Uuid::new_v4(), name, size_bytes, journal_bytes: JOURNAL_BYTES };
    let there_before = new.path.exists();
    if let Err(error) = write_pool(new, &options) {
        if !there_before {
            // Best effort: the reason it failed for is what counts.
            let _ = fs::remove_file(&new.path);
        }
        return Err(error.into());
    }
    match Client::open(&identify(&new.path)?)?.call(Command::PoolInfo)? {
        Reply::Pool(pool) => Ok(*pool),
        reply => Err(super::client::unexpected(&reply)),
    }
}

fn pool_name(new: &NewPool) -> Result<String> {
    let name = match &new.name {
        Some(name) => name.clone(),
        None => new.path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
    };
    if name.len() > POOL_NAME_BYTES_MAX {
        let bytes = name.len();
        return Err(Error::InvalidInput(format!(
            "pool name is {bytes} bytes long, at most {POOL_NAME_BYTES_MAX} fit; give a shorter one with --name"
        )));
    }
    let fault = |error| Error::InvalidInput(format!("name of the pool: {error}; give another with --name"));
    check_name(&name).map_err(fault)?;
    Ok(name)
}

/// The size asked for, or all of a block device.
fn pool_size(new: &NewPool) -> Result<u64> {
    let is_device = fs::metadata(&new.path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    match new.size_bytes {
        Some(size_bytes) => Ok(size_bytes),
        None if is_device => {
            let size_bytes = device_bytes(&new.path)?;
            Ok(size_bytes - size_bytes % BLOCK_BYTES)
        }
        None => Err(Error::InvalidInput("size of the pool is not given; add --size, such as --size 100G".into())),
    }
}

fn device_bytes(path: &Path) -> Result<u64> {
    let failed = |error| Error::io(format!("{}: asking for its size", path.display()), error);
    let device = File::open(path).map_err(failed)?;
    rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0)).map_err(|error| failed(error.into()))
}

fn write_pool(new: &NewPool, options: &CreateOptions) -> Result<()> {
    let reactor = reactor()?;
    let storage = FileStorage::create(&reactor, &new.path, options.size_bytes, new.force)?;
    let executor = LocalExecutor::new();
    block_on(&executor, &reactor, &(), Pool::create(&storage, options)).map_err(|error| Error::io("io_uring", error))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(path: &Path) -> NewPool {
        NewPool { path: path.to_owned(), size_bytes: Some(1 << 30), name: None, force: false }
    }

    #[test]
    fn name_comes_from_the_file_and_odd_ones_are_refused() {
        assert_eq!(pool_name(&new(Path::new("/srv/main.plywood"))).unwrap(), "main");
        for odd in ["", "a/b", "a\nb", &"x".repeat(65)] {
            assert!(pool_name(&NewPool { name: Some(odd.into()), ..new(Path::new("x")) }).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn size_is_needed_for_a_file() {
        let sizeless = NewPool { size_bytes: None, ..new(Path::new("x")) };
        assert!(matches!(pool_size(&sizeless), Err(Error::InvalidInput(_))));
        assert_eq!(pool_size(&new(Path::new("x"))).unwrap(), 1 << 30);
    }
}

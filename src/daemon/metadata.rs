//! Metadata of a pool that nobody uses, as text: dumped from the mapped file, restored through a ring.

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::path::Path;

use async_executor::LocalExecutor;
use futures_lite::future::block_on as block_on_ready;

use super::check::map;
use super::lookup::FoundPool;
use super::offline::reactor;
use super::start::running;
use crate::engine::{DumpReport, Progress, RestoreReport, dump_metadata, restore_metadata};
use crate::error::{Error, Result};
use crate::io::{FileStorage, OpenOptions, block_on};

/// Dumps a pool's metadata to `to`.
///
/// # Errors
/// [`Error::Busy`] for a pool in use; when the pool cannot be read at all, or `to` takes no more.
pub fn dump_pool(pool: &FoundPool, to: impl Write, show: &mut dyn FnMut(Progress)) -> Result<DumpReport> {
    refuse_in_use(pool, "dumped")?;
    let storage = map(pool)?;
    block_on_ready(dump_metadata(&storage, to, show))
}

/// Restores a dump to the file or device `path`, which holds the pool or a copy of it, or did before its superblocks were
/// destroyed.
///
/// # Errors
/// [`Error::Busy`] when somebody has the pool; what the dump and the file are refused for, and then nothing has changed.
pub fn restore_pool(path: &Path, dump: &Path) -> Result<RestoreReport> {
    let shown = dump.display();
    let open = || File::open(dump).map(BufReader::new).map_err(|error| Error::io(format!("opening {shown}"), error));
    if !fs::metadata(dump).is_ok_and(|kind| kind.is_file()) {
        return Err(Error::InvalidInput(format!("{shown} is no file; a dump is read twice")));
    }
    let (executor, reactor) = (LocalExecutor::new(), reactor()?);
    let storage = FileStorage::open(&reactor, path, OpenOptions::default())?;
    block_on(&executor, &reactor, &(), restore_metadata(&storage, open))
        .map_err(|error| Error::io("io_uring", error))?
}

/// A daemon's engine changes metadata all the time.
pub(super) fn refuse_in_use(pool: &FoundPool, what: &str) -> Result<()> {
    match running(pool)? {
        None => Ok(()),
        Some(_) => Err(Error::Busy(format!(
            "pool {} is in use and cannot be {what}; detach what is attached and stop it with plywood stop",
            pool.name
        ))),
    }
}

//! Repairing a pool file: a copy of it, or in place with what is written over saved to a file first.
//!
//! The file of saved blocks: 16 bytes of magic, the pool's uuid, and then for each block its number (8 bytes, little-endian)
//! and its 4096 bytes, in the order in which they were written over. Putting it back goes from the end to the start, and each
//! copy of a superblock waits until what comes before it is durable: the first and last of them say that the pool is
//! unfinished. So undoing that is cut short can be begun again, too.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use async_executor::LocalExecutor;
use rustix::fs::{SeekFrom, seek};
use uuid::Uuid;

use super::check::map;
use super::lookup::FoundPool;
use super::metadata::refuse_in_use;
use super::offline::reactor;
use crate::engine::{Progress, RepairReport, SavedBlock, repair_metadata};
use crate::error::{Error, Result};
use crate::format::{SUPERBLOCK_COPIES, Unfinished};
use crate::io::{FileStorage, OpenOptions, block_on};
use crate::units::{BLOCK_SIZE, PoolBlock};

const MAGIC: [u8; 16] = *b"plywood-saved-1\0";
const HEAD_BYTES: u64 = 32;
const ENTRY_BYTES: u64 = 8 + BLOCK_SIZE as u64;
/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// Where the repaired pool is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepairTo {
    /// In a new file; the old one stays as it is.
    New(PathBuf),
    /// Where it is; what is written over is first saved to this new file.
    InPlace(PathBuf),
}

/// Repairs a pool that nobody uses.
///
/// # Errors
/// [`Error::Busy`] when somebody has it; [`Error::AlreadyExists`] when the new file is there; what a repair is refused for.
pub fn repair_pool(pool: &FoundPool, to: &RepairTo, show: &mut dyn FnMut(Progress)) -> Result<RepairReport> {
    refuse_in_use(pool, "repaired")?;
    match to {
        RepairTo::New(path) => {
            let new = create(path)?;
            let copied = copy(pool, &new, path).and_then(|()| repair(path, None, show));
            if copied.is_err() {
                // Half a copy is of no use; the pool itself has not been touched.
                let _ = fs::remove_file(path);
            }
            copied
        }
        RepairTo::InPlace(saved) => {
            let mut file = match File::options().read(true).append(true).open(saved) {
                // What the repair that was cut short has saved goes on being saved: undoing puts back all of it.
                Ok(file) if pool.unfinished == Some(Unfinished::Repair) => SavedFile::go_on(file, saved, pool.uuid)?,
                _ => SavedFile::create(saved, pool.uuid)?,
            };
            let report = repair(&pool.path, Some(&mut file), show);
            if file.is_empty() {
                let _ = fs::remove_file(saved);
            }
            report
        }
    }
}

fn repair(path: &Path, saved: Option<&mut SavedFile>, show: &mut dyn FnMut(Progress)) -> Result<RepairReport> {
    let (executor, reactor) = (LocalExecutor::new(), reactor()?);
    let storage = FileStorage::open(&reactor, path, OpenOptions::default())?;
    let broken = |error| Error::io("io_uring", error);
    match saved {
        None => block_on(&executor, &reactor, &(), repair_metadata(&storage, None, show)).map_err(broken)?,
        Some(file) => {
            let mut save = |blocks: &[SavedBlock]| file.append(blocks);
            block_on(&executor, &reactor, &(), repair_metadata(&storage, Some(&mut save), show)).map_err(broken)?
        }
    }
}

fn create(path: &Path) -> Result<File> {
    File::options().read(true).write(true).create_new(true).open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::AlreadyExists(format!("{} is there already", path.display())),
        _ => Error::io(format!("{}: creating the file", path.display()), error),
    })
}

/// Copies what the pool's file holds; holes stay holes. Nobody opens it meanwhile.
fn copy(pool: &FoundPool, to: &File, to_path: &Path) -> Result<()> {
    let _claimed = map(pool)?;
    let from = File::open(&pool.path).map_err(|error| Error::io(pool.path.display().to_string(), error))?;
    copy_data(&from, to)
        .map_err(|error| Error::io(format!("copying {} to {}", pool.path.display(), to_path.display()), error))
}

fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let end = seek(from, SeekFrom::End(0))?;
    to.set_len(end)?;
    let mut buffer = vec![0; COPY_BYTES as usize];
    let mut offset = 0;
    while offset < end {
        let data = match seek(from, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(from, SeekFrom::Hole(data))?;
        offset = data;
        while offset < hole {
            let part = (hole - offset).min(COPY_BYTES) as usize;
            from.read_exact_at(&mut buffer[..part], offset)?;
            to.write_all_at(&buffer[..part], offset)?;
            offset += part as u64;
        }
    }
    to.sync_all()
}

/// Blocks as they were before they were written over.
struct SavedFile {
    file: File,
    path: PathBuf,
    blocks: u64,
}

impl SavedFile {
    fn create(path: &Path, pool: Uuid) -> Result<Self> {
        let mut file = create(path)?;
        let head = [&MAGIC[..], pool.as_bytes()].concat();
        let written = file.write_all(&head).and_then(|()| file.sync_all());
        written.map_err(|error| Error::io(format!("{}: saving blocks", path.display()), error))?;
        Ok(Self { file, path: path.to_owned(), blocks: 0 })
    }

    /// Goes on with a file of blocks of the same pool.
    fn go_on(file: File, path: &Path, pool: Uuid) -> Result<Self> {
        let blocks = read_head(&file, path, Some(pool))?;
        let cut = file.set_len(HEAD_BYTES + blocks * ENTRY_BYTES);
        cut.map_err(|error| Error::io(format!("{}: saving blocks", path.display()), error))?;
        Ok(Self { file, path: path.to_owned(), blocks })
    }

    fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Durable when this returns.
    fn append(&mut self, blocks: &[SavedBlock]) -> Result<()> {
        let mut bytes = Vec::with_capacity(blocks.len() * ENTRY_BYTES as usize);
        for (address, content) in blocks {
            bytes.extend_from_slice(&address.0.to_le_bytes());
            bytes.extend_from_slice(content);
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::io(format!("{}: saving blocks", self.path.display()), error))?;
        self.blocks += blocks.len() as u64;
        Ok(())
    }
}

/// Puts back what a repair in place has written over. Answers the number of blocks.
///
/// # Errors
/// [`Error::InvalidInput`] for a file that is none of saved blocks, or of another pool; [`Error::Busy`]; [`Error::Io`].
pub fn undo_repair(path: &Path, pool: Option<Uuid>, saved: &Path) -> Result<u64> {
    let failed = |error| Error::io(format!("{}: reading saved blocks", saved.display()), error);
    let file = File::open(saved).map_err(failed)?;
    let entries = read_head(&file, saved, pool)?;
    let (executor, reactor) = (LocalExecutor::new(), reactor()?);
    let storage = FileStorage::open(&reactor, path, OpenOptions::default())?;
    block_on(&executor, &reactor, &(), put_back(&storage, &file, entries))
        .map_err(|error| Error::io("io_uring", error))?
}

/// Reads whose blocks were saved. Answers how many.
fn read_head(file: &File, path: &Path, pool: Option<Uuid>) -> Result<u64> {
    let shown = path.display();
    let failed = |error| Error::io(format!("{shown}: reading saved blocks"), error);
    let mut head = [0; HEAD_BYTES as usize];
    let len = file.metadata().map_err(failed)?.len();
    if len < HEAD_BYTES {
        return Err(Error::InvalidInput(format!("{shown} holds no saved blocks")));
    }
    file.read_exact_at(&mut head, 0).map_err(failed)?;
    let (magic, uuid) = head.split_at(MAGIC.len());
    if magic != MAGIC || pool.is_some_and(|pool| pool.as_bytes() != uuid) {
        return Err(Error::InvalidInput(format!("{shown} holds no saved blocks of this pool")));
    }
    // An entry that was cut short belongs to a block that was not written any more.
    Ok((len - HEAD_BYTES) / ENTRY_BYTES)
}

async fn put_back(storage: &FileStorage, file: &File, entries: u64) -> Result<u64> {
    use crate::engine::{Memory, Storage};
    for number in (0..entries).rev() {
        let mut entry = vec![0; ENTRY_BYTES as usize];
        let read = file.read_exact_at(&mut entry, HEAD_BYTES + number * ENTRY_BYTES);
        read.map_err(|error| Error::io("reading saved blocks", error))?;
        let (address, content) = entry.split_at(8);
        let address = PoolBlock(address.try_into().map_or(u64::MAX, u64::from_le_bytes));
        if address.0 >= storage.size_bytes() / BLOCK_SIZE as u64 {
            return Err(Error::InvalidInput(format!("the saved block {address} is beyond the end of the pool")));
        }
        let memory = storage.allocate(BLOCK_SIZE);
        memory.write(0, content);
        let offset = address.offset_bytes();
        let written = if SUPERBLOCK_COPIES.into_iter().flatten().any(|copy| copy == address) {
            storage.flush().await.map_err(|error| Error::io("flush of the pool", error))?;
            storage.write_durable(offset, &memory).await
        } else {
            storage.write(offset, &memory).await
        };
        written.map_err(|error| Error::io(format!("write of pool block {address}"), error))?;
    }
    storage.flush().await.map_err(|error| Error::io("flush of the pool", error))?;
    Ok(entries)
}

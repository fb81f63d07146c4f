//! A pool in a file of its own folder, opened anew for each step.

use std::path::{Path, PathBuf};

use async_executor::LocalExecutor;
use plywood::engine::{
    self, CreateOptions, NewClone, NewSnapshot, NewVolume, Pool, PrivateLog, VolumeHandle, VolumeInfo,
};
use plywood::error::Result;
use plywood::io::{FileStorage, IoMemory, OpenOptions, Reactor, ReactorOptions, block_on};
use plywood::units::VolumeId;
use uuid::Uuid;

pub const MIB: u64 = 1 << 20;

/// How a step leaves the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Closed, with a checkpoint.
    Closed,
    /// Committed and dropped: the next opening replays the journal.
    Dropped,
}

/// The file, and the folder that goes with it.
pub struct FilePool {
    folder: tempfile::TempDir,
}

impl FilePool {
    /// Creates a pool of `size_bytes`. /var/tmp, because /tmp may be memory, which has no direct I/O everywhere.
    pub fn create(size_bytes: u64) -> Self {
        let folder = tempfile::Builder::new().prefix("plywood-test-").tempdir_in("/var/tmp").expect("a folder");
        let pool = Self { folder };
        let options = CreateOptions { uuid: Uuid::new_v4(), name: "test".into(), size_bytes, journal_bytes: 4 * MIB };
        let (executor, reactor) = (LocalExecutor::new(), reactor());
        let storage = FileStorage::create(&reactor, &pool.path(), size_bytes, false).expect("the file");
        block_on(&executor, &reactor, &(), Pool::create(&storage, &options)).expect("the ring").expect("the pool");
        pool
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("pool")
    }

    /// Opens the pool, does `work` with it, and leaves it as `ending` says. After `work` the pool is sound.
    pub fn step<T>(&self, ending: Ending, work: impl AsyncFnOnce(&Pool<FileStorage>) -> T) -> T {
        let (executor, reactor) = (LocalExecutor::new(), reactor());
        let storage = FileStorage::open(&reactor, &self.path(), OpenOptions::default()).expect("the file");
        let log = Box::new(PrivateLog::new(Uuid::new_v4().as_u128()));
        let all = async {
            let pool = Pool::open(storage, log, engine::OpenOptions::default()).await.expect("the pool opens");
            let background = pool.clone();
            let task = executor.spawn(async move { background.run().await });
            let done = work(&pool).await;
            // A check writes a checkpoint, so one that is to be dropped in the middle has none.
            if ending == Ending::Closed {
                let report = pool.check().await.expect("a check");
                assert!(report.faults.is_empty(), "{:#?}", report.faults);
                pool.close().await.expect("closing");
                task.await;
            } else {
                pool.commit().await.expect("a commit");
            }
            done
        };
        block_on(&executor, &reactor, &(), all).expect("the ring")
    }

    /// Opens, checks and closes: after a step that was dropped, this replays it.
    pub fn sound(&self) {
        self.step(Ending::Closed, async |_| ());
    }
}

pub fn reactor() -> Reactor {
    Reactor::new(ReactorOptions::default()).expect("an io_uring")
}

pub fn new_volume(name: &str, size_bytes: u64) -> NewVolume {
    NewVolume {
        uuid: Uuid::new_v4(),
        name: name.into(),
        size_bytes,
        sector_size: 512,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 1,
        attributes: Default::default(),
    }
}

pub fn new_snapshot(name: &str) -> NewSnapshot {
    NewSnapshot { uuid: Uuid::new_v4(), name: name.into(), created: 2, attributes: Default::default() }
}

pub fn new_clone(name: &str) -> NewClone {
    NewClone { uuid: Uuid::new_v4(), name: name.into(), created: 3, size_bytes: None, attributes: Default::default() }
}

/// Writes `length` bytes that follow from `seed`.
pub async fn write(volume: &VolumeHandle<FileStorage>, offset: u64, length: usize, seed: u64) -> Result<()> {
    volume.write(offset, &IoMemory::from_bytes(&bytes_of(seed, length)), false).await.map(drop)
}

/// Reads `length` bytes.
pub async fn read(pool: &Pool<FileStorage>, volume: VolumeId, offset: u64, length: usize) -> Vec<u8> {
    let handle = pool.open_volume(volume, true).expect("a handle");
    let memory = IoMemory::zeroed(length);
    handle.read(offset, &memory).await.expect("a read");
    memory.to_vec()
}

pub fn bytes_of(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

pub fn by_name(pool: &Pool<FileStorage>, name: &str) -> VolumeInfo {
    pool.volume(name).expect("a volume of this name")
}

/// The pool file as bytes, for saying that it has not changed.
pub fn file_digest(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(path).expect("the file");
    std::io::copy(&mut std::io::BufReader::with_capacity(1 << 20, file), &mut hasher).expect("reading it");
    hasher.finalize()
}

//! Golden pools: the file that one is kept in, and what is said of its content beside it.
//!
//! The file is zstd over the blocks that are not all zero, each as its number (eight bytes, little-endian) and its bytes;
//! the description is JSON.

use std::collections::BTreeMap;
use std::io;

use async_executor::LocalExecutor;
use plywood::engine::{Memory, OpenOptions, Pool, PrivateLog, Storage};
use plywood::error::Result;
use plywood::io::{IoMemory, MemoryStorage};
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};
use serde::{Deserialize, Serialize};

/// What a golden pool holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Golden {
    /// Bytes of the pool file.
    pub size_bytes: u64,
    /// The pool's uuid.
    pub uuid: String,
    /// Changes that are in its journal only.
    pub records_replayed: u64,
    /// Carcasses that wait in it.
    pub carcasses_resumed: u64,
    /// Its volumes by id.
    pub volumes: Vec<GoldenVolume>,
}

/// What a volume of it holds, when no carcass waits any more: the fields of `VolumeInfo`, and digests.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GoldenVolume {
    pub id: u64,
    pub uuid: String,
    pub name: String,
    pub size_bytes: u64,
    pub sector_size: u32,
    pub snapshot: bool,
    pub protected: bool,
    pub origin: Option<u64>,
    pub depth: u32,
    pub own_bytes: u64,
    pub mapped_bytes: u64,
    pub quota_bytes: u64,
    pub created: u64,
    /// Attributes, their values as BLAKE3.
    pub attributes: BTreeMap<String, String>,
    /// BLAKE3 over number and content of all blocks that are not all zero.
    pub content: String,
    /// Of a sealed snapshot.
    pub digest: Option<String>,
}

/// The pool that `file` keeps, of `size_bytes`.
pub fn unpack(file: &[u8], size_bytes: u64) -> io::Result<MemoryStorage> {
    let plain = zstd::decode_all(file)?;
    let storage = MemoryStorage::new(size_bytes);
    for piece in plain.chunks(8 + BLOCK_SIZE) {
        let (number, content) = piece.split_at_checked(8).ok_or(io::ErrorKind::UnexpectedEof)?;
        let block = u64::from_le_bytes(number.try_into().map_err(|_| io::ErrorKind::UnexpectedEof)?);
        futures_lite::future::block_on(storage.write(block * BLOCK_BYTES, &IoMemory::from_bytes(content)))?;
    }
    Ok(storage)
}

/// Opens the pool on `storage` and does `work` beside its background tasks.
pub fn with_pool<T>(storage: &MemoryStorage, session: u128, work: impl AsyncFnOnce(&Pool<MemoryStorage>) -> T) -> T {
    let executor = LocalExecutor::new();
    futures_lite::future::block_on(executor.run(async {
        let log = Box::new(PrivateLog::new(session));
        let pool = Pool::open(storage.clone(), log, OpenOptions::default()).await.expect("the pool opens");
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let done = work(&pool).await;
        drop(task);
        done
    }))
}

/// What a pool holds. Waits until no carcass is left.
pub async fn describe(pool: &Pool<MemoryStorage>, size_bytes: u64) -> Result<Golden> {
    let counters = pool.counters();
    pool.settle().await?;
    let mut volumes = Vec::new();
    for info in pool.volumes() {
        let attributes = pool.attributes(info.id).await?.into_iter();
        volumes.push(GoldenVolume {
            id: info.id.0,
            uuid: info.uuid.to_string(),
            size_bytes: info.size_bytes,
            sector_size: info.sector_size,
            snapshot: info.read_only,
            protected: info.protected,
            origin: info.origin.map(|origin| origin.id.0),
            depth: info.depth,
            own_bytes: info.own_bytes,
            mapped_bytes: info.mapped_bytes,
            quota_bytes: info.quota_bytes,
            created: info.created,
            attributes: attributes.map(|(key, value)| (key, blake3::hash(&value).to_string())).collect(),
            content: content(pool, info.id).await?,
            digest: info.digest.map(|digest| blake3::Hash::from_bytes(digest).to_string()),
            name: info.name,
        });
    }
    Ok(Golden {
        size_bytes,
        uuid: pool.info().uuid.to_string(),
        records_replayed: counters.records_replayed,
        carcasses_resumed: counters.carcasses_resumed,
        volumes,
    })
}

async fn content(pool: &Pool<MemoryStorage>, id: VolumeId) -> Result<String> {
    let handle = pool.open_volume(id, true)?;
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0;
    while let Some(data) = handle.seek(offset, true).await? {
        let memory = IoMemory::zeroed(BLOCK_SIZE.min((handle.size_bytes() - data) as usize));
        handle.read(data, &memory).await?;
        let mut bytes = vec![0; memory.len()];
        memory.read(0, &mut bytes);
        if bytes.iter().any(|byte| *byte != 0) {
            hasher.update(&(data / BLOCK_BYTES).to_le_bytes());
            hasher.update(&bytes);
        }
        offset = data + BLOCK_BYTES;
    }
    Ok(hasher.finalize().to_string())
}

//! Makes the golden pool of the format's present version: `make_fixture DIRECTORY` (`tools/make-fixture`).
//!
//! It holds one of everything: volumes of both sector sizes and several heights, a chain of snapshots and clones, one that
//! was rolled back, attributes of several blocks, a quota, a protected and two sealed snapshots; trees that wait to be taken apart;
//! and a journal with each kind of record, as a power cut left it. The engine draws no random numbers, so the same
//! build makes the same bytes.

#[path = "../tests/support/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use plywood::engine::{CreateOptions, Memory, NewClone, NewSnapshot, NewVolume, Pace, Pool};
use plywood::format::FORMAT_VERSION;
use plywood::io::{IoMemory, MemoryImage, MemoryStorage};
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
/// Of compression: the files are made once.
const LEVEL: i32 = 19;
const POOL_BYTES: u64 = 192 * MIB;
/// Leaves of the volumes that become carcasses.
const LEAVES: u64 = 150;

type Volumes = Pool<MemoryStorage>;

fn main() -> Result<()> {
    let directory = PathBuf::from(std::env::args_os().nth(1).context("usage: make_fixture DIRECTORY")?);
    let base = directory.join(format!("pool-v{FORMAT_VERSION}"));
    let (file, description) = (base.with_extension("zst"), base.with_extension("json"));
    ensure!(!file.exists(), "{}: is there; the fixture of a released version never changes", file.display());
    let storage = MemoryStorage::new(POOL_BYTES);
    let options = CreateOptions {
        uuid: Uuid::from_u128(0x706c_7977_6f6f_6400),
        name: "golden".into(),
        size_bytes: POOL_BYTES,
        journal_bytes: MIB,
    };
    futures_lite::future::block_on(Pool::create(&storage, &options))?;
    golden::with_pool(&storage, 1, async |pool| -> Result<()> {
        fill(pool).await?;
        leave_carcasses(pool).await?;
        pool.checkpoint().await?;
        change(pool).await?;
        Ok(pool.commit().await?)
    })?;
    let packed = pack(&storage.snapshot_image());
    let storage = golden::unpack(&packed, POOL_BYTES)?;
    let golden = golden::with_pool(&storage, 2, async |pool| golden::describe(pool, POOL_BYTES).await)?;
    ensure!(golden.records_replayed > 0 && golden.carcasses_resumed > 0, "journal or carcasses are missing");
    std::fs::write(&file, &packed)?;
    let mut text = serde_json::to_string_pretty(&golden)?;
    text.push('\n');
    std::fs::write(&description, text)?;
    println!("{}: {} bytes", file.display(), packed.len());
    Ok(())
}

/// The file of a pool, as `golden::unpack` reads it.
fn pack(image: &MemoryImage) -> Vec<u8> {
    let mut plain = Vec::new();
    for block in image.written_blocks() {
        let mut bytes = [0; BLOCK_SIZE];
        image.read(block * BLOCK_BYTES, &mut bytes);
        if bytes.iter().any(|byte| *byte != 0) {
            plain.extend_from_slice(&block.to_le_bytes());
            plain.extend_from_slice(&bytes);
        }
    }
    zstd::encode_all(plain.as_slice(), LEVEL).expect("memory takes it")
}

fn new_volume(number: u64, size_bytes: u64) -> NewVolume {
    NewVolume {
        uuid: Uuid::from_u128(u128::from(number)),
        name: format!("volume-{number}"),
        size_bytes,
        sector_size: 4096,
        quota_bytes: 0,
        reservation_bytes: 0,
        created: 1_800_000_000_000_000_000 + number,
        attributes: BTreeMap::new(),
    }
}

fn new_snapshot(number: u64) -> NewSnapshot {
    let NewVolume { uuid, name, created, attributes, .. } = new_volume(number, 0);
    NewSnapshot { uuid, name, created, attributes }
}

fn new_clone(number: u64) -> NewClone {
    let NewVolume { uuid, name, created, attributes, .. } = new_volume(number, 0);
    NewClone { uuid, name, created, attributes, size_bytes: None }
}

/// Writes `count` blocks, each with bytes of its own.
async fn write(pool: &Volumes, id: VolumeId, block: u64, count: u64, mark: u8) -> Result<()> {
    let handle = pool.open_volume(id, false)?;
    let memory = IoMemory::zeroed(count as usize * BLOCK_SIZE);
    for index in 0..count {
        let text = format!("volume {id} block {} mark {mark}\n", block + index);
        memory.write(index as usize * BLOCK_SIZE, &text.as_bytes().repeat(BLOCK_SIZE / 64));
    }
    drop(handle.write(block * BLOCK_SIZE as u64, &memory, false).await?);
    Ok(())
}

async fn fill(pool: &Volumes) -> Result<()> {
    let mut first = new_volume(1, 1 << 30);
    first.attributes.insert("org.example.configuration".into(), b"{\"text\":\"0123456789\"}".repeat(500));
    first.attributes.insert("label".into(), b"one".to_vec());
    let first = pool.create_volume(first).await?.id;
    let second = pool.create_volume(NewVolume { quota_bytes: 8 * MIB, ..new_volume(2, MIB) }).await?.id;
    let high = pool.create_volume(NewVolume { sector_size: 512, ..new_volume(3, 1 << 40) }).await?.id;
    for block in [0, 3, 255, 256, 700, 65_535, 65_536, 70_000] {
        write(pool, first, block, 2, 1).await?;
    }
    write(pool, second, 0, 128, 1).await?;
    write(pool, high, (1 << 28) - 1, 1, 1).await?;
    let snapshot = pool.create_snapshot(first, new_snapshot(4)).await?.id;
    let clone = pool.create_clone(snapshot, new_clone(5)).await?.id;
    write(pool, clone, 3, 1, 2).await?;
    write(pool, clone, 1000, 20, 2).await?;
    let handle = pool.open_volume(clone, false)?;
    drop(handle.discard(255 * 4096, 8192).await?);
    drop(handle);
    pool.protect_volume(snapshot, true).await?;
    let layer = pool.create_snapshot(clone, new_snapshot(6)).await?.id;
    write(pool, clone, 5, 1, 3).await?;
    pool.roll_back(clone, layer, Some(new_snapshot(7))).await?;
    write(pool, first, 0, 1, 4).await?;
    for sealed in [snapshot, layer] {
        pool.seal(sealed, Pace::Full).await?;
    }
    Ok(())
}

/// A deleted volume, a large discard, and a shrunk volume whose tree a snapshot holds too.
async fn leave_carcasses(pool: &Volumes) -> Result<()> {
    let mut ids = Vec::new();
    for number in [10, 11, 12] {
        let id = pool.create_volume(new_volume(number, 1 << 30)).await?.id;
        for leaf in 0..LEAVES {
            write(pool, id, leaf * 256, 1, 5).await?;
        }
        ids.push(id);
    }
    pool.create_snapshot(ids[2], new_snapshot(13)).await?;
    pool.checkpoint().await?;
    pool.resize_volume(ids[2], MIB).await?;
    pool.delete_volume(ids[0]).await?;
    // Last: the worker begins when a change is durable, and the checkpoint that makes this one so holds it whole.
    let handle = pool.open_volume(ids[1], false)?;
    drop(handle.discard(4096, (1 << 30) - 4096).await?);
    Ok(())
}

/// One of each kind of record.
async fn change(pool: &Volumes) -> Result<()> {
    let id = |number: u64| pool.volume(&format!("volume-{number}")).map(|info| info.id);
    let created = pool.create_volume(new_volume(20, 64 * MIB)).await?.id;
    write(pool, created, 5, 3, 6).await?;
    let handle = pool.open_volume(created, false)?;
    drop(handle.discard(6 * 4096, 4096).await?);
    drop(handle);
    pool.set_attributes(created, BTreeMap::from([("key".to_owned(), Some(b"value".to_vec()))])).await?;
    let snapshot = pool.create_snapshot(created, new_snapshot(21)).await?.id;
    write(pool, created, 5, 1, 7).await?;
    pool.roll_back(created, snapshot, None).await?;
    pool.create_clone(snapshot, new_clone(22)).await?;
    pool.rename_volume(id(22)?, "renamed").await?;
    pool.resize_volume(id(2)?, MIB / 4).await?;
    Ok(pool.delete_volume(id(3)?).await?)
}

//! A small model of a pool: what each block of each volume may hold. It has no idea of sharing.
//!
//! A block's content is the number of the operation that wrote it; none is zeros. Beside what is durable stands what was
//! written over it and not flushed: a power cut may leave any of them, a process death only the last.

use std::collections::BTreeMap;

use plywood::engine::{Memory, Pool, Storage, VolumeHandle};
use plywood::error::Error;
use plywood::io::IoMemory;
use plywood::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId};
use uuid::Uuid;

use crate::fields::Fields;
use crate::samples::{new_clone, new_snapshot, new_volume};
use crate::session::{Session, Stopped};
use crate::storage::FuzzStorage;

/// Size of the volumes: three heights of tree are met within it.
const SIZE_BYTES: u64 = 1 << 30;
/// Where operations begin: at the borders of leaves and nodes, and near enough for them to meet.
const PLACES: [u64; 16] =
    [0, 1, 3, 7, 254, 255, 256, 257, 260, 511, 512, 65_534, 65_535, 65_536, 65_540, SIZE_BYTES / BLOCK_BYTES - 8];
/// Volumes at a time.
const VOLUMES_MAX: usize = 8;

/// Who wrote a block: none for zeros.
type Content = Option<u32>;

/// What a block may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Versions {
    durable: Content,
    later: Vec<Content>,
}

impl Versions {
    fn last(&self) -> Content {
        self.later.last().copied().unwrap_or(self.durable)
    }

    fn allows(&self, content: Content, power_cut: bool) -> bool {
        if power_cut { self.durable == content || self.later.contains(&content) } else { self.last() == content }
    }
}

#[derive(Clone, Debug)]
struct Volume {
    id: VolumeId,
    uuid: Uuid,
    is_snapshot: bool,
    blocks: BTreeMap<u64, Versions>,
    /// What a call that did not answer may have made of some blocks.
    unanswered: BTreeMap<u64, Vec<Content>>,
}

impl Volume {
    fn put(&mut self, first: u64, count: u64, content: Content) {
        for block in first..first + count {
            self.blocks.entry(block).or_default().later.push(content);
        }
    }

    fn flush(&mut self) {
        for versions in self.blocks.values_mut() {
            *versions = Versions { durable: versions.last(), later: Vec::new() };
        }
    }

    /// What becomes of a snapshot or rollback: these contents, durable.
    fn copy(&self) -> BTreeMap<u64, Versions> {
        let mut copy = self.clone();
        copy.flush();
        copy.blocks
    }
}

/// What a call that did not answer was about.
#[derive(Clone, Debug)]
enum Unanswered {
    Nothing,
    /// This volume may be there; its id is not known.
    Created(Volume),
    Deleted(VolumeId),
}

/// The model, and the counter that names operations.
#[derive(Clone, Debug)]
pub struct Model {
    volumes: Vec<Volume>,
    unanswered: Unanswered,
    operations: u32,
    /// There was a power cut since it was compared.
    after_cut: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self { volumes: Vec::new(), unanswered: Unanswered::Nothing, operations: 0, after_cut: false }
    }
}

/// Kinds of operations, as the first byte of one says.
const KINDS: u8 = 12;

/// An operation of four bytes: kind, volume, place, length.
pub fn operation(kind: u8, volume: u8, place: u8, length: u8) -> [u8; 4] {
    [kind, volume, place, length]
}

/// Takes a full pool for what it is, and nothing else for an answer.
fn done<T>(outcome: Result<T, Error>) -> Option<T> {
    match outcome {
        Ok(value) => Some(value),
        Err(Error::NoSpace(_) | Error::Busy(_)) => None,
        Err(error) => panic!("an operation on a sound pool failed: {error}"),
    }
}

impl Model {
    /// Does one operation, on the pool and here.
    ///
    /// # Errors
    /// The storage stopped before it was answered; [`compare`](Self::compare) takes both outcomes then.
    ///
    /// # Panics
    /// When the engine refuses what it should not.
    pub fn step(
        &mut self,
        session: &Session,
        pool: &Pool<FuzzStorage>,
        storage: &FuzzStorage,
        input: &mut Fields<'_>,
    ) -> Result<(), Stopped> {
        let [kind, volume, place, length] = input.array();
        self.operations += 1;
        let number = self.operations;
        let call = pool.clone();
        let chosen = usize::from(volume).checked_rem(self.volumes.len());
        let room = self.volumes.len() < VOLUMES_MAX;
        let (Some(chosen), true) = (chosen, kind % KINDS > 0) else {
            return if room { self.create(session, pool, number) } else { Ok(()) };
        };
        let id = self.volumes[chosen].id;
        let is_snapshot = self.volumes[chosen].is_snapshot;
        let first = PLACES[usize::from(place) % PLACES.len()];
        let count = u64::from(length % 8) + 1;
        match kind % KINDS {
            1..=4 if !is_snapshot => {
                let content = if kind % KINDS < 4 { Some(number) } else { None };
                let durable = length & 0x80 != 0;
                self.unanswered_blocks(chosen, first, count, content);
                let (handle, memory) = (open(pool, id, false), pattern(storage, content, count));
                let is_discard = length & 0x40 != 0;
                let changed = session.run(async move {
                    let (offset, len) = (first * BLOCK_BYTES, count * BLOCK_BYTES);
                    match content {
                        Some(_) => handle.write(offset, &memory, durable).await.map(drop),
                        None if is_discard => handle.discard(offset, len).await.map(drop),
                        None => handle.write_zeroes(offset, len, false).await.map(drop),
                    }
                })?;
                self.volumes[chosen].unanswered.clear();
                if done(changed).is_some() {
                    self.volumes[chosen].put(first, count, content);
                    if durable && content.is_some() {
                        // FUA covers its own write, and what came before it of this volume.
                        self.volumes[chosen].flush();
                    }
                }
            }
            5 => {
                let handle = open(pool, id, true);
                if done(session.run(async move { handle.flush().await })?).is_some() {
                    self.volumes[chosen].flush();
                }
            }
            6 if room => {
                let copied = Volume {
                    uuid: new_snapshot(number.into()).uuid,
                    is_snapshot: true,
                    ..self.volumes[chosen].clone()
                };
                self.unanswered = Unanswered::Created(copied);
                let made = session.run(async move { call.create_snapshot(id, new_snapshot(number.into())).await })?;
                if let Some(info) = done(made) {
                    self.volumes[chosen].flush();
                    let blocks = self.volumes[chosen].copy();
                    self.add(info.id, info.uuid, true, blocks);
                }
            }
            7 if room && is_snapshot => {
                let uuid = new_clone(number.into()).uuid;
                self.unanswered =
                    Unanswered::Created(Volume { uuid, is_snapshot: false, ..self.volumes[chosen].clone() });
                let made = session.run(async move { call.create_clone(id, new_clone(number.into())).await })?;
                if let Some(info) = done(made) {
                    let blocks = self.volumes[chosen].copy();
                    self.add(info.id, info.uuid, false, blocks);
                }
            }
            8 => {
                self.unanswered = Unanswered::Deleted(id);
                if done(session.run(async move { call.delete_volume(id).await })?).is_some() {
                    self.volumes.remove(chosen);
                }
            }
            9 => {
                let snapshot = usize::from(place) % self.volumes.len();
                if !is_snapshot && self.volumes[snapshot].is_snapshot {
                    self.roll_back(session, pool, chosen, snapshot)?;
                }
            }
            10 => done(session.run(async move { call.checkpoint().await })?).unwrap_or_default(),
            _ => (0..length % 8).for_each(|_| session.tick()),
        }
        self.unanswered = Unanswered::Nothing;
        Ok(())
    }

    fn create(&mut self, session: &Session, pool: &Pool<FuzzStorage>, number: u32) -> Result<(), Stopped> {
        let new = new_volume(number.into(), SIZE_BYTES);
        self.unanswered = Unanswered::Created(Volume {
            id: VolumeId(0),
            uuid: new.uuid,
            is_snapshot: false,
            blocks: BTreeMap::new(),
            unanswered: BTreeMap::new(),
        });
        let call = pool.clone();
        if let Some(info) = done(session.run(async move { call.create_volume(new).await })?) {
            self.add(info.id, info.uuid, false, BTreeMap::new());
        }
        self.unanswered = Unanswered::Nothing;
        Ok(())
    }

    fn roll_back(
        &mut self,
        session: &Session,
        pool: &Pool<FuzzStorage>,
        volume: usize,
        snapshot: usize,
    ) -> Result<(), Stopped> {
        let blocks = self.volumes[snapshot].copy();
        let known: Vec<u64> = self.volumes[volume].blocks.keys().chain(blocks.keys()).copied().collect();
        for block in known {
            let after = blocks.get(&block).map_or(None, Versions::last);
            self.unanswered_blocks(volume, block, 1, after);
        }
        let (call, to, from) = (pool.clone(), self.volumes[volume].id, self.volumes[snapshot].id);
        let rolled = session.run(async move { call.roll_back(to, from, None).await })?;
        self.volumes[volume].unanswered.clear();
        match rolled {
            // The snapshot is of another volume.
            Err(Error::InvalidInput(_)) => {}
            other => {
                if done(other).is_some() {
                    self.volumes[volume].blocks = blocks;
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, id: VolumeId, uuid: Uuid, is_snapshot: bool, blocks: BTreeMap<u64, Versions>) {
        self.volumes.push(Volume { id, uuid, is_snapshot, blocks, unanswered: BTreeMap::new() });
    }

    fn unanswered_blocks(&mut self, volume: usize, first: u64, count: u64, content: Content) {
        for block in first..first + count {
            self.volumes[volume].unanswered.entry(block).or_default().push(content);
        }
    }

    /// The pool was closed: all is durable.
    pub fn closed(&mut self) {
        self.volumes.iter_mut().for_each(Volume::flush);
    }

    /// The power was cut: what was not flushed may be lost.
    pub fn power_cut(&mut self) {
        self.after_cut = true;
    }

    /// Compares all with a pool that was opened anew, and takes over what it finds where several outcomes are right.
    ///
    /// # Panics
    /// When the pool holds what it must not.
    pub fn compare(&mut self, session: &Session, pool: &Pool<FuzzStorage>, storage: &FuzzStorage) {
        let power_cut = std::mem::take(&mut self.after_cut);
        let infos = pool.volumes();
        match std::mem::replace(&mut self.unanswered, Unanswered::Nothing) {
            Unanswered::Created(volume) => {
                if let Some(info) = infos.iter().find(|info| info.uuid == volume.uuid) {
                    self.volumes.push(Volume { id: info.id, ..volume });
                }
            }
            Unanswered::Deleted(id) => {
                if infos.iter().all(|info| info.id != id) {
                    self.volumes.retain(|volume| volume.id != id);
                }
            }
            Unanswered::Nothing => {}
        }
        let mut known: Vec<(VolumeId, Uuid)> = self.volumes.iter().map(|volume| (volume.id, volume.uuid)).collect();
        known.sort_unstable();
        let there: Vec<(VolumeId, Uuid)> = infos.iter().map(|info| (info.id, info.uuid)).collect();
        assert_eq!(there, known, "volumes after {}", if power_cut { "a power cut" } else { "a death or close" });
        for volume in &mut self.volumes {
            volume.compare(session, pool, storage, power_cut);
        }
    }
}

impl Volume {
    fn compare(&mut self, session: &Session, pool: &Pool<FuzzStorage>, storage: &FuzzStorage, power_cut: bool) {
        let handle = open(pool, self.id, true);
        let mut looked_at: Vec<u64> = PLACES.iter().flat_map(|place| *place..place + 8).collect();
        looked_at.sort_unstable();
        looked_at.dedup();
        for block in looked_at {
            let (read, memory) = (handle.clone(), storage.allocate(BLOCK_SIZE));
            let into = memory.clone();
            let outcome = session.run(async move { read.read(block * BLOCK_BYTES, &into).await });
            outcome.expect("the storage answers").unwrap_or_else(|error| panic!("read of a sound pool: {error}"));
            let found = content_of(&memory).unwrap_or_else(|()| panic!("block {block} of {} is mixed", self.id));
            let versions = self.blocks.get(&block).cloned().unwrap_or_default();
            let unanswered = self.unanswered.get(&block).is_some_and(|all| all.contains(&found));
            assert!(
                versions.allows(found, power_cut) || unanswered,
                "block {block} of volume {} holds {found:?}, allowed are {versions:?} and {:?}; power cut: {power_cut}",
                self.id,
                self.unanswered.get(&block)
            );
            // After a power cut what is there is all there is. After a death it may still be in the log only.
            let settled = if power_cut {
                Versions { durable: found, later: Vec::new() }
            } else {
                let mut versions = versions;
                if versions.last() != found {
                    versions.later.push(found);
                }
                versions
            };
            self.blocks.insert(block, settled);
        }
        self.unanswered.clear();
    }
}

fn open(pool: &Pool<FuzzStorage>, id: VolumeId, read_only: bool) -> VolumeHandle<FuzzStorage> {
    pool.open_volume(id, read_only).unwrap_or_else(|error| panic!("open of volume {id}: {error}"))
}

fn pattern(storage: &FuzzStorage, content: Content, count: u64) -> IoMemory {
    let memory = storage.allocate(count as usize * BLOCK_SIZE);
    memory.write(0, &content.unwrap_or(0).to_le_bytes().repeat(count as usize * BLOCK_SIZE / 4));
    memory
}

fn content_of(memory: &IoMemory) -> Result<Content, ()> {
    let bytes = memory.to_vec();
    let (words, _) = bytes.as_chunks::<4>();
    let first = words[0];
    if words.iter().any(|word| *word != first) {
        return Err(());
    }
    Ok(Some(u32::from_le_bytes(first)).filter(|number| *number > 0))
}

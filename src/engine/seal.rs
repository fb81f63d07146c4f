//! Sealing a snapshot: a checksum for each of its blocks, and a digest of its content.
//!
//! A snapshot never changes, so what was read of it stays true; what may happen is that it is deleted. Every step
//! therefore looks, under an epoch, whether the snapshot is still there (O7) before it reads, and again before it records
//! what it found. *Sealed* and the digest are set only when a checkpoint that holds the checksums is durable, so no crash
//! leaves a sealed snapshot with a block that has none.
//!
//! Only what differs from a relative that is sealed already is read: subtrees that both share are skipped, their blocks
//! have checksums, and the digest follows from the relative's (`format/digest.rs`).

use std::collections::{BTreeMap, BTreeSet};

use futures_lite::future::yield_now;

use super::Storage;
use super::diff::{Pair, same};
use super::pool::Pool;
use super::state::{State, Try};
use super::work::Work;
use crate::canary::{Canary, is_broken};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{DigestState, Entry, EntryKind};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, PoolBlock, VirtualBlock, VolumeId};

/// The attribute that keeps the state from which the next snapshot's digest follows.
pub const DIGEST_STATE_ATTRIBUTE: &str = "plywood.digest-state";
/// Blocks read and hashed before other requests get their turn: some 100 microseconds.
const RUN_BLOCKS: usize = 16;
/// Pages with new checksums, 4 KiB of memory each, after which a checkpoint takes them.
const NEW_PAGES_MAX: usize = 2048;
/// Seconds that a snapshot must have been there before it is sealed in the background: many do not live so long.
const AGE_TICKS: u64 = 60;

/// What sealing a snapshot took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SealReport {
    /// The digest of its content.
    pub digest: [u8; 32],
    /// Blocks read, those of the relative that are different there included.
    pub blocks_read: u64,
    /// Blocks that had no checksum yet.
    pub blocks_sealed: u64,
}

/// How fast to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As fast as it goes, other requests taking their turns.
    Full,
    /// At most so many bytes are read a tick.
    BytesPerTick(u64),
}

/// One sealing under way.
struct Sealing {
    snapshot: VolumeId,
    /// It is sealed, and held against what it was sealed with: every block must have a checksum.
    verifies: bool,
    /// The relative from which it starts.
    base: Option<VolumeId>,
    size_bytes: u64,
    base_size_bytes: u64,
    state: DigestState,
    report: SealReport,
}

/// A block to be read: where it stands, where it belongs, and what is known of it.
#[derive(Clone, Copy)]
struct Wanted {
    at: PoolBlock,
    block: VirtualBlock,
    /// The snapshot's; else the relative's.
    is_new: bool,
    checksum: Option<u32>,
}

impl<S: Storage> Pool<S> {
    /// Records a checksum for every block of a snapshot and the digest of its content. One that is sealed already only
    /// answers the digest. I/O goes on meanwhile.
    ///
    /// # Errors
    /// `InvalidInput` when it is no snapshot, `NotFound` also when it is deleted meanwhile, `Corrupt` when a block that has
    /// a checksum does not match it, `Io`.
    pub async fn seal(&self, snapshot: VolumeId, pace: Pace) -> Result<SealReport> {
        let (root, size_bytes, sealed, last) = {
            let state = self.inner.state.borrow();
            let volume = state.volume(snapshot)?;
            let record = &volume.record;
            if !record.flags.read_only {
                return Err(Error::InvalidInput(format!("{} is not a snapshot: its blocks may change", record.name)));
            }
            if volume.unready {
                return Err(Error::Busy(format!("{} is being made", record.name)));
            }
            (record.root, record.size_bytes, record.digest.filter(|_| record.flags.sealed), volume.last)
        };
        if let Some(digest) = sealed {
            // By a call, perhaps, whose change is not durable yet.
            self.flush_through(last).await?;
            return Ok(SealReport { digest, ..SealReport::default() });
        }
        let _work = self.at(Work::Seal);
        let (base, state) = self.seal_base(snapshot).await;
        let from = base.and_then(|base| {
            let state = self.inner.state.borrow();
            state.volumes.get(&base).map(|volume| (volume.record.root, volume.record.size_bytes))
        });
        let pair = Pair::of(from.map(|(root, _)| root), root);
        let base_size_bytes = from.map_or(0, |(_, size)| size);
        let report = SealReport::default();
        let mut sealing = Sealing { snapshot, verifies: false, base, size_bytes, base_size_bytes, state, report };
        self.seal_tree(&mut sealing, pair, pace).await?;
        if !is_broken(Canary::SealedTooEarly) {
            self.checkpoint().await?;
        }
        sealing.report.digest = sealing.state.digest(size_bytes);
        self.call_sealed(&sealing).await?;
        Ok(sealing.report)
    }

    /// Reads a sealed snapshot as a whole, and holds its blocks against their checksums and all of it against its digest.
    ///
    /// # Errors
    /// `InvalidInput` when it is not sealed, `Corrupt`, `NotFound` also when it is deleted meanwhile, `Io`.
    pub async fn verify_sealed(&self, snapshot: VolumeId) -> Result<SealReport> {
        let (root, size_bytes, digest) = {
            let state = self.inner.state.borrow();
            let record = &state.volume(snapshot)?.record;
            let digest = record.digest.filter(|_| record.flags.sealed);
            let digest = digest.ok_or_else(|| Error::InvalidInput(format!("{} is not sealed", record.name)))?;
            (record.root, record.size_bytes, digest)
        };
        let (state, report) = (DigestState::default(), SealReport::default());
        let mut sealing =
            Sealing { snapshot, verifies: true, base: None, size_bytes, base_size_bytes: 0, state, report };
        self.seal_tree(&mut sealing, Pair::of(None, root), Pace::Full).await?;
        sealing.report.digest = sealing.state.digest(size_bytes);
        if sealing.report.digest != digest {
            let check = Check::Inconsistent("the content is not that of the digest");
            return Err(Corrupt { structure: Structure::Data, address: root.entry.address, check }.into());
        }
        Ok(sealing.report)
    }

    /// The sealed relative that probably differs least, and its state.
    async fn seal_base(&self, snapshot: VolumeId) -> (Option<VolumeId>, DigestState) {
        let base = self.inner.state.borrow().sealed_relative(snapshot);
        if let Some(base) = base {
            let state = self.attributes(base).await.ok().and_then(|mut known| known.remove(DIGEST_STATE_ATTRIBUTE));
            if let Some(Ok(state)) = state.map(|bytes| DigestState::decode(&bytes)) {
                return (Some(base), state);
            }
        }
        (None, DigestState::default())
    }

    async fn seal_tree(&self, sealing: &mut Sealing, root: Pair, pace: Pace) -> Result<()> {
        let mut waiting = vec![root];
        let mut seen_tick = self.inner.ticks.get();
        let mut budget = pace.bytes();
        while let Some(pair) = waiting.pop() {
            if same(pair.from, pair.to) {
                continue;
            }
            let read_before = sealing.report.blocks_read;
            {
                let _stay = self.enter();
                self.inner.state.borrow().check_sealing(sealing)?;
                let children = self.attempt(|state| state.compare(pair)).await?;
                if pair.level > 0 {
                    waiting.extend(children.into_iter().rev());
                    continue;
                }
                self.seal_leaf(sealing, &children).await?;
            }
            // From here on nothing is held.
            if self.inner.state.borrow().checksums.len() > NEW_PAGES_MAX {
                self.checkpoint().await?;
            }
            budget = budget.saturating_sub((sealing.report.blocks_read - read_before) * BLOCK_BYTES);
            if budget == 0 {
                self.wait_for_tick(&mut seen_tick).await;
                budget = pace.bytes();
            }
        }
        Ok(())
    }

    async fn seal_leaf(&self, sealing: &mut Sealing, changed: &[Pair]) -> Result<()> {
        let mut wanted = self.attempt(|state| state.blocks_to_seal(changed)).await?;
        wanted.sort_unstable_by_key(|wanted| wanted.at);
        let mut found: Vec<(PoolBlock, u32)> = Vec::new();
        let mut rest = &wanted[..];
        while let Some(first) = rest.first() {
            let consecutive =
                rest.iter().enumerate().take_while(|(index, next)| next.at == first.at.plus(*index as u64)).count();
            let (run, after) = rest.split_at(consecutive.min(RUN_BLOCKS));
            rest = after;
            let bytes = super::pool::read_bytes(&self.inner.storage, first.at, run.len()).await?;
            for (wanted, content) in run.iter().zip(bytes.as_chunks::<BLOCK_SIZE>().0) {
                let checksum = crc32fast::hash(content);
                match wanted.checksum {
                    Some(expected) if expected != checksum => {
                        let check = Check::Checksum { expected, found: checksum };
                        return Err(Corrupt { structure: Structure::Data, address: wanted.at, check }.into());
                    }
                    None if sealing.verifies => {
                        let check = Check::Inconsistent("a block of a sealed snapshot has no checksum");
                        return Err(Corrupt { structure: Structure::ChecksumPage, address: wanted.at, check }.into());
                    }
                    None if wanted.is_new => found.push((wanted.at, checksum)),
                    _ => {}
                }
                sealing.take(wanted, content);
            }
            yield_now().await;
        }
        self.prepare_checksum_pages(found.iter().map(|(block, _)| *block)).await?;
        let mut state = self.inner.state.borrow_mut();
        // It is still there, so it still holds each of these blocks.
        state.check_sealing(sealing)?;
        sealing.report.blocks_sealed += found.len() as u64;
        state.counters.blocks_sealed += found.len() as u64;
        state.counters.seal_blocks_read += wanted.len() as u64;
        for (block, checksum) in found {
            state.set_data_checksum(block, checksum);
        }
        Ok(())
    }

    /// Sets what tells that a snapshot is sealed: its checksums are durable.
    async fn call_sealed(&self, sealing: &Sealing) -> Result<()> {
        let id = sealing.snapshot;
        loop {
            let before = self.inner.state.borrow().volume(id)?.record.attributes.clone();
            let mut attributes = self.attributes(id).await?;
            attributes.insert(DIGEST_STATE_ATTRIBUTE.into(), sealing.state.encode().to_vec());
            // Without room for the state it is sealed all the same; the next snapshot is then read as a whole.
            let mut written = match self.write_attributes(&attributes).await {
                Ok(written) => Some(written),
                Err(Error::NoSpace(_) | Error::InvalidInput(_)) => None,
                Err(error) => return Err(error),
            };
            let mut overtaken = false;
            self.change(id, |_, record| {
                overtaken = record.attributes != before;
                if overtaken {
                    return Ok(());
                }
                if let Some(written) = written.take() {
                    record.attributes_bytes = written.length;
                    record.attributes = written.take();
                }
                record.flags.sealed = true;
                record.digest = Some(sealing.report.digest);
                Ok(())
            })
            .await?;
            if !overtaken {
                return Ok(());
            }
        }
    }

    /// From now on snapshots are sealed in the background when they are a minute old, `bytes_per_tick` being read a second;
    /// 0 for not at all.
    pub fn seal_in_background(&self, bytes_per_tick: u64) {
        self.inner.seal_bytes_per_tick.set(bytes_per_tick);
    }

    /// The background task.
    pub(super) async fn run_seals(&self) {
        let inner = &self.inner;
        let mut seen_at: BTreeMap<VolumeId, u64> = BTreeMap::new();
        let mut refused: BTreeSet<VolumeId> = BTreeSet::new();
        let mut tick = inner.ticks.get();
        loop {
            self.wait_for_tick(&mut tick).await;
            if inner.stopped.get() || inner.state.borrow().poisoned.is_some() || inner.state.borrow().closing {
                return;
            }
            let pace = inner.seal_bytes_per_tick.get();
            if pace == 0 {
                continue;
            }
            let unsealed = inner.state.borrow().unsealed();
            seen_at.retain(|id, _| unsealed.contains(id));
            refused.retain(|id| unsealed.contains(id));
            for id in unsealed {
                seen_at.entry(id).or_insert(tick);
            }
            let due = seen_at.iter().find(|(id, seen)| tick - **seen >= AGE_TICKS && !refused.contains(*id));
            let Some(id) = due.map(|(id, _)| *id) else { continue };
            let name = self.volume_name(id);
            match self.seal(id, Pace::BytesPerTick(pace)).await {
                Ok(report) => tracing::info!(volume = %name, blocks = report.blocks_sealed, "sealed"),
                // Deleted meanwhile, no room for the record now, or the pool is being closed.
                Err(Error::NotFound(_) | Error::Busy(_) | Error::NoSpace(_)) => {}
                Err(error) => {
                    tracing::error!(volume = %name, "cannot be sealed: {error}");
                    refused.insert(id);
                }
            }
        }
    }
}

impl Pace {
    fn bytes(self) -> u64 {
        match self {
            Self::Full => u64::MAX,
            Self::BytesPerTick(bytes) => bytes.max(1),
        }
    }
}

impl Sealing {
    /// Puts a block into the digest, or takes the relative's out.
    fn take(&mut self, wanted: &Wanted, content: &[u8; BLOCK_SIZE]) {
        self.report.blocks_read += 1;
        // What a volume does not show is not its content.
        let size = if wanted.is_new { self.size_bytes } else { self.base_size_bytes };
        let shown = size.saturating_sub(wanted.block.0 * BLOCK_BYTES).min(BLOCK_BYTES) as usize;
        let mut content = *content;
        content[shown..].fill(0);
        if wanted.is_new {
            self.state.add(wanted.block, &content);
        } else {
            self.state.remove(wanted.block, &content);
        }
    }
}

impl State {
    fn unsealed(&self) -> BTreeSet<VolumeId> {
        let unsealed = self.volumes.iter().filter(|(_, volume)| {
            let flags = volume.record.flags;
            flags.read_only && !flags.sealed && !flags.ephemeral && !volume.unready
        });
        unsealed.map(|(id, _)| *id).collect()
    }

    /// Refuses to go on with a snapshot that is gone, or without the relative that it was begun with.
    fn check_sealing(&self, sealing: &Sealing) -> Result<()> {
        if let Some(reason) = &self.poisoned {
            return Err(Error::Poisoned(reason.clone()));
        }
        if self.closing {
            return Err(Error::Busy("the pool is being closed".into()));
        }
        self.volume(sealing.snapshot)?;
        if sealing.base.is_some_and(|base| !self.volumes.contains_key(&base)) {
            return Err(Error::Busy("the snapshot it was compared with was deleted; try again".into()));
        }
        Ok(())
    }

    /// The sealed snapshot of the same volume that is nearest in time; else the one that volume was cloned from.
    fn sealed_relative(&self, snapshot: VolumeId) -> Option<VolumeId> {
        let record = &self.volumes.get(&snapshot)?.record;
        let origin = record.origin?;
        let fits = |other: &crate::format::VolumeRecord| {
            let alike = other.size_bytes == record.size_bytes
                || (other.size_bytes.is_multiple_of(BLOCK_BYTES) && record.size_bytes.is_multiple_of(BLOCK_BYTES));
            other.flags.sealed && other.flags.read_only && alike
        };
        let of_same = self.volumes.iter().filter(|(id, volume)| {
            **id != snapshot && volume.record.origin.is_some_and(|other| other.id == origin.id) && fits(&volume.record)
        });
        let distance = |record: &crate::format::VolumeRecord| {
            record.origin.map_or(u64::MAX, |other| other.clock.0.abs_diff(origin.clock.0))
        };
        let nearest = of_same.min_by_key(|(_, volume)| distance(&volume.record)).map(|(id, _)| *id);
        nearest.or_else(|| {
            let cloned_from = self.volumes.get(&origin.id)?.record.origin?.id;
            self.volumes.get(&cloned_from).filter(|volume| fits(&volume.record)).map(|_| cloned_from)
        })
    }

    /// The blocks of both sides of a leaf's differences, with the checksums that they have.
    fn blocks_to_seal(&mut self, changed: &[Pair]) -> Try<Vec<Wanted>> {
        let mut wanted = Vec::with_capacity(changed.len());
        for pair in changed {
            for (entry, is_new) in [(pair.from.entry, false), (pair.to.entry, true)] {
                let Entry { kind: EntryKind::Block, address: at, .. } = entry else { continue };
                let checksum = self.data_checksum(at)?;
                wanted.push(Wanted { at, block: VirtualBlock(pair.first), is_new, checksum });
            }
        }
        Ok(wanted)
    }
}

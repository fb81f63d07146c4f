//! Scrubbing: everything that has a checksum is read and held against it, before somebody needs it.
//!
//! A pass has two parts. *Metadata*: the check of a pinned checkpoint, after which what is bad of a pair is written anew
//! from the other block. *Data*: every block that has a checksum, in the order of the pool, a step at a time; whoever calls
//! for the steps sets the pace. How far a pass has come is in the superblock, so the next session goes on there.
//!
//! A block is read under an epoch (O7), with the checksum that it has in that step; what no longer has it afterwards is
//! passed over.

use super::Storage;
use super::check::Pin;
use super::pool::{Pool, read_bytes};
use super::{CheckReport, Fault, inspect};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::ScrubState;
use crate::units::{BLOCK_SIZE, PoolBlock};

/// Blocks read at a time.
const RUN_BLOCKS: u64 = 64;
/// Damaged blocks told of a step; what is beyond them is counted.
const DAMAGED_MAX: usize = 1000;

/// What scrubbing the metadata found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubbedMetadata {
    /// What the check found, what has been mended included.
    pub report: CheckReport,
    /// Copies that were bad and are good again.
    pub mended: u64,
}

/// What a step through the data found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubbedData {
    /// Blocks read and held against their checksums.
    pub blocks: u64,
    /// Blocks that do not match, or cannot be read: the first thousand.
    pub damaged: Vec<Corrupt>,
    /// Damaged blocks in all.
    pub damaged_count: u64,
    /// The block at which the next step goes on; none when the pass is over.
    pub next: Option<PoolBlock>,
    /// Where the groups in use end.
    pub end: PoolBlock,
}

impl<S: Storage> Pool<S> {
    /// Begins a pass: checks the metadata, and mends what has a second copy. `now` is in nanoseconds since 1970.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub async fn scrub_metadata(&self, now: u64) -> Result<ScrubbedMetadata> {
        let (report, mended) = self.check_pinned(true, &mut |_| ()).await?;
        let mut state = self.inner.state.borrow_mut();
        let next = state.geometry.first_group();
        let faults = report.fault_count.saturating_sub(mended);
        state.scrub = ScrubState { next, faults, begun: now, ended: state.scrub.ended };
        drop(state);
        Ok(ScrubbedMetadata { report, mended })
    }

    /// Reads up to `most` blocks that have a checksum, from where the pass under way stands. The last step of a pass writes
    /// a checkpoint.
    ///
    /// # Errors
    /// `InvalidInput` when no pass is under way; `Corrupt` when a page of checksums is damaged. Damaged data is reported, not
    /// an error.
    pub async fn scrub_data(&self, most: u64, now: u64) -> Result<ScrubbedData> {
        let (mut at, end) = {
            let state = self.inner.state.borrow();
            let end = state.geometry.group_start(state.groups_in_use);
            (state.scrub.next, PoolBlock(end.0.min(state.geometry.pool_blocks)))
        };
        if at.0 == 0 {
            return Err(Error::InvalidInput("no scrub is under way".into()));
        }
        let mut step = ScrubbedData { end, ..ScrubbedData::default() };
        while at < end && step.blocks < most {
            let run = RUN_BLOCKS.min(most - step.blocks);
            let (group, found) = self.blocks_with_checksum(at, run as usize).await?;
            let group_end = self.inner.state.borrow().geometry.group_start(group + 1);
            let Some(last) = found.last() else {
                at = group_end;
                continue;
            };
            at = last.plus(1);
            step.blocks += found.len() as u64;
            let mut rest = &found[..];
            while let Some(first) = rest.first() {
                let consecutive =
                    rest.iter().enumerate().take_while(|(index, next)| **next == first.plus(*index as u64)).count();
                self.scrub_run(*first, consecutive, &mut step).await?;
                rest = &rest[consecutive..];
            }
        }
        step.next = (at < end).then_some(at);
        {
            let mut state = self.inner.state.borrow_mut();
            state.scrub.next = step.next.unwrap_or(PoolBlock(0));
            state.scrub.faults += step.damaged_count;
            if step.next.is_none() {
                state.scrub.ended = now;
            }
        }
        if step.next.is_none() {
            self.checkpoint().await?;
        }
        Ok(step)
    }

    /// Reads `count` blocks and holds them against their checksums.
    async fn scrub_run(&self, first: PoolBlock, count: usize, step: &mut ScrubbedData) -> Result<()> {
        let _stay = self.enter();
        let mut expected = Vec::with_capacity(count);
        for index in 0..count as u64 {
            expected.push(self.attempt(|state| state.data_checksum(first.plus(index))).await?);
        }
        let whole = read_bytes(&self.inner.storage, first, count).await;
        for (index, expected) in expected.into_iter().enumerate() {
            let Some(expected) = expected else { continue };
            let address = first.plus(index as u64);
            let content = match &whole {
                Ok(bytes) => Ok(bytes[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE].to_vec()),
                // One of them cannot be read: which?
                Err(_) => self.read_block(address).await,
            };
            let check = match content {
                Ok(content) => match crc32fast::hash(&content) {
                    found if found == expected => continue,
                    found => Check::Checksum { expected, found },
                },
                Err(error) => Check::Unreadable(error.to_string()),
            };
            if self.attempt(|state| state.data_checksum(address)).await? != Some(expected) {
                continue;
            }
            let damage = Corrupt { structure: Structure::Data, address, check };
            tracing::error!("scrub: {damage}");
            step.damaged_count += 1;
            if step.damaged.len() < DAMAGED_MAX {
                step.damaged.push(damage);
            }
        }
        Ok(())
    }

    /// The volumes, and the ranges of them, that map damaged blocks of data.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub async fn touched_by(&self, damaged: Vec<Corrupt>) -> Result<Vec<Fault>> {
        self.commit().await?;
        let _pin = Pin::new(self);
        self.checkpoint().await?;
        inspect::attribute_data(&self.inner.storage, damaged).await
    }

    /// How far the pass under way has come, or how the last one ended.
    pub fn scrub_state(&self) -> ScrubState {
        self.inner.state.borrow().scrub
    }
}

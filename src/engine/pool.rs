//! A pool in use: its state, its storage, and the ways to wait for what another task will do.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use event_listener::{Event, listener};
use rustc_hash::FxHashMap;

use super::bounds;
use super::durable::Barriers;
use super::enlarge::Enlarger;
use super::epoch::EpochId;
use super::gather::Scattered;
use super::patience::Patience;
use super::space::PageKey;
use super::state::{Need, State, Try};
use super::work::{Underway, Work, WorkBoard};
use super::{Activity, Counters, Memory, Storage};
use crate::error::{Check, Corrupt, Error, Result, Structure};
use crate::format::{self, COUNTS_PER_PAGE, Node, PAGES_PER_GROUP, Place};
use crate::units::{BLOCK_SIZE, PoolBlock, VolumeId};

/// A pool that is open. A clone is another handle to the same pool.
pub struct Pool<S: Storage> {
    pub(super) inner: Rc<Inner<S>>,
}

impl<S: Storage> Clone for Pool<S> {
    fn clone(&self) -> Self {
        Self { inner: Rc::clone(&self.inner) }
    }
}

/// Things to wait for.
#[derive(Default)]
pub(super) struct Signals {
    /// A commit is wanted, a checkpoint is wanted, or the pool is closing: the background tasks look at the flags.
    pub(super) work: Event,
    /// Something became durable, or the pool was poisoned.
    pub(super) durable: Event,
    /// A checkpoint has ended.
    pub(super) checkpointed: Event,
    /// An epoch has ended.
    pub(super) epoch: Event,
    /// Blocks were freed, promised room was returned, or host space was prepared.
    pub(super) space: Event,
    /// A carcass was made or a change became durable.
    pub(super) carcass: Event,
}

pub(super) struct Inner<S: Storage> {
    pub(super) storage: S,
    pub(super) board: Box<dyn WorkBoard>,
    pub(super) state: RefCell<State>,
    pub(super) signals: Signals,
    loading: RefCell<FxHashMap<u64, Rc<Event>>>,
    loading_pages: RefCell<FxHashMap<PageKey, Rc<Event>>>,
    pub(super) barriers: Barriers,
    pub(super) commit_wanted: Cell<bool>,
    pub(super) committing: Cell<bool>,
    /// Commits whose flush of the medium has begun, and has ended, and the last one that somebody waits for.
    pub(super) flushes_begun: Cell<u64>,
    pub(super) flushes_ended: Cell<u64>,
    pub(super) flush_awaited: Cell<u64>,
    pub(super) checkpoint_wanted: Cell<bool>,
    pub(super) checkpoints_begun: Cell<u64>,
    pub(super) checkpoints_ended: Cell<u64>,
    pub(super) growing: Cell<bool>,
    pub(super) preparing_checksum_pages: Cell<bool>,
    pub(super) host_full: Cell<bool>,
    /// The host has said so: nothing is given back to it in this session.
    pub(super) cannot_punch: Cell<bool>,
    /// Blocks are to be kept ready: somebody has written since everything was given back.
    pub(super) growth_wanted: Cell<bool>,
    pub(super) ticks: Cell<u64>,
    /// Reads and changes of volumes begun.
    pub(super) requests: Cell<u64>,
    pub(super) stopped: Cell<bool>,
    pub(super) open_handles: Cell<u64>,
    pub(super) patience: Patience,
    pub(super) enlarger: RefCell<Option<Enlarger>>,
    /// What sealing in the background may read a tick; 0 for nothing.
    pub(super) seal_bytes_per_tick: Cell<u64>,
    /// Reads of blocks that do not stand together.
    pub(super) scattered: RefCell<VecDeque<Scattered>>,
    /// No checkpoint after that of this number begins for now.
    pub(super) last_checkpoint: Cell<Option<u64>>,
}

/// Waits until `ready` holds; `event` tells when to look again.
pub(super) async fn until(event: &Event, mut ready: impl FnMut() -> bool) {
    loop {
        if ready() {
            return;
        }
        // In the future itself: requests that wait, a FLUSH among them, allocate nothing.
        listener!(event => listener);
        if ready() {
            return;
        }
        listener.await;
    }
}

/// A plan's stay in an epoch.
pub(super) struct Stay<S: Storage> {
    inner: Rc<Inner<S>>,
    epoch: EpochId,
}

impl<S: Storage> Drop for Stay<S> {
    fn drop(&mut self) {
        let mut state = self.inner.state.borrow_mut();
        if state.epochs.leave(self.epoch) {
            state.release_frees();
            drop(state);
            self.inner.signals.epoch.notify(usize::MAX);
            self.inner.signals.space.notify(usize::MAX);
        }
    }
}

impl<S: Storage> Pool<S> {
    pub(super) fn new(storage: S, state: State) -> Self {
        Self {
            inner: Rc::new(Inner {
                storage,
                board: state.log.board(),
                state: RefCell::new(state),
                signals: Signals::default(),
                loading: RefCell::default(),
                loading_pages: RefCell::default(),
                barriers: Barriers::default(),
                commit_wanted: Cell::new(false),
                committing: Cell::new(false),
                flushes_begun: Cell::new(0),
                flushes_ended: Cell::new(0),
                flush_awaited: Cell::new(0),
                checkpoint_wanted: Cell::new(false),
                checkpoints_begun: Cell::new(0),
                checkpoints_ended: Cell::new(0),
                growing: Cell::new(false),
                preparing_checksum_pages: Cell::new(false),
                host_full: Cell::new(false),
                cannot_punch: Cell::new(false),
                growth_wanted: Cell::new(true),
                ticks: Cell::new(0),
                requests: Cell::new(0),
                stopped: Cell::new(false),
                open_handles: Cell::new(0),
                patience: Patience::default(),
                enlarger: RefCell::default(),
                seal_bytes_per_tick: Cell::new(0),
                scattered: RefCell::default(),
                last_checkpoint: Cell::new(None),
            }),
        }
    }

    /// Enters the current epoch.
    pub(super) fn enter(&self) -> Stay<S> {
        let epoch = self.inner.state.borrow_mut().epochs.enter();
        Stay { inner: Rc::clone(&self.inner), epoch }
    }

    /// Notes what is begun, until the answer is dropped.
    pub(super) fn at(&self, work: Work) -> Underway<'_> {
        Underway::new(&*self.inner.board, work)
    }

    /// Why nothing may be changed any more, if so.
    pub(super) fn poison_error(&self) -> Option<Error> {
        self.inner.state.borrow().poisoned.clone().map(Error::Poisoned)
    }

    /// Stops all writing for good: a write of metadata or a flush failed, and what is on the medium is not known.
    pub(super) fn poison(&self, error: &Error) -> Error {
        let reason = error.to_string();
        {
            let mut state = self.inner.state.borrow_mut();
            if state.poisoned.is_none() {
                tracing::error!(pool = %state.name, "pool is poisoned: {reason}");
                state.log.poison();
                state.poisoned = Some(reason.clone());
            }
        }
        let signals = &self.inner.signals;
        for event in
            [&signals.work, &signals.durable, &signals.checkpointed, &signals.space, &signals.carcass, &signals.epoch]
        {
            event.notify(usize::MAX);
        }
        Error::Poisoned(reason)
    }

    /// Tries a step until it has all it needs in memory. Waits for I/O only, so it may be called inside an epoch.
    pub(super) async fn attempt<T>(&self, mut step: impl FnMut(&mut State) -> Try<T>) -> Result<T> {
        loop {
            let need = match step(&mut self.inner.state.borrow_mut()) {
                Ok(done) => return Ok(done),
                Err(need) => need,
            };
            Box::pin(self.satisfy(need)).await?;
        }
    }

    /// Brings into memory what a step missed.
    pub(super) async fn satisfy(&self, need: Need) -> Result<()> {
        match need {
            Need::Node { address, mirrored, checksum, place } => {
                self.load_node(address, mirrored, checksum, place).await
            }
            Need::Counts(page) => self.load_page(page).await,
            Need::Metadata => Err(Error::NoSpace("the pool has no block left for metadata".into())),
        }
    }

    /// Reads a node, taking the second of a pair when the first is damaged.
    async fn load_node(&self, address: PoolBlock, mirrored: bool, checksum: u32, place: Place) -> Result<()> {
        // A node is found by its block, so one that a damaged tree has in two places would be taken for itself, and moved
        // from under its own feet.
        if self.inner.state.borrow().cache.get(address).is_some_and(|cached| cached.place != place) {
            let check = Check::Inconsistent("a node stands in two places");
            return Err(Corrupt { structure: Structure::Node, address, check }.into());
        }
        // The event is this load's alone: whoever waits looks again when it ends, however it ended, and not at whether the
        // next one has begun meanwhile.
        let waiting = self.inner.loading.borrow().get(&address.0).cloned();
        if let Some(event) = waiting {
            event.listen().await;
            return Ok(());
        }
        let event = Rc::new(Event::new());
        self.inner.loading.borrow_mut().insert(address.0, Rc::clone(&event));
        let stay = self.enter();
        let loaded = self.read_checked(address, mirrored, checksum, place, Structure::Node).await;
        let loaded = loaded.and_then(|bytes| {
            let mut state = self.inner.state.borrow_mut();
            let (level, blocks) = (super::cache::level_of(place), state.geometry.pool_blocks);
            let node = match place {
                Place::TableNode { .. } => Node::decode_table(&bytes, level, blocks),
                _ => Node::decode(&bytes, level, blocks),
            };
            let node = node.and_then(|node| bounds::check_node(&state.geometry, &node).map(|()| node));
            let node = node.map_err(|check| Corrupt { structure: Structure::Node, address, check })?;
            state.counters.nodes_read += 1;
            state.cache.insert_clean(address, node, place, mirrored);
            Ok(())
        });
        drop(stay);
        self.inner.loading.borrow_mut().remove(&address.0);
        event.notify(usize::MAX);
        loaded
    }

    /// Reads a metadata block and verifies its checksum; of a pair, the second where the first is bad.
    pub(super) async fn read_checked(
        &self,
        address: PoolBlock,
        mirrored: bool,
        checksum: u32,
        place: Place,
        structure: Structure,
    ) -> Result<Vec<u8>> {
        let uuid = self.inner.state.borrow().uuid;
        let mut first_error = None;
        for copy in 0..=u64::from(mirrored) {
            let at = address.plus(copy);
            let outcome = self.read_block(at).await.and_then(|bytes| {
                let found = format::checksum(&uuid, place, &bytes);
                if found == checksum {
                    return Ok(bytes);
                }
                Err(Corrupt { structure, address: at, check: Check::Checksum { expected: checksum, found } }.into())
            });
            match outcome {
                Ok(bytes) => {
                    if copy > 0 {
                        tracing::warn!("{structure} at block {address} is damaged; its second copy was used");
                        self.inner.state.borrow_mut().counters.second_copies_used += 1;
                    }
                    return Ok(bytes);
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| Error::InvalidInput("nothing was read".into())))
    }

    /// Reads one block of the pool.
    pub(super) async fn read_block(&self, address: PoolBlock) -> Result<Vec<u8>> {
        read_bytes(&self.inner.storage, address, 1).await
    }

    /// Reads a page of counts.
    async fn load_page(&self, page: PageKey) -> Result<()> {
        let waiting = self.inner.loading_pages.borrow().get(&page).cloned();
        if let Some(event) = waiting {
            event.listen().await;
            return Ok(());
        }
        let event = Rc::new(Event::new());
        self.inner.loading_pages.borrow_mut().insert(page, Rc::clone(&event));
        let marks = || (self.inner.checkpoints_begun.get(), self.inner.checkpoints_ended.get());
        let before = marks();
        let loaded = self.read_page(page).await;
        // A checkpoint that began or ended meanwhile may have written the other slot, or this one anew: what was read, or
        // was found damaged, says nothing then, and is looked at again.
        let is_stale = before != marks();
        if let Ok(counts) = &loaded
            && !is_stale
        {
            let mut state = self.inner.state.borrow_mut();
            if state.pages.len() >= PAGES_KEPT && !state.checkpointing {
                state.pages.clear();
            }
            // A page that the checkpoint has brought up to date meanwhile is newer.
            state.pages.entry(page).or_insert_with(|| Rc::clone(counts));
        }
        self.inner.loading_pages.borrow_mut().remove(&page);
        event.notify(usize::MAX);
        if is_stale { Ok(()) } else { loaded.map(|_| ()) }
    }

    async fn read_page(&self, (group, page): PageKey) -> Result<Rc<[u32; 1024]>> {
        self.load_descriptor(group).await?;
        let (reference, target, uuid, implied) = {
            let state = self.inner.state.borrow();
            let descriptor = state.descriptors.get(&group);
            let of_checksums = page.checked_sub(PAGES_PER_GROUP);
            let reference = descriptor.and_then(|descriptor| match of_checksums {
                Some(page) => descriptor.checksum_pages.get(page as usize).copied(),
                None => descriptor.pages.get(page as usize).copied(),
            });
            let Some(reference) = reference else {
                return Err(Error::InvalidInput(format!("group {group} has no page {page}")));
            };
            let slot = reference.slot;
            let (target, implied) = match of_checksums {
                Some(page) => {
                    let address = state.geometry.checksum_page_block(group, page, slot);
                    let place = Place::ChecksumPage { group, page };
                    ((address, place, Structure::ChecksumPage), Rc::new([0; 1024]))
                }
                None => {
                    let address = state.geometry.page_block(group, page, slot);
                    let place = Place::SpaceMapPage { group, page };
                    ((address, place, Structure::SpaceMapPage), implied_counts(&state, group, page))
                }
            };
            (reference, target, state.uuid, implied)
        };
        if !reference.present {
            return Ok(implied);
        }
        let (address, place, structure) = target;
        let bytes = self.read_block(address).await?;
        let found = format::checksum(&uuid, place, &bytes);
        if found != reference.checksum {
            let check = Check::Checksum { expected: reference.checksum, found };
            return Err(Corrupt { structure, address, check }.into());
        }
        self.inner.state.borrow_mut().counters.pages_read += 1;
        let counts = format::decode_counts(&bytes).map_err(|check| Corrupt { structure, address, check })?;
        Ok(Rc::new(*counts))
    }

    /// Reads a group's descriptor, unless the group is empty: then it is implied.
    pub(super) async fn load_descriptor(&self, group: u64) -> Result<()> {
        let (entry, address) = {
            let state = self.inner.state.borrow();
            if state.descriptors.contains_key(&group) {
                return Ok(());
            }
            let entry = state.index_entry(group);
            (entry, state.geometry.descriptor_block(group, entry.slot))
        };
        let descriptor = if entry.empty {
            format::GroupDescriptor::new(group)
        } else {
            let structure = Structure::GroupDescriptor;
            let bytes =
                self.read_checked(address, true, entry.checksum, Place::GroupDescriptor(group), structure).await?;
            format::GroupDescriptor::decode(&bytes, group).map_err(|check| Corrupt { structure, address, check })?
        };
        self.inner.state.borrow_mut().descriptors.entry(group).or_insert(descriptor);
        Ok(())
    }

    /// Counters of rare and costly things since the pool was opened.
    pub fn counters(&self) -> Counters {
        let state = self.inner.state.borrow();
        Counters { ring_wraps: state.journal.wraps, ..state.counters.clone() }
    }

    /// What the engine is doing at the moment.
    #[doc(hidden)]
    pub fn activity(&self) -> Activity {
        let inner = &self.inner;
        let state = inner.state.borrow();
        Activity {
            committing: inner.committing.get(),
            checkpointing: state.checkpointing,
            eating: !state.carcasses.is_empty() && state.counters.leaves_eaten > state.eaten_in_image,
            growing: inner.growing.get(),
        }
    }

    /// Drops every clean node and page from memory: for tests and benches of a cold cache.
    pub fn drop_caches(&self) {
        let mut state = self.inner.state.borrow_mut();
        state.cache.drop_clean();
        if !state.checkpointing {
            state.pages.clear();
        }
    }

    pub(super) fn volume_name(&self, id: VolumeId) -> String {
        let state = self.inner.state.borrow();
        state.volumes.get(&id).map_or_else(|| id.to_string(), |volume| volume.record.name.clone())
    }
}

/// Pages of counts kept in memory (16 MiB).
const PAGES_KEPT: usize = 4096;

/// The counts of a page that was never written: the layout's own blocks and those behind a short last group are taken.
pub(super) fn implied_counts(state: &State, group: u64, page: u32) -> Rc<[u32; 1024]> {
    debug_assert!(page < PAGES_PER_GROUP);
    let layout = state.geometry.layout_blocks(group);
    let blocks = state.geometry.group_blocks(group);
    let first = u64::from(page) * COUNTS_PER_PAGE;
    let mut counts = [0; 1024];
    for (index, count) in counts.iter_mut().enumerate() {
        let block = first + index as u64;
        *count = u32::from(block < layout || block >= blocks);
    }
    Rc::new(counts)
}

/// Reads `count` blocks into memory of our own.
pub(super) async fn read_bytes<S: Storage>(storage: &S, address: PoolBlock, count: usize) -> Result<Vec<u8>> {
    let memory = storage.allocate(count * BLOCK_SIZE);
    storage
        .read(address.offset_bytes(), &memory)
        .await
        .map_err(|error| Error::io(format!("read of {count} blocks at pool block {address}"), error))?;
    let mut bytes = vec![0; count * BLOCK_SIZE];
    memory.read(0, &mut bytes);
    Ok(bytes)
}

/// Copies `bytes` into memory that the storage can write from.
pub(super) fn to_memory<S: Storage>(storage: &S, bytes: &[u8]) -> S::Memory {
    let memory = storage.allocate(bytes.len());
    memory.write(0, bytes);
    memory
}

//! What a pool may hold after a crash.
//!
//! Of each block the model knows the state that is durable for certain and the changes acknowledged since, in order. A
//! change that redirects is there whole or not at all; one in place may be torn, inside its own sectors; whatever comes
//! later in the log is not there when something before it is not. After the death of the process everything that was
//! acknowledged is there. What is in flight may be there or not.

use std::collections::BTreeMap;
use std::ops::Range;

use plywood::units::VolumeId;
use uuid::Uuid;

use crate::content::{SECTOR, SECTORS, Sectors, Value};

/// A state that a block may be in: for each sector a value, or one of several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frame {
    pub latest: Sectors,
    /// Values that single sectors may hold instead.
    also: Vec<(u8, Value)>,
}

impl Frame {
    pub fn certain(latest: Sectors) -> Self {
        Self { latest, also: Vec::new() }
    }

    pub fn matches(&self, found: &Sectors) -> bool {
        found
            .iter()
            .enumerate()
            .all(|(index, value)| self.latest[index] == *value || self.also.contains(&(index as u8, *value)))
    }

    pub fn is_certain(&self) -> bool {
        self.also.is_empty()
    }

    /// The sectors of `mask` may hold `value` as well.
    fn allow(&mut self, mask: u8, value: Value) {
        for index in (0..SECTORS as u8).filter(|index| mask & 1 << index != 0) {
            if self.latest[usize::from(index)] != value && !self.also.contains(&(index, value)) {
                self.also.push((index, value));
            }
        }
    }

    fn written(&self, mask: u8, value: Value) -> Self {
        let mut after = self.clone();
        after.also.retain(|(index, _)| mask & 1 << index == 0);
        for index in (0..SECTORS as usize).filter(|index| mask & 1 << index != 0) {
            after.latest[index] = value;
        }
        after
    }
}

/// Whose block it is: decides whether the next write goes in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    Hole,
    Shared,
    Own,
    Unknown,
}

#[derive(Clone, Debug)]
struct Event {
    /// When it was acknowledged.
    at: u64,
    in_place: bool,
    mask: u8,
    value: Value,
    after: Frame,
}

#[derive(Clone, Debug)]
pub struct Block {
    base: Frame,
    events: Vec<Event>,
    pub hold: Hold,
    written_at: u64,
}

impl Default for Block {
    fn default() -> Self {
        Self { base: Frame::default(), events: Vec::new(), hold: Hold::Hole, written_at: 0 }
    }
}

impl Block {
    pub fn settled(found: Sectors, hold: Hold) -> Self {
        Self { base: Frame::certain(found), events: Vec::new(), hold, written_at: 0 }
    }

    pub fn latest(&self) -> &Frame {
        self.events.last().map_or(&self.base, |event| &event.after)
    }

    fn latest_mut(&mut self) -> &mut Frame {
        self.events.last_mut().map_or(&mut self.base, |event| &mut event.after)
    }

    /// Everything acknowledged up to `at` is durable.
    fn cover(&mut self, at: u64) {
        let covered = self.events.iter().take_while(|event| event.at <= at).count();
        if let Some(last) = self.events.drain(..covered).next_back() {
            self.base = last.after;
        }
    }

    pub fn is_quiet(&self) -> bool {
        self.events.is_empty() && self.base.is_certain()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    Discard,
}

/// A change that was begun and is not acknowledged.
#[derive(Clone, Debug)]
pub struct Flight {
    pub volume: Uuid,
    pub sectors: Range<u64>,
    pub value: Value,
    pub kind: Kind,
    begun: u64,
}

impl Flight {
    fn blocks(&self) -> Range<u64> {
        self.sectors.start / SECTORS..self.sectors.end.div_ceil(SECTORS)
    }

    /// Whether it makes zeros of a part of this block, or all of it.
    fn clears(&self, volume: Uuid, block: u64) -> bool {
        self.value == 0 && self.volume == volume && self.blocks().contains(&block)
    }

    fn mask(&self, block: u64) -> u8 {
        let first = block * SECTORS;
        (0..SECTORS).filter(|index| self.sectors.contains(&(first + index))).fold(0, |mask, index| mask | 1 << index)
    }
}

/// Size of the volume that only fills the first group. It is never touched again, nor compared.
pub const BALLAST_BYTES: u64 = 110 << 20;

#[derive(Clone, Debug)]
pub struct Volume {
    pub id: VolumeId,
    pub uuid: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub sector_size: u32,
    pub read_only: bool,
    pub reservation_bytes: u64,
    pub origin: Option<Uuid>,
    pub blocks: BTreeMap<u64, Block>,
    /// Its digest, once it is sealed.
    pub digest: Option<[u8; 32]>,
    /// Snapshots of it being taken, and when the last one began or ended.
    pub snapshots: u32,
    pub shared_at: u64,
}

impl Volume {
    pub fn new(uuid: Uuid, name: String, size_bytes: u64, sector_size: u32) -> Self {
        Self {
            id: VolumeId(0),
            uuid,
            name,
            size_bytes,
            sector_size,
            read_only: false,
            reservation_bytes: 0,
            origin: None,
            blocks: BTreeMap::new(),
            digest: None,
            snapshots: 0,
            shared_at: 0,
        }
    }

    /// A volume that shares what this one holds now.
    pub fn share(&self, uuid: Uuid, name: String, read_only: bool) -> Self {
        let blocks = self.blocks.iter().map(|(number, block)| (*number, shared(block.latest().clone(), block.hold)));
        Self {
            id: VolumeId(0),
            uuid,
            name,
            read_only,
            reservation_bytes: 0,
            origin: Some(self.uuid),
            blocks: blocks.collect(),
            digest: None,
            snapshots: 0,
            shared_at: 0,
            ..*self
        }
    }

    pub fn is_ballast(&self) -> bool {
        self.size_bytes == BALLAST_BYTES
    }

    fn cover(&mut self, at: u64) {
        for block in self.blocks.values_mut() {
            block.cover(at);
        }
    }

    pub fn truncate(&mut self, size_bytes: u64) {
        self.blocks.split_off(&(size_bytes / (SECTOR * SECTORS)));
        self.size_bytes = size_bytes;
        self.reservation_bytes = self.reservation_bytes.min(size_bytes);
    }
}

fn shared(frame: Frame, hold: Hold) -> Block {
    let hold = match hold {
        Hold::Own => Hold::Shared,
        other => other,
    };
    Block { base: frame, events: Vec::new(), hold, written_at: 0 }
}

/// A snapshot being taken: whatever is in flight meanwhile may be in it or not.
#[derive(Clone, Debug)]
struct Observer {
    origin: Uuid,
    since: u64,
    frames: BTreeMap<u64, (Frame, Hold)>,
}

impl Observer {
    fn allow(&mut self, flight: &Flight) {
        if flight.kind == Kind::Discard {
            for (block, (frame, _)) in self.frames.range_mut(flight.blocks()) {
                frame.allow(flight.mask(*block), 0);
            }
            return;
        }
        for block in flight.blocks() {
            let (frame, hold) = self.frames.entry(block).or_insert((Frame::default(), Hold::Hole));
            frame.allow(flight.mask(block), flight.value);
            *hold = Hold::Unknown;
        }
    }
}

/// A call on volumes as a whole that was begun and has not returned.
#[derive(Clone, Debug)]
pub enum Control {
    Create(Volume),
    Snapshot { observer: u64, volume: Volume },
    Clone(Volume),
    Delete(Uuid),
    RollBack { volume: Uuid, snapshot: Uuid, keep: Option<(u64, Volume)> },
    Resize { volume: Uuid, size_bytes: u64 },
    Reserve { volume: Uuid, reservation_bytes: u64 },
    Rename { volume: Uuid, name: String },
}

#[derive(Clone, Default)]
pub struct Model {
    pub volumes: BTreeMap<Uuid, Volume>,
    pub flights: BTreeMap<u64, Flight>,
    pub controls: BTreeMap<u64, Control>,
    observers: BTreeMap<u64, Observer>,
    watchers: BTreeMap<u64, Watcher>,
    /// Counts what happens.
    pub now: u64,
    next: u64,
}

impl Model {
    /// A number never given before.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub fn now(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub fn begin(&mut self, number: u64, volume: Uuid, sectors: Range<u64>, value: Value, kind: Kind) {
        let begun = self.now();
        let flight = Flight { volume, sectors, value, kind, begun };
        for observer in self.observers.values_mut().filter(|observer| observer.origin == volume) {
            observer.allow(&flight);
        }
        for watcher in self.watchers.values_mut().filter(|watcher| watcher.volume == volume) {
            allow_flight(&mut watcher.frames, &flight);
        }
        self.flights.insert(number, flight);
    }

    /// The change was acknowledged. Its range is still held, so overlapping changes come here in their order.
    pub fn acknowledge(&mut self, number: u64, durable: bool) {
        let at = self.now();
        let Some(flight) = self.flights.remove(&number) else { return };
        let Some(volume) = self.volumes.get_mut(&flight.volume) else { return };
        if durable {
            // A FLUSH began after the write had landed: all that was acknowledged before the write began is covered.
            volume.cover(flight.begun);
        }
        let is_unsure = volume.snapshots > 0 || volume.shared_at >= flight.begun;
        let numbers: Vec<u64> = match flight.kind {
            Kind::Write => flight.blocks().collect(),
            Kind::Discard => volume.blocks.range(flight.blocks()).map(|(number, _)| *number).collect(),
        };
        for number in numbers {
            let block = volume.blocks.entry(number).or_default();
            let mask = flight.mask(number);
            // Clearing that lacked room has let its range go, and may have zeroed a part of the block before this change.
            let is_crossed = self.flights.values().any(|other| other.clears(flight.volume, number));
            let is_unsure = is_unsure || is_crossed;
            let whole_discard = flight.kind == Kind::Discard && mask == 0xff;
            if flight.kind == Kind::Discard && !whole_discard && block.hold == Hold::Hole {
                continue;
            }
            let in_place = !whole_discard && (is_unsure || matches!(block.hold, Hold::Own | Hold::Unknown));
            let after = block.latest().written(mask, flight.value);
            block.events.push(Event { at, in_place, mask, value: flight.value, after });
            block.written_at = at;
            block.hold = match (whole_discard, is_unsure) {
                (true, _) => Hold::Hole,
                (false, true) => Hold::Unknown,
                // What was a hole for all we know stays one where a discard zeroes only a part of it.
                (false, false) if flight.kind == Kind::Discard && block.hold == Hold::Unknown => Hold::Unknown,
                (false, false) => Hold::Own,
            };
            if durable {
                block.cover(at);
            }
        }
    }

    /// The change was refused: nothing has happened, or for one made in parts, perhaps something.
    pub fn refuse(&mut self, number: u64, in_parts: bool) {
        let Some(flight) = self.flights.remove(&number) else { return };
        if !in_parts {
            return;
        }
        let Some(volume) = self.volumes.get_mut(&flight.volume) else { return };
        for (number, block) in volume.blocks.range_mut(flight.blocks()) {
            let mask = flight.mask(*number);
            block.base.allow(mask, flight.value);
            for event in &mut block.events {
                event.after.allow(mask, flight.value);
            }
            block.hold = Hold::Unknown;
        }
    }

    /// Blocks of a volume of which several contents are possible.
    pub fn doubtful(&self, volume: Uuid) -> Vec<u64> {
        let blocks = self.volumes.get(&volume).into_iter().flat_map(|volume| &volume.blocks);
        blocks.filter(|(_, block)| !block.latest().is_certain()).map(|(number, _)| *number).collect()
    }

    /// Whether anything that was begun for a volume has not returned.
    pub fn is_in_question(&self, volume: Uuid) -> bool {
        self.flights.values().any(|flight| flight.volume == volume)
            || !self.controls.is_empty()
            || self.volumes.get(&volume).is_none_or(|volume| volume.snapshots > 0)
    }

    /// A change that was made already was made once more: where a block stands may be another place now.
    pub fn sent_again(&mut self, volume: Uuid, sectors: Range<u64>) {
        let Some(volume) = self.volumes.get_mut(&volume) else { return };
        let blocks = sectors.start / SECTORS..sectors.end.div_ceil(SECTORS);
        for (_, block) in volume.blocks.range_mut(blocks) {
            block.hold = Hold::Unknown;
        }
    }

    /// A FLUSH of `volume` that began at `since` was acknowledged.
    pub fn flushed(&mut self, volume: Uuid, since: u64) {
        if let Some(volume) = self.volumes.get_mut(&volume) {
            volume.cover(since);
        }
    }

    /// Everything acknowledged before `since` is durable.
    pub fn committed(&mut self, since: u64) {
        for volume in self.volumes.values_mut() {
            volume.cover(since);
        }
    }

    /// A snapshot of `origin` begins.
    pub fn observe(&mut self, number: u64, origin: Uuid) {
        let since = self.now();
        let volume = self.volumes.get_mut(&origin).expect("a volume of the model");
        volume.snapshots += 1;
        volume.shared_at = since;
        let frames =
            volume.blocks.iter().map(|(number, block)| (*number, (block.latest().clone(), block.hold))).collect();
        let mut observer = Observer { origin, since, frames };
        for flight in self.flights.values().filter(|flight| flight.volume == origin) {
            observer.allow(flight);
        }
        self.observers.insert(number, observer);
    }

    /// What a snapshot that is being taken may hold.
    pub fn observed(&self, number: u64) -> BTreeMap<u64, Block> {
        let Some(observer) = self.observers.get(&number) else { return BTreeMap::new() };
        observer.frames.iter().map(|(number, (frame, hold))| (*number, shared(frame.clone(), *hold))).collect()
    }

    /// The snapshot ended; when it was `taken`, it was a FLUSH of its origin as well.
    pub fn observation_ended(&mut self, number: u64, taken: bool) {
        let Some(observer) = self.observers.remove(&number) else { return };
        let now = self.now();
        let Some(volume) = self.volumes.get_mut(&observer.origin) else { return };
        volume.snapshots -= 1;
        volume.shared_at = now;
        if taken {
            volume.cover(observer.since);
        }
        for block in volume.blocks.values_mut().filter(|block| block.hold != Hold::Hole) {
            block.hold = if taken && block.written_at < observer.since { Hold::Shared } else { Hold::Unknown };
        }
    }

    /// `volume` has `snapshot`'s content now, durably.
    pub fn roll_back(&mut self, volume: Uuid, snapshot: Uuid) {
        let Some(source) = self.volumes.get(&snapshot).cloned() else { return };
        if let Some(volume) = self.volumes.get_mut(&volume) {
            rolled_back(volume, &source);
        }
    }

    /// Somebody read `found` in a block that nothing changes any more.
    pub fn settle(&mut self, volume: Uuid, number: u64, found: Sectors) {
        if let Some(volume) = self.volumes.get_mut(&volume)
            && let Some(block) = volume.blocks.get_mut(&number)
        {
            *block.latest_mut() = Frame::certain(found);
        }
    }

    fn flights_over<'a>(&'a self, volume: Uuid, block: u64) -> impl Iterator<Item = &'a Flight> + 'a {
        self.flights.values().filter(move |flight| flight.volume == volume && flight.blocks().contains(&block))
    }

    /// Whether a block of `volume`, of which `known` is known, may hold `found` after a crash.
    pub fn allows(
        &self,
        volume: &Volume,
        number: u64,
        known: Option<&Block>,
        found: &Sectors,
        lost_power: bool,
    ) -> bool {
        let nothing = Block::default();
        let block = known.unwrap_or(&nothing);
        let sure = if lost_power { &block.base } else { block.latest() };
        // What follows only adds to what is allowed. Most blocks end here.
        if sure.matches(found) {
            return true;
        }
        let mut frame = sure.clone();
        if lost_power {
            for event in &block.events {
                if event.in_place {
                    frame.allow(event.mask, event.value);
                    for (index, value) in &event.after.also {
                        frame.allow(1 << index, *value);
                    }
                    continue;
                }
                if frame.matches(found) {
                    return true;
                }
                frame = event.after.clone();
            }
        }
        let flights: Vec<&Flight> = self.flights_over(volume.uuid, number).collect();
        if let [flight] = flights[..]
            && matches!(block.hold, Hold::Hole | Hold::Shared)
            && volume.snapshots == 0
            && volume.shared_at < flight.begun
        {
            // Redirected: whole or not at all.
            return frame.matches(found) || block.latest().written(flight.mask(number), flight.value).matches(found);
        }
        for flight in flights {
            frame.allow(flight.mask(number), flight.value);
        }
        frame.matches(found)
    }

    /// What a block may hold after a crash, for a message.
    pub fn expectation(&self, volume: &Volume, number: u64) -> String {
        let flights: Vec<&Flight> = self.flights_over(volume.uuid, number).collect();
        format!("{:?}, in flight {flights:?}", volume.blocks.get(&number))
    }
}

pub fn rolled_back(volume: &mut Volume, source: &Volume) {
    let mut blocks = BTreeMap::new();
    for (number, block) in &source.blocks {
        blocks.insert(*number, shared(block.latest().clone(), block.hold));
    }
    volume.blocks = blocks;
    volume.size_bytes = source.size_bytes;
    volume.reservation_bytes = volume.reservation_bytes.min(source.size_bytes);
}

impl Volume {
    /// As it is with no call in flight.
    pub fn quiet(self) -> Self {
        Self { snapshots: 0, shared_at: 0, ..self }
    }
}

impl Model {
    /// Goes on counting where `former` stands.
    pub fn continue_from(&mut self, former: &Self) {
        self.now = former.now;
        self.next = former.next;
    }

    pub fn is_in_flight(&self, volume: Uuid, block: u64) -> bool {
        self.flights_over(volume, block).next().is_some()
    }
}

/// A read under way: what it may see.
#[derive(Clone, Debug)]
struct Watcher {
    volume: Uuid,
    frames: BTreeMap<u64, Frame>,
}

impl Model {
    /// A read of `volume` begins.
    pub fn watch(&mut self, volume: Uuid) -> u64 {
        let number = self.number();
        let known = &self.volumes[&volume];
        let mut frames: BTreeMap<u64, Frame> =
            known.blocks.iter().map(|(number, block)| (*number, block.latest().clone())).collect();
        for flight in self.flights.values().filter(|flight| flight.volume == volume) {
            allow_flight(&mut frames, flight);
        }
        self.watchers.insert(number, Watcher { volume, frames });
        number
    }

    /// The read ended: what each block may have shown.
    pub fn watched(&mut self, number: u64) -> BTreeMap<u64, Frame> {
        self.watchers.remove(&number).map(|watcher| watcher.frames).unwrap_or_default()
    }
}

fn allow_flight(frames: &mut BTreeMap<u64, Frame>, flight: &Flight) {
    if flight.kind == Kind::Discard {
        for (block, frame) in frames.range_mut(flight.blocks()) {
            frame.allow(flight.mask(*block), 0);
        }
        return;
    }
    for block in flight.blocks() {
        frames.entry(block).or_default().allow(flight.mask(block), flight.value);
    }
}

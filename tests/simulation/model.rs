//! The plain model of a pool: volumes by id, a copy of the contents for each snapshot, and what is in flight.
//!
//! A change is applied when its call has returned and before its range is let go (rule O8), so overlapping changes are
//! applied in the order in which the engine made them. Whoever looks at sectors while changes of them are in flight, a
//! reader or a snapshot, may see each of those changes or not: an [`Observer`] collects them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use plywood::units::VolumeId;
use uuid::Uuid;

use crate::content::{Change, Contents};

/// What the model knows of one volume.
#[derive(Clone, Debug)]
pub struct Volume {
    pub id: VolumeId,
    pub uuid: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub sector_size: u32,
    pub read_only: bool,
    pub protected: bool,
    pub quota_bytes: u64,
    pub reservation_bytes: u64,
    pub origin: Option<VolumeId>,
    pub attributes: BTreeMap<String, Vec<u8>>,
    pub contents: Contents,
    /// Whether mapped and own blocks are known exactly: not after changes that may or may not have been made.
    pub accountable: bool,
}

/// A change that was issued and has not returned.
#[derive(Clone, Debug)]
pub struct Flight {
    pub volume: VolumeId,
    pub sectors: Range<u64>,
    pub change: Change,
}

/// Somebody who looks at a volume over some time: every change in flight during it may be seen or not.
#[derive(Debug)]
pub struct Observer {
    pub volume: VolumeId,
    /// What a snapshot takes for certain: what the volume held when the observation began.
    pub base: Contents,
    pub seen: Vec<Flight>,
    pub accountable: bool,
}

/// A control call that was issued and has not returned; after a death of the engine it may have happened or not.
#[derive(Clone, Debug)]
pub enum Control {
    Create(Volume),
    Snapshot { observer: u64, volume: Volume },
    Clone(Volume),
    Delete(VolumeId),
    RollBack { volume: VolumeId, snapshot: VolumeId, keep: Option<Volume> },
    Resize { volume: VolumeId, size_bytes: u64 },
    Rename { volume: VolumeId, name: String },
    Attributes { volume: VolumeId, attributes: BTreeMap<String, Vec<u8>> },
    Protect { volume: VolumeId, protected: bool },
    Reserve { volume: VolumeId, reservation_bytes: u64 },
}

impl Control {
    /// One line for the trace.
    pub fn describe(&self) -> String {
        match self {
            Self::Create(volume) => format!("create {}, {} bytes", volume.name, volume.size_bytes),
            Self::Snapshot { volume, .. } => format!("snapshot {} of volume {:?}", volume.name, volume.origin),
            Self::Clone(volume) => format!("clone {} of volume {:?}", volume.name, volume.origin),
            Self::Delete(id) => format!("delete volume {id}"),
            Self::RollBack { volume, snapshot, keep } => {
                let kept = keep.as_ref().map(|kept| &kept.name);
                format!("roll volume {volume} back to volume {snapshot}, keep {kept:?}")
            }
            Self::Resize { volume, size_bytes } => format!("resize volume {volume} to {size_bytes} bytes"),
            Self::Rename { volume, name } => format!("rename volume {volume} to {name}"),
            Self::Attributes { volume, .. } => format!("attributes of volume {volume}"),
            Self::Reserve { volume, reservation_bytes } => {
                format!("reserve {reservation_bytes} bytes for volume {volume}")
            }
            Self::Protect { volume, protected } => format!("protect volume {volume}: {protected}"),
        }
    }
}

#[derive(Default)]
pub struct Model {
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub flights: HashMap<u64, Flight>,
    pub observers: HashMap<u64, Observer>,
    pub controls: HashMap<u64, Control>,
    next: u64,
}

impl Model {
    /// A number that was never given before: an operation's, and the value of what it writes.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub fn issue(&mut self, number: u64, flight: Flight) {
        for observer in self.observers.values_mut().filter(|observer| observer.volume == flight.volume) {
            observer.seen.push(flight.clone());
        }
        self.flights.insert(number, flight);
    }

    /// The change has been made; its range is still held.
    pub fn complete(&mut self, number: u64) {
        let flight = self.flights.remove(&number).expect("issued before");
        if let Some(volume) = self.volumes.get_mut(&flight.volume) {
            volume.contents.apply(flight.sectors, &flight.change);
        }
    }

    /// The change was refused and nothing happened.
    pub fn withdraw(&mut self, number: u64) {
        self.flights.remove(&number);
    }

    /// Begins to look at `sectors` of `volume`.
    pub fn observe(&mut self, number: u64, volume: VolumeId, sectors: &Range<u64>) {
        let seen = self.flights.values().filter(|flight| flight.volume == volume).cloned().collect();
        let known = &self.volumes[&volume];
        let observer = Observer { volume, base: known.contents.part(sectors), seen, accountable: known.accountable };
        self.observers.insert(number, observer);
    }

    /// Ends looking: what may have been seen.
    pub fn observed(&mut self, number: u64) -> Observed {
        self.observers.remove(&number).expect("begun before").into()
    }
}

/// The result of an observation.
pub struct Observed {
    pub contents: Contents,
    /// False when something was in flight: it is not known what is mapped.
    pub accountable: bool,
}

impl From<Observer> for Observed {
    fn from(observer: Observer) -> Self {
        let mut contents = observer.base;
        // Writes first: a discard brings zeros into doubt where something may be, and that includes these.
        for flight in observer.seen.iter().filter(|flight| matches!(flight.change, Change::Write(_))) {
            contents.doubt(flight.sectors.clone(), &flight.change);
        }
        for flight in observer.seen.iter().filter(|flight| !matches!(flight.change, Change::Write(_))) {
            contents.doubt(flight.sectors.clone(), &flight.change);
        }
        Self { contents, accountable: observer.accountable && observer.seen.is_empty() }
    }
}

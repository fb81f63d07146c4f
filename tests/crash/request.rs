//! Changes as the front holds them: until they are answered, and sent again to a successor.

use std::any::Any;
use std::collections::BTreeMap;

use plywood::engine::VolumeHandle;
use plywood::error::Error;
use plywood::io::IoMemory;
use uuid::Uuid;

use crate::content::{SECTOR, SECTORS, fill};
use crate::medium::Medium;
use crate::model::Kind;
use crate::world::World;

const BLOCK: u64 = SECTOR * SECTORS;

/// A change as the front holds it.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub volume: Uuid,
    pub offset: u64,
    pub length: u64,
    pub what: What,
    /// It was carried out, and only the reply is missing. Its range is held until that has been handed over.
    pub is_done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Write { fua: bool },
    Discard,
    Zeroes { unmap: bool },
}

impl What {
    pub fn kind(self) -> Kind {
        match self {
            Self::Write { .. } | Self::Zeroes { unmap: false } => Kind::Write,
            Self::Discard | Self::Zeroes { unmap: true } => Kind::Discard,
        }
    }
}

impl Request {
    /// Whether it was carried out and none of the others that are to be sent again may come before or after it.
    pub fn is_done_apart(&self, unanswered: &BTreeMap<u64, Self>) -> bool {
        self.is_done && unanswered.values().filter(|beside| self.overlaps(beside)).count() == 1
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.volume == other.volume
            && self.offset / BLOCK < (other.offset + other.length).div_ceil(BLOCK)
            && other.offset / BLOCK < (self.offset + self.length).div_ceil(BLOCK)
    }
}

/// Does what a request asks, with content that names it.
pub async fn carry_out(
    handle: VolumeHandle<Medium>,
    number: u64,
    request: Request,
) -> plywood::error::Result<Box<dyn Any>> {
    let Request { offset, length, .. } = request;
    match request.what {
        What::Write { fua } => {
            let memory = IoMemory::from_bytes(&fill(number, offset / SECTOR, length / SECTOR));
            handle.write(offset, &memory, fua).await.map(|held| Box::new(held) as Box<dyn Any>)
        }
        What::Discard => handle.discard(offset, length).await.map(|held| Box::new(held) as Box<dyn Any>),
        What::Zeroes { unmap } => {
            handle.write_zeroes(offset, length, unmap).await.map(|held| Box::new(held) as Box<dyn Any>)
        }
    }
}

impl World {
    /// A successor gets all requests that were not answered. Those that had been carried out must change nothing: their
    /// ranges were held, so nothing overlapping was answered after them.
    pub fn send_again(&mut self) {
        let unanswered = self.shared.unanswered.borrow().clone();
        for (number, mut request) in unanswered.clone() {
            let known = self.shared.model.borrow().volumes.contains_key(&request.volume);
            if !known {
                self.shared.unanswered.borrow_mut().remove(&number);
                continue;
            }
            self.shared.met.borrow_mut().sent_again += 1;
            if request.is_done_apart(&unanswered) {
                let handle = self.handle(request.volume);
                let done = self.finish(carry_out(handle, number, request));
                match done {
                    Ok(_) | Err(Error::NoSpace(_)) => {}
                    Err(error) => panic!("sent again: {request:?}: {error}"),
                }
                let sectors = request.offset / SECTOR..(request.offset + request.length) / SECTOR;
                self.shared.model.borrow_mut().sent_again(request.volume, sectors);
                self.shared.unanswered.borrow_mut().remove(&number);
                continue;
            }
            request.is_done = false;
            self.shared.unanswered.borrow_mut().insert(number, request);
            let sectors = request.offset / SECTOR..(request.offset + request.length) / SECTOR;
            let value = if matches!(request.what, What::Write { .. }) { number } else { 0 };
            let kind = request.what.kind();
            self.shared.model.borrow_mut().begin(number, request.volume, sectors, value, kind);
            self.start_change(number, request);
        }
    }
}

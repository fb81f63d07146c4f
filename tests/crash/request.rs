//! Requests as a front holds them, to be sent again to a successor.

use std::any::Any;
use std::collections::BTreeMap;

use plywood::engine::VolumeHandle;
use plywood::io::IoMemory;
use uuid::Uuid;

use crate::content::{SECTOR, SECTORS, fill};
use crate::medium::Medium;
use crate::model::Kind;

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
            handle.write(offset, &memory, fua).await.map(boxed)
        }
        What::Discard => handle.discard(offset, length).await.map(boxed),
        What::Zeroes { unmap } => handle.write_zeroes(offset, length, unmap).await.map(boxed),
    }
}

fn boxed<T: 'static>(held: T) -> Box<dyn Any> {
    Box::new(held)
}

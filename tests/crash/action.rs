//! What an engine asks of a medium, and what of it is not durable yet.

use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;

use plywood::engine::Memory;
use plywood::io::IoMemory;

use crate::content::SECTOR;
use crate::image::Image;

#[derive(Clone)]
pub enum Action {
    Read(u64, IoMemory),
    Write(u64, IoMemory),
    WriteDurable(u64, IoMemory),
    /// Makes the writes with these numbers durable.
    Flush(Vec<u64>),
    Extend(Range<u64>),
    Punch(Range<u64>),
}

impl Action {
    pub fn range(&self) -> Range<u64> {
        match self {
            Self::Read(offset, memory) | Self::Write(offset, memory) | Self::WriteDurable(offset, memory) => {
                *offset..*offset + memory.len() as u64
            }
            Self::Flush(_) => 0..0,
            Self::Extend(range) | Self::Punch(range) => range.clone(),
        }
    }

    pub fn call(&self) -> Call {
        match self {
            Self::Read(..) => Call::Read,
            Self::Write(..) => Call::Write,
            Self::WriteDurable(..) => Call::WriteDurable,
            Self::Flush(_) => Call::Flush,
            Self::Extend(_) => Call::Extend,
            Self::Punch(_) => Call::Punch,
        }
    }

    pub fn changes(&self) -> bool {
        !matches!(self, Self::Read(..) | Self::Flush(_))
    }

    pub fn content(&self) -> Option<Content> {
        match self {
            Self::Write(_, memory) | Self::WriteDurable(_, memory) => Some(Content::Bytes(memory.to_vec().into())),
            Self::Extend(_) | Self::Punch(_) => Some(Content::Zeros),
            Self::Read(..) | Self::Flush(_) => None,
        }
    }
}

#[derive(Clone)]
pub enum Content {
    Bytes(Rc<[u8]>),
    Zeros,
}

impl Content {
    pub fn write(&self, image: &mut Image, whole: &Range<u64>, part: Range<u64>) {
        match self {
            Self::Bytes(bytes) => {
                let within = (part.start - whole.start) as usize..(part.end - whole.start) as usize;
                image.write(part.start, &bytes[within]);
            }
            Self::Zeros => image.zero(part),
        }
    }
}

/// A change that has ended and is not durable yet.
#[derive(Clone)]
pub struct Cached {
    pub number: u64,
    pub range: Range<u64>,
    pub content: Content,
    /// Sectors that a later change has made durable: this one can no longer win there.
    pub outdated: HashSet<u64>,
}

impl Cached {
    pub fn write(&self, image: &mut Image) {
        if self.outdated.is_empty() {
            return self.content.write(image, &self.range, self.range.clone());
        }
        for sector in sectors(&self.range).filter(|sector| !self.outdated.contains(sector)) {
            self.content.write(image, &self.range, sector * SECTOR..(sector + 1) * SECTOR);
        }
    }
}

pub fn sectors(range: &Range<u64>) -> Range<u64> {
    range.start / SECTOR..range.end / SECTOR
}

/// The kinds of calls, to be counted and to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Read,
    Write,
    WriteDurable,
    Flush,
    Extend,
    Punch,
}

/// One call that fails.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub call: Call,
    /// Which of its kind, from 0.
    pub number: u64,
    /// As the host says it.
    pub errno: i32,
    /// Whether a part of it is carried out.
    pub in_part: bool,
}

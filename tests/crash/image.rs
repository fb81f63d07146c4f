//! The bytes of a medium, cheap to copy: a state is copied for every crash.

use std::ops::Range;
use std::rc::Rc;

pub const BLOCK: usize = 4096;
const CHUNK: usize = 64;

type Block = Rc<[u8; BLOCK]>;
type Chunk = Rc<[Option<Block>; CHUNK]>;

/// The bytes of a medium. A clone costs little: blocks are shared.
#[derive(Clone)]
pub struct Image {
    chunks: Vec<Option<Chunk>>,
    pub size_bytes: u64,
}

impl Image {
    /// Zeros.
    pub fn new(size_bytes: u64) -> Self {
        Self { chunks: vec![None; (size_bytes as usize).div_ceil(BLOCK * CHUNK)], size_bytes }
    }

    pub fn read(&self, offset: u64, into: &mut [u8]) {
        self.visit(offset, into.len(), |range, found| match found {
            Some(bytes) => into[range].copy_from_slice(bytes),
            None => into[range].fill(0),
        });
    }

    /// Shows what stands in `len` bytes from `offset` on, block by block: where in the whole, and the bytes; none for zeros.
    pub fn visit(&self, offset: u64, len: usize, mut each: impl FnMut(Range<usize>, Option<&[u8]>)) {
        for (block, skip, range) in parts(offset, len) {
            let found = self.chunks[block / CHUNK].as_ref().and_then(|chunk| chunk[block % CHUNK].as_ref());
            let length = range.len();
            each(range, found.map(|bytes| &bytes[skip..skip + length]));
        }
    }

    /// Whether anything but zeros may stand in a block.
    pub fn has_block(&self, block: u64) -> bool {
        let block = block as usize;
        self.chunks[block / CHUNK].as_ref().is_some_and(|chunk| chunk[block % CHUNK].is_some())
    }

    pub fn write(&mut self, offset: u64, from: &[u8]) {
        for (block, skip, range) in parts(offset, from.len()) {
            let chunk = self.chunks[block / CHUNK].get_or_insert_with(|| Rc::new([const { None }; CHUNK]));
            let place = &mut Rc::make_mut(chunk)[block % CHUNK];
            if range.len() == BLOCK && is_zero(&from[range.clone()]) {
                *place = None;
                continue;
            }
            let bytes = place.get_or_insert_with(|| Rc::new([0; BLOCK]));
            Rc::make_mut(bytes)[skip..skip + range.len()].copy_from_slice(&from[range]);
        }
    }

    pub fn zero(&mut self, range: Range<u64>) {
        for (block, skip, part) in parts(range.start, (range.end - range.start) as usize) {
            let Some(chunk) = &mut self.chunks[block / CHUNK] else { continue };
            if chunk[block % CHUNK].is_none() {
                continue;
            }
            let place = &mut Rc::make_mut(chunk)[block % CHUNK];
            if part.len() == BLOCK {
                *place = None;
            } else if let Some(bytes) = place {
                Rc::make_mut(bytes)[skip..skip + part.len()].fill(0);
            }
        }
    }
}

impl Image {
    /// Changes all blocks that are `wanted`.
    pub fn change(&mut self, wanted: impl Fn(&[u8]) -> bool, mut change: impl FnMut(&mut [u8])) {
        for chunk in self.chunks.iter_mut().flatten() {
            for index in 0..CHUNK {
                if chunk[index].as_ref().is_some_and(|bytes| wanted(&bytes[..]))
                    && let Some(bytes) = &mut Rc::make_mut(chunk)[index]
                {
                    change(&mut Rc::make_mut(bytes)[..]);
                }
            }
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes[0] == 0 && bytes[1..] == bytes[..bytes.len() - 1]
}

/// Cuts bytes at the borders of blocks: block, offset within it, range within the whole.
pub fn parts(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset as usize + done;
        let part = (BLOCK - at % BLOCK).min(len - done);
        let range = done..done + part;
        done += part;
        (part > 0).then_some((at / BLOCK, at % BLOCK, range))
    })
}

//! Restore and repair cut short by a power cut at every write: what is left is the pool as it was, the finished one, or one
//! that says that it is unfinished, is refused by everything else, and is finished by doing the same again.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, Cursor};
use std::ops::Range;
use std::rc::Rc;

use fastrand::Rng;
use futures_lite::future::block_on;
use plywood::engine::{OpenOptions, Pool, PrivateLog, RepairReport, Storage, repair_metadata, restore_metadata};
use plywood::error::{Error, Result};
use plywood::format::{Record, SUPERBLOCK_COPIES, VolumeRecord};
use plywood::io::{IoMemory, MemoryImage, MemoryStorage};
use plywood::units::{Lsn, PoolBlock};

use super::damage::flip;
use super::dump::dump;
use super::sample::{assert_sound, check, contents, sample};
use super::structures::{live_blocks, read, records, superblock};

/// What was done to a medium, in order.
enum Change {
    Write { offset: u64, bytes: Vec<u8>, durable: bool },
    Flush,
}

/// A storage that remembers what changes it.
#[derive(Clone)]
struct Recording {
    inner: MemoryStorage,
    changes: Rc<RefCell<Vec<Change>>>,
}

impl Recording {
    fn new(image: &MemoryImage) -> Self {
        Self { inner: MemoryStorage::from_image(image.clone()), changes: Rc::default() }
    }

    fn wrote(&self, offset: u64, from: &IoMemory, durable: bool) {
        self.changes.borrow_mut().push(Change::Write { offset, bytes: from.to_vec(), durable });
    }
}

impl Storage for Recording {
    type Memory = IoMemory;

    fn allocate(&self, len: usize) -> IoMemory {
        self.inner.allocate(len)
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn read(&self, offset: u64, into: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.read(offset, into)
    }

    fn write(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.wrote(offset, from, false);
        self.inner.write(offset, from)
    }

    fn write_durable(&self, offset: u64, from: &IoMemory) -> impl Future<Output = io::Result<()>> + 'static {
        self.wrote(offset, from, true);
        self.inner.write_durable(offset, from)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> + 'static {
        self.changes.borrow_mut().push(Change::Flush);
        self.inner.flush()
    }

    fn extend(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.extend(range)
    }

    fn punch(&self, range: Range<u64>) -> impl Future<Output = io::Result<()>> + 'static {
        self.inner.punch(range)
    }
}

/// A write as a power cut leaves it: there, not there, or there in some of its sectors.
fn perhaps(image: &mut MemoryImage, offset: u64, bytes: &[u8], random: &mut Rng) {
    match random.u8(..4) {
        0 => {}
        1 => {
            for (number, sector) in bytes.chunks(512).enumerate() {
                if random.bool() {
                    image.write(offset + number as u64 * 512, sector);
                }
            }
        }
        _ => image.write(offset, bytes),
    }
}

/// Calls `each` with a medium as a power cut during each change may leave it, and the number of the change.
fn cut_at_every_write(before: &MemoryImage, changes: &[Change], mut each: impl FnMut(usize, &MemoryImage)) {
    let mut random = Rng::with_seed(11);
    let mut durable = before.clone();
    let mut cached: Vec<(u64, &[u8])> = Vec::new();
    for (number, change) in changes.iter().enumerate() {
        let mut image = durable.clone();
        for (offset, bytes) in &cached {
            perhaps(&mut image, *offset, bytes, &mut random);
        }
        if let Change::Write { offset, bytes, .. } = change {
            perhaps(&mut image, *offset, bytes, &mut random);
        }
        each(number, &image);
        match change {
            Change::Flush => cached.drain(..).for_each(|(offset, bytes)| durable.write(offset, bytes)),
            Change::Write { offset, bytes, durable: true } => durable.write(*offset, bytes),
            Change::Write { offset, bytes, durable: false } => cached.push((*offset, bytes)),
        }
    }
    assert!(cached.is_empty(), "what was written last is not durable");
    each(changes.len(), &durable);
}

fn is_superblock(change: Option<&Change>) -> bool {
    let copies = SUPERBLOCK_COPIES.into_iter().flatten();
    matches!(change, Some(Change::Write { offset, .. }) if copies.into_iter().any(|copy| copy.offset_bytes() == *offset))
}

/// Whether the pool is refused as unfinished, with words that say `what` to do.
fn is_refused(image: &MemoryImage, what: &str) -> bool {
    let storage = MemoryStorage::from_image(image.clone());
    let log = Box::new(PrivateLog::new(0));
    let opened = block_on(Pool::open(storage.clone(), log, OpenOptions::default())).map(drop);
    if let Err(Error::Unfinished(words)) = &opened {
        assert!(words.contains("not finished") && words.contains(what), "{words}");
        assert_eq!(storage.statistics().writes, 0);
        assert!(matches!(check(image), Err(Error::Unfinished(_))));
        return true;
    }
    false
}

fn restore_recorded(image: &MemoryImage, text: &str) -> Result<(MemoryImage, Vec<Change>)> {
    let storage = Recording::new(image);
    block_on(restore_metadata(&storage, || Ok(Cursor::new(text.as_bytes().to_vec()))))?;
    Ok((storage.inner.snapshot_image(), storage.changes.take()))
}

/// A pool that went on after its dump: the dump's nodes stand where others do now, and others hold what it names.
fn gone_on() -> MemoryImage {
    let (image, ()) = super::sample::with_pool(sample(), true, async |pool| {
        pool.settle().await.unwrap();
        let one = pool.volume("one").unwrap().id;
        for block in 0..40 {
            super::sample::write(pool, one, block * 300, 9000 + block).await;
        }
        pool.checkpoint().await.unwrap();
    });
    image
}

#[test]
fn restore_cut_short_is_refused_and_done_again() {
    let (text, _) = dump(&sample());
    let mut destroyed = gone_on();
    for copy in SUPERBLOCK_COPIES.into_iter().flatten() {
        destroyed.write(copy.offset_bytes(), &[7; 4096]);
    }
    for before in [gone_on(), destroyed] {
        let old = check(&before).ok().map(|_| dump(&before).0);
        let (done, changes) = restore_recorded(&before, &text).unwrap();
        assert_eq!(dump(&done).0, text);
        let (mut refused, mut as_before, mut finished) = (0, 0, 0);
        cut_at_every_write(&before, &changes, |number, image| {
            let near = (number.saturating_sub(1)..=number + 1).any(|number| is_superblock(changes.get(number)));
            if is_refused(image, "pool restore") {
                refused += 1;
                if near || number % 23 == 0 {
                    let (again, _) = restore_recorded(image, &text).unwrap();
                    assert_eq!(dump(&again).0, text, "restored again after {number} changes");
                    assert_sound(&again);
                    assert!(matches!(repair_only(image), Err(Error::Unfinished(_))));
                }
            } else if check(image).is_err() {
                assert!(old.is_none() && number < 10, "{number}: {:?}", check(image));
                as_before += 1;
            } else if number < changes.len() / 2 {
                assert_eq!(Some(dump(image).0), old, "after {number} changes");
                as_before += 1;
            } else {
                assert_eq!(dump(image).0, text, "after {number} changes");
                finished += 1;
            }
        });
        println!("{} changes: {as_before} as before, {refused} refused, {finished} finished", changes.len());
        assert!(refused > 300 && as_before > 0 && finished > 0);
    }
}

fn repair_only(image: &MemoryImage) -> Result<(MemoryImage, RepairReport)> {
    let storage = MemoryStorage::from_image(image.clone());
    let report = block_on(repair_metadata(&storage, None, &mut |_| ()))?;
    Ok((storage.snapshot_image(), report))
}

/// Damage of each kind that a repair goes about differently: a lost leaf, a bad copy of a pair, a bad copy of the superblock,
/// a journal that breaks off, and one whose last change cannot be made.
fn damaged() -> Vec<(&'static str, MemoryImage)> {
    let image = sample();
    let (_, copies) = superblock(&image);
    let low = records(&image).into_iter().find(|(_, record)| record.name == "low").unwrap();
    let journal: Vec<u64> =
        live_blocks(&image).iter().filter(|block| block.place.is_none()).map(|block| block.block).collect();
    vec![
        ("a leaf", flip(&image, low.1.root.entry.address.0, 77)),
        ("a copy of a record", flip(&image, low.0.address.0 + 1, 77)),
        ("a copy of the superblock", flip(&image, copies[0].0, 999)),
        ("the journal", flip(&image, journal[journal.len() - 2], 500)),
        ("an impossible change", with_impossible_change(&image)),
    ]
}

/// The journal's last change is about a volume that there is not.
fn with_impossible_change(image: &MemoryImage) -> MemoryImage {
    let (superblock, _) = superblock(image);
    let mut at = superblock.journal_append;
    let (mut last, mut found) = (Lsn(0), None);
    while let Some(header) = plywood::format::decode_batch_header(&superblock.uuid, &read(image, first_of(at))) {
        (last, found) = (header.last, Some(header.checksum));
        at += header.blocks;
    }
    let mut bytes = Vec::new();
    let known: Vec<VolumeRecord> = records(image).into_iter().map(|(_, record)| record).collect();
    Record::Unmap { volume: known[0].id, virtual_block: plywood::units::VirtualBlock(0), count: 1 }.encode(&mut bytes);
    Record::VolumeDeleted { volume: plywood::units::VolumeId(4000) }.encode(&mut bytes);
    let (first, chain) = (last.next(), found.expect("the sample has batches"));
    let generation = superblock.generation;
    let (batch, _) = plywood::format::encode_batch(&superblock.uuid, generation, first, first.next(), chain, &bytes);
    let mut changed = image.clone();
    changed.write(first_of(at).offset_bytes(), &batch);
    changed
}

fn first_of(at: u64) -> PoolBlock {
    plywood::format::JOURNAL_FIRST.plus(at)
}

#[test]
fn repair_cut_short_is_refused_and_done_again_or_undone() {
    for (what, before) in damaged() {
        let storage = Recording::new(&before);
        // What was saved, with the number of changes made until then.
        let mut saved: Vec<(usize, u64, Vec<u8>)> = Vec::new();
        let changes = Rc::clone(&storage.changes);
        let mut save = |blocks: &[(PoolBlock, Vec<u8>)]| {
            let made = changes.borrow().len();
            saved.extend(blocks.iter().map(|(block, bytes)| (made, block.0, bytes.clone())));
            Ok(())
        };
        let report = block_on(repair_metadata(&storage, Some(&mut save), &mut |_| ())).unwrap();
        let done = storage.inner.snapshot_image();
        assert_sound(&done);
        let expected = contents(&done);
        let faults = check(&before).unwrap().faults;
        let changes = storage.changes.take();
        let copies: Vec<usize> = (0..changes.len()).filter(|number| is_superblock(changes.get(*number))).collect();
        let switched = copies[copies.len() - 2];
        let (mut refused, mut as_before, mut finished) = (0, 0, 0);
        cut_at_every_write(&before, &changes, |number, image| {
            let near = (number.saturating_sub(1)..=number + 1).any(|number| is_superblock(changes.get(number)));
            if is_refused(image, "--undo") {
                refused += 1;
                if near || number % 29 == 0 {
                    let (again, second) = repair_only(image).unwrap();
                    assert_sound(&again);
                    assert_eq!(contents(&again), expected, "{what}: repaired again after {number} changes");
                    // When one copy of the new superblock is there, what was lost has been dealt with.
                    let told = if number > switched { second.lost.is_empty() } else { second.lost == report.lost };
                    assert!(told || number == switched, "{what}: after {number} changes: {second:?}");
                    assert!(restore_recorded(image, &dump(&sample()).0).is_ok());
                }
            } else if number < changes.len() / 2 {
                assert_eq!(check(image).unwrap().faults.len(), faults.len().max(1), "{what}: after {number} changes");
                as_before += 1;
            } else {
                assert_eq!(contents(image), expected, "{what}: after {number} changes");
                finished += 1;
            }
            // What was saved until then, put back from the end to the start, is the pool as it was.
            let mut undone = image.clone();
            for (_, block, bytes) in saved.iter().rev().filter(|(made, ..)| *made <= number) {
                undone.write(block * 4096, bytes);
            }
            assert_same(&undone, &before, what);
        });
        println!("{what}: {} changes: {as_before} as before, {refused} refused, {finished} finished", changes.len());
        assert!(refused > 50 && as_before > 0 && finished > 0);
    }
}

fn assert_same(image: &MemoryImage, other: &MemoryImage, what: &str) {
    for block in image.written_blocks() {
        assert!(read(image, PoolBlock(block)) == read(other, PoolBlock(block)), "{what}: block {block}");
    }
}

//! The server between a front's queue and a storage in memory.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytemuck::NoUninit;
use rustix::event::{EventfdFlags, eventfd};

use async_executor::LocalExecutor;

use super::*;
use crate::engine::Memory;
use crate::export::device::{PlainDevice, PlainVolumes, VolumeFace};
use crate::export::fuse::abi::{
    AttrOut, EntryOut, FallocateIn, InHeader, LseekIn, OpenIn, OpenOut, ReadIn, ReleaseIn, SETATTR_SIZE, SetAttrIn,
    WriteIn, WriteOut, opcode,
};
use crate::export::shared::{Arrangement, FrontQueue, Geometry, SessionMemory};
use crate::io::{IoMemory, MemoryStorage, PayloadArea, block_on};

const SIZE: u64 = 1 << 20;
const VOLUME: u64 = 7;
const NODE: u64 = VOLUME + 1;

/// A front with one queue, and whatever engine serves it at the moment.
struct Front {
    memory: SessionMemory,
    queue: FrontQueue,
    unique: Cell<u64>,
}

fn doorbell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// What came back: the error, and the reply.
type Answered = (i32, Vec<u8>);

impl Front {
    fn new() -> Self {
        let memory = SessionMemory::create(Geometry::new(Arrangement::Ring, 16384, vec![8]).unwrap()).unwrap();
        let given_up = Arc::new(AtomicBool::new(false));
        let queue = FrontQueue::new(memory.clone(), 0, Arc::new(doorbell()), Arc::new(doorbell()), given_up);
        Self { memory, queue, unique: Cell::new(2) }
    }

    /// Puts a request in an entry, as the kernel does, and sends it.
    fn send(&self, entry: u32, opcode: u32, node: u64, fixed: &impl NoUninit, payload: &[u8]) {
        self.unique.set(self.unique.get() + 2);
        let header = InHeader { opcode, unique: self.unique.get(), nodeid: node, ..InHeader::default() };
        self.queue.write_header(entry, 0, bytemuck::bytes_of(&header));
        self.queue.write_header(entry, 128, bytemuck::bytes_of(fixed));
        self.queue.write_header(entry, 272, &u32::try_from(payload.len()).unwrap().to_ne_bytes());
        self.memory.payloads().write(entry as usize * 16384, payload);
        self.queue.send(entry);
    }

    fn payload(&self, entry: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.payloads().read(entry as usize * 16384, &mut bytes);
        bytes
    }

    fn answers(&self) -> BTreeMap<u32, Answered> {
        let mut answers = BTreeMap::new();
        self.queue.take_answers(|answer| {
            if answer.inline_len > 0 {
                self.queue.inline_to_payload(&answer);
            }
            let reply = self.payload(answer.entry, answer.payload_len + answer.inline_len);
            answers.insert(answer.entry, (answer.error, reply));
        });
        answers
    }
}

/// An engine on `volumes`.
struct Engine<V: Volumes> {
    server: Server<V>,
    executor: Rc<LocalExecutor<'static>>,
}

impl<V: Volumes> Engine<V>
where
    V::Device: Device<Memory = IoMemory>,
{
    fn new(front: &Front, volumes: V) -> Self {
        let queues = EngineQueues::open(front.memory.clone(), vec![doorbell()]).unwrap();
        let mapping = front.memory.payloads().mapping();
        let area = PayloadArea::new(Arc::clone(mapping), 0..mapping.len());
        let executor = Rc::new(LocalExecutor::new());
        let server = Server::new(queues, area.memory(0..area.len()), volumes);
        Self { server, executor }
    }

    /// Serves until nothing is left to do.
    fn run(&self, driver: &MemoryStorage) {
        self.server.poll();
        block_on(&self.executor, driver, &self.server, self.server.idle()).unwrap();
    }
}

struct Plain {
    front: Front,
    storage: MemoryStorage,
    engine: Engine<PlainVolumes<MemoryStorage>>,
}

fn plain_volumes(storage: &MemoryStorage) -> PlainVolumes<MemoryStorage> {
    PlainVolumes(BTreeMap::from([(VolumeId(VOLUME), PlainDevice::new(storage.clone()))]))
}

impl Plain {
    fn new() -> Self {
        Self::on(MemoryStorage::new(SIZE))
    }

    fn on(storage: MemoryStorage) -> Self {
        let front = Front::new();
        let engine = Engine::new(&front, plain_volumes(&storage));
        Self { front, storage, engine }
    }

    fn ask(&self, opcode: u32, node: u64, fixed: &impl NoUninit, payload: &[u8]) -> Answered {
        self.front.send(0, opcode, node, fixed, payload);
        self.engine.run(&self.storage);
        self.front.answers().remove(&0).expect("an answer")
    }

    fn opened(&self) -> u64 {
        let flags = libc::O_RDWR.cast_unsigned();
        let (error, reply) = self.ask(opcode::OPEN, NODE, &OpenIn { flags, open_flags: 0 }, &[]);
        assert_eq!(error, 0);
        bytemuck::pod_read_unaligned::<OpenOut>(&reply).fh
    }

    fn write(&self, fh: u64, offset: u64, data: &[u8]) -> Answered {
        let size = u32::try_from(data.len()).unwrap();
        self.ask(opcode::WRITE, NODE, &WriteIn { fh, offset, size, ..WriteIn::default() }, data)
    }

    fn read(&self, fh: u64, offset: u64, size: u32) -> Answered {
        self.ask(opcode::READ, NODE, &ReadIn { fh, offset, size, ..ReadIn::default() }, &[])
    }
}

#[test]
fn volume_is_found_opened_written_read_and_closed() {
    let plain = Plain::new();
    let (error, reply) = plain.ask(opcode::LOOKUP, 1, &[0_u8; 8], b"7\0");
    let entry: EntryOut = bytemuck::pod_read_unaligned(&reply);
    assert_eq!((error, entry.nodeid, entry.attr.size), (0, NODE, SIZE));
    let fh = plain.opened();
    assert!(plain.engine.server.is_open(VolumeId(VOLUME)));
    let (error, reply) = plain.write(fh, 8192, &[0x5a; 4096]);
    assert_eq!((error, bytemuck::pod_read_unaligned::<WriteOut>(&reply).size), (0, 4096));
    assert_eq!(plain.read(fh, 8192 - 512, 1024), (0, [[0; 512], [0x5a; 512]].concat()));
    let release = ReleaseIn { fh, ..ReleaseIn::default() };
    assert_eq!(plain.ask(opcode::RELEASE, NODE, &release, &[]).0, 0);
    assert!(!plain.engine.server.is_open(VolumeId(VOLUME)));
    assert_eq!(plain.read(fh, 0, 512).0, -libc::EBADF);
}

#[test]
fn what_is_not_there_or_not_aligned_is_refused() {
    let plain = Plain::new();
    for name in [&b"8\0"[..], b"x\0", b".\0"] {
        assert_eq!(plain.ask(opcode::LOOKUP, 1, &[0_u8; 8], name).0, -libc::ENOENT);
    }
    assert_eq!(plain.ask(opcode::GETATTR, 99, &[0_u8; 16], &[]).0, -libc::ENOENT);
    assert_eq!(plain.ask(opcode::OPEN, 1, &OpenIn::default(), &[]).0, -libc::EISDIR);
    let fh = plain.opened();
    assert_eq!(plain.write(fh, 100, &[1; 512]).0, -libc::EINVAL);
    assert_eq!(plain.write(fh, 0, &[1; 100]).0, -libc::EINVAL);
    assert_eq!(plain.write(fh, SIZE - 512, &[1; 1024]).0, -libc::EFBIG);
    assert_eq!(plain.write(fh + 1, 0, &[1; 512]).0, -libc::EBADF);
    assert_eq!(plain.read(fh, SIZE - 512, 1024), (0, vec![0; 512]), "short at the end of the file only");
    assert_eq!(plain.read(fh, SIZE, 1024), (0, vec![]));
}

#[test]
fn punched_and_zeroed_ranges_read_as_zeros() {
    let plain = Plain::new();
    let fh = plain.opened();
    plain.write(fh, 0, &[7; 16384]);
    let punch = |mode: i32, offset, length| {
        let mode = (mode | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned();
        let fixed = FallocateIn { fh, offset, length, mode, padding: 0 };
        plain.ask(opcode::FALLOCATE, NODE, &fixed, &[]).0
    };
    assert_eq!(punch(libc::FALLOC_FL_PUNCH_HOLE, 4096, 4096), 0);
    assert_eq!(punch(libc::FALLOC_FL_ZERO_RANGE, 12288, 1 << 40), 0, "what is beyond the end is cut off");
    let expected = [[7; 4096], [0; 4096], [7; 4096], [0; 4096]].concat();
    assert_eq!(plain.read(fh, 0, 16384).1, expected);
    let seek = LseekIn { fh, offset: SIZE, whence: libc::SEEK_DATA.cast_unsigned(), padding: 0 };
    assert_eq!(plain.ask(opcode::LSEEK, NODE, &seek, &[]).0, -libc::ENXIO);
}

#[test]
fn truncation_is_allowed_to_the_true_size_only() {
    let plain = Plain::new();
    let truncate = |size| {
        let fixed = SetAttrIn { valid: SETATTR_SIZE, size, ..SetAttrIn::default() };
        plain.ask(opcode::SETATTR, NODE, &fixed, &[])
    };
    assert_eq!(truncate(0).0, -libc::EPERM);
    let (error, reply) = truncate(SIZE);
    assert_eq!((error, bytemuck::pod_read_unaligned::<AttrOut>(&reply).attr.size), (0, SIZE));
}

#[test]
fn directory_lists_every_volume_once_in_pieces() {
    let (front, storage) = (Front::new(), MemoryStorage::new(SIZE));
    let volumes = (1..=20).map(|id| (VolumeId(id * 3), PlainDevice::new(storage.clone()))).collect();
    let engine = Engine::new(&front, PlainVolumes(volumes));
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let read = ReadIn { offset, size: 100, ..ReadIn::default() };
        front.send(0, opcode::READDIR, 1, &read, &[]);
        engine.run(&storage);
        let (error, mut reply) = front.answers().remove(&0).unwrap();
        assert_eq!(error, 0);
        if reply.is_empty() {
            break;
        }
        while !reply.is_empty() {
            let field = |at: usize| u64::from_ne_bytes(reply[at..at + 8].try_into().unwrap());
            offset = field(8);
            let len = (field(16) & 0xffff_ffff) as usize;
            names.push(String::from_utf8(reply[24..24 + len].to_vec()).unwrap());
            reply.drain(..(24 + len).next_multiple_of(8));
        }
    }
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    expected.extend((1..=20).map(|id| (id * 3).to_string()));
    assert_eq!(names, expected);
}

#[test]
fn write_leaves_its_payload_as_it_was_so_that_a_successor_can_repeat_it() {
    let plain = Plain::new();
    let fh = plain.opened();
    plain.front.send(3, opcode::WRITE, NODE, &WriteIn { fh, size: 4096, ..WriteIn::default() }, &[9; 4096]);
    plain.engine.run(&plain.storage);
    assert_eq!(plain.front.payload(3, 4096), [9; 4096]);
}

#[test]
fn successor_knows_what_is_open_and_repeats_what_was_not_answered() {
    let Plain { front, storage, engine } = {
        // Nothing completes before the loop has its turn.
        let plain = Plain::on(MemoryStorage::scrambled(SIZE, 1));
        let fh = plain.opened();
        plain.front.send(1, opcode::WRITE, NODE, &WriteIn { fh, size: 512, ..WriteIn::default() }, &[1; 512]);
        plain.front.send(2, opcode::READ, NODE, &ReadIn { fh, offset: 4096, size: 512, ..ReadIn::default() }, &[]);
        // Taken, perhaps even done; then the process dies.
        plain.engine.server.poll();
        plain
    };
    drop(engine);
    assert!(front.answers().is_empty());
    let successor = Engine::new(&front, plain_volumes(&storage));
    assert_eq!(successor.server.open_volumes(), [VolumeId(VOLUME)]);
    successor.run(&storage);
    let answers = front.answers();
    assert_eq!(answers[&1].0, 0);
    assert_eq!(answers[&2], (0, vec![0; 512]));
    let mut written = [0; 512];
    storage.snapshot_image().read(0, &mut written);
    assert_eq!(written, [1; 512]);
}

#[test]
fn stopped_server_leaves_requests_to_its_successor() {
    let plain = Plain::new();
    let fh = plain.opened();
    plain.engine.server.stop();
    plain.front.send(1, opcode::READ, NODE, &ReadIn { fh, size: 512, ..ReadIn::default() }, &[]);
    plain.engine.run(&plain.storage);
    assert!(plain.front.answers().is_empty());
    let successor = Engine::new(&plain.front, plain_volumes(&plain.storage));
    successor.run(&plain.storage);
    assert_eq!(plain.front.answers()[&1].0, 0);
}

/// A device whose writes hold on to a guard that notes when it is dropped.
#[derive(Clone)]
struct Guarded {
    answers: Rc<dyn Fn() -> usize>,
    at_drop: Rc<RefCell<Vec<usize>>>,
}

struct Guard(Guarded);

impl Drop for Guard {
    fn drop(&mut self) {
        let answers = (self.0.answers)();
        self.0.at_drop.borrow_mut().push(answers);
    }
}

impl Device for Guarded {
    type Memory = IoMemory;
    type Held = Guard;

    fn size_bytes(&self) -> u64 {
        SIZE
    }

    async fn read(&self, _: u64, _: &IoMemory) -> Result<()> {
        Ok(())
    }

    async fn write(&self, _: u64, from: &IoMemory, _: bool) -> Result<Guard> {
        assert_eq!(from.len(), 512);
        Ok(Guard(self.clone()))
    }

    async fn discard(&self, _: u64, _: u64) -> Result<Guard> {
        Ok(Guard(self.clone()))
    }

    async fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<Guard> {
        Ok(Guard(self.clone()))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn seek(&self, _: u64, _: bool) -> Result<Option<u64>> {
        Ok(None)
    }
}

impl Volumes for Guarded {
    type Device = Self;

    fn find(&self, _: VolumeId) -> Option<VolumeFace> {
        Some(VolumeFace { size_bytes: SIZE, read_only: false })
    }

    fn list(&self, _: VolumeId, _: usize) -> Vec<VolumeId> {
        Vec::new()
    }

    fn open(&self, _: VolumeId, _: bool) -> Result<Self> {
        Ok(self.clone())
    }
}

#[test]
fn range_is_held_until_the_answer_was_handed_over() {
    let front = Rc::new(Front::new());
    let seen = Rc::new(Cell::new(0));
    let (same, count) = (Rc::clone(&front), Rc::clone(&seen));
    let answers = Rc::new(move || {
        count.set(count.get() + same.answers().len());
        count.get()
    });
    let device = Guarded { answers, at_drop: Rc::default() };
    let engine = Engine::new(&front, device.clone());
    let driver = MemoryStorage::new(SIZE);
    front.send(0, opcode::OPEN, NODE, &OpenIn { flags: libc::O_RDWR.cast_unsigned(), open_flags: 0 }, &[]);
    engine.run(&driver);
    let fh = bytemuck::pod_read_unaligned::<OpenOut>(&front.answers()[&0].1).fh;
    front.send(0, opcode::WRITE, NODE, &WriteIn { fh, size: 512, ..WriteIn::default() }, &[1; 512]);
    engine.run(&driver);
    let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned();
    front.send(1, opcode::FALLOCATE, NODE, &FallocateIn { fh, length: 512, mode, ..FallocateIn::default() }, &[]);
    engine.run(&driver);
    assert_eq!(*device.at_drop.borrow(), [1, 2], "each answer could be taken when the guard was dropped");
}

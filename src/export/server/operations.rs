//! What each request does.

use std::rc::Rc;
use std::time::Instant;

use super::super::device::{Device, VolumeFace, Volumes};
use super::super::fuse::abi::{
    Attr, AttrOut, Dirent, EntryOut, LseekOut, OpenOut, ROOT_ID, StatfsOut, WriteOut, open_flag,
};
use super::super::fuse::request::{Node, Operation, Request};
use super::counters::{IoKind, VolumeCounters};
use super::{Answer, State, refused};
use crate::engine::Memory;
use crate::error;
use crate::units::{SECTOR_SIZE, VolumeId};

/// How long the kernel may keep names and attributes, in seconds: volumes change their size only through it.
const VALID_SECONDS: u64 = 86_400;
/// Entries of the directory before the first volume: "." and "..".
const DOTS: u64 = 2;

type HeldOf<V> = <<V as Volumes>::Device as Device>::Held;
type Done<V> = Result<(Answer, Option<HeldOf<V>>), i32>;

impl<V: Volumes> State<V> {
    /// Does a request whose fields are sound.
    pub(super) async fn execute(&self, slot: usize, request: Request, begun: Instant) -> Done<V> {
        let plain = |answer| Ok((answer, None));
        match request.operation {
            Operation::Lookup(volume) => plain(self.lookup(request.node, volume)?),
            Operation::GetAttributes => plain(self.attributes(request.node)?),
            Operation::SetAttributes(size) => plain(self.set_attributes(request.node, size)?),
            Operation::Open { read_only } => plain(self.open_file(&request, read_only)?),
            Operation::Release { file } => {
                self.close(file);
                plain(Answer::EMPTY)
            }
            Operation::Directory => plain(Answer::inline(&OpenOut::default())),
            Operation::ReadDirectory { after, len } => plain(self.list(slot, after, len)),
            // The size of a block becomes the granularity of discards.
            Operation::Statistics => {
                plain(Answer::inline(&StatfsOut { bsize: 4096, frsize: 4096, namelen: 20, ..StatfsOut::default() }))
            }
            Operation::Read { file, offset, len } => {
                let at = self.at(request.node, file)?;
                plain(self.read(slot, &at, offset, len, begun).await?)
            }
            Operation::Write { file, offset, len, durable } => {
                let at = self.at(request.node, file)?;
                at.check(offset, len as u64)?;
                let from = self.payload(slot, len);
                let written = at.device.write(offset, &from, durable).await;
                let held = at.counted(IoKind::Write, len as u64, begun, written)?;
                Ok((Answer::inline(&WriteOut { size: len as u32, padding: 0 }), Some(held)))
            }
            Operation::Flush { file } => {
                let at = self.at(request.node, file)?;
                let flushed = at.device.flush().await;
                at.counted(IoKind::Flush, 0, begun, flushed)?;
                plain(Answer::EMPTY)
            }
            Operation::Punch { file, offset, len } => {
                let at = self.at(request.node, file)?;
                let Some(len) = at.within(offset, len)? else { return plain(Answer::EMPTY) };
                let done = Box::pin(at.device.discard(offset, len)).await;
                Ok((Answer::EMPTY, Some(at.counted(IoKind::Discard, len, begun, done)?)))
            }
            Operation::Zero { file, offset, len } => {
                let at = self.at(request.node, file)?;
                let Some(len) = at.within(offset, len)? else { return plain(Answer::EMPTY) };
                let done = Box::pin(at.device.write_zeroes(offset, len, false)).await;
                Ok((Answer::EMPTY, Some(at.counted(IoKind::Zero, len, begun, done)?)))
            }
            Operation::Seek { file, offset, data } => {
                let at = self.at(request.node, file)?;
                let found = Box::pin(at.device.seek(offset, data)).await;
                let found = found.map_err(|error| refused(at.volume, "seek", &error))?;
                plain(Answer::inline(&LseekOut { offset: found.ok_or(libc::ENXIO)? }))
            }
            Operation::Destroy => plain(Answer::EMPTY),
        }
    }

    fn lookup(&self, node: Node, volume: Option<VolumeId>) -> Result<Answer, i32> {
        if node != Node::Root {
            return Err(libc::ENOTDIR);
        }
        let volume = volume.ok_or(libc::ENOENT)?;
        let face = self.volumes.find(volume).ok_or(libc::ENOENT)?;
        Ok(Answer::inline(&EntryOut {
            nodeid: Node::Volume(volume).number(),
            entry_valid: VALID_SECONDS,
            attr_valid: VALID_SECONDS,
            attr: attributes_of(volume, face),
            ..EntryOut::default()
        }))
    }

    fn attributes(&self, node: Node) -> Result<Answer, i32> {
        let attr = match node {
            Node::Root => {
                Attr { ino: ROOT_ID, mode: libc::S_IFDIR | 0o700, nlink: 2, blksize: 4096, ..Attr::default() }
            }
            Node::Volume(id) => attributes_of(id, self.volumes.find(id).ok_or(libc::ENOENT)?),
        };
        Ok(Answer::inline(&AttrOut { attr_valid: VALID_SECONDS, attr, ..AttrOut::default() }))
    }

    /// The size is the engine's to change; afterwards the kernel is told so by a truncation to the very same size. No
    /// other truncation is allowed: it would cut a volume off by accident.
    fn set_attributes(&self, node: Node, size: Option<u64>) -> Result<Answer, i32> {
        if let (Node::Volume(id), Some(size)) = (node, size)
            && self.volumes.find(id).is_some_and(|face| face.size_bytes != size)
        {
            return Err(libc::EPERM);
        }
        self.attributes(node)
    }

    fn open_file(&self, request: &Request, read_only: bool) -> Result<Answer, i32> {
        let Node::Volume(id) = request.node else { return Err(libc::EISDIR) };
        let face = self.volumes.find(id).ok_or(libc::ENOENT)?;
        if face.read_only && !read_only {
            return Err(libc::EROFS);
        }
        let fh = self.open(id, read_only, request.unique)?;
        // Without DIRECT_IO every write would take the inode's lock and empty its page cache; PARALLEL lets them share it.
        let open_flags = open_flag::DIRECT_IO | open_flag::PARALLEL_DIRECT_WRITES | open_flag::NOFLUSH;
        Ok(Answer::inline(&OpenOut { fh, open_flags, backing_id: 0 }))
    }

    fn list(&self, slot: usize, after: u64, len: usize) -> Answer {
        let mut bytes = Vec::new();
        let mut append = |number: u64, cookie: u64, kind: u8, name: &str| {
            let dirent = Dirent { ino: number, off: cookie, namelen: name.len() as u32, kind: u32::from(kind) };
            let size = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
            if bytes.len() + size > len {
                return false;
            }
            let end = bytes.len() + size;
            bytes.extend_from_slice(bytemuck::bytes_of(&dirent));
            bytes.extend_from_slice(name.as_bytes());
            bytes.resize(end, 0);
            true
        };
        let dots = [".", ".."].into_iter().zip(1..).skip(after.min(DOTS) as usize);
        let mut room = true;
        for (name, cookie) in dots {
            room = room && append(ROOT_ID, cookie, libc::DT_DIR, name);
        }
        for id in self.volumes.list(VolumeId(after.saturating_sub(DOTS)), len / size_of::<Dirent>()) {
            room = room && append(Node::Volume(id).number(), id.0 + DOTS, libc::DT_REG, &id.to_string());
        }
        self.queues.write_payload(slot, &bytes);
        Answer::Payload(bytes.len())
    }

    async fn read(
        &self,
        slot: usize,
        at: &OpenDevice<V::Device>,
        offset: u64,
        len: usize,
        begun: Instant,
    ) -> Result<Answer, i32> {
        // A short answer is right at the end of the file only.
        let Some(len) = at.within(offset, len as u64)? else { return Ok(Answer::EMPTY) };
        let len = len as usize;
        let into = self.payload(slot, len);
        let done = at.device.read(offset, &into).await;
        at.counted(IoKind::Read, len as u64, begun, done)?;
        Ok(Answer::Payload(len))
    }

    fn payload(&self, slot: usize, len: usize) -> super::MemoryOf<V> {
        let start = slot * self.payload_bytes;
        self.payloads.slice(start..start + len)
    }

    fn at(&self, node: Node, file: u64) -> Result<OpenDevice<V::Device>, i32> {
        let Node::Volume(volume) = node else { return Err(libc::EISDIR) };
        let (device, counters) = self.device(file)?;
        Ok(OpenDevice { volume, device, counters })
    }
}

/// The device that a request is about, with the volume's id for the log.
struct OpenDevice<D> {
    volume: VolumeId,
    device: Rc<D>,
    counters: VolumeCounters,
}

impl<D: Device> OpenDevice<D> {
    /// Counts a request that is done, and logs it when it has failed.
    fn counted<T>(&self, kind: IoKind, bytes: u64, begun: Instant, done: error::Result<T>) -> Result<T, i32> {
        self.counters.borrow_mut().count(kind, bytes, begun.elapsed(), done.as_ref().err());
        done.map_err(|error| refused(self.volume, kind.name(), &error))
    }

    /// Refuses what is not made of whole sectors, or goes beyond the end.
    fn check(&self, offset: u64, len: u64) -> Result<(), i32> {
        match self.within(offset, len)? {
            Some(inside) if inside == len => Ok(()),
            None if len == 0 => Ok(()),
            _ => Err(libc::EFBIG),
        }
    }

    /// How much of the range lies inside the device; none when nothing does.
    fn within(&self, offset: u64, len: u64) -> Result<Option<u64>, i32> {
        let sector = SECTOR_SIZE as u64;
        if !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
            return Err(libc::EINVAL);
        }
        let inside = self.device.size_bytes().saturating_sub(offset).min(len);
        Ok((inside > 0).then_some(inside))
    }
}

fn attributes_of(id: VolumeId, face: VolumeFace) -> Attr {
    Attr {
        ino: Node::Volume(id).number(),
        size: face.size_bytes,
        blocks: face.size_bytes / 512,
        mode: libc::S_IFREG | if face.read_only { 0o400 } else { 0o600 },
        nlink: 1,
        blksize: 4096,
        ..Attr::default()
    }
}

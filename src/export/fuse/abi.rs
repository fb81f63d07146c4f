//! The kernel's FUSE interface, as far as it is used: `include/uapi/linux/fuse.h`, protocol 7.45.
//!
//! Our own, because the headers of the oldest supported distribution (Linux 6.1) lack FUSE over io_uring. All numbers are
//! of the machine's own byte order; sizes are asserted against the kernel's.

use bytemuck::{Pod, Zeroable};

/// Major version of the protocol; another one is another protocol.
pub const MAJOR: u32 = 7;
/// Newest minor version that these structs follow.
pub const MINOR: u32 = 45;
/// Node of the root directory.
pub const ROOT_ID: u64 = 1;

/// Operations.
#[allow(missing_docs)]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const LSEEK: u32 = 46;
}

/// Flags of INIT.
pub mod init_flag {
    /// Parallel reads of one file.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Writes larger than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// Direct I/O is asynchronous. Without it a loop device runs at depth 1.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// Parallel lookups.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// `max_pages` of the answer counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// We clear set-user-id bits ourselves (our files have none): spares a GETXATTR before each change.
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// `flags2` of the answer counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// Requests go through io_uring. Once it is answered, the kernel holds every request back until all queues have an
    /// entry.
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// Flags of the answer to OPEN.
pub mod open_flag {
    /// Past the page cache.
    pub const DIRECT_IO: u32 = 1 << 0;
    /// No FLUSH when a descriptor is closed.
    pub const NOFLUSH: u32 = 1 << 5;
    /// Direct writes take the inode's lock shared.
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Commands on io_uring.
pub mod ring_command {
    /// Gives the kernel an entry to put a request in.
    pub const REGISTER: u32 = 1;
    /// Answers the request of an entry and waits for the next.
    pub const COMMIT_AND_FETCH: u32 = 2;
}

macro_rules! structs {
    ($($(#[$doc:meta])* $name:ident $size:literal { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

structs! {
    /// Begins every request.
    InHeader 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Begins every answer.
    OutHeader 16 { len: u32, error: i32, unique: u64 }
    /// INIT.
    InitIn 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] }
    /// Answer to INIT.
    InitOut 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    /// Attributes of a node.
    Attr 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// Answer to GETATTR and SETATTR.
    AttrOut 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    /// Answer to LOOKUP.
    EntryOut 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
    /// SETATTR.
    SetAttrIn 88 {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// OPEN and OPENDIR.
    OpenIn 8 { flags: u32, open_flags: u32 }
    /// Answer to OPEN and OPENDIR.
    OpenOut 16 { fh: u64, open_flags: u32, backing_id: i32 }
    /// RELEASE and RELEASEDIR.
    ReleaseIn 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// READ and READDIR.
    ReadIn 40 {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// WRITE.
    WriteIn 40 {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// Answer to WRITE.
    WriteOut 8 { size: u32, padding: u32 }
    /// FSYNC.
    FsyncIn 16 { fh: u64, fsync_flags: u32, padding: u32 }
    /// FALLOCATE.
    FallocateIn 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    /// LSEEK.
    LseekIn 24 { fh: u64, offset: u64, whence: u32, padding: u32 }
    /// Answer to LSEEK.
    LseekOut 8 { offset: u64 }
    /// Answer to STATFS.
    StatfsOut 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// Begins an entry of READDIR's answer; the name follows, up to a multiple of 8.
    Dirent 24 { ino: u64, off: u64, namelen: u32, kind: u32 }
    /// The command area of a submission entry.
    RingCommand 24 { flags: u64, commit_id: u64, qid: u16, padding: [u8; 6] }
    /// The last part of a ring entry's header.
    RingInOut 32 { flags: u64, commit_id: u64, payload_sz: u32, padding: u32, reserved: u64 }
}

/// `valid` of [`SetAttrIn`]: the size shall change.
pub const SETATTR_SIZE: u32 = 1 << 3;
/// `valid` of [`SetAttrIn`]: mode, owner or group shall change.
pub const SETATTR_OWNERSHIP: u32 = 0b111;
/// Offset of [`RingInOut`] in a ring entry's header.
pub const RING_IN_OUT: usize = 256;
/// Space for a request's or an answer's header at the start of a ring entry's header.
pub const RING_IN_OUT_HEADER: usize = 128;
/// Smallest buffer that the kernel reads requests into.
pub const LEAST_READ_BUFFER: usize = 8192;
/// ioctl on /dev/fuse that joins another descriptor's session: `_IOR(229, 0, uint32_t)`.
pub const DEV_IOC_CLONE: u64 = 0x8004_e500;

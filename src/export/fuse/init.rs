//! Negotiation: the first request of a session and its answer.
//!
//! What is asked for, and why each flag, stands in `reference` of the kernel's FUSE documentation; the one that matters
//! most for loop devices is ASYNC_DIO. The answer is made before anything else happens, because with OVER_IO_URING in it
//! the kernel holds all requests back until the rings are ready.

use super::abi::{InHeader, InitIn, InitOut, MAJOR, MINOR, OutHeader, init_flag, opcode};
use crate::error::{Error, Result};

/// What a session wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wishes {
    /// Largest READ and WRITE in bytes, a multiple of 4096.
    pub transfer_bytes: usize,
    /// Background requests (all of loop's reads and writes are) that the kernel has under way at most.
    pub max_background: u16,
    /// Whether rings are ready.
    pub over_io_uring: bool,
}

/// Most requests under way for the kernel's own limit not to be met: a loop device has 128 with up to 2 requests each.
pub(crate) const MAX_BACKGROUND: u16 = 4096;

/// The kernel's INIT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    unique: u64,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Offer {
    /// Reads INIT.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when it is something else or of another protocol.
    pub(crate) fn parse(request: &[u8]) -> Result<Self> {
        let bad = |what: &str| Error::Incompatible(format!("the kernel's first FUSE request {what}"));
        let header = request.get(..40).ok_or_else(|| bad("is cut short"))?;
        let header: InHeader = bytemuck::pod_read_unaligned(header);
        if header.opcode != opcode::INIT {
            return Err(bad(&format!("has opcode {}, not INIT", header.opcode)));
        }
        // Kernels before 5.17 send less than 64 bytes; what is missing is zero.
        let mut body = [0; size_of::<InitIn>()];
        let sent = &request[40..];
        let len = sent.len().min(body.len());
        body[..len].copy_from_slice(&sent[..len]);
        let init: InitIn = bytemuck::pod_read_unaligned(&body);
        if init.major != MAJOR || init.minor < 31 {
            return Err(bad(&format!("has protocol {}.{}, at least {MAJOR}.31 is needed", init.major, init.minor)));
        }
        let mut flags = u64::from(init.flags);
        if flags & init_flag::INIT_EXT != 0 {
            flags |= u64::from(init.flags2) << 32;
        }
        Ok(Self { unique: header.unique, minor: init.minor, max_readahead: init.max_readahead, flags })
    }

    /// Whether the kernel offers FUSE over io_uring.
    pub(crate) fn has_io_uring(&self) -> bool {
        self.flags & init_flag::OVER_IO_URING != 0
    }

    /// The answer.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when the kernel lacks what a loop device needs.
    pub(crate) fn answer(&self, wishes: &Wishes) -> Result<Vec<u8>> {
        let needed = init_flag::ASYNC_DIO | init_flag::MAX_PAGES | init_flag::BIG_WRITES;
        if self.flags & needed != needed {
            return Err(Error::Incompatible("this kernel's FUSE lacks asynchronous direct I/O".into()));
        }
        let mut wanted = needed
            | init_flag::ASYNC_READ
            | init_flag::PARALLEL_DIROPS
            | init_flag::HANDLE_KILLPRIV_V2
            | init_flag::INIT_EXT;
        if wishes.over_io_uring {
            wanted |= init_flag::OVER_IO_URING;
        }
        let flags = wanted & self.flags;
        let transfer_bytes = u32::try_from(wishes.transfer_bytes).unwrap_or(u32::MAX);
        let out = InitOut {
            major: MAJOR,
            minor: self.minor.min(MINOR),
            max_readahead: self.max_readahead.min(transfer_bytes),
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            max_background: wishes.max_background,
            congestion_threshold: wishes.max_background / 4 * 3,
            max_write: transfer_bytes,
            time_gran: 1,
            max_pages: u16::try_from(transfer_bytes / 4096).unwrap_or(u16::MAX),
            ..InitOut::default()
        };
        let header = OutHeader { len: 80, error: 0, unique: self.unique };
        Ok([bytemuck::bytes_of(&header), bytemuck::bytes_of(&out)].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(minor: u32, flags: u64) -> Vec<u8> {
        let header = InHeader { len: 104, opcode: opcode::INIT, unique: 2, ..InHeader::default() };
        let init = InitIn {
            major: 7,
            minor,
            max_readahead: 131_072,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            unused: [0; 11],
        };
        [bytemuck::bytes_of(&header), bytemuck::bytes_of(&init)].concat()
    }

    fn answered(offered: u64, over_io_uring: bool) -> InitOut {
        let wishes = Wishes { transfer_bytes: 256 << 10, max_background: MAX_BACKGROUND, over_io_uring };
        let answer = Offer::parse(&offer(45, offered)).unwrap().answer(&wishes).unwrap();
        assert_eq!(answer.len(), 80);
        bytemuck::pod_read_unaligned(&answer[16..])
    }

    #[test]
    fn everything_needed_is_asked_for_and_nothing_that_was_not_offered() {
        let out = answered(!0 ^ init_flag::HANDLE_KILLPRIV_V2, true);
        assert_ne!(out.flags & init_flag::ASYNC_DIO as u32, 0);
        assert_eq!(out.flags & init_flag::HANDLE_KILLPRIV_V2 as u32, 0);
        assert_eq!(out.flags2, (init_flag::OVER_IO_URING >> 32) as u32);
        assert_eq!((out.max_write, out.max_pages, out.max_background), (262_144, 64, 4096));
    }

    #[test]
    fn rings_are_not_promised_unless_they_are_ready() {
        assert_eq!(answered(!0, false).flags2, 0);
    }

    #[test]
    fn second_word_of_flags_counts_only_with_init_ext() {
        let offered = !0 ^ init_flag::INIT_EXT;
        assert!(!Offer::parse(&offer(45, offered)).unwrap().has_io_uring());
        assert!(Offer::parse(&offer(45, !0)).unwrap().has_io_uring());
    }

    #[test]
    fn strange_first_requests_are_refused() {
        assert!(Offer::parse(&[0; 39]).is_err());
        assert!(Offer::parse(&offer(30, !0)).is_err());
        let mut other = offer(45, !0);
        other[4] = 3;
        assert!(Offer::parse(&other).is_err());
        let wishes = Wishes { transfer_bytes: 4096, max_background: 1, over_io_uring: false };
        assert!(Offer::parse(&offer(31, init_flag::MAX_PAGES)).unwrap().answer(&wishes).is_err());
    }

    #[test]
    fn short_init_of_an_old_kernel_is_read() {
        let mut old = offer(36, init_flag::ASYNC_DIO | init_flag::MAX_PAGES | init_flag::BIG_WRITES);
        old.truncate(56);
        assert!(!Offer::parse(&old).unwrap().has_io_uring());
    }
}

//! How much memory a daemon uses: one figure, for the payloads of requests and the mapping nodes that are kept.
//!
//! The queues' depth and the size of a payload follow from the payloads' share (`export::shared::Geometry`): a queue of each
//! processor, as deep as a loop device where that fits. What is beside the two does not grow with use: some 15 MiB of both
//! processes, and the counts and tables of the pool.

use std::thread::available_parallelism;

use crate::error::{Error, Result};

/// Least that a budget may be, in bytes: 128 nodes for each of the two, and two requests for each processor.
pub const LEAST_MEMORY: u64 = 8 << 20;
/// What payloads of 128 KiB for each of 128 requests take, in bytes: the queue of a processor.
const QUEUE_BYTES: u64 = 16 << 20;
/// Default for machines with few processors and enough memory, in bytes.
const USUAL_BYTES: u64 = 128 << 20;
/// Most of the machine's memory that is taken without being told: one part in this many.
const MACHINE_PARTS: u64 = 8;
/// Most that is taken without being told, in bytes.
const MOST_BYTES: u64 = 512 << 20;
/// Most queues of the classic transport: each is two threads.
const CLASSIC_QUEUES_MOST: usize = 8;

/// What a daemon may use, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryBudget {
    /// Payloads of requests, which stay resident.
    pub(super) payload_bytes: u64,
    /// Mapping nodes.
    pub(super) cache_bytes: u64,
    /// Queues of the classic transport.
    pub(super) classic_queues: usize,
}

impl MemoryBudget {
    /// The budget of `told` bytes, or what suits this machine.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] below [`LEAST_MEMORY`].
    pub(super) fn new(told: Option<u64>) -> Result<Self> {
        let processors = available_parallelism().map_or(1, usize::from);
        let bytes = match told {
            Some(bytes) if bytes < LEAST_MEMORY => {
                return Err(Error::InvalidInput(format!(
                    "--memory: {bytes} bytes are too little; {LEAST_MEMORY} (8 MiB) is the least"
                )));
            }
            Some(bytes) => bytes,
            None => Self::suitable(processors, machine_bytes()),
        };
        Ok(Self {
            payload_bytes: bytes / 2,
            cache_bytes: bytes - bytes / 2,
            classic_queues: processors.clamp(2, CLASSIC_QUEUES_MOST),
        })
    }

    fn suitable(processors: usize, machine_bytes: u64) -> u64 {
        let wanted = (2 * QUEUE_BYTES).saturating_mul(processors as u64).clamp(USUAL_BYTES, MOST_BYTES);
        wanted.min(machine_bytes / MACHINE_PARTS).max(LEAST_MEMORY)
    }
}

/// Memory of the machine, in bytes.
fn machine_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    // Of the same width on every target; the unit is 1 on all that have 64 bits.
    #[allow(clippy::useless_conversion)]
    u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_follows_processors_and_memory() {
        let suitable = |processors, mib: u64| MemoryBudget::suitable(processors, mib << 20) >> 20;
        assert_eq!(suitable(1, 256), 32);
        assert_eq!(suitable(2, 512), 64);
        assert_eq!(suitable(2, 24 << 10), 128);
        assert_eq!(suitable(8, 64 << 10), 256);
        assert_eq!(suitable(256, 1 << 20), 512);
        assert_eq!(suitable(1, 16), 8);
    }

    #[test]
    fn half_is_for_each() {
        let budget = MemoryBudget::new(Some(100 << 20)).unwrap();
        assert_eq!((budget.payload_bytes, budget.cache_bytes), (50 << 20, 50 << 20));
        assert!(MemoryBudget::new(Some(LEAST_MEMORY - 1)).is_err());
    }
}

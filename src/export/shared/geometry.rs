//! How many queues, how deep, how large a payload: from the number of processors and a budget of memory.
//!
//! The kernel wants one queue for each *possible* processor (FUSE over io_uring). A loop device submits from one worker,
//! so a single queue carries all of its depth: a queue should have as many entries as loop has tags (128). Payloads are
//! registered with the ring and so resident; queues of processors that are not online get the least there is.

use std::fs;

use crate::error::{Error, Result};

/// Most entries of a queue.
pub const MOST_DEPTH: u32 = 128;
/// Most queues.
pub const MOST_QUEUES: usize = 1024;
/// Bounds of a payload in bytes.
pub const LEAST_PAYLOAD: usize = 128 << 10;
/// Upper bound of a payload in bytes: what the kernel sends at most by default (`fs.fuse.max_pages_limit`).
pub const MOST_PAYLOAD: usize = 1 << 20;
/// Default budget for all payloads.
pub const DEFAULT_BUDGET_BYTES: usize = 64 << 20;
/// Entries of a queue whose processor is not online: the kernel insists that it has some.
const OFFLINE_DEPTH: u32 = 2;

/// How a request lies in its slot, which follows from the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// FUSE over io_uring: the operation's fixed struct in `op_in`, the rest in the payload.
    Ring,
    /// Read from /dev/fuse: the first 128 bytes of the body in `op_in`, what follows in the payload; of a WRITE the
    /// first 40 bytes in `op_in` and its data in the payload.
    Stream,
}

/// The size of everything in a session's shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    arrangement: Arrangement,
    payload_bytes: usize,
    depths: Vec<u32>,
}

impl Geometry {
    /// Checked geometry: `depths` has one number for each queue.
    ///
    /// # Errors
    /// [`Error::Incompatible`] for numbers out of bounds.
    pub fn new(arrangement: Arrangement, payload_bytes: usize, depths: Vec<u32>) -> Result<Self> {
        let sound = (1..=MOST_QUEUES).contains(&depths.len())
            && depths.iter().all(|depth| (1..=MOST_DEPTH).contains(depth))
            && (4096..=MOST_PAYLOAD).contains(&payload_bytes)
            && payload_bytes.is_multiple_of(4096);
        if !sound {
            return Err(Error::Incompatible(format!(
                "{} queues with payloads of {payload_bytes} bytes are out of bounds",
                depths.len()
            )));
        }
        Ok(Self { arrangement, payload_bytes, depths })
    }

    /// What fits in `budget_bytes` for queues of which `online[i]` says whether they will be busy. Prefers 128 entries a
    /// queue, then large payloads; never goes below the least of both, even where that exceeds the budget.
    ///
    /// # Errors
    /// [`Error::Incompatible`] for more queues than there can be.
    pub fn within_budget(arrangement: Arrangement, online: &[bool], budget_bytes: usize) -> Result<Self> {
        let depths = |depth: u32| -> Vec<u32> {
            online.iter().map(|&busy| if busy { depth } else { OFFLINE_DEPTH.min(depth) }).collect()
        };
        let slots = |depth: u32| depths(depth).iter().sum::<u32>().max(1) as usize;
        for depth in [128, 64, 32, 16, 8, 4] {
            for payload_bytes in [MOST_PAYLOAD, 512 << 10, 256 << 10, LEAST_PAYLOAD] {
                if slots(depth).saturating_mul(payload_bytes) <= budget_bytes {
                    return Self::new(arrangement, payload_bytes, depths(depth));
                }
            }
        }
        Self::new(arrangement, LEAST_PAYLOAD, depths(2))
    }

    /// How requests lie in their slots.
    pub fn arrangement(&self) -> Arrangement {
        self.arrangement
    }

    /// Size of each payload in bytes: the largest READ or WRITE.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.depths.len()
    }

    /// Entries of queue `queue`.
    pub fn depth(&self, queue: usize) -> u32 {
        self.depths[queue]
    }

    /// Entries of all queues.
    pub fn slot_count(&self) -> usize {
        self.depths.iter().map(|&depth| depth as usize).sum()
    }

    /// Number of the first slot of each queue.
    pub fn first_slots(&self) -> Vec<usize> {
        let mut next = 0;
        let place = |&depth: &u32| {
            next += depth as usize;
            next - depth as usize
        };
        self.depths.iter().map(place).collect()
    }
}

/// Which of the machine's possible processors are online, by number.
///
/// # Errors
/// When /sys does not say.
pub fn possible_processors() -> Result<Vec<bool>> {
    let read = |name: &str| -> Result<Vec<usize>> {
        let path = format!("/sys/devices/system/cpu/{name}");
        let text = fs::read_to_string(&path).map_err(|error| Error::io(format!("reading {path}"), error))?;
        parse_list(text.trim()).ok_or_else(|| Error::Incompatible(format!("{path} holds {text:?}, not a list")))
    };
    let possible = read("possible")?;
    let online = read("online")?;
    // Queue numbers are processor numbers; the kernel takes num_possible_cpus() of them, from 0 on.
    Ok((0..possible.len()).map(|processor| online.contains(&processor)).collect())
}

/// Parses a list of the kernel: `0-3,8,10-11`.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse::<usize>().ok()?);
        if last < first || last > 1 << 16 {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(online: usize, offline: usize) -> (u32, usize) {
        let mut processors = vec![true; online];
        processors.resize(online + offline, false);
        let geometry = Geometry::within_budget(Arrangement::Ring, &processors, DEFAULT_BUDGET_BYTES).unwrap();
        (geometry.depth(0), geometry.payload_bytes() >> 10)
    }

    #[test]
    fn budget_gives_depth_before_payload() {
        assert_eq!(chosen(1, 0), (128, 512));
        assert_eq!(chosen(2, 0), (128, 256));
        assert_eq!(chosen(4, 0), (128, 128));
        assert_eq!(chosen(8, 0), (64, 128));
        assert_eq!(chosen(64, 0), (8, 128));
    }

    #[test]
    fn processors_that_are_offline_cost_little() {
        assert_eq!(chosen(2, 62), (128, 128));
    }

    #[test]
    fn least_geometry_is_used_where_nothing_fits() {
        assert_eq!(chosen(1024, 0), (2, 128));
        let processors = vec![true; 1025];
        assert!(Geometry::within_budget(Arrangement::Ring, &processors, 1).is_err());
    }

    #[test]
    fn slots_are_numbered_through_all_queues() {
        let geometry = Geometry::new(Arrangement::Stream, 4096, vec![3, 1, 5]).unwrap();
        assert_eq!(geometry.first_slots(), [0, 3, 4]);
        assert_eq!(geometry.slot_count(), 9);
    }

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(parse_list("0-1"), Some(vec![0, 1]));
        assert_eq!(parse_list("0,2-4,9"), Some(vec![0, 2, 3, 4, 9]));
        assert_eq!(parse_list("3-1"), None);
        assert_eq!(parse_list(""), None);
        assert_eq!(parse_list("0-99999999999"), None);
    }
}

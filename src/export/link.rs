//! What an engine process inherits from its front: descriptors, and one environment variable that says which is which.
//!
//! The description has a version of its own, beside those of the memories: a newer build that cannot serve an older
//! front says so by its exit status ([`EXIT_INCOMPATIBLE`]), and the front starts its own build instead.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::fuse::Transport;
use super::shared::{EngineQueues, LAYOUT_VERSION, PENDING_LOG_VERSION, SessionMemory, SharedMemory, SharedPendingLog};
use crate::error::{Error, Result};

/// The environment variable.
pub const LINK_VARIABLE: &str = "PLYWOOD_ENGINE_LINK";
const LINK_VERSION: u32 = 1;

/// What a build reads of what a front and an engine share: description, queues and pending log. One that answers the same
/// words can succeed the other.
pub fn versions() -> String {
    format!("{LINK_VERSION}.{LAYOUT_VERSION}.{PENDING_LOG_VERSION}")
}

/// Exit status of an engine that has finished in good order: the front ends the session and itself.
pub const EXIT_FINISHED: i32 = 0;
/// Exit status of an engine that wants to be succeeded at once, by a newer build perhaps.
pub const EXIT_SUCCEED_ME: i32 = 75;
/// Exit status of an engine that has finished in good order, with nothing attached: the front is replaced by the program on
/// disk. Only for a front that says it knows this.
pub const EXIT_REPLACE_FRONT: i32 = 76;
/// Exit status of an engine that cannot serve this front.
pub const EXIT_INCOMPATIBLE: i32 = 78;

/// The variable's content.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Description {
    pub version: u32,
    pub front_pid: u32,
    pub control: RawFd,
    pub payloads: RawFd,
    pub pending: RawFd,
    pub engine_doorbell: RawFd,
    pub supervisor: RawFd,
    pub doorbells: Vec<RawFd>,
    pub extra: BTreeMap<String, RawFd>,
    pub transport: Transport,
    pub fallback: Option<String>,
    /// The front knows [`EXIT_REPLACE_FRONT`].
    #[serde(default)]
    pub replaceable: bool,
}

impl Description {
    pub(super) fn to_variable(&self) -> String {
        serde_json::to_string(self).expect("numbers and text become JSON")
    }

    pub(super) const fn current_version() -> u32 {
        LINK_VERSION
    }
}

/// An engine's connection to its front.
#[derive(Debug)]
pub struct EngineLink {
    /// The front.
    pub front_pid: u32,
    /// How requests come from the kernel.
    pub transport: Transport,
    /// Why io_uring is not used although it might have been.
    pub fallback: Option<String>,
    /// The front can be replaced when nothing is attached.
    pub replaceable: bool,
    /// The queues' and payloads' memory.
    pub memory: SessionMemory,
    /// What to watch in the engine's ring: rung when the engine sleeps and requests have come.
    pub doorbell: OwnedFd,
    /// Descriptors that were given to the front for its engines, by name.
    pub extra: BTreeMap<String, OwnedFd>,
    doorbells: Vec<OwnedFd>,
    pending: OwnedFd,
    supervisor: OwnedFd,
}

impl EngineLink {
    /// Takes what this process has inherited. None in a process that no front has started. To be called once, first
    /// thing in the process.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when this build does not understand the front; exit with [`EXIT_INCOMPATIBLE`] then.
    pub fn inherit() -> Result<Option<Self>> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let Some(text) = std::env::var_os(LINK_VARIABLE) else { return Ok(None) };
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(Error::Busy("what the front gave was taken already".into()));
        }
        let text = text.to_string_lossy();
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let unreadable = |error: serde_json::Error| Error::Incompatible(format!("{LINK_VARIABLE}: {error}"));
        // The version alone first: a later one may have other fields.
        let Version { version } = serde_json::from_str(&text).map_err(unreadable)?;
        if version != LINK_VERSION {
            return Err(Error::Incompatible(format!(
                "the front's description has version {version}, this build knows {LINK_VERSION}"
            )));
        }
        Self::take(serde_json::from_str(&text).map_err(unreadable)?).map(Some)
    }

    fn take(described: Description) -> Result<Self> {
        let mut taken = Vec::new();
        let mut take = |descriptor: RawFd| {
            // A number given twice would be closed twice.
            if descriptor <= 2 || taken.contains(&descriptor) {
                return Err(Error::Incompatible(format!("{LINK_VARIABLE}: descriptor {descriptor} is wrong")));
            }
            taken.push(descriptor);
            adopt(descriptor)
        };
        let control = SharedMemory::open(take(described.control)?)?;
        let payloads = SharedMemory::open(take(described.payloads)?)?;
        Ok(Self {
            front_pid: described.front_pid,
            transport: described.transport,
            fallback: described.fallback,
            replaceable: described.replaceable,
            memory: SessionMemory::open(control, payloads)?,
            pending: take(described.pending)?,
            doorbell: take(described.engine_doorbell)?,
            supervisor: take(described.supervisor)?,
            doorbells: described.doorbells.into_iter().map(&mut take).collect::<Result<_>>()?,
            extra: described
                .extra
                .into_iter()
                .map(|(name, descriptor)| Ok((name, take(descriptor)?)))
                .collect::<Result<_>>()?,
        })
    }

    /// Maps the pending log; checks that it is of this pool.
    ///
    /// # Errors
    /// See [`SharedPendingLog::open`].
    pub fn pending_log(&self, pool: Uuid) -> Result<SharedPendingLog> {
        let descriptor = self.pending.try_clone().map_err(|error| Error::io("duplicating a descriptor", error))?;
        SharedPendingLog::open(descriptor, pool)
    }

    /// Takes over the queues. Only when the predecessor's last I/O has ended (rule O9): from here on slots are this
    /// engine's.
    ///
    /// # Errors
    /// See [`EngineQueues::open`].
    pub fn queues(&mut self) -> Result<EngineQueues> {
        EngineQueues::open(self.memory.clone(), std::mem::take(&mut self.doorbells))
    }

    /// Tells the front's supervisor that something is to be seen in the shared memory: that this engine serves.
    pub fn notify_supervisor(&self) {
        super::shared::ring(&self.supervisor);
    }

    /// A descriptor that was given under this name.
    ///
    /// # Errors
    /// [`Error::NotFound`] when none was.
    pub fn take_extra(&mut self, name: &str) -> Result<OwnedFd> {
        self.extra.remove(name).ok_or_else(|| Error::NotFound(format!("the front gave no descriptor named {name:?}")))
    }
}

/// Takes a descriptor that this process was started with, whoever gave it. Once for each number.
///
/// # Errors
/// When it is not open.
pub(crate) fn adopt(descriptor: RawFd) -> Result<OwnedFd> {
    let failed = |errno: rustix::io::Errno| Error::io(format!("inherited descriptor {descriptor}"), errno.into());
    // SAFETY: only looked at; where it is not open, the call says so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    fcntl_getfd(borrowed).map_err(failed)?;
    // Not for our own children.
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(failed)?;
    // SAFETY: it is open, whoever started us opened it for us, and each number is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(descriptors: [RawFd; 5]) -> Description {
        let [control, payloads, pending, engine_doorbell, supervisor] = descriptors;
        Description {
            version: LINK_VERSION,
            front_pid: 1,
            control,
            payloads,
            pending,
            engine_doorbell,
            supervisor,
            doorbells: Vec::new(),
            extra: BTreeMap::new(),
            transport: Transport::Classic,
            fallback: Some("because".into()),
            replaceable: true,
        }
    }

    #[test]
    fn description_survives_its_variable() {
        let text = description([10, 11, 12, 13, 14]).to_variable();
        let again: Description = serde_json::from_str(&text).unwrap();
        assert_eq!((again.pending, again.transport), (12, Transport::Classic));
        assert_eq!(again.fallback.as_deref(), Some("because"));
    }

    #[test]
    fn descriptors_that_are_not_open_are_refused() {
        assert!(EngineLink::take(description([9990, 9991, 9992, 9993, 9994])).is_err());
        assert!(matches!(EngineLink::take(description([0; 5])), Err(Error::Incompatible(_))));
    }
}

//! What an engine is at, noted where it is found after its death: for the log, for events, and for tests that want to kill
//! it at every kind of moment.
//!
//! Nothing is decided by it. It is noted at the beginning and at the end of what takes long, never for a request: those in
//! flight are counted by their slots.

/// What takes long enough to be died in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Work {
    /// Reading superblock, indexes and tables.
    Opening,
    /// Applying journal and pending log.
    Replay,
    /// Flushing data, for a commit or a checkpoint.
    Flush,
    /// Appending to the journal.
    Commit,
    /// Writing a checkpoint.
    Checkpoint,
    /// Allocating space of the host.
    Extend,
    /// Giving space back to the host.
    Punch,
    /// Giving back what a carcass holds.
    Delete,
    /// Reading a snapshot to checksum it.
    Seal,
    /// Making a snapshot or clone.
    Share,
    /// Closing the pool.
    Close,
    /// Making a volume a device.
    Attach,
    /// Undoing that.
    Detach,
    /// Any other command that changes something.
    Command,
    /// Handing over to a successor.
    HandOver,
}

impl Work {
    /// All there are, in the order of their numbers.
    pub const ALL: [Self; 15] = [
        Self::Opening,
        Self::Replay,
        Self::Flush,
        Self::Commit,
        Self::Checkpoint,
        Self::Extend,
        Self::Punch,
        Self::Delete,
        Self::Seal,
        Self::Share,
        Self::Close,
        Self::Attach,
        Self::Detach,
        Self::Command,
        Self::HandOver,
    ];

    /// Its place among all.
    pub const fn number(self) -> usize {
        self as usize
    }

    /// One or two words for a log.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Replay => "replay",
            Self::Flush => "data flush",
            Self::Commit => "journal commit",
            Self::Checkpoint => "checkpoint",
            Self::Extend => "extending",
            Self::Punch => "punching",
            Self::Delete => "deleting",
            Self::Seal => "sealing",
            Self::Share => "sharing",
            Self::Close => "closing",
            Self::Attach => "attaching",
            Self::Detach => "detaching",
            Self::Command => "command",
            Self::HandOver => "handing over",
        }
    }
}

/// Where it is noted.
pub trait WorkBoard: 'static {
    /// One more of this kind is begun.
    fn begin(&self, work: Work);

    /// One of this kind has ended.
    fn end(&self, work: Work);
}

/// For an engine whose death nobody looks into.
#[derive(Clone, Copy, Debug)]
pub struct NoBoard;

impl WorkBoard for NoBoard {
    fn begin(&self, _: Work) {}

    fn end(&self, _: Work) {}
}

/// Work that is begun, and ended when this goes.
#[must_use = "the work ends when this is dropped"]
pub struct Underway<'a> {
    board: &'a dyn WorkBoard,
    work: Work,
}

impl<'a> Underway<'a> {
    /// Notes its beginning.
    pub fn new(board: &'a dyn WorkBoard, work: Work) -> Self {
        board.begin(work);
        Self { board, work }
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.board.end(self.work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_work_has_its_own_number_and_words() {
        for (number, work) in Work::ALL.into_iter().enumerate() {
            assert_eq!(work.number(), number);
            assert_eq!(Work::ALL.iter().filter(|other| other.words() == work.words()).count(), 1, "{work:?}");
        }
    }
}

//! A few numbers that an engine process leaves to its successor, in memory that the front holds: how many there were, whether
//! the last one handed over or died, and which thresholds were told of. Lost with the front, and none of it is needed to be
//! right: it decides what is told, never what is done.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::thresholds::Level;
use crate::error::{Error, Result};

const STARTS: u64 = 0;
const HANDED_OVER: u64 = 8;
const LEVEL: u64 = 16;

/// What the engine processes of one front leave to one another.
#[derive(Debug)]
pub(super) struct Heritage {
    memory: File,
    /// Engine processes before this one.
    pub(super) before: u64,
    /// The last one ended to be succeeded; else it died, if there was one.
    pub(super) handed_over: bool,
    /// Thresholds that were told of as reached.
    pub(super) level: Level,
}

impl Heritage {
    /// Takes what is there, and counts this process.
    ///
    /// # Errors
    /// When the memory cannot be read or written.
    pub(super) fn take(memory: File) -> Result<Self> {
        let failed = |error| Error::io("counting engine processes", error);
        let number = |at| {
            let mut bytes = [0; 8];
            let known = memory.read_at(&mut bytes, at).map_err(failed)? == bytes.len();
            Ok::<_, Error>(if known { u64::from_ne_bytes(bytes) } else { 0 })
        };
        let (before, handed_over, level) = (number(STARTS)?, number(HANDED_OVER)? == 1, number(LEVEL)?);
        let heritage = Self { memory, before, handed_over, level: Level::from_number(level) };
        heritage.write(STARTS, before + 1)?;
        heritage.write(HANDED_OVER, 0)?;
        Ok(heritage)
    }

    /// This process ends to be succeeded.
    pub(super) fn hand_over(&self) {
        self.leave(HANDED_OVER, 1);
    }

    /// These thresholds were told of.
    pub(super) fn told(&self, level: Level) {
        self.leave(LEVEL, level.number());
    }

    fn leave(&self, at: u64, number: u64) {
        if let Err(error) = self.write(at, number) {
            tracing::warn!(%error, "a successor will not know what was told");
        }
    }

    fn write(&self, at: u64, number: u64) -> Result<()> {
        let written = self.memory.write_all_at(&number.to_ne_bytes(), at);
        written.map_err(|error| Error::io("counting engine processes", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_is_counted_and_knows_how_the_last_one_ended() {
        let memory = tempfile::tempfile().unwrap();
        for before in 0..5 {
            let heritage = Heritage::take(memory.try_clone().unwrap()).unwrap();
            assert_eq!(heritage.before, before);
            assert_eq!(heritage.handed_over, before == 3);
            assert_eq!(heritage.level, Level::of(if before > 1 { 90 } else { 0 }));
            if before == 1 {
                heritage.told(Level::of(90));
            }
            if before == 2 {
                heritage.hand_over();
            }
        }
    }
}

//! The terminal of a live view: drawn over in place, keys read without waiting for a line, and put back as it was at the
//! end, however that comes.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGTERM};

/// Ctrl-C, which is a key here.
const INTERRUPT: u8 = 3;
/// Rows of a terminal that does not say how many it has.
const ROWS: u16 = 24;

/// A terminal that is drawn over. Dropping it puts it back.
#[must_use]
pub struct Screen {
    before: Termios,
    ended: Arc<AtomicBool>,
    signals: Vec<SigId>,
}

impl Screen {
    /// Takes the terminal of this process.
    ///
    /// # Errors
    /// When there is none.
    pub fn open() -> io::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let mut signals = Vec::new();
        for signal in [SIGTERM, SIGHUP] {
            signals.push(signal_hook::flag::register(signal, Arc::clone(&ended))?);
        }
        let before = tcgetattr(io::stdin())?;
        let mut modes = before.clone();
        modes.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        tcsetattr(io::stdin(), OptionalActions::Now, &modes)?;
        let screen = Self { before, ended, signals };
        // No cursor, and nothing of before.
        print("\x1b[?25l\x1b[2J\x1b[Hmeasuring\r\n")?;
        Ok(screen)
    }

    /// Draws over what is shown.
    ///
    /// # Errors
    /// When the terminal takes no more.
    pub fn show(&self, lines: &[String]) -> io::Result<()> {
        let size = tcgetwinsize(io::stdout()).ok();
        // One that does not know says 0.
        let rows = size.map_or(0, |size| size.ws_row);
        let rows = if rows == 0 { ROWS } else { rows.max(2) };
        let columns = size.map(|size| size.ws_col).filter(|columns| *columns > 0).unwrap_or(u16::MAX);
        print(&drawn(lines, usize::from(rows) - 1, usize::from(columns)))
    }

    /// Waits, and answers whether the view is to end: q, Ctrl-C, a signal, or no terminal any more.
    ///
    /// # Errors
    /// When the terminal fails.
    pub fn wait_for_end(&mut self, wait: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + wait;
        loop {
            if self.ended.load(Ordering::SeqCst) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let stdin = io::stdin();
            let mut ready = [PollFd::new(&stdin, PollFlags::IN)];
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut ready, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            let mut keys = [0; 16];
            let count = rustix::io::read(&stdin, &mut keys)?;
            if count == 0 || keys[..count].iter().any(|key| [b'q', b'Q', INTERRUPT].contains(key)) {
                return Ok(true);
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        for signal in self.signals.drain(..) {
            signal_hook::low_level::unregister(signal);
        }
        // The terminal may be gone; then nothing is to be put back.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
        let _ = print("\x1b[?25h");
    }
}

/// The lines from the top left on, each to the end of its row, nothing behind them.
fn drawn(lines: &[String], rows: usize, columns: usize) -> String {
    let mut text = String::from("\x1b[H");
    for line in lines.iter().take(rows) {
        // A name may hold what a terminal would act on, but for control characters, which names do not have.
        text.extend(line.chars().filter(|character| !character.is_control()).take(columns));
        text.push_str("\x1b[K\r\n");
    }
    text.push_str("\x1b[J");
    text
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_to_the_terminal_and_the_rest_is_cleared() {
        let lines = ["one".to_owned(), "a long \x1b[2Jline".to_owned(), "three".to_owned()];
        assert_eq!(drawn(&lines, 2, 10), "\x1b[Hone\x1b[K\r\na long [2J\x1b[K\r\n\x1b[J");
    }
}

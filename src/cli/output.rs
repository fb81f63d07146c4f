//! What commands print: lines and aligned tables for people, JSON with a version for programs.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Version of everything that `--json` prints.
pub const JSON_VERSION: u32 = 1;

/// Prints one line.
///
/// # Errors
/// When standard output takes no more; [`io::ErrorKind::BrokenPipe`] ends the program quietly.
pub fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Prints `{"version": 1, NAME: VALUE}`.
///
/// # Errors
/// As `line`.
pub fn json<T: Serialize>(name: &str, value: &T) -> io::Result<()> {
    line(&serde_json::to_string_pretty(&versioned(name, value)?)?)
}

/// The same on one line, for what comes again and again.
///
/// # Errors
/// As `line`.
pub fn json_line<T: Serialize>(name: &str, value: &T) -> io::Result<()> {
    line(&versioned(name, value)?.to_string())
}

fn versioned<T: Serialize>(name: &str, value: &T) -> io::Result<serde_json::Value> {
    let mut object = serde_json::Map::new();
    object.insert("version".into(), JSON_VERSION.into());
    object.insert(name.into(), serde_json::to_value(value)?);
    Ok(object.into())
}

/// Prints aligned columns without lines between. The columns whose heading is in `numbers` stand to the right.
///
/// # Errors
/// As `line`.
pub fn table(headings: &[&str], numbers: &[&str], rows: Vec<Vec<String>>) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headings);
    table.add_rows(rows);
    for (index, heading) in headings.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if numbers.contains(heading) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    line(&table.trim_fmt())
}

/// Prints `key: value` lines, the values aligned.
///
/// # Errors
/// As `line`.
pub fn facts(facts: &[(&str, String)]) -> io::Result<()> {
    let width = facts.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 1;
    let lines: Vec<String> = facts
        .iter()
        .map(|(key, value)| format!("{:width$} {value}", format!("{key}:")).trim_end().to_owned())
        .collect();
    line(&lines.join("\n"))
}

/// A moving sign on a terminal while something takes long; nothing elsewhere. It is wiped when dropped.
#[must_use]
pub struct Waiting(ProgressBar);

impl Waiting {
    /// Begins to show `what`.
    pub fn begin(what: impl Into<String>) -> Self {
        let bar = if io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_message(what.into());
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(bar)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A bar on a terminal that shows how much of something is done; nothing elsewhere. It is wiped when dropped.
#[must_use]
pub struct Working(ProgressBar);

impl Working {
    /// Begins to show `what`.
    pub fn begin(what: impl Into<String>) -> Self {
        let bar = if io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {percent} % ({elapsed}, {eta} left)") {
            bar.set_style(style);
        }
        bar.set_message(what.into());
        Self(bar)
    }

    /// So much of `all` is done.
    pub fn show(&self, done: u64, all: u64) {
        self.0.set_length(all);
        self.0.set_position(done.min(all));
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Asks on a terminal whether to go on; without one, or when `yes` was said before, it goes on.
///
/// # Errors
/// When the terminal fails, and when the answer is not yes.
pub fn confirm(question: &str, yes: bool) -> anyhow::Result<()> {
    if yes || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(());
    }
    let mut asked = io::stderr().lock();
    write!(asked, "{question} [y/N] ")?;
    asked.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    anyhow::bail!("nothing was changed; say y, or give --yes")
}

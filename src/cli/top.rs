//! `plywood top`: what the volumes of a pool in use do, again and again.

mod rates;
mod screen;

use std::io::{self, IsTerminal};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use self::rates::{Rates, VolumeRates};
use self::screen::Screen;
use super::{Context, output, size};
use crate::daemon::protocol::{Command, Figures, Reply};
use crate::daemon::{self, Client};

/// How to show it.
#[derive(Debug, Args)]
pub struct TopArguments {
    /// Measure once, print, and end; so does a standard output that is no terminal, but with --json
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0, value_parser = seconds, value_name = "SECONDS")]
    interval: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds, 0.1 to 3600".into()),
    }
}

/// Shows what the volumes do, the busiest first.
///
/// # Errors
/// When no daemon serves the pool, or the terminal fails.
pub fn run(context: &Context, arguments: &TopArguments) -> Result<()> {
    let found = context.find_pool()?;
    let Some(client) = daemon::running(&found)? else {
        bail!("no daemon serves pool {}, so its volumes do nothing; see plywood volume list", found.name);
    };
    let interval = Duration::from_secs_f64(arguments.interval);
    let mut before = ask(&client)?;
    if context.json {
        loop {
            thread::sleep(interval);
            let now = ask(&client)?;
            output::json_line("top", &Rates::between(&before, &now))?;
            if arguments.once {
                return Ok(());
            }
            before = now;
        }
    }
    if arguments.once || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        thread::sleep(interval);
        let lines = lines(&Rates::between(&before, &ask(&client)?));
        return Ok(output::line(&lines.join("\n"))?);
    }
    let mut screen = Screen::open()?;
    loop {
        if screen.wait_for_end(interval)? {
            return Ok(());
        }
        let now = ask(&client)?;
        screen.show(&lines(&Rates::between(&before, &now)))?;
        before = now;
    }
}

fn ask(client: &Client) -> Result<Figures> {
    match client.call(Command::Figures)? {
        Reply::Figures(figures) => Ok(*figures),
        _ => bail!("unexpected answer"),
    }
}

/// Name, heading and width of the columns.
const HEADINGS: [&str; 9] =
    ["READ/S", "WRITE/S", "OTHER/S", "READ B/S", "WRITE B/S", "LATENCY", "COPIED/S", "OWN", "DEVICE"];

fn lines(rates: &Rates) -> Vec<String> {
    let pool = &rates.pool;
    let waiting = if pool.waiting > 0 { format!("  {} writes wait for space", pool.waiting) } else { String::new() };
    let poisoned = if pool.poisoned { "  POISONED" } else { "" };
    let mut lines = vec![
        format!(
            "pool {}  {} of {} used ({} %)  journal {} of {}{waiting}{poisoned}",
            pool.name,
            size::show(pool.used_bytes),
            size::show(pool.size_bytes),
            pool.filled_percent,
            size::show(pool.journal_used_bytes),
            size::show(pool.journal_bytes),
        ),
        format!("engine process {}  generation {}", pool.engine_pid.unwrap_or(0), pool.generation),
        String::new(),
    ];
    let longest = rates.volumes.iter().map(|volume| volume.name.chars().count()).max().unwrap_or(0);
    let width = longest.clamp(6, 32);
    let row = |name: &str, cells: [String; 9]| {
        let mut line = format!("{name:<width$}");
        for (index, cell) in cells.iter().enumerate() {
            // The device stands last, and to the left.
            line.push_str(&if index == 8 { format!("  {cell}") } else { format!("  {cell:>9}") });
        }
        line.trim_end().to_owned()
    };
    lines.push(row("VOLUME", HEADINGS.map(str::to_owned)));
    lines.extend(rates.volumes.iter().map(|volume| {
        let name: String = volume.name.chars().take(width).collect();
        row(&name, cells(volume))
    }));
    if rates.volumes.is_empty() {
        lines.push("nothing is attached".into());
    }
    lines
}

fn cells(volume: &VolumeRates) -> [String; 9] {
    [
        format!("{:.0}", volume.reads_per_second),
        format!("{:.0}", volume.writes_per_second),
        format!("{:.0}", volume.others_per_second),
        size::show(volume.read_bytes_per_second as u64),
        size::show(volume.written_bytes_per_second as u64),
        latency(volume.mean_latency_us),
        format!("{:.0}", volume.blocks_redirected_per_second),
        size::show(volume.own_bytes),
        volume.device.as_ref().map(|device| device.display().to_string()).unwrap_or_default(),
    ]
}

/// Nothing, where there were no requests.
fn latency(mean_us: Option<f64>) -> String {
    match mean_us {
        None => "-".into(),
        Some(mean) if mean < 1000.0 => format!("{mean:.0} us"),
        Some(mean) if mean < 1_000_000.0 => format!("{:.1} ms", mean / 1000.0),
        Some(mean) => format!("{:.1} s", mean / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::protocol::{Pool, VolumeFigures};

    #[test]
    fn columns_are_aligned_and_long_names_cut() {
        let named = |name: &str| VolumeFigures {
            name: name.into(),
            device: Some("/dev/loop7".into()),
            ..VolumeFigures::default()
        };
        let figures = Figures {
            pool: Pool { name: "main".into(), ..Pool::default() },
            volumes: vec![named("a"), named(&"long".repeat(20))],
            taken_ns: 1,
            ..Figures::default()
        };
        let lines = lines(&Rates::between(&figures, &figures));
        let at = lines[3].find("DEVICE").unwrap();
        assert!(lines[4..].iter().all(|line| line.find("/dev/loop7") == Some(at)), "{lines:#?}");
        assert_eq!(lines.len(), 6);
    }

    #[test]
    fn latencies_are_shown_in_the_unit_that_fits() {
        let shown = [None, Some(12.4), Some(2500.0), Some(3.2e6)].map(latency);
        assert_eq!(shown, ["-", "12 us", "2.5 ms", "3.2 s"]);
    }
}

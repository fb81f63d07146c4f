//! Makes one named fault in a pool file that nobody uses: `damage POOL FAULT...`, `damage --list` (`tools/damage`).
//!
//! The pool must be sound. What a check will say of it is printed. Several faults are made one after the other, each in what the
//! one before it has left, as far as that can still be taken apart.

#[path = "../tests/support/damage/mod.rs"]
mod damage;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use plywood::io::{FileStorage, OpenOptions, Reactor, ReactorOptions};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "damage: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [list] if list == "--list" => {
            for fault in damage::faults() {
                println!("{:40} {} x {}", fault.name, fault.structure, fault.check);
            }
            Ok(())
        }
        [pool, faults @ ..] if !faults.is_empty() && !pool.starts_with('-') => make(Path::new(pool), faults),
        _ => bail!("usage: damage POOL FAULT... | --list"),
    }
}

fn make(path: &Path, faults: &[String]) -> Result<()> {
    // Opened as an engine does, which nobody may meanwhile.
    let reactor = Reactor::new(ReactorOptions::default()).context("io_uring")?;
    let _locked = FileStorage::open(&reactor, path, OpenOptions::default())?;
    let mut file = std::fs::File::options().read(true).write(true).open(path)?;
    for fault in faults {
        let made = damage::damage(&mut file, fault).with_context(|| format!("{fault} of {}", path.display()))?;
        for (found, touched) in made.found {
            println!("{fault}: block {}: {}: {}", found.address, found.structure, found.check);
            for name in touched {
                println!("    touches {name}");
            }
        }
    }
    Ok(file.sync_all()?)
}

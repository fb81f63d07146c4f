//! `plywood pool`: create, info, check, dump, restore, grow.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;

use super::output::{self, Working};
use super::{Context, size};
use crate::daemon::protocol::{Check, Command, Pool, Reply};
use crate::daemon::{NewPool, check_pool, create_pool, dump_pool, restore_pool};
use crate::engine::{DumpReport, Progress, RestoreReport, Touched};
use crate::error::Error;

/// Pools.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Create a pool in a new sparse file, or on a block device
    Create {
        /// The file or block device
        file: PathBuf,
        /// Size of the pool; of a block device the whole is taken
        #[arg(long, value_parser = size::parse)]
        size: Option<u64>,
        /// Name of the pool; that of the file without this option
        #[arg(long)]
        name: Option<String>,
        /// Use a file or device that holds something, or a file system that cannot do all that a pool needs
        #[arg(long)]
        force: bool,
    },
    /// Show sizes, space and state
    Info,
    /// Read all metadata, verify every checksum and compare every count with a walk
    Check,
    /// Write all metadata as text, one JSON object a line; the data is not in it, so this is no backup
    Dump {
        /// The file to write; standard output without this option
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Write a dump's metadata over that of the pool, or of a copy of its file; the data stays as it is
    Restore {
        /// What plywood pool dump has written
        dump: PathBuf,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Make the pool larger
    Grow {
        /// The new size
        #[arg(long, value_parser = size::parse)]
        size: u64,
    },
}

/// Does a pool command.
///
/// # Errors
/// What the pool answers, what keeps it from being printed, and a check that found faults.
pub fn run(context: &Context, command: PoolCommand) -> Result<()> {
    match command {
        PoolCommand::Create { file, size, name, force } => {
            let pool = create_pool(&NewPool { path: file, size_bytes: size, name, force })?;
            if context.json {
                return Ok(output::json("pool", &pool)?);
            }
            let path = pool.path.display();
            Ok(output::line(&format!("pool {} in {path}: {}", pool.name, size::echo(pool.size_bytes)))?)
        }
        PoolCommand::Info => {
            let Reply::Pool(pool) = context.client()?.call(Command::PoolInfo)? else { bail!("unexpected answer") };
            show(context, &pool)
        }
        PoolCommand::Check => {
            let found = context.find_pool()?;
            let working = Working::begin("checking");
            let check = check_pool(&found, &mut |at| working.show(at.reached_blocks, at.used_blocks));
            drop(working);
            report(context, &check?)
        }
        PoolCommand::Dump { output } => dump(context, output.as_deref()),
        PoolCommand::Restore { dump, yes } => restore(context, &dump, yes),
        PoolCommand::Grow { size } => {
            let command = Command::PoolGrow { size_bytes: size };
            let Reply::Pool(pool) = context.client()?.call(command)? else { bail!("unexpected answer") };
            if context.json {
                return Ok(output::json("pool", &pool)?);
            }
            Ok(output::line(&format!("pool {}: {}", pool.name, size::echo(pool.size_bytes)))?)
        }
    }
}

fn dump(context: &Context, output: Option<&Path>) -> Result<()> {
    let found = context.find_pool()?;
    let working = Working::begin("dumping");
    let mut show = |at: Progress| working.show(at.reached_blocks, at.used_blocks);
    let report = match output {
        None => dump_pool(&found, BufWriter::new(io::stdout().lock()), &mut show),
        Some(path) => {
            let file = File::options().write(true).create_new(true).open(path);
            let file = file.with_context(|| format!("{}: creating the dump", path.display()))?;
            dump_pool(&found, BufWriter::new(&file), &mut show).and_then(|report| {
                file.sync_all().map_err(|error| Error::io(format!("{}: writing the dump", path.display()), error))?;
                Ok(report)
            })
        }
    };
    drop(working);
    let report = report?;
    if output.is_some() {
        let DumpReport { nodes, volumes, .. } = report;
        output::line(&format!("{volumes} volumes, {nodes} nodes. Metadata only: this is no backup"))?;
    }
    if report.fault_count > 0 {
        bail!("pool has {} faults; what they touch is not in the dump", report.fault_count);
    }
    Ok(())
}

fn restore(context: &Context, dump: &Path, yes: bool) -> Result<()> {
    // The superblocks may be what is to be restored.
    let path = match (context.find_pool(), &context.pool) {
        (Ok(found), _) => found.path,
        (Err(error), Some(named)) if error.downcast_ref().is_some_and(|error| matches!(error, Error::Corrupt(_))) => {
            PathBuf::from(named)
        }
        (Err(error), _) => return Err(error),
    };
    let question = format!("Replace all metadata of {}? Data written since the dump is lost.", path.display());
    output::confirm(&question, yes)?;
    let report = restore_pool(&path, dump)?;
    let RestoreReport { name, nodes, volumes, faults, .. } = report;
    output::line(&format!("pool {name}: {volumes} volumes, {nodes} nodes restored"))?;
    if faults > 0 {
        output::line(&format!("the dump was made of a pool with {faults} faults: what they touched is not restored"))?;
    }
    Ok(())
}

fn show(context: &Context, pool: &Pool) -> Result<()> {
    if context.json {
        return Ok(output::json("pool", pool)?);
    }
    let percent = |part: u64| match pool.size_bytes {
        0 => String::new(),
        whole => format!(" ({:.1} %)", part as f64 * 100.0 / whole as f64),
    };
    let or_none = |value: Option<u64>| value.map_or_else(|| "none".into(), |value| value.to_string());
    let mut facts = vec![
        ("name", pool.name.clone()),
        ("uuid", pool.uuid.to_string()),
        ("file", pool.path.display().to_string()),
        ("size", size::echo(pool.size_bytes)),
        ("used", format!("{}{}", size::echo(pool.used_bytes), percent(pool.used_bytes))),
        ("free", size::echo(pool.free_bytes)),
        ("layout", size::echo(pool.layout_bytes)),
        ("reserve", size::echo(pool.reserve_bytes)),
        ("journal", format!("{}, {} in use", size::echo(pool.journal_bytes), size::show(pool.journal_used_bytes))),
        ("on the host", size::echo(pool.host_bytes)),
        ("volumes", format!("{}, and {} snapshots", pool.volumes, pool.snapshots)),
        ("virtual sizes", format!("{} in all", size::echo(pool.virtual_bytes))),
        ("being freed", format!("{} deleted trees", pool.carcasses)),
        ("generation", format!("{}, clock {}", pool.generation, pool.clock)),
        ("state", pool.poisoned.as_ref().map_or_else(|| "sound".into(), |reason| format!("poisoned: {reason}"))),
    ];
    if pool.front_pid.is_some() {
        facts.push(("front", format!("process {}", or_none(pool.front_pid.map(u64::from)))));
        let restarts = pool.engine_restarts.unwrap_or(0);
        facts.push(("engine", format!("process {}, {restarts} restarts", or_none(pool.engine_pid.map(u64::from)))));
        facts.push(("transport", pool.transport.clone().unwrap_or_else(|| "none yet".into())));
    }
    Ok(output::facts(&facts)?)
}

fn report(context: &Context, check: &Check) -> Result<()> {
    if context.json {
        output::json("check", check)?;
    } else {
        for fault in &check.faults {
            output::line(&fault.message)?;
            for touched in &fault.touches {
                output::line(&format!("    touches {}", touched_words(touched)))?;
            }
            if fault.touches_more {
                output::line("    touches more than is listed")?;
            }
        }
        let Check { used_blocks, nodes, volumes, fault_count, unaccounted_blocks, journal_records, .. } = check;
        if *journal_records > 0 {
            output::line(&format!("{journal_records} changes in the journal, to be made when the pool is opened"))?;
        }
        if *unaccounted_blocks > 0 {
            output::line(&format!("{unaccounted_blocks} blocks in use are held by what is lost"))?;
        }
        output::line(&format!("{volumes} volumes, {nodes} nodes, {used_blocks} blocks in use: {fault_count} faults"))?;
    }
    if check.fault_count == 0 { Ok(()) } else { bail!("pool has {} faults", check.fault_count) }
}

/// A volume and what of it is touched.
fn touched_words(touched: &Touched) -> String {
    let ranges: Vec<String> = touched
        .ranges
        .iter()
        .map(|range| format!("{}+{}", range.offset_bytes, size::show(range.length_bytes)))
        .collect();
    if ranges.is_empty() { touched.name.clone() } else { format!("{} at {}", touched.name, ranges.join(", ")) }
}

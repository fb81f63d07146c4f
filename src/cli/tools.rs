//! `plywood pool` check, dump, restore and repair.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::output::{self, Working};
use super::{Context, size};
use crate::daemon::protocol::{Check, Fault};
use crate::daemon::{RepairTo, check_pool, dump_pool, repair_pool, restore_pool, undo_repair};
use crate::engine::{DumpReport, LostRanges, Progress, RepairReport, RestoreReport, Touched, TouchedRange};
use crate::error::Error;

/// Checks a pool.
///
/// # Errors
/// When it cannot be read, and when there are faults.
pub fn check(context: &Context) -> Result<()> {
    let found = context.find_pool()?;
    let working = Working::begin("checking");
    let check = check_pool(&found, &mut |at| working.show(at.reached_blocks, at.used_blocks));
    drop(working);
    report(context, &check?)
}

/// How to repair.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group(clap::ArgGroup::new("how").required(true).args(["output", "in_place", "undo"])))]
pub struct RepairArguments {
    /// Repair a copy in this new file, and leave the pool as it is
    #[arg(long, value_name = "NEW")]
    output: Option<PathBuf>,
    /// Repair the pool itself
    #[arg(long)]
    in_place: bool,
    /// Put back what a repair in place has written over
    #[arg(long, value_name = "SAVED")]
    undo: Option<PathBuf>,
    /// The new file to which --in-place first saves what it writes over; POOL.saved without this option
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "undo"])]
    save: Option<PathBuf>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Repairs a pool.
///
/// # Errors
/// What it is refused for.
pub fn repair(context: &Context, arguments: &RepairArguments) -> Result<()> {
    if let Some(saved) = &arguments.undo {
        return undo(context, saved, arguments.yes);
    }
    let found = context.find_unfinished_pool()?;
    let to = if let Some(output) = &arguments.output {
        RepairTo::New(output.clone())
    } else {
        let saved = arguments.save.clone().unwrap_or_else(|| PathBuf::from(format!("{}.saved", found.name)));
        output::confirm(&format!("Repair {} in place?", found.path.display()), arguments.yes)?;
        RepairTo::InPlace(saved)
    };
    let working = Working::begin("repairing");
    let report = repair_pool(&found, &to, &mut |at| working.show(at.reached_blocks, at.used_blocks));
    drop(working);
    let report = report?;
    if context.json { Ok(output::json("repair", &told(&report))?) } else { tell(&report, &to) }
}

fn undo(context: &Context, saved: &Path, yes: bool) -> Result<()> {
    let (path, uuid) = match (context.find_unfinished_pool(), &context.pool) {
        (Ok(found), _) => (found.path, Some(found.uuid)),
        (Err(error), Some(named)) if is_damaged(&error) => (PathBuf::from(named), None),
        (Err(error), _) => return Err(error),
    };
    output::confirm(&format!("Put back what was in {} before its repair?", path.display()), yes)?;
    let blocks = undo_repair(&path, uuid, saved)?;
    Ok(output::line(&format!("{blocks} blocks are as they were"))?)
}

/// Whether not even a superblock could be read.
fn is_damaged(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| matches!(error, Error::Corrupt(_)))
}

/// The report for programs.
fn told(report: &RepairReport) -> serde_json::Value {
    let lost = |lost: &LostRanges| serde_json::json!({ "volume": lost.volume, "name": lost.name, "ranges": lost.ranges, "more": lost.more });
    serde_json::json!({
        "fault_count": report.fault_count,
        "faults": report.faults.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "kept": report.kept,
        "lost": report.lost.iter().map(lost).collect::<Vec<_>>(),
        "lost_attributes": report.lost_attributes,
        "unsealed": report.unsealed,
        "lost_ids": report.lost_ids,
        "from_journal": report.from_journal,
        "changes_kept": report.changes_kept,
        "changes_lost_from": report.changes_lost_from,
        "nodes_rewritten": report.nodes_rewritten,
        "copies_rewritten": report.copies_rewritten,
        "blocks_written": report.blocks_written,
    })
}

fn tell(report: &RepairReport, to: &RepairTo) -> Result<()> {
    if report.fault_count == 0 {
        return Ok(output::line("nothing is wrong; nothing was changed")?);
    }
    for fault in &report.faults {
        output::line(&format!("found: {fault}"))?;
    }
    for name in &report.kept {
        output::line(&format!("kept: {name}"))?;
    }
    for lost in &report.lost {
        let more = if lost.more { ", and more" } else { "" };
        output::line(&format!("lost: {} at {}{more}", lost.name, range_words(&lost.ranges)))?;
    }
    for name in &report.unsealed {
        output::line(&format!("not sealed any more: {name}; plywood snapshot seal does it again"))?;
    }
    for name in &report.lost_attributes {
        output::line(&format!("lost: attributes of {name}"))?;
    }
    for (first, end) in &report.lost_ids {
        output::line(&format!("lost: volumes with ids {first} to {}, if there were any", end - 1))?;
    }
    for name in &report.from_journal {
        output::line(&format!("new: {name} holds what the journal says of a volume whose record is lost"))?;
    }
    if let Some(from) = report.changes_lost_from {
        output::line(&format!("lost: changes from number {from} on, which were in the journal only"))?;
    }
    let RepairReport { fault_count, nodes_rewritten, copies_rewritten, .. } = report;
    output::line(&format!(
        "{fault_count} faults repaired; {nodes_rewritten} nodes written anew, {copies_rewritten} from second copies"
    ))?;
    Ok(match to {
        RepairTo::New(path) => output::line(&format!("the repaired pool is {}", path.display())),
        RepairTo::InPlace(saved) => {
            let saved = saved.display();
            output::line(&format!(
                "what was written over is in {saved}; plywood pool repair --undo {saved} puts it back"
            ))
        }
    }?)
}

/// Dumps a pool's metadata.
///
/// # Errors
/// When it cannot be read or written, and after a dump of a damaged pool.
pub fn dump(context: &Context, output: Option<&Path>) -> Result<()> {
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

/// Restores a dump.
///
/// # Errors
/// What it is refused for.
pub fn restore(context: &Context, dump: &Path, yes: bool) -> Result<()> {
    // The superblocks may be what is to be restored.
    let path = match (context.find_unfinished_pool(), &context.pool) {
        (Ok(found), _) => found.path,
        (Err(error), Some(named)) if is_damaged(&error) => PathBuf::from(named),
        (Err(error), _) => return Err(error),
    };
    let question = format!("Replace all metadata of {}? Data written since the dump is lost.", path.display());
    output::confirm(&question, yes)?;
    let report = restore_pool(&path, dump)?;
    if context.json {
        return Ok(output::json("restore", &report)?);
    }
    let RestoreReport { name, nodes, volumes, faults, .. } = report;
    output::line(&format!("pool {name}: {volumes} volumes, {nodes} nodes restored"))?;
    if faults > 0 {
        output::line(&format!("the dump was made of a pool with {faults} faults: what they touched is not restored"))?;
    }
    Ok(())
}

fn report(context: &Context, check: &Check) -> Result<()> {
    if context.json {
        output::json("check", check)?;
    } else {
        for fault in &check.faults {
            tell_fault(fault)?;
        }
        let Check { used_blocks, nodes, volumes, fault_count, unaccounted_blocks, journal_records, .. } = check;
        if *journal_records > 0 {
            output::line(&format!("{journal_records} changes in the journal, which no checkpoint holds yet"))?;
        }
        if *unaccounted_blocks > 0 {
            output::line(&format!("{unaccounted_blocks} blocks in use are held by what is lost"))?;
        }
        output::line(&format!("{volumes} volumes, {nodes} nodes, {used_blocks} blocks in use: {fault_count} faults"))?;
    }
    if check.fault_count == 0 { Ok(()) } else { bail!("pool has {} faults", check.fault_count) }
}

/// Prints a fault and what it touches.
pub(super) fn tell_fault(fault: &Fault) -> Result<()> {
    output::line(&fault.message)?;
    for touched in &fault.touches {
        output::line(&format!("    touches {}", touched_words(touched)))?;
    }
    if fault.touches_more {
        output::line("    touches more than is listed")?;
    }
    Ok(())
}

/// A volume and what of it is touched.
fn touched_words(touched: &Touched) -> String {
    if touched.ranges.is_empty() {
        return touched.name.clone();
    }
    format!("{} at {}", touched.name, range_words(&touched.ranges))
}

/// `OFFSET+LENGTH, ...`, the offsets in bytes.
fn range_words(ranges: &[TouchedRange]) -> String {
    let words: Vec<String> =
        ranges.iter().map(|range| format!("{}+{}", range.offset_bytes, size::show(range.length_bytes))).collect();
    words.join(", ")
}

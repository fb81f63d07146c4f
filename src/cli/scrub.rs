//! `plywood pool scrub`.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use super::output::{self, Waiting, Working};
use super::{Context, size, tools, volume};
use crate::daemon::Client;
use crate::daemon::protocol::{Command, Damaged, Fault, Reply, Scrub, ScrubStatus};
use crate::units::BLOCK_BYTES;

/// Bytes read in one step where no rate is given.
const STEP_BYTES: u64 = 64 << 20;
/// Steps a second where one is.
const STEPS_A_SECOND: u64 = 4;
/// Most damaged blocks that are looked for in the volumes.
const DAMAGED_MAX: usize = 1000;

/// How to scrub.
#[derive(Debug, Args)]
pub struct ScrubArguments {
    /// Most to read a second; as fast as it goes without this option
    #[arg(long, value_parser = size::parse, value_name = "SIZE")]
    rate: Option<u64>,
    /// Begin anew where a scrub was left before its end, instead of going on
    #[arg(long)]
    restart: bool,
}

/// What a scrub found.
#[derive(Debug, Default, serde::Serialize)]
struct Found {
    /// Whether it went on where another was left: the metadata was read then.
    resumed: bool,
    metadata_blocks: u64,
    data_bytes: u64,
    mended: u64,
    fault_count: u64,
    faults: Vec<Fault>,
}

/// Scrubs a pool.
///
/// # Errors
/// What keeps it from being read, and faults that could not be mended.
pub fn run(context: &Context, arguments: &ScrubArguments) -> Result<()> {
    let client = context.client()?;
    let mut found = Found::default();
    let Reply::Pool(pool) = client.call(Command::PoolInfo)? else { bail!("unexpected answer") };
    found.resumed = !arguments.restart && pool.scrub.is_some_and(|scrub| scrub.under_way);
    if !found.resumed {
        metadata(&client, &mut found)?;
    }
    let damaged = data(&client, arguments.rate, &mut found)?;
    if !damaged.is_empty() {
        let _waiting = Waiting::begin("looking for the volumes that are touched");
        let Reply::Faults(faults) = client.call(Command::ScrubTouched { damaged })? else { bail!("unexpected answer") };
        found.faults.extend(faults);
    }
    report(context, &found)
}

fn metadata(client: &Client, found: &mut Found) -> Result<()> {
    let waiting = Waiting::begin("reading the metadata");
    let reply = client.call(Command::ScrubBegin);
    drop(waiting);
    let scrub = expect(reply?)?;
    let check = scrub.check.unwrap_or_default();
    found.metadata_blocks = check.used_blocks.saturating_sub(check.data_blocks);
    found.mended = scrub.mended;
    found.fault_count = check.fault_count.saturating_sub(scrub.mended);
    found.faults = check.faults;
    Ok(())
}

/// Reads the data, a step at a time. Answers what is damaged.
fn data(client: &Client, rate: Option<u64>, found: &mut Found) -> Result<Vec<Damaged>> {
    let working = Working::begin("reading sealed blocks");
    let step_bytes = rate.map_or(STEP_BYTES, |rate| (rate / STEPS_A_SECOND).clamp(BLOCK_BYTES, STEP_BYTES));
    let began = Instant::now();
    let mut damaged = Vec::new();
    loop {
        let scrub = expect(client.call(Command::ScrubStep { blocks: step_bytes / BLOCK_BYTES })?)?;
        found.data_bytes += scrub.blocks * BLOCK_BYTES;
        found.fault_count += scrub.damaged_count;
        damaged.extend(scrub.damaged);
        damaged.truncate(DAMAGED_MAX);
        working.show(scrub.position_bytes, scrub.end_bytes);
        if !scrub.more {
            return Ok(damaged);
        }
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(found.data_bytes as f64 / rate.max(1) as f64);
            sleep(due.saturating_sub(began.elapsed()));
        }
    }
}

fn expect(reply: Reply) -> Result<Scrub> {
    match reply {
        Reply::Scrub(scrub) => Ok(*scrub),
        _ => bail!("unexpected answer"),
    }
}

fn report(context: &Context, found: &Found) -> Result<()> {
    if context.json {
        output::json("scrub", found)?;
    } else {
        for fault in &found.faults {
            tools::tell_fault(fault)?;
        }
        let metadata = match found.resumed {
            true => "went on where the last one was left".into(),
            false => format!("{} of metadata", size::show(found.metadata_blocks * BLOCK_BYTES)),
        };
        let data = size::show(found.data_bytes);
        let mended = if found.mended == 0 { String::new() } else { format!(", {} bad copies mended", found.mended) };
        output::line(&format!("scrubbed: {metadata}, {data} of sealed blocks{mended}"))?;
    }
    match found.fault_count {
        0 => Ok(()),
        count => bail!("{count} faults that have no second copy; docs/tools.md says what to do about them"),
    }
}

/// Where scrubbing stands, for people.
pub(super) fn words(scrub: Option<&ScrubStatus>) -> String {
    let Some(scrub) = scrub else { return "never; plywood pool scrub reads everything that has a checksum".into() };
    let time = |ns| volume::created(ns, "%Y-%m-%d %H:%M");
    let faults = match scrub.fault_count {
        0 => "no faults".into(),
        count => format!("{count} faults"),
    };
    if scrub.under_way {
        let position = size::show(scrub.position_bytes);
        return format!("begun {}, left at {position}, {faults}; plywood pool scrub goes on", time(scrub.begun_ns));
    }
    format!("ended {}, {faults}", time(scrub.ended_ns))
}

//! `plywood diff`: the ranges that differ between two volumes of one family.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use super::{Context, Name, output, size};
use crate::daemon::protocol::{Command, Range, Reply};

/// Compares two volumes by their maps.
#[derive(Debug, Args)]
pub struct DiffArguments {
    /// A volume or snapshot
    from: Name,
    /// Another of the same family
    to: Name,
}

/// Prints the ranges that may differ; equal parts of the maps are not walked.
///
/// # Errors
/// What the pool answers, and what keeps it from being printed.
pub fn run(context: &Context, arguments: &DiffArguments) -> Result<()> {
    let client = context.client()?;
    let (from, to) = (arguments.from.text()?, arguments.to.text()?);
    let mut ranges: Vec<Range> = Vec::new();
    let mut start_bytes = Some(0);
    while let Some(start) = start_bytes {
        let command = Command::Diff { from: Some(from.clone()), to: to.clone(), start_bytes: start };
        let Reply::Diff(page) = client.call(command)? else { bail!("unexpected answer") };
        // A page that does not move on would be asked for without end.
        if page.next_bytes.is_some_and(|next| next <= start) {
            bail!("daemon's answer does not move on from byte {start}");
        }
        ranges.extend(page.ranges);
        start_bytes = page.next_bytes;
    }
    let total: u64 = ranges.iter().map(|range| range.1).sum();
    if context.json {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|Range(offset, length, data)| json!({"offset_bytes": offset, "length_bytes": length, "data": data}))
            .collect();
        let value = json!({"from": from, "to": to, "changed_bytes": total, "ranges": ranges});
        return Ok(output::json("diff", &value)?);
    }
    let rows = ranges.iter().map(|Range(offset, length, data)| {
        vec![offset.to_string(), length.to_string(), if *data { "data" } else { "hole" }.to_owned()]
    });
    if !ranges.is_empty() {
        output::table(&["OFFSET", "LENGTH", "CONTENT"], &["OFFSET", "LENGTH"], rows.collect())?;
    }
    Ok(output::line(&format!("{} in {} ranges", size::echo(total), ranges.len()))?)
}

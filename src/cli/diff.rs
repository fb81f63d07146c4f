//! `plywood diff`: the ranges that differ between two volumes of one family.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::{Context, Name, output, size};
use crate::daemon::protocol::{Failure, Range};

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
    client.each_changed_range(Some(&from), &to, |range| {
        ranges.push(range);
        Ok::<_, Failure>(())
    })?;
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

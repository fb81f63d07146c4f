//! `plywood metrics`.

use anyhow::{Result, bail};
use serde_json::Value;

use super::{Context, output};
use crate::daemon::protocol::{Command, Reply};

/// Prints the metrics of a pool; with `--json` the figures that they are made of.
///
/// # Errors
/// When there is no pool, or it cannot be opened.
pub fn run(context: &Context) -> Result<()> {
    let client = context.client()?;
    if context.json {
        let Reply::Figures(figures) = client.call(Command::Figures)? else { bail!("unexpected answer") };
        let mut figures = serde_json::to_value(&figures)?;
        // These are `pool info --json`.
        if let Value::Object(figures) = &mut figures {
            figures.remove("pool");
        }
        return Ok(output::json("metrics", &figures)?);
    }
    let Reply::Metrics(text) = client.call(Command::Metrics)? else { bail!("unexpected answer") };
    Ok(output::line(text.trim_end())?)
}

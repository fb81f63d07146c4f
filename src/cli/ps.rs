//! `plywood ps`: containers, and what they take.

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::image::labels;
use super::image::layers::known;
use super::{Context, output, size, volume};

/// Lists containers.
#[derive(Debug, Args)]
pub struct PsArguments {
    /// What each takes, and all of them together
    #[arg(long, short)]
    size: bool,
}

/// A container, as it is shown.
#[derive(Clone, Debug, Serialize)]
struct Container {
    name: String,
    image: String,
    command: Vec<String>,
    running: bool,
    created_ns: u64,
    /// Bytes that it wrote and still has.
    own_bytes: u64,
    /// Bytes that it has of its image.
    shared_bytes: u64,
    /// The size that it sees.
    size_bytes: u64,
}

/// Prints the containers that `plywood run` made, running or kept. A block that one wrote is its own and nobody else's, so the
/// sum is what all of them take.
///
/// # Errors
/// What the pool answers.
pub fn ps(context: &Context, arguments: &PsArguments) -> Result<()> {
    let mut containers = Vec::new();
    for known in known(&context.client()?)? {
        let Some(image) = labels::text(&known.attributes, labels::CONTAINER_IMAGE) else { continue };
        if known.volume.snapshot {
            continue;
        }
        let command = labels::text(&known.attributes, labels::CONTAINER_COMMAND);
        let volume = known.volume;
        containers.push(Container {
            name: volume.name,
            image,
            command: command.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default(),
            running: volume.device.is_some(),
            created_ns: volume.created_ns,
            own_bytes: volume.own_bytes,
            shared_bytes: volume.mapped_bytes.saturating_sub(volume.own_bytes),
            size_bytes: volume.size_bytes,
        });
    }
    containers.sort_by(|left, right| left.name.cmp(&right.name));
    if context.json {
        return Ok(output::json("containers", &containers)?);
    }
    let mut headings = vec!["NAME", "IMAGE", "COMMAND", "STATE", "CREATED"];
    if arguments.size {
        headings.extend(["OWN", "SHARED", "VIRTUAL"]);
    }
    let rows = containers.iter().map(|container| {
        let command = container.command.join(" ");
        let short: String = command.chars().take(32).collect();
        let mut row = vec![
            container.name.clone(),
            container.image.clone(),
            if short.len() < command.len() { format!("{short}...") } else { short },
            if container.running { "running" } else { "ended" }.to_owned(),
            volume::created(container.created_ns, "%Y-%m-%d %H:%M"),
        ];
        if arguments.size {
            row.extend([container.own_bytes, container.shared_bytes, container.size_bytes].map(size::show));
        }
        row
    });
    output::table(&headings, &["OWN", "SHARED", "VIRTUAL"], rows.collect())?;
    if arguments.size {
        let all: u64 = containers.iter().map(|container| container.own_bytes).sum();
        let count = if containers.len() == 1 {
            "1 container takes".to_owned()
        } else {
            format!("{} containers take", containers.len())
        };
        output::line(&format!("{count} {}", size::echo(all)))?;
    }
    Ok(())
}

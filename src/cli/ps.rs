//! `plywood ps`: containers, and what they take.

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::image::labels;
use super::image::layers::known;
use super::run::{logs, runs};
use super::{Context, output, size, volume};

/// The columns of `--size`.
const SIZES: [&str; 4] = ["OWN", "LOGS", "SHARED", "VIRTUAL"];

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
    /// Of one that has ended.
    exit_code: Option<u8>,
    created_ns: u64,
    /// Bytes that it wrote and still has.
    own_bytes: u64,
    /// Bytes that it has of its image.
    shared_bytes: u64,
    /// The size that it sees.
    size_bytes: u64,
    /// What its log takes, beside the pool.
    log_bytes: u64,
}

/// Prints the containers that `plywood run` made, running or kept. A block that one wrote is its own and nobody else's, so the
/// sum, with the logs, is what all of them take.
///
/// # Errors
/// What the pool answers.
pub fn ps(context: &Context, arguments: &PsArguments) -> Result<()> {
    let mut containers = Vec::new();
    let client = context.client()?;
    let pool = client.pool_uuid()?;
    for known in known(&client)? {
        let Some(image) = labels::text(&known.attributes, labels::CONTAINER_IMAGE) else { continue };
        if known.volume.snapshot {
            continue;
        }
        let command = labels::text(&known.attributes, labels::CONTAINER_COMMAND);
        let exit_code = labels::text(&known.attributes, labels::CONTAINER_EXIT).and_then(|code| code.parse().ok());
        let volume = known.volume;
        let id = labels::text(&known.attributes, labels::CONTAINER_ID);
        let running = id.map_or(Ok(volume.device.is_some()), |id| runs(&volume, &id))?;
        containers.push(Container {
            name: volume.name,
            image,
            command: command.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default(),
            running,
            exit_code: exit_code.filter(|_| !running),
            created_ns: volume.created_ns,
            own_bytes: volume.own_bytes,
            shared_bytes: volume.mapped_bytes.saturating_sub(volume.own_bytes),
            size_bytes: volume.size_bytes,
            log_bytes: logs::bytes(pool, volume.uuid),
        });
    }
    containers.sort_by(|left, right| left.name.cmp(&right.name));
    if context.json {
        return Ok(output::json("containers", &containers)?);
    }
    let mut headings = vec!["NAME", "IMAGE", "COMMAND", "STATE", "CREATED"];
    if arguments.size {
        headings.extend(SIZES);
    }
    let rows = containers.iter().map(|container| {
        let command = container.command.join(" ");
        let short: String = command.chars().take(32).collect();
        let mut row = vec![
            container.name.clone(),
            container.image.clone(),
            if short.len() < command.len() { format!("{short}...") } else { short },
            state(container),
            volume::created(container.created_ns, "%Y-%m-%d %H:%M"),
        ];
        if arguments.size {
            let Container { own_bytes, log_bytes, shared_bytes, size_bytes, .. } = *container;
            row.extend([own_bytes, log_bytes, shared_bytes, size_bytes].map(size::show));
        }
        row
    });
    output::table(&headings, &SIZES, rows.collect())?;
    if arguments.size {
        let all: u64 = containers.iter().map(|container| container.own_bytes + container.log_bytes).sum();
        let count = if containers.len() == 1 {
            "1 container takes".to_owned()
        } else {
            format!("{} containers take", containers.len())
        };
        output::line(&format!("{count} {}", size::echo(all)))?;
    }
    Ok(())
}

fn state(container: &Container) -> String {
    match container.exit_code {
        _ if container.running => "running".to_owned(),
        Some(code) => format!("ended ({code})"),
        None => "ended".to_owned(),
    }
}

//! `plywood events`.

use anyhow::{Result, bail};
use clap::Args;

use super::{Context, output, volume};
use crate::daemon::protocol::{Command, Event, Events, Kind, Reply};
use crate::daemon::{self, Client};

/// How long one question waits for something to happen. Shorter than what a client waits for a successor.
const WAIT_MS: u64 = 5000;

/// What to show.
#[derive(Debug, Args)]
pub struct EventsArguments {
    /// Show what the engine process remembers, and end
    #[arg(long, conflicts_with = "new")]
    once: bool,
    /// Only what happens from now on, not what the engine process remembers
    #[arg(long)]
    new: bool,
}

/// Follows what happens to a pool in use, until its daemon ends.
///
/// # Errors
/// When no daemon serves the pool, or it is not understood.
pub fn run(context: &Context, arguments: &EventsArguments) -> Result<()> {
    let found = context.find_pool()?;
    let Some(client) = daemon::running(&found)? else {
        bail!("no daemon serves pool {}, so nothing happens to it; start one with plywood serve", found.name);
    };
    let mut told = Events::default();
    if arguments.new {
        told = ask(&client, 0, 0)?;
        while !told.events.is_empty() {
            told = ask(&client, told.last, 0)?;
        }
    }
    let mut engine = client.hello()?.engine_pid;
    loop {
        let wait_ms = if arguments.once { 0 } else { WAIT_MS };
        told = match client.call(Command::Events { after: told.last, wait_ms }) {
            Ok(Reply::Events(told)) => told,
            Ok(_) => bail!("unexpected answer"),
            // What it was told to do: it has stopped.
            Err(failure) if failure.kind == Kind::Io && daemon::running(&found)?.is_none() => return ended(context),
            Err(failure) => return Err(failure.into()),
        };
        if told.engine_pid != engine {
            engine = told.engine_pid;
            note(
                context,
                "reconnected",
                &format!("engine process {engine} tells from here on; its predecessor's last events may be lost"),
            )?;
        } else if told.lost {
            note(context, "lost", "some events are not remembered any more")?;
        }
        for event in &told.events {
            show(context, event)?;
        }
        if arguments.once && told.events.is_empty() {
            return Ok(());
        }
    }
}

fn ask(client: &Client, after: u64, wait_ms: u64) -> Result<Events> {
    match client.call(Command::Events { after, wait_ms })? {
        Reply::Events(told) => Ok(told),
        _ => bail!("unexpected answer"),
    }
}

fn show(context: &Context, event: &Event) -> Result<()> {
    if context.json {
        return Ok(output::json_line("event", event)?);
    }
    let time = volume::created(event.time_ns, "%Y-%m-%d %H:%M:%S");
    let kind = event.kind.name();
    let about = event.volume.as_ref().map(|volume| format!("{volume}: ")).unwrap_or_default();
    Ok(output::line(&format!("{time}  {kind:<11}  {about}{}", event.text))?)
}

/// Something about the telling itself.
fn note(context: &Context, what: &str, text: &str) -> Result<()> {
    if context.json {
        return Ok(output::json_line(what, &text)?);
    }
    Ok(output::line(&format!("-- {text}"))?)
}

fn ended(context: &Context) -> Result<()> {
    note(context, "ended", "the daemon has stopped")
}

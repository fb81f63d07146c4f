//! `plywood attach` and `plywood detach`.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use super::{Context, Name, output, volume};
use crate::daemon::protocol::{Attachment, Command, Failure, Kind, Reply};
use crate::daemon::{Client, attributes};

/// Makes volumes block devices.
#[derive(Debug, Args)]
pub struct AttachArguments {
    /// Volume or snapshot; a snapshot is always read-only
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<Name>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Everything that was attached when the daemon stopped
    #[arg(long, conflicts_with = "read_only")]
    all: bool,
}

/// Takes the devices away.
#[derive(Debug, Args)]
pub struct DetachArguments {
    /// Volume or snapshot
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<Name>,
    /// Everything that is not in use
    #[arg(long)]
    all: bool,
}

/// Attaches and prints the device.
///
/// # Errors
/// What the daemon answers.
pub fn attach(context: &Context, arguments: AttachArguments) -> Result<()> {
    let devices = match arguments.name {
        Some(name) => {
            let name = name.text()?;
            let client = context.daemon_client_for(&name)?;
            let attachment = client.attach(&name, arguments.read_only)?;
            // Whoever asks for the device itself keeps it, though it was attached for a mount before.
            if client.attributes(&name)?.contains_key(attributes::ATTACHED_BY) {
                client.set_attributes(&name, [(attributes::ATTACHED_BY.to_owned(), None)].into())?;
            }
            vec![attachment]
        }
        None => match context.daemon_client()?.call(Command::AttachAll)? {
            Reply::Attached(devices) => devices,
            reply => bail!("unexpected answer {reply:?}"),
        },
    };
    print(context, &devices, arguments.all)
}

fn print(context: &Context, devices: &[Attachment], with_names: bool) -> Result<()> {
    if context.json {
        return Ok(output::json("attached", &devices)?);
    }
    for attachment in devices {
        let device = attachment.device.display();
        let line = if with_names { format!("{device} {}", attachment.name) } else { device.to_string() };
        output::line(&line)?;
    }
    Ok(())
}

/// How long udev and its kind may look at a device after it was closed.
const LOOKING: Duration = Duration::from_secs(5);

/// Takes a volume's device away as soon as nobody looks at it any more; one that has none is all right.
///
/// # Errors
/// What the daemon answers; [`Kind::Busy`] when it is in use for longer than that.
pub(super) fn detach_when_idle(client: &Client, name: &str) -> Result<(), Failure> {
    when_idle(|| client.detach(name))
}

/// Deletes a volume, and takes its device away first as [`detach_when_idle`] does.
///
/// # Errors
/// As [`detach_when_idle`].
pub(super) fn delete_when_idle(client: &Client, name: &str) -> Result<(), Failure> {
    when_idle(|| client.detach_and_delete(name))
}

fn when_idle(act: impl Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        match act() {
            Err(failure) if failure.kind == Kind::Busy && began.elapsed() < LOOKING => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(failure) if failure.kind == Kind::NotFound => return Ok(()),
            outcome => return outcome,
        }
    }
}

/// Detaches.
///
/// # Errors
/// What the daemon answers; with `--all` also when something could not be detached.
pub fn detach(context: &Context, arguments: DetachArguments) -> Result<()> {
    let client = context.client()?;
    let Some(name) = arguments.name else {
        let Reply::Detached(outcome) = client.call(Command::DetachAll)? else { bail!("unexpected answer") };
        if context.json {
            output::json("detached", &outcome)?;
        } else {
            for name in &outcome.detached {
                output::line(&format!("detached {name}"))?;
            }
        }
        if let Some(kept) = outcome.kept.first() {
            let more = outcome.kept.len() - 1;
            let others = if more == 0 { String::new() } else { format!(", and {more} more") };
            bail!("{} stays attached as {}: {}{others}", kept.name, kept.device.display(), kept.reason);
        }
        return Ok(());
    };
    let name = name.text()?;
    client.detach(&name)?;
    volume::done(context, "detached", &name)
}

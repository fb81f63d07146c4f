//! `plywood send`: a snapshot, or what changed since another one, as a stream.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;

use super::content::Content;
use super::file::NewFile;
use super::stream::{Header, Identity, VERSION, Writer, retain_portable};
use crate::cli::image::{Interrupt, heed_signals, interrupted, progress_over};
use crate::cli::output::{self, Waiting};
use crate::cli::{Context, Name, size};
use crate::daemon::protocol::{Command, Range, Volume};
use crate::daemon::{Client, making};
use crate::units::BLOCK_BYTES;

/// Sends a snapshot.
#[derive(Debug, Args)]
#[command(after_help = "\
plywood --pool a send root.monday | ssh backup plywood --pool b receive
plywood --pool a send root.tuesday --from root.monday --output tuesday.stream

The receiving pool must have the content of the snapshot of --from, under whatever name. Both snapshots are sealed if they are \
not: the digest of the content is what the receiver holds against what arrived.")]
pub struct SendArguments {
    /// The snapshot
    snapshot: Name,
    /// Send only what changed since this snapshot of the same family
    #[arg(long, value_name = "SNAPSHOT")]
    from: Option<Name>,
    /// Write to this new file instead of standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Begin where plywood receive --resumable was interrupted, as it says
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    resume: u64,
}

/// Does it.
///
/// # Errors
/// What is no snapshot, what the pool answers, and what keeps the stream from being written.
pub fn send(context: &Context, arguments: &SendArguments) -> Result<()> {
    let (name, from) = (arguments.snapshot.text()?, arguments.from.as_ref().map(Name::text).transpose()?);
    if arguments.output.is_none() && std::io::stdout().is_terminal() {
        bail!("a stream is not for terminals; send it into a pipe, or give --output FILE");
    }
    let client = context.daemon_client_for(&name)?;
    let interrupt = heed_signals()?;
    let snapshot = sealed(&client, &name)?;
    let base = from.map(|from| sealed(&client, &from)).transpose()?;
    if let Some(base) = &base {
        ensure!(base.uuid != snapshot.uuid, "--from {}: is the snapshot itself", base.name);
    }
    ensure!(
        arguments.resume.is_multiple_of(BLOCK_BYTES) && arguments.resume <= snapshot.size_bytes,
        "--resume {}: give the number that plywood receive told",
        arguments.resume
    );
    let mut attributes = client.attributes(&name)?;
    retain_portable(&mut attributes);
    let header = Header {
        version: VERSION,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        snapshot: identity(&snapshot)?,
        base: base.as_ref().map(identity).transpose()?,
        sector_size: snapshot.sector_size,
        attributes,
        start_bytes: arguments.resume,
    };
    // Prune leaves the private clone alone that is read through.
    let _making = making::begin(client.pool_uuid()?)?;
    let Some(path) = &arguments.output else {
        let sent = write(&client, &header, BufWriter::new(std::io::stdout().lock()), &interrupt);
        // Of output that is looked at, a reader that goes has seen enough; a stream is cut short then.
        return sent.map(drop).map_err(|error| match error.downcast_ref::<io::Error>() {
            Some(broken) if broken.kind() == io::ErrorKind::BrokenPipe => {
                anyhow!("whoever read the stream has gone before its end")
            }
            _ => error,
        });
    };
    let file = NewFile::begin(path)?;
    let written = write(&client, &header, BufWriter::new(file.file()), &interrupt)?;
    file.finish()?;
    if context.json {
        let value = serde_json::json!({ "snapshot": header.snapshot, "base": header.base, "data_bytes": written });
        return Ok(output::json("sent", &value)?);
    }
    Ok(output::line(&format!("{name}: {} of content, digest {:.12}", size::echo(written), header.snapshot.digest))?)
}

/// The snapshot of that name, sealed if it was not.
fn sealed(client: &Client, name: &str) -> Result<Volume> {
    let volume = client.volume(name)?;
    if !volume.snapshot {
        bail!("{name} is a volume, which may change; take a snapshot of it: plywood snapshot create {name} NAME");
    }
    if volume.sealed && volume.digest.is_some() {
        return Ok(volume);
    }
    let _waiting = Waiting::begin(format!("sealing {name}"));
    Ok(client.for_volume(Command::SnapshotSeal { name: name.to_owned() })?)
}

fn identity(volume: &Volume) -> Result<Identity> {
    let digest = volume.digest.clone().with_context(|| format!("{} has no digest", volume.name))?;
    Ok(Identity { uuid: volume.uuid, name: volume.name.clone(), size_bytes: volume.size_bytes, digest })
}

/// Writes the stream, and answers the bytes of content in it.
fn write<W: Write>(client: &Client, header: &Header, to: W, interrupt: &Interrupt) -> Result<u64> {
    let (name, size_bytes) = (&header.snapshot.name, header.snapshot.size_bytes);
    let mut content = Content::open(client, name, header.snapshot.uuid, "send")?;
    let mut writer = Writer::begin(to, header)?;
    let bar = progress_over("sending", size_bytes);
    let mut written = 0;
    let base = header.base.as_ref().map(|base| base.name.as_str());
    let of = content.name().to_owned();
    client.each_changed_range(base, &of, |Range(start, length, has_data)| {
        // The last block may be there in part; behind a smaller size there is nothing, and before its start nothing is wanted.
        let offset = start.max(header.start_bytes);
        let length = (start + length).min(size_bytes).saturating_sub(offset);
        if !has_data && length > 0 {
            writer.zero(offset, length)?;
        }
        if has_data && length > 0 {
            content.read(offset, length, |offset, length, bytes| {
                if interrupt.load(Ordering::Relaxed) {
                    return Err(interrupted().into());
                }
                bar.set_position(offset);
                match bytes {
                    Some(bytes) => {
                        written += length;
                        writer.data(offset, bytes)
                    }
                    None => writer.zero(offset, length),
                }
            })?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    bar.finish_and_clear();
    writer.end()?;
    Ok(written)
}

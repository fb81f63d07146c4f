//! `plywood receive`: makes a snapshot of a stream.
//!
//! What arrives is applied to a working volume, a clone of the base where there is one. It becomes a snapshot when the stream
//! has been read to its end, and gets its name when its digest is the sender's: before that, nothing that was there has
//! changed, and nothing is there under that name. A working volume goes away with this process, or with the next daemon;
//! with `--resumable` it stays when the stream breaks off, and says on itself how far it got.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::stream::{Frame, Header, Identity, Reader, retain_portable};
use crate::cli::attach::detach_when_idle;
use crate::cli::image::{Interrupt, heed_signals, interrupted, progress_over};
use crate::cli::output::{self, Waiting};
use crate::cli::working::{ephemeral, make_lasting, private_name, refuse_taken, take_away};
use crate::cli::{Context, Name, size};
use crate::daemon::attributes::RECEIVING;
use crate::daemon::protocol::{Attributes, Bytes, Command, Kind, Volume};
use crate::daemon::{Client, making};
use crate::format::check_name;

/// Received bytes after which they are written out, and noted when they may be wanted later.
const STEP_BYTES: u64 = 256 << 20;

/// Receives a snapshot.
#[derive(Debug, Args)]
#[command(after_help = "\
A stream that is damaged or breaks off changes nothing. With --resumable what has arrived stays, in a volume of its own; plywood \
receive --list shows it, and how to send the rest. Delete that volume to give it up.")]
pub struct ReceiveArguments {
    /// Name of the snapshot; what it was called where it comes from, unless told
    name: Option<Name>,
    /// Read from this file instead of standard input
    #[arg(long, short, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Keep what has arrived when the stream breaks off, to go on from there
    #[arg(long)]
    resumable: bool,
    /// Show what arrived in part
    #[arg(long, conflicts_with_all = ["name", "input", "resumable"])]
    list: bool,
}

/// What a volume says of itself that holds part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Partial {
    snapshot: Identity,
    base: Option<Identity>,
    /// All before is there, durably.
    done_bytes: u64,
}

impl Partial {
    fn encode(&self) -> Result<Bytes> {
        Ok(serde_json::to_vec(self)?.into())
    }

    fn how_to_go_on(&self) -> String {
        let from = self.base.as_ref().map(|base| format!(" --from {}", base.name)).unwrap_or_default();
        format!("plywood send {}{from} --resume {}", self.snapshot.name, self.done_bytes)
    }
}

/// Does it.
///
/// # Errors
/// A stream that is damaged or ends early, a base that is not there, a name that is taken, content that is not what was
/// sent, and what the pool answers.
pub fn receive(context: &Context, arguments: &ReceiveArguments) -> Result<()> {
    if arguments.list {
        return list(context);
    }
    let input = match &arguments.input {
        Some(path) => File::open(path).with_context(|| path.display().to_string())?,
        None if std::io::stdin().is_terminal() => {
            bail!("a stream does not come from a terminal; receive from a pipe, or give --input FILE")
        }
        None => File::from(std::io::stdin().as_fd().try_clone_to_owned()?),
    };
    let interrupt = heed_signals()?;
    let input = Patient { input, interrupt: Interrupt::clone(&interrupt) };
    let (mut reader, mut header) = Reader::begin(BufReader::with_capacity(1 << 20, input))?;
    retain_portable(&mut header.attributes);
    let name = arguments.name.as_ref().map_or_else(|| Ok(header.snapshot.name.clone()), Name::text)?;
    check_name(&name)?;
    let client = context.daemon_client()?;
    let pool = client.pool_uuid()?;
    let _making = making::begin(pool)?;
    let Some(_only) = making::only(pool, &format!("receive-{}", header.snapshot.uuid))? else {
        bail!("another process receives {} already", header.snapshot.name);
    };
    refuse_taken(&client, &name)?;
    let mut work = Work::begin(&client, &header, arguments.resumable)?;
    let bar = progress_over("receiving", header.snapshot.size_bytes);
    let outcome = apply(&mut work, &mut reader, &interrupt, &bar).and_then(|()| work.finish(&header, &name));
    let received = match outcome {
        Ok(received) => received,
        Err(error) => return Err(work.explain(error)),
    };
    if context.json {
        let value = serde_json::json!({
            "name": received.name, "uuid": received.uuid, "digest": received.digest, "base": header.base,
            "size_bytes": received.size_bytes, "data_bytes": work.data_bytes,
        });
        return Ok(output::json("received", &value)?);
    }
    let digest = received.digest.unwrap_or_default();
    Ok(output::line(&format!("{name}: {} of content, digest {digest:.12}", size::echo(work.data_bytes)))?)
}

/// A pipe that may have nothing for long: a signal ends the wait, too.
struct Patient {
    input: File,
    interrupt: Interrupt,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let slice = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
        loop {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(interrupted());
            }
            match poll(&mut [PollFd::new(&self.input, PollFlags::IN)], Some(&slice)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return self.input.read(buffer),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The snapshot here that has the content of the stream's base.
fn find_base(client: &Client, base: &Identity) -> Result<Volume> {
    let has_content = |volume: &Volume| {
        volume.snapshot && volume.size_bytes == base.size_bytes && volume.digest.as_deref() == Some(&base.digest)
    };
    let volumes = client.volumes()?;
    if let Some(volume) = volumes.iter().find(|volume| has_content(volume)) {
        return Ok(volume.clone());
    }
    // One that was never sealed may be it.
    let of_name = volumes.into_iter().find(|volume| volume.name == base.name && volume.snapshot && !volume.sealed);
    if let Some(volume) = of_name {
        let _waiting = Waiting::begin(format!("sealing {}", volume.name));
        let volume = client.for_volume(Command::SnapshotSeal { name: volume.name })?;
        if has_content(&volume) {
            return Ok(volume);
        }
    }
    let Identity { name, digest, .. } = base;
    bail!(
        "the stream has only what changed since {name} (digest {digest:.12}), which this pool does not have; send that first, \
         or all of it, without --from"
    )
}

/// The volume that the stream is applied to.
struct Work<'a> {
    client: &'a Client,
    volume: String,
    /// Closed before it is detached.
    device: Option<File>,
    /// Kept when the stream breaks off.
    partial: Option<Partial>,
    /// It is to be taken away at the end.
    drops: bool,
    data_bytes: u64,
    since_step: u64,
}

impl<'a> Work<'a> {
    fn begin(client: &'a Client, header: &Header, resumable: bool) -> Result<Self> {
        let Header { snapshot, base, start_bytes, .. } = header;
        let fresh = Partial { snapshot: snapshot.clone(), base: base.clone(), done_bytes: 0 };
        let found = if resumable || *start_bytes > 0 { find_partial(client, snapshot)? } else { None };
        let (volume, partial) = match found {
            Some((volume, partial)) => {
                ensure!(
                    partial.snapshot == fresh.snapshot && partial.base == fresh.base,
                    "{volume} has part of {} in another form; delete it to begin anew",
                    snapshot.name
                );
                ensure!(
                    *start_bytes <= partial.done_bytes,
                    "the stream begins at byte {start_bytes}, and what is here ends at {}: {}",
                    partial.done_bytes,
                    partial.how_to_go_on()
                );
                (volume, Some(partial))
            }
            None if *start_bytes > 0 => bail!(
                "the stream goes on from byte {start_bytes}, and nothing of {} has arrived here; send it from its beginning",
                snapshot.name
            ),
            None => {
                let volume = private_name(&snapshot.name, "receive");
                let mark = match resumable {
                    true => [(RECEIVING.to_owned(), fresh.encode()?)].into(),
                    false => ephemeral("receive"),
                };
                make(client, &volume, header, mark)?;
                (volume, resumable.then_some(fresh))
            }
        };
        let opened = client.attach(&volume, false).map_err(anyhow::Error::from).and_then(|attached| {
            let device = OpenOptions::new().read(true).write(true).open(&attached.device);
            device.with_context(|| attached.device.display().to_string())
        });
        match opened {
            Ok(device) => {
                let (device, drops) = (Some(device), partial.is_none());
                Ok(Self { client, volume, device, drops, partial, data_bytes: 0, since_step: 0 })
            }
            Err(error) => {
                if partial.is_none() {
                    take_away(client, &volume);
                }
                Err(error)
            }
        }
    }

    fn device(&self) -> Result<&File> {
        self.device.as_ref().context("the working volume is closed")
    }

    fn data(&mut self, offset: u64, content: &[u8]) -> Result<()> {
        self.device()?.write_all_at(content, offset).context("writing what was received")?;
        self.data_bytes += content.len() as u64;
        self.reached(offset, content.len() as u64)
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.device()?, how, offset, length).context("unmapping what was received as zeros")?;
        self.reached(offset, 0)?;
        Ok(())
    }

    fn reached(&mut self, offset: u64, length: u64) -> Result<()> {
        self.since_step += length;
        if self.since_step < STEP_BYTES {
            return Ok(());
        }
        self.note(offset + length)
    }

    /// Writes out what has arrived, and notes it where it may be wanted.
    fn note(&mut self, done_bytes: u64) -> Result<()> {
        self.since_step = 0;
        self.device()?.sync_all().context("writing what was received")?;
        if let Some(partial) = &mut self.partial
            && partial.done_bytes < done_bytes
        {
            // A block may have arrived in part.
            partial.done_bytes = done_bytes - done_bytes % crate::units::BLOCK_BYTES;
            let changes = [(RECEIVING.to_owned(), Some(partial.encode()?))].into();
            self.client.set_attributes(&self.volume, changes)?;
        }
        Ok(())
    }

    /// Makes the snapshot, and gives it its name when it is what was sent.
    fn finish(&mut self, header: &Header, name: &str) -> Result<Volume> {
        self.device()?.sync_all().context("writing what was received")?;
        self.device = None;
        detach_when_idle(self.client, &self.volume)?;
        let draft = private_name(name, "received");
        let mut attributes: Attributes = header.attributes.clone();
        attributes.extend(ephemeral("receive"));
        self.client.create_snapshot(&self.volume, &draft, attributes)?;
        let named = self.name_it(&draft, name, header);
        if named.is_err() {
            take_away(self.client, &draft);
        } else {
            self.drops = true;
        }
        named
    }

    fn name_it(&mut self, draft: &str, name: &str, header: &Header) -> Result<Volume> {
        let sealed = {
            let _waiting = Waiting::begin("holding the digests against each other");
            self.client.for_volume(Command::SnapshotSeal { name: draft.to_owned() })?
        };
        if sealed.digest.as_deref() != Some(&header.snapshot.digest) {
            // What is here is wrong; nobody shall go on from it.
            self.drops = true;
            bail!(
                "what arrived is not what was sent: its digest is {:.12}, that of {} is {:.12}; nothing was changed",
                sealed.digest.unwrap_or_default(),
                header.snapshot.name,
                header.snapshot.digest
            );
        }
        make_lasting(self.client, draft, name)
    }

    /// Adds to an error what is left.
    fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let Some(partial) = self.partial.as_ref().filter(|partial| !self.drops && partial.done_bytes > 0) else {
            // Not worth going on from.
            self.drops = true;
            return error;
        };
        anyhow!(
            "{error:#}; what has arrived is kept in {}: go on with {} | plywood receive --resumable",
            self.volume,
            partial.how_to_go_on()
        )
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.device = None;
        if self.drops {
            take_away(self.client, &self.volume);
        } else if let Err(failure) = detach_when_idle(self.client, &self.volume) {
            tracing::warn!("{} stays attached: {failure}", self.volume);
        }
    }
}

/// Makes the working volume: a clone of the base, or an empty one.
fn make(client: &Client, volume: &str, header: &Header, attributes: Attributes) -> Result<()> {
    let Header { snapshot, base, sector_size, .. } = header;
    let Some(base) = base else {
        client.create_volume(volume, snapshot.size_bytes, *sector_size, attributes)?;
        return Ok(());
    };
    let origin = find_base(client, base)?;
    ensure!(
        origin.sector_size == *sector_size,
        "{} has sectors of {} bytes, the stream is of one with {sector_size}",
        origin.name,
        origin.sector_size
    );
    client.for_volume(Command::CloneCreate {
        snapshot: origin.name,
        uuid: uuid::Uuid::new_v4(),
        name: volume.to_owned(),
        size_bytes: (snapshot.size_bytes > base.size_bytes).then_some(snapshot.size_bytes),
        attributes,
    })?;
    if snapshot.size_bytes < base.size_bytes {
        let (name, size_bytes) = (volume.to_owned(), snapshot.size_bytes);
        let shrunk = client.call(Command::VolumeResize { name, size_bytes, force: true });
        shrunk.inspect_err(|_| take_away(client, volume))?;
    }
    Ok(())
}

/// All that arrived in part, by volume.
fn partials(client: &Client) -> Result<Vec<(Volume, Partial)>> {
    let mut found = Vec::new();
    for volume in client.volumes()?.into_iter().filter(|volume| !volume.snapshot) {
        let attributes = match client.attributes(&volume.name) {
            Err(failure) if failure.kind == Kind::NotFound => continue,
            attributes => attributes?,
        };
        let partial = attributes.get(RECEIVING).and_then(|bytes| serde_json::from_slice(&bytes.0).ok());
        found.extend(partial.map(|partial| (volume, partial)));
    }
    Ok(found)
}

fn find_partial(client: &Client, snapshot: &Identity) -> Result<Option<(String, Partial)>> {
    let of_same = |(_, partial): &(Volume, Partial)| partial.snapshot.uuid == snapshot.uuid;
    Ok(partials(client)?.into_iter().find(of_same).map(|(volume, partial)| (volume.name, partial)))
}

fn apply<R: Read>(work: &mut Work<'_>, reader: &mut Reader<R>, interrupt: &Interrupt, bar: &ProgressBar) -> Result<()> {
    let mut at = 0;
    // Whether the device has taken what it was given: of what it lost it tells once.
    let mut is_sound = true;
    let applied = loop {
        if interrupt.load(Ordering::Relaxed) {
            break Err(interrupted().into());
        }
        let (end, step) = match reader.next_frame() {
            Ok(Frame::Done) => break Ok(()),
            Ok(Frame::Data(offset, content)) => (offset + content.len() as u64, work.data(offset, content)),
            Ok(Frame::Zero(offset, length)) => (offset + length, work.zero(offset, length)),
            Err(error) => break Err(error),
        };
        if let Err(error) = step {
            is_sound = false;
            break Err(error);
        }
        at = end;
        bar.set_position(at);
    };
    bar.finish_and_clear();
    if applied.is_err() && is_sound && work.partial.is_some() {
        // Each frame was whole when it was applied.
        if let Err(error) = work.note(at) {
            tracing::warn!("how far it got is not known: {error:#}");
        }
    }
    applied
}

fn list(context: &Context) -> Result<()> {
    let found = partials(&context.client()?)?;
    if context.json {
        let told: Vec<_> = found
            .iter()
            .map(|(volume, partial)| serde_json::json!({ "volume": volume.name, "of": partial.snapshot, "base": partial.base, "done_bytes": partial.done_bytes }))
            .collect();
        return Ok(output::json("receiving", &told)?);
    }
    if found.is_empty() {
        return Ok(output::line("nothing has arrived in part")?);
    }
    let rows = found.iter().map(|(volume, partial)| {
        let done = format!("{} of {}", size::show(partial.done_bytes), size::show(partial.snapshot.size_bytes));
        vec![partial.snapshot.name.clone(), done, volume.name.clone(), partial.how_to_go_on()]
    });
    Ok(output::table(&["SNAPSHOT", "ARRIVED", "IN VOLUME", "GO ON WITH"], &[], rows.collect())?)
}

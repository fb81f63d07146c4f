//! `plywood pool`: create, info, grow; the tools for metadata are in `tools`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;

use super::output::{self, Waiting, confirm};
use super::scrub::{self, ScrubArguments};
use super::tools::{self, RepairArguments};
use super::{Context, memory, size, volume};
use crate::daemon::protocol::{Attachment, Command, Pool, Reply, Threshold, Work};
use crate::daemon::{Client, NewPool, create_pool, wait_until_gone};
use crate::io::PoolClaim;

/// How long another command that works on the file is waited for.
const TURN: Duration = Duration::from_secs(10);

/// Pools.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Create a pool in a new sparse file, on a block device, or in memory
    Create {
        /// The file or block device
        #[arg(required_unless_present = "memory")]
        file: Option<PathBuf>,
        /// Size of the pool; of a block device the whole is taken
        #[arg(long, value_parser = size::parse)]
        size: Option<u64>,
        /// A pool of this size in memory, never on a disk or in swap, until it is deleted or the machine ends
        #[arg(long, value_parser = size::parse, value_name = "SIZE", conflicts_with_all = ["file", "size", "force"], requires = "name")]
        memory: Option<u64>,
        /// Name of the pool; that of the file without this option
        #[arg(long)]
        name: Option<String>,
        /// Use a file or device that holds something, or a file system that cannot do all that a pool needs
        #[arg(long)]
        force: bool,
    },
    /// Delete a pool with all that is in it: its file, or its memory
    Delete {
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Show sizes, space and state
    Info,
    /// Read all metadata, verify every checksum and compare every count with a walk
    Check,
    /// Read all metadata and every sealed block, hold them against their checksums, and mend what has a second copy
    Scrub(ScrubArguments),
    /// Verify sealed blocks on every read through any volume: damage gives an error, never data
    VerifyOnRead {
        /// No longer, but where a volume asks for it
        #[arg(long)]
        off: bool,
    },
    /// Write all metadata as text, one JSON object a line; the data is not in it, so this is no backup
    Dump {
        /// The file to write; standard output without this option
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Write a dump's metadata over that of the pool, or of a copy of its file; the data stays as it is
    Restore {
        /// What plywood pool dump has written
        dump: PathBuf,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Keep everything that can be read of a damaged pool, and make the rest consistent with it
    Repair(RepairArguments),
    /// Make the pool larger, now or by itself when it is full
    Grow {
        /// The new size
        #[arg(long, value_parser = size::parse, required_unless_present = "up_to")]
        size: Option<u64>,
        /// From now on a full pool grows by itself, up to this size; 0: it does not
        #[arg(long, value_parser = size::parse, value_name = "SIZE")]
        up_to: Option<u64>,
    },
    /// Give everything that is free back to the host now, the smallest runs too
    Trim,
}

/// Does a pool command.
///
/// # Errors
/// What the pool answers, what keeps it from being printed, and a check that found faults.
pub fn run(context: &Context, command: PoolCommand) -> Result<()> {
    match command {
        PoolCommand::Create { file, size, memory, name, force } => {
            let pool = match (file, memory) {
                (Some(path), _) => create_pool(&NewPool { path, size_bytes: size, name, force })?,
                (None, Some(size_bytes)) => memory::create(size_bytes, name)?,
                (None, None) => bail!("no file was given"),
            };
            if context.json {
                return Ok(output::json("pool", &pool)?);
            }
            let path = pool.path.display();
            Ok(output::line(&format!("pool {} in {path}: {}", pool.name, size::echo(pool.size_bytes)))?)
        }
        PoolCommand::Delete { yes } => delete(context, yes),
        PoolCommand::Info => {
            let Reply::Pool(pool) = context.client()?.call(Command::PoolInfo)? else { bail!("unexpected answer") };
            show(context, &pool)
        }
        PoolCommand::Check => tools::check(context),
        PoolCommand::Scrub(arguments) => scrub::run(context, &arguments),
        PoolCommand::VerifyOnRead { off } => {
            let command = Command::PoolVerify { on: !off };
            let Reply::Pool(pool) = context.client()?.call(command)? else { bail!("unexpected answer") };
            show(context, &pool)
        }
        PoolCommand::Dump { output } => tools::dump(context, output.as_deref()),
        PoolCommand::Restore { dump, yes } => tools::restore(context, &dump, yes),
        PoolCommand::Repair(arguments) => tools::repair(context, &arguments),
        PoolCommand::Grow { size, up_to } => grow(context, size, up_to),
        PoolCommand::Trim => {
            let client = context.client()?;
            let Reply::Pool(before) = client.call(Command::PoolInfo)? else { bail!("unexpected answer") };
            let waiting = Waiting::begin("giving back what is free");
            let reply = client.call(Command::PoolTrim);
            drop(waiting);
            let Reply::Pool(pool) = reply? else { bail!("unexpected answer") };
            if context.json {
                return Ok(output::json("pool", &pool)?);
            }
            let less = size::show(before.host_bytes.saturating_sub(pool.host_bytes));
            Ok(output::line(&format!("pool {}: {less} given back, {} left", pool.name, size::show(pool.host_bytes)))?)
        }
    }
}

fn delete(context: &Context, yes: bool) -> Result<()> {
    let found = context.find_pool()?;
    let (path, name) = (&found.path, &found.name);
    let is_file = std::fs::metadata(path).with_context(|| path.display().to_string())?.is_file();
    ensure!(is_file, "{} is a block device; wipe it with wipefs --all", path.display());
    let client = Client::open(&found)?;
    let count = client.volumes()?.len();
    if let Reply::Attached(attached) = client.call(Command::AttachList)?
        && let Some(Attachment { name: volume, device, .. }) = attached.first()
    {
        bail!("{volume} is attached as {}; detach what is attached first (plywood detach --all)", device.display());
    }
    confirm(&format!("delete pool {name} in {} and the {count} volumes and snapshots in it?", path.display()), yes)?;
    let hello = client.hello()?;
    if client.is_daemon() {
        client.call(Command::Stop { force: false })?;
        wait_until_gone(hello.front_pid)?;
    }
    drop(client);
    // From here on nobody begins to use it.
    let claim = PoolClaim::acquire(path, TURN)?;
    std::fs::remove_file(path).with_context(|| path.display().to_string())?;
    drop(claim);
    if let Some(directory) = path.parent().filter(|_| memory::holds(path)) {
        memory::take_away(directory)?;
    }
    volume::done(context, "deleted pool", name)
}

fn grow(context: &Context, size: Option<u64>, up_to: Option<u64>) -> Result<()> {
    let client = context.client()?;
    let size = size.map(|size_bytes| Command::PoolGrow { size_bytes });
    let up_to = up_to.map(|limit_bytes| Command::PoolLimit { limit_bytes });
    let mut grown = None;
    for command in [size, up_to].into_iter().flatten() {
        let Reply::Pool(pool) = client.call(command)? else { bail!("unexpected answer") };
        grown = Some(pool);
    }
    let Some(pool) = grown else { bail!("no size was given") };
    if context.json {
        return Ok(output::json("pool", &pool)?);
    }
    let limit = match pool.size_limit_bytes {
        0 => String::new(),
        limit => format!(", grows by itself up to {}", size::echo(limit)),
    };
    Ok(output::line(&format!("pool {}: {}{limit}", pool.name, size::echo(pool.size_bytes)))?)
}

fn show(context: &Context, pool: &Pool) -> Result<()> {
    if context.json {
        return Ok(output::json("pool", pool)?);
    }
    let percent = |part: u64| match pool.size_bytes {
        0 => String::new(),
        whole => format!(" ({:.1} %)", part as f64 * 100.0 / whole as f64),
    };
    let or_uncounted = |bytes: Option<u64>| bytes.map_or_else(|| "not counted; pool check does".into(), size::echo);
    let of_groups = pool.layout_bytes.saturating_sub(pool.head_bytes);
    let or_none = |value: Option<u64>| value.map_or_else(|| "none".into(), |value| value.to_string());
    let mut facts = vec![
        ("name", pool.name.clone()),
        ("uuid", pool.uuid.to_string()),
        ("file", pool.path.display().to_string()),
        ("size", size::echo(pool.size_bytes)),
        (
            "grows",
            if pool.size_limit_bytes == 0 {
                "not by itself".into()
            } else {
                format!("by itself up to {}", size::echo(pool.size_limit_bytes))
            },
        ),
        ("used", format!("{}{}", size::echo(pool.used_bytes), percent(pool.used_bytes))),
        ("live data", or_uncounted(pool.live_bytes)),
        ("  own", format!("{} of volumes", size::echo(pool.own_bytes))),
        ("  kept", format!("{} by snapshots, or from volumes that are gone", or_uncounted(pool.kept_bytes))),
        ("metadata", or_uncounted(pool.metadata_bytes)),
        ("layout", format!("{}, and {} before it", size::echo(of_groups), size::show(pool.head_bytes))),
        (
            "free",
            format!("{}, {} of it kept back for metadata", size::echo(pool.free_bytes), size::show(pool.reserve_bytes)),
        ),
        ("free on the host", pool.host_free_bytes.map_or_else(|| "the pool is a device".into(), size::echo)),
        ("thresholds", thresholds(pool)),
        ("journal", format!("{}, {} in use", size::echo(pool.journal_bytes), size::show(pool.journal_used_bytes))),
        ("on the host", size::echo(pool.host_bytes)),
        ("volumes", format!("{}, and {} snapshots", pool.volumes, pool.snapshots)),
        ("virtual sizes", format!("{} in all", size::echo(pool.virtual_bytes))),
        ("overcommitment", overcommitment(pool)),
        (
            "reserved",
            match pool.reserved_bytes {
                0 => "nothing".into(),
                bytes => format!(
                    "{} for volumes; {} of what is free is theirs alone, with room for their maps",
                    size::echo(bytes),
                    size::show(pool.owed_bytes)
                ),
            },
        ),
        ("being freed", being_freed(pool)),
        ("sealed", format!("{} of {} snapshots", pool.sealed, pool.snapshots)),
        ("verify on read", if pool.verify_on_read { "yes" } else { "where a volume asks for it" }.into()),
        ("scrub", scrub::words(pool.scrub.as_ref())),
        ("generation", format!("{}, clock {}", pool.generation, pool.clock)),
        ("recovered", recovered(pool)),
        ("state", pool.poisoned.as_ref().map_or_else(|| "sound".into(), |reason| format!("poisoned: {reason}"))),
    ];
    if pool.front_pid.is_some() {
        facts.push(("front", format!("process {}", or_none(pool.front_pid.map(u64::from)))));
        let restarts = pool.engine_restarts.unwrap_or(0);
        facts.push(("engine", format!("process {}, {restarts} restarts", or_none(pool.engine_pid.map(u64::from)))));
        facts.push(("transport", pool.transport.clone().unwrap_or_else(|| "none yet".into())));
        facts.push(("attached", list(pool.attached.iter().map(attachment))));
    }
    facts.push(("background", list(pool.background.iter().map(work))));
    Ok(output::facts(&facts)?)
}

fn being_freed(pool: &Pool) -> String {
    match (pool.carcasses, pool.freeing) {
        (0, false) => "nothing".into(),
        (0, true) => "what was deleted, with the next checkpoint".into(),
        (trees, _) => format!("{trees} deleted trees"),
    }
}

fn list(of: impl Iterator<Item = String>) -> String {
    let of: Vec<String> = of.collect();
    if of.is_empty() { "nothing".into() } else { of.join("; ") }
}

fn attachment(attachment: &Attachment) -> String {
    let how = if attachment.read_only { ", read-only" } else { "" };
    format!("{} ({}{how})", attachment.name, attachment.device.display())
}

fn work(work: &Work) -> String {
    match (work.done, work.of) {
        (Some(done), Some(of)) => format!("{}: {done} of {of}", work.what),
        (None, Some(of)) => format!("{}: {of}", work.what),
        _ => work.what.clone(),
    }
}

fn thresholds(pool: &Pool) -> String {
    let filled = pool.filled_percent;
    let reached = |threshold: &Threshold| {
        format!("{} % {}", threshold.percent, if threshold.reached { "reached" } else { "not reached" })
    };
    format!("{filled} % of what pool and host can give is used; {}", list(pool.thresholds.iter().map(reached)))
}

/// Sum of the virtual sizes : pool : what the host has given and can give.
fn overcommitment(pool: &Pool) -> String {
    let host = pool.host_free_bytes.map_or(pool.size_bytes, |free| free.saturating_add(pool.host_bytes));
    let times = match pool.size_bytes {
        0 => String::new(),
        size => format!(" ({:.2} times the pool)", pool.virtual_bytes as f64 / size as f64),
    };
    let [volumes, size, host] = [pool.virtual_bytes, pool.size_bytes, host].map(size::show);
    format!("volumes {volumes} : pool {size} : host {host}{times}")
}

fn recovered(pool: &Pool) -> String {
    let Some(recovered) = &pool.recovered else { return "nothing had to be, when the pool was opened".into() };
    let when = volume::created(recovered.at_ns, "%Y-%m-%d %H:%M:%S");
    let (changes, memory) = (recovered.changes, recovered.changes_from_memory);
    format!("{when}, {changes} changes made again, {memory} of them from a predecessor's memory")
}

//! `mount.plywood` and `umount.plywood`: plywood under the names by which mount(8) calls its helpers, so that a line of
//! /etc/fstab mounts a volume.
//!
//! The helper attaches; the mounting itself is mount(8)'s, which knows all options. It is told the helper's name as well
//! and notes it (`helper=` in /run/mount/utab), so that plain umount(8) calls `umount.plywood` and what was attached for
//! the mount is detached again. Where that note is lost the volume stays attached, and nothing else is wrong.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use super::mount::{Mounted, attachment_of, kind_and_options, mount_volume_by, release};
use super::{Context, one_line};
use crate::daemon::mounts::{Mount, own_mounts};
use crate::daemon::{Client, running_daemons};

/// What mount(8) takes for a failed mount.
const FAILED: u8 = 32;

/// Mounts a volume; called by mount(8)
#[derive(Debug, Parser)]
#[command(name = "mount.plywood", version)]
struct MountArguments {
    /// POOL/VOLUME: name or file of a pool, and a volume or snapshot in it
    source: String,
    /// An existing directory
    directory: PathBuf,
    /// Options of the file system, as of mount(8)
    #[arg(short, value_delimiter = ',')]
    options: Vec<String>,
    /// Only look whether the volume is there
    #[arg(short)]
    fake: bool,
    /// Taken, and of no meaning here: option that nobody knows
    #[arg(short, hide = true)]
    sloppy: bool,
    /// Do not note the mount
    #[arg(short = 'n')]
    no_note: bool,
    /// Taken, and of no meaning here: more words
    #[arg(short, hide = true)]
    verbose: bool,
    /// Type, when the source has one of its own
    #[arg(short = 't', hide = true)]
    kind: Option<String>,
}

/// Unmounts a volume; called by umount(8)
#[derive(Debug, Parser)]
#[command(name = "umount.plywood", version)]
struct UnmountArguments {
    /// Where it is mounted, or its device
    target: PathBuf,
    /// Force
    #[arg(short)]
    force: bool,
    /// Lazily
    #[arg(short)]
    lazy: bool,
    /// Do not note it
    #[arg(short = 'n')]
    no_note: bool,
    /// Read-only when it cannot be unmounted
    #[arg(short)]
    read_only: bool,
    /// Taken, and of no meaning here: more words
    #[arg(short, hide = true)]
    verbose: bool,
    /// Type
    #[arg(short = 't', hide = true)]
    kind: Option<String>,
}

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Helper {
    Mount,
    Unmount,
}

/// Which helper this process was started as.
pub fn called_as() -> Option<Helper> {
    let program = PathBuf::from(std::env::args_os().next()?);
    match program.file_name()?.to_str()? {
        "mount.plywood" => Some(Helper::Mount),
        "umount.plywood" => Some(Helper::Unmount),
        _ => None,
    }
}

impl Helper {
    /// Does what it was started for.
    pub fn main(self) -> ExitCode {
        let (name, done) = match self {
            Self::Mount => ("mount.plywood", MountArguments::try_parse().map(|arguments| mount(&arguments))),
            Self::Unmount => ("umount.plywood", UnmountArguments::try_parse().map(|arguments| unmount(&arguments))),
        };
        match done {
            Ok(Ok(())) => ExitCode::SUCCESS,
            Ok(Err(error)) => {
                let _ = writeln!(io::stderr(), "{name}: {}", one_line(&error));
                ExitCode::from(FAILED)
            }
            Err(error) => {
                let _ = error.print();
                // 1 is what mount(8) takes for a wrong call.
                ExitCode::from(u8::from(error.use_stderr()))
            }
        }
    }
}

fn mount(arguments: &MountArguments) -> Result<()> {
    // Names of volumes have no slash, paths of pools do.
    let Some((pool, volume)) =
        arguments.source.rsplit_once('/').filter(|(pool, name)| !pool.is_empty() && !name.is_empty())
    else {
        bail!("{}: give POOL/VOLUME, the name or file of a pool and a volume in it", arguments.source);
    };
    let context = Context { pool: Some(pool.to_owned()), json: false, take_over: false };
    if arguments.fake {
        context.client()?.volume(volume)?;
        return Ok(());
    }
    let client = context.daemon_client_for(volume)?;
    let directory = std::fs::canonicalize(&arguments.directory)
        .with_context(|| format!("{}: make the directory to mount on first", arguments.directory.display()))?;
    if let Some(mount) = mounted_on(&directory)?
        && is_mount_of(&mount, &client, volume)?
    {
        let options = arguments.options.join(",");
        // `mount -a` looks for the source as fstab has it, which the kernel does not show.
        if !arguments.options.iter().any(|option| option == "remount") {
            return Ok(());
        }
        let words = ["-i".as_ref(), "-t".as_ref(), mount.file_system.as_ref(), "-o".as_ref(), options.as_ref()];
        let words = words.into_iter().chain([mount.source.as_os_str(), directory.as_os_str()]);
        return run("mount", words.map(OsString::from).collect());
    }
    let read_only = arguments.options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rw"));
    let read_only = read_only.is_some_and(|option| option == "ro");
    let by = |device: &Path, directory: &Path| {
        let (kind, own) = kind_and_options(device)?;
        let mut options = own.to_owned();
        for option in &arguments.options {
            options.push(',');
            options.push_str(option);
        }
        options.push_str(",helper=plywood");
        let mut words: Vec<OsString> = vec!["-i".into(), "-t".into(), kind.into(), "-o".into(), options.into()];
        words.extend(arguments.no_note.then(|| "-n".into()));
        words.extend([device.into(), directory.into()]);
        run("mount", words)
    };
    let _: Mounted = mount_volume_by(&client, volume, &directory, read_only, by)?;
    Ok(())
}

/// Whether what is mounted there is that volume of the client's pool, or the private clone through which the snapshot is.
fn is_mount_of(mount: &Mount, client: &Client, volume: &str) -> Result<bool> {
    let Some((owner, attachment)) = attachment_of(mount, running_daemons())? else { return Ok(false) };
    if owner.pool_uuid()? != client.pool_uuid()? {
        return Ok(false);
    }
    let wanted = client.volume(volume)?;
    let found = client.volume(&attachment.name)?;
    Ok(found.uuid == wanted.uuid || wanted.snapshot && found.origin_uuid == Some(wanted.uuid))
}

fn unmount(arguments: &UnmountArguments) -> Result<()> {
    let target = std::fs::canonicalize(&arguments.target).unwrap_or_else(|_| arguments.target.clone());
    // Asked before it is unmounted: afterwards nobody knows what it was. A daemon that does not answer keeps nobody from
    // unmounting.
    let attachment =
        mounted_on(&target).ok().flatten().and_then(|mount| attachment_of(&mount, running_daemons()).ok().flatten());
    let mut words: Vec<OsString> = vec!["-i".into()];
    let flags =
        [(arguments.force, "-f"), (arguments.lazy, "-l"), (arguments.no_note, "-n"), (arguments.read_only, "-r")];
    words.extend(flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag.into()));
    words.push(target.into());
    run("umount", words)?;
    if let Some((client, attachment)) = attachment
        && let Err(error) = release(&client, &attachment.name)
    {
        // It is unmounted, which is what was asked for.
        writeln!(io::stderr(), "umount.plywood: {} stays attached: {}", attachment.name, one_line(&error))?;
    }
    Ok(())
}

/// What is mounted on a directory, or the last mount of a device.
fn mounted_on(target: &Path) -> Result<Option<Mount>> {
    let mounts = own_mounts().context("/proc/self/mountinfo")?;
    Ok(mounts.into_iter().rev().find(|mount| mount.mount_point == target || mount.source == target))
}

/// Runs mount(8) or umount(8), which says itself what is wrong.
fn run(program: &str, words: Vec<OsString>) -> Result<()> {
    let status = Command::new(program).args(words).status().with_context(|| program.to_owned())?;
    if status.success() { Ok(()) } else { bail!("{program} ended with {status}") }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn calls_of_mount_and_umount_are_understood() {
        MountArguments::command().debug_assert();
        UnmountArguments::command().debug_assert();
        let call = ["mount.plywood", "main/a", "/mnt", "-sfnv", "-t", "plywood.ext4", "-o", "rw,nosuid,data=ordered"];
        let arguments = MountArguments::try_parse_from(call).unwrap();
        assert_eq!(arguments.options, ["rw", "nosuid", "data=ordered"]);
        assert!(arguments.fake && arguments.no_note);
        let arguments = UnmountArguments::try_parse_from(["umount.plywood", "/mnt", "-flnrv"]).unwrap();
        assert!(arguments.force && arguments.lazy && arguments.no_note && arguments.read_only);
    }
}

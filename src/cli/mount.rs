//! `plywood mount` and `plywood unmount`, in the mount namespace of whoever calls.
//!
//! Mounting attaches what is not attached; unmounting undoes what mounting did: it detaches a volume that `mount` had
//! attached, and deletes the private clone through which a snapshot was mounted. Both facts stand in the volume's
//! attributes, so that they outlive every process.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use rustix::mount::{MountFlags, UnmountFlags};

use super::attach::{delete_when_idle, detach_when_idle};
use super::working::{ephemeral, private_name};
use super::{Context, Name, output};
use crate::daemon::filesystem::{self, FileSystem};
use crate::daemon::mounts::{Mount, device_number, mount_of, own_mounts};
use crate::daemon::protocol::{Attachment, Attributes, Bytes, Command, Kind, Reply, Volume};
use crate::daemon::{Client, attributes, making, running_daemons};

/// Mounts a volume.
#[derive(Debug, Args)]
pub struct MountArguments {
    /// Volume or snapshot; a snapshot is mounted through a private clone that goes away when it is unmounted
    name: Name,
    /// An existing directory
    directory: PathBuf,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
}

/// Unmounts a volume.
#[derive(Debug, Args)]
pub struct UnmountArguments {
    /// Where it is mounted
    directory: PathBuf,
}

/// A volume that is mounted.
#[derive(Clone, Debug)]
pub struct Mounted {
    /// Name of the volume; of a snapshot, its private clone.
    pub volume: String,
    /// The block device.
    pub device: PathBuf,
    /// Where.
    pub directory: PathBuf,
}

/// `plywood mount`.
///
/// # Errors
/// Those of [`mount_volume`].
pub fn mount(context: &Context, arguments: &MountArguments) -> Result<()> {
    let name = arguments.name.text()?;
    require_directory(&arguments.directory)?;
    let client = context.daemon_client_for(&name)?;
    let mounted = mount_volume(&client, &name, &arguments.directory, arguments.read_only)?;
    if context.json {
        let value = serde_json::json!({
            "volume": mounted.volume, "device": mounted.device, "directory": mounted.directory,
        });
        return Ok(output::json("mounted", &value)?);
    }
    Ok(output::line(&format!("{name} on {} as {}", mounted.directory.display(), mounted.device.display()))?)
}

/// `plywood unmount`.
///
/// # Errors
/// When nothing of plywood's is mounted there, or it is in use.
pub fn unmount(context: &Context, arguments: &UnmountArguments) -> Result<()> {
    let directory =
        fs::canonicalize(&arguments.directory).with_context(|| arguments.directory.display().to_string())?;
    let mounts = own_mounts().context("/proc/self/mountinfo")?;
    // The last one is on top.
    let Some(mount) = mounts.iter().rev().find(|mount| mount.mount_point == directory) else {
        bail!("{}: nothing is mounted there", directory.display());
    };
    let clients = if context.pool.is_some() { vec![context.client()?] } else { running_daemons() };
    if let Some((client, Attachment { name, device, .. })) = attachment_of(mount, clients)? {
        let mounted = Mounted { volume: name, device, directory };
        unmount_volume(&client, &mounted)?;
        return if context.json {
            Ok(output::json("unmounted", &mounted.directory)?)
        } else {
            Ok(output::line(&format!("{} unmounted from {}", mounted.volume, mounted.directory.display()))?)
        };
    }
    bail!(
        "{}: {} is not a volume of a pool in use; unmount it with umount",
        directory.display(),
        mount.source.display()
    )
}

/// The volume that is mounted there, and the daemon that has it attached.
pub(super) fn attachment_of(mount: &Mount, clients: Vec<Client>) -> Result<Option<(Client, Attachment)>> {
    for client in clients {
        if let Some(attachment) = attached_at(mount, &client)? {
            return Ok(Some((client, attachment)));
        }
    }
    Ok(None)
}

/// The volume that is mounted there, where it is one of this daemon's.
fn attached_at(mount: &Mount, client: &Client) -> Result<Option<Attachment>> {
    let is_of = |attachment: &Attachment| {
        device_number(&attachment.device).is_ok_and(|number| mount.is_of(&attachment.device, number))
    };
    let Reply::Attached(devices) = client.call(Command::AttachList)? else { bail!("unexpected answer") };
    Ok(devices.into_iter().find(is_of))
}

/// Unmounts every volume that is mounted below a directory, as [`unmount_volume`] does.
///
/// # Errors
/// As [`unmount_volume`], at the first one.
pub(super) fn unmount_below(client: &Client, directory: &Path) -> Result<()> {
    let mounts = own_mounts().context("/proc/self/mountinfo")?;
    for mount in mounts.into_iter().rev().filter(|mount| mount.mount_point.starts_with(directory)) {
        if let Some(Attachment { name, device, .. }) = attached_at(&mount, client)? {
            unmount_volume(client, &Mounted { volume: name, device, directory: mount.mount_point })?;
        }
    }
    Ok(())
}

/// Attaches a volume if need be and mounts it on `directory`; a snapshot through a private clone. What was done is
/// undone when mounting fails.
///
/// # Errors
/// What the daemon answers, a volume without a file system, and what mount(2) says.
pub fn mount_volume(client: &Client, name: &str, directory: &Path, read_only: bool) -> Result<Mounted> {
    mount_volume_by(client, name, directory, read_only, |device, directory| mount_device(device, directory, read_only))
}

/// As [`mount_volume`], with `by` to mount the device on the directory.
///
/// # Errors
/// As [`mount_volume`], and those of `by`.
pub(super) fn mount_volume_by(
    client: &Client,
    name: &str,
    directory: &Path,
    read_only: bool,
    by: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<Mounted> {
    let volume = client.volume(name)?;
    // A clone is made for each mount of a snapshot; a volume may be about to be unmounted elsewhere, which detaches it.
    let _turn = if volume.snapshot { None } else { Some(making::turn(client.pool_uuid()?, name)?) };
    mount_in_turn(client, &volume, directory, read_only, by)
}

/// As [`mount_volume_by`], for who has the volume's turn, or mounts a snapshot.
///
/// # Errors
/// As [`mount_volume_by`].
pub(super) fn mount_in_turn(
    client: &Client,
    volume: &Volume,
    directory: &Path,
    read_only: bool,
    by: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<Mounted> {
    require_directory(directory)?;
    let directory = fs::canonicalize(directory).with_context(|| directory.display().to_string())?;
    // A private clone that is not attached yet looks like one that nobody needs any more.
    let _making = if volume.snapshot { Some(making::begin(client.pool_uuid()?)?) } else { None };
    let (name, is_marked) = if volume.snapshot {
        // Marked at once, as `attach_for_mount` would: it is one change that has to be durable, and not two.
        let mut marks = ephemeral("mount");
        marks.extend([(attributes::ATTACHED_BY.to_owned(), Bytes::from("mount"))]);
        (client.create_clone(&volume.name, &private_name(&volume.name, "mount"), marks)?.name, true)
    } else {
        (volume.name.clone(), false)
    };
    let attached = if is_marked {
        client.attach(&name, read_only).map(|attached| attached.device).map_err(Into::into)
    } else {
        attach_for_mount(client, &name, read_only)
    };
    let device = match attached {
        Ok(device) => device,
        Err(error) => {
            release_in_turn(client, &name).ok();
            return Err(error);
        }
    };
    match by(&device, &directory) {
        Ok(()) => Ok(Mounted { volume: name, device, directory }),
        Err(error) => {
            release_in_turn(client, &name).ok();
            Err(error)
        }
    }
}

/// Unmounts, and undoes what [`mount_volume`] did besides.
///
/// # Errors
/// What umount(2) says, and what the daemon answers.
pub fn unmount_volume(client: &Client, mounted: &Mounted) -> Result<()> {
    rustix::mount::unmount(&mounted.directory, UnmountFlags::NOFOLLOW).map_err(|error| {
        let directory = mounted.directory.display();
        match error {
            rustix::io::Errno::BUSY => anyhow!("{directory} is in use; end what works in it (fuser -vm {directory})"),
            rustix::io::Errno::PERM => anyhow!("{directory}: only root may unmount; run as root"),
            _ => anyhow!("{directory}: unmount: {error}"),
        }
    })?;
    release(client, &mounted.volume)
}

/// Mounts the file system on a block device with the default options.
///
/// # Errors
/// When there is no file system on it that is known, and what mount(2) says.
pub fn mount_device(device: &Path, directory: &Path, read_only: bool) -> Result<()> {
    let (kind, options) = kind_and_options(device)?;
    let mut flags = MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, read_only);
    let data = CString::new(options).context("mount options")?;
    rustix::mount::mount(device, directory, kind, flags, data.as_c_str()).map_err(|error| {
        let what = format!("{} on {}", device.display(), directory.display());
        match error {
            rustix::io::Errno::PERM => anyhow!("{what}: only root may mount; run as root"),
            rustix::io::Errno::NODEV => anyhow!("{what}: this kernel has no {kind}"),
            rustix::io::Errno::EXIST if kind == "btrfs" => {
                anyhow!(
                    "{what}: btrfs refuses a second copy of a mounted file system; give it a new uuid with btrfstune -m"
                )
            }
            _ => anyhow!("{what}: mount of {kind}: {error}; dmesg may say more"),
        }
    })
}

/// The kind of the file system on a block device, and the options that it is mounted with unless others are given.
///
/// # Errors
/// When there is no file system on it that is known.
pub(super) fn kind_and_options(device: &Path) -> Result<(&'static str, &'static str)> {
    let mut head = vec![0; filesystem::HEAD_BYTES];
    let file = File::open(device).with_context(|| device.display().to_string())?;
    let len = read_head(&file, &mut head).with_context(|| device.display().to_string())?;
    let Some(FileSystem { kind, .. }) = FileSystem::recognise(&head[..len]) else {
        bail!("{}: no file system found on it; make one, such as with mkfs.ext4", device.display());
    };
    Ok((kind, filesystem::mount_options(kind)))
}

fn read_head(file: &File, head: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < head.len() {
        match file.read_at(&mut head[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn require_directory(directory: &Path) -> Result<()> {
    let missing = || format!("{}: make the directory to mount on first", directory.display());
    let metadata = fs::metadata(directory).with_context(missing)?;
    if metadata.is_dir() { Ok(()) } else { bail!("{} is not a directory", directory.display()) }
}

/// Attaches, and notes on the volume that it was done for a mount, when it was not attached before.
fn attach_for_mount(client: &Client, name: &str, read_only: bool) -> Result<PathBuf> {
    if let Some(device) = client.volume(name)?.device {
        return Ok(device);
    }
    let mark = [(attributes::ATTACHED_BY.to_owned(), Some(Bytes::from("mount")))];
    client.set_attributes(name, mark.into())?;
    Ok(client.attach(name, read_only)?.device)
}

/// Detaches what was attached for a mount, unless it is mounted elsewhere too, and deletes a private clone.
pub(super) fn release(client: &Client, name: &str) -> Result<()> {
    let found = client.attributes(name)?;
    // A private clone is nobody else's.
    if found.get(attributes::EPHEMERAL).is_some_and(|value| value.0 == b"mount") {
        return release_what_has(client, name, &found);
    }
    let _turn = making::turn(client.pool_uuid()?, name)?;
    release_in_turn(client, name)
}

/// As [`release`], for who has the volume's turn.
fn release_in_turn(client: &Client, name: &str) -> Result<()> {
    release_what_has(client, name, &client.attributes(name)?)
}

fn release_what_has(client: &Client, name: &str, found: &Attributes) -> Result<()> {
    let marked = |key: &str| found.get(key).is_some_and(|value| value.0 == b"mount");
    if let Some(device) = client.volume(name)?.device
        && mount_of(&device)?.is_some()
    {
        return Ok(());
    }
    let released = match (marked(attributes::ATTACHED_BY), marked(attributes::EPHEMERAL)) {
        (true, true) => delete_when_idle(client, name),
        (true, false) => detach_when_idle(client, name),
        (false, true) => client.delete(name),
        (false, false) => return Ok(()),
    };
    match released {
        Err(failure) if failure.kind == Kind::Busy && marked(attributes::ATTACHED_BY) => Ok(()),
        released => Ok(released?),
    }
}

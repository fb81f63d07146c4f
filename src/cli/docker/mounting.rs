//! Mounting volumes for containers: once for all of them, on a directory that Docker then binds into each.
//!
//! The order makes every cut harmless. A mount is made before its id is recorded: a mount without ids is taken down when
//! somebody looks. A volume is unmounted before its ids are forgotten: ids without a mount mean nothing, but say that an
//! ephemeral volume has had its use.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::record::{Mounts, boot_id};
use super::volumes::{Known, Volumes, missing};
use crate::cli::mount::{Mounted, mount_volume, unmount_volume};
use crate::daemon::Client;
use crate::daemon::attributes::DOCKER_MOUNTS;
use crate::daemon::mounts::{device_number, own_mounts};
use crate::daemon::protocol::Volume;

/// How long an unmount waits for processes that are about to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is mounted for a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unmounted,
    /// Its own device.
    Mounted,
    /// A device that has died with an earlier daemon.
    Dead,
}

impl Volumes {
    /// Mounts a volume for `id`, and answers where.
    ///
    /// # Errors
    /// When there is no such volume, or it cannot be mounted.
    pub fn mount(&self, name: &str, id: &str) -> Result<PathBuf> {
        let _held = self.names.hold(name);
        let client = self.client()?;
        let mut known = self.find(&client, name)?.with_context(|| missing(name))?;
        let directory = self.directory_of(&known.volume);
        let mut state = self.state(&known.volume)?;
        if state == State::Dead {
            tracing::warn!(volume = name, "its device has died with an earlier daemon; mounted anew");
            detach_lazily(&directory)?;
            state = State::Unmounted;
        }
        if state == State::Unmounted {
            if known.record.ephemeral && known.record.was_mounted && !self.use_again(&known.volume) {
                self.end_of_use(&client, &known)?;
                bail!("{}; its last use has ended, and it was ephemeral", missing(name));
            }
            known.record.mounts = Mounts::none(&boot_id()?);
            make_directory(&self.directory, &directory)?;
            mount_volume(&client, name, &directory, false)?;
        }
        let recorded = known.record.mounts.add(id).and_then(|()| {
            let mounts = known.record.mounts.encode()?;
            Ok(client.set_attributes(name, [(DOCKER_MOUNTS.to_owned(), Some(mounts))].into())?)
        });
        if let Err(error) = recorded {
            if state == State::Unmounted {
                let mounted = Mounted { volume: name.to_owned(), device: PathBuf::new(), directory };
                unmount_volume(&client, &mounted).ok();
            }
            return Err(error.context(format!("volume {name} cannot be mounted once more")));
        }
        Ok(directory)
    }

    /// Ends the mount of `id`; the last one's unmounts. One that is not known is all right.
    ///
    /// # Errors
    /// When it cannot be unmounted.
    pub fn unmount(&self, name: &str, id: &str) -> Result<()> {
        let _held = self.names.hold(name);
        let client = self.client()?;
        let Some(mut known) = self.find(&client, name)? else {
            // It was ephemeral, and has gone with an earlier daemon; its dead mount is left.
            self.pending.store(true, Ordering::Release);
            return Ok(());
        };
        if self.state(&known.volume)? == State::Unmounted {
            return if known.record.was_mounted { self.end_of_use(&client, &known) } else { Ok(()) };
        }
        let was_there = known.record.mounts.ids.remove(id);
        if known.record.mounts.ids.is_empty() {
            return self.take_down(&client, &known);
        }
        if was_there {
            let mounts = known.record.mounts.encode()?;
            client.set_attributes(name, [(DOCKER_MOUNTS.to_owned(), Some(mounts))].into())?;
        }
        Ok(())
    }

    /// Where a volume is mounted. None: it is not.
    ///
    /// # Errors
    /// When there is no such volume.
    pub fn path(&self, name: &str) -> Result<Option<PathBuf>> {
        let client = self.client()?;
        let known = self.find(&client, name)?.with_context(|| missing(name))?;
        self.mounted_on(&known.volume)
    }

    pub(super) fn mounted_on(&self, volume: &Volume) -> Result<Option<PathBuf>> {
        Ok((self.state(volume)? != State::Unmounted).then(|| self.directory_of(volume)))
    }

    /// Puts in order what was cut short: mounts of nobody, and what was attached for mounts that are gone. What cannot be
    /// put in order now is tried again. Answers whether nothing is left to do.
    pub fn settle(&self) -> bool {
        match self.settle_all() {
            Ok(settled) => settled,
            Err(error) => {
                tracing::warn!("looking over the volumes: {error:#}");
                false
            }
        }
    }

    fn settle_all(&self) -> Result<bool> {
        let client = self.client()?;
        let mut settled = true;
        // Before the volumes: what is mounted now and is none of them has been deleted.
        let mounts = own_mounts().context("/proc/self/mountinfo")?;
        let volumes = client.volumes()?;
        for mount in mounts.iter().filter(|mount| mount.mount_point.parent() == Some(&self.directory)) {
            let is_there = |volume: &Volume| self.directory_of(volume) == mount.mount_point;
            if !volumes.iter().any(is_there) {
                tracing::info!("{}: its volume is gone, with an earlier daemon", mount.mount_point.display());
                detach_lazily(&mount.mount_point)?;
            }
        }
        for known in self.all(&client)? {
            let name = &known.volume.name;
            let _held = self.names.hold(name);
            // As it is now that nobody else does anything with it.
            let Some(known) = self.find(&client, name)? else { continue };
            let done = match self.state(&known.volume)? {
                State::Unmounted if known.record.was_mounted => self.end_of_use(&client, &known),
                State::Mounted | State::Dead if known.record.mounts.ids.is_empty() => self.take_down(&client, &known),
                _ => Ok(()),
            };
            if let Err(error) = done {
                settled = false;
                tracing::debug!(volume = name, "not put in order yet: {error:#}");
            }
        }
        Ok(settled)
    }

    /// Unmounts a volume, and undoes what was done for mounting it.
    pub(super) fn take_down(&self, client: &Client, known: &Known) -> Result<()> {
        let directory = self.directory_of(&known.volume);
        unmount(&directory)?;
        if let Err(error) = fs::remove_dir(&directory) {
            tracing::debug!(%error, "{}", directory.display());
        }
        self.end_of_use(client, known)
    }

    fn directory_of(&self, volume: &Volume) -> PathBuf {
        // Ids are never used again, and a volume may be renamed under its mount.
        self.directory.join(volume.id.to_string())
    }

    fn state(&self, volume: &Volume) -> Result<State> {
        let directory = self.directory_of(volume);
        let mounts = own_mounts().context("/proc/self/mountinfo")?;
        let Some(mount) = mounts.iter().rev().find(|mount| mount.mount_point == directory) else {
            return Ok(State::Unmounted);
        };
        let device = volume.device.as_deref();
        let is_its_own =
            device.is_some_and(|device| device_number(device).is_ok_and(|number| mount.is_of(device, number)));
        Ok(if is_its_own { State::Mounted } else { State::Dead })
    }
}

/// Containers of other user namespaces look for it as somebody who is not root here, so all may pass; what is in the
/// volume is protected by its own permissions.
fn make_directory(parent: &Path, directory: &Path) -> Result<()> {
    for path in parent.parent().into_iter().chain([parent, directory]) {
        match DirBuilder::new().mode(0o711).create(path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Containers have ended by now, but the kernel may not have taken the last of their mounts away. Somebody who stays in
/// there keeps the file system, not the path: else nobody could ever use the volume again.
fn unmount(directory: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        match rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) if began.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(20)),
            Err(Errno::BUSY) => {
                tracing::warn!("{} is in use by somebody who is no container (fuser -vm)", directory.display());
                return detach_lazily(directory);
            }
            Err(error) => return Err(anyhow!("{}: unmount: {error}", directory.display())),
        }
    }
}

fn detach_lazily(directory: &Path) -> Result<()> {
    rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
        .map_err(|error| anyhow!("{}: unmount: {error}", directory.display()))
}

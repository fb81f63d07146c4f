//! A container's root file system: a clone of an image, attached and mounted. What was made is taken away again,
//! whatever happens in between.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use uuid::Uuid;

use super::conduct::Terms;
use crate::cli::attach::{delete_when_idle, detach_when_idle};
use crate::cli::image::labels;
use crate::cli::mount::mount_device;
use crate::cli::working::{ephemeral, head};
use crate::daemon::attributes::{ATTACHED, FOR_WRITING};
use crate::daemon::mounts::mount_of;
use crate::daemon::protocol::{Attributes, Volume};
use crate::daemon::{Client, making};

/// Where containers' bundles are, and their root file systems are mounted.
pub const CONTAINERS: &str = "/run/plywood/containers";

/// A mounted clone. [`Container::close`] takes it down and tells what went wrong; dropping it does so as well as it can.
#[must_use]
pub struct Container<'a> {
    client: &'a Client,
    /// The id that the runtime knows it by.
    pub id: String,
    /// The clone.
    pub volume: Volume,
    /// The directory of its bundle; `rootfs` in it is the mount point.
    pub bundle: PathBuf,
    /// Whether the clone stays when the container is closed: a new one does not, until it is said.
    pub keep: bool,
    progress: Progress,
    /// Held for as long as somebody looks after the container.
    _attended: File,
}

/// How long whoever looked after a container has for what is left to do when its device has gone.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The file in a bundle that is locked by whoever looks after its container.
const ATTENDED: &str = "attended";

/// Whether somebody looks after a container. None: it has been taken down.
///
/// # Errors
/// What the host says.
pub fn is_attended(id: &str) -> Result<Option<bool>> {
    let path = Path::new(CONTAINERS).join(id).join(ATTENDED);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| path.display().to_string())?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => Ok(Some(true)),
        locked => {
            locked.with_context(|| path.display().to_string())?;
            Ok(Some(false))
        }
    }
}

/// Looks after a container from now on. None: somebody else does.
fn attend(bundle: &Path) -> Result<Option<File>> {
    let path = bundle.join(ATTENDED);
    loop {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(bundle)
            .with_context(|| bundle.display().to_string())?;
        let file = match File::create(&path) {
            // Whoever looked after it before has removed the bundle meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.with_context(|| path.display().to_string())?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked.with_context(|| path.display().to_string())?,
        }
        // Whoever looked after it before may have removed the file meanwhile, and with it what the lock is worth.
        let is_there = fs::metadata(&path).is_ok_and(|found| file.metadata().is_ok_and(|own| own.ino() == found.ino()));
        if is_there {
            return Ok(Some(file));
        }
    }
}

/// Removes a bundle, its lock last: from then on it may be somebody else's.
fn remove_bundle(bundle: &Path) -> io::Result<()> {
    let gone_is_fine = |removed: io::Result<()>| match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    let entries = match fs::read_dir(bundle) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            gone_is_fine(fs::remove_dir_all(entry.path()))?;
        } else if entry.file_name() != ATTENDED {
            gone_is_fine(fs::remove_file(entry.path()))?;
        }
    }
    gone_is_fine(fs::remove_file(bundle.join(ATTENDED)))?;
    match fs::remove_dir(bundle) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => gone_is_fine(removed),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Closed,
    Cloned,
    Mounted,
}

impl<'a> Container<'a> {
    /// Clones the snapshot `image`, and mounts the clone.
    ///
    /// # Errors
    ///
    /// There is no such snapshot, the name is taken, or the file system cannot be mounted. Nothing is left then.
    pub fn open(client: &'a Client, image: &str, name: Option<&str>, mut attributes: Attributes) -> Result<Self> {
        let id = Uuid::new_v4().simple().to_string()[..12].to_owned();
        attributes.insert(labels::CONTAINER_ID.to_owned(), id.as_str().into());
        attributes.insert(ATTACHED.to_owned(), FOR_WRITING.into());
        let name = name.map_or_else(|| default_name(image, &id), str::to_owned);
        // A clone that is not attached yet looks like one that nobody needs any more.
        let _making = making::begin(client.pool_uuid()?)?;
        let volume = client.create_clone(image, &name, attributes)?;
        let bundle = Path::new(CONTAINERS).join(&id);
        let attended = attend(&bundle).and_then(|attended| attended.context("its id is taken"));
        let attended = attended.inspect_err(|_| crate::cli::working::take_away(client, &name))?;
        let mut container =
            Self { client, id, volume, bundle, keep: false, progress: Progress::Cloned, _attended: attended };
        container.mount()?;
        Ok(container)
    }

    /// Mounts a container that has ended. It is kept.
    ///
    /// # Errors
    ///
    /// It runs, is in use, or cannot be mounted.
    pub fn reopen(client: &'a Client, volume: Volume, id: String) -> Result<Self> {
        let name = &volume.name;
        // Attached alone it may be: by plywood attach --all after a power cut, which brings back what was attached before.
        if let Some(device) = &volume.device
            && let Some(mount) = mount_of(device)?
        {
            bail!("{name} is mounted on {} as {}; unmount it first", mount.mount_point.display(), device.display());
        }
        let bundle = Path::new(CONTAINERS).join(&id);
        let began = Instant::now();
        let attended = loop {
            // Whoever looked after it is not quite done when the device has gone.
            match attend(&bundle)? {
                Some(attended) => break attended,
                None if began.elapsed() < PATIENCE => thread::sleep(LOOK_AGAIN),
                None => bail!("{name} runs already"),
            }
        };
        let mut container =
            Self { client, id, volume, bundle, keep: true, progress: Progress::Cloned, _attended: attended };
        container.mount()?;
        Ok(container)
    }

    fn mount(&mut self) -> Result<()> {
        let device = self.client.attach(&self.volume.name, false)?.device;
        let root = self.root();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).with_context(|| root.display().to_string())?;
        mount_device(&device, &root, false)?;
        self.progress = Progress::Mounted;
        // A copy of it in another mount namespace would keep the device busy for as long as that one lives.
        rustix::mount::mount_change(&root, MountPropagationFlags::PRIVATE)?;
        Ok(())
    }

    /// Where its root file system is mounted.
    pub fn root(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// Unmounts and detaches it, and deletes the clone where it is not to be kept.
    ///
    /// # Errors
    ///
    /// Something still uses it.
    pub fn close(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        if self.progress >= Progress::Mounted {
            unmount(&self.root())?;
            self.progress = Progress::Cloned;
        }
        if self.progress >= Progress::Cloned {
            // It may have been renamed, and its name be another's.
            match self.client.name_of(self.volume.uuid, &self.volume.name)? {
                Some(name) if self.keep => detach_when_idle(self.client, &name)?,
                Some(name) => delete_when_idle(self.client, &name)?,
                None => {}
            }
            self.progress = Progress::Closed;
        }
        remove_bundle(&self.bundle).with_context(|| self.bundle.display().to_string())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if self.progress > Progress::Closed
            && let Err(error) = self.take_down()
        {
            tracing::warn!(container = self.volume.name, %error, "could not be taken down");
        }
    }
}

/// The kernel takes a dead container's mounts away a moment after its last process.
fn unmount(directory: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        match rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) if began.elapsed() < Duration::from_secs(5) => thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error).with_context(|| format!("unmounting {}", directory.display())),
        }
    }
}

/// `IMAGE.ID`, within the bound of names.
fn default_name(image: &str, id: &str) -> String {
    format!("{}.{id}", head(image))
}

/// The attributes of a container. One that is thrown away at its end is also thrown away when whoever ran it has died.
pub fn attributes(image: &str, command: &[String], terms: &Terms) -> Attributes {
    let thrown_away = terms.thrown_away;
    let [command, terms] = [serde_json::json!(command), serde_json::json!(terms)].map(|value| value.to_string());
    let mut attributes: Attributes = [
        (labels::CONTAINER_IMAGE.to_owned(), image.into()),
        (labels::CONTAINER_COMMAND.to_owned(), command.as_str().into()),
        (labels::CONTAINER_TERMS.to_owned(), terms.as_str().into()),
    ]
    .into();
    if thrown_away {
        attributes.extend(ephemeral("run"));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_names_stay_within_the_bound() {
        for image in ["debian", &"é".repeat(127), &"x".repeat(255)] {
            let name = default_name(image, "0123456789ab");
            assert!(name.len() <= 255 && name.ends_with(".0123456789ab"), "{name}");
        }
    }
}

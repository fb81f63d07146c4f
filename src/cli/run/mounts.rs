//! What a container sees beside its own root: volumes of the pool, parts of the host, and memory. With Docker's meaning.
//!
//! `-v` makes a source that is missing, `--mount` refuses it. An empty volume is filled with what the image has at that place,
//! with owners, modes and attributes; one that holds something hides what the image has.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use indicatif::ProgressBar;
use oci_spec::runtime::{Mount, MountBuilder};
use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid};
use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cli::attach::{delete_when_idle, detach_when_idle};
use crate::cli::image::{Filesystem, Interrupt, copy_directory, open_root, tree_at};
use crate::cli::mount::{Mounted, mount_device, mount_in_turn, unmount_volume};
use crate::cli::size;
use crate::cli::working::{ephemeral, take_away};
use crate::daemon::attributes::EPHEMERAL;
use crate::daemon::mounts::mount_of;
use crate::daemon::protocol::{Kind, Volume};
use crate::daemon::{Client, making};

/// Where volumes of containers are mounted. Not in their bundles, which are removed with all that is in them.
pub(super) const VOLUMES: &str = "/run/plywood/volumes";
/// Virtual size and sector size of a volume that `-v` makes.
const SIZE_BYTES: u64 = 10 << 30;
const SECTOR_SIZE: u32 = 4096;
/// The mark of a volume that `-v` is making.
const UNFINISHED: &str = "volume";
/// What mkfs.ext4 makes.
const LOST_AND_FOUND: &str = "lost+found";

/// Something that a container is to see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    source: Source,
    /// Where: an absolute path in the container.
    destination: PathBuf,
    read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Source {
    /// A file or directory of the host; `make` a directory where there is nothing.
    Host { path: PathBuf, make: bool },
    /// A volume; `make` it where there is none.
    Volume { name: String, make: bool },
    /// Memory, of so many bytes at most.
    Memory { size_bytes: Option<u64> },
}

impl Wanted {
    /// `SOURCE:DIRECTORY[:ro]`, as `-v` takes it: SOURCE is a path of the host or the name of a volume.
    ///
    /// # Errors
    /// It is something else.
    pub fn volume(typed: &str) -> Result<Self> {
        let mut parts = typed.split(':');
        let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
            bail!("{typed}: give SOURCE:DIRECTORY[:ro]");
        };
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(other) => bail!("{typed}: {other} is not known; ro and rw are"),
        };
        ensure!(parts.next().is_none() && !source.is_empty(), "{typed}: give SOURCE:DIRECTORY[:ro]");
        let source = if source.starts_with(['/', '.']) {
            Source::Host { path: std::path::absolute(source)?, make: true }
        } else {
            Source::Volume { name: source.to_owned(), make: true }
        };
        Ok(Self { source, destination: inside(destination, typed)?, read_only })
    }

    /// `type=bind|volume|tmpfs,source=...,target=...[,readonly][,tmpfs-size=...]`, as `--mount` takes it.
    ///
    /// # Errors
    /// It is something else.
    pub fn mount(typed: &str) -> Result<Self> {
        let (mut kind, mut from, mut to, mut read_only, mut size_bytes) = ("volume", None, None, false, None);
        for pair in typed.split(',') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (key, value) {
                ("type", "bind" | "volume" | "tmpfs") => kind = value,
                ("source" | "src", _) if !value.is_empty() => from = Some(value),
                ("target" | "destination" | "dst", _) if !value.is_empty() => to = Some(value),
                ("readonly" | "ro", "" | "true" | "1") => read_only = true,
                ("readonly" | "ro", "false" | "0") => read_only = false,
                ("tmpfs-size", _) => size_bytes = Some(size::parse(value).map_err(anyhow::Error::msg)?),
                _ => bail!("{typed}: {pair} is not understood"),
            }
        }
        let destination = inside(to.with_context(|| format!("{typed}: give target=DIRECTORY"))?, typed)?;
        let named = || from.with_context(|| format!("{typed}: give source=..."));
        let source = match kind {
            "bind" => Source::Host { path: std::path::absolute(named()?)?, make: false },
            "volume" => Source::Volume { name: named()?.to_owned(), make: false },
            _ => {
                ensure!(from.is_none(), "{typed}: memory has no source");
                Source::Memory { size_bytes }
            }
        };
        ensure!(size_bytes.is_none() || kind == "tmpfs", "{typed}: tmpfs-size goes with type=tmpfs");
        Ok(Self { source, destination, read_only })
    }

    /// `DIRECTORY[:size=SIZE]`, as `--tmpfs` takes it.
    ///
    /// # Errors
    /// It is something else.
    pub fn tmpfs(typed: &str) -> Result<Self> {
        let (destination, options) = typed.split_once(':').unwrap_or((typed, ""));
        let size_bytes = match options.split_once('=') {
            None if options.is_empty() => None,
            Some(("size", size)) => Some(size::parse(size).map_err(anyhow::Error::msg)?),
            _ => bail!("{typed}: give DIRECTORY[:size=SIZE]"),
        };
        Ok(Self { source: Source::Memory { size_bytes }, destination: inside(destination, typed)?, read_only: false })
    }
}

/// A path in the container: absolute, and nowhere upwards.
fn inside(path: &str, typed: &str) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    ensure!(
        path.is_absolute() && is_plain && path != Path::new("/"),
        "{typed}: give an absolute path in the container"
    );
    Ok(path)
}

/// The volumes that are mounted for a container. They are unmounted when it ends, whatever happens in between.
pub struct Volumes<'a> {
    client: &'a Client,
    directory: PathBuf,
    /// With the uuid of what may be renamed meanwhile.
    mounted: Vec<(Mounted, Option<Uuid>)>,
    /// The volumes that they are; of a snapshot a clone is mounted, which is the container's alone.
    pub uuids: Vec<Uuid>,
}

impl<'a> Volumes<'a> {
    /// Mounts what is wanted, for the container `id` with the root file system `root`. Answers what its runtime is told.
    ///
    /// # Errors
    /// A source is missing and not to be made, or cannot be mounted. Nothing stays mounted then.
    pub fn mount(
        client: &'a Client,
        id: &str,
        root: &Path,
        wanted: &[Wanted],
        interrupt: &Interrupt,
    ) -> Result<(Self, Vec<Mount>)> {
        let mut volumes =
            Self { client, directory: Path::new(VOLUMES).join(id), mounted: Vec::new(), uuids: Vec::new() };
        let mut mounts = Vec::new();
        for Wanted { source, destination, read_only } in wanted {
            let shown = || format!("{}", destination.display());
            let mount = match source {
                Source::Host { path, make } => {
                    if *make && !path.exists() {
                        fs::create_dir_all(path).with_context(|| path.display().to_string())?;
                    }
                    ensure!(path.exists(), "{}: does not exist", path.display());
                    bind(path, destination, *read_only)?
                }
                Source::Volume { name, make } => {
                    // Whoever else wants it at this moment finds it whole.
                    let turn = making::turn(client.pool_uuid()?, name)?;
                    let place = Place { root, destination, interrupt };
                    let at = volumes.take(name, *make, &place).with_context(shown)?;
                    drop(turn);
                    bind(&at, destination, *read_only)?
                }
                Source::Memory { size_bytes } => memory(destination, *read_only, *size_bytes)?,
            };
            mounts.push(mount);
        }
        Ok((volumes, mounts))
    }

    /// Mounts a volume, which is made where there is none and `make` says so, and filled from the image where it is empty; for
    /// who has its turn.
    fn take(&mut self, name: &str, make: bool, place: &Place<'_>) -> Result<PathBuf> {
        let found = match self.client.volume(name) {
            Err(failure) if failure.kind == Kind::NotFound && make => None,
            found => Some(found?),
        };
        match found {
            Some(volume) if is_unfinished(self.client, &volume)? => {
                ensure!(make, "{name} was left half made by a start that was cut short; -v makes it anew");
                discard(self.client, &volume)?;
                self.take_new(name, place)
            }
            Some(volume) => self.take_found(&volume, place),
            None => self.take_new(name, place),
        }
    }

    fn take_found(&mut self, volume: &Volume, place: &Place<'_>) -> Result<PathBuf> {
        // Nobody else has it: what a fill has put there that did not come to its end is nobody's.
        let is_idle = volume.device.is_none();
        let at = self.mount_one(volume)?;
        if is_empty(&at)?
            && let Err(error) = place.fill(&at)
        {
            if is_idle {
                empty(&at).with_context(|| format!("{} was filled from the image in part", volume.name))?;
            }
            return Err(error);
        }
        Ok(at)
    }

    /// Makes a volume. Until it is whole it has the mark of what nobody needs any more when its maker is gone.
    fn take_new(&mut self, name: &str, place: &Place<'_>) -> Result<PathBuf> {
        let _making = making::begin(self.client.pool_uuid()?)?;
        let volume = self.client.create_volume(name, SIZE_BYTES, SECTOR_SIZE, ephemeral(UNFINISHED))?;
        let others = self.mounted.len();
        let made = self.make(&volume, place);
        if made.is_err() {
            for (mounted, _) in self.mounted.drain(others..) {
                let _ = rustix::mount::unmount(&mounted.directory, UnmountFlags::NOFOLLOW);
                let _ = fs::remove_dir(&mounted.directory);
            }
            take_away(self.client, name);
        }
        made
    }

    fn make(&mut self, volume: &Volume, place: &Place<'_>) -> Result<PathBuf> {
        let name = &volume.name;
        Filesystem::default().make_empty(&self.client.attach(name, false)?.device)?;
        detach_when_idle(self.client, name)?;
        let at = self.mount_one(volume)?;
        place.fill(&at)?;
        // Durable before it counts as filled.
        rustix::fs::syncfs(open_root(&at)?)?;
        self.client.set_attributes(name, [(EPHEMERAL.to_owned(), None)].into())?;
        Ok(at)
    }

    fn mount_one(&mut self, volume: &Volume) -> Result<PathBuf> {
        let at = self.directory.join(self.mounted.len().to_string());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&at).with_context(|| at.display().to_string())?;
        let mounted = mount_in_turn(self.client, volume, &at, false, |device, at| mount_device(device, at, false))?;
        // A copy of it in another mount namespace would keep the device busy for as long as that one lives.
        let private = rustix::mount::mount_change(&at, rustix::mount::MountPropagationFlags::PRIVATE);
        self.mounted.push((mounted, (!volume.snapshot).then_some(volume.uuid)));
        if !volume.snapshot {
            self.uuids.push(volume.uuid);
        }
        private?;
        Ok(at)
    }

    /// Unmounts them.
    ///
    /// # Errors
    /// One is in use; the others are unmounted.
    pub fn close(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        let mut failed = Ok(());
        for (mut mounted, uuid) in self.mounted.drain(..).rev() {
            // It may have been renamed, and its name be another's.
            if let Some(now) = uuid.and_then(|uuid| self.client.name_of(uuid, &mounted.volume).ok().flatten()) {
                mounted.volume = now;
            }
            match unmount_volume(self.client, &mounted) {
                // Only an empty directory is removed.
                Ok(()) => drop(fs::remove_dir(&mounted.directory)),
                Err(error) => failed = Err(error),
            }
        }
        let _ = fs::remove_dir(&self.directory);
        failed
    }
}

impl Drop for Volumes<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::warn!("a volume of a container stays mounted: {error:#}");
        }
    }
}

/// What an empty volume is filled with: what the image has where the volume is to be seen.
struct Place<'a> {
    /// The container's root file system.
    root: &'a Path,
    /// Where in it.
    destination: &'a Path,
    interrupt: &'a Interrupt,
}

impl Place<'_> {
    /// Gives an empty volume, mounted at `at`, what the image has at its place.
    fn fill(&self, at: &Path) -> Result<()> {
        // Through the image's own links, and never out of it.
        let Some(from) = tree_at(open_root(self.root)?, self.destination)? else { return Ok(()) };
        let to = open_root(at)?;
        copy_directory(open_root(at)?, &place_of(&from), &ProgressBar::hidden(), self.interrupt)?;
        let like = rustix::fs::fstat(&from)?;
        let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
        rustix::fs::fchown(&to, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&to, Mode::from_raw_mode(like.st_mode & 0o7777))?;
        for name in xattr::list(place_of(&from)).into_iter().flatten() {
            if let Some(value) = xattr::get(place_of(&from), &name)? {
                xattr::set(place_of(&to), &name, &value)?;
            }
        }
        let at = |seconds, nanoseconds: u64| Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.try_into().unwrap_or_default(),
        };
        let times = Timestamps {
            last_access: at(like.st_atime, like.st_atime_nsec),
            last_modification: at(like.st_mtime, like.st_mtime_nsec),
        };
        Ok(rustix::fs::futimens(&to, &times)?)
    }
}

/// Whether nothing is in a volume but what mkfs puts there.
fn is_empty(at: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(at)?.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOST_AND_FOUND)))
}

/// Takes everything out of a volume but what mkfs puts there.
fn empty(at: &Path) -> io::Result<()> {
    for entry in fs::read_dir(at)? {
        let entry = entry?;
        if entry.file_name() == LOST_AND_FOUND {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a volume was being made by a start that has died: who looks has its turn, so nobody is making it now.
fn is_unfinished(client: &Client, volume: &Volume) -> Result<bool> {
    let attributes = client.attributes(&volume.name)?;
    Ok(!volume.snapshot && attributes.get(EPHEMERAL).is_some_and(|mark| mark.0 == UNFINISHED.as_bytes()))
}

/// Takes away what a start has left that was cut short.
fn discard(client: &Client, volume: &Volume) -> Result<()> {
    while let Some(device) = &volume.device
        && let Some(mount) = mount_of(device)?
    {
        let point = mount.mount_point;
        ensure!(point.starts_with(VOLUMES), "{} is half made, and mounted on {}", volume.name, point.display());
        rustix::mount::unmount(&point, UnmountFlags::NOFOLLOW).with_context(|| point.display().to_string())?;
    }
    Ok(delete_when_idle(client, &volume.name)?)
}

/// Refuses what a container that is kept would lose: a snapshot is mounted as a copy, which goes when the container ends.
///
/// # Errors
/// A snapshot is among what is wanted, to be written to.
pub fn refuse_copies(client: &Client, wanted: &[Wanted]) -> Result<()> {
    for Wanted { source, read_only, .. } in wanted {
        if let Source::Volume { name, .. } = source
            && !read_only
            && client.volume(name).is_ok_and(|volume| volume.snapshot)
        {
            bail!(
                "{name} is a snapshot: what the container writes there would go when it ends; give --rm, {name}:...:ro, or a \
                 volume made of it (plywood clone create {name} NAME)"
            );
        }
    }
    Ok(())
}

fn place_of(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", directory.as_raw_fd()))
}

fn bind(from: &Path, to: &Path, read_only: bool) -> Result<Mount> {
    let mut options = vec!["rbind".to_owned(), "rprivate".to_owned()];
    if read_only {
        options.push("ro".to_owned());
    }
    Ok(MountBuilder::default().typ("bind").source(from).destination(to).options(options).build()?)
}

fn memory(to: &Path, read_only: bool, size_bytes: Option<u64>) -> Result<Mount> {
    let mut options: Vec<String> = ["nosuid", "nodev", "noexec", "mode=1777"].map(str::to_owned).to_vec();
    options.extend(size_bytes.map(|size| format!("size={size}")));
    if read_only {
        options.push("ro".to_owned());
    }
    Ok(MountBuilder::default().typ("tmpfs").source("tmpfs").destination(to).options(options).build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(path: &str, make: bool) -> Source {
        Source::Host { path: path.into(), make }
    }

    #[test]
    fn notations_mean_what_they_mean_to_docker() {
        let wanted =
            |source, destination: &str, read_only| Wanted { source, destination: destination.into(), read_only };
        let volume = |name: &str, make| Source::Volume { name: name.into(), make };
        for (typed, expected) in [
            ("/srv/x:/data", wanted(host("/srv/x", true), "/data", false)),
            ("data:/var/lib:ro", wanted(volume("data", true), "/var/lib", true)),
            ("data:/d:rw", wanted(volume("data", true), "/d", false)),
        ] {
            assert_eq!(Wanted::volume(typed).unwrap(), expected);
        }
        for (typed, expected) in [
            ("type=bind,source=/a,target=/b", wanted(host("/a", false), "/b", false)),
            ("source=v,dst=/b,readonly", wanted(volume("v", false), "/b", true)),
            ("type=tmpfs,target=/t,tmpfs-size=1M", wanted(Source::Memory { size_bytes: Some(1 << 20) }, "/t", false)),
        ] {
            assert_eq!(Wanted::mount(typed).unwrap(), expected);
        }
        let expected = wanted(Source::Memory { size_bytes: Some(64 << 20) }, "/run", false);
        assert_eq!(Wanted::tmpfs("/run:size=64m").unwrap(), expected);
        assert_eq!(Wanted::tmpfs("/t").unwrap(), wanted(Source::Memory { size_bytes: None }, "/t", false));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for typed in ["", "x", "/a", "/a:b", "a:/b:rx", ":/b", "a:/", "a:/../b", "a:/b:ro:x"] {
            assert!(Wanted::volume(typed).is_err(), "{typed}");
        }
        for typed in [
            "",
            "type=x,target=/a",
            "target=/a",
            "type=bind,source=/a",
            "type=tmpfs,source=a,target=/t",
            "source=v,target=/v,tmpfs-size=1",
        ] {
            assert!(Wanted::mount(typed).is_err(), "{typed}");
        }
        for typed in ["", "t", "/t:size=x", "/t:mode=1"] {
            assert!(Wanted::tmpfs(typed).is_err(), "{typed}");
        }
    }
}

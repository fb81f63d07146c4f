//! The other side: the same image and the same containers on overlayfs, as Docker sets it up.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use uuid::Uuid;

use crate::cli::run::remove_container;

/// The magic number of ext2, ext3 and ext4 (statfs(2)).
const EXT4_MAGIC: i64 = 0xef53;

/// A directory on ext4 in which the layers and containers are: on the host's file system where that is ext4, on an image
/// file in it otherwise.
#[derive(Debug)]
pub struct Ground {
    directory: PathBuf,
    mounted: bool,
    /// The file system it is on.
    pub description: String,
}

impl Ground {
    /// Makes one in `place`.
    ///
    /// # Errors
    ///
    /// The image cannot be made or mounted.
    pub fn prepare(place: &Path, size_bytes: u64) -> Result<Self> {
        let directory = place.join("overlay");
        fs::create_dir(&directory)?;
        let found = rustix::fs::statfs(&directory)?;
        if found.f_type == EXT4_MAGIC {
            return Ok(Self { directory, mounted: false, description: "overlayfs on ext4".into() });
        }
        let image = place.join("overlay.ext4");
        fs::File::create(&image)?.set_len(size_bytes)?;
        let run = |command: &mut Command| -> Result<()> {
            let output = command.stdin(Stdio::null()).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{:?}: {}", command.get_program(), said.trim());
            Ok(())
        };
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image)).context("an ext4 image")?;
        run(Command::new("mount").args(["-o", "loop,noatime"]).arg(&image).arg(&directory)).context("an ext4 image")?;
        Ok(Self { directory, mounted: true, description: "overlayfs on an ext4 image".into() })
    }

    /// The directory of a layer, made if need be.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub fn layer(&self, number: usize) -> Result<PathBuf> {
        let path = self.directory.join(format!("layer-{number}"));
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Mounts the layers, the lowest first, with a writable one on top.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn start(&self, layers: &[PathBuf]) -> Result<Union> {
        let id = format!("demo-{}", &Uuid::new_v4().simple().to_string()[..12]);
        let bundle = self.directory.join(&id);
        let (upper, work, root) = (bundle.join("upper"), bundle.join("work"), bundle.join("rootfs"));
        for directory in [&bundle, &upper, &work, &root] {
            fs::create_dir(directory)?;
        }
        let lower: Vec<String> = layers.iter().rev().map(|layer| layer.display().to_string()).collect();
        // Docker's overlay2 turns index off, and leaves redirect_dir off, as the kernel has it.
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off,redirect_dir=off",
            lower.join(":"),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options)?;
        rustix::mount::mount("overlay", &root, "overlay", MountFlags::NOATIME, options.as_c_str())
            .context("this kernel mounts no overlayfs")?;
        let union = Union { id, bundle };
        rustix::mount::mount_change(union.root(), MountPropagationFlags::PRIVATE)?;
        Ok(union)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.mounted {
            unmount(&self.directory);
        }
    }
}

/// A container's root on overlayfs. Dropping it ends the container and unmounts.
#[derive(Debug)]
#[must_use]
pub struct Union {
    /// The id that the runtime knows it by.
    pub id: String,
    /// The directory of its bundle.
    pub bundle: PathBuf,
}

impl Union {
    /// Where it is mounted.
    pub fn root(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// The directory that holds what the container wrote.
    pub fn upper(&self) -> PathBuf {
        self.bundle.join("upper")
    }
}

impl Drop for Union {
    fn drop(&mut self) {
        remove_container(&self.id);
        unmount(&self.root());
    }
}

fn unmount(directory: &Path) {
    for _ in 0..100 {
        match rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                let error = io::Error::from(error);
                tracing::warn!(directory = %directory.display(), %error, "could not be unmounted");
                return;
            }
            Ok(()) => return,
        }
    }
}

//! Making a file system on a volume's device, and mounting it where nobody sees it.
//!
//! The mount hangs in no mount namespace (`fsopen`, `fsmount`, Linux 5.2): it is reached by its descriptor alone, and
//! ends with it, however this process ends. So nothing has to be cleaned up, nothing can look into a half-unpacked
//! image, and no path of the host leads into it.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::export::ext4::Ext4;
use crate::io::grow_mounted;
use crate::units::BLOCK_BYTES;

/// The file systems that an image can be made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Filesystem {
    /// ext4.
    #[default]
    Ext4,
    /// XFS; at least 300 MiB.
    Xfs,
    /// Btrfs; at least 110 MiB.
    Btrfs,
}

impl fmt::Display for Filesystem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        })
    }
}

impl Filesystem {
    /// The program that makes it, what to tell it, and Debian's package.
    ///
    /// A new volume reads as zeros and has no blocks, so discarding it or zeroing it would only cost. ext4: nothing is
    /// left to be initialised after the first mount, which every clone would have to copy; telling mke2fs that the
    /// device is zeroed marks the inode tables as initialised without writing them (measured on 10 GiB: 4.3 MiB
    /// instead of 229 MiB). No blocks are set aside for root: the image is not the host's disk. btrfs: metadata once,
    /// since all its copies would be in the one pool.
    const fn maker(self) -> (&'static str, &'static [&'static str], &'static str) {
        match self {
            Self::Ext4 => (
                "mkfs.ext4",
                &[
                    "-q",
                    "-F",
                    "-b",
                    "4096",
                    "-m",
                    "0",
                    "-E",
                    "nodiscard,lazy_itable_init=0,lazy_journal_init=0,assume_storage_prezeroed=1",
                ],
                "e2fsprogs",
            ),
            Self::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"], "xfsprogs"),
            Self::Btrfs => ("mkfs.btrfs", &["-q", "-f", "-K", "-m", "single"], "btrfs-progs"),
        }
    }

    /// Makes the file system on a device that reads as zeros.
    ///
    /// # Errors
    ///
    /// Its program is not installed, or refuses; then with the program's own words.
    pub fn make(self, device: &Path) -> Result<()> {
        let (program, options, package) = self.maker();
        let mut command = Command::new(program);
        command.args(options).arg(device);
        run(&mut command, package)
    }

    /// Makes it, with nothing in its root.
    ///
    /// # Errors
    ///
    /// Those of [`make`](Self::make) and [`mount`](Self::mount).
    pub fn make_empty(self, device: &Path) -> Result<()> {
        self.make(device)?;
        let mounted = self.mount(device)?;
        mounted.remove_lost_and_found()?;
        mounted.unmount()
    }

    /// Makes it as large as its device, on which it is not mounted. A journal is replayed first, so it may be that of a snapshot.
    ///
    /// # Errors
    ///
    /// A program is not installed, or what it and the file system say.
    pub fn grow(self, device: &Path) -> Result<()> {
        let grow = || -> Result<()> {
            let size_bytes = File::open(device)?.seek(SeekFrom::End(0))?;
            if self == Self::Ext4 {
                return grow_ext4(device, size_bytes / BLOCK_BYTES);
            }
            let mounted = self.mount(device)?;
            grow_mounted(mounted.root()?, size_bytes)?;
            mounted.unmount()
        };
        grow().with_context(|| format!("making {self} as large as {}", device.display()))
    }

    /// Size of the smallest one that can be made and used.
    pub const fn least_bytes(self) -> u64 {
        match self {
            Self::Ext4 => 2 << 20,
            Self::Xfs => 300 << 20,
            Self::Btrfs => 110 << 20,
        }
    }

    /// Mounts the file system on `device`. It is unmounted when [`Detached`] and all descriptors made from it are gone.
    ///
    /// # Errors
    ///
    /// The kernel refuses; then with its own words.
    pub fn mount(self, device: &Path) -> Result<Detached> {
        self.mount_with(device, &[])
    }

    /// As [`mount`](Self::mount), with further options.
    ///
    /// # Errors
    /// As [`mount`](Self::mount).
    pub fn mount_with(self, device: &Path, options: &[(&str, &str)]) -> Result<Detached> {
        let name = self.to_string();
        let context = rustix::mount::fsopen(name.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)
            .with_context(|| format!("this kernel does not know {self}"))?;
        let configure = || -> rustix::io::Result<OwnedFd> {
            rustix::mount::fsconfig_set_string(context.as_fd(), "source", device)?;
            match self {
                Self::Ext4 => rustix::mount::fsconfig_set_flag(context.as_fd(), "discard")?,
                Self::Xfs => {
                    rustix::mount::fsconfig_set_flag(context.as_fd(), "discard")?;
                    // A clone has the uuid of its origin, which may be mounted too.
                    rustix::mount::fsconfig_set_flag(context.as_fd(), "nouuid")?;
                }
                Self::Btrfs => {}
            }
            for (option, value) in options {
                rustix::mount::fsconfig_set_string(context.as_fd(), *option, *value)?;
            }
            rustix::mount::fsconfig_create(context.as_fd())?;
            let attributes = MountAttrFlags::MOUNT_ATTR_NOATIME
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        match configure() {
            Ok(mount) => Ok(Detached { mount }),
            Err(error) => {
                let said = kernel_messages(&context);
                Err(error).with_context(|| format!("cannot mount {} as {self}{said}", device.display()))
            }
        }
    }
}

/// Grows ext4 to so many blocks of 4 KiB, in steps: each allocates its inode tables for a moment, a 64th of what is added.
fn grow_ext4(device: &Path, blocks: u64) -> Result<()> {
    const STEP_BLOCKS: u64 = (64 << 30) / BLOCK_BYTES;
    let mut check = Command::new("e2fsck");
    // 1: something was put right, such as the journal.
    run_to(check.args(["-f", "-p"]).arg(device), "e2fsprogs", &[0, 1])?;
    let mut before = 0;
    // One with features that are not known here grows at once: it takes more space than it has to, and is right.
    while let Ok(ext4) = Ext4::open(device) {
        // The last blocks may be too few for a group.
        if ext4.blocks >= blocks || ext4.blocks == before {
            return Ok(());
        }
        before = ext4.blocks;
        resize_ext4(device, Some(blocks.min(before + STEP_BLOCKS)))?;
        if let Err(error) = empty_tables(device, ext4.groups().count()) {
            tracing::warn!("{}: it takes more space than it has to: {error:#}", device.display());
        }
    }
    resize_ext4(device, None)
}

/// Makes ext4 so many of its blocks large, or as large as its device. Inode tables are marked as zeroed at once: each clone
/// would do it after its first mount.
fn resize_ext4(device: &Path, blocks: Option<u64>) -> Result<()> {
    let mut resize = Command::new("resize2fs");
    resize.env("RESIZE2FS_FORCE_ITABLE_INIT", "1").arg(device).args(blocks.map(|blocks| blocks.to_string()));
    run(&mut resize, "e2fsprogs")
}

/// Gives back the space of the inode tables of groups that have just been added: resize2fs has them allocated, as zeros. No
/// inode is in them yet; those of earlier groups may have been moved, and are left alone.
fn empty_tables(device: &Path, first_group: usize) -> Result<()> {
    let tables = Ext4::open(device)?.tables_from(first_group);
    let device = File::options().write(true).open(device)?;
    for table in tables {
        let (offset, length) = (table.start * BLOCK_BYTES, (table.end - table.start) * BLOCK_BYTES);
        rustix::fs::fallocate(&device, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?;
    }
    Ok(device.sync_all()?)
}

/// What the kernel wrote about a mount that it refused.
fn kernel_messages(context: &OwnedFd) -> String {
    let mut said = String::new();
    let mut buffer = [0; 512];
    while let Ok(count @ 1..) = rustix::io::read(context, &mut buffer) {
        said.push_str("; ");
        said.push_str(String::from_utf8_lossy(&buffer[..count]).trim().trim_start_matches("e "));
    }
    said
}

/// A mounted file system that no mount namespace shows.
#[derive(Debug)]
#[must_use]
pub struct Detached {
    mount: OwnedFd,
}

impl Detached {
    /// Opens its root. Every descriptor below it keeps it mounted.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn root(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.mount, ".", flags, Mode::empty())?)
    }

    /// Removes what mkfs.ext4 puts in: an image's root has only what the image has.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn remove_lost_and_found(&self) -> Result<()> {
        match rustix::fs::unlinkat(&self.mount, "lost+found", AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error).context("lost+found"),
        }
    }

    /// Writes everything to the device and unmounts.
    ///
    /// # Errors
    ///
    /// Something could not be written.
    pub fn unmount(self) -> Result<()> {
        // Closing reports nothing: what cannot be written must come to light here.
        rustix::fs::syncfs(self.root()?).context("writing the file system to its volume")
    }
}

/// Runs a program that says nothing when all is well.
pub(crate) fn run(command: &mut Command, package: &str) -> Result<()> {
    run_to(command, package, &[0])
}

/// As [`run`], for a program for which all is well when it ends with one of `codes`.
fn run_to(command: &mut Command, package: &str, codes: &[i32]) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = match child {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{program} is not installed: apt-get install {package}")
        }
        other => other.with_context(|| program.clone())?,
    };
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(64 << 10).read_to_end(&mut said)?;
    }
    let status = child.wait()?;
    let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
    ensure!(status.code().is_some_and(|code| codes.contains(&code)), "{program}: {status}: {said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::cli::image::apply_archive;

    /// A loop device on a sparse file; detached when dropped.
    struct Loop {
        device: std::path::PathBuf,
        file: tempfile::NamedTempFile,
    }

    impl Loop {
        fn new(size_bytes: u64) -> Option<Self> {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(size_bytes).unwrap();
            let output = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().ok()?;
            if !output.status.success() {
                std::io::stdout().write_all(b"skipped: no loop device to be had\n").unwrap();
                return None;
            }
            Some(Self { device: String::from_utf8(output.stdout).unwrap().trim().into(), file })
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            Command::new("losetup").arg("--detach").arg(&self.device).status().ok();
        }
    }

    fn is_mounted(device: &Path) -> bool {
        let needle = format!(" {} ", device.display());
        fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&needle)
    }

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o640);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        builder.append_data(&mut header, "d/file", b"hello".as_slice()).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn every_file_system_is_made_filled_and_mounted_again_unseen() {
        for (filesystem, size_bytes) in
            [(Filesystem::Ext4, 10 << 30), (Filesystem::Xfs, 1 << 30), (Filesystem::Btrfs, 1 << 30)]
        {
            let Some(disk) = Loop::new(size_bytes) else { return };
            match filesystem.make(&disk.device) {
                Err(error) if error.to_string().contains("not installed") => continue,
                other => other.unwrap(),
            }
            let mounted = filesystem.mount(&disk.device).unwrap();
            assert!(!is_mounted(&disk.device), "{filesystem}: seen in the mount namespace");
            mounted.remove_lost_and_found().unwrap();
            apply_archive(mounted.root().unwrap(), archive().as_slice()).unwrap();
            mounted.unmount().unwrap();
            let taken = disk.file.as_file().metadata().unwrap().blocks() * 512;
            // XFS writes its whole log, 64 MiB.
            let most = if filesystem == Filesystem::Xfs { 80 << 20 } else { 24 << 20 };
            assert!(taken < most, "{filesystem}: {taken} bytes for an empty file system");
            let again = filesystem.mount(&disk.device).unwrap();
            let root = again.root().unwrap();
            let names = crate::cli::image::tree::names(root.as_fd()).unwrap();
            assert_eq!(names, [b"d".to_vec()], "{filesystem}");
            let file = rustix::fs::statat(&root, "d/file", AtFlags::empty()).unwrap();
            assert_eq!((file.st_uid, file.st_gid, file.st_mtime, file.st_mode & 0o7777), (1, 2, 3, 0o640));
            drop(root);
            again.unmount().unwrap();
        }
    }

    /// More than one step, and a last group that is not whole. Nothing of it takes space, and nothing is zeroed later.
    #[test]
    fn ext4_grows_to_its_device_and_takes_no_space() {
        let Some(disk) = Loop::new(1 << 30) else { return };
        Filesystem::Ext4.make_empty(&disk.device).unwrap();
        let before = disk.file.as_file().metadata().unwrap().blocks();
        let size_bytes: u64 = (150 << 30) + (100 << 20);
        disk.file.as_file().set_len(size_bytes).unwrap();
        assert!(Command::new("losetup").arg("--set-capacity").arg(&disk.device).status().unwrap().success());
        Filesystem::Ext4.grow(&disk.device).unwrap();
        let taken = (disk.file.as_file().metadata().unwrap().blocks() - before) * 512;
        assert!(taken < 64 << 20, "{taken} bytes for a larger file system");
        run(Command::new("e2fsck").args(["-f", "-n"]).arg(&disk.device), "e2fsprogs").unwrap();
        let told = Command::new("dumpe2fs").arg(&disk.device).output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let groups = told.lines().filter(|line| line.starts_with("Group ") && line.contains("(Blocks")).count();
        assert_eq!(groups as u64, size_bytes.div_ceil(128 << 20));
        assert_eq!(told.matches("ITABLE_ZEROED").count(), groups);
        let mounted = Filesystem::Ext4.mount(&disk.device).unwrap();
        let seen = rustix::fs::fstatvfs(mounted.root().unwrap()).unwrap();
        assert!(seen.f_blocks * seen.f_frsize > size_bytes / 100 * 97);
        mounted.unmount().unwrap();
    }

    #[test]
    fn refusal_of_the_kernel_is_told_in_its_words() {
        let Some(disk) = Loop::new(1 << 20) else { return };
        let error = format!("{:#}", Filesystem::Ext4.mount(&disk.device).unwrap_err());
        assert!(error.contains("cannot mount") && error.contains("ext4"), "{error}");
    }

    #[test]
    fn refusal_of_the_program_is_told_in_its_words() {
        let Some(disk) = Loop::new(1 << 20) else { return };
        let error = Filesystem::Xfs.make(&disk.device).unwrap_err().to_string();
        assert!(error.starts_with("mkfs.xfs"), "{error}");
    }
}

//! Pools in memory, for what must never be on a disk: the file of such a pool is alone on a tmpfs that is kept out of swap
//! (`noswap`, Linux 6.4). It goes with `plywood pool delete`, and with the machine.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};

use super::size;
use crate::daemon::protocol::Pool;
use crate::daemon::{MEMORY_DIRECTORY, NewPool, create_pool, make_private_directory, path_in_memory};
use crate::format::check_name;

/// What the file system itself wants beside the pool's file.
const OVERHEAD_BYTES: u64 = 1 << 20;

/// Creates a pool in memory that takes up to `size_bytes`.
///
/// # Errors
/// The name is no file name, or is one of a pool in memory; so much is not there; the kernel cannot keep it out of swap.
pub fn create(size_bytes: u64, name: Option<String>) -> Result<Pool> {
    let name = name.context("a pool in memory is known by its name; give one with --name")?;
    check_name(&name)?;
    ensure!(!name.starts_with('.'), "{name}: the name of a pool in memory does not begin with a dot");
    let available = available_bytes()?;
    ensure!(
        size_bytes <= available,
        "{} of memory are available, {} were asked for",
        size::show(available),
        size::show(size_bytes)
    );
    let file = path_in_memory(&name);
    let directory = Path::new(MEMORY_DIRECTORY).join(&name);
    ensure!(!file.exists(), "there is a pool {name} in memory already");
    make_private_directory(Path::new(MEMORY_DIRECTORY))?;
    make_private_directory(&directory)?;
    mount(&directory, size_bytes + OVERHEAD_BYTES).inspect_err(|_| drop(fs::remove_dir(&directory)))?;
    let new = NewPool { path: file, size_bytes: Some(size_bytes), name: Some(name), force: false };
    Ok(create_pool(&new).inspect_err(|_| drop(take_away(&directory)))?)
}

fn available_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo says nothing of MemAvailable")? << 10)
}

fn mount(directory: &Path, size_bytes: u64) -> Result<()> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("this kernel has no tmpfs")?;
    let context = context.as_fd();
    match fsconfig_set_flag(context, "noswap") {
        Err(Errno::INVAL) => bail!("this kernel's tmpfs cannot be kept out of swap; that needs Linux 6.4"),
        set => set.context("noswap")?,
    }
    fsconfig_set_string(context, "source", "plywood")?;
    fsconfig_set_string(context, "size", size_bytes.to_string().as_str())?;
    fsconfig_set_string(context, "mode", "0700")?;
    fsconfig_create(context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mounted = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(mounted.as_fd(), "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .with_context(|| directory.display().to_string())?;
    // What has a copy of it keeps the memory.
    mount_change(directory, MountPropagationFlags::PRIVATE).with_context(|| directory.display().to_string())
}

/// Whether a pool's file is in memory.
pub fn holds(file: &Path) -> bool {
    file.starts_with(MEMORY_DIRECTORY)
}

/// Takes the file system of a pool in memory away, when its file has been removed.
///
/// # Errors
/// What umount(2) and rmdir(2) say.
pub fn take_away(directory: &Path) -> Result<()> {
    unmount(directory, UnmountFlags::NOFOLLOW).with_context(|| directory.display().to_string())?;
    fs::remove_dir(directory).with_context(|| directory.display().to_string())
}

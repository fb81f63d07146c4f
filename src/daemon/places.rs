//! Where things stand outside the pool.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, Result};

/// Control sockets, and the directories that the fronts mount on.
pub const RUN_DIRECTORY: &str = "/run/plywood";
/// Where volumes of Docker and Podman are mounted, a folder a pool. Not in [`RUN_DIRECTORY`], which only root may enter:
/// a runtime looks up what it mounts as the root of the container's user namespace.
pub const VOLUMES_DIRECTORY: &str = "/run/plywood-volumes";
/// Logs of daemons in the background.
pub const LOG_DIRECTORY: &str = "/var/log/plywood";
/// Pools by name: a file of settings each (`NAME.conf`), or a symbolic link.
pub const POOLS_DIRECTORY: &str = "/etc/plywood/pools.d";

/// File systems of pools in memory, one in a directory of the pool's name each.
pub const MEMORY_DIRECTORY: &str = "/run/plywood-memory";

/// The file of a pool in memory.
pub fn path_in_memory(pool_name: &str) -> PathBuf {
    Path::new(MEMORY_DIRECTORY).join(pool_name).join("pool")
}

/// The control socket of a pool.
pub fn socket(pool: Uuid) -> PathBuf {
    Path::new(RUN_DIRECTORY).join(format!("{pool}.sock"))
}

/// Where a pool's front mounts its FUSE file system, in its own mount namespace.
pub fn mount_directory(pool: Uuid) -> PathBuf {
    Path::new(RUN_DIRECTORY).join(pool.to_string())
}

/// Pool and id of the volume that a file of a front stands for.
pub fn pool_and_volume_of(file: &Path) -> Option<(Uuid, u64)> {
    let directory = file.parent()?;
    let pool = directory.file_name()?.to_str()?.parse().ok()?;
    (directory == mount_directory(pool)).then_some((pool, file.file_name()?.to_str()?.parse().ok()?))
}

/// The log of a pool's daemon in the background. A name that is no file name is replaced by the uuid.
pub fn log(pool_name: &str, pool: Uuid) -> PathBuf {
    let plain = !pool_name.is_empty() && !pool_name.starts_with('.') && !pool_name.contains(['/', '\0']);
    let name = if plain { pool_name.to_owned() } else { pool.to_string() };
    Path::new(LOG_DIRECTORY).join(format!("{name}.log"))
}

/// Makes a directory that only its owner may enter, unless it is there.
///
/// # Errors
/// What the host says, and a directory that belongs to somebody else.
pub fn make_private_directory(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::io(format!("{}: creating the directory", path.display()), error));
        }
        _ => {}
    }
    // Whoever made it first could replace the socket in it, and be trusted.
    let metadata = fs::symlink_metadata(path).map_err(|error| Error::io(path.display().to_string(), error))?;
    let owner = rustix::process::geteuid().as_raw();
    if !metadata.is_dir() || metadata.uid() != owner || metadata.mode() & 0o022 != 0 {
        let path = path.display();
        return Err(Error::InvalidInput(format!(
            "{path} must be a directory that only its owner can write; put it right"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_pool_names_do_not_leave_the_log_directory() {
        let uuid = Uuid::from_u128(7);
        assert_eq!(log("main", uuid), Path::new("/var/log/plywood/main.log"));
        for odd in ["", "..", "../../etc/passwd", "a/b", ".hidden"] {
            assert_eq!(log(odd, uuid), Path::new(LOG_DIRECTORY).join(format!("{uuid}.log")), "{odd}");
        }
    }

    #[test]
    fn files_of_fronts_say_whose_they_are() {
        let pool = Uuid::from_u128(7);
        let file = |name: &str| mount_directory(pool).join(name);
        assert_eq!(pool_and_volume_of(&file("12")), Some((pool, 12)));
        for other in [file("x"), file("1/2"), Path::new("/home").join(pool.to_string()).join("12"), "/image".into()] {
            assert_eq!(pool_and_volume_of(&other), None, "{}", other.display());
        }
    }

    #[test]
    fn directory_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        make_private_directory(&path).unwrap();
        make_private_directory(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(make_private_directory(&path), Err(Error::InvalidInput(_))));
    }
}

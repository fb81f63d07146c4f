//! The plugin's socket, and the file that leads Docker to it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::daemon::listen_for_root;

/// A listening socket. What was made for it goes away with it.
pub struct Socket {
    listener: UnixListener,
    /// What this process made: the socket, and the file that leads to it.
    made: Vec<PathBuf>,
}

impl Socket {
    /// One that the service manager made, and will take away.
    pub fn given(listener: UnixListener) -> Self {
        Self { listener, made: Vec::new() }
    }

    /// Listens on `path`, for root alone. What a dead plugin left there is replaced.
    ///
    /// # Errors
    /// When somebody else listens there, or `path` is something else than a socket.
    pub fn bind(path: &Path, spec: Option<&Path>) -> Result<Self> {
        ensure!(path.is_absolute(), "{}: the socket's path must be absolute", path.display());
        let listener = listen_for_root(path)?;
        let mut socket = Self { listener, made: vec![path.to_owned()] };
        if let Some(spec) = spec {
            write_spec(spec, path).with_context(|| spec.display().to_string())?;
            socket.made.push(spec.to_owned());
        }
        Ok(socket)
    }

    /// The socket itself.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    pub fn describe(&self) -> String {
        let address = self.listener.local_addr().ok();
        let path = self.made.first().cloned().or_else(|| address?.as_pathname().map(Path::to_owned));
        path.map_or_else(|| "a socket without a name".into(), |path| path.display().to_string())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        for path in &self.made {
            if let Err(error) = fs::remove_file(path) {
                tracing::debug!(%error, "{}", path.display());
            }
        }
    }
}

/// Docker reads it whenever it looks for the plugin: it is there whole, or not.
fn write_spec(spec: &Path, socket: &Path) -> Result<()> {
    let parent = spec.parent().context("a file's path")?;
    fs::create_dir_all(parent)?;
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    writeln!(file, "unix://{}", socket.display())?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    file.persist(spec)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_of_the_dead_is_replaced_and_of_the_living_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (path, spec) = (folder.path().join("a/plug.sock"), folder.path().join("b/plug.spec"));
        // A dead plugin's: nobody took it away.
        fs::create_dir(folder.path().join("a")).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        let socket = Socket::bind(&path, Some(&spec)).unwrap();
        assert_eq!(socket.describe(), path.display().to_string());
        assert_eq!(fs::read_to_string(&spec).unwrap(), format!("unix://{}\n", path.display()));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Socket::bind(&path, None).is_err_and(|error| error.to_string().contains("listens there")));
        drop(socket);
        assert!(!path.exists() && !spec.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "mine").unwrap();
        assert!(Socket::bind(&path, None).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert!(Socket::bind(Path::new("relative.sock"), None).is_err());
    }
}

//! A socket that a process of ours listens on, for root alone.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::error::{Error, Result};

/// Listens on `path`. What nobody listens on any more is replaced; nothing else is.
///
/// # Errors
/// [`Error::Busy`] when somebody listens there, [`Error::InvalidInput`] when it is something else than a socket.
pub fn listen_for_root(path: &Path) -> Result<UnixListener> {
    let failed = |error| Error::io(format!("{}: listening", path.display()), error);
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed)?;
    }
    let is_socket = || fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    match UnixStream::connect(path) {
        Ok(_) => {
            return Err(Error::Busy(format!(
                "{}: somebody listens there already; stop that or give another --socket",
                path.display()
            )));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket() => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let words = format!("{} is there and no socket; give another --socket, or remove it", path.display());
            return Err(Error::InvalidInput(words));
        }
        Err(error) => return Err(failed(error)),
    }
    // Under another name until nobody but root can connect to it.
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    fs::rename(&fresh, path).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_of_the_dead_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/socket");
        let living = listen_for_root(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(listen_for_root(&path), Err(Error::Busy(_))));
        drop(living);
        // Another test's program, between fork and exec, may have it a moment longer.
        let again = std::iter::repeat_with(|| listen_for_root(&path)).take(1000);
        let again = again.inspect(|_| std::thread::sleep(std::time::Duration::from_millis(10)));
        let mut again = again.skip_while(|outcome| matches!(outcome, Err(Error::Busy(_))));
        drop(again.next().expect("nobody listens there").unwrap());
        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(listen_for_root(&file), Err(Error::InvalidInput(_))));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}

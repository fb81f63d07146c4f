//! The directory in which the demo works, and what is in it: taken away at the end, however that comes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::Story;
use crate::cli::Context;
use crate::cli::image::Source;
use crate::daemon::protocol::{Command as Ask, Hello};
use crate::daemon::{Client, NewPool, create_pool, log_path, wait_until_gone};

/// The pool is sparse: its size costs nothing.
const POOL_BYTES: u64 = 64 << 30;

/// The demo's directory.
#[derive(Debug)]
pub struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    /// Makes it below `parent`.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub fn make(parent: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("plywood-demo-").tempdir_in(parent);
        Ok(Self { directory: directory.with_context(|| parent.display().to_string())? })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The pool's file.
    pub fn pool_path(&self) -> PathBuf {
        self.path().join("demo.plywood")
    }

    /// Takes it away.
    ///
    /// # Errors
    ///
    /// Something in it is still in use.
    pub fn clear(self) -> Result<()> {
        let path = self.path().display().to_string();
        self.directory.close().with_context(|| format!("{path} could not be removed"))
    }
}

/// A pool with its daemon. Dropping it ends the daemon.
pub struct DemoPool {
    /// The way to it.
    pub client: Client,
    hello: Hello,
}

impl DemoPool {
    /// Creates the pool, and starts its daemon.
    ///
    /// # Errors
    ///
    /// What either says.
    pub fn create(place: &Place) -> Result<Self> {
        let path = place.pool_path();
        let unique = std::process::id();
        let name = Some(format!("demo-{unique}"));
        create_pool(&NewPool { path: path.clone(), size_bytes: Some(POOL_BYTES), name, force: false })?;
        let context = Context { pool: Some(path.display().to_string()), json: false, take_over: false };
        let client = context.daemon_client()?;
        let hello = client.hello()?;
        Ok(Self { client, hello })
    }
}

impl Drop for DemoPool {
    fn drop(&mut self) {
        if let Err(error) = self.client.call(Ask::Stop { force: true }) {
            tracing::warn!(%error, "the demo's daemon could not be stopped");
            return;
        }
        if let Err(error) = wait_until_gone(self.hello.front_pid) {
            tracing::warn!(%error, "the demo's daemon has not ended");
        }
        // Nobody will look for the log of a pool that is gone.
        fs::remove_file(log_path(&self.hello.pool_name, self.hello.pool_uuid)).ok();
    }
}

/// The root file system to start from: the one that was given, or a Debian made now.
///
/// # Errors
///
/// mmdebstrap is not installed, or fails.
pub fn root_file_system(story: &Story, place: &Place) -> Result<Source> {
    if let Some(given) = &story.arguments.rootfs {
        let path = Path::new(given);
        return if path.exists() { Ok(Source::Tar(path.to_owned())) } else { Source::parse(given) };
    }
    let archive = place.path().join("rootfs.tar");
    let log = place.path().join("mmdebstrap.log");
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=essential", &suite()]).arg(&archive);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?).spawn();
    let mut child = match child {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("mmdebstrap is not installed: apt-get install mmdebstrap, or give a root file system with --rootfs")
        }
        other => other.context("mmdebstrap")?,
    };
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let (Err(interrupted), Some(process)) =
            (story.check(), i32::try_from(child.id()).ok().and_then(Pid::from_raw))
        {
            // It cleans up after itself when it is asked to end.
            kill_process(process, Signal::TERM).ok();
            child.wait()?;
            return Err(interrupted);
        }
        thread::sleep(Duration::from_millis(50));
    };
    story.check()?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    ensure!(status.success(), "mmdebstrap: {status}: {last}");
    Ok(Source::Tar(archive))
}

/// The host's own release where it is a Debian, else the stable one.
fn suite() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    match (value("ID").as_deref(), value("VERSION_CODENAME")) {
        (Some("debian"), Some(codename)) => codename,
        _ => "stable".to_owned(),
    }
}

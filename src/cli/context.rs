//! What every command needs: which pool, in what form to print, and the way to the pool.

use anyhow::{Result, bail};

use crate::daemon::Client;

/// The options that all commands share.
#[derive(Clone, Debug, clap::Args)]
pub struct Context {
    /// The pool: its file, or the name of one that is in use or listed in /etc/plywood/pools.d
    #[arg(long, global = true, env = "PLYWOOD_POOL", value_name = "FILE|NAME")]
    pub pool: Option<String>,

    /// Print JSON with a version field
    #[arg(long, global = true)]
    pub json: bool,
}

impl Context {
    /// A client of the pool: through its daemon when it is in use, on the file otherwise.
    ///
    /// # Errors
    /// When no pool is named, or there is none.
    pub fn client(&self) -> Result<Client> {
        bail!("not connected yet")
    }

    /// A client of the pool's daemon, which is started when it does not run.
    ///
    /// # Errors
    /// When no pool is named, there is none, or the daemon does not start.
    pub fn daemon_client(&self) -> Result<Client> {
        bail!("not connected yet")
    }
}

//! What every command needs: which pool, in what form to print, and the way to the pool.

use std::io::{self, Write};

use anyhow::Result;

use super::Usage;
use super::output::Waiting;
use crate::daemon::{self, Client, FoundPool};
use crate::error::Error;

/// The options that all commands share.
#[derive(Clone, Debug, clap::Args)]
pub struct Context {
    /// The pool: its file, or the name of one that is in use or listed in /etc/plywood/pools.d
    #[arg(long, global = true, env = "PLYWOOD_POOL", value_name = "FILE|NAME")]
    pub pool: Option<String>,

    /// Print JSON with a version field
    #[arg(long, global = true)]
    pub json: bool,

    /// Use a pool on a device that another host has not left; if that host is not off, and writes again, the pool is
    /// destroyed
    #[arg(long, global = true)]
    pub take_over: bool,
}

impl Context {
    /// The pool that `--pool` or `PLYWOOD_POOL` names.
    ///
    /// # Errors
    /// [`Usage`] when none is named, and what keeps it from being found.
    pub fn find_pool(&self) -> Result<FoundPool> {
        let named = self.pool.as_deref().filter(|named| !named.is_empty());
        let named = named.ok_or(Usage("no pool is named; give --pool FILE|NAME or set PLYWOOD_POOL"))?;
        let found = daemon::find_pool(named)?;
        if self.take_over {
            let _waiting = Waiting::begin("watching for signs of life of another host");
            if let Some(host) = daemon::take_over(&found)? {
                let risk = "make sure that it is off: if it writes again, the pool is destroyed";
                // Nobody to tell is no reason to stop.
                let _ = writeln!(io::stderr(), "plywood: pool {} was taken over from host {host}; {risk}", found.name);
            }
        }
        Ok(found)
    }

    /// As [`find_pool`](Self::find_pool), also one of which a restore or repair was not finished.
    ///
    /// # Errors
    /// As [`find_pool`](Self::find_pool).
    pub fn find_unfinished_pool(&self) -> Result<FoundPool> {
        match (self.find_pool(), &self.pool) {
            (Err(error), Some(named)) if matches!(error.downcast_ref(), Some(Error::Unfinished(_))) => {
                Ok(daemon::find_unfinished(named)?)
            }
            (found, _) => found,
        }
    }

    /// A client of the pool: through its daemon when it is in use, on the file otherwise.
    ///
    /// # Errors
    /// When no pool is named, or there is none.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::open(&self.find_pool()?)?)
    }

    /// A client of the pool's daemon, which is started when it does not run and the pool has a volume of that name.
    ///
    /// # Errors
    /// As [`daemon_client`](Self::daemon_client), and when there is no such volume.
    pub fn daemon_client_for(&self, volume: &str) -> Result<Client> {
        let found = self.find_pool()?;
        if daemon::running(&found)?.is_none() {
            // Nothing is started, to stay, for a name that does not exist.
            Client::open(&found)?.volume(volume)?;
        }
        self.daemon_client()
    }

    /// A client of the pool's daemon, which is started when it does not run.
    ///
    /// # Errors
    /// When no pool is named, there is none, or the daemon does not start.
    pub fn daemon_client(&self) -> Result<Client> {
        let found = self.find_pool()?;
        let _waiting = Waiting::begin("starting the pool's daemon");
        Ok(daemon::start(&found)?)
    }
}

//! The course of a container: from a root that is mounted to one that has been taken down.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::bundle::{self, Settings};
use super::container::Container;
use super::detached;
use super::logs::{self, Log};
use super::mounts::{Volumes, Wanted};
use super::runtime::{self, Streams};
use crate::cli::image::{Interrupt, labels};
use crate::daemon::Client;

/// How a container is run; kept with it for its next start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Terms {
    /// Its process.
    pub settings: Settings,
    /// What it sees beside its root.
    pub wanted: Vec<Wanted>,
    /// When a file of its log is full, where it runs in the background.
    pub log_bytes: u64,
    /// It goes when its command has ended.
    pub thrown_away: bool,
}

/// Runs a container until it ends, and takes it down; `detached` where this process looks after it in the background. Answers
/// the command's exit code; 128 and the signal's number when a signal ended it.
///
/// # Errors
///
/// It cannot be set up, or not be taken down.
pub fn conduct(
    client: &Client,
    mut container: Container<'_>,
    terms: Terms,
    detached: bool,
    interrupt: &Interrupt,
) -> Result<ExitCode> {
    let Terms { mut settings, wanted, log_bytes, thrown_away } = terms;
    let name = container.volume.name.clone();
    let (volumes, mounts) = Volumes::mount(client, &container.id, &container.root(), &wanted, interrupt)?;
    settings.mounts = mounts;
    if settings.hostname.is_empty() {
        settings.hostname.clone_from(&container.id);
    }
    if !volumes.uuids.is_empty() {
        let listed = serde_json::json!(volumes.uuids).to_string();
        let noted = BTreeMap::from([(labels::CONTAINER_VOLUMES.to_owned(), Some(listed.as_str().into()))]);
        client.set_attributes(&name, noted)?;
    }
    bundle::write(&container.bundle, &settings).with_context(|| name.clone())?;
    ensure!(!interrupt.load(Ordering::Relaxed), "interrupted by a signal");
    let (pool, volume) = (client.pool_uuid()?, container.volume.uuid);
    let log = detached.then(|| Log::begin(pool, volume, log_bytes)).transpose()?;
    let mut has_started = false;
    let status = {
        let started = || {
            has_started = true;
            if log.is_some() {
                detached::started(&name);
            }
        };
        let streams = log.as_ref().map_or(Streams::Own, Streams::Log);
        runtime::run(&container.bundle, &container.id, streams, started)
    };
    runtime::remove(&container.id);
    if has_started {
        // From here on it is a container that has run: it stays unless it was said otherwise.
        container.keep = !thrown_away;
    }
    let keep = container.keep;
    let noted = match &status {
        Ok(status) if keep && has_started => {
            let code = code(*status).to_string();
            let noted = BTreeMap::from([(labels::CONTAINER_EXIT.to_owned(), Some(code.as_str().into()))]);
            // It may have been renamed, and its name be another's.
            let now = client.name_of(volume, &name);
            now.and_then(|now| now.map_or(Ok(()), |now| client.set_attributes(&now, noted)))
        }
        _ => Ok(()),
    };
    let closed = volumes.close().and(container.close());
    let said = (log.is_some() && !has_started).then(|| logs::last_line(pool, volume)).flatten();
    if log.is_some() && !keep {
        logs::remove(pool, volume)?;
    }
    let status = status?;
    closed?;
    noted?;
    if let Some(said) = said {
        bail!("the container did not start: {said}");
    }
    Ok(ExitCode::from(code(status)))
}

fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code & 0xff).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_pass_through_and_signals_are_told() {
        assert_eq!(code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(code(ExitStatus::from_raw(9)), 137);
    }
}

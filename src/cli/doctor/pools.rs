//! The pools that can be found, in use or not, and what dead daemons left of theirs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::{Finding, Verdict};
use crate::cli::Context;
use crate::daemon::protocol::{Command, Pool, Reply};
use crate::daemon::{self, Client, FoundPool, POOLS_DIRECTORY, RUN_DIRECTORY};
use crate::export::loopdev;

/// A pool, and its daemon where one serves it.
pub(super) struct Patient {
    pub(super) found: FoundPool,
    pub(super) client: Option<Client>,
}

/// The pool that is named, those that daemons serve, and those that are listed. One that cannot be found is a finding.
pub(super) fn find(context: &Context, findings: &mut Vec<Finding>) -> Vec<Patient> {
    let mut paths: BTreeSet<PathBuf> = BTreeSet::new();
    paths.extend(daemon::running_daemons().iter().filter_map(|client| Some(client.hello().ok()?.pool_path)));
    let listed = fs::read_dir(POOLS_DIRECTORY).into_iter().flatten().flatten();
    paths.extend(listed.map(|entry| entry.path()).filter(|path| path.extension().is_none()));
    let mut pools: Vec<Patient> = Vec::new();
    let named =
        context.pool.is_some().then(|| (context.pool.clone().unwrap_or_default(), context.find_unfinished_pool()));
    let others =
        paths.into_iter().map(|path| (path.display().to_string(), daemon::identify(&path).map_err(Into::into)));
    for (name, found) in named.into_iter().chain(others) {
        match found {
            Ok(found) if pools.iter().any(|pool| pool.found.path == found.path) => {}
            Ok(found) => {
                let client = daemon::running(&found).ok().flatten();
                pools.push(Patient { found, client });
            }
            Err(error) => {
                let what = format!("pool {name}");
                findings.push(Finding::bad(&what, format!("{error:#}"), "plywood pool check says more"));
            }
        }
    }
    pools
}

/// Looks at each pool: where it lies, and how it is.
pub(super) fn look(pools: &[Patient], findings: &mut Vec<Finding>) {
    if pools.is_empty()
        && findings.iter().all(|finding| finding.verdict != Verdict::Bad || !finding.what.starts_with("pool "))
    {
        let advice = format!("name one with --pool, or list it in {POOLS_DIRECTORY}");
        findings.push(Finding::ok("pools", format!("none found; {advice}")));
    }
    for Patient { found, client } in pools {
        let what = format!("pool {}", found.name);
        if let Some(unfinished) = found.unfinished {
            let error = crate::error::Error::from(unfinished);
            findings.push(Finding::bad(&what, "work on its metadata was cut short", error.to_string()));
            continue;
        }
        findings.push(direct_io(&what, &found.path));
        match client.as_ref().map(|client| client.call(Command::PoolInfo)) {
            None => findings.push(Finding::ok(&what, format!("{}, not in use", found.path.display()))),
            Some(Ok(Reply::Pool(pool))) => findings.extend(in_use(&what, &pool)),
            Some(Ok(_)) => findings.push(Finding::bad(&what, "an unexpected answer", "plywood upgrade")),
            Some(Err(failure)) => {
                findings.push(Finding::bad(&what, format!("its daemon does not answer: {failure}"), "see its log"));
            }
        }
    }
}

/// Whether its host takes direct I/O, without which a pool is refused.
fn direct_io(what: &str, path: &Path) -> Finding {
    let what = format!("{what}: direct I/O");
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Finding::ok(&what, "taken by the host"),
        Err(error) => {
            let advice = "keep the pool on ext4, xfs or a block device";
            Finding::bad(&what, format!("{}: {error}", path.display()), advice)
        }
    }
}

/// A pool that a daemon serves.
fn in_use(what: &str, pool: &Pool) -> Vec<Finding> {
    let mut findings = Vec::new();
    match &pool.poisoned {
        Some(reason) => {
            let advice = "see to its disk, stop the daemon, plywood pool check";
            findings.push(Finding::bad(what, format!("takes no more writes: {reason}"), advice));
        }
        None => findings.push(Finding::ok(what, format!("in use, {} attached", pool.attached.len()))),
    }
    if let Some(scrub) = pool.scrub.as_ref().filter(|scrub| scrub.fault_count > 0) {
        let found = format!("the last scrub found {} faults that it could not mend", scrub.fault_count);
        findings.push(Finding::bad(&format!("{what}: scrub"), found, "plywood pool check names what they touch"));
    }
    let space = format!("{what}: space");
    let filled = format!("{} % used", pool.filled_percent);
    findings.push(match pool.thresholds.iter().rev().find(|threshold| threshold.reached) {
        Some(_) => {
            let advice = "delete snapshots, plywood pool trim, or plywood pool grow";
            Finding::warning(&space, filled, advice)
        }
        None => Finding::ok(&space, filled),
    });
    let restarts = pool.engine_restarts.unwrap_or(0);
    if restarts > 0 {
        let found = format!("was started again {restarts} times");
        findings.push(Finding::warning(&format!("{what}: engine"), found, "see its log, unless these were upgrades"));
    }
    findings
}

/// What daemons that have died left: loop devices, mounts, sockets.
pub(super) fn look_for_remains(findings: &mut Vec<Finding>) {
    let living: Vec<Pool> = daemon::running_daemons()
        .iter()
        .filter_map(|client| match client.call(Command::PoolInfo) {
            Ok(Reply::Pool(pool)) => Some(*pool),
            _ => None,
        })
        .collect();
    let what = "loop devices of dead daemons";
    match loopdev::list_ours() {
        Ok(ours) => {
            let served =
                |device: &Path| living.iter().any(|pool| pool.attached.iter().any(|known| known.device == device));
            let dead: Vec<String> = ours
                .into_iter()
                .filter(|ours| !served(&ours.device))
                .map(|ours| format!("{} (volume {} of pool {})", ours.device.display(), ours.volume, ours.pool))
                .collect();
            findings.push(remains(
                what,
                &dead,
                "unmount what is on them and start the pool's daemon, or losetup --detach",
            ));
        }
        Err(error) => findings.push(Finding::warning(what, error.to_string(), "run the doctor as root")),
    }
    let mounts: Vec<String> = daemon::mounts::own_mounts()
        .unwrap_or_default()
        .into_iter()
        .filter(|mount| mount.mount_point.starts_with(RUN_DIRECTORY) && mount.file_system.starts_with("fuse"))
        // A daemon mounts in a namespace of its own: what others see is no living one's.
        .map(|mount| mount.mount_point.display().to_string())
        .collect();
    findings.push(remains("mounts of dead daemons", &mounts, "umount --lazy them"));
    let sockets: Vec<String> = fs::read_dir(RUN_DIRECTORY)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "sock"))
        .filter(|path| !living.iter().any(|pool| path.file_stem().is_some_and(|stem| *stem == *pool.uuid.to_string())))
        .map(|path| path.display().to_string())
        .collect();
    findings.push(remains("sockets without a daemon", &sockets, "the pool's next daemon takes its own away"));
}

fn remains(what: &str, found: &[String], advice: &str) -> Finding {
    if found.is_empty() { Finding::ok(what, "none") } else { Finding::warning(what, found.join(", "), advice) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::protocol::{ScrubStatus, Threshold};

    #[test]
    fn pool_in_use_is_judged_by_what_it_says() {
        let sound = Pool::default();
        assert!(in_use("pool a", &sound).iter().all(|finding| finding.verdict == Verdict::Ok));
        let bad = Pool {
            poisoned: Some("a flush failed".into()),
            scrub: Some(ScrubStatus { fault_count: 3, ..ScrubStatus::default() }),
            thresholds: vec![Threshold { percent: 80, reached: true }],
            engine_restarts: Some(2),
            ..Pool::default()
        };
        let verdicts: Vec<_> = in_use("pool a", &bad).into_iter().map(|finding| finding.verdict).collect();
        assert_eq!(verdicts, [Verdict::Bad, Verdict::Bad, Verdict::Warning, Verdict::Warning]);
    }
}

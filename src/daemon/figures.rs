//! A pool in use in figures: what `pool info` shows, and what is looked at again and again.

use super::execute::{Control, Medium, now_ns};
use super::protocol::{Figures, Pool, Recovered, VolumeFigures, Work};
use super::scrub;
use super::thresholds::Level;
use super::watch::space;
use crate::engine::PoolInfo;
use crate::export::server::counters::IoCounters;
use crate::units::VolumeId;

/// The pool as it is told to clients.
pub fn pool_info<S: Medium>(control: &Control<S>) -> Pool {
    let info = control.pool.info();
    let volumes = control.pool.volumes();
    let snapshots = volumes.iter().filter(|volume| volume.read_only).count() as u64;
    let daemon = control.daemon.as_ref();
    let space = space(control, &info);
    let background = background(control, &info, snapshots);
    let level = control.told.level.get().unwrap_or_else(|| Level::of(space.percent()));
    Pool {
        uuid: info.uuid,
        name: info.name,
        path: control.path.clone(),
        size_bytes: info.size_bytes,
        used_bytes: info.used_bytes,
        own_bytes: info.own_bytes,
        kept_bytes: info.kept_bytes,
        live_bytes: info.kept_bytes.map(|kept| kept + info.own_bytes),
        metadata_bytes: info.metadata_bytes,
        free_bytes: info.size_bytes.saturating_sub(info.used_bytes + info.head_bytes),
        head_bytes: info.head_bytes,
        layout_bytes: info.layout_bytes,
        journal_bytes: info.journal_bytes,
        journal_used_bytes: info.journal_used_bytes,
        reserve_bytes: info.reserve_bytes,
        host_bytes: control.medium.host_bytes(),
        host_free_bytes: space.host_free_bytes,
        filled_percent: space.percent(),
        thresholds: level.thresholds(),
        recovered: recovered(control),
        attached: control.devices.borrow().values().cloned().collect(),
        background,
        virtual_bytes: info.virtual_bytes,
        reserved_bytes: info.reserved_bytes,
        owed_bytes: info.owed_bytes,
        generation: info.generation.0,
        clock: info.clock.0,
        volumes: volumes.len() as u64 - snapshots,
        snapshots,
        carcasses: info.carcasses,
        freeing: info.freeing,
        size_limit_bytes: info.size_limit_bytes,
        waiting: info.waiting,
        sealed: info.sealed,
        verify_on_read: info.verify_on_read,
        scrub: scrub::status(&control.pool),
        poisoned: info.poisoned,
        transport: daemon.map(|facts| facts.transport.clone()),
        front_pid: daemon.map(|facts| facts.front_pid),
        engine_pid: daemon.map(|facts| facts.engine_pid),
        engine_restarts: daemon.map(|facts| facts.engine_restarts),
    }
}

/// What the opening of the pool did over again.
fn recovered<S: Medium>(control: &Control<S>) -> Option<Recovered> {
    let counters = control.pool.counters();
    (counters.records_replayed > 0).then_some(Recovered {
        at_ns: control.told.opened_ns,
        changes: counters.records_replayed,
        changes_from_memory: counters.records_recovered,
    })
}

/// What goes on beside the requests.
fn background<S: Medium>(control: &Control<S>, info: &PoolInfo, snapshots: u64) -> Vec<Work> {
    let mut works = Vec::new();
    let mut add = |what: &str, done, of| works.push(Work { what: what.to_owned(), done, of });
    let activity = control.pool.activity();
    if activity.checkpointing {
        add("checkpoint", None, None);
    }
    if activity.growing {
        add("preparing space on the host", None, None);
    }
    if info.carcasses > 0 {
        add("giving back what was deleted, trees left", None, Some(info.carcasses));
    } else if info.freeing {
        add("giving back what was deleted, with the next checkpoint", None, None);
    }
    if control.told.sealing.get() {
        add("sealing snapshots", Some(info.sealed), Some(snapshots));
    }
    if let Some(progress) = control.checking.get() {
        add("check, blocks", Some(progress.reached_blocks), Some(progress.used_blocks));
    }
    if let Some(scrub) = scrub::status(&control.pool).filter(|scrub| scrub.under_way) {
        add("scrub, bytes", Some(scrub.position_bytes), Some(info.size_bytes));
    }
    works
}

/// What the volumes do whose requests are counted in `io`.
pub(super) fn figures<S: Medium>(control: &Control<S>, io: &[(VolumeId, IoCounters)]) -> Figures {
    let devices = control.devices.borrow();
    let volumes = io.iter().filter_map(|(id, io)| {
        let volume = control.pool.volume_by_id(*id).ok()?;
        Some(VolumeFigures {
            id: id.0,
            name: volume.name,
            snapshot: volume.read_only,
            device: devices.get(id).map(|attachment| attachment.device.clone()),
            size_bytes: volume.size_bytes,
            own_bytes: volume.own_bytes,
            mapped_bytes: volume.mapped_bytes,
            exclusive_bytes: volume.exclusive.map(|exclusive| exclusive.bytes),
            exclusive_age_seconds: volume.exclusive.map(|exclusive| exclusive.age_seconds),
            blocks_redirected: control.pool.blocks_redirected(*id),
            io: *io,
        })
    });
    Figures {
        taken_ns: now_ns(),
        since_ns: control.told.opened_ns,
        pool: pool_info(control),
        counters: control.pool.counters(),
        punching: control.medium.punching(),
        volumes: volumes.collect(),
    }
}

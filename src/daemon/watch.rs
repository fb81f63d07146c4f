//! Looks at a pool in use once a second, and tells what has changed: thresholds, growth, poisoning, damage that reads met,
//! and the engine's own work. Commands tell of themselves; this is what nobody asked for.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::events::{Draft, EventRing};
use super::execute::{Control, Medium, now_ns};
use super::protocol::EventKind;
use super::size_words;
use super::thresholds::{Crossing, Level, Space};
use crate::engine::{Counters, PoolInfo};
use crate::export::server::counters::IoCounters;
use crate::units::{BLOCK_BYTES, Generation, VolumeId};

/// Seconds without a block sealed after which sealing in the background is taken to have ended.
const SEALING_TICKS: u32 = 3;

/// What is known of a pool beside what the engine knows.
#[derive(Debug)]
pub struct Told {
    /// What has happened.
    pub(super) events: Arc<EventRing>,
    /// When the engine opened the pool, in nanoseconds since 1970.
    pub(super) opened_ns: u64,
    /// Thresholds that are reached; none known where nobody looks once a second.
    pub(super) level: Cell<Option<Level>>,
    /// Snapshots are sealed in the background.
    pub(super) sealing: Cell<bool>,
}

impl Told {
    /// Nothing yet, of the engine process that has `before` predecessors.
    pub(super) fn new(before: u64) -> Self {
        Self {
            events: Arc::new(EventRing::new(before)),
            opened_ns: now_ns(),
            level: Cell::new(None),
            sealing: Cell::new(false),
        }
    }
}

/// The space of a pool, of which `info` is known.
pub(super) fn space<S: Medium>(control: &Control<S>, info: &PoolInfo) -> Space {
    let head_bytes = info.head_bytes;
    Space {
        used_bytes: info.used_bytes,
        size_bytes: info.size_bytes.max(info.size_limit_bytes).saturating_sub(head_bytes),
        host_bytes: control.medium.host_bytes().saturating_sub(head_bytes),
        host_free_bytes: control.medium.host_free_bytes(),
    }
}

/// A look at a pool.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) info: PoolInfo,
    pub(super) space: Space,
    pub(super) counters: Counters,
    /// Damaged reads by volume.
    pub(super) damaged: BTreeMap<VolumeId, u64>,
}

impl Look {
    /// At a pool, whose volumes' requests are counted in `io`.
    pub(super) fn at<S: Medium>(control: &Control<S>, io: &[(VolumeId, IoCounters)]) -> Self {
        let info = control.pool.info();
        let damaged = io.iter().map(|(volume, counters)| (*volume, counters.read.damaged)).collect();
        Self { space: space(control, &info), counters: control.pool.counters(), info, damaged }
    }
}

/// What a look has shown.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// To be told; those about a volume have its id instead of its name.
    pub(super) drafts: Vec<(Option<VolumeId>, Draft)>,
    /// Thresholds that were crossed.
    pub(super) crossed: Vec<Crossing>,
    /// What has been written since the last checkpoint would cross a threshold: only the next checkpoint can tell.
    pub(super) wants_checkpoint: bool,
}

/// What the looks before have shown.
pub(super) struct Watcher {
    level: Level,
    last: Look,
    /// Generation of the last checkpoint, and the blocks taken until then.
    generation: (Generation, u64),
    quiet_ticks: Option<u32>,
}

impl Watcher {
    /// Begins with what is now. `level` is what a predecessor has told of already.
    pub(super) fn new(first: Look, level: Level) -> Self {
        let generation = (first.info.generation, taken(&first.counters));
        Self { level, last: first, generation, quiet_ticks: None }
    }

    /// Thresholds that are reached.
    pub(super) fn level(&self) -> Level {
        self.level
    }

    /// How much of all space is used.
    pub(super) fn percent(&self) -> u64 {
        self.last.space.percent()
    }

    /// Snapshots are sealed in the background.
    pub(super) fn is_sealing(&self) -> bool {
        self.quiet_ticks.is_some()
    }

    /// Compares a look with the one before.
    pub(super) fn look(&mut self, look: Look) -> Seen {
        let mut seen = Seen::default();
        self.look_at_space(&look, &mut seen);
        self.look_at_state(&look, &mut seen);
        self.look_at_work(&look, &mut seen);
        self.last = look;
        seen
    }

    fn look_at_space(&mut self, look: &Look, seen: &mut Seen) {
        let percent = look.space.percent();
        seen.crossed = self.level.look(percent);
        for Crossing { percent: threshold, upwards } in &seen.crossed {
            let available = size_words(look.space.available_bytes());
            let text = if *upwards {
                format!("{threshold} % reached: {percent} % of the space is used, {available} are left")
            } else {
                format!("below {threshold} % again: {percent} % of the space is used, {available} are left")
            };
            seen.drafts.push((None, Draft::new(EventKind::Threshold, text)));
        }
        let (generation, taken_then) = &mut self.generation;
        if *generation != look.info.generation {
            (*generation, *taken_then) = (look.info.generation, taken(&look.counters));
        }
        // Used blocks are known as of the last checkpoint. What was taken since then may have been given back as well.
        let since_bytes = taken(&look.counters).saturating_sub(*taken_then) * BLOCK_BYTES;
        let guess = Space { used_bytes: look.space.used_bytes + since_bytes, ..look.space };
        seen.wants_checkpoint = Level::of(guess.percent()).number() > self.level.number();
    }

    fn look_at_state(&self, look: &Look, seen: &mut Seen) {
        let last = &self.last;
        let mut tell = |kind, text: String| seen.drafts.push((None, Draft::new(kind, text)));
        if let (Some(reason), None) = (&look.info.poisoned, &last.info.poisoned) {
            tell(EventKind::Poisoned, format!("no more writes: {reason}"));
        }
        if look.info.size_bytes > last.info.size_bytes {
            let (before, now) = (size_words(last.info.size_bytes), size_words(look.info.size_bytes));
            tell(EventKind::Grown, format!("from {before} to {now}"));
        }
        let copies = look.counters.second_copies_used.saturating_sub(last.counters.second_copies_used);
        if copies > 0 {
            let text =
                format!("{copies} blocks of metadata are damaged, and their second copies were used; scrub the pool");
            tell(EventKind::Damage, text);
        }
        for (volume, damaged) in &look.damaged {
            let more = damaged.saturating_sub(last.damaged.get(volume).copied().unwrap_or(0));
            if more > 0 {
                let text = format!("{more} reads met damage and were refused");
                seen.drafts.push((Some(*volume), Draft::new(EventKind::Damage, text)));
            }
        }
    }

    fn look_at_work(&mut self, look: &Look, seen: &mut Seen) {
        let mut tell = |kind, text: &str| seen.drafts.push((None, Draft::new(kind, text)));
        const FREEING: &str = "giving back what was deleted";
        match (self.last.info.carcasses, look.info.carcasses) {
            (0, 1..) => tell(EventKind::Began, FREEING),
            (1.., 0) => tell(EventKind::Ended, FREEING),
            _ => {}
        }
        const SEALING: &str = "sealing snapshots";
        let seals = look.counters.seal_blocks_read > self.last.counters.seal_blocks_read;
        self.quiet_ticks = match self.quiet_ticks {
            None if seals => {
                tell(EventKind::Began, SEALING);
                Some(0)
            }
            Some(_) if seals => Some(0),
            Some(quiet) if quiet + 1 >= SEALING_TICKS => {
                tell(EventKind::Ended, SEALING);
                None
            }
            quiet => quiet.map(|quiet| quiet + 1),
        };
    }
}

/// Blocks that were taken for data since the pool was opened.
fn taken(counters: &Counters) -> u64 {
    counters.blocks_provisioned + counters.blocks_redirected
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Clock, Lsn};

    const GIB: u64 = 1 << 30;

    fn look() -> Look {
        let info = PoolInfo {
            uuid: uuid::Uuid::nil(),
            name: "main".into(),
            size_bytes: 10 * GIB,
            used_bytes: GIB,
            own_bytes: 0,
            kept_bytes: None,
            metadata_bytes: None,
            head_bytes: 0,
            layout_bytes: 0,
            journal_bytes: 0,
            journal_used_bytes: 0,
            ready_bytes: 0,
            reserve_bytes: 0,
            groups_in_use: 0,
            groups: 0,
            generation: Generation(1),
            clock: Clock(1),
            last_lsn: Lsn(0),
            durable_lsn: Lsn(0),
            volumes: 0,
            virtual_bytes: 0,
            reserved_bytes: 0,
            owed_bytes: 0,
            carcasses: 0,
            freeing: false,
            dirty_nodes: 0,
            size_limit_bytes: 0,
            waiting: 0,
            verify_on_read: false,
            sealed: 0,
            poisoned: None,
        };
        let space = Space { used_bytes: GIB, size_bytes: 10 * GIB, host_bytes: GIB, host_free_bytes: None };
        Look { info, space, counters: Counters::default(), damaged: BTreeMap::from([(VolumeId(7), 1)]) }
    }

    fn told(seen: &Seen) -> Vec<(EventKind, &str)> {
        seen.drafts.iter().map(|(_, draft)| (draft.kind, draft.text.as_str())).collect()
    }

    #[test]
    fn nothing_new_is_not_told() {
        let mut watcher = Watcher::new(look(), Level::default());
        let seen = watcher.look(look());
        assert!(seen.drafts.is_empty() && seen.crossed.is_empty() && !seen.wants_checkpoint);
    }

    #[test]
    fn thresholds_growth_poison_and_damage_are_told() {
        let mut watcher = Watcher::new(look(), Level::default());
        let mut now = look();
        now.space.used_bytes = 9 * GIB;
        now.info.size_bytes = 11 * GIB;
        now.info.poisoned = Some("a flush failed".into());
        now.damaged.insert(VolumeId(7), 4);
        let seen = watcher.look(now.clone());
        let kinds: Vec<_> = told(&seen).into_iter().map(|(kind, _)| kind).collect();
        use EventKind as Kind;
        assert_eq!(kinds, [Kind::Threshold, Kind::Threshold, Kind::Poisoned, Kind::Grown, Kind::Damage]);
        assert_eq!(seen.drafts[4].0, Some(VolumeId(7)));
        assert!(seen.drafts[4].1.text.starts_with("3 reads"));
        assert_eq!(seen.crossed.len(), 2);
        assert!(watcher.look(now.clone()).drafts.is_empty(), "each is told once");
        now.space.used_bytes = GIB;
        assert_eq!(watcher.look(now).crossed.iter().filter(|crossing| !crossing.upwards).count(), 2);
    }

    #[test]
    fn what_a_predecessor_told_is_not_told_again() {
        let mut full = look();
        full.space.used_bytes = 9 * GIB;
        let mut watcher = Watcher::new(full.clone(), Level::of(90));
        assert!(watcher.look(full.clone()).crossed.is_empty());
        assert_eq!(Watcher::new(full.clone(), Level::default()).look(full).crossed.len(), 2);
    }

    #[test]
    fn blocks_taken_since_the_last_checkpoint_ask_for_the_next() {
        let mut watcher = Watcher::new(look(), Level::default());
        let mut now = look();
        now.counters.blocks_provisioned = 7 * GIB / BLOCK_BYTES;
        let seen = watcher.look(now.clone());
        assert!(seen.wants_checkpoint && seen.crossed.is_empty());
        // It has been written, and most of it had been given back again.
        now.info.generation = Generation(2);
        assert!(!watcher.look(now).wants_checkpoint);
    }

    #[test]
    fn work_of_the_engine_begins_and_ends() {
        let mut watcher = Watcher::new(look(), Level::default());
        let mut now = look();
        now.info.carcasses = 2;
        now.counters.seal_blocks_read = 5;
        let began = watcher.look(now.clone());
        assert!(told(&began).iter().all(|(kind, _)| *kind == EventKind::Began) && began.drafts.len() == 2);
        assert!(watcher.is_sealing());
        now.info.carcasses = 0;
        assert_eq!(told(&watcher.look(now.clone())), [(EventKind::Ended, "giving back what was deleted")]);
        assert!(watcher.look(now.clone()).drafts.is_empty());
        assert_eq!(told(&watcher.look(now)), [(EventKind::Ended, "sealing snapshots")]);
        assert!(!watcher.is_sealing());
    }
}

//! The snapshots in memory, and who works on which.
//!
//! Nothing here is the truth: it is read from the pool when this process starts, and follows what is done to the pool. It
//! answers what is asked often (`Stat`, `List`, whether something has children), and keeps calls about the same key one
//! behind the other, while calls about different keys go side by side.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::record::Record;

/// See the module.
#[derive(Debug, Default)]
pub struct Index {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<String, Record>,
    /// Number of snapshots by parent.
    children: HashMap<String, usize>,
    claims: HashMap<String, Hold>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Alone,
    Shared(usize),
}

impl Index {
    /// Waits until nobody works on the keys in `alone`, and nobody changes those in `shared`; until the claim is dropped,
    /// nobody does either.
    pub fn claim(&self, alone: &[&str], shared: &[&str]) -> Claim<'_> {
        let mut claim = Claim { index: self, alone: Vec::new(), shared: Vec::new() };
        for key in alone {
            if !claim.alone.iter().any(|known| known == key) {
                claim.alone.push((*key).to_owned());
            }
        }
        for key in shared.iter().filter(|key| !alone.contains(key)) {
            claim.shared.push((*key).to_owned());
        }
        let mut state = self.state();
        while !state.allows(&claim) {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        for key in &claim.alone {
            state.claims.insert(key.clone(), Hold::Alone);
        }
        for key in &claim.shared {
            let others = match state.claims.get(key) {
                Some(Hold::Shared(others)) => *others,
                _ => 0,
            };
            state.claims.insert(key.clone(), Hold::Shared(others + 1));
        }
        claim
    }

    /// The snapshot of that key.
    pub fn find(&self, key: &str) -> Option<Record> {
        self.state().records.get(key).cloned()
    }

    /// Whether there are snapshots made from it.
    pub fn has_children(&self, key: &str) -> bool {
        self.state().children.contains_key(key)
    }

    /// All for which `wanted` holds, by key.
    pub fn select(&self, wanted: impl Fn(&Record) -> bool) -> Vec<Record> {
        self.state().records.values().filter(|record| wanted(record)).cloned().collect()
    }

    /// Adds or replaces one.
    pub fn put(&self, record: Record) {
        let mut state = self.state();
        state.remove(&record.key);
        if !record.parent.is_empty() {
            *state.children.entry(record.parent.clone()).or_default() += 1;
        }
        state.records.insert(record.key.clone(), record);
    }

    /// Takes `key` away and adds `record`, with nothing to be seen in between.
    pub fn replace(&self, key: &str, record: Record) {
        let mut state = self.state();
        state.remove(key);
        if !record.parent.is_empty() {
            *state.children.entry(record.parent.clone()).or_default() += 1;
        }
        state.records.insert(record.key.clone(), record);
    }

    /// Forgets all. Who works on what stays known.
    pub fn clear(&self) {
        let mut state = self.state();
        state.records.clear();
        state.children.clear();
    }

    /// Takes one away.
    pub fn remove(&self, key: &str) {
        self.state().remove(key);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is whole before anything in it could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn allows(&self, claim: &Claim<'_>) -> bool {
        claim.alone.iter().all(|key| !self.claims.contains_key(key))
            && claim.shared.iter().all(|key| self.claims.get(key) != Some(&Hold::Alone))
    }

    fn remove(&mut self, key: &str) {
        let Some(record) = self.records.remove(key) else { return };
        if let Some(count) = self.children.get_mut(&record.parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(&record.parent);
            }
        }
    }
}

/// See [`Index::claim`].
#[derive(Debug)]
#[must_use]
pub struct Claim<'a> {
    index: &'a Index,
    alone: Vec<String>,
    shared: Vec<String>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.index.state();
        for key in &self.alone {
            state.claims.remove(key);
        }
        for key in &self.shared {
            match state.claims.get_mut(key) {
                Some(Hold::Shared(count)) if *count > 1 => *count -= 1,
                _ => drop(state.claims.remove(key)),
            }
        }
        drop(state);
        self.index.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::super::record::Kind;
    use super::*;

    fn record(key: &str, parent: &str) -> Record {
        Record {
            key: key.into(),
            parent: parent.into(),
            kind: Kind::Committed,
            created_ns: 0,
            updated_ns: 0,
            labels: BTreeMap::new(),
            filesystem: "ext4".into(),
            of: None,
        }
    }

    #[test]
    fn children_are_counted_through_every_change() {
        let index = Index::default();
        index.put(record("base", ""));
        index.put(record("one", "base"));
        index.put(record("one", "base"));
        index.put(record("two", "base"));
        assert!(index.has_children("base") && !index.has_children("one") && !index.has_children(""));
        index.replace("two", record("three", "base"));
        index.remove("one");
        assert!(index.has_children("base"), "three is left");
        assert_eq!(index.select(|_| true).len(), 2);
        index.remove("three");
        index.remove("three");
        assert!(!index.has_children("base"));
    }

    #[test]
    fn work_on_one_key_never_meets() {
        let index = Arc::new(Index::default());
        let (inside, most_shared) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let threads: Vec<_> = (0..8)
            .map(|number| {
                let (index, inside, most) = (Arc::clone(&index), Arc::clone(&inside), Arc::clone(&most_shared));
                thread::spawn(move || {
                    for round in 0..200 {
                        let own = format!("own-{number}");
                        if (round + number) % 4 == 0 {
                            let _claim = index.claim(&["parent", "parent", &own], &[]);
                            assert_eq!(inside.fetch_add(100, Ordering::SeqCst), 0, "alone");
                            thread::yield_now();
                            inside.fetch_sub(100, Ordering::SeqCst);
                        } else {
                            let _claim = index.claim(&[&own], &["parent", &own]);
                            let before = inside.fetch_add(1, Ordering::SeqCst);
                            assert!(before < 100, "somebody is alone");
                            most.fetch_max(before + 1, Ordering::SeqCst);
                            thread::sleep(Duration::from_micros(50));
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(most_shared.load(Ordering::SeqCst) > 1, "sharers never met");
        assert!(index.state().claims.is_empty());
    }
}

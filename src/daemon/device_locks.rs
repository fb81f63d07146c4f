//! Who may do something with devices at a time: one with a volume, many with different ones, or one with all of them.
//!
//! Attaching takes milliseconds, of which most are the kernel's and another process's; a hundred containers that start at once
//! do not wait for each other.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::units::VolumeId;

/// The locks. They guard no data: a thread that panicked has left none broken.
#[derive(Debug, Default)]
pub(super) struct DeviceLocks {
    all: RwLock<()>,
    taken: Mutex<BTreeSet<VolumeId>>,
    given_back: Condvar,
}

/// The right to do something with one volume's device.
#[derive(Debug)]
pub(super) struct OneVolume<'a> {
    locks: &'a DeviceLocks,
    id: VolumeId,
    _others: RwLockReadGuard<'a, ()>,
}

impl DeviceLocks {
    /// Waits until nobody does anything with a device, and keeps it so.
    pub(super) fn all(&self) -> RwLockWriteGuard<'_, ()> {
        self.all.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody does anything with this volume's device, nor with all of them.
    pub(super) fn one(&self, id: VolumeId) -> OneVolume<'_> {
        let others = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.taken();
        while !taken.insert(id) {
            taken = self.given_back.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        drop(taken);
        OneVolume { locks: self, id, _others: others }
    }

    fn taken(&self) -> MutexGuard<'_, BTreeSet<VolumeId>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OneVolume<'_> {
    /// Whether it is this volume's.
    pub(super) fn is_of(&self, id: VolumeId) -> bool {
        self.id == id
    }
}

impl Drop for OneVolume<'_> {
    fn drop(&mut self) {
        self.locks.taken().remove(&self.id);
        self.locks.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn one_at_a_time_for_a_volume_and_all_of_them_alone() {
        let locks = DeviceLocks::default();
        let inside: [AtomicU32; 3] = Default::default();
        let enter = |which: &[usize]| {
            for index in which {
                assert_eq!(inside[*index].fetch_add(1, Ordering::SeqCst), 0, "somebody else is there");
            }
            thread::yield_now();
            for index in which {
                inside[*index].fetch_sub(1, Ordering::SeqCst);
            }
        };
        thread::scope(|scope| {
            for number in 0..6_usize {
                let (locks, enter) = (&locks, &enter);
                scope.spawn(move || {
                    for round in 0..200 {
                        if number == 5 && round % 10 == 0 {
                            let _all = locks.all();
                            enter(&[0, 1, 2]);
                        } else {
                            let _one = locks.one(VolumeId(number as u64 % 3));
                            enter(&[number % 3]);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn volumes_do_not_wait_for_each_other() {
        let locks = DeviceLocks::default();
        let _one = locks.one(VolumeId(1));
        thread::scope(|scope| {
            scope.spawn(|| drop(locks.one(VolumeId(2))));
        });
    }
}

//! One thing at a time for each volume: whoever asks about one that is being worked on waits.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex, PoisonError};

/// The names that are being worked on.
#[derive(Debug, Default)]
pub struct Names {
    held: Mutex<HashSet<String>>,
    freed: Condvar,
}

/// A name that nobody else works on.
#[derive(Debug)]
#[must_use]
pub struct Held<'a> {
    names: &'a Names,
    name: String,
}

impl Names {
    /// Waits until nobody else works on `name`.
    pub fn hold(&self, name: &str) -> Held<'_> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held.contains(name) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.insert(name.to_owned());
        Held { names: self, name: name.to_owned() }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.names.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
        self.names.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn one_name_is_held_once_and_others_beside_it() {
        let (names, inside) = (Names::default(), AtomicU32::new(0));
        let _other = names.hold("other");
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _held = names.hold("one");
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
    }
}

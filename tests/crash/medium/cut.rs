//! What a power cut leaves.

use std::collections::HashSet;
use std::ops::Range;

use fastrand::Rng;

use super::{Left, Medium, State};
use crate::action::{Cached, sectors};
use crate::content::SECTOR;
use crate::image::Image;

impl Medium {
    /// What a power cut leaves of which only those changes that are not durable are there that `keep` chooses.
    pub fn power_cut_keeping(&self, keep: impl Fn(&Range<u64>) -> bool) -> Left {
        let state = self.state.borrow();
        let mut image = state.durable.clone();
        for change in state.cached.iter().filter(|change| keep(&change.range)) {
            change.write(&mut image);
        }
        image.into()
    }

    /// What a power cut at this moment may leave: each change that is not durable is there, or not, or its sectors are
    /// there one by one.
    pub fn power_cut(&self, random: &mut Rng) -> Left {
        let state = self.state.borrow();
        let mut image = state.durable.clone();
        // All, none, and anything between.
        let (applied, torn) = match random.u32(..6) {
            0 => (0, 0),
            1 => (100, 0),
            2 => (90, 5),
            3 => (5, 10),
            _ => (random.u32(..80), random.u32(..20)),
        };
        state.not_durable(|change| {
            let chance = random.u32(..100);
            let fate = match chance {
                _ if chance < applied => Fate::Whole,
                _ if chance < applied + torn => Fate::Torn,
                _ => Fate::Lost,
            };
            leave(&mut image, random, fate, change);
        });
        image.into()
    }

    /// Everything that a power cut at this moment may leave, when no more than `most` changes are not durable: each is
    /// there, or not, or torn somewhere, in every combination.
    pub fn every_power_cut(&self, most: u32, random: &mut Rng) -> Option<Vec<Left>> {
        const FATES: [Fate; 3] = [Fate::Whole, Fate::Lost, Fate::Torn];
        let state = self.state.borrow();
        let mut count = 0;
        state.not_durable(|_| count += 1);
        let combinations = (count <= most).then(|| FATES.len().pow(count))?;
        let cut = |combination: usize| {
            let (mut image, mut rest) = (state.durable.clone(), combination);
            state.not_durable(|change| {
                leave(&mut image, random, FATES[rest % FATES.len()], change);
                rest /= FATES.len();
            });
            image.into()
        };
        Some((0..combinations).map(cut).collect())
    }
}

/// What becomes of a change that is not durable when the power goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Whole,
    Lost,
    Torn,
}

/// Leaves a change on `image` whole, not at all, or torn.
fn leave(image: &mut Image, random: &mut Rng, fate: Fate, change: &Cached) {
    let Cached { range, content, outdated, .. } = change;
    if fate == Fate::Lost {
        return;
    }
    let is_torn = fate == Fate::Torn;
    if !is_torn && outdated.is_empty() {
        return content.write(image, range, range.clone());
    }
    let (mode, limit) = (random.bool(), random.u64(range.start / SECTOR..=range.end / SECTOR));
    for sector in sectors(range) {
        // Either each sector by itself, or all up to one.
        let there = !is_torn || if mode { random.bool() } else { sector < limit };
        if there && !outdated.contains(&sector) {
            content.write(image, range, sector * SECTOR..(sector + 1) * SECTOR);
        }
    }
}

impl State {
    /// Every change that is not durable, in the order in which they ended; those in flight come last.
    fn not_durable(&self, mut take: impl FnMut(&Cached)) {
        self.cached.iter().for_each(&mut take);
        for operation in &self.in_flight {
            if let Some(content) = operation.action.content() {
                let (number, range) = (operation.number, operation.action.range());
                take(&Cached { number, range, content, outdated: HashSet::new() });
            }
        }
    }
}

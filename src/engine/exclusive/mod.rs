//! Exclusive bytes: what deleting a volume would free, found in the background.
//!
//! A node that others hold too ends the walk: nothing below it is the volume's alone. So a walk costs the nodes that the
//! volume holds alone, and of these only the parts are read again in which something may have changed (`marks`): sharing
//! keeps positions, so what a relative does at a virtual block concerns that block of the others and nothing else.
//!
//! Invariants:
//!
//! * Whatever changes a figure marks it in the same step: a change of a volume's own tree marks the volume, a count that
//!   changes of something that others may hold marks the family. A figure whose marks have not moved since its walk began is
//!   exact, unless a carcass still waits.
//! * A walk holds nothing between two steps, no epoch and no address: each step goes down again from the root, under a stay
//!   of its own (O7). What it finds of a part is kept with the marks of before it looked.

mod marks;
#[cfg(test)]
mod tests;
mod walk;
mod worker;

pub(super) use marks::{Families, Family, Marks};
pub(super) use walk::Figure;

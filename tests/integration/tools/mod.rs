//! Check, dump, restore and repair of a pool that nobody uses, on a sample that has everything a pool can have.

mod cut;
mod damage;
mod dump;
mod faults;
mod sample;
mod seals;
mod structures;

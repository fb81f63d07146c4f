//! Check, dump, restore and repair of a pool that nobody uses, on a sample that has everything a pool can have.

mod damage;
mod dump;
mod sample;
mod seals;
mod structures;

//! Device tests.
fn main() {}

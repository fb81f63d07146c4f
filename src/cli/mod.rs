//! The command line: parse, call, print.
#![forbid(unsafe_code)]

mod context;

pub use context::Context;

pub mod image;

/// Runs the command line.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}

//! The command line: parse, call, print.
#![forbid(unsafe_code)]

mod context;
pub mod image;

pub use context::Context;

/// Runs the command line.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}

//! The `plywood` command: parse, call, print.

fn main() -> std::process::ExitCode {
    plywood::cli::main()
}

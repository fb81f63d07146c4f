//! Where the log goes: standard error, which the starter of a daemon in the background points at a file.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Begins to log. `PLYWOOD_LOG` sets what, in the syntax of `tracing`'s filters; `default` is taken without it.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_env("PLYWOOD_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // The first one stays: a second start changes nothing.
    let _ = subscriber.try_init();
}

/// A daemon's processes tell what they do.
pub const DAEMON: &str = "plywood=info";
/// A command says on its own line why it failed; only what comes on top is logged.
pub const COMMAND: &str = "plywood=error";

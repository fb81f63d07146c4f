//! One front and one engine process for a pool in use, and the commands both understand.
//!
//! [`protocol`] is what is said on the control socket, `execute` does it on an open pool, [`Client`] is the caller's
//! side: it reaches the engine process of a pool in use, or opens the pool file itself when nobody holds it. The same
//! commands run through the same code either way.
#![forbid(unsafe_code)]

pub mod attributes;
mod changes;
mod check;
mod client;
mod create;
mod device_locks;
mod devices;
mod engine_process;
mod events;
mod execute;
mod figures;
pub mod filesystem;
mod front_process;
mod heritage;
mod listening;
pub mod logging;
mod lookup;
pub mod making;
mod memory_budget;
mod metadata;
mod metrics;
mod metrics_port;
pub mod mounts;
mod offline;
mod places;
mod process;
pub mod protocol;
mod remote;
mod repair;
mod scrub;
mod server;
mod service_manager;
mod spares;
mod start;
mod successor;
mod thresholds;
mod watch;

pub use check::check_pool;
pub use client::Client;
pub use create::{NewPool, create_pool};
pub use devices::LOOP_HELPER;
pub use engine_process::{EngineArguments, run_engine};
pub use front_process::{ServeOptions, serve};
pub use listening::listen_for_root;
pub use lookup::{FoundPool, find_pool, find_unfinished, identify, name_of_device, running_daemons};
pub use metadata::{dump_pool, restore_pool};
pub use places::{
    LOG_DIRECTORY, MEMORY_DIRECTORY, POOLS_DIRECTORY, RUN_DIRECTORY, VOLUMES_DIRECTORY, log as log_path,
    make_private_directory, path_in_memory,
};
pub use repair::{RepairTo, repair_pool, undo_repair};
pub use service_manager::{
    given_listener, goes_on, is_there as service_manager_is_there, ready as service_manager_ready,
    stopping as service_manager_stopping,
};
pub use start::{running, start, take_over, wait_until_gone};
pub use successor::is_successor;

/// `10.0 GiB`, for messages.
fn size_words(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().iec().to_string()
}

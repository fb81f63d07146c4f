//! The process: one for each pool, listening on a socket of its own until a signal ends it.
//!
//! It may be killed and started again at any time, under running containers too: their devices are the daemon's.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

use super::api::snapshots::snapshots_server::SnapshotsServer;
use super::link::Link;
use super::service::Service;
use super::store::{Settings, Store};
use crate::daemon::{FoundPool, RUN_DIRECTORY, listen_for_root, making, service_manager_ready};
use crate::error::{Error, Result};

/// Largest message, both ways: containerd's own bound.
const MESSAGE_BYTES: usize = 16 << 20;
/// Calls that are worked on at a time. Each has a connection to the daemon, which has 64 for all its clients.
const WORKERS: usize = 16;

/// Where the socket of a pool is unless it is told.
pub fn default_socket(pool: &FoundPool) -> PathBuf {
    let plain = !pool.name.is_empty() && !pool.name.contains(['/', '\0']);
    let name = if plain { pool.name.clone() } else { pool.uuid.to_string() };
    Path::new(RUN_DIRECTORY).join(format!("containerd-{name}.sock"))
}

/// Serves a pool's snapshots to containerd until SIGTERM or SIGINT.
///
/// # Errors
/// When somebody else does already, the pool's daemon does not start, the empty file system cannot be made, or there can be
/// no socket.
pub fn serve(pool: &FoundPool, socket: &Path, settings: Settings) -> Result<()> {
    // Two of them would not know of each other's snapshots.
    let Some(_alone) = making::only(pool.uuid, "containerd")? else {
        let name = &pool.name;
        return Err(Error::Busy(format!(
            "pool {name} is served to containerd by another process already; stop that one first"
        )));
    };
    let store = Store::open(Link::new(pool.clone()), settings).map_err(|error| Error::Busy(error.to_string()))?;
    let listener = listen_for_root(socket)?;
    let failed = |error| Error::io("serving containerd", error);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(WORKERS)
        .build()
        .map_err(failed)?;
    let served = runtime.block_on(answer(listener, store, &pool.name));
    // Whoever starts next makes it anew.
    let _ = fs::remove_file(socket);
    served.map_err(failed)
}

async fn answer(listener: StdListener, store: Store, pool: &str) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let incoming = UnixListenerStream::new(UnixListener::from_std(listener)?);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let ended = async move {
        futures_lite::future::or(terminate.recv(), interrupt.recv()).await;
    };
    let service = SnapshotsServer::new(Service::new(store))
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    tracing::info!(pool, "serving containerd");
    service_manager_ready(pool);
    let server = tonic::transport::Server::builder().add_service(service);
    server.serve_with_incoming_shutdown(incoming, ended).await.map_err(io::Error::other)
}

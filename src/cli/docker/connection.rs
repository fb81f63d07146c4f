//! HTTP on the plugin's socket. What comes in is bounded: connections, headers, bodies, and the time that each may take.
//! A connection is for one request: idle ones would keep others out.

use std::convert::Infallible;
use std::future::Future;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_lite::future::or;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::answer::{Answer, BODY_BYTES, answer};
use super::socket::Socket;
use super::volumes::Volumes;

/// What is answered in this version of the protocol, and understood by all.
const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.1+json";
/// Most connections at a time; further ones wait in the socket's queue.
const CONNECTIONS: usize = 64;
/// Longest head of a request.
const HEAD_BYTES: usize = 16 << 10;
/// Most headers.
const HEADERS: usize = 64;
/// How long a client may take to send its headers, and then its body.
const SENDING: Duration = Duration::from_secs(10);
/// How long a request may take in all. Docker gives up after two minutes; what it asked for goes on, and is found done when
/// it asks again.
const ANSWERING: Duration = Duration::from_secs(600);
/// How long requests under way are waited for at the end.
const ENDING: Duration = Duration::from_secs(60);
/// How often it is looked whether something can be put in order that could not be at once.
const SETTLING: Duration = Duration::from_secs(2);

/// Answers until a signal to stop.
///
/// # Errors
/// When threads, signal handlers or the socket cannot be used.
pub fn serve(socket: &Socket, volumes: &Arc<Volumes>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(CONNECTIONS + 1)
        .build()
        .context("starting threads")?;
    let listener = socket.listener().try_clone().context("duplicating the socket")?;
    let stop = async {
        let mut signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        or(signals.0.recv(), signals.1.recv()).await;
        Ok(())
    };
    let volumes = Arc::clone(volumes);
    let settling = Arc::clone(&volumes);
    let handler: Arc<Handler> = Arc::new(move |path, body| answer(&volumes, path, body));
    let served = runtime.block_on(or(stop, async move {
        tokio::spawn(settle(settling));
        listen(listener, handler).await
    }));
    // What is under way ends on its own threads; a client that still listens is gone with its connection.
    runtime.shutdown_timeout(ENDING);
    served
}

/// Answers a path and a body.
type Handler = dyn Fn(&str, &[u8]) -> Answer + Send + Sync;

async fn settle(volumes: Arc<Volumes>) {
    loop {
        sleep(SETTLING).await;
        let volumes = Arc::clone(&volumes);
        let _ = tokio::task::spawn_blocking(move || volumes.settle_pending()).await;
    }
}

async fn listen(listener: UnixListener, handler: Arc<Handler>) -> Result<()> {
    listener.set_nonblocking(true).context("the socket")?;
    let listener = tokio::net::UnixListener::from_std(listener).context("the socket")?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = Arc::clone(&room).acquire_owned().await?;
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = Arc::clone(&handler);
                tokio::spawn(async move {
                    converse(stream, handler).await;
                    drop(place);
                });
            }
            // No descriptor left, most likely: others will be closed.
            Err(error) => {
                tracing::warn!(%error, "docker-plugin: accept");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, handler: Arc<Handler>) {
    let service = service_fn(move |request| {
        let handler = Arc::clone(&handler);
        async move { Ok::<_, Infallible>(respond(request, handler).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SENDING)
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(ANSWERING, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "docker-plugin: connection ended"),
        Err(_) => tracing::debug!("docker-plugin: a connection took too long"),
    }
}

async fn respond(request: Request<Incoming>, handler: Arc<Handler>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    if head.method != Method::POST {
        let mut response = encode(&Answer::error(405, "the volume protocol is POST alone"));
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("POST"));
        return response;
    }
    let body = match in_time(Limited::new(body, BODY_BYTES).collect()).await {
        Some(Ok(body)) => body.to_bytes(),
        Some(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return encode(&Answer::error(413, &format!("the request has more than {BODY_BYTES} bytes")));
        }
        Some(Err(_)) => return encode(&Answer::error(400, "the request ends in the middle")),
        None => return encode(&Answer::error(408, "the request did not come to its end in time")),
    };
    let path = head.uri.path().to_owned();
    // What is done waits for devices and programs: on a thread, which goes on when the client has gone.
    let done = tokio::task::spawn_blocking(move || handler(&path, &body)).await;
    encode(&done.unwrap_or_else(|error| {
        tracing::error!(%error, "docker-plugin: a request ended unexpectedly");
        Answer::error(500, "plywood: an error of plywood's own; its log says more")
    }))
}

async fn in_time<T>(future: impl Future<Output = T>) -> Option<T> {
    timeout(SENDING, future).await.ok()
}

fn encode(answer: &Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{}\n", answer.body)));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(MEDIA_TYPE));
    response
}

#[cfg(test)]
mod tests;

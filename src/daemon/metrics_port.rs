//! Metrics over HTTP on a port of this machine, for a Prometheus that runs here: `GET /metrics` and nothing else.
//!
//! One connection at a time, on a thread of its own, each with an end after a few seconds: whoever holds one up keeps others
//! from metrics, and the pool from nothing. What is read is bounded, and the answer ends the connection.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::metrics::CONTENT_TYPE;
use crate::error::{Error, Result};

/// Longest request.
const REQUEST_BYTES: usize = 8 << 10;
/// How long a connection may take to ask, and then to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers what comes to `listener`, for ever, with what `metrics` gives.
///
/// # Errors
/// When the thread cannot be made.
pub(super) fn serve(listener: TcpListener, metrics: impl Fn() -> Result<String> + Send + 'static) -> Result<()> {
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = answer(&stream, &metrics) {
                        tracing::debug!(%error, "metrics: connection ended");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "metrics: accept");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    let spawned = thread::Builder::new().name("metrics".into()).spawn(accept);
    spawned.map(drop).map_err(|error| Error::io("starting a thread", error))
}

fn answer(mut stream: &TcpStream, metrics: impl Fn() -> Result<String>) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let (status, body) = match request(stream, deadline)? {
        Asked::Metrics => match metrics() {
            Ok(text) => ("200 OK", text),
            // A successor answers the next one.
            Err(error) => ("503 Service Unavailable", format!("{error}\n")),
        },
        Asked::Other => ("404 Not Found", "there is /metrics and nothing else\n".into()),
        Asked::OtherMethod => ("405 Method Not Allowed", "GET and nothing else\n".into()),
        Asked::TooMuch => ("431 Request Header Fields Too Large", "the request is too long\n".into()),
        Asked::Nonsense => ("400 Bad Request", "this is not HTTP/1\n".into()),
    };
    let kind = if status == "200 OK" { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let allow = if status.starts_with("405") { "Allow: GET\r\n" } else { "" };
    let len = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n{allow}Connection: close\r\n\r\n"
    );
    let deadline = Instant::now() + PATIENCE;
    let whole = [head.as_bytes(), body.as_bytes()].concat();
    let mut rest = &whole[..];
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(deadline)?))?;
        let written = stream.write(rest)?;
        rest = rest.get(written..).filter(|_| written > 0).ok_or(io::ErrorKind::WriteZero)?;
    }
    stream.shutdown(std::net::Shutdown::Write)
}

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Metrics,
    Other,
    OtherMethod,
    TooMuch,
    Nonsense,
}

/// Reads a request up to the end of its headers, which are not looked at.
fn request(mut stream: &TcpStream, deadline: Instant) -> io::Result<Asked> {
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    let mut part = [0; 1024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let count = stream.read(&mut part[..1024.min(REQUEST_BYTES - bytes.len())])?;
        if count == 0 {
            return Ok(if bytes.len() == REQUEST_BYTES { Asked::TooMuch } else { Asked::Nonsense });
        }
        bytes.extend_from_slice(&part[..count]);
        if bytes.len() == REQUEST_BYTES {
            return Ok(Asked::TooMuch);
        }
    }
    Ok(asked(&bytes))
}

/// Reads the first line.
fn asked(request: &[u8]) -> Asked {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    match words[..] {
        [method, path, version] if version.starts_with(b"HTTP/1.") => match (method, path) {
            (b"GET", b"/metrics") => Asked::Metrics,
            (b"GET", path) if path.starts_with(b"/metrics?") => Asked::Metrics,
            (b"GET", _) => Asked::Other,
            _ => Asked::OtherMethod,
        },
        _ => Asked::Nonsense,
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn served() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, || Ok("plywood_up 1\n# EOF\n".into())).unwrap();
        address
    }

    fn said(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        // It may answer and close before all of it has been sent.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn metrics_are_answered_and_nothing_else() {
        let address = served();
        let metrics = said(address, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
        assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
        assert!(metrics.contains("\r\nContent-Length: 19\r\n") && metrics.ends_with("\r\n\r\nplywood_up 1\n# EOF\n"));
        for (request, status) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
            (b"GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", "404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
            (b"GET /metrics SPDY\r\n\r\n", "400"),
            (b"\r\n\r\n", "400"),
            (b"\xff\xfe \x00 HTTP/2\r\n\r\n", "400"),
        ] {
            let answer = said(address, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
        }
        // A query is what some collectors add.
        assert!(said(address, b"GET /metrics?a=b HTTP/1.0\r\n\r\n").contains("plywood_up"));
    }

    #[test]
    fn long_and_unfinished_requests_are_cut_off() {
        let address = served();
        let long = [&b"GET /metrics HTTP/1.1\r\nX: "[..], &vec![b'x'; REQUEST_BYTES - 26]].concat();
        assert_eq!(long.len(), REQUEST_BYTES);
        assert!(said(address, &long).starts_with("HTTP/1.1 431 "));
        let mut silent = TcpStream::connect(address).unwrap();
        silent.write_all(b"GET /met").unwrap();
        // Its time is bounded, and then others have their turn.
        assert!(said(address, b"GET /metrics HTTP/1.1\r\n\r\n").contains("plywood_up"));
    }
}

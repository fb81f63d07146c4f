//! Requests as clients send them, whole and broken, over a real socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Stream;
use std::path::{Path, PathBuf};

use super::*;

/// A server that answers with what it was asked, and panics where it is asked to.
fn served() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let handler: Arc<Handler> = Arc::new(|path, body| {
            assert_ne!(path, "/panic");
            Answer { status: 200, body: serde_json::json!([path, body.len()]) }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(listen(listener, handler))
    });
    (folder, path)
}

fn said(path: &Path, request: &[u8]) -> String {
    let mut stream = Stream::connect(path).unwrap();
    // It may answer and close before all of it has been sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn requests_of_docker_and_podman_are_answered() {
    let (_folder, path) = served();
    // As dockerd 20.10 and podman 4.3 send them.
    let docker = b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: %2Frun%2Fdocker%2Fplugins%2Fplywood.sock\r\nUser-Agent: Go-http-client/1.1\r\n\
        Content-Length: 16\r\nAccept: application/vnd.docker.plugins.v1.2+json\r\n\r\n{\"Name\":\"data\"}\n";
    let podman = b"POST /Plugin.Activate HTTP/1.1\r\nHost: plugin\r\nUser-Agent: Go-http-client/1.1\r\n\
        Transfer-Encoding: chunked\r\nContent-Type: application/vnd.docker.plugins.v1.1+json\r\n\r\n0\r\n\r\n";
    let answer = said(&path, docker);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.to_lowercase().contains("content-type: application/vnd.docker.plugins.v1.1+json\r\n"), "{answer}");
    assert!(answer.ends_with("[\"/VolumeDriver.Get\",16]\n"), "{answer}");
    assert!(said(&path, podman).ends_with("[\"/Plugin.Activate\",0]\n"));
}

#[test]
fn what_is_too_long_or_no_request_is_refused() {
    let (_folder, path) = served();
    let body = |len: usize| {
        let head = format!("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: {len}\r\n\r\n");
        [head.into_bytes(), vec![b' '; len]].concat()
    };
    assert!(said(&path, &body(BODY_BYTES)).ends_with(&format!("[\"/x\",{BODY_BYTES}]\n")));
    let answer = said(&path, &body(BODY_BYTES + 1));
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("{\"Err\":\"the request has more than"), "{answer}");
    let long = [b"POST /x HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; HEAD_BYTES], b"\r\n\r\n".to_vec()].concat();
    assert!(said(&path, &long).starts_with("HTTP/1.1 431 "));
    let many = [b"POST /x HTTP/1.1\r\n".to_vec(), b"X: y\r\n".repeat(HEADERS + 1), b"\r\n".to_vec()].concat();
    assert!(said(&path, &many).starts_with("HTTP/1.1 431 "));
    for nonsense in [&b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"[..], b"hello\r\n\r\n", b"\0\0\0\0\r\n\r\n"] {
        let answer = said(&path, nonsense);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    let answer = said(&path, b"GET /VolumeDriver.List HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("POST"), "{answer}");
    // Whatever came before, the next one is served.
    assert!(said(&path, &body(3)).contains("200 OK"));
}

#[test]
fn those_who_send_nothing_keep_nobody_out() {
    let (_folder, path) = served();
    let silent: Vec<Stream> = (0..CONNECTIONS - 1).map(|_| Stream::connect(&path).unwrap()).collect();
    let mut half = Stream::connect(&path).unwrap();
    half.write_all(b"POST /x HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf").unwrap();
    // All places are taken: this one is served when their time is over.
    let request = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    assert!(said(&path, request).contains("200 OK"));
    let mut answer = String::new();
    half.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    drop(silent);
}

#[test]
fn panic_is_an_answer_and_not_the_end() {
    let (_folder, path) = served();
    let ask = |what: &str| said(&path, format!("POST {what} HTTP/1.1\r\nContent-Length: 0\r\n\r\n").as_bytes());
    let answer = ask("/panic");
    assert!(answer.starts_with("HTTP/1.1 500 ") && answer.contains("\"Err\""), "{answer}");
    assert!(ask("/x").contains("200 OK"));
}

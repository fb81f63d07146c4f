//! Messages on their way over the control socket.

use super::*;

#[test]
fn message_sent_is_received() {
    let request = Request {
        version: VERSION,
        command: Command::AttributesSet {
            name: "a\nb".into(),
            changes: [("key".to_owned(), Some(Bytes(vec![0, 10, 255]))), ("other".to_owned(), None)].into(),
        },
    };
    let mut line = Vec::new();
    send(&mut line, &request).unwrap();
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "a message is one line");
    let received: Option<Request> = receive(&mut line.as_slice(), REQUEST_BYTES).unwrap();
    assert_eq!(received, Some(request));
}

#[test]
fn long_message_is_refused_without_reading_it_whole() {
    let line = vec![b'x'; 4096];
    let error = receive::<Request>(&mut line.as_slice(), 100).unwrap_err();
    assert_eq!(error.to_string(), "message is too long");
}

#[test]
fn cut_or_foreign_message_is_refused() {
    assert!(receive::<Request>(&mut b"{\"version\":1".as_slice(), 100).is_err());
    assert!(receive::<Request>(&mut b"[]\n".as_slice(), 100).is_err());
    assert!(receive::<Request>(&mut b"{\"version\":1,\"command\":{\"command\":\"x\"}}\n".as_slice(), 100).is_err());
    assert_eq!(receive::<Request>(&mut b"".as_slice(), 100).unwrap(), None);
}

#[test]
fn errors_keep_kind_and_message() {
    let failure = Failure::from(Error::NotFound("no volume named x".into()));
    assert_eq!(failure, Failure::new(Kind::NotFound, "no volume named x"));
    let text = serde_json::to_string(&Outcome::Failed(failure)).unwrap();
    assert_eq!(text, r#"{"failed":{"kind":"not-found","message":"no volume named x"}}"#);
}

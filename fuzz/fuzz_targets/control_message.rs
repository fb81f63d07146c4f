//! A line on the control socket: a request, and the answer to one.
//!
//! * Receiving never panics, however the line is nested or cut; a line above the limit is refused.
//! * What is accepted is received again after it was sent, as one line.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::daemon::protocol::{self, Command, REQUEST_BYTES, Request, Response, SnapshotOf, VERSION};
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::seeds;
use uuid::Uuid;

/// A list of short strings takes three bytes an element of input and 24 and more in memory; an answer may hold volumes.
const BOUND: Bound = Bound { fixed_bytes: 256 << 10, multiple: 256 };

fn request(input: &[u8]) {
    let mut stream = input;
    while let Ok(Some(request)) = protocol::receive::<Request>(&mut stream, REQUEST_BYTES) {
        assert!(!request.command.describe().is_empty());
        assert!(!(request.command.needs_daemon() && request.command.is_read_only()));
        let mut line = Vec::new();
        protocol::send(&mut line, &request).expect("memory takes it");
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "a message is one line");
        let again = protocol::receive::<Request>(&mut line.as_slice(), u64::MAX >> 1).expect("it was sent");
        assert_eq!(again, Some(request));
    }
}

fn response(input: &[u8]) {
    if let Ok(Some(response)) = protocol::receive::<Response>(&mut &*input, REQUEST_BYTES) {
        let mut line = Vec::new();
        protocol::send(&mut line, &response).expect("memory takes it");
        let again = protocol::receive::<Response>(&mut line.as_slice(), u64::MAX >> 1).expect("it was sent");
        assert_eq!(again, Some(response));
    }
}

fn commands() -> Vec<Command> {
    let (uuid, name) = (Uuid::from_u128(7), || "volume".to_owned());
    let attributes = protocol::Attributes::from([("key".to_owned(), protocol::Bytes::from("value"))]);
    vec![
        Command::Hello,
        Command::PoolGrow { size_bytes: 1 << 40 },
        Command::VolumeCreate {
            uuid,
            name: name(),
            size_bytes: 1 << 30,
            sector_size: 512,
            quota_bytes: 0,
            reservation_bytes: 1 << 20,
            attributes: attributes.clone(),
        },
        Command::VolumeResize { name: name(), size_bytes: 4096, force: true },
        Command::VolumeReserve { name: name(), reservation_bytes: 1 << 30 },
        Command::SnapshotCreate { volume: name(), uuid, name: name(), attributes: attributes.clone() },
        Command::SnapshotRollback {
            volume: name(),
            snapshot: name(),
            keep: Some(protocol::Keep { uuid, name: name() }),
        },
        Command::SnapshotCreateAll {
            snapshots: vec![SnapshotOf { volume: name(), uuid, name: name(), attributes: attributes.clone() }],
        },
        Command::CloneCreate { snapshot: name(), uuid, name: name(), size_bytes: Some(1 << 31), attributes },
        Command::Attach { name: name(), read_only: true },
        Command::Diff { from: Some(name()), to: name(), start_bytes: 0 },
        Command::AttributesSet { name: name(), changes: [("key".to_owned(), None)].into() },
        Command::Stop { force: false },
    ]
}

fuzz_target!(
    init: seeds::offer(|| {
        let line = |message: Vec<u8>| [&message[..], b"\n"].concat();
        let requests = commands().into_iter().map(|command| Request { version: VERSION, command });
        let requests = requests.map(|request| line(serde_json::to_vec(&request).expect("it is one")));
        let done = Response { version: VERSION, outcome: protocol::Outcome::Done(protocol::Reply::Pool(Box::default())) };
        let failure = protocol::Failure::new(protocol::Kind::NoSpace, "the pool is full");
        let failed = Response { version: VERSION, outcome: protocol::Outcome::Failed(failure) };
        requests.chain([done, failed].map(|one| line(serde_json::to_vec(&one).expect("it is one")))).collect()
    }),
    |input: &[u8]| bounded(BOUND, input.len(), || {
        request(input);
        response(input);
    })
);

//! A daemon as a service manager runs it: told what to serve by the environment, heard when it serves and when it stops.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::support::command::{Background, binary, run};
use crate::support::pool::{TestPool, Transport};

/// All that a daemon says to its service manager until it has said `expected`.
#[track_caller]
fn heard_until(manager: &UnixDatagram, expected: &str) -> String {
    let mut heard = String::new();
    loop {
        let mut message = [0; 4096];
        let count = manager.recv(&mut message).unwrap_or_else(|error| panic!("no {expected} in {heard:?}: {error}"));
        heard.push_str(&String::from_utf8_lossy(&message[..count]));
        heard.push('\n');
        if heard.lines().any(|line| line == expected) {
            return heard;
        }
    }
}

/// READY=1 once, when the pool can be used, also though the engine is succeeded; STOPPING=1 at SIGTERM.
pub fn manager_is_told() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create raw --size 64M");
    pool.attach("raw");
    pool.stop();
    let socket = pool.folder().join("notify");
    let manager = UnixDatagram::bind(&socket).expect("a socket");
    manager.set_read_timeout(Some(Duration::from_secs(60))).expect("a time limit");

    let environment = |name: &str, value: &std::path::Path| format!("{name}={}", value.display());
    let daemon = Background::start(
        "env",
        [
            environment("NOTIFY_SOCKET", &socket),
            environment("PLYWOOD_POOL", pool.file()),
            binary().display().to_string(),
            "serve".to_owned(),
        ],
    );
    let heard = heard_until(&manager, "READY=1");
    assert!(heard.contains("STATUS=serving pool"), "{heard}");
    assert_eq!(pool.process("front_pid"), Some(daemon.id()), "the unit's main process is the front");
    pool.done("attach --all");
    assert!(pool.volume("raw")["device"].is_string(), "what was attached is there again");
    pool.kill_engine();
    pool.done("upgrade");
    run("kill", ["-TERM".to_owned(), daemon.id().to_string()]).expect();
    let heard = heard_until(&manager, "STOPPING=1");
    assert!(!heard.contains("READY=1"), "a successor is no news: {heard}");
    let outcome = daemon.finish();
    assert!(outcome.succeeded(), "{}", outcome.stderr);
    pool.check();
}

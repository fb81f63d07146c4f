//! What people are told of a pool in use: thresholds and their command, events over a succession, metrics.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::support::command::{run, wait_until};
use crate::support::pool::{TestPool, Transport};

const LONG: Duration = Duration::from_secs(60);

/// A daemon of the test's own with options, instead of one that a command starts. The pool's end stops it.
fn serve(pool: &TestPool, options: &[&str]) {
    let mut command = pool.prepare(["serve"].iter().chain(options).copied());
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut daemon = command.spawn().expect("the daemon starts");
    std::thread::spawn(move || daemon.wait());
    wait_until("the daemon answers", LONG, || pool.process("front_pid").is_some());
}

/// The events that the engine remembers.
fn remembered(pool: &TestPool) -> Vec<Value> {
    let text = pool.done("events --once --json");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
    lines.filter_map(|line| line.get("event").cloned()).collect()
}

fn has(events: &[Value], kind: &str, volume: Option<&str>, words: &str) -> bool {
    events.iter().any(|event| {
        event["kind"] == kind
            && event["volume"].as_str() == volume
            && event["text"].as_str().is_some_and(|text| text.contains(words))
    })
}

fn write(device: &str, mebibytes: u64) {
    let (of, count) = (format!("of={device}"), format!("count={mebibytes}"));
    run("dd", ["if=/dev/urandom".to_owned(), of, "bs=1M".into(), count, "oflag=direct".into()]).expect();
}

pub fn thresholds() {
    let pool = TestPool::create("1G", Transport::Auto);
    let out = pool.folder().join("crossed");
    let command = format!("echo $PLYWOOD_THRESHOLD_DIRECTION $PLYWOOD_THRESHOLD_PERCENT >> '{}'", out.display());
    serve(&pool, &["--on-threshold", &command]);
    pool.done("volume create large --size 4G");
    let device = pool.attach("large");
    let crossed = |lines: &str| {
        wait_until(&format!("the command says {lines:?}"), LONG, || {
            fs::read_to_string(&out).is_ok_and(|said| said == lines)
        });
    };
    assert_eq!(pool.info()["thresholds"][0]["reached"], false);
    write(&device, 830);
    crossed("up 80\n");
    let info = pool.info();
    assert_eq!((&info["thresholds"][0]["reached"], &info["thresholds"][1]["reached"]), (&true.into(), &false.into()));
    assert!(has(&remembered(&pool), "threshold", None, "80 % reached"));
    // A successor knows what was told already.
    pool.kill_engine();
    std::thread::sleep(Duration::from_secs(3));
    crossed("up 80\n");
    assert!(!has(&remembered(&pool), "threshold", None, ""));
    run("blkdiscard", [&device]).expect();
    crossed("up 80\ndown 80\n");
    assert!(has(&remembered(&pool), "threshold", None, "below 80 % again"));
    assert_eq!(pool.info()["thresholds"][0]["reached"], false);
    pool.done("detach --all");
    pool.stop();
    pool.check();
}

pub fn events() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create files --size 256M");
    pool.attach("files");
    let followed = pool.folder().join("followed");
    let mut follower = pool
        .prepare(["events", "--json"])
        .stdout(fs::File::create(&followed).expect("a file"))
        .stderr(Stdio::null())
        .spawn()
        .expect("events start");
    pool.done("snapshot create files one");
    pool.done("clone create one copy");
    pool.done("pool check");
    pool.done("volume delete copy --yes");
    let follows = |what: &str| fs::read_to_string(&followed).expect("the file").contains(what);
    wait_until("the deletion is told", LONG, || follows("\"deleted\""));
    let events = remembered(&pool);
    for (kind, volume, words) in [
        ("engine", None, "serves the pool"),
        ("attached", Some("files"), "/dev/loop"),
        ("snapshotted", Some("one"), "snapshot of files"),
        ("created", Some("copy"), "clone of one"),
        ("began", None, "check"),
        ("ended", None, "check"),
        ("deleted", Some("copy"), ""),
    ] {
        assert!(has(&events, kind, volume, words), "{kind} {volume:?} {words} is not in {events:?}");
    }
    let numbers: Vec<u64> = events.iter().map(|event| event["number"].as_u64().expect("a number")).collect();
    assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");

    pool.kill_engine();
    wait_until("the successor tells", LONG, || follows("its predecessor has died"));
    assert!(follows("\"reconnected\""));
    pool.done("upgrade");
    wait_until("the second successor tells", LONG, || follows("its predecessor has handed over"));
    pool.done("detach files");
    wait_until("the detaching is told", LONG, || follows("\"detached\""));
    pool.stop();
    wait_until("who follows sees the end", LONG, || matches!(follower.try_wait(), Ok(Some(_))));
    assert!(follower.wait().expect("its end").success());
    let told = fs::read_to_string(&followed).expect("the file");
    assert!(
        told.lines().all(|line| serde_json::from_str::<Value>(line).is_ok_and(|line| line["version"] == 1)),
        "{told}"
    );
    pool.check();
}

/// The value of the metric that begins so.
fn metric(text: &str, begins: &str) -> Option<f64> {
    text.lines().find(|line| line.starts_with(begins))?.rsplit(' ').next()?.parse().ok()
}

fn collect(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 200 OK\r\n").then_some(answer)
}

pub fn metrics() {
    let pool = TestPool::create("1G", Transport::Auto);
    // One that is free now; nobody else takes it in this moment.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    serve(&pool, &["--metrics", &format!("127.0.0.1:{port}")]);
    pool.done("volume create files --size 256M");
    let device = pool.attach("files");
    write(&device, 8);
    pool.done("snapshot create files one");
    write(&device, 4);
    run("dd", [&format!("if={device}"), "of=/dev/null", "bs=64k", "count=16", "iflag=direct"]).expect();
    let text = collect(port).expect("metrics over HTTP");
    assert!(text.trim_end().ends_with("# EOF"));
    let labels = |kind: &str| format!("volume=\"files\",kind=\"{kind}\"}}");
    let name = pool.folder().file_name().expect("a name").to_string_lossy().into_owned();
    let value = |text: &str, metric_name: &str, kind: &str| {
        metric(text, &format!("{metric_name}{{pool=\"{name}\",{}", labels(kind)))
            .unwrap_or_else(|| panic!("{metric_name} of {kind} is not in:\n{text}"))
    };
    assert_eq!(value(&text, "plywood_volume_io_bytes_total", "write"), f64::from(12 << 20));
    assert!(value(&text, "plywood_volume_io_bytes_total", "read") >= f64::from(1 << 20));
    assert!(value(&text, "plywood_volume_io_latency_seconds_count", "read") >= 1.0);
    assert_eq!(value(&text, "plywood_volume_io_errors_total", "write"), 0.0);
    let redirected = format!("plywood_volume_blocks_redirected_total{{pool=\"{name}\",volume=\"files\"}}");
    assert_eq!(metric(&text, &redirected), Some(1024.0), "{text}");
    // The command tells the same, and a successor answers on the same port.
    assert_eq!(value(&pool.done("metrics"), "plywood_volume_io_bytes_total", "write"), f64::from(12 << 20));
    pool.kill_engine();
    wait_until("the successor's metrics", LONG, || collect(port).is_some());
    assert!(!Path::new("/proc/net/tcp").exists() || is_loopback_only(port));
    pool.done("detach --all");
    pool.stop();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "the port is closed with the daemon");
    pool.check();
}

/// Whether whoever listens on that port does so for this machine only.
fn is_loopback_only(port: u16) -> bool {
    let table = fs::read_to_string("/proc/net/tcp").expect("the table of sockets");
    let local = table.lines().filter_map(|line| line.split_whitespace().nth(1)?.split_once(':'));
    let mut addresses = local.filter(|(_, found)| *found == format!("{port:04X}")).map(|(address, _)| address);
    addresses.all(|address| address == "0100007F")
}

//! What people are told of a pool in use: thresholds and their command, events over a succession, metrics, the live view,
//! and what the doctor finds.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::support::command::{Background, run, wait_until};
use crate::support::machine::rootfs;
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
    write(&device, 800);
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

pub fn top() {
    let pool = TestPool::create("1G", Transport::Auto);
    for name in ["busy", "idle"] {
        pool.done(&format!("volume create {name} --size 256M"));
    }
    let (device, _) = (pool.attach("busy"), pool.attach("idle"));
    let line = format!("while :; do dd if=/dev/zero of={device} bs=64k count=64 oflag=direct 2>/dev/null; done");
    let writer = Background::start("sh", ["-c", &line]);
    let top = pool.json("top --once --interval 2", "top");
    let shown = pool.done("top --once --interval 1");
    drop(writer);
    let volumes = top["volumes"].as_array().expect("a list");
    assert_eq!(volumes[0]["name"], "busy", "the busiest stands first: {top}");
    assert_eq!(volumes[1]["name"], "idle");
    assert!(volumes[0]["writes_per_second"].as_f64().expect("a number") > 1.0, "{top}");
    assert!(volumes[0]["written_bytes_per_second"].as_f64().expect("a number") > 65536.0, "{top}");
    assert!(volumes[0]["mean_latency_us"].as_f64().expect("a number") > 0.0, "{top}");
    assert!(volumes[1]["mean_latency_us"].is_null(), "{top}");
    let (busy, idle) = (shown.find("\nbusy").expect("a line"), shown.find("\nidle").expect("a line"));
    assert!(busy < idle && shown.contains(&device), "{shown}");
    pool.done("detach --all");
    pool.stop();
    pool.check();
}

/// A terminal for `top`, by script(1): q ends it, and the terminal is as before.
pub fn top_on_a_terminal() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create files --size 64M");
    pool.attach("files");
    let plywood = crate::support::command::binary();
    let line = format!(
        "(for look in $(seq 600); do grep -aq VOLUME shown 2>/dev/null && break; sleep 0.1; done; printf q) | script -qefc 'stty -a > before; {} --pool {} top --interval 0.5; stty -a > after' shown >/dev/null; echo $? > status",
        plywood.display(),
        pool.file().display()
    );
    run("sh", ["-c".to_owned(), format!("cd '{}' && {line}", pool.folder().display())]).expect();
    let shown = fs::read_to_string(pool.folder().join("shown")).expect("what was shown");
    assert_eq!(fs::read_to_string(pool.folder().join("status")).expect("the status").trim(), "0", "{shown}");
    let modes = |file: &str| fs::read_to_string(pool.folder().join(file)).expect("the terminal's modes");
    assert!(modes("before").contains(" icanon") && modes("after") == modes("before"));
    assert!(shown.contains("VOLUME") && shown.contains("files"), "{shown:?}");
    assert!(shown.contains("\x1b[?25l") && shown.trim_end().contains("\x1b[?25h"), "the cursor is back: {shown:?}");
    pool.done("detach --all");
    pool.stop();
}

/// How far a long work is, on a terminal and nowhere else.
pub fn progress_on_a_terminal() {
    let pool = TestPool::create("8G", Transport::Auto);
    let (plywood, file) = (crate::support::command::binary(), pool.file().display().to_string());
    let import = |name: &str| {
        format!("'{}' --pool '{file}' image import 'tar:{}' {name}", plywood.display(), rootfs().display())
    };
    let shown = pool.folder().join("shown");
    run("script", ["-qefc".to_owned(), import("first"), shown.display().to_string()]).expect();
    let shown = fs::read_to_string(shown).expect("what was shown");
    assert!(shown.contains('█') && shown.contains("iB/s"), "{shown:?}");
    assert!(shown.contains("\rlayer 1") || shown.contains("layer 1 of 1"), "{shown:?}");
    let piped = run("sh", ["-c".to_owned(), import("second")]);
    assert!(!piped.stderr.contains("iB/s") && !piped.stderr.contains('\x1b'), "{:?}", piped.stderr);
    piped.expect();
    pool.stop();
}

/// The finding of the doctor on that.
fn finding(pool: &TestPool, what: &str) -> Value {
    // Others' pools may be bad: its exit status is theirs, too.
    let outcome = pool.plywood(["doctor", "--json"]);
    let told: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let findings = told["doctor"]["findings"].as_array().expect("a list").clone();
    findings.into_iter().find(|finding| finding["what"] == what).unwrap_or_else(|| panic!("nothing on {what}: {told}"))
}

pub fn doctor() {
    const REMAINS: &str = "loop devices of dead daemons";
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create files --size 64M");
    let device = pool.attach("files");
    let name = pool.info()["name"].as_str().expect("a name").to_owned();
    let named = |what: &str| format!("pool {name}{what}");
    assert_eq!(finding(&pool, &named(""))["found"], "in use, 1 attached");
    assert_eq!(finding(&pool, &named(": direct I/O"))["verdict"], "ok");
    assert_eq!(finding(&pool, &named(": space"))["verdict"], "ok");
    let says =
        |finding: &Value, device: &str| finding["found"].as_str().expect("words").contains(&format!("{device} ("));
    assert!(!says(&finding(&pool, REMAINS), &device), "it is served");

    let bundle = pool.folder().join("bundle.tar.zst");
    let _ = pool.plywood(["doctor".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    let listed = run("tar", ["--list".as_ref(), "--zstd".as_ref(), "--file".as_ref(), bundle.as_os_str()]).expect();
    for file in ["doctor.txt", "info.json", "events.json", "daemon.log", "superblocks.txt"] {
        assert!(listed.contains(file), "{file} is not in the bundle: {listed}");
    }

    let front = pool.process("front_pid").expect("a front");
    let engine = pool.process("engine_pid").expect("an engine");
    // An engine whose front has died lets go of what nobody has open.
    let held = fs::File::open(&device).expect("the device");
    run("kill", ["-9".to_owned(), front.to_string()]).expect();
    wait_until("the engine ends", LONG, || !crate::support::pool::is_alive(engine));
    let left = finding(&pool, REMAINS);
    assert!(left["verdict"] == "warning" && says(&left, &device), "{left}");
    // The next daemon takes it away.
    drop(held);
    let again = pool.attach("files");
    assert!(!says(&finding(&pool, REMAINS), &again));
    pool.done("detach --all");
    pool.stop();
    pool.check();
}

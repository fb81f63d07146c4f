//! What people are told of a pool that nobody holds: its space, metrics, and what the doctor finds; events are a daemon's.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::scratch::{Scratch, digest};

#[test]
fn info_tells_thresholds_space_of_the_host_and_overcommitment() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create large --size 4G");
    let pool = &scratch.json("pool info")["pool"];
    assert!(pool["host_free_bytes"].as_u64().expect("the host's free space") > 0);
    assert!(pool["filled_percent"].as_u64().expect("a number") < 80);
    let thresholds = pool["thresholds"].as_array().expect("a list");
    let percents: Vec<_> = thresholds.iter().map(|threshold| threshold["percent"].as_u64()).collect();
    assert_eq!(percents, [Some(80), Some(90), Some(95)]);
    assert!(thresholds.iter().all(|threshold| threshold["reached"] == false));
    assert_eq!((&pool["attached"], &pool["background"]), (&serde_json::json!([]), &serde_json::json!([])));
    let shown = scratch.done("pool info");
    for words in ["thresholds:", "free on the host:", "volumes 4.0 GiB : pool 1.0 GiB : host", "(4.00 times the pool)"]
    {
        assert!(shown.contains(words), "{words} is not in:\n{shown}");
    }
}

#[test]
fn metrics_of_a_pool_that_nobody_holds_are_those_of_its_space() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create one --size 64M");
    let text = scratch.done("metrics");
    assert!(text.ends_with("# EOF"), "{text}");
    for line in ["plywood_pool_size_bytes{pool=\"main\"} 1073741824", "plywood_volumes{pool=\"main\"} 1"] {
        assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
    }
    let json = scratch.json("metrics");
    assert!(json["metrics"]["counters"]["checkpoints"].is_u64(), "{json}");
    assert_eq!(json["metrics"]["volumes"], serde_json::json!([]));
}

#[test]
fn events_without_a_daemon_are_refused() {
    let scratch = Scratch::with_pool();
    scratch.refused("events", &["no daemon serves pool main", "plywood serve"]);
    scratch.refused("events --once --json", &["no daemon"]);
}

#[test]
fn top_without_a_daemon_is_refused() {
    Scratch::with_pool().refused("top --once", &["no daemon serves pool main", "volume list"]);
}

/// What `doctor --json` finds, and whether it ended as its findings say.
fn findings(scratch: &Scratch) -> Vec<Value> {
    let outcome = scratch.plywood(["doctor", "--json"]);
    let told: Value =
        serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {}", outcome.stderr));
    let findings = told["doctor"]["findings"].as_array().expect("a list").clone();
    for finding in &findings {
        assert_eq!(finding["verdict"] == "ok", finding["advice"].is_null(), "{finding}");
    }
    // Machines differ in what is bad of them, and in what other pools they have.
    let bad = findings.iter().any(|finding| finding["verdict"] == "bad");
    assert_eq!(outcome.status.code(), Some(i32::from(bad)), "{told}");
    findings
}

#[test]
fn doctor_looks_at_machine_and_pool_and_ends_with_1_when_something_is_bad() {
    let scratch = Scratch::with_pool();
    let before = digest(&scratch.pool());
    let sound = findings(&scratch);
    let verdict = |findings: &[Value], what: &str| {
        findings.iter().find(|finding| finding["what"] == what).map(|finding| finding["verdict"].clone())
    };
    for what in ["kernel", "fuse", "fuse over io_uring", "loop", "loop devices", "io_uring", "locked memory"] {
        assert!(verdict(&sound, what).is_some(), "nothing on {what}: {sound:?}");
    }
    assert_eq!(verdict(&sound, "pool main"), Some("ok".into()));
    assert_eq!(verdict(&sound, "pool main: direct I/O"), Some("ok".into()));
    assert_eq!(digest(&scratch.pool()), before, "the doctor only reads");

    let file = fs::File::options().write(true).open(scratch.pool()).expect("the pool");
    file.write_all_at(&[0x5a; 4 << 20], 0).expect("writing over the superblocks");
    let damaged = findings(&scratch);
    assert!(
        damaged.iter().any(|finding| finding["verdict"] == "bad"
            && finding["what"].as_str().is_some_and(|what| what.starts_with("pool ")))
    );
}

#[test]
fn bundle_has_superblocks_and_nothing_that_volumes_hold() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create one --size 64M");
    let bundle = scratch.path("bundle.tar.zst");
    let outcome =
        scratch.plywood(["doctor".into(), "--bundle".into(), bundle.clone().into_os_string()] as [OsString; 3]);
    assert!(outcome.stdout.contains("bundle.tar.zst"), "{}{}", outcome.stdout, outcome.stderr);
    let decoder = zstd::Decoder::new(fs::File::open(&bundle).expect("the bundle")).expect("zstd");
    let mut archive = tar::Archive::new(decoder);
    let mut about = Vec::new();
    let mut superblocks = String::new();
    for entry in archive.entries().expect("tar") {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a path").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        if name.ends_with("pool-0/superblocks.txt") {
            superblocks = text;
        }
        about.push(name);
    }
    assert_eq!(superblocks.matches("Superblock {").count(), 4, "{about:?} {superblocks}");
    scratch.refused_words(
        ["doctor".into(), "--bundle".into(), bundle.into_os_string()] as [OsString; 3],
        &["bundle.tar.zst", "exists"],
    );
}

//! What `--json` prints: its version, and the fields that programs may rely on.

use serde_json::Value;

use crate::scratch::Scratch;

const VOLUME: [&str; 28] = [
    "created_ns",
    "depth",
    "detect_zeroes",
    "device",
    "digest",
    "exclusive_age_seconds",
    "exclusive_bytes",
    "exclusive_unchanged_seconds",
    "failed_writes",
    "id",
    "mapped_bytes",
    "name",
    "open",
    "origin",
    "origin_uuid",
    "own_bytes",
    "protected",
    "quota_bytes",
    "reservation_bytes",
    "reservation_left_bytes",
    "sealed",
    "sector_size",
    "shared_bytes",
    "size_bytes",
    "snapshot",
    "uuid",
    "verify_on_read",
    "waits_when_full",
];

const POOL: [&str; 41] = [
    "attached",
    "background",
    "carcasses",
    "clock",
    "engine_pid",
    "engine_restarts",
    "filled_percent",
    "free_bytes",
    "freeing",
    "front_pid",
    "generation",
    "head_bytes",
    "host_bytes",
    "host_free_bytes",
    "journal_bytes",
    "journal_used_bytes",
    "kept_bytes",
    "layout_bytes",
    "live_bytes",
    "metadata_bytes",
    "name",
    "owed_bytes",
    "own_bytes",
    "path",
    "poisoned",
    "recovered",
    "reserve_bytes",
    "reserved_bytes",
    "scrub",
    "sealed",
    "size_bytes",
    "size_limit_bytes",
    "snapshots",
    "thresholds",
    "transport",
    "used_bytes",
    "uuid",
    "verify_on_read",
    "virtual_bytes",
    "volumes",
    "waiting",
];

const CHECK: [&str; 8] = [
    "data_blocks",
    "fault_count",
    "faults",
    "journal_records",
    "nodes",
    "unaccounted_blocks",
    "used_blocks",
    "volumes",
];

#[track_caller]
fn assert_fields(value: &Value, fields: &[&str]) {
    let mut found: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    found.sort_unstable();
    assert_eq!(found, fields, "{value}");
}

#[test]
fn every_command_that_prints_data_has_a_version_and_its_fields() {
    let scratch = Scratch::with_pool();
    let created = scratch.json("volume create one --size 64M --quota 32M");
    assert_fields(&created, &["version", "volume"]);
    assert_eq!(created["version"], 1);
    assert_fields(&created["volume"], &VOLUME);
    assert_eq!(created["volume"]["size_bytes"], 64 << 20);
    assert_eq!(created["volume"]["quota_bytes"], 32 << 20);
    assert_eq!(created["volume"]["sector_size"], 4096);

    let snapshot = scratch.json("snapshot create one first");
    assert_eq!(snapshot["volume"]["snapshot"], true);
    assert_eq!(snapshot["volume"]["origin"], "one");
    let clone = scratch.json("clone create first two --size 128M");
    assert_eq!(clone["volume"]["size_bytes"], 128 << 20);
    assert_eq!(clone["volume"]["depth"], 2);

    for line in ["volume list --all", "volume list", "snapshot list", "snapshot list one"] {
        let listed = scratch.json(line);
        assert_fields(&listed, &["version", "volumes"]);
        for volume in listed["volumes"].as_array().expect("a list") {
            assert_fields(volume, &VOLUME);
        }
    }
    assert_eq!(scratch.json("volume list --all")["volumes"].as_array().map(Vec::len), Some(3));
    assert_eq!(scratch.json("volume list")["volumes"].as_array().map(Vec::len), Some(2));
    assert_eq!(scratch.json("snapshot list two")["volumes"], serde_json::json!([]));

    let empty = &scratch.json("volume info one")["volume"];
    assert_eq!((&empty["exclusive_age_seconds"], &empty["shared_bytes"]), (&0.into(), &0.into()));
    assert_eq!(empty["exclusive_bytes"], 8192, "its record, which is a pair");

    let info = scratch.json("pool info");
    assert_fields(&info, &["pool", "version"]);
    assert_fields(&info["pool"], &POOL);
    assert_eq!(info["pool"]["name"], "main");
    assert_eq!(info["pool"]["size_bytes"], 1 << 30);
    assert_eq!((&info["pool"]["volumes"], &info["pool"]["snapshots"]), (&2.into(), &1.into()));
    assert_eq!(info["pool"]["virtual_bytes"], 256 << 20);
    for daemon_only in ["front_pid", "engine_pid", "engine_restarts", "transport"] {
        assert!(info["pool"][daemon_only].is_null(), "{daemon_only} without a daemon");
    }

    let check = scratch.json("pool check");
    assert_fields(&check["check"], &CHECK);
    assert_eq!(check["check"]["volumes"], 3);

    let diff = scratch.json("diff one first");
    assert_fields(&diff["diff"], &["changed_bytes", "from", "ranges", "to"]);
    assert_eq!(diff["diff"]["changed_bytes"], 0);

    assert_eq!(scratch.json("volume delete two --yes"), serde_json::json!({"version": 1, "deleted": "two"}));
    assert_fields(&scratch.json("image list"), &["images", "version"]);
}

#[test]
fn failed_command_prints_no_json() {
    let scratch = Scratch::with_pool();
    let outcome = scratch.plywood(["volume", "info", "nothing", "--json"]);
    assert_eq!(outcome.stdout, "");
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
}

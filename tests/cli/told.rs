//! What people are told of a pool that nobody holds: its space, and metrics; events are a daemon's.

use crate::scratch::Scratch;

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

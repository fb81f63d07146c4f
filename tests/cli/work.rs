//! What commands do that succeed, as far as it can be seen without a device.

use std::process::Stdio;

use crate::scratch::{Scratch, digest};

fn names(scratch: &Scratch) -> Vec<String> {
    let listed = scratch.json("volume list --all");
    listed["volumes"].as_array().expect("a list").iter().map(|volume| volume["name"].as_str().unwrap().into()).collect()
}

#[test]
fn volumes_snapshots_and_clones_come_and_go() {
    let scratch = Scratch::with_pool();
    assert!(scratch.done("volume create a --size 64M").contains("64.0 MiB (67108864 bytes)"), "the size is echoed");
    scratch.done("snapshot create a s");
    scratch.done("clone create s c");
    scratch.done("volume rename c d");
    assert_eq!(names(&scratch), ["a", "s", "d"]);
    scratch.done("volume resize d --size 96M");
    scratch.done("volume resize d --size 32M --quota 16M");
    let info = scratch.json("volume info d");
    assert_eq!(
        (&info["volume"]["size_bytes"], &info["volume"]["quota_bytes"]),
        (&(32 << 20).into(), &(16 << 20).into())
    );
    scratch.done("snapshot rollback a s --keep before");
    assert_eq!(names(&scratch), ["a", "s", "d", "before"]);
    scratch.done("volume protect s");
    scratch.done("volume protect s --off");
    scratch.done("snapshot delete s before --yes");
    // Not on a terminal: nobody is there to be asked.
    scratch.done("volume delete a d");
    assert_eq!(names(&scratch), [""; 0]);
    assert!(scratch.done("pool check").ends_with("0 faults"));
}

#[test]
fn reservation_is_made_shown_changed_and_refused() {
    let scratch = Scratch::with_pool();
    assert!(scratch.done("volume create a --size 64M --reserve 32M").contains("32.0 MiB (33554432 bytes) reserved"));
    let shown = |name: &str| {
        let info = scratch.json(&format!("volume info {name}"))["volume"].clone();
        [&info["size_bytes"], &info["reservation_bytes"], &info["reservation_left_bytes"]]
            .map(|value| value.as_u64().expect("a number") >> 20)
    };
    assert_eq!(shown("a"), [64, 32, 32]);
    assert!(scratch.done("volume info a").contains("32.0 MiB of it not its own yet"));
    assert_eq!(scratch.json("volume list")["volumes"][0]["reservation_bytes"], 32 << 20);
    let pool = scratch.json("pool info")["pool"].clone();
    assert_eq!(pool["reserved_bytes"], 32 << 20);
    // With room for its map: 64 leaves and pairs above, and for what changes move.
    assert_eq!(pool["owed_bytes"], (32 << 20) + (64 + 6 + 64) * 4096);
    assert!(scratch.done("pool info").contains("32.0 MiB (33554432 bytes) for volumes; 32.5 MiB of what is free"));

    // In one call, in whichever order it takes.
    scratch.done("volume resize a --size 128M --reserve 96M --quota 100M");
    assert_eq!(shown("a"), [128, 96, 96]);
    scratch.done("volume resize a --size 32M --reserve 16M --quota 16M");
    assert_eq!(shown("a"), [32, 16, 16]);
    scratch.refused("volume resize a --reserve 33M", &["size"]);
    scratch.refused("volume resize a --reserve 17M", &["quota"]);
    scratch.refused("volume resize a --quota 8M", &["quota", "reservation"]);
    // Looking for room may prepare some; of volumes nothing changes.
    let too_much = scratch.plywood("volume create b --size 2G --reserve 2G".split_whitespace());
    too_much.expect_refusal(&["bytes are missing", "plywood pool grow"]);
    assert_eq!(names(&scratch), ["a"]);
    scratch.done("volume resize a --quota 0 --reserve 0");
    assert_eq!(shown("a"), [32, 0, 0]);

    // A snapshot and a clone have none of it.
    scratch.done("volume resize a --reserve 32M");
    scratch.done("snapshot create a s");
    scratch.done("clone create s c");
    assert_eq!((shown("s"), shown("c")), ([32, 0, 0], [32, 0, 0]));
    scratch.refused("volume resize s --reserve 1M", &["snapshot"]);
    assert!(scratch.done("pool check").ends_with("0 faults"));
}

#[test]
fn detecting_zeroes_is_a_property_of_a_volume_that_clones_have_too() {
    let scratch = Scratch::with_pool();
    let words = "blocks of zeros are not stored";
    assert!(scratch.done("volume create a --size 64M --detect-zeroes").contains(words));
    scratch.done("snapshot create a s");
    assert!(scratch.done("clone create s c").contains(words));
    assert_eq!(scratch.json("volume info c")["volume"]["detect_zeroes"], true);
    assert!(!scratch.done("volume detect-zeroes a --off").contains(words));
    assert!(!scratch.done("volume create b --size 64M").contains(words));
    assert!(scratch.done("volume detect-zeroes b").contains(words));
}

#[test]
fn pool_says_what_its_blocks_are_for() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    let info = scratch.json("pool info");
    let bytes = |name: &str| info["pool"][name].as_u64().expect("it is known");
    let layout = bytes("layout_bytes") - bytes("head_bytes");
    assert_eq!(bytes("used_bytes"), bytes("own_bytes") + bytes("kept_bytes") + bytes("metadata_bytes") + layout);
    assert_eq!(bytes("live_bytes"), bytes("own_bytes") + bytes("kept_bytes"));
    assert_eq!(bytes("size_bytes"), bytes("head_bytes") + bytes("used_bytes") + bytes("free_bytes"));
    assert!(bytes("metadata_bytes") >= 8192, "a record at least");
}

#[test]
fn pool_grows_and_keeps_what_it_holds() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    scratch.done("pool grow --size 2G");
    assert_eq!(scratch.json("pool info")["pool"]["size_bytes"], 2_u64 << 30);
    assert_eq!(std::fs::metadata(scratch.pool()).unwrap().len(), 2 << 30);
    assert_eq!(names(&scratch), ["a"]);
    scratch.done("pool check");
    scratch.refused("pool grow --size 1G", &["shrink"]);
}

#[test]
fn commands_that_only_look_change_nothing() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    scratch.done("snapshot create a s");
    let before = digest(&scratch.pool());
    for line in ["pool info", "volume list", "volume info a", "snapshot list", "diff a s", "image list"] {
        scratch.done(line);
        assert_eq!(digest(&scratch.pool()), before, "plywood {line}");
    }
}

#[test]
fn pool_is_found_by_file_name_and_by_path() {
    let scratch = Scratch::with_pool();
    for named in ["main.plywood", "./main.plywood", scratch.pool().to_str().unwrap()] {
        let mut prepared = scratch.prepare(["--pool", named, "pool", "info"]);
        prepared.env_remove("PLYWOOD_POOL");
        crate::support::command::run_command(prepared).expect();
    }
}

#[test]
fn reader_that_goes_away_is_no_failure() {
    let scratch = Scratch::with_pool();
    for index in 0..40 {
        scratch.done(&format!("volume create volume-{index} --size 64M"));
    }
    let mut command = scratch.prepare(["volume", "list", "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("plywood");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("its end");
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn two_commands_on_one_file_take_turns() {
    let scratch = Scratch::with_pool();
    // The last of three on a slow disk waits for less than a command has patience for.
    for indexes in [0..3, 3..6] {
        let commands: Vec<_> = indexes
            .map(|index| {
                let mut command = scratch.prepare(["volume", "create", &format!("v{index}"), "--size", "64M"]);
                command.stdout(Stdio::null()).stderr(Stdio::inherit());
                command.spawn().expect("plywood")
            })
            .collect();
        for mut command in commands {
            assert!(command.wait().expect("its end").success());
        }
    }
    assert_eq!(names(&scratch).len(), 6);
    scratch.done("pool check");
}

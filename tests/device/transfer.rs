//! Snapshots that move from pool to pool as streams, and volumes that become disk images and back.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::command::{binary, run, shell, wait_until};
use crate::support::pool::{TestPool, Transport};

const MIB: u64 = 1 << 20;

/// Pseudo-random content, another for each `seed`.
fn write(device: &str, offset: u64, length: u64, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let content: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
    let device = OpenOptions::new().write(true).open(device).expect("the device");
    device.write_all_at(&content, offset).expect("written");
    device.sync_all().expect("synced");
}

fn snapshot(pool: &TestPool, name: &str) -> Value {
    pool.volume(name)
}

/// All that a pool holds, and the MiB that it takes: what must be the same after what was refused.
fn all(pool: &TestPool) -> (Vec<String>, u64) {
    pool.done("pool trim");
    // The pool's own tables have a page more or less.
    (pool.names(), (pool.info()["used_bytes"].as_u64().expect("a number") + MIB / 4) / MIB)
}

/// A pool with a volume that has two snapshots: a good part of it changed between them.
fn sender() -> (TestPool, String) {
    let pool = TestPool::create("4G", Transport::Auto);
    pool.done("volume create files --size 256M --sector-size 512");
    let device = pool.attach("files");
    write(&device, 0, 40 * MIB, 1);
    write(&device, 200 * MIB + 4096, 3 * MIB, 2);
    pool.done("snapshot create files one");
    write(&device, 10 * MIB, MIB, 3);
    write(&device, 100 * MIB + 8192, 4096, 4);
    run("fallocate", ["--punch-hole", "--offset", "20MiB", "--length", "5MiB", &device]).expect();
    pool.done("snapshot create files two");
    (pool, device)
}

fn stream(pool: &TestPool, line: &str, name: &str) -> PathBuf {
    let path = pool.folder().join(name);
    pool.done(&format!("send {line} --output {}", path.display()));
    path
}

fn receive(pool: &TestPool, more: &str, stream: &Path) -> Value {
    pool.json(&format!("receive {more} --input {}", stream.display()), "received")
}

pub fn snapshots_move_between_pools() {
    let (from, device) = sender();
    let to = TestPool::create("4G", Transport::Auto);
    // As users do it.
    let program = binary();
    let line = format!(
        "'{0}' --pool '{1}' send one | '{0}' --pool '{2}' receive",
        program.display(),
        from.file().display(),
        to.file().display()
    );
    shell(&line).expect();
    assert_eq!(snapshot(&to, "one")["digest"], snapshot(&from, "one")["digest"]);
    // Only what changed: one MiB, one block, and that something is zeros.
    let changed = stream(&from, "two --from one", "changed");
    let bytes = fs::metadata(&changed).expect("the stream").len();
    assert!((MIB..MIB + 64 * 1024).contains(&bytes), "{bytes} bytes");
    receive(&to, "second", &changed);
    assert_eq!(snapshot(&to, "second")["digest"], snapshot(&from, "two")["digest"]);
    assert!(to.volume("second")["mapped_bytes"].as_u64() < to.volume("one")["mapped_bytes"].as_u64());

    // Larger, and smaller again; the base has another name there.
    pool_of_size(&from, "300M");
    write(&device, 290 * MIB, MIB, 5);
    from.done("snapshot create files three");
    receive(&to, "", &stream(&from, "three --from two", "larger"));
    from.done("detach files");
    pool_of_size(&from, "128M");
    from.done("snapshot create files four");
    receive(&to, "", &stream(&from, "four --from three", "smaller"));
    for name in ["three", "four"] {
        let (there, here) = (snapshot(&from, name), snapshot(&to, name));
        assert_eq!((&there["digest"], &there["size_bytes"]), (&here["digest"], &here["size_bytes"]), "{name}");
        assert_eq!(here["sector_size"], 512);
    }
    // Nothing else is there, and what arrived is used like any snapshot.
    let names = to.names();
    assert_eq!(names, ["four", "one", "second", "three"]);
    to.done("clone create second copy");
    let copy = to.attach("copy");
    let (mut expected, mut found) = (vec![0; MIB as usize], vec![1; MIB as usize]);
    let original = from_clone(&from, "two");
    for offset in [0, 10 * MIB, 20 * MIB, 100 * MIB, 200 * MIB] {
        File::open(&original).expect("a device").read_exact_at(&mut expected, offset).expect("read");
        File::open(&copy).expect("a device").read_exact_at(&mut found, offset).expect("read");
        assert!(expected == found, "content at {offset}");
    }
    for pool in [from, to] {
        pool.stop();
        pool.check();
    }
}

fn pool_of_size(pool: &TestPool, size: &str) {
    pool.done(&format!("volume resize files --size {size} --force"));
}

fn from_clone(pool: &TestPool, snapshot: &str) -> String {
    pool.done(&format!("clone create {snapshot} of-{snapshot}"));
    pool.attach(&format!("of-{snapshot}"))
}

pub fn bad_streams_change_nothing() {
    let (from, _) = sender();
    let whole = stream(&from, "one", "whole");
    let changed = stream(&from, "two --from one", "changed");
    let to = TestPool::create("4G", Transport::Auto);
    let before = all(&to);
    let content = fs::read(&whole).expect("the stream");
    let input = |content: &[u8]| {
        let path = to.folder().join("broken");
        fs::write(&path, content).expect("a file");
        format!("receive --input {}", path.display())
    };
    to.refused(&input(&content[..content.len() / 2]), &["ends early"]);
    to.refused(&input(&content[..content.len() - 1]), &["ends early"]);
    to.refused(&input(&[]), &["ends early"]);
    let mut flipped = content.clone();
    flipped[content.len() / 2] ^= 4;
    to.refused(&input(&flipped), &["damaged in frame"]);
    to.refused(&input(&vec![7; 100_000]), &["not one that plywood send writes"]);
    to.refused(&format!("receive --input {}", changed.display()), &["since one", "does not have"]);
    to.refused("receive --input /does/not/exist", &["/does/not/exist"]);
    from.refused("send files", &["is a volume", "snapshot create files"]);
    from.refused("send nothing", &["nothing"]);
    from.refused(&format!("send one --output {}", whole.display()), &["exists already"]);
    assert_eq!(all(&to), before);
    receive(&to, "", &whole);
    let before = all(&to);
    to.refused(&format!("receive --input {}", whole.display()), &["one exists already"]);
    // Right frames with wrong content: somebody's base has the name and not the content.
    let liar = TestPool::create("4G", Transport::Auto);
    liar.done("volume create files --size 256M --sector-size 512");
    write(&liar.attach("files"), 0, MIB, 9);
    liar.done("snapshot create files one");
    liar.refused(&format!("receive --input {}", changed.display()), &["since one", "does not have"]);
    // A pool without room for it.
    let small = TestPool::create("256M", Transport::Auto);
    let left = small.info()["free_bytes"].as_u64().expect("a number") - 24 * MIB;
    small.done("volume create filler --size 256M --sector-size 4096");
    write(&small.attach("filler"), 0, left / MIB * MIB, 8);
    small.done("detach filler");
    let was = small.names();
    let refused = small.plywood(["receive".into(), "--input".into(), whole.clone().into_os_string()]);
    assert!(!refused.succeeded(), "a full pool");
    assert_eq!(small.names(), was);
    assert_eq!(all(&to), before);
    for pool in [from, to, liar, small] {
        pool.stop();
        pool.check();
    }
}

pub fn interrupted_streams_are_resumed() {
    let (from, _) = sender();
    let whole = stream(&from, "one", "whole");
    let to = TestPool::create("4G", Transport::Auto);
    let content = fs::read(&whole).expect("the stream");
    let part = to.folder().join("part");
    fs::write(&part, &content[..content.len() / 2]).expect("a file");
    to.refused(&format!("receive --resumable --input {}", part.display()), &["ends early", "--resume"]);
    let told = to.json("receive --list", "receiving");
    let done = told[0]["done_bytes"].as_u64().expect("a number");
    assert!(done > 10 * MIB && told.as_array().is_some_and(|list| list.len() == 1), "{told}");
    assert!(!to.names().contains(&"one".to_owned()));
    // What is kept outlives the daemon.
    to.stop();
    let rest = stream(&from, &format!("one --resume {done}"), "rest");
    assert!(fs::metadata(&rest).expect("the rest").len() < content.len() as u64 * 2 / 3);
    let late = stream(&from, &format!("one --resume {}", done + 4096), "late");
    to.refused(&format!("receive --resumable --input {}", late.display()), &["what is here ends at"]);
    receive(&to, "--resumable", &rest);
    assert_eq!(snapshot(&to, "one")["digest"], snapshot(&from, "one")["digest"]);
    assert_eq!(to.json("receive --list", "receiving"), serde_json::json!([]));
    assert_eq!(to.names(), ["one"]);
    // The rest alone is nothing.
    let other = TestPool::create("4G", Transport::Auto);
    other.refused(&format!("receive --input {}", rest.display()), &["nothing of one has arrived"]);
    for pool in [from, to, other] {
        pool.stop();
        pool.check();
    }
}

/// A receive that is killed (-9) in the middle, or with one byte to come, has received nothing, and keeps nobody from
/// receiving it.
/// What a full pool has lost has not arrived: it is sent again when there is room.
pub fn receive_into_a_full_pool_is_resumed() {
    let from = TestPool::create("2G", Transport::Auto);
    from.done("volume create files --size 1G");
    let device = from.attach("files");
    for number in 0..6 {
        write(&device, number * 100 * MIB, 100 * MIB, number);
    }
    from.done("snapshot create files large");
    let whole = stream(&from, "large", "whole");
    let to = TestPool::create("400M", Transport::Auto);
    let said = to.refused(&format!("receive --resumable --input {}", whole.display()), &["go on with", "--resume"]);
    let (_, from_there) = said.split_once("--resume ").expect("where to go on");
    let (from_there, _) = from_there.split_once(' ').expect("a number");
    assert!((MIB..500 * MIB).contains(&from_there.parse().expect("a number")), "{said}");
    to.done("pool grow --size 2G");
    let rest = stream(&from, &format!("large --resume {from_there}"), "rest");
    let received = receive(&to, "--resumable", &rest);
    from.done("snapshot seal large");
    assert_eq!(received["digest"], snapshot(&from, "large")["digest"]);
    for pool in [from, to] {
        pool.stop();
        pool.check();
    }
}

/// A stream whose reader goes is cut short, and that is no success.
pub fn stream_without_a_reader_is_an_error() {
    let (from, _) = sender();
    let line = format!(
        "'{}' --pool '{}' send one | head -c 1000000 >/dev/null; exit ${{PIPESTATUS[0]}}",
        binary().display(),
        from.file().display()
    );
    let outcome = run("bash", ["-c", &line]);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("before its end"), "{}", outcome.stderr);
    from.stop();
}

pub fn killed_receive_has_received_nothing() {
    let (from, _) = sender();
    let whole = stream(&from, "one", "whole");
    let content = fs::read(&whole).expect("the stream");
    for (option, length) in [("", content.len() / 2), ("", content.len() - 1), ("--resumable", content.len() / 2)] {
        let to = TestPool::create("4G", Transport::Auto);
        let mut killed = Command::new(binary());
        killed.arg("receive").args(option.split_whitespace()).env("PLYWOOD_POOL", to.file()).stdin(Stdio::piped());
        let mut killed = killed.spawn().expect("a receive");
        // All of it but what is in the pipe and in its memory has been read, and there is more to come.
        let mut pipe = killed.stdin.take().expect("its input");
        pipe.write_all(&content[..length]).expect("it reads");
        killed.kill().expect("it has not ended");
        killed.wait().expect("its end");
        drop(pipe);
        let names = to.names();
        assert!(names.len() == 1 && names[0].starts_with("one.receive-"), "what it was working on: {names:?}");
        let told = to.json("receive --list", "receiving");
        let kept = told.as_array().expect("a list");
        assert_eq!(kept.len(), usize::from(option == "--resumable"), "{told}");
        assert!(kept.iter().all(|kept| kept["done_bytes"] == 0), "nothing was durable yet: {told}");
        to.check();

        receive(&to, option, &whole);
        assert_eq!(snapshot(&to, "one")["digest"], snapshot(&from, "one")["digest"]);
        assert_eq!(to.json("receive --list", "receiving"), serde_json::json!([]));
        // What is left of the one that was killed goes with the daemon.
        to.stop();
        to.attach("one");
        wait_until("nothing else is there", Duration::from_secs(60), || to.names() == ["one"]);
        to.done("detach one");
        to.stop();
        to.check();
    }
    from.stop();
    from.check();
}

pub fn volumes_become_disk_images() {
    let (pool, device) = sender();
    let (raw, qcow2) = (pool.folder().join("disk.raw"), pool.folder().join("disk.qcow2"));
    pool.done(&format!("volume export two raw:{}", raw.display()));
    pool.done(&format!("volume export files qcow2:{}", qcow2.display()));
    let taken = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&raw).expect("the file")) * 512;
    assert!(taken < 50 * MIB, "{taken} bytes for 39 MiB");
    run("cmp", [raw.as_os_str(), device.as_ref()]).expect();
    let digest = pool.json("snapshot seal two", "volume")["digest"].clone();
    for (kind, file) in [("raw", &raw), ("qcow2", &qcow2)] {
        pool.done(&format!("volume import {kind}:{} {kind} --sector-size 512", file.display()));
        pool.done(&format!("snapshot create {kind} of-{kind}"));
        let sealed = pool.json(&format!("snapshot seal of-{kind}"), "volume");
        assert_eq!(sealed["digest"], digest, "{kind}");
        assert!(sealed["mapped_bytes"].as_u64().expect("a number") < 50 * MIB);
    }
    pool.refused(&format!("volume export two raw:{}", raw.display()), &["exists already"]);
    pool.refused(&format!("volume import raw:{} raw", raw.display()), &["raw exists already"]);
    let names = pool.names();
    assert!(names.iter().all(|name| !name.contains(".export-")), "{names:?}");
    pool.stop();
    pool.check();
}

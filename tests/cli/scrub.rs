//! Sealing and scrubbing on a pool file: digests, what a scrub says of damage, and its exit code.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use async_executor::LocalExecutor;
use plywood::engine::{OpenOptions, Pool, PrivateLog};
use plywood::io::{FileStorage, IoMemory, Reactor, ReactorOptions, block_on};
use serde_json::Value;

use crate::scratch::Scratch;

/// A pool with two snapshots, `a` and `b`, of the same content.
fn sealed_pool() -> Scratch {
    let scratch = Scratch::with_pool();
    let mut content = vec![0; 4 << 20];
    for (number, block) in content.chunks_mut(4096).enumerate().filter(|(number, _)| number % 3 != 0) {
        block.fill(number as u8);
        block[..16].copy_from_slice(b"plywood in a pie");
    }
    for name in ["a", "b"] {
        scratch.done(&format!("volume create of-{name} --size 4M"));
        write(&scratch, &format!("of-{name}"), &content);
        scratch.done(&format!("snapshot create of-{name} {name}"));
    }
    scratch
}

/// Writes to a volume of a pool that nobody holds.
fn write(scratch: &Scratch, volume: &str, content: &[u8]) {
    let reactor = Reactor::new(ReactorOptions::default()).expect("a ring");
    let executor = LocalExecutor::new();
    let storage = FileStorage::open(&reactor, &scratch.pool(), plywood::io::OpenOptions::default()).expect("the file");
    let written = block_on(&executor, &reactor, &(), async {
        let pool = Pool::open(storage, Box::new(PrivateLog::new(0)), OpenOptions::default()).await?;
        let background = pool.clone();
        let task = executor.spawn(async move { background.run().await });
        let handle = pool.open_volume(pool.volume(volume)?.id, false)?;
        for (number, part) in content.chunks(256 << 10).enumerate() {
            drop(handle.write((number << 18) as u64, &IoMemory::from_bytes(part), false).await?);
        }
        drop(handle);
        pool.close().await?;
        task.await;
        Ok::<(), plywood::error::Error>(())
    });
    written.expect("the ring").expect("the content");
}

fn digest_of(scratch: &Scratch, name: &str) -> Option<String> {
    let info: Value = serde_json::from_str(&scratch.done(&format!("volume info {name} --json"))).unwrap();
    info["volume"]["digest"].as_str().map(str::to_owned)
}

#[test]
fn sealed_snapshots_show_the_digest_of_their_content() {
    let scratch = sealed_pool();
    assert_eq!(digest_of(&scratch, "a"), None);
    let said = scratch.done("snapshot seal a b");
    let digest = digest_of(&scratch, "a").expect("sealed");
    assert_eq!(digest.len(), 64);
    assert_eq!(digest_of(&scratch, "b").as_ref(), Some(&digest), "the same content has the same digest");
    assert_eq!(said.lines().filter(|line| line.contains(&digest)).count(), 2, "{said}");
    let list = scratch.done("snapshot list");
    assert!(list.contains("SEALED") && list.contains(&digest[..12]), "{list}");
    assert!(scratch.done("pool info").contains("2 of 2 snapshots"));
    scratch.done("clone create a v");
    scratch.refused("snapshot seal v", &["v", "not a snapshot"]);
    scratch.refused("snapshot seal nosuch", &["nosuch"]);
}

#[test]
fn scrub_reports_damage_by_volume_and_range_and_ends_with_1() {
    let scratch = sealed_pool();
    assert!(scratch.done("pool info").contains("never"));
    scratch.done("snapshot seal a b");
    scratch.done("clone create b c");
    let said = scratch.done("pool scrub");
    assert!(said.contains("8.0 MiB of sealed blocks"), "{said}");
    assert!(scratch.done("pool info").contains("no faults"));

    // Block 5 of an image, and those that look like it.
    let bytes = fs::read(scratch.pool()).unwrap();
    let mut block = [5; 4096];
    block[..16].copy_from_slice(b"plywood in a pie");
    let places: Vec<u64> =
        bytes.chunks(4096).enumerate().filter(|(_, found)| *found == block).map(|(number, _)| number as u64).collect();
    assert_eq!(places.len(), 6, "block numbers are cut to a byte: three in each image");
    let first = places[0];
    File::options().write(true).open(scratch.pool()).unwrap().write_all_at(b"!", first * 4096 + 4000).unwrap();

    let outcome = scratch.plywood(["pool", "scrub", "--json", "--rate", "100M"]);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    let json: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let [fault] = &json["scrub"]["faults"].as_array().unwrap()[..] else { panic!("{json}") };
    assert_eq!((fault["block"].as_u64(), fault["structure"].as_str()), (Some(first), Some("data block")));
    let touches = fault["touches"].as_array().unwrap();
    let names: Vec<_> = touches.iter().map(|touched| touched["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["of-a", "a"]);
    assert!(touches.iter().all(|touched| touched["ranges"][0]["length_bytes"] == 4096));
    assert!(scratch.done("pool info").contains("1 faults"));
    let outcome = scratch.plywood(["pool", "scrub"]);
    assert!(outcome.stdout.contains("touches a at "), "{}", outcome.stdout);
}

#[test]
fn verify_on_read_is_a_property_of_a_volume_or_the_pool() {
    let scratch = sealed_pool();
    assert!(scratch.done("volume verify-on-read a").contains("verified on read"));
    assert!(!scratch.done("volume verify-on-read a --off").contains("verified on read"));
    let verified = |scratch: &Scratch| {
        let info: Value = serde_json::from_str(&scratch.done("pool info --json")).unwrap();
        info["pool"]["verify_on_read"].as_bool().unwrap()
    };
    assert!(!verified(&scratch));
    scratch.done("pool verify-on-read");
    assert!(verified(&scratch));
    scratch.done("pool verify-on-read --off");
    assert!(!verified(&scratch));
}

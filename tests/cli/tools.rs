//! Check, dump, restore and repair on a pool file: exit codes, what is said, and what is left alone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::scratch::{Scratch, digest};

/// A pool with two volumes and a snapshot, and the blocks of its records.
fn pool_with_records() -> (Scratch, Vec<u64>) {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    scratch.done("volume create b --size 64M");
    scratch.done("snapshot create a s");
    let bytes = fs::read(scratch.pool()).unwrap();
    let records = bytes.chunks(4096).enumerate().filter(|(_, block)| block.starts_with(b"plywvol\0"));
    let records = records.map(|(number, _)| number as u64).collect();
    (scratch, records)
}

fn destroy(scratch: &Scratch, blocks: &[u64]) {
    let file = File::options().write(true).open(scratch.pool()).unwrap();
    for block in blocks {
        file.write_all_at(&[0x77; 64], block * 4096 + 1000).unwrap();
    }
}

#[test]
fn check_changes_nothing_and_ends_with_1_when_there_are_faults() {
    let (scratch, records) = pool_with_records();
    let before = digest(&scratch.pool());
    assert!(scratch.done("pool check").contains("0 faults"));
    assert_eq!(digest(&scratch.pool()), before);
    destroy(&scratch, &records);
    let before = digest(&scratch.pool());
    let outcome = scratch.plywood(["pool", "check", "--json"]);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("faults"), "{}", outcome.stderr);
    let json: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let fault = &json["check"]["faults"][0];
    assert_eq!(fault["structure"], "volume record");
    assert!(fault["block"].is_u64() && fault["check"].as_str().unwrap().contains("checksum"), "{fault}");
    assert_eq!(digest(&scratch.pool()), before);
}

#[test]
fn dump_restores_what_was_destroyed() {
    let (scratch, records) = pool_with_records();
    let said = scratch.done("pool dump --output metadata");
    assert!(said.contains("no backup"), "{said}");
    let text = fs::read_to_string(scratch.path("metadata")).unwrap();
    assert_eq!(scratch.done("pool dump"), text.trim_end());
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok_and(|line| line.is_object())));
    scratch.refused("pool dump --output metadata", &["metadata"]);
    destroy(&scratch, &records);
    scratch.refused("volume list", &["damaged"]);
    // Nobody is there to be asked.
    scratch.done("pool restore metadata");
    assert!(scratch.done("pool check").contains("0 faults"));
    assert_eq!(scratch.done("pool dump"), text.trim_end());
    // Even without a superblock.
    destroy(&scratch, &[0, 128, 256, 384]);
    scratch.refused("volume list", &["damaged", "superblock"]);
    scratch.done("pool restore metadata --yes");
    assert_eq!(scratch.done("pool dump"), text.trim_end());
    scratch.refused("pool restore nothing", &["nothing"]);
    fs::write(scratch.path("cut"), &text[..text.len() / 2]).unwrap();
    scratch.refused("pool restore cut", &["dump"]);
}

#[test]
fn damaged_pool_is_dumped_as_far_as_it_goes() {
    let (scratch, records) = pool_with_records();
    destroy(&scratch, &records);
    let outcome = scratch.plywood(["pool", "dump"]);
    assert_eq!(outcome.status.code(), Some(1));
    let lines: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["fault"]["structure"] == "volume record"), "{}", outcome.stdout);
    assert!(lines.last().unwrap()["end"].is_object());
}

#[test]
fn repair_goes_to_a_copy_or_saves_what_it_writes_over() {
    let (scratch, records) = pool_with_records();
    assert!(scratch.done("pool repair --output sound").contains("nothing is wrong"));
    destroy(&scratch, &records);
    let damaged = digest(&scratch.pool());
    let said = scratch.done("pool repair --output copy");
    assert!(said.contains("lost: volumes with ids"), "{said}");
    assert_eq!(digest(&scratch.pool()), damaged, "the pool itself was not to be touched");
    assert!(scratch.done("--pool copy pool check").contains("0 faults"));
    scratch.refused("pool repair --output copy", &["copy", "already"]);
    scratch.done("pool repair --in-place --save old");
    assert!(scratch.done("pool check").contains("0 faults"));
    scratch.done("volume list");
    scratch.done("pool repair --undo old");
    assert_eq!(digest(&scratch.pool()), damaged);
    for line in ["pool repair", "pool repair --in-place --output x", "pool repair --output x --save y"] {
        scratch.misused(line);
    }
}

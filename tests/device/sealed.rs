//! Sealed snapshots of volumes in use: damage in the pool's file is told by a scrub beside I/O, and is an error to whoever
//! reads with verification, never data.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::command::{Background, run};
use crate::support::pool::{TestPool, Transport};

const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;

fn content(number: usize) -> Vec<u8> {
    let mut block = vec![(number % 251) as u8; BLOCK];
    block[..8].copy_from_slice(&(number as u64).to_le_bytes());
    block[8..16].copy_from_slice(b"a sealed");
    block
}

/// Reads blocks of a device past the page cache.
fn read(pool: &TestPool, device: &str, first: usize, count: usize) -> Result<Vec<u8>, String> {
    let into = pool.folder().join("read");
    let what = format!("if={device} iflag=direct bs={BLOCK} skip={first} count={count}");
    let outcome = run("dd", what.split(' ').map(str::to_owned).chain([format!("of={}", into.display())]));
    if outcome.succeeded() { Ok(fs::read(&into).expect("what dd wrote")) } else { Err(outcome.stderr) }
}

/// Where in the pool's file the block of that number stands.
fn place_of(pool: &Path, number: usize) -> u64 {
    let mut file = File::open(pool).expect("the pool's file");
    let wanted = content(number);
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    loop {
        file.seek(SeekFrom::Start(at)).expect("a place");
        file.read_exact(&mut block).expect("the block is somewhere");
        if block == wanted {
            return at;
        }
        at += BLOCK as u64;
    }
}

pub fn damage_is_an_error() {
    let pool = TestPool::create("4G", Transport::Auto);
    pool.done("volume create files --size 256M --sector-size 4096");
    let device = pool.attach("files");
    let all: Vec<u8> = (0..BLOCKS).flat_map(content).collect();
    fs::write(pool.folder().join("content"), &all).expect("the content");
    let from = format!("if={}", pool.folder().join("content").display());
    run("dd", [from, format!("of={device}"), "bs=1M".into(), "oflag=direct".into(), "conv=fsync".into()]).expect();
    pool.done("snapshot create files one");
    pool.done("snapshot seal one");
    let digest = pool.volume("one")["digest"].clone();
    assert_eq!(digest.as_str().map(str::len), Some(64));

    // Writes go on meanwhile.
    let line =
        format!("while :; do dd if=/dev/urandom of={device} bs=64k count=64 oflag=direct seek=512 2>/dev/null; done");
    let writer = Background::start("sh", ["-c", &line]);
    assert_eq!(pool.json("pool scrub", "scrub")["fault_count"], 0);

    let bad = place_of(pool.file(), 700);
    let file = File::options().write(true).open(pool.file()).expect("the pool's file");
    file.write_all_at(b"!", bad + 3000).expect("a flipped byte");
    file.sync_all().expect("on the medium");
    let outcome = pool.plywood(["pool", "scrub", "--json"]);
    drop(writer);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    let found: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let fault = &found["scrub"]["faults"][0];
    assert_eq!(fault["block"], bad / BLOCK as u64);
    let touched = fault["touches"].as_array().expect("a list").iter().find(|touched| touched["name"] == "one");
    assert_eq!(touched.expect("the snapshot is touched")["ranges"][0]["offset_bytes"], 700 * BLOCK as u64);

    pool.done("clone create one copy");
    let (one, copy) = (pool.attach("one"), pool.attach("copy"));
    assert_ne!(read(&pool, &one, 700, 1).expect("without verification it is data"), content(700));
    pool.done("volume verify-on-read copy");
    let refused = read(&pool, &copy, 700, 1).expect_err("damage is an error");
    assert!(refused.contains("Input/output error"), "{refused}");
    assert!(read(&pool, &copy, 690, 20).is_err());
    assert_eq!(read(&pool, &copy, 699, 1).expect("the block before is good"), content(699));
    assert_eq!(read(&pool, &copy, 701, 1).expect("the block behind is good"), content(701));
    // The successor knows of it, too.
    pool.kill_engine();
    assert!(read(&pool, &copy, 700, 1).is_err());
    assert_eq!(read(&pool, &copy, 0, 600).expect("the rest is good"), all[..600 * BLOCK]);
    pool.done("detach --all");
    pool.stop();
    // Metadata is sound.
    pool.check();
}

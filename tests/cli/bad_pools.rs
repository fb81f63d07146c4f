//! Bad input about pools: each is refused with one clear line and exit status 1, and nothing changes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::scratch::{Scratch, digest};
use crate::support::command::run;

const BLOCK: usize = 4096;

/// Where the four copies of the superblock stand, in blocks.
const SUPERBLOCKS: [u64; 4] = [0, 256, 128, 384];

/// Changes bytes of every superblock of a pool, and its checksum with them: what another build might have written.
fn rewrite_superblocks(pool: &Path, offset: usize, bytes: &[u8]) {
    let file = File::options().read(true).write(true).open(pool).expect("the pool");
    for address in SUPERBLOCKS {
        let mut block = vec![0; BLOCK];
        file.read_exact_at(&mut block, address * BLOCK as u64).expect("a superblock");
        if !block.starts_with(b"plywood\0") {
            continue;
        }
        block[offset..offset + bytes.len()].copy_from_slice(bytes);
        block[12..16].fill(0);
        let checksum = crc32fast::hash(&block);
        block[12..16].copy_from_slice(&checksum.to_le_bytes());
        file.write_all_at(&block, address * BLOCK as u64).expect("a superblock");
    }
}

/// Every command that opens a pool refuses this one with a line that has all of `named`.
#[track_caller]
fn refused_by_all(scratch: &Scratch, named: &[&str]) {
    for line in ["pool info", "pool check", "volume list", "volume create a --size 64M", "pool grow --size 2G"] {
        scratch.refused(line, named);
    }
}

#[test]
fn no_such_pool_is_named() {
    let scratch = Scratch::empty();
    refused_by_all(&scratch, &["main.plywood", "no such pool"]);
    scratch.refused("--pool nothing pool info", &["nothing"]);
    scratch.refused("--pool ./nothing pool info", &["nothing", "no such pool"]);
}

#[test]
fn file_that_is_no_pool_is_refused() {
    let scratch = Scratch::empty();
    for content in [&b""[..], b"hello", &[0x5a; 3 << 20]] {
        fs::write(scratch.pool(), content).unwrap();
        refused_by_all(&scratch, &["main.plywood", "not a plywood pool"]);
    }
    scratch.refused("--pool / pool info", &["neither"]);
    scratch.refused("--pool /dev/null pool info", &["neither"]);
}

#[test]
fn newer_formats_are_refused_in_words() {
    let scratch = Scratch::with_pool();
    rewrite_superblocks(&scratch.pool(), 8, &7_u32.to_le_bytes());
    refused_by_all(&scratch, &["version 7", "newer plywood"]);
    let scratch = Scratch::with_pool();
    rewrite_superblocks(&scratch.pool(), 16, &(1_u64 << 40).to_le_bytes());
    refused_by_all(&scratch, &["features", "newer plywood"]);
}

#[test]
fn rewriting_superblocks_by_itself_does_no_harm() {
    // What the test above relies on: the checksum it computes is the right one.
    let scratch = Scratch::with_pool();
    rewrite_superblocks(&scratch.pool(), 8, &1_u32.to_le_bytes());
    scratch.done("pool check");
}

#[test]
fn truncated_pool_is_refused() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    let file = File::options().write(true).open(scratch.pool()).unwrap();
    file.set_len((1 << 30) - 4096).unwrap();
    refused_by_all(&scratch, &["truncated"]);
    file.set_len(1 << 20).unwrap();
    refused_by_all(&scratch, &["truncated"]);
}

#[test]
fn damaged_superblocks_are_told_as_damage() {
    let scratch = Scratch::with_pool();
    let file = File::options().write(true).open(scratch.pool()).unwrap();
    for address in SUPERBLOCKS {
        file.write_all_at(b"damage", address * BLOCK as u64 + 2000).unwrap();
    }
    refused_by_all(&scratch, &["damaged", "superblock"]);
}

#[test]
fn pool_somebody_works_on_is_in_use() {
    let scratch = Scratch::with_pool();
    let file = File::options().read(true).write(true).open(scratch.pool()).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    scratch.refused("volume list", &["in use"]);
    let words = format!("pool create {} --size 1G --force", scratch.pool().display());
    scratch.refused(&words, &["in use"]);
    drop(file);
    scratch.done("volume list");
}

#[test]
fn what_holds_something_is_not_overwritten() {
    let scratch = Scratch::with_pool();
    let pool = scratch.pool();
    scratch.refused(&format!("pool create {} --size 1G", pool.display()), &["main.plywood", "pool", "--force"]);
    let other = scratch.path("letters");
    fs::write(&other, "dear sir").unwrap();
    let before = digest(&other);
    scratch.refused(&format!("pool create {} --size 1G", other.display()), &["letters", "--force"]);
    assert_eq!(digest(&other), before);
    if run("mkfs.ext4", ["-V"]).succeeded() {
        fs::write(&other, vec![0; 8 << 20]).unwrap();
        run("mkfs.ext4", ["-q", "-F", other.to_str().unwrap()]).expect();
        let before = digest(&other);
        scratch.refused(&format!("pool create {} --size 1G", other.display()), &["letters", "ext4"]);
        assert_eq!(digest(&other), before);
    }
    scratch.done(&format!("pool create {} --size 1G --force", other.display()));
}

#[test]
fn pools_that_cannot_be_leave_no_file() {
    let scratch = Scratch::with_pool();
    let new = scratch.path("new");
    for (size, named) in
        [("0", "size"), ("1M", "too small"), ("1073741825", "multiple"), ("20T", "too large"), ("15E", "size")]
    {
        scratch.refused(&format!("pool create {} --size {size}", new.display()), &[named]);
        assert!(!new.exists(), "--size {size} has left a file");
    }
    scratch.refused(&format!("pool create {}", new.display()), &["--size"]);
    for name in ["", "a/b", "a\nb", &"x".repeat(65)] {
        let words = ["pool", "create", new.to_str().unwrap(), "--size", "1G", "--name", name];
        scratch.refused_words(words, &["name"]);
        assert!(!new.exists(), "--name {name:?} has left a file");
    }
    scratch.refused(&format!("pool create {}/nofolder/new --size 1G", new.display()), &["nofolder"]);
    scratch.refused(&format!("pool create {} --size 1G", new.parent().unwrap().display()), &["neither"]);
    scratch.refused("pool create /dev/null --size 1G", &["neither"]);
}

//! Bad input about volumes: each is refused with one clear line and exit status 1, and the pool file is the same.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::scratch::Scratch;

#[test]
fn impossible_sizes_are_refused() {
    let scratch = Scratch::with_pool();
    scratch.refused("volume create a --size 0", &["size", "0"]);
    scratch.refused("volume create a --size 5000", &["5000", "multiple"]);
    scratch.refused("volume create a --size 1000 --sector-size 512", &["1000", "multiple"]);
    scratch.refused("volume create a --size 17T", &["size", "TiB"]);
    scratch.refused("volume create a --size 15E", &["size", "TiB"]);
    scratch.refused("volume create a --size 1G --sector-size 1024", &["1024", "4096"]);
    scratch.done("volume create a --size 64M");
    scratch.refused("volume resize a --size 0", &["size", "0"]);
    scratch.refused("volume resize a --size 4097", &["4097", "multiple"]);
    scratch.refused("volume resize a --size 17T", &["size", "TiB"]);
    scratch.done("snapshot create a s");
    scratch.refused("clone create s c --size 0", &["size", "0"]);
    scratch.refused("clone create s c --size 17T", &["size", "TiB"]);
}

#[test]
fn odd_names_are_refused() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create taken --size 64M");
    scratch.done("snapshot create taken snap");
    let long = "x".repeat(256);
    let odd = ["", " a", "a ", ".hidden", "a/b", "a\nb", "a\u{7}b", "a\u{1b}[31m", long.as_str()];
    for name in odd {
        scratch.refused_words(["volume", "create", name, "--size", "64M"], &["name"]);
        scratch.refused_words(["snapshot", "create", "taken", name], &["name"]);
        scratch.refused_words(["clone", "create", "snap", name], &["name"]);
        scratch.refused_words(["volume", "rename", "taken", name], &["name"]);
        scratch.refused_words(["snapshot", "rollback", "taken", "snap", "--keep", name], &["name"]);
    }
    let bytes = OsString::from_vec(b"a\xff".to_vec());
    let words = ["volume".into(), "create".into(), bytes, "--size".into(), "64M".into()] as [OsString; 5];
    scratch.refused_words(words, &["UTF-8"]);
    scratch.refused_words(["volume", "create", "--size", "64M", "--", "-x"], &["-x"]);
}

#[test]
fn taken_names_are_refused() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    scratch.done("snapshot create a s");
    for name in ["a", "s"] {
        scratch.refused(&format!("volume create {name} --size 64M"), &[name, "already"]);
        scratch.refused(&format!("snapshot create a {name}"), &[name, "already"]);
        scratch.refused(&format!("clone create s {name}"), &[name, "already"]);
    }
    scratch.refused("volume rename a s", &["s", "already"]);
    scratch.refused("snapshot rollback a s --keep s", &["s", "already"]);
}

#[test]
fn what_does_not_exist_is_named() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    for line in [
        "volume info nosuch",
        "volume rename nosuch b",
        "volume resize nosuch --size 1G",
        "volume delete nosuch",
        "volume protect nosuch",
        "snapshot create nosuch s",
        "snapshot list nosuch",
        "snapshot delete nosuch",
        "snapshot rollback a nosuch",
        "snapshot rollback nosuch a",
        "clone create nosuch c",
        "diff a nosuch",
        "diff nosuch a",
        "detach nosuch",
    ] {
        scratch.refused(line, &["nosuch"]);
    }
    scratch.refused("detach a", &["a", "not attached"]);
    scratch.refused("stop", &["no daemon"]);
}

#[test]
fn protected_is_not_deleted() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    scratch.done("snapshot create a s");
    for name in ["a", "s"] {
        scratch.done(&format!("volume protect {name}"));
        scratch.refused(&format!("volume delete {name} --yes"), &[name, "protected"]);
    }
    scratch.refused("snapshot delete s --yes", &["s", "protected"]);
}

#[test]
fn snapshots_and_volumes_are_not_taken_for_each_other() {
    let scratch = Scratch::with_pool();
    scratch.done("volume create a --size 64M");
    scratch.done("volume create b --size 64M");
    scratch.done("snapshot create a s");
    scratch.refused("snapshot delete a", &["a", "not a snapshot"]);
    scratch.refused("clone create a c", &["a", "not a snapshot"]);
    scratch.refused("snapshot rollback a b", &["b", "not a snapshot"]);
    scratch.refused("snapshot rollback b s", &["s", "b"]);
    scratch.refused("snapshot rollback s s", &["s", "snapshot"]);
    scratch.refused("volume resize s --size 1G", &["s", "snapshot"]);
    scratch.refused("clone create s c --size 32M", &["s", "at least"]);
}

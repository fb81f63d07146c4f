//! A volume grows while it is attached and mounted; what was attached comes back after a restart.

use std::fs;

use crate::refusals;
use crate::story::FileSystem;
use crate::support::command::run;
use crate::support::pool::{TestPool, Transport};

/// On xfs: ext4 grows while mounted only for holders of CAP_SYS_RESOURCE, which not every root is.
pub fn attached_volume_grows() {
    let pool = TestPool::create("4G", Transport::Auto);
    pool.done("volume create files --size 320M --sector-size 4096");
    let device = pool.attach("files");
    assert_eq!(run("blockdev", ["--getsize64", &device]).expect(), (320 << 20).to_string());
    run("mkfs.xfs", ["-q", &device]).expect();
    let point = pool.mount("files");
    fs::write(point.join("before"), vec![7; 1 << 20]).expect("a file");

    pool.done("volume resize files --size 768M");
    assert_eq!(run("blockdev", ["--getsize64", &device]).expect(), (768 << 20).to_string());
    assert_eq!(pool.volume("files")["size_bytes"], 768 << 20);
    run("xfs_growfs", [&point]).expect();
    fs::write(point.join("after"), vec![8; 384 << 20]).expect("a file that did not fit before");
    assert_eq!(fs::read(point.join("before")).expect("the first file"), vec![7; 1 << 20]);

    pool.unmount(&point);
    let device = pool.attach("files");
    FileSystem::Xfs.check(&device);
    pool.done("detach files");
    pool.stop();
    pool.check();
}

pub fn attach_all_remembers() {
    let pool = TestPool::create("4G", Transport::Auto);
    for name in ["one", "two", "three"] {
        pool.done(&format!("volume create {name} --size 64M"));
    }
    pool.attach("one");
    pool.attach("two");
    pool.attach("three");
    pool.done("detach two");
    pool.stop();
    assert!(pool.volume("one")["device"].is_null(), "a stopped daemon leaves no device");
    // Where it cannot be done it is not forgotten either.
    let broken_loop = format!("{}; cp -a /dev/null /dev/loop-control", refusals::devices("fuse"));
    refusals::in_namespace(&pool, &broken_loop, "attach --all").expect_refusal(&["loop"]);
    pool.stop();
    pool.done("attach --all");
    assert!(pool.volume("one")["device"].is_string(), "one was attached when the daemon stopped");
    assert!(pool.volume("three")["device"].is_string(), "three was attached when the daemon stopped");
    assert!(pool.volume("two")["device"].is_null(), "two was not");
    pool.done("detach --all");
    pool.stop();
}

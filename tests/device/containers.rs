//! Containers through runc: what an untouched one owns, and what one that wrote keeps or drops.

use crate::support::machine::rootfs;
use crate::support::pool::{TestPool, Transport};

/// Own bytes of a container that did nothing but start.
const UNTOUCHED_BYTES: u64 = 64 << 10;

fn with_image() -> TestPool {
    let pool = TestPool::create("10G", Transport::Auto);
    let source = format!("tar:{}", rootfs().display());
    pool.plywood(["image", "import", &source, "debian"]).expect();
    pool
}

pub fn untouched_owns_next_to_nothing() {
    let pool = with_image();
    pool.done("run debian --name untouched -- /bin/true");
    let own = pool.volume("untouched")["own_bytes"].as_u64().expect("a number");
    println!("an untouched container owns {own} bytes");
    assert!(own < UNTOUCHED_BYTES, "an untouched container owns {own} bytes");
    pool.done("volume delete untouched --yes");
    pool.stop();
    pool.check();
}

pub fn runs_and_is_dropped() {
    let pool = with_image();
    let before = pool.names();
    let said = pool.plywood([
        "run",
        "debian",
        "--rm",
        "--",
        "/bin/sh",
        "-c",
        "echo hello from $(cat /etc/debian_version | head -c 2)",
    ]);
    assert!(said.stdout.contains("hello from"), "{}{}", said.stdout, said.stderr);
    assert_eq!(pool.names(), before, "--rm drops the clone");

    // The command's own exit status comes through.
    let failed = pool.plywood(["run", "debian", "--rm", "--", "/bin/sh", "-c", "exit 7"]);
    assert_eq!(failed.status.code(), Some(7), "{}", failed.stderr);

    // What it writes stays in its clone, and the image is as it was.
    pool.plywood([
        "run",
        "debian",
        "--name",
        "writer",
        "--",
        "/bin/sh",
        "-c",
        "echo kept >/root/kept && ls /etc/resolv.conf /etc/hosts",
    ])
    .expect();
    let point = pool.mount("writer");
    assert_eq!(std::fs::read_to_string(point.join("root/kept")).expect("the file"), "kept\n");
    pool.unmount(&point);
    let point = pool.mount("debian");
    assert!(!point.join("root/kept").exists(), "the image has not changed");
    pool.unmount(&point);
    let _ = pool.plywood(["detach", "--all"]);
    pool.done("volume delete writer --yes");
    pool.stop();
    pool.check();
}

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
    let listed = pool.json("ps", "containers");
    assert_eq!((&listed[0]["name"], &listed[0]["own_bytes"]), (&"untouched".into(), &own.into()));
    let shown = pool.done("ps -s");
    assert!(shown.contains("ended") && shown.contains("1 container takes"), "{shown}");
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

/// What a container is told and shown beside its image, with the meaning that it has for Docker.
pub fn options_are_dockers() {
    let pool = with_image();
    let run = |options: &[&str], script: &str| {
        let words = [&["run", "debian", "--rm"], options, &["--", "/bin/sh", "-c", script]].concat();
        pool.plywood(words)
    };
    let said = run(&["-e", "A=b c", "-w", "/tmp", "-u", "daemon"], "echo $A; pwd; id -un").expect();
    assert_eq!(said, "b c\n/tmp\ndaemon");
    run(&["--read-only"], "! touch /x 2>/dev/null").expect();
    let fills = "! dd if=/dev/zero of=/scratch/x bs=64k count=32 2>/dev/null && stat -f -c %T /scratch";
    assert_eq!(run(&["--tmpfs", "/scratch:size=1M"], fills).expect(), "tmpfs");

    // A volume that is not there is made, and filled with what the image has there; what it holds then hides that.
    let said = run(&["-v", "data:/var/lib/dpkg"], "stat -c %U:%a /var/lib/dpkg/status; echo kept > /var/lib/dpkg/kept");
    assert_eq!(said.expect(), "root:644");
    let image = pool.mount("debian");
    let held = std::fs::read_dir(image.join("var/lib/dpkg")).expect("the image's");
    let count = held.map(|entry| entry.expect("a name").file_name()).filter(|name| name != "kept").count();
    pool.unmount(&image);
    assert_eq!(
        run(&["-v", "data:/data:ro"], "! touch /data/x 2>/dev/null; ls -A /data | wc -l").expect(),
        (count + 1).to_string()
    );
    // Over the image's own, which it hides.
    let said = run(&["--mount", "source=data,target=/usr/share/doc"], "cd /usr/share/doc; cat kept; ls -A | wc -l");
    assert_eq!(said.expect(), format!("kept\n{}", count + 1));

    // The host's: -v makes a directory, --mount does not.
    let host = pool.folder().join("host/deep");
    let shown = host.display().to_string();
    let refused = run(&["--mount", &format!("type=bind,source={shown},target=/h")], "true");
    assert!(!refused.succeeded() && refused.stderr.contains("does not exist"), "{}", refused.stderr);
    run(&["-v", &format!("{shown}:/h")], "echo there > /h/file").expect();
    assert_eq!(std::fs::read_to_string(host.join("file")).expect("the file"), "there\n");
    let refused = run(&["--mount", "source=nowhere,target=/h"], "true");
    assert!(!refused.succeeded() && refused.stderr.contains("nowhere"), "{}", refused.stderr);

    assert_eq!(pool.names(), ["data", "debian"], "what was made for a run has gone");
    assert!(pool.volume("data")["device"].is_null(), "no longer in use");
    pool.stop();
    pool.check();
}

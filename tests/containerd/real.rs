//! The story with a real containerd: an image is imported, containers run and write, one is committed, daemons are killed,
//! everything is removed, and the collector of garbage brings the pool back to what it held.

use std::fs;
use std::time::Duration;

use crate::engine::Engine;
use crate::snapshotter::{Snapshotter, nothing_is_left};
use crate::support::command::{run, shell, wait_until};
use crate::support::pool::{TestPool, Transport};

const IMAGE: &str = "example.invalid/small:test";
/// Import under the name above: the tag stands in the archive.
const IMPORT: &str = "image import --snapshotter plywood --base-name example.invalid/small";
/// What a container finds to run.
const PROGRAMS: &str = "sh cat ls rm sleep";

/// Is the second layer's file there?
const GREETS: &str = "test \"$(cat /greeting)\" = 'hello from the second layer'";

/// Runs `script` in a container of its own. It checks for itself and answers by its exit code: `ctr` loses, though seldom,
/// what a process says that ends at once, when its own end of the FIFO is not open by then.
#[track_caller]
fn runs_well(containerd: &Engine, namespace: &str, name: &str, script: &str) {
    let line = format!("--namespace {namespace} run --rm --snapshotter plywood {IMAGE} {name}");
    containerd.ctr_with(&line, &["/bin/sh", "-c", script]).expect();
}

/// An archive of an image with two layers, as `skopeo copy` or `umoci` leave it: this machine's shell and what it needs.
fn archive(pool: &TestPool) -> String {
    let folder = pool.folder().join("image");
    let (layout, tag) = (folder.join("layout"), format!("{}:test", folder.join("layout").display()));
    fs::create_dir_all(&folder).expect("a folder");
    let layout = layout.display().to_string();
    run("umoci", ["init", "--layout", &layout]).expect();
    run("umoci", ["new", "--image", &tag]).expect();
    let shown = folder.display();
    shell(&format!(
        "set -eu; cd '{shown}'; mkdir -p root/bin root/root root/proc root/sys root/dev root/tmp root/etc; \
         programs=$(for name in {PROGRAMS}; do command -v $name; done); cp -L $programs root/bin/; \
         cp -L --parents $(ldd $programs | grep -o '/[^ :]*\\.so[^ :]*' | sort -u) root/; \
         echo 12 >root/etc/debian_version; tar -C root -cf layer.tar ."
    ))
    .expect();
    let layer = folder.join("layer.tar").display().to_string();
    run("umoci", ["raw", "add-layer", "--image", &tag, &layer]).expect();
    fs::write(folder.join("greeting"), "hello from the second layer\n").expect("a file");
    let greeting = folder.join("greeting").display().to_string();
    run("umoci", ["insert", "--image", &tag, &greeting, "/greeting"]).expect();
    let archive = folder.join("image.tar").display().to_string();
    run("tar", ["-C", &layout, "-cf", &archive, "."]).expect();
    archive
}

pub fn runs_containers() {
    let pool = TestPool::create("10G", Transport::Auto);
    let archive = archive(&pool);
    let mut snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let mut containerd = Engine::start(&pool, snapshotter.socket());
    let live_bytes = |pool: &TestPool| {
        pool.done("pool trim");
        pool.info()["used_bytes"].as_u64().expect("a number")
    };
    let before = live_bytes(&pool);

    containerd.ctr_with(IMPORT, &[&archive]).expect();
    let listed = containerd.ctr("snapshot --snapshotter plywood ls").expect();
    assert_eq!(listed.lines().filter(|line| line.contains("Committed")).count(), 2, "{listed}");

    // Containers: one that reads both layers, ten that write at once.
    let both_layers = format!("{GREETS} && test -f /etc/debian_version && ! test -e /lost+found");
    runs_well(&containerd, "default", "first", &both_layers);
    std::thread::scope(|scope| {
        for number in 0..10 {
            let script = format!(
                "echo {number} >/root/own && rm /greeting && test \"$(cat /root/own)\" = {number} && ! {GREETS}"
            );
            let containerd = &containerd;
            scope.spawn(move || runs_well(containerd, "default", &format!("c{number}"), &script));
        }
    });

    // One that stays, is committed while it runs, and outlives our deaths.
    containerd
        .ctr_with(
            &format!("run --detach --snapshotter plywood {IMAGE} stays"),
            &["/bin/sh", "-c", "echo kept >/root/kept; sleep 1000"],
        )
        .expect();
    let still_there = |containerd: &Engine, exec: &str| {
        let script = ["/bin/sh", "-c", "test \"$(cat /root/kept)\" = kept"];
        containerd.ctr_with(&format!("task exec --exec-id {exec} stays"), &script)
    };
    wait_until("the container's file", Duration::from_secs(30), || still_there(&containerd, "look").succeeded());
    snapshotter.restart();
    pool.kill_engine();
    still_there(&containerd, "again").expect();
    containerd.restart();
    still_there(&containerd, "anew").expect();
    containerd.ctr("task kill -s KILL stays").expect();
    wait_until("the end of the container", Duration::from_secs(30), || {
        containerd.ctr("task ls").stdout.contains("STOPPED")
    });
    containerd.ctr("task rm stays").expect();
    containerd.ctr("snapshot --snapshotter plywood commit committed stays").expect();
    containerd.ctr("snapshot --snapshotter plywood prepare from-it committed").expect();
    let point = pool.mount_point("from-it");
    let mounts = containerd.ctr_with("snapshot --snapshotter plywood mounts", &[&point.to_string_lossy(), "from-it"]);
    run("sh", ["-c", &mounts.expect()]).expect();
    assert_eq!(fs::read_to_string(point.join("root/kept")).expect("the file"), "kept\n");
    run("umount", [&point]).expect();

    // Another namespace has its own. (This client does not name the layer's chain id, so nothing can be adopted.)
    containerd.ctr_with(&format!("--namespace other {IMPORT}"), &[&archive]).expect();
    runs_well(&containerd, "other", "x", GREETS);

    // All goes.
    containerd.ctr("container rm stays").expect();
    for key in ["from-it", "committed"] {
        containerd.ctr(&format!("snapshot --snapshotter plywood rm {key}")).expect();
    }
    for namespace in ["default", "other"] {
        containerd.ctr(&format!("--namespace {namespace} image rm --sync {IMAGE}")).expect();
    }
    nothing_is_left(&pool);
    wait_until("the former size", Duration::from_secs(60), || live_bytes(&pool) <= before + (1 << 20));
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

/// What plywood exports is an image like others: containerd unpacks and runs it.
pub fn runs_an_exported_image() {
    let pool = TestPool::create("10G", Transport::Auto);
    archive(&pool);
    let folder = pool.folder().join("image");
    pool.done(&format!("image import oci:{}:test small", folder.join("layout").display()));
    pool.done("clone create small box");
    let point = pool.mount("box");
    fs::write(point.join("greeting"), "changed\n").expect("a file");
    fs::remove_file(point.join("etc/debian_version")).expect("a file of the image");
    pool.unmount(&point);
    pool.done("commit box changed");
    let exported = folder.join("exported").display().to_string();
    pool.done(&format!("image export changed oci:{exported}:test"));
    let archive = folder.join("exported.tar").display().to_string();
    run("tar", ["-C", &exported, "-cf", &archive, "."]).expect();

    let snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let containerd = Engine::start(&pool, snapshotter.socket());
    containerd.ctr_with(IMPORT, &[&archive]).expect();
    let script = "test \"$(cat /greeting)\" = changed && ! test -e /etc/debian_version";
    runs_well(&containerd, "default", "exported", script);
    containerd.ctr(&format!("image rm --sync {IMAGE}")).expect();
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

//! What plywood exports is an image like others: containerd unpacks and runs it, and finds the tree that was exported.

use std::fs;
use std::path::Path;

use crate::engine::Engine;
use crate::image::{IMPORT, Image, NAME, archive_of};
use crate::real::runs_well;
use crate::snapshotter::{Snapshotter, nothing_is_left};
use crate::support::changes::{change, fill, without_sockets};
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::{assert_same, tree_of};

/// Has plywood import an image, changes a container of it, commits that as `changed` and exports it; answers the archive.
#[track_caller]
fn exported(pool: &TestPool, image: &Image, change: impl FnOnce(&Path)) -> String {
    pool.done(&format!("image import oci:{}:test small", image.layout()));
    pool.done("clone create small box");
    let point = pool.mount("box");
    change(&point);
    pool.unmount(&point);
    pool.done("commit box changed");
    let layout = pool.folder().join("exported").display().to_string();
    pool.done(&format!("image export changed oci:{layout}:test"));
    archive_of(&layout)
}

pub fn runs() {
    let pool = TestPool::create("10G", Transport::Auto);
    let archive = exported(&pool, &Image::small(&pool), |root| {
        fs::write(root.join("greeting"), "changed\n").expect("a file");
        fs::remove_file(root.join("etc/debian_version")).expect("a file of the image");
    });
    let snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let containerd = Engine::start(&pool, snapshotter.socket());
    containerd.ctr_with(IMPORT, &[&archive]).expect();
    let script = "test \"$(cat /greeting)\" = changed && ! test -e /etc/debian_version";
    runs_well(&containerd, "default", "exported", script);
    containerd.ctr(&format!("image rm --sync {NAME}")).expect();
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

/// Unpacked by containerd onto plywood's blocks, and onto its own overlayfs, each mounted as its client mounts it.
pub fn has_the_same_tree() {
    let origin = TestPool::create("10G", Transport::Auto);
    let archive = exported(&origin, &Image::create(&origin, "image", fill), change);
    let point = origin.mount("changed");
    let expected = without_sockets(tree_of(&point, false));
    origin.unmount(&point);
    for (name, is_there) in [("data/same", true), ("data/another-link", true), ("data/gone", false), ("bin/sh", true)] {
        assert_eq!(expected.contains_key(Path::new(name)), is_there, "{name}");
    }

    // Another pool, which has none of it yet.
    let pool = TestPool::create("10G", Transport::Auto);
    let snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let containerd = Engine::start(&pool, snapshotter.socket());
    containerd.ctr_with(IMPORT, &[&archive]).expect();
    for snapshots in ["plywood", "overlayfs"] {
        let point = pool.mount_point(snapshots);
        let shown = point.display().to_string();
        // This unpacks it where it is not unpacked yet.
        containerd.ctr_with(&format!("image mount --snapshotter {snapshots} {NAME}"), &[&shown]).expect();
        let found = tree_of(&point, false);
        containerd.ctr_with(&format!("image unmount --rm --snapshotter {snapshots}"), &[&shown]).expect();
        assert_same(&found, &expected, snapshots);
    }
    containerd.ctr(&format!("image rm --sync {NAME}")).expect();
    nothing_is_left(&pool);
    drop(containerd);
    drop(snapshotter);
    pool.check();
    origin.check();
}

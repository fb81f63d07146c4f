//! The ten calls, one after the other and side by side.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;

use plywood::containerd::api::snapshots::Kind;
use tonic::Code;

use crate::image::Image;
use crate::snapshotter::{Client, Snapshotter, labels, mount, nothing_is_left, refused, unmount};
use crate::support::command::run;
use crate::support::pool::{TestPool, Transport};

fn started() -> (TestPool, Snapshotter, Client) {
    let pool = TestPool::create("8G", Transport::Auto);
    let snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
    let client = snapshotter.client();
    (pool, snapshotter, client)
}

/// Prepares, writes one file, and commits.
#[track_caller]
fn layer(pool: &TestPool, client: &mut Client, name: &str, parent: &str, file: &str, content: &[u8]) {
    let key = format!("extract {name}");
    let mounted = client.prepare(&key, parent).expect("prepare");
    let point = pool.mount_point("layer");
    mount(&mounted, &point);
    fs::write(point.join(file), content).expect("a file");
    unmount(&point);
    client.commit(name, &key, labels([])).expect("commit");
}

pub fn life() {
    let (pool, _snapshotter, mut client) = started();
    assert_eq!(client.keys(&[]), Vec::<String>::new());

    // An empty file system: nothing in it, and a root that everybody may enter.
    let key = "default/1/extract-1 sha256:é";
    let active = client.prepare(key, "").expect("prepare");
    assert_eq!(active.r#type, "ext4");
    assert_eq!(active.options, ["discard", "noatime"]);
    let point = pool.mount_point("a");
    mount(&active, &point);
    assert_eq!(fs::read_dir(&point).expect("a folder").count(), 0, "it is empty");
    assert_eq!(fs::metadata(&point).expect("a folder").permissions().mode() & 0o7777, 0o755);
    fs::write(point.join("file"), vec![7; 8 << 20]).expect("a file");
    let info = client.stat(key).expect("stat");
    assert_eq!((info.kind(), info.parent.as_str()), (Kind::Active, ""));
    assert_eq!(info.created_at, info.updated_at);
    assert!(info.created_at.is_some_and(|time| time.seconds > 1_700_000_000));
    assert_eq!(client.mounts(key).expect("mounts"), active, "the same again");
    unmount(&point);

    // Committed: the key is gone, the name is there, with its own labels and times.
    client.commit("default/2/sha256:layer", key, labels([("a", "b")])).expect("commit");
    refused(client.stat(key), Code::NotFound, "extract-1");
    let committed = client.stat("default/2/sha256:layer").expect("stat");
    assert_eq!((committed.kind(), committed.labels), (Kind::Committed, labels([("a", "b")])));
    assert_eq!(committed.created_at, committed.updated_at);
    let usage = client.usage("default/2/sha256:layer").expect("usage");
    assert!((8 << 20..10 << 20).contains(&usage), "a layer of 8 MiB uses {usage} bytes");

    // Committed while it is mounted: all that was written is in it, without a sync.
    let active = client.prepare("c", "default/2/sha256:layer").expect("prepare");
    mount(&active, &point);
    assert_eq!(fs::read(point.join("file")).expect("the parent's file"), vec![7; 8 << 20]);
    fs::write(point.join("late"), "not synced").expect("a file");
    assert!(client.usage("c").expect("usage") < 1 << 20, "the parent's bytes are not counted");
    client.commit("running", "c", labels([])).expect("commit of what is mounted");
    fs::write(point.join("later"), "after the commit").expect("it can still be written");

    // Seen through a view, which cannot be written, and next to another one.
    let (first, second) = (pool.mount_point("v1"), pool.mount_point("v2"));
    for (key, at) in [("v1", &first), ("v2", &second)] {
        let view = client.view(key, "running").expect("view");
        assert_eq!(view.options, ["discard", "noatime", "ro"]);
        mount(&view, at);
        assert_eq!(fs::read_to_string(at.join("late")).expect("the file"), "not synced");
        assert!(!at.join("later").exists(), "what came after the commit is not in it");
        assert!(fs::write(at.join("x"), "x").is_err(), "a view is read-only");
    }
    assert_eq!(client.stat("v1").expect("stat").kind(), Kind::View);

    // A key that has been committed is free at once, though its volume is mounted still.
    let again = client.prepare("c", "running").expect("the key is free");
    assert_ne!(again.source, active.source);
    unmount(&point);

    // Removed while mounted: at once for the caller, and in truth when it is unmounted.
    client.remove("v1").expect("remove of what is mounted");
    refused(client.stat("v1"), Code::NotFound, "v1");
    assert_eq!(fs::read_to_string(first.join("late")).expect("it is mounted still"), "not synced");
    let view = client.view("v1", "running").expect("the key is free");
    assert_ne!(view.source, "");
    for point in [&first, &second] {
        unmount(point);
    }
    for key in ["v1", "v2", "c", "running", "default/2/sha256:layer"] {
        client.remove(key).expect("remove");
    }
    client.cleanup().expect("cleanup");
    assert_eq!(client.keys(&[]), Vec::<String>::new());
    nothing_is_left(&pool);
    pool.check();
}

pub fn refusals() {
    let (pool, _snapshotter, mut client) = started();
    layer(&pool, &mut client, "base", "", "file", b"x");
    layer(&pool, &mut client, "top", "base", "file", b"y");
    client.prepare("active", "top").expect("prepare");
    client.view("view", "top").expect("view");
    let all = client.list(&[]).expect("a list");

    refused(client.prepare("active", "top"), Code::AlreadyExists, "active");
    refused(client.prepare("base", ""), Code::AlreadyExists, "base");
    refused(client.view("view", "top"), Code::AlreadyExists, "view");
    refused(client.prepare("new", "missing"), Code::NotFound, "missing");
    refused(client.prepare("new", "active"), Code::InvalidArgument, "active");
    refused(client.prepare("new", "view"), Code::InvalidArgument, "view");
    refused(client.prepare("new", "new"), Code::NotFound, "new");
    refused(client.prepare("", ""), Code::InvalidArgument, "empty");
    refused(client.prepare(&"k".repeat(10_000), ""), Code::InvalidArgument, "bytes");
    let long = "v".repeat(4096);
    refused(client.prepare_with("new", "", labels([("k", &long)])), Code::InvalidArgument, "label");
    for size in ["", "0", "-1", "ten", "10GB", "99999999999999999999"] {
        let sized = labels([("containerd.io/snapshot/max-size", size)]);
        refused(client.prepare_with("new", "", sized), Code::InvalidArgument, "max-size");
    }

    refused(client.mounts("missing"), Code::NotFound, "missing");
    refused(client.mounts("base"), Code::FailedPrecondition, "committed");

    refused(client.commit("new", "missing", labels([])), Code::NotFound, "missing");
    refused(client.commit("new", "view", labels([])), Code::FailedPrecondition, "view");
    refused(client.commit("new", "base", labels([])), Code::FailedPrecondition, "committed");
    refused(client.commit("base", "active", labels([])), Code::AlreadyExists, "base");
    refused(client.commit("active", "active", labels([])), Code::AlreadyExists, "active");
    refused(client.commit("", "active", labels([])), Code::InvalidArgument, "empty");
    refused(client.commit_on("new", "active", "base", labels([])), Code::InvalidArgument, "base");

    refused(client.remove("missing"), Code::NotFound, "missing");
    refused(client.remove("base"), Code::FailedPrecondition, "remove");
    refused(client.remove("top"), Code::FailedPrecondition, "remove");
    refused(client.stat("missing"), Code::NotFound, "missing");
    refused(client.usage("missing"), Code::NotFound, "missing");
    refused(client.update("missing", labels([]), &[]), Code::NotFound, "missing");
    for path in ["parent", "name", "kind", "created_at"] {
        refused(client.update("active", labels([]), &[path]), Code::InvalidArgument, path);
    }
    for filter in ["kind==", "kind=view", "\"", "name~=("] {
        refused(client.list(&[filter]), Code::InvalidArgument, "filter");
    }

    assert_eq!(client.list(&[]).expect("a list"), all, "what was refused has changed nothing");
    client.commit_on("third", "active", "top", labels([])).expect("the parent that it has may be named");

    // One whose volume somebody keeps is no reason to end a collection of garbage.
    let volume = pool.names().into_iter().find(|name| name.ends_with("-third")).expect("its volume");
    pool.done(&format!("volume protect {volume}"));
    refused(client.remove("third"), Code::FailedPrecondition, "protect");
    assert_eq!(client.stat("third").expect("it is there still").kind(), Kind::Committed);
    pool.done(&format!("volume protect --off {volume}"));
    for key in ["third", "view", "top", "base"] {
        client.remove(key).expect("remove");
    }
    nothing_is_left(&pool);
}

fn labels_told(client: &mut Client, key: &str) -> Vec<(String, String)> {
    client.stat(key).expect("stat").labels.into_iter().collect()
}

fn labels_of<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

fn labels_change(client: &mut Client) {
    let before = client.stat("a").expect("stat");
    let told = client.update("a", labels([("x", "1"), ("y", "2")]), &[]).expect("update");
    assert_eq!(told, client.stat("a").expect("stat"));
    assert_eq!(labels_told(client, "a"), labels_of([("x", "1"), ("y", "2")]));
    assert_eq!((told.created_at, &told.parent), (before.created_at, &before.parent));
    assert!(
        told.updated_at.map(|time| (time.seconds, time.nanos))
            > before.updated_at.map(|time| (time.seconds, time.nanos))
    );
    client.update("a", labels([("y", "3"), ("z", "4")]), &["labels.y", "labels.x"]).expect("update");
    assert_eq!(labels_told(client, "a"), labels_of([("y", "3")]));
    client.update("a", labels([("containerd.io/gc.root", "now")]), &["labels.containerd.io/gc.root"]).expect("update");
    assert_eq!(labels_told(client, "a"), labels_of([("containerd.io/gc.root", "now"), ("y", "3")]));
}

pub fn labels_found() {
    let (pool, mut snapshotter, mut client) = started();
    client.prepare_with("a", "", labels([("one", "1")])).expect("prepare");
    layer(&pool, &mut client, "layer", "", "file", b"x");
    client.view("v", "layer").expect("view");
    labels_change(&mut client);

    let found = |client: &mut Client| {
        assert_eq!(client.keys(&["kind==active"]), ["a"]);
        assert_eq!(client.keys(&["kind==committed", "kind==view"]), ["layer", "v"]);
        assert_eq!(client.keys(&["parent==layer"]), ["v"]);
        assert_eq!(client.keys(&["parent!=\"\""]), ["v"]);
        assert_eq!(client.keys(&["labels.\"containerd.io/gc.root\""]), ["a"]);
        assert_eq!(client.keys(&["labels.y==3,name~=^a"]), ["a"]);
        assert_eq!(client.keys(&["labels.y==4"]), Vec::<String>::new());
    };
    found(&mut client);
    snapshotter.restart();
    let mut client = snapshotter.client();
    found(&mut client);
    for info in client.list(&[]).expect("a list") {
        assert_eq!(client.stat(&info.name).expect("stat"), info, "the list and the snapshot itself say the same");
    }
}

pub fn adoption() {
    const REFERENCE: &str = "containerd.io/snapshot.ref";
    let (pool, _snapshotter, mut client) = started();
    layer(&pool, &mut client, "a/1/base", "", "file", b"base");
    client.update("a/1/base", labels([(REFERENCE, "sha256:base")]), &[]).expect("update");
    layer(&pool, &mut client, "a/2/top", "a/1/base", "file", b"top");
    client.update("a/2/top", labels([(REFERENCE, "sha256:top")]), &[]).expect("update");
    layer(&pool, &mut client, "b/1/base", "", "file", b"base");

    // The very same snapshot: it is only to be looked for.
    let wanted = labels([(REFERENCE, "sha256:base")]);
    refused(client.prepare_with("b/2/extract", "", wanted), Code::AlreadyExists, "sha256:base");
    let filter = format!("labels.{REFERENCE:?}==sha256:base,parent==\"\"");
    assert_eq!(client.keys(&[&filter]), ["a/1/base"]);

    // The same layer on a parent of one's own: it is there afterwards, with that parent.
    for key in ["b/3/extract", "b/4/extract"] {
        let wanted = labels([(REFERENCE, "sha256:top")]);
        refused(client.prepare_with(key, "b/1/base", wanted), Code::AlreadyExists, "sha256:top");
    }
    let filter = format!("labels.{REFERENCE:?}==sha256:top,parent==b/1/base");
    let adopted = client.keys(&[&filter]);
    assert_eq!(adopted.len(), 1, "{adopted:?}");
    let point = pool.mount_point("adopted");
    mount(&client.view("v", &adopted[0]).expect("view"), &point);
    assert_eq!(fs::read_to_string(point.join("file")).expect("the file"), "top");
    unmount(&point);

    // It lives on its own.
    client.remove("a/2/top").expect("remove");
    mount(&client.prepare("c", &adopted[0]).expect("prepare"), &point);
    assert_eq!(fs::read_to_string(point.join("file")).expect("the file"), "top");
    unmount(&point);

    // What nobody has is made as ever.
    client.prepare_with("d", "", labels([(REFERENCE, "sha256:new")])).expect("prepare");
    for key in ["v", "c", "d", adopted[0].as_str(), "a/1/base", "b/1/base"] {
        client.remove(key).expect("remove");
    }
    nothing_is_left(&pool);
    pool.check();
}

pub fn max_size() {
    const LABEL: &str = "containerd.io/snapshot/max-size";
    let (pool, _snapshotter, mut client) = started();
    // No file system fits into one block: that can never be right, and leaves neither a snapshot nor an empty file system.
    refused(client.prepare_with("small", "", labels([(LABEL, "4096")])), Code::InvalidArgument, "max-size");
    assert_eq!(client.keys(&[]), Vec::<String>::new());
    nothing_is_left(&pool);
    assert_eq!(pool.names().len(), 1, "the empty file system of the usual size alone: {:?}", pool.names());

    let size = 64 << 20;
    let sized = labels([(LABEL, &size.to_string())]);
    let active = client.prepare_with("small", "", sized).expect("prepare");
    let point = pool.mount_point("small");
    mount(&active, &point);
    let device = run("blockdev", ["--getsize64", &active.source]).expect();
    assert_eq!(device, size.to_string(), "the virtual size");
    let written = fs::write(point.join("file"), vec![1; 100 << 20]);
    assert_eq!(written.expect_err("it is too small").raw_os_error(), Some(28), "ENOSPC");
    unmount(&point);
    let listed = pool.json("volume list --all", "volumes");
    let quotas: Vec<u64> =
        listed.as_array().expect("a list").iter().filter_map(|volume| volume["quota_bytes"].as_u64()).collect();
    assert!(quotas.contains(&(size as u64)), "{quotas:?}");

    // A child that is to be larger than its parent is, and so is the file system on it.
    layer(&pool, &mut client, "base", "", "file", b"base");
    let larger: u64 = 3 << 30;
    let active = client.prepare_with("large", "base", labels([(LABEL, &larger.to_string())])).expect("prepare");
    mount(&active, &point);
    assert_eq!(run("blockdev", ["--getsize64", &active.source]).expect(), larger.to_string(), "the virtual size");
    let seen = rustix::fs::statvfs(&point).expect("statvfs");
    assert!(seen.f_blocks * seen.f_frsize > larger * 9 / 10, "{} blocks of {}", seen.f_blocks, seen.f_frsize);
    assert_eq!(fs::read(point.join("file")).expect("the parent's file"), b"base");
    unmount(&point);
    run("e2fsck", ["-f", "-n", &active.source]).expect();
    let usage = client.usage("large").expect("usage");
    assert!(usage < 16 << 20, "growing the file system took {usage} bytes");
    // A file system does not shrink: a smaller one has the quota alone.
    let active = client.prepare_with("less", "base", labels([(LABEL, &size.to_string())])).expect("prepare");
    assert_eq!(run("blockdev", ["--getsize64", &active.source]).expect(), (1_u64 << 30).to_string());
    for key in ["small", "large", "less", "base"] {
        client.remove(key).expect("remove");
    }
    client.cleanup().expect("cleanup");
    nothing_is_left(&pool);
    assert_eq!(pool.names().len(), 1, "the empty file system of the usual size alone: {:?}", pool.names());
}

/// A layer that came with `plywood image import` is not unpacked again by containerd, and the other way round.
pub fn imported_and_unpacked() {
    const REFERENCE: &str = "containerd.io/snapshot.ref";
    let pool = TestPool::create("8G", Transport::Auto);
    let snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
    let mut client = snapshotter.client();
    let image = Image::create(&pool, "of-two", |root| fs::write(root.join("etc/first"), "first").expect("a file"));
    image.add_layer("second", |root| {
        fs::create_dir(root.join("etc")).expect("a folder");
        fs::write(root.join("etc/second"), "second").expect("a file");
    });
    let import = |name: &str| {
        let said = pool.plywood(["image", "import", &format!("oci:{}:test", image.layout()), name, "--json"]).expect();
        serde_json::from_str::<serde_json::Value>(&said).expect("JSON")["image"]["layers_reused"].as_u64()
    };
    assert_eq!(import("web"), Some(0));
    let chain = pool.names().into_iter().find(|name| name.starts_with("sha256:")).expect("a lower layer");
    let wanted = || labels([(REFERENCE, &chain)]);
    refused(client.prepare_with("default/1/extract", "", wanted()), Code::AlreadyExists, &chain);
    let adopted = client.keys(&[&format!("labels.{REFERENCE:?}=={chain}")]);
    let point = pool.mount_point("adopted");
    mount(&client.prepare("c", &adopted[0]).expect("prepare"), &point);
    assert_eq!(fs::read_to_string(point.join("etc/first")).expect("the file"), "first");
    unmount(&point);

    // The image goes, and its layer by hand, since containerd's was made from it; that one stays, and is found by the next import.
    pool.done("image delete web --yes");
    pool.done(&format!("volume delete {chain} --yes"));
    assert_eq!(import("again"), Some(1));
    for key in ["c", &adopted[0]] {
        client.remove(key).expect("remove");
    }
    let point = pool.mount("again");
    assert_eq!(fs::read_to_string(point.join("etc/first")).expect("the file"), "first");
    assert_eq!(fs::read_to_string(point.join("etc/second")).expect("the file"), "second");
    pool.unmount(&point);
    pool.done("image delete again --yes");
    nothing_is_left(&pool);
    pool.check();
}

/// What stands in the one file of a layer of the chain.
fn numbered(point: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(point)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

pub fn chain() {
    const DEPTH: usize = 128;
    let (pool, _snapshotter, mut client) = started();
    let mut parent = String::new();
    for number in 0..DEPTH {
        let name = format!("layer-{number:03}");
        layer(&pool, &mut client, &name, &parent, &format!("{number:03}"), b"x");
        parent = name;
    }
    let point = pool.mount_point("view");
    for number in 0..DEPTH {
        mount(&client.view("view", &format!("layer-{number:03}")).expect("view"), &point);
        let expected: Vec<String> = (0..=number).map(|number| format!("{number:03}")).collect();
        assert_eq!(numbered(&point), expected);
        unmount(&point);
        client.remove("view").expect("remove");
    }
    assert_eq!(client.keys(&[]).len(), DEPTH, "more than one batch of the list");
    for number in (0..DEPTH).rev() {
        client.remove(&format!("layer-{number:03}")).expect("remove");
    }
    nothing_is_left(&pool);
    pool.check();
}

pub fn hundred() {
    let (pool, snapshotter, mut client) = started();
    layer(&pool, &mut client, "image", "", "file", b"x");
    let devices: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..10)
            .map(|number| {
                let mut client = snapshotter.client();
                scope.spawn(move || {
                    let prepare =
                        |key: usize| client.prepare(&format!("c-{number}-{key}"), "image").expect("prepare").source;
                    (0..10).map(prepare).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a thread")).collect()
    });
    let different: std::collections::BTreeSet<&String> = devices.iter().collect();
    assert_eq!(different.len(), 100, "each has a device of its own");
    refused(client.remove("image"), Code::FailedPrecondition, "remove");
    std::thread::scope(|scope| {
        for number in 0..10 {
            let mut client = snapshotter.client();
            scope.spawn(move || {
                for key in 0..10 {
                    client.remove(&format!("c-{number}-{key}")).expect("remove");
                }
            });
        }
    });
    client.remove("image").expect("remove");
    nothing_is_left(&pool);
}

/// Clones of a file system that goes by its uuid, and that is mounted with this option.
pub fn side_by_side(kind: &str, option: &str) {
    let pool = TestPool::create("8G", Transport::Auto);
    let snapshotter = Snapshotter::start(&pool, &["--size", "1GiB", "--fs", kind]);
    let mut client = snapshotter.client();
    layer(&pool, &mut client, "layer", "", "file", b"x");
    let points = ["a", "b"].map(|key| {
        let prepared = client.prepare(key, "layer").expect("prepare");
        assert_eq!((prepared.r#type.as_str(), prepared.options.contains(&option.to_owned())), (kind, true));
        let point = pool.mount_point(key);
        mount(&prepared, &point);
        fs::write(point.join("own"), key).expect("a file");
        point
    });
    client.commit("c", "a", labels([])).expect("commit of what is mounted");
    for (point, key) in points.iter().zip(["a", "b"]) {
        assert_eq!(fs::read_to_string(point.join("own")).expect("the file"), key);
        unmount(point);
    }
    let point = pool.mount_point("c");
    mount(&client.view("v", "c").expect("view"), &point);
    assert_eq!(fs::read_to_string(point.join("own")).expect("the file"), "a");
    unmount(&point);
    for key in ["v", "c", "b", "layer"] {
        client.remove(key).expect("remove");
    }
    nothing_is_left(&pool);
}

/// Twenty pools, each with its own daemon and snapshotter, do all of it at the same time.
pub fn twenty_engines() {
    let pools: Vec<TestPool> = (0..20).map(|_| TestPool::create("2G", Transport::Auto)).collect();
    let snapshotters: Vec<Snapshotter> =
        pools.iter().map(|pool| Snapshotter::start(pool, &["--size", "256MiB"])).collect();
    thread::scope(|scope| {
        for (number, (pool, snapshotter)) in pools.iter().zip(&snapshotters).enumerate() {
            scope.spawn(move || {
                let mut client = snapshotter.client();
                let content = number.to_string().repeat(10_000);
                layer(pool, &mut client, "layer", "", "file", content.as_bytes());
                let point = pool.mount_point("own");
                mount(&client.prepare("own", "layer").expect("prepare"), &point);
                assert_eq!(fs::read_to_string(point.join("file")).expect("the file"), content);
                fs::write(point.join("file"), "changed").expect("a file");
                unmount(&point);
                client.remove("own").expect("remove");
                client.remove("layer").expect("remove");
            });
        }
    });
    for pool in &pools {
        nothing_is_left(pool);
        pool.check();
    }
}

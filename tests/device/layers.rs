//! Layers of images: what an image takes beside others, where a layer is found again, and what a failed import leaves
//! to others.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::images::{Layers, container, tree_of};
use crate::story::FileSystem;
use crate::support::command::{Background, binary, is_slow, wait_until};
use crate::support::machine::rootfs;
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::assert_same;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const LONG: Duration = Duration::from_secs(60);

/// An empty layout in the pool's folder.
fn layout(pool: &TestPool) -> Layers {
    Layers::new(pool.folder().join("layout"))
}

/// The layout's image of that tag, as a source.
fn source(pool: &TestPool, tag: &str) -> String {
    format!("oci:{}:{tag}", pool.folder().join("layout").display())
}

/// The Debian root file system as a layer.
fn debian(pool: &TestPool, layout: &Layers) -> (String, u64) {
    let copy = pool.folder().join("base.tar");
    fs::copy(rootfs(), &copy).expect("a copy");
    layout.blob(&copy)
}

/// Imports, and answers what it says of that.
#[track_caller]
fn import(pool: &TestPool, source: &str, more: &str) -> Value {
    pool.json(&format!("image import {source} {more}"), "image")
}

#[track_caller]
fn number(value: &Value, what: &str) -> u64 {
    value[what].as_u64().unwrap_or_else(|| panic!("no {what} in {value}"))
}

/// What the blocks of volumes take, metadata and what is being given back left out.
fn live(pool: &TestPool) -> u64 {
    pool.done("pool trim");
    number(&pool.info(), "live_bytes")
}

/// What all there is owns. While nothing is deleted that others stand on, that is all that is taken, counted once.
fn owned(pool: &TestPool) -> u64 {
    let listed = pool.json("volume list --all", "volumes");
    listed.as_array().expect("a list").iter().map(|volume| number(volume, "own_bytes")).sum()
}

/// `image list` of an image, another one with the same layers, and one with a layer more.
pub fn listed_sizes_add_up() {
    const CONTENT: u64 = 3 * MIB;
    let pool = TestPool::create("20G", Transport::Auto);
    let mut layout = layout(&pool);
    let (base, top) = (debian(&pool, &layout), layout.layer("top", CONTENT));
    layout.image("a", &[&base], "/bin/true");
    layout.image("b", &[&base], "/bin/false");
    layout.image("c", &[&base, &top], "/bin/false");
    for tag in ["a", "b", "c"] {
        import(&pool, &source(&pool, tag), tag);
    }
    assert_eq!(owned(&pool), live(&pool), "each block is somebody's, and nobody else's");
    wait_until("it is known what they share", LONG, || {
        ["a", "b", "c"].iter().all(|name| pool.volume(name)["exclusive_age_seconds"] == 0)
    });
    let listed = pool.json("image list", "images");
    println!("{listed}");
    let of = |name: &str, what: &str| {
        let images = listed.as_array().expect("a list");
        number(images.iter().find(|image| image["name"] == name).expect("the image"), what)
    };
    assert_eq!(["a", "b", "c"].map(|name| of(name, "layers")), [1, 1, 2]);
    assert_eq!(["a", "b", "c"].map(|name| of(name, "size_bytes")), [10 * GIB; 3]);
    // One layer, of which both have all.
    let whole = of("a", "mapped_bytes");
    assert_eq!((of("a", "own_bytes"), of("b", "own_bytes")), (whole, 0));
    assert_eq!((of("a", "shared_bytes"), of("b", "shared_bytes"), of("b", "mapped_bytes")), (whole, whole, whole));
    // And one more, which has blocks anew that the lower one has, too: those of the file system itself.
    let (own, mapped) = (of("c", "own_bytes"), of("c", "mapped_bytes"));
    assert!((CONTENT..CONTENT + MIB).contains(&own), "{own}");
    assert_eq!(of("c", "shared_bytes"), mapped - own);
    assert!((whole + CONTENT..=whole + own).contains(&mapped), "{mapped} of {whole} and {own}");
    pool.stop();
    pool.check();
}

/// An import in the background.
fn start(pool: &TestPool, source: &str, name: &str) -> Background {
    let file = pool.file().display().to_string();
    Background::start(&binary().to_string_lossy(), ["--pool", &file, "image", "import", source, name])
}

fn signal(import: &Background, signal: Signal) {
    let process = Pid::from_raw(import.id().cast_signed()).expect("a process id");
    kill_process(process, signal).expect("it has not ended");
}

/// Starts an import, and stops it (SIGSTOP) while it unpacks a layer that stands on another, as `before` others do.
fn held_above_the_base(pool: &TestPool, tag: &str, before: usize) -> Background {
    let mut import = start(pool, &source(pool, tag), tag);
    wait_until("it unpacks its second layer", LONG, || {
        assert!(import.is_running(), "{tag} has ended already");
        let listed = pool.json("volume list --all", "volumes");
        let is_above = |volume: &&Value| {
            volume["name"].as_str().is_some_and(|name| name.starts_with("import-")) && volume["origin"].is_string()
        };
        listed.as_array().expect("a list").iter().filter(is_above).count() > before
    });
    signal(&import, Signal::STOP);
    assert!(import.is_running(), "{tag} has ended already");
    import
}

/// Lets an import go on whose second layer is not what its digest says.
fn ends_badly(import: Background) {
    signal(&import, Signal::CONT);
    let ended = import.finish();
    assert!(!ended.succeeded() && ended.stderr.contains("digest"), "{}{}", ended.stdout, ended.stderr);
}

/// An image that was imported is whole, and all its layers are found again; then nothing is left of it.
fn is_whole_and_found_again(pool: &TestPool, tag: &str, name: &str) {
    assert!(pool.names().iter().all(|name| !name.starts_with("import-")), "{:?}", pool.names());
    let again = import(pool, &source(pool, tag), "again");
    assert_eq!((number(&again, "layers"), number(&again, "layers_reused")), (2, 2), "{again}");
    let expected = fs::read(pool.folder().join(tag)).expect("its content");
    for image in [name, "again"] {
        let point = pool.mount(image);
        assert!(point.join("base").is_file(), "{image}");
        assert!(fs::read(point.join(tag)).expect("its layer") == expected, "{image} is not whole");
        pool.unmount(&point);
    }
    pool.done(&format!("image delete {name} again --yes"));
    pool.done("prune --yes");
    assert_eq!(pool.names(), [] as [&str; 0]);
}

/// Of two imports at a time that have their lowest layer in common, one fails at its second layer: the other one has
/// what the first has made, or makes it itself.
pub fn failed_import_takes_no_layer_from_another() {
    let pool = TestPool::create("20G", Transport::Auto);
    let mut layout = layout(&pool);
    let base = layout.layer("base", 8 * MIB);
    let large = 256 * MIB;
    // Sizes are seeds: no two layers are the same.
    for (tag, size) in [("good", large), ("bad", large + MIB), ("small-good", MIB), ("small-bad", 2 * MIB)] {
        let layer = layout.layer(tag, size);
        layout.image(tag, &[&base, &layer], "/bin/true");
        let digest = layer.0.strip_prefix("sha256:").expect("a digest");
        let blob = pool.folder().join("layout/blobs/sha256").join(digest);
        if tag.ends_with("bad") {
            let blob = OpenOptions::new().write(true).open(blob).expect("the blob");
            blob.write_all_at(b"another content", layer.1 / 2).expect("writing");
        } else {
            content_of(&blob, size, &pool.folder().join(tag));
        }
    }

    // The other one is through before it fails.
    let bad = held_above_the_base(&pool, "bad", 0);
    let good = import(&pool, &source(&pool, "good"), "good");
    assert_eq!(number(&good, "layers_reused"), 1, "{good}");
    ends_badly(bad);
    is_whole_and_found_again(&pool, "good", "good");

    // The other one is not through, and stands on its layer.
    let bad = held_above_the_base(&pool, "bad", 0);
    let good = held_above_the_base(&pool, "good", 1);
    ends_badly(bad);
    signal(&good, Signal::CONT);
    good.finish().expect();
    is_whole_and_found_again(&pool, "good", "good");

    // As it comes.
    let rounds = if is_slow() { 3 } else { 20 };
    for _ in 0..rounds {
        let [bad, good] = ["small-bad", "small-good"].map(|tag| start(&pool, &source(&pool, tag), tag));
        let bad = bad.finish();
        good.finish().expect();
        assert!(!bad.succeeded() && bad.stderr.contains("digest"), "{}{}", bad.stdout, bad.stderr);
        is_whole_and_found_again(&pool, "small-good", "small-good");
    }
    pool.stop();
    pool.check();
}

/// Takes the one file of `size` bytes out of a layer.
fn content_of(layer: &Path, size: u64, to: &Path) {
    let mut content = vec![0; usize::try_from(size).expect("it fits into memory")];
    fs::File::open(layer).and_then(|layer| layer.read_exact_at(&mut content, 512)).expect("the layer's file");
    fs::write(to, content).expect("a file");
}

/// A layer is found for an image that is to be larger, or for which no size was asked; not for a smaller one.
pub fn found_for_larger_images(kind: &str, file_system: FileSystem) {
    let pool = TestPool::create("20G", Transport::Auto);
    let mut layout = layout(&pool);
    let (base, small) = (layout.layer("base", 8 * MIB), layout.layer("small", MIB));
    layout.image("a", &[&base], "/bin/true");
    layout.image("b", &[&base, &small], "/bin/true");
    let import =
        |tag: &str, name: &str, size: &str| import(&pool, &source(&pool, tag), &format!("{name} --fs {kind} {size}"));
    import("a", "a", "--size 1G");
    let larger = import("b", "larger", "--size 2G");
    assert_eq!((number(&larger, "layers_reused"), number(&larger, "size_bytes")), (1, 2 * GIB), "{larger}");
    let smaller = import("b", "smaller", "--size 512M");
    assert_eq!((number(&smaller, "layers_reused"), number(&smaller, "size_bytes")), (0, GIB / 2), "{smaller}");
    let usual = import("b", "usual", "");
    assert!(number(&usual, "layers_reused") >= 1 && number(&usual, "size_bytes") >= 10 * GIB, "{usual}");
    for (name, least) in [("smaller", GIB / 4), ("larger", 2 * GIB * 7 / 8), ("usual", 10 * GIB * 7 / 8)] {
        let point = pool.mount(name);
        let room = rustix::fs::statvfs(point.as_path()).expect("statvfs");
        let bytes = room.f_blocks * room.f_frsize;
        assert!(bytes > least, "{name} on {kind} shows {bytes} bytes");
        assert_eq!(fs::metadata(point.join("small")).expect("the file").len(), MIB);
        pool.unmount(&point);
        pool.done(&format!("clone create {name} checked"));
        file_system.check(&pool.attach("checked"));
        pool.done("detach checked");
        pool.done("volume delete checked --yes");
    }
    pool.stop();
    pool.check();
}

/// An image that is larger than the usual size because of its second layer has the first from one that is not.
pub fn larger_image_shares_lower_layers() {
    let pool = TestPool::create("20G", Transport::Auto);
    let mut layout = layout(&pool);
    let base = debian(&pool, &layout);
    let (zeros, small) = (layout.zeros("zeros", 3 * GIB), layout.layer("small", MIB));
    layout.image("a", &[&base], "/bin/true");
    layout.image("f", &[&base, &zeros], "/bin/true");
    layout.image("g", &[&base, &small], "/bin/true");
    let a = import(&pool, &source(&pool, "a"), "a");
    let with_a = live(&pool);
    assert!(with_a > 100 * MIB, "it was a whole system");
    let f = import(&pool, &source(&pool, "f"), "f");
    assert_eq!((number(&f, "layers"), number(&f, "layers_reused")), (2, 1), "{f}");
    let (usual, larger) = (number(&a, "size_bytes"), number(&f, "size_bytes"));
    assert!(larger > usual, "{larger} bytes are as usual");
    let more = live(&pool) - with_a;
    println!("a layer of 3 GiB of zeros, and {larger} bytes instead of {usual}, take {more} bytes");
    assert!(more < 64 * MIB, "{more}");
    let g = import(&pool, &source(&pool, "g"), "g");
    assert_eq!((number(&g, "layers_reused"), number(&g, "size_bytes")), (1, usual), "{g}");
    assert_eq!(owned(&pool), live(&pool), "each block is somebody's, and nobody else's");

    let script = "stat -c %s /zeros && cmp -n 1000000 /zeros /dev/zero && df --output=size -B 1 / | tail -n 1";
    let said = pool.plywood(["run", "f", "--rm", "--", "/bin/sh", "-c", script]).expect();
    let said: Vec<u64> = said.split_whitespace().map(|word| word.parse().expect("a number")).collect();
    let [content, size] = said[..] else { panic!("{said:?}") };
    assert_eq!(content, 3 * GIB);
    assert!(size > usual && size > larger / 10 * 9, "its file system has {size} bytes of {larger}");
    pool.done("clone create f checked");
    FileSystem::Ext4.check(&pool.attach("checked"));
    pool.done("detach checked");
    pool.stop();
    pool.check();
}

/// What was exported has other digests than what was imported, and is known all the same; so is what was read before it
/// was known what it is.
pub fn exported_image_is_found_again() {
    let pool = TestPool::create("20G", Transport::Auto);
    let archive = format!("tar:{}", rootfs().display());
    import(&pool, &archive, "debian");
    container(&pool, "debian", "box", |root| {
        fs::write(root.join("srv/new"), vec![7; MIB as usize]).expect("a file");
        fs::remove_file(root.join("etc/issue")).expect("a file that was there");
    });
    pool.done("commit box changed");
    pool.done("volume delete box --yes");
    let (changed, debian_tree) = (tree_of(&pool, "changed"), tree_of(&pool, "debian"));
    let before = live(&pool);
    let found = |source: &str, name: &str, layers: u64| {
        let found = import(&pool, source, name);
        assert_eq!((number(&found, "layers"), number(&found, "layers_reused")), (layers, layers), "{source}: {found}");
        assert_eq!(live(&pool), before, "{source} takes space");
    };
    for (name, target) in [("layout", "oci"), ("archive", "docker-archive")] {
        let target = format!("{target}:{}", pool.folder().join(format!("exported-{name}")).display());
        pool.done(&format!("image export changed {target}"));
        assert_eq!(live(&pool), before, "what was made to export it is gone");
        found(&target, name, 2);
        assert_same(&tree_of(&pool, name), &changed, name);
    }
    found(&archive, "once-more", 1);
    assert_same(&tree_of(&pool, "once-more"), &debian_tree, "the same archive");
    let mut layout = layout(&pool);
    let base = debian(&pool, &layout);
    layout.image("base", &[&base], "/bin/true");
    found(&source(&pool, "base"), "as-layer", 1);
    let _ = pool.plywood(["detach", "--all"]);
    pool.stop();
    pool.check();
}

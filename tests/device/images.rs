//! Images on their way out and back: exported layers, commits of containers, and what sharing layers saves.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::command::run;
use crate::support::machine::rootfs;
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::{self, Tree, assert_same};

const MIB: u64 = 1 << 20;

/// Makes a container without starting it, and lets `change` work in its root.
pub fn container(pool: &TestPool, image: &str, name: &str, change: impl FnOnce(&Path)) {
    pool.done(&format!("clone create {image} {name}"));
    let point = pool.mount(name);
    change(&point);
    pool.unmount(&point);
}

/// Every name of an image with all that is known of it. The root itself is as the file system made it, on import as with
/// containerd.
pub fn tree_of(pool: &TestPool, name: &str) -> Tree {
    let point = pool.mount(name);
    let tree = tree::tree_of(&point, true);
    pool.unmount(&point);
    tree
}

/// Everything that a layer has to say: something new, other, gone, moved, linked, replaced by something of another kind, and a
/// name that was given anew.
fn change_all(root: &Path) {
    fs::write(root.join("etc/motd"), "another\n").expect("a file");
    fs::remove_file(root.join("etc/issue")).expect("a file that was there");
    fs::rename(root.join("usr/share/doc"), root.join("usr/share/documents")).expect("a large directory");
    fs::remove_dir_all(root.join("usr/share/man")).expect("a directory");
    fs::write(root.join("usr/share/man"), "a file now").expect("in its place");
    fs::remove_dir_all(root.join("media")).expect("a directory");
    fs::create_dir_all(root.join("media/again/deep")).expect("the same name");
    fs::remove_file(root.join("etc/issue.net")).expect("a file");
    fs::create_dir(root.join("etc/issue.net")).expect("a directory in its place");
    fs::hard_link(root.join("etc/passwd"), root.join("srv/link")).expect("a link to what was there");
    symlink("nowhere/".repeat(30), root.join("srv/far")).expect("a long link");
    fs::set_permissions(root.join("bin/ls"), fs::Permissions::from_mode(0o4711)).expect("a mode");
    xattr::set(root.join("etc/hostname"), "user.note", b"a\nb").expect("an attribute");
    let mut large = vec![0; 3 << 20];
    fastrand::Rng::with_seed(1).fill(&mut large);
    fs::write(root.join("srv/large"), large).expect("a large file");
    run("mkfifo", [root.join("srv/pipe").as_os_str()]).expect();
    run("mknod", [root.join("srv/node").as_os_str(), "c".as_ref(), "1".as_ref(), "3".as_ref()]).expect();
}

/// The layers of `plywood image export`.
fn exported(pool: &TestPool, line: &str) -> Vec<Value> {
    pool.json(&format!("image export {line}"), "exported")["layers"].as_array().expect("layers").clone()
}

/// What comes back is what went out, however the layers were found, and on whatever way it went.
pub fn layers_say_what_changed(file_system: &str) {
    let pool = TestPool::create("20G", Transport::Auto);
    pool.plywood(["image", "import", &format!("tar:{}", rootfs().display()), "debian", "--fs", file_system]).expect();
    container(&pool, "debian", "box", change_all);
    pool.done("commit box changed");
    container(&pool, "changed", "again", |root| {
        fs::remove_dir_all(root.join("usr/share/documents")).expect("what was moved");
        fs::rename(root.join("media/again"), root.join("again")).expect("what was made");
    });
    pool.plywood(["commit", "again", "last", "--change", "CMD [\"/bin/true\"]", "--message", "the last"]).expect();
    let expected = tree_of(&pool, "last");
    let folder = pool.folder().join("out");
    fs::create_dir(&folder).expect("a folder");
    let layout = folder.join("layout").display().to_string();
    let archive = folder.join("archive.tar").display().to_string();
    let by_blocks = exported(&pool, &format!("last oci:{layout}:blocks"));
    let by_walk = exported(&pool, &format!("last oci:{layout}:walk --walk --compress zstd"));
    exported(&pool, &format!("last docker-archive:{archive}:test/last:1"));
    let found: Vec<&str> = by_blocks.iter().map(|layer| layer["found_by"].as_str().expect("a word")).collect();
    let way = if file_system == "ext4" { "blocks" } else { "walk" };
    assert_eq!(found, ["whole", way, way]);
    for (blocks, walk) in by_blocks.iter().zip(&by_walk) {
        assert_eq!(blocks["whiteouts"], walk["whiteouts"], "{blocks} {walk}");
        println!("by blocks {blocks}\nby a walk {walk}");
    }
    let sources = [format!("oci:{layout}:blocks"), format!("oci:{layout}:walk"), format!("docker-archive:{archive}")];
    for (number, source) in sources.iter().enumerate() {
        let name = format!("back{number}");
        pool.done(&format!("image import {source} {name} --fs {file_system}"));
        assert_same(&tree_of(&pool, &name), &expected, source);
    }
    // Of a container in use: held still for a moment, or as after a crash, with a journal to be replayed.
    pool.done("clone create last live");
    let point = pool.mount("live");
    for (option, image) in [("", "still"), ("--no-freeze", "crashed")] {
        fs::write(point.join("srv/live"), image).expect("a file");
        fs::create_dir(point.join(image)).expect("a directory");
        run("sync", ["-f".as_ref(), point.as_os_str()]).expect();
        pool.done(&format!("commit live {image} {option}"));
        let layers = exported(&pool, &format!("{image} oci:{layout}:{image}"));
        assert_eq!(layers.last().expect("a layer")["found_by"], way);
        pool.done(&format!("image import oci:{layout}:{image} {image}-back --fs {file_system}"));
        assert_same(&tree_of(&pool, &format!("{image}-back")), &tree_of(&pool, image), image);
    }
    pool.unmount(&point);
    // At the same time into one layout: each is in its index afterwards, with all its blobs.
    let shared = folder.join("shared").display().to_string();
    thread::scope(|scope| {
        for image in ["changed", "last", "still"] {
            let (pool, shared) = (&pool, &shared);
            scope.spawn(move || exported(pool, &format!("{image} oci:{shared}:{image} --compress none")));
        }
    });
    for image in ["changed", "last", "still"] {
        let copied = folder.join(format!("copied-{image}")).display().to_string();
        run("skopeo", ["copy", &format!("oci:{shared}:{image}"), &format!("oci:{copied}:{image}")]).expect();
    }
    // Another reader of layouts and archives.
    let copied = folder.join("copied").display().to_string();
    run("skopeo", ["copy", &format!("docker-archive:{archive}"), &format!("oci:{copied}:copied")]).expect();
    let said = pool.plywood(["run", "back0", "--rm"]);
    assert!(said.succeeded(), "the command of the commit: {}", said.stderr);
    assert!(pool.names().iter().all(|name| !name.contains(".export-")), "{:?}", pool.names());
    pool.refused(&format!("image export last docker-archive:{archive}"), &["exists already"]);
    pool.refused(&format!("image export box oci:{layout}:x"), &["no image"]);
    pool.stop();
    pool.check();
}

/// Ten files among three hundred thousand: less than a hundredth of what walking both trees reads.
pub fn export_costs_what_changed() {
    const DIRECTORIES: usize = 3000;
    const FILES: usize = 100;
    let pool = TestPool::create("20G", Transport::Auto);
    let archive = pool.folder().join("many.tar");
    let mut builder = tar::Builder::new(BufWriter::new(File::create(&archive).expect("an archive")));
    let mut put = |path: String, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        let directory = content.is_empty();
        header.set_entry_type(if directory { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(0o755);
        header.set_mtime(1);
        builder.append_data(&mut header, path, content).expect("an entry");
    };
    for directory in 0..DIRECTORIES {
        let above = directory / 60;
        if directory % 60 == 0 {
            put(format!("{above}/"), b"");
        }
        put(format!("{above}/{directory}/"), b"");
        (0..FILES).for_each(|file| put(format!("{above}/{directory}/{file}"), b"x"));
    }
    drop(builder.into_inner().expect("an archive"));
    pool.done(&format!("image import tar:{} many --size 10G", archive.display()));
    container(&pool, "many", "box", |root| {
        for number in 0..10 {
            let directory = number * 297;
            fs::write(root.join(format!("{}/{directory}/7", directory / 60)), "another").expect("a file");
        }
    });
    pool.done("commit box changed");
    let layout = pool.folder().join("layout").display().to_string();
    let read = |line: String| {
        let layers = exported(&pool, &line);
        println!("{}", layers[1]);
        assert!(layers[1]["entries"].as_u64().expect("a number") >= 10);
        layers[1]["read_bytes"].as_u64().expect("a number")
    };
    let blocks = read(format!("changed oci:{layout}:blocks"));
    // That is one of the two trees: the other's layer was written just before, and is in memory.
    let walk = read(format!("changed oci:{layout}:walk --walk"));
    assert!(blocks * 100 < walk, "{blocks} bytes by blocks, {walk} by a walk");
    pool.stop();
    pool.check();
}

struct Random(fastrand::Rng);

impl Read for Random {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.fill(buffer);
        Ok(buffer.len())
    }
}

/// An OCI layout that is put together by hand: layers, each once, and images of them.
pub struct Layers {
    directory: PathBuf,
    manifests: Vec<Value>,
}

impl Layers {
    pub fn new(directory: PathBuf) -> Self {
        fs::create_dir_all(directory.join("blobs/sha256")).expect("a folder");
        fs::write(directory.join("oci-layout"), "{\"imageLayoutVersion\": \"1.0.0\"}").expect("a file");
        Self { directory, manifests: Vec::new() }
    }

    /// A layer of what is in the file `from`, which is moved: its digest and its size.
    pub fn blob(&self, from: &Path) -> (String, u64) {
        let mut hash = Sha256::new();
        let (mut file, mut buffer, mut size) = (File::open(from).expect("a blob"), vec![0; 1 << 20], 0);
        loop {
            let count = file.read(&mut buffer).expect("a blob");
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            size += count as u64;
        }
        let hex = hex::encode(hash.finalize());
        fs::rename(from, self.directory.join("blobs/sha256").join(&hex)).expect("its name");
        (format!("sha256:{hex}"), size)
    }

    fn document(&self, value: &Value) -> (String, u64) {
        let path = self.directory.join("draft");
        fs::write(&path, value.to_string()).expect("a document");
        self.blob(&path)
    }

    /// A layer of one file with random content.
    pub fn layer(&self, name: &str, size: u64) -> (String, u64) {
        let path = self.directory.join("draft");
        let mut builder = tar::Builder::new(BufWriter::new(File::create(&path).expect("a layer")));
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o644);
        let content = Random(fastrand::Rng::with_seed(size)).take(size);
        builder.append_data(&mut header, name, content).expect("a file");
        builder.into_inner().expect("a layer").flush().expect("a layer");
        self.blob(&path)
    }

    /// A layer of one file of zeros, of which this machine stores nothing.
    pub fn zeros(&self, name: &str, size: u64) -> (String, u64) {
        let path = self.directory.join("draft");
        let mut header = tar::Header::new_gnu();
        header.set_path(name).expect("a short name");
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        let mut file = File::create(&path).expect("a layer");
        file.write_all(header.as_bytes()).expect("a header");
        // The end mark is zeros as well.
        file.set_len(512 + size.next_multiple_of(512) + 1024).expect("a layer");
        self.blob(&path)
    }

    pub fn image(&mut self, tag: &str, layers: &[&(String, u64)], command: &str) {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.0.as_str()).collect();
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let configuration = self.document(&json!({"os": "linux", "architecture": architecture,
            "config": {"Cmd": [command]}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}));
        let descriptor = |(digest, size): &(String, u64), kind: &str| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size});
        let layers: Vec<Value> = layers.iter().map(|layer| descriptor(layer, "layer.v1.tar")).collect();
        let configuration = descriptor(&configuration, "config.v1+json");
        let manifest = self.document(&json!({"schemaVersion": 2, "config": configuration, "layers": layers}));
        let mut manifest = descriptor(&manifest, "manifest.v1+json");
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.manifests.push(manifest);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.directory.join("index.json"), index.to_string()).expect("the index");
    }
}

/// The sizes that Docker's documentation of storage drivers promises for images that share layers, and what deleting them gives
/// back.
pub fn images_share_what_they_have_in_common() {
    const LARGE: u64 = 906 * MIB;
    let pool = TestPool::create("20G", Transport::Auto);
    let directory = pool.folder().join("layout");
    let mut layout = Layers::new(directory.clone());
    let base = pool.folder().join("base.tar");
    fs::copy(rootfs(), &base).expect("a copy");
    let (base, large, small) = (layout.blob(&base), layout.layer("large", LARGE), layout.layer("small", 20_000));
    let other = layout.layer("other", 30_000);
    layout.image("a", &[&base], "/bin/true");
    layout.image("b", &[&base], "/bin/false");
    layout.image("c", &[&base, &large], "/bin/true");
    layout.image("d", &[&base, &large, &small], "/bin/true");
    layout.image("e", &[&base, &large, &other], "/bin/true");
    let import = |tag: &str| pool.done(&format!("image import oci:{}:{tag} {tag}", directory.display()));
    // What the blocks of volumes take, metadata and what is being given back left out.
    let used = || {
        pool.done("pool trim");
        pool.info()["live_bytes"].as_u64().expect("a number")
    };
    let more = |before: u64| used().saturating_sub(before);

    import("a");
    let with_a = used();
    import("b");
    assert_eq!(more(with_a), 0, "an image with another command only");
    import("c");
    let with_c = used();
    let of_c = with_c - with_a;
    println!("a layer with a file of 906 MiB takes {of_c} bytes");
    assert!((LARGE..LARGE + 4 * MIB).contains(&of_c), "{of_c}");
    import("d");
    let of_d = more(with_c);
    println!("a small layer on it takes {of_d} bytes");
    assert!(of_d < MIB, "{of_d}");
    let with_d = used();
    pool.done("image delete c --yes");
    assert!(with_d - used() < MIB, "deleting an image freed what another has");
    import("e");
    let of_e = used() as i64 - with_d as i64;
    assert!(of_e < MIB as i64, "another image with the same layer takes {of_e} bytes");
    pool.done("run e --name idle");
    let own = pool.volume("idle")["own_bytes"].as_u64().expect("a number");
    println!("a container that wrote nothing has {own} bytes");
    assert!(own < 64 << 10, "{own}");
    pool.done("volume delete idle --yes");
    let before = used();
    pool.done("image delete d e --yes");
    let freed = before - used();
    println!("deleting the last two with the layer frees {freed} bytes");
    assert!(freed >= LARGE, "{freed}");
    // The layer that was made for those that have gone is gone with them: the others are it themselves.
    assert_eq!(pool.names(), ["a", "b"]);
    pool.done("image delete a b --yes");
    assert_eq!(pool.names(), [] as [&str; 0]);
    pool.stop();
    pool.check();
}

/// Two images on one base, each under two names, are imported by four commands at a time.
pub fn imported_at_once() {
    let pool = TestPool::create("20G", Transport::Auto);
    pool.plywood(["image", "import", &format!("tar:{}", rootfs().display()), "base"]).expect();
    let mut layouts = Vec::new();
    for name in ["one", "two"] {
        container(&pool, "base", &format!("{name}-c"), |root| {
            fs::write(root.join(name), name.repeat(100_000)).expect("a file");
        });
        pool.done(&format!("commit {name}-c {name}"));
        let layout = format!("oci:{}", pool.folder().join(name).display());
        pool.plywood(["image", "export", name, &layout]).expect();
        layouts.push((name, layout));
    }
    let other = TestPool::create("20G", Transport::Auto);
    std::thread::scope(|scope| {
        for (name, layout) in &layouts {
            for copy in ["a", "b"] {
                let (other, target) = (&other, format!("{name}-{copy}"));
                scope.spawn(move || other.plywood(["image", "import", layout, &target]).expect());
            }
        }
    });
    for (name, _) in &layouts {
        let expected = tree_of(&pool, name);
        for copy in ["a", "b"] {
            assert_same(&tree_of(&other, &format!("{name}-{copy}")), &expected, name);
        }
    }
    for pool in [&pool, &other] {
        let _ = pool.plywood(["detach", "--all"]);
        pool.stop();
        pool.check();
    }
}

/// What is made from an image keeps it, and what it stands on.
pub fn pruned() {
    let pool = TestPool::create("20G", Transport::Auto);
    let source = format!("tar:{}", rootfs().display());
    for name in ["base", "unused"] {
        pool.plywood(["image", "import", &source, name, "--fs", if name == "base" { "ext4" } else { "xfs" }]).expect();
    }
    container(&pool, "base", "work", |root| fs::write(root.join("x"), vec![7; MIB as usize]).expect("a file"));
    pool.done("commit work upper");
    pool.done("volume delete work --yes");
    pool.done("clone create upper used");
    let _ = pool.plywood(["detach", "--all"]);
    // What is used is told as of a checkpoint, which a trim makes.
    pool.done("pool trim");
    let before = pool.info()["used_bytes"].as_u64().expect("a number");
    pool.done("prune --yes");
    assert_eq!(pool.names(), ["base", "unused", "upper", "used"], "images are asked for by name");
    assert!(pool.done("prune --images --dry-run").contains("unused"));
    pool.done("prune --images --yes");
    assert_eq!(pool.names(), ["base", "upper", "used"], "what stands on it keeps it");
    assert!(pool.info()["used_bytes"].as_u64().expect("a number") + 100 * MIB < before, "it was a whole system");
    pool.done("volume delete used --yes");
    pool.done("prune --images --yes");
    assert_eq!(pool.names(), Vec::<String>::new());
    pool.stop_if_running();
    pool.check();
}

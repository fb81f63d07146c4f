//! Images that are none, pools that are full, and programs that are killed: a word of what is wrong, and nothing left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::command::{run, wait_until};
use crate::support::pool::{TestPool, Transport};

const MIB: usize = 1 << 20;
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// What may be left of an image, a container or an export: volumes, devices, mounts, directories.
fn left(pool: &TestPool) -> BTreeSet<String> {
    let mut left: BTreeSet<String> = pool.names().into_iter().collect();
    let listed = pool.json("volume list --all", "volumes");
    for volume in listed.as_array().expect("a list") {
        if let Some(device) = volume["device"].as_str() {
            left.insert(format!("{} is {device}", volume["name"]));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    left.extend(mounts.lines().filter(|line| line.contains("/run/plywood/")).map(str::to_owned));
    for folder in ["/run/plywood/containers", "/run/plywood/volumes"] {
        let entries = fs::read_dir(folder).into_iter().flatten();
        left.extend(entries.map(|entry| entry.expect("a name").path().display().to_string()));
    }
    left
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// An OCI layout of one layer, as it should be until it is made otherwise.
struct Layout {
    folder: PathBuf,
    architecture: &'static str,
    media_type: &'static str,
    layer: Vec<u8>,
    /// What the configuration says the uncompressed layer's digest is.
    diff_id: String,
}

impl Layout {
    fn new(pool: &TestPool, name: &str, layer: Vec<u8>) -> Self {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let diff_id = digest(&layer);
        Self { folder: pool.folder().join(name), architecture, media_type: TAR, layer, diff_id }
    }

    fn blob(&self, content: &[u8]) -> Value {
        let name = digest(content);
        let path = self.folder.join("blobs/sha256").join(&name["sha256:".len()..]);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, content).expect("a blob");
        json!({ "digest": name, "size": content.len() })
    }

    fn described(&self, content: &[u8], media_type: &str) -> Value {
        let mut blob = self.blob(content);
        blob["mediaType"] = media_type.into();
        blob
    }

    fn layer_path(&self) -> PathBuf {
        self.folder.join("blobs/sha256").join(&digest(&self.layer)["sha256:".len()..])
    }

    /// Writes it, and answers what it is called as a source.
    fn write(&self) -> String {
        let config = json!({"architecture": self.architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [self.diff_id]}});
        let config = self.described(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let layer = self.described(&self.layer, self.media_type);
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": [layer]});
        let manifest = self.described(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(self.folder.join("index.json"), index.to_string()).expect("the index");
        fs::write(self.folder.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())
            .expect("the mark");
        format!("oci:{}", self.folder.display())
    }
}

/// A tar with one file of so many bytes, which do not repeat.
fn archive(pool: &TestPool, name: &str, bytes: usize, transform: &str) -> Vec<u8> {
    let folder = pool.folder().join(format!("{name}-files"));
    fs::create_dir(&folder).expect("a folder");
    let mut content = vec![0; bytes];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut content);
    fs::write(folder.join("file"), content).expect("a file");
    let path = pool.folder().join(format!("{name}.tar"));
    let rename = format!("--transform=s,^file$,{transform},");
    let words = ["-P", "-C"].map(str::to_owned).into_iter().chain([
        folder.display().to_string(),
        "-cf".to_owned(),
        path.display().to_string(),
        rename,
        "file".to_owned(),
    ]);
    run("tar", words).expect();
    fs::read(path).expect("the archive")
}

#[track_caller]
fn refused(pool: &TestPool, words: &[&str], said: &str, before: &BTreeSet<String>) {
    let outcome = pool.plywood(words.iter().copied());
    assert_eq!(outcome.status.code(), Some(1), "{words:?}: {}{}", outcome.stdout, outcome.stderr);
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    assert!(lines.len() == 1 && lines[0].starts_with("plywood: "), "one line: {}", outcome.stderr);
    assert!(lines[0].contains(said), "{words:?} says {:?}, not {said:?}", lines[0]);
    assert_eq!(&left(pool), before, "{words:?} left something, or took something away");
}

pub fn leave_nothing() {
    let pool = TestPool::create("256M", Transport::Auto);
    let small = archive(&pool, "small", MIB, "file");
    // Another layer: one that the pool has is not read again.
    let good = Layout::new(&pool, "good", archive(&pool, "fine", MIB, "file")).write();
    pool.plywood(["image", "import", &good, "good", "--size", "64M"]).expect();
    let before = left(&pool);
    let import = |source: &str, said: &str| {
        refused(&pool, &["image", "import", source, "bad", "--size", "64M"], said, &before);
    };
    refused(&pool, &["image", "import", &good, "good", "--size", "64M"], "good", &before);

    let changed = Layout::new(&pool, "changed", small.clone());
    let source = changed.write();
    let mut bytes = fs::read(changed.layer_path()).expect("the blob");
    bytes[MIB / 2] ^= 1;
    fs::write(changed.layer_path(), bytes).expect("the blob");
    import(&source, "digest");
    fs::remove_file(changed.layer_path()).expect("the blob");
    import(&source, "is missing");

    let other = |name: &str, change: fn(&mut Layout)| {
        let mut layout = Layout::new(&pool, name, small.clone());
        change(&mut layout);
        layout.write()
    };
    // What is compressed tells itself, and the digests are right: only what is no archive at all is not what its type says.
    import(&other("squashed", |layout| layout.media_type = "application/vnd.example.squashfs"), "is not supported");
    let garbage = other("garbage", |layout| {
        layout.layer = b"no archive ".repeat(1000);
        layout.diff_id = digest(&layout.layer);
    });
    import(&garbage, "layer");
    import(&other("foreign", |layout| layout.architecture = "s390x"), "is for linux/s390x");
    import(&other("diff-id", |layout| layout.diff_id = digest(b"something else")), "configuration says");
    let cut = other("cut", |layout| {
        layout.layer.truncate(MIB / 2);
        layout.diff_id = digest(&layout.layer);
    });
    import(&cut, "cut short");
    let climbs = Layout::new(&pool, "climbs", archive(&pool, "climbing", 10, "../../escaped")).write();
    import(&climbs, "escaped");
    fs::write(Path::new(&climbs["oci:".len()..]).join("index.json"), b"{").expect("the index");
    import(&climbs, "index.json");
    import("oci:/no/such/directory", "/no/such/directory");
    import("docker-archive:/dev/null", "/dev/null");

    // More than the pool has room for.
    let large = Layout::new(&pool, "large", archive(&pool, "large", 300 * MIB, "file")).write();
    refused(&pool, &["image", "import", &large, "bad", "--size", "1G"], "no space is left in the pool", &before);

    // Containers and exports.
    for (words, said) in [
        (&["run", "nowhere", "--rm", "--", "/bin/true"][..], "nowhere"),
        (&["run", "good", "--rm", "--mount", "source=nowhere,target=/x", "--", "/bin/true"], "nowhere"),
        (&["run", "good", "--rm", "--user", "nobody-here", "--", "/bin/true"], "nobody-here"),
        (&["run", "good", "--detach", "--", "/bin/true"], "did not start"),
        (&["commit", "good", "again"], "snapshot"),
        (&["rm", "good"], "no container"),
        (&["logs", "good"], "no container"),
        (&["image", "export", "good", "oci:/proc/layout"], "/proc/layout"),
        (&["image", "delete", "nowhere", "--yes"], "nowhere"),
    ] {
        refused(&pool, words, said, &before);
    }
    let full = pool.mount_point("full");
    run(
        "mount",
        ["-t".as_ref(), "tmpfs".as_ref(), "-o".as_ref(), "size=256k".as_ref(), "none".as_ref(), full.as_os_str()],
    )
    .expect();
    let target = format!("docker-archive:{}", full.join("image.tar").display());
    refused(&pool, &["image", "export", "good", &target], "No space", &before);
    assert_eq!(fs::read_dir(&full).expect("the folder").count(), 0, "part of an archive is left");
    run("umount", [&full]).expect();

    // An import that is killed leaves what prune takes.
    let slow = Layout::new(&pool, "slow", archive(&pool, "slow", 100 * MIB, "file")).write();
    let volumes = pool.names().len();
    let mut killed = pool.prepare(["image", "import", &slow, "bad", "--size", "200M"]).spawn().expect("an import");
    // Its parent is the program that would end it in time.
    let mut import = String::new();
    wait_until("the import", Duration::from_secs(60), || {
        import = run("pgrep", ["-P", &killed.id().to_string()]).stdout.trim().to_owned();
        !import.is_empty()
    });
    wait_until("its volume", Duration::from_secs(60), || pool.names().len() > volumes);
    run("kill", ["-9", &import]).expect();
    killed.wait().expect("its end");
    pool.done("detach --all");
    pool.done("prune --yes");
    assert_eq!(left(&pool), before, "what was cut short");
    pool.stop();
    pool.check();
}

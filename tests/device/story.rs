//! The whole story: a Debian root file system is imported and layered into a chain of snapshots, files changed and
//! deleted in each; clones of all are mounted at once and hold what their layer held; they are checked by the file
//! system's own tool; everything is detached, reopened, and still there.

use std::fs;
use std::path::Path;

use crate::support::command::{is_slow, run};
use crate::support::machine::rootfs;
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::{digest, random_bytes};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Xfs,
    Btrfs,
}

impl FileSystem {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// Makes a file system on `device`.
    #[track_caller]
    pub fn make(self, device: &str) {
        match self {
            Self::Ext4 => run("mkfs.ext4", ["-q", device]).expect(),
            Self::Xfs => run("mkfs.xfs", ["-q", device]).expect(),
            Self::Btrfs => run("mkfs.btrfs", ["-q", device]).expect(),
        };
    }

    /// Has the file system on `device` checked, without repairing anything.
    #[track_caller]
    pub fn check(self, device: &str) {
        match self {
            Self::Ext4 => run("e2fsck", ["-f", "-n", device]).expect(),
            Self::Xfs => run("xfs_repair", ["-n", device]).expect(),
            Self::Btrfs => run("btrfs", ["check", "--readonly", device]).expect(),
        };
    }

    /// Whether several clones of one file system may be mounted at a time. Kernels before 6.7 refuse btrfs ones, which
    /// have the same uuid.
    fn mounts_clones_together(self) -> bool {
        self != Self::Btrfs
    }
}

/// One telling of the story.
#[derive(Clone, Copy, Debug)]
pub struct Story {
    pub file_system: FileSystem,
    pub transport: Transport,
    pub sector_size: u32,
    pub layers: usize,
}

impl Story {
    /// Tells it from beginning to end.
    pub fn tell(self) {
        let pool = TestPool::create("40G", self.transport);
        self.import(&pool);
        let mut digests = vec![self.first_digest(&pool)];
        for layer in 1..=self.layers {
            digests.push(Self::add_layer(&pool, layer));
        }
        assert_eq!(pool.volume(&layer_name(self.layers))["depth"].as_u64().map(|depth| depth > 0), Some(true));
        self.assert_transport(&pool);
        for layer in 0..=self.layers {
            pool.done(&format!("clone create {} clone-{layer}", layer_name(layer)));
        }
        self.compare_clones(&pool, &digests);
        self.check_each_snapshot(&pool);

        // Everything goes away, and a new daemon finds it all again.
        pool.done("detach --all");
        pool.stop();
        pool.check();
        for layer in 0..=self.layers {
            assert!(pool.names().contains(&layer_name(layer)), "{} is gone", layer_name(layer));
        }
        self.compare_clones(&pool, &digests);
        pool.done("detach --all");
        pool.check();
    }

    fn import(self, pool: &TestPool) {
        let source = format!("tar:{}", rootfs().display());
        let mut arguments =
            vec!["image", "import", &source, "layer-0", "--size", "3G", "--fs", self.file_system.name()];
        let sector_size = self.sector_size.to_string();
        arguments.extend(["--sector-size", &sector_size]);
        pool.plywood(arguments).expect();
        assert_eq!(pool.volume("layer-0")["snapshot"], true, "an imported image is a snapshot");
        assert_eq!(pool.volume("layer-0")["sector_size"], self.sector_size);
    }

    fn first_digest(self, pool: &TestPool) -> String {
        let point = pool.mount("layer-0");
        assert!(!point.join("lost+found").exists(), "an image has no lost+found");
        assert!(point.join("bin/sh").exists(), "the root file system is all there");
        let digest = digest(&point);
        let device = crate::support::mounted::device_at(&point).expect("mounted");
        let name = device.trim_start_matches("/dev/");
        let sysfs = |path: &str| fs::read_to_string(format!("/sys/block/{name}/{path}")).expect("sysfs");
        assert_eq!(sysfs("loop/dio").trim(), "1", "the loop device does direct I/O");
        assert_eq!(sysfs("queue/logical_block_size").trim(), self.sector_size.to_string());
        pool.unmount(&point);
        digest
    }

    /// Changes and deletes files in a clone of the layer below, and makes a snapshot of it.
    fn add_layer(pool: &TestPool, layer: usize) -> String {
        let working = format!("work-{layer}");
        pool.done(&format!("clone create {} {working}", layer_name(layer - 1)));
        let point = pool.mount(&working);
        change_files(&point, layer);
        let digest = digest(&point);
        pool.unmount(&point);
        pool.done(&format!("snapshot create {working} {}", layer_name(layer)));
        digest
    }

    fn assert_transport(self, pool: &TestPool) {
        let info = pool.info();
        let transport = info["transport"].as_str().unwrap_or("none");
        match self.transport {
            Transport::Uring => {
                assert!(transport.contains("uring (the kernel offers it, and"), "transport is {transport}");
            }
            Transport::Classic => assert!(transport.contains("classic (asked for"), "transport is {transport}"),
            Transport::Auto => println!("transport: {transport}"),
        }
    }

    /// Mounts a clone of every layer, all at once where the file system allows it, and compares contents.
    fn compare_clones(self, pool: &TestPool, digests: &[String]) {
        let mut mounted = Vec::new();
        for (layer, expected) in digests.iter().enumerate() {
            let point = pool.mount(&format!("clone-{layer}"));
            if self.file_system.mounts_clones_together() {
                mounted.push(point);
            } else {
                assert_eq!(digest(&point), *expected, "layer {layer}");
                pool.unmount(&point);
            }
        }
        for (layer, point) in mounted.iter().enumerate() {
            assert_eq!(digest(point), digests[layer], "layer {layer}");
        }
        for point in mounted {
            pool.unmount(&point);
        }
    }

    /// A clone of every snapshot is mounted, unmounted, and found sound by the file system's own checker.
    fn check_each_snapshot(self, pool: &TestPool) {
        for layer in 0..=self.layers {
            let name = format!("probe-{layer}");
            pool.done(&format!("clone create {} {name}", layer_name(layer)));
            let point = pool.mount(&name);
            pool.unmount(&point);
            let device = pool.attach(&name);
            self.file_system.check(&device);
            pool.done(&format!("detach {name}"));
            pool.done(&format!("volume delete {name} --yes"));
        }
    }
}

fn layer_name(layer: usize) -> String {
    format!("layer-{layer}")
}

/// What one layer does to the files: new ones, changed ones, a deleted one, a renamed directory, links and modes.
fn change_files(root: &Path, layer: usize) {
    let own = root.join(format!("srv/layer-{layer}"));
    fs::create_dir_all(&own).expect("a folder");
    let mut random = fastrand::Rng::with_seed(layer as u64);
    let largest = if is_slow() { 200_000 } else { 2_000_000 };
    for number in 0..12 {
        let bytes = random_bytes(&mut random, largest);
        fs::write(own.join(format!("file-{number}")), bytes).expect("a new file");
    }
    fs::hard_link(own.join("file-0"), own.join("link-0")).expect("a hard link");
    std::os::unix::fs::symlink("file-1", own.join("link-1")).expect("a symbolic link");
    if layer > 1 {
        let below = root.join(format!("srv/layer-{}", layer - 1));
        fs::remove_file(below.join("file-2")).expect("deleting a file of the layer below");
        let mut text = fs::read(below.join("file-3")).expect("a file of the layer below");
        let middle = text.len() / 2;
        text[middle..].iter_mut().take(5000).for_each(|byte| *byte ^= 0xff);
        fs::write(below.join("file-3"), text).expect("changing it");
    }
    if layer > 2 {
        let older = root.join(format!("srv/layer-{}", layer - 2));
        fs::rename(&older, root.join(format!("srv/renamed-{}", layer - 2)))
            .expect("renaming a folder of an older layer");
    }
    let release = root.join("etc/debian_version");
    let mut version = fs::read_to_string(&release).expect("Debian's version");
    version.push_str(&format!("layer {layer}\n"));
    fs::write(&release, version).expect("changing a file of the image");
}

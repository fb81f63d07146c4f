//! Bad input that takes devices to give: each is refused with one clear line and exit status 1, and nothing changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::command::{Background, binary, run, wait_until};
use crate::support::machine::{rootfs, scratch};
use crate::support::pool::{TestPool, Transport};

fn with_file_system() -> (TestPool, String) {
    let pool = TestPool::create("4G", Transport::Auto);
    pool.done("volume create files --size 256M --sector-size 4096");
    let device = pool.attach("files");
    run("mkfs.ext4", ["-q", &device]).expect();
    (pool, device)
}

/// A process with its working directory in `folder`, or a child of it.
fn holder(folder: &Path) -> Background {
    let line = format!("cd '{}' && exec sleep 600", folder.display());
    let holder = Background::start("sh", ["-c", &line]);
    let directory = format!("/proc/{}/cwd", holder.id());
    wait_until("the holder is in the folder", Duration::from_secs(20), || {
        fs::read_link(&directory).is_ok_and(|at| at == folder)
    });
    holder
}

pub fn detach_of_mounted() {
    let (pool, device) = with_file_system();
    let point = pool.mount("files");
    let mut holder = holder(&point);
    let named = [point.to_str().expect("a path"), &holder.id().to_string()].map(str::to_owned);
    pool.refused("detach files", &named.each_ref().map(String::as_str));
    assert!(holder.is_running());
    assert_eq!(pool.volume("files")["device"], *device, "it is attached as before");
    fs::write(point.join("still"), "works").expect("the mount works as before");
    drop(holder);
    pool.refused("detach files", &[point.to_str().expect("a path")]);
    pool.unmount(&point);
    pool.done("detach files");
    pool.stop();
    pool.check();
}

/// A device that somebody has open stays attached for good, and does not go when that one closes it; a short look at it is
/// waited for.
pub fn detach_of_opened() {
    let (pool, device) = with_file_system();
    let opened = fs::File::open(&device).expect("the device");
    let own = std::process::id().to_string();
    pool.refused("detach files", &[&own, "open"]);
    assert_eq!(pool.volume("files")["device"], *device, "it is attached as before");
    drop(opened);
    std::thread::sleep(Duration::from_millis(200));
    let point = pool.mount("files");
    fs::write(point.join("still"), "works").expect("the mount works");
    pool.unmount(&point);
    assert_eq!(pool.volume("files")["device"], *device, "unmounting does not detach either");
    // As udev's probes do.
    let opened = fs::File::open(&device).expect("the device");
    let probe = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        drop(opened);
    });
    pool.done("detach files");
    probe.join().expect("the probe");
    pool.stop();
    pool.check();
}

pub fn detach_in_other_namespace() {
    let (pool, device) = with_file_system();
    let point = pool.mount_point("elsewhere");
    let ready = pool.folder().join("ready");
    let line = format!("mount {device} '{}' && touch '{}' && exec sleep 600", point.display(), ready.display());
    let other = Background::start("unshare", ["--mount", "--propagation", "private", "sh", "-c", &line]);
    wait_until("the mount in the other namespace", Duration::from_secs(20), || ready.exists());
    assert_eq!(crate::support::mounted::device_at(&point), None, "it is not mounted here");
    let process = other.id().to_string();
    pool.refused("detach files", &[point.to_str().expect("a path"), &process]);
    drop(other);
    wait_until("detach, once the other namespace is gone", Duration::from_secs(20), || {
        pool.plywood(["detach", "files"]).succeeded()
    });
    pool.stop();
    pool.check();
}

pub fn attached_is_kept() {
    let (pool, device) = with_file_system();
    pool.done("snapshot create files one");
    pool.refused("volume delete files --yes", &["files", "attached"]);
    pool.refused("snapshot rollback files one --yes", &["files", "attached"]);
    assert_eq!(pool.volume("files")["device"], *device);
    pool.done("volume protect one");
    pool.refused("snapshot delete one --yes", &["one", "protected"]);
    assert_eq!(pool.names(), ["files", "one"]);
    pool.done("detach files");
    pool.done("snapshot rollback files one --keep two --yes");
    assert_eq!(pool.names(), ["files", "one", "two"]);
    pool.stop();
    pool.check();
}

pub fn shrink_below_file_system() {
    let (pool, device) = with_file_system();
    pool.refused("volume resize files --size 128M", &["files"]);
    pool.done("detach files");
    pool.refused("volume resize files --size 128M", &["files", "file system"]);
    assert_eq!(pool.volume("files")["size_bytes"], 256 << 20);
    let again = pool.attach("files");
    run("e2fsck", ["-f", "-p", &again]).expect();
    run("resize2fs", [&again, "100M"]).expect();
    pool.done("detach files");
    pool.done("volume resize files --size 128M");
    let again = pool.attach("files");
    run("e2fsck", ["-f", "-n", &again]).expect();
    pool.done("detach files");
    pool.stop();
    pool.check();
    let _ = device;
}

pub fn not_root() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create files --size 64M");
    // The binary may lie where an ordinary user cannot go.
    let copy = PathBuf::from("/tmp").join(format!("plywood-{}", std::process::id()));
    fs::copy(binary(), &copy).expect("a copy of the binary");
    let before = run("b2sum", [pool.file()]).expect();
    let arguments = ["--reuid=65534", "--regid=65534", "--clear-groups", copy.to_str().expect("a path"), "--pool"];
    for words in [vec!["attach", "files"], vec!["pool", "info"]] {
        let arguments = arguments.iter().copied().chain([pool.file().to_str().expect("a path")]).chain(words);
        let refused = run("setpriv", arguments);
        assert_eq!(refused.status.code(), Some(1), "{}{}", refused.stdout, refused.stderr);
        assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
    }
    let arguments = arguments.iter().copied().chain([pool.file().to_str().expect("a path"), "attach", "files"]);
    let refused = run("setpriv", arguments);
    fs::remove_file(&copy).expect("removing the copy");
    refused.expect_refusal(&["root"]);
    let after = run("b2sum", [pool.file()]).expect();
    assert_eq!(before, after, "the pool file has not changed");
}

/// Runs `plywood LINE` in a mount namespace of its own after `preparation`, and returns what it said.
pub fn in_namespace(pool: &TestPool, preparation: &str, line: &str) -> crate::support::command::Outcome {
    let line =
        format!("{preparation}; exec env PLYWOOD_POOL='{}' '{}' {line}", pool.file().display(), binary().display());
    run("unshare", ["--mount", "--propagation", "private", "sh", "-e", "-c", &line])
}

/// Makes /dev, in a namespace, one that has these devices beside the plainest, and no others.
pub fn devices(kept: &str) -> String {
    format!(
        "mkdir -p /run/plywood-test-dev; mount -t tmpfs none /run/plywood-test-dev; \
         for device in null zero full random urandom {kept}; do \
         cp -a /dev/$device /run/plywood-test-dev/; done; \
         mkdir -p /run/plywood-test-dev/shm; mount --move /run/plywood-test-dev /dev"
    )
}

pub fn without_devices() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create files --size 64M");
    in_namespace(&pool, &devices("loop-control"), "attach files").expect_refusal(&["/dev/fuse"]);
    in_namespace(&pool, &devices("fuse"), "attach files").expect_refusal(&["loop"]);
    let _ = fs::remove_dir("/run/plywood-test-dev");
    assert!(pool.process("front_pid").is_none(), "no daemon is left behind");
    // And with everything there it works.
    pool.attach("files");
    pool.done("detach files");
    pool.stop();
}

pub fn without_direct_io() {
    let folder = tempfile::Builder::new().prefix("plywood-test-").tempdir_in(scratch()).expect("a folder");
    // The kernel's ramfs is a file system that has no direct I/O.
    run("mount", ["-t".as_ref(), "ramfs".as_ref(), "none".as_ref(), folder.path().as_os_str()]).expect();
    let file = folder.path().join("pool");
    let arguments = ["pool", "create", file.to_str().expect("a path"), "--size", "1G"];
    let refused = run(binary().to_str().expect("a path"), arguments);
    let left = file.exists();
    run("umount", [folder.path()]).expect();
    refused.expect_refusal(&["O_DIRECT"]);
    assert!(!left, "nothing is left of the pool that could not be made");
}

pub fn pool_in_use() {
    let (pool, _) = with_file_system();
    let file = pool.file().to_str().expect("a path").to_owned();
    pool.refused(&format!("pool create {file} --size 1G"), &[&file]);
    pool.refused(&format!("pool create {file} --size 1G --force"), &[&file, "use"]);
    pool.done("volume info files");
    // A copy has the same uuid, and is not taken for what the daemon serves.
    let copy = pool.folder().join("copy");
    run("cp", ["--sparse=always", &file, copy.to_str().expect("a path")]).expect();
    let copy = TestPool::adopt(&copy);
    for line in ["volume list", "volume create another --size 1M", "attach files", "stop"] {
        copy.refused(line, &["is a copy of", &file, "stop that one"]);
    }
    // A file system and a plain file are not overwritten either.
    let other = pool.folder().join("other");
    fs::write(&other, vec![0; 8 << 20]).expect("a file");
    run("mkfs.ext4", ["-q".as_ref(), other.as_os_str()]).expect();
    let before = fs::read(&other).expect("the file system");
    pool.refused(&format!("pool create {} --size 1G", other.display()), &["other", "ext4"]);
    assert!(fs::read(&other).expect("the file system") == before, "it has not changed");
    pool.done("detach files");
    pool.stop();
    pool.check();
    copy.done("volume list");
}

/// The host's disk fills up while an image comes in: the half-made volume is gone afterwards, and what was there before
/// is as it was.
pub fn full_host_while_importing() {
    let host = HostDisk::create(420 << 20);
    let pool = TestPool::create_in(&host.point, "10G", Transport::Auto);
    pool.done("volume create files --size 64M");
    let device = pool.attach("files");
    run("mkfs.ext4", ["-q", &device]).expect();
    let point = pool.mount("files");
    fs::write(point.join("before"), vec![5; 4 << 20]).expect("a file");
    pool.unmount(&point);
    pool.done("detach files");
    pool.stop();
    // Leaves room for some of the image only.
    let free = rustix::fs::statvfs(&host.point).expect("statvfs");
    let free_bytes = free.f_bavail * free.f_frsize;
    let filler = host.point.join("filler");
    let fill = free_bytes.saturating_sub(40 << 20);
    run("fallocate", ["-l".to_owned(), fill.to_string(), filler.display().to_string()]).expect();

    let source = format!("tar:{}", rootfs().display());
    let refused = pool.plywood(["image", "import", &source, "debian"]);
    refused.expect_refusal(&["space"]);
    assert_eq!(pool.names(), ["files"], "nothing is left of the image");

    fs::remove_file(filler).expect("making room again");
    pool.stop_if_running();
    pool.check();
    let point = pool.mount("files");
    assert_eq!(fs::read(point.join("before")).expect("the file"), vec![5; 4 << 20]);
    pool.unmount(&point);
    let _ = pool.plywood(["detach", "--all"]);
    pool.stop_if_running();
}

/// A small ext4 of the host's, on a plain loop device.
pub struct HostDisk {
    image: tempfile::TempPath,
    folder: tempfile::TempDir,
    pub point: PathBuf,
}

impl HostDisk {
    pub fn create(size_bytes: u64) -> Self {
        let file = tempfile::Builder::new().prefix("plywood-test-host-").tempfile_in(scratch()).expect("a file");
        file.as_file().set_len(size_bytes).expect("its size");
        let image = file.into_temp_path();
        run("mkfs.ext4", ["-q".as_ref(), "-m0".as_ref(), image.as_os_str()]).expect();
        let folder = tempfile::Builder::new().prefix("plywood-test-host-").tempdir_in(scratch()).expect("a folder");
        run("mount", ["-o".as_ref(), "loop".as_ref(), image.as_os_str(), folder.path().as_os_str()]).expect();
        let point = folder.path().to_owned();
        Self { image, folder, point }
    }
}

impl Drop for HostDisk {
    fn drop(&mut self) {
        let ended = run("umount", [self.point.as_os_str()]).succeeded();
        if !ended {
            let _ = run("umount", ["-l".as_ref(), self.point.as_os_str()]);
        }
        let _ = (&self.image, &self.folder);
    }
}

/// An orderly stop detaches what is free and says what is still mounted, and where.
pub fn sigterm_while_mounted() {
    let (pool, _) = with_file_system();
    pool.done("volume create free --size 64M");
    pool.attach("free");
    let point = pool.mount("files");
    let front = pool.process("front_pid").expect("a front");
    run("kill", ["-TERM".to_owned(), front.to_string()]).expect();
    wait_until("what is free is detached", Duration::from_secs(30), || {
        let listed = pool.plywood(["volume", "info", "free", "--json"]);
        !listed.succeeded() || listed.stdout.contains("\"device\": null")
    });
    // What is mounted goes on working: the front cannot go while somebody stands on it.
    fs::write(point.join("still"), "works").expect("the mount works");
    wait_until("the log names the mount point", Duration::from_secs(30), || {
        fs::read_to_string(pool.log()).is_ok_and(|log| log.contains(point.to_str().expect("a path")))
    });
    run("umount", [point.as_os_str()]).expect();
    pool.stop_if_running();
    pool.check();
}

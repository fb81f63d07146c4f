//! Two hosts and one disk: a pool on a block device is open on one of them at a time.
//!
//! The other host is this kernel, seen from a mount namespace in which it has other ids; its disk is a second loop device
//! on the same file, so that no lock of the first is known to it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use plywood::format::{HOST_CLAIM, HostClaim};
use uuid::Uuid;

use crate::support::command::{Background, binary, run, shell, wait_until};
use crate::support::machine::scratch;
use crate::support::pool::{TestPool, Transport};

const SIZE: &str = "512M";
const LONG: Duration = Duration::from_secs(60);

/// A loop device; it goes when this is dropped.
struct Disk(PathBuf);

impl Disk {
    fn on(file: &Path) -> Self {
        let file = file.to_str().expect("a path");
        let device = run("losetup", ["--find", "--show", "--direct-io=on", file]).expect();
        Self(PathBuf::from(device.trim()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("losetup", ["--detach".as_ref(), self.0.as_os_str()]);
    }
}

/// Another machine, as far as plywood can tell.
struct OtherHost {
    _namespace: Background,
    program: PathBuf,
}

impl OtherHost {
    fn boot(folder: &Path) -> Self {
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).expect("a file");
            path.display().to_string()
        };
        let boot = write("boot_id", "6f9619ff-8b86-4d01-b42d-00cf4fc964ff\n");
        let machine = write("machine-id", "0123456789abcdef0123456789abcdef\n");
        let ready = folder.join("ready");
        let line = format!(
            "hostname other-host; mount --bind {boot} /proc/sys/kernel/random/boot_id; \
             mount --bind {machine} /etc/machine-id; mkdir -p /run/plywood; mount -t tmpfs -o mode=0700 none /run/plywood; \
             touch '{}'; exec sleep infinity",
            ready.display()
        );
        let namespace =
            Background::start("unshare", ["--mount", "--uts", "--propagation", "private", "sh", "-e", "-c", &line]);
        wait_until("the other host", LONG, || ready.exists());
        let program = folder.join("plywood-there");
        let enter = format!(
            "#!/bin/sh\nexec nsenter --target {} --mount --uts '{}' \"$@\"\n",
            namespace.id(),
            binary().display()
        );
        fs::write(&program, enter).expect("a script");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("its mode");
        Self { _namespace: namespace, program }
    }
}

pub fn two_hosts_do_not_share_a_pool() {
    let folder = tempfile::tempdir_in(scratch()).expect("a folder");
    let file = folder.path().join("disk");
    File::create(&file).and_then(|file| file.set_len(512 << 20)).expect("the disk");
    let (disk_here, disk_there) = (Disk::on(&file), Disk::on(&file));
    let host = OtherHost::boot(folder.path());

    let here = TestPool::create_on(&disk_here.0, SIZE, Transport::Auto);
    let mut there = TestPool::adopt(&disk_there.0);
    there.use_program(&host.program);
    here.done("volume create files --size 64M");
    assert_eq!(there.names(), ["files"], "a pool that nobody has open can be used there");
    there.done("volume create other --size 64M");
    assert_eq!(here.names().len(), 2, "and here again");

    // While it is open here, nothing is done there, whatever is asked for.
    here.attach("files");
    let used = &["in use on host"];
    there.refused("volume list", used);
    there.refused("volume list --take-over", used);
    there.refused("pool check", used);
    there.refused(&format!("pool create {} --size {SIZE} --force", disk_there.0.display()), used);
    here.kill_engine();
    there.refused("volume list", used);

    // A clean end leaves it.
    here.stop();
    let attached = there.attach("other");
    here.refused("volume list", &["in use on host other-host"]);
    there.done("detach other");
    there.stop();
    let attached = attached.trim_start_matches("/dev/");
    assert!(!Path::new(&format!("/sys/block/{attached}/loop")).exists());
    here.attach("files");

    // A host that went down did not leave it.
    let [front, engine] = ["front_pid", "engine_pid"].map(|key| here.process(key).expect("a process").to_string());
    // One that lived a moment longer would start a successor, which leaves the disk when it is told to end.
    run("kill", ["-STOP", &front]).expect();
    wait_until("the front stands still", LONG, || {
        fs::read_to_string(format!("/proc/{front}/stat")).is_ok_and(|stat| stat.contains(") T "))
    });
    run("kill", ["-9", &engine, &front]).expect();
    there.refused("volume list", &["did not leave it", "--take-over", "destroyed"]);
    let taken = there.plywood(["volume", "list", "--take-over"]);
    assert!(taken.succeeded() && taken.stderr.contains("taken over from host"), "{taken:?}");
    assert_eq!(there.names().len(), 2, "it was left again, and is nobody's");

    // One that was taken from while it lives writes nothing more.
    let device = here.attach("files");
    let claim = HostClaim {
        machine: Uuid::from_u128(1),
        boot: Uuid::from_u128(2),
        beat: 3,
        time: 4,
        name: "robber".to_owned(),
    };
    let disk = File::options().write(true).open(&disk_there.0).expect("the disk");
    let rob = || {
        let written = disk.write_all_at(&claim.encode()[..], HOST_CLAIM.offset_bytes());
        written.and_then(|()| disk.sync_all()).expect("a claim");
    };
    let write = format!("timeout 60 dd if=/dev/urandom of={device} bs=4096 count=1 oflag=direct conv=fsync");
    // A beat that has read the claim of before writes its own over the robber's.
    wait_until("writes are refused", LONG, || {
        rob();
        !shell(&write).succeeded()
    });
    shell(&format!("timeout 60 dd if={device} of=/dev/null bs=4096 count=1 iflag=direct")).expect();
    let stopped = here.plywood(["stop", "--force"]);
    // Each look watches for a while.
    wait_until("the end of the daemon", LONG, || here.process("front_pid").is_none());
    drop(disk);
    here.refused("volume list", &["robber", "--take-over"]);
    let stands =
        HostClaim::decode(&fs::read(&disk_there.0).expect("the disk")[HOST_CLAIM.offset_bytes() as usize..][..4096]);
    assert_eq!(stands, Ok(Some(claim)), "nothing was written over it: {}", stopped.stderr);
    here.done("volume list --take-over");
    here.check();
}

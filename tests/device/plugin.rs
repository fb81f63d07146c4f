//! What a volume for Docker can be made as, over the plugin's own protocol.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use crate::docker::Plugin;
use crate::story::FileSystem;
use crate::support::pool::{TestPool, Transport};

/// The kind of the file system that is mounted at `point`.
fn kind_at(point: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let line = table.lines().rev().find(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at) == point))?;
    line.split(" - ").nth(1)?.split(' ').next().map(str::to_owned)
}

/// Bytes that do not repeat.
fn content(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 16 << 20];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

#[track_caller]
fn assert_holds(file: &Path, content: &[u8]) {
    // Past the page cache, which holds what is clean no longer.
    fs::write("/proc/sys/vm/drop_caches", "1").expect("dropping caches");
    assert!(fs::read(file).expect("the file") == content, "{} is not what was written", file.display());
}

/// `fs=`: the file system that was asked for, sound, and as large in a clone as that is.
pub fn makes_file_systems() {
    let pool = TestPool::create("4G", Transport::Auto);
    let plugin = Plugin::new(&pool);
    let create = |name: &str, options: &str| {
        plugin.done("VolumeDriver.Create", &format!(r#"{{"Name":"{name}","Opts":{options}}}"#));
    };
    let content = content(1);
    for (kind, file_system) in [("xfs", FileSystem::Xfs), ("btrfs", FileSystem::Btrfs)] {
        create(kind, &format!(r#"{{"fs":"{kind}","size":"512M"}}"#));
        let point = plugin.mount(kind, "1");
        assert_eq!(kind_at(&point).as_deref(), Some(kind));
        fs::write(point.join("file"), &content).expect("writing");
        plugin.unmount(kind, "1");
        assert_eq!(kind_at(&point), None);
        let point = plugin.mount(kind, "2");
        assert_holds(&point.join("file"), &content);
        plugin.unmount(kind, "2");
        file_system.check(&pool.attach(kind));
        pool.done(&format!("detach {kind}"));

        let large = format!("{kind}-large");
        pool.done(&format!("snapshot create {kind} {kind}.1"));
        create(&large, &format!(r#"{{"from":"{kind}.1","size":"1G"}}"#));
        let point = plugin.mount(&large, "1");
        assert_eq!(kind_at(&point).as_deref(), Some(kind));
        let room = rustix::fs::statvfs(point.as_path()).expect("statvfs");
        assert!(room.f_blocks * room.f_frsize > 768 << 20, "{kind} has grown");
        assert_holds(&point.join("file"), &content);
        plugin.unmount(&large, "1");
        file_system.check(&pool.attach(&large));
        pool.done(&format!("detach {large}"));
        for name in [kind, &large] {
            plugin.done("VolumeDriver.Remove", &format!(r#"{{"Name":"{name}"}}"#));
        }
    }
    assert_eq!(pool.names(), ["btrfs.1", "xfs.1"]);
    drop(plugin);
    pool.stop();
    pool.check();
}

/// `from=` an image: its files are there, and stay its own.
pub fn begins_as_an_image() {
    let pool = TestPool::create("4G", Transport::Auto);
    let plugin = Plugin::new(&pool);
    let source = pool.folder().join("source");
    fs::create_dir_all(source.join("deep")).expect("a folder");
    fs::write(source.join("deep/file"), "of the image").expect("a file");
    chown(source.join("deep/file"), Some(7), Some(8)).expect("an owner");
    pool.done(&format!("image import dir:{} page --size 64M", source.display()));
    let begun = |name: &str| {
        plugin.done("VolumeDriver.Create", &format!(r#"{{"Name":"{name}","Opts":{{"from":"page"}}}}"#));
        let file = plugin.mount(name, "1").join("deep/file");
        let found = fs::metadata(&file).expect("the file");
        assert_eq!((found.uid(), found.gid()), (7, 8));
        assert_eq!(fs::read_to_string(&file).expect("the file"), "of the image");
        file
    };
    let file = begun("one");
    assert_eq!(plugin.done("VolumeDriver.Get", r#"{"Name":"one"}"#)["Volume"]["Status"]["From"], "page");
    fs::write(&file, "of the volume").expect("writing");
    plugin.unmount("one", "1");
    begun("two");
    plugin.unmount("two", "1");
    // It does not need the image.
    pool.done("image delete page --yes");
    let file = plugin.mount("one", "2").join("deep/file");
    assert_eq!(fs::read_to_string(file).expect("the file"), "of the volume");
    plugin.unmount("one", "2");
    assert_eq!(pool.names(), ["one", "two"]);
    drop(plugin);
    pool.stop();
    pool.check();
}

/// `quota=`: what is written beyond it fails, what was written below it stays, and with more of it writing goes on.
pub fn keeps_to_its_quota() {
    const QUOTA: u64 = 64 << 20;
    let pool = TestPool::create("4G", Transport::Auto);
    let plugin = Plugin::new(&pool);
    plugin.done("VolumeDriver.Create", r#"{"Name":"bound","Opts":{"size":"256M","quota":"64M"}}"#);
    let own = || pool.volume("bound")["own_bytes"].as_u64().expect("a number");
    let content = content(2);
    let point = plugin.mount("bound", "1");
    fs::write(point.join("kept"), &content).expect("there is room");
    plugin.unmount("bound", "1");

    let point = plugin.mount("bound", "2");
    let mut file = fs::File::create(point.join("beyond")).expect("a file");
    let chunk = vec![7; 1 << 20];
    let mut written = 0;
    let error = loop {
        // Flushed each time: what is only in memory takes nothing of the quota yet.
        match file.write_all(&chunk).and_then(|()| file.sync_data()) {
            Ok(()) => written += chunk.len() as u64,
            Err(error) => break error,
        }
        assert!(content.len() as u64 + written <= QUOTA, "{written} bytes beside {}", content.len());
    };
    drop(file);
    println!("{error} after {written} bytes, of its own {}", own());
    // The last where the journal was to have a block first.
    let expected = [libc::ENOSPC, libc::EDQUOT, libc::EIO, libc::EROFS];
    assert!(error.raw_os_error().is_some_and(|number| expected.contains(&number)), "{error}");
    assert!((QUOTA / 2..=QUOTA).contains(&own()), "{}", own());
    assert_holds(&point.join("kept"), &content);
    plugin.unmount("bound", "2");

    pool.done("volume resize bound --quota 0");
    let point = plugin.mount("bound", "3");
    assert_holds(&point.join("kept"), &content);
    let mut file = fs::File::create(point.join("later")).expect("a file");
    (0..80).for_each(|_| file.write_all(&chunk).expect("there is room"));
    file.sync_all().expect("there is room");
    drop(file);
    assert!(own() > QUOTA, "{}", own());
    plugin.unmount("bound", "3");
    drop(plugin);
    pool.stop();
    pool.check();
}

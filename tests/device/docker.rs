//! Volumes and images for a real dockerd and a real podman, each in a folder of its own, with a plugin that is killed in between.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::images::container;
use crate::support::changes::{change, fill, without_sockets};
use crate::support::command::{Background, Outcome, binary, run, wait_until};
use crate::support::mounted::mounts_below;
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::{Tree, assert_same, tree_of};

const START: Duration = Duration::from_secs(60);

/// A plugin for a pool, under a driver name of its own.
pub struct Plugin<'a> {
    pool: &'a TestPool,
    driver: String,
    /// Where volumes are mounted.
    directory: PathBuf,
    process: Option<Background>,
}

impl<'a> Plugin<'a> {
    pub fn new(pool: &'a TestPool) -> Self {
        let driver = format!("plywood-test-{}", std::process::id());
        let directory = Path::new("/run/plywood-volumes").join(pool.info()["uuid"].as_str().expect("a uuid"));
        let mut plugin = Self { pool, driver, directory, process: None };
        plugin.start();
        plugin
    }

    /// The name that Docker knows it by.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    fn socket(&self) -> PathBuf {
        self.pool.folder().join("plugin.sock")
    }

    fn spec(&self) -> PathBuf {
        Path::new("/etc/docker/plugins").join(format!("{}.spec", self.driver))
    }

    fn start(&mut self) {
        let words = [
            binary().into_os_string(),
            "--pool".into(),
            self.pool.file().as_os_str().to_owned(),
            "docker-plugin".into(),
            "--socket".into(),
            self.socket().into_os_string(),
            "--spec".into(),
            self.spec().into_os_string(),
            "--default-size".into(),
            "256M".into(),
        ];
        self.process = Some(Background::start("env", words));
        wait_until("the plugin", START, || UnixStream::connect(self.socket()).is_ok());
    }

    /// Kills it (-9).
    fn kill(&mut self) {
        drop(self.process.take());
    }

    /// What it answers: status and body.
    #[track_caller]
    fn ask(&self, path: &str, body: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.socket()).expect("the plugin");
        let len = body.len();
        write!(stream, "POST /{path} HTTP/1.1\r\nHost: plugin\r\nContent-Length: {len}\r\n\r\n{body}").expect("asking");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let body = answer.split("\r\n\r\n").nth(1).expect("a body");
        (status, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}")))
    }

    #[track_caller]
    pub fn done(&self, path: &str, body: &str) -> Value {
        let (status, answer) = self.ask(path, body);
        assert_eq!(status, 200, "{path} {body}: {answer}");
        answer
    }

    /// Mounts a volume for `id`, and answers where.
    #[track_caller]
    pub fn mount(&self, name: &str, id: &str) -> PathBuf {
        let mounted = self.done("VolumeDriver.Mount", &format!(r#"{{"Name":"{name}","ID":"{id}"}}"#));
        mounted["Mountpoint"].as_str().expect("a path").into()
    }

    #[track_caller]
    pub fn unmount(&self, name: &str, id: &str) {
        self.done("VolumeDriver.Unmount", &format!(r#"{{"Name":"{name}","ID":"{id}"}}"#));
    }

    #[track_caller]
    fn refused(&self, path: &str, body: &str, named: &[&str]) {
        let (status, answer) = self.ask(path, body);
        let said = answer["Err"].as_str().expect("a reason");
        assert_eq!(status, 500, "{path} {body}: {answer}");
        assert!(named.iter().all(|word| said.contains(word)), "{path} {body} does not name {named:?}: {said}");
    }
}

impl Drop for Plugin<'_> {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_file(self.spec());
        // What is still mounted would keep the pool's daemon.
        for point in mounts_below(&self.directory) {
            let _ = run("umount", ["-l".as_ref(), point.as_os_str()]);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A program that drives containers, in a folder of its own.
pub trait Engine {
    fn run(&self, words: &[&str]) -> Outcome;

    /// What it has unpacked of an image.
    fn tree(&self, image: &str) -> Tree;

    #[track_caller]
    fn done(&self, line: &str) -> String {
        self.run(&line.split(' ').collect::<Vec<_>>()).expect()
    }

    #[track_caller]
    fn refused(&self, line: &str, named: &str) {
        let outcome = self.run(&line.split(' ').collect::<Vec<_>>());
        assert!(!outcome.succeeded(), "`{line}` was not refused: {}", outcome.stdout);
        assert!(outcome.stderr.contains(named), "`{line}` does not name {named:?}: {}", outcome.stderr);
    }

    /// Imports an image with a shell and a folder `/data` that is not empty, owned by 7:8.
    fn import(&self, folder: &Path) {
        let archive = folder.join("tiny.tar");
        fs::write(&archive, tiny_image()).expect("the image");
        self.done(&format!("import {} tiny", archive.display()));
    }
}

/// A root file system of busybox alone.
fn tiny_image() -> Vec<u8> {
    let mut image = tar::Builder::new(Vec::new());
    let mut put = |path: &str, kind, content: &[u8], owner: (u64, u64)| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        image.append_data(&mut header, path, content).expect("an entry");
    };
    let busybox = fs::read("/bin/busybox").expect("busybox-static");
    for folder in ["bin/", "etc/", "tmp/", "proc/", "sys/", "dev/"] {
        put(folder, tar::EntryType::Directory, &[], (0, 0));
    }
    put("data/", tar::EntryType::Directory, &[], (7, 8));
    put("data/from-image", tar::EntryType::Regular, b"of the image\n", (7, 8));
    put("bin/busybox", tar::EntryType::Regular, &busybox, (0, 0));
    for applet in ["sh", "cat", "echo", "ls", "dd", "sleep", "touch", "stat", "sync", "tar", "rm"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        image.append_link(&mut header, format!("bin/{applet}"), "busybox").expect("a link");
    }
    image.into_inner().expect("the image")
}

/// A dockerd with everything of its own in one folder.
pub struct Docker {
    folder: PathBuf,
    process: Option<Background>,
}

impl Docker {
    pub fn new(folder: &Path) -> Self {
        let folder = folder.join("docker");
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("daemon.json"), "{}").expect("settings");
        let mut docker = Self { folder, process: None };
        docker.start();
        docker
    }

    fn host(&self) -> String {
        format!("unix://{}", self.folder.join("sock").display())
    }

    fn start(&mut self) {
        let place = |name: &str| self.folder.join(name).display().to_string();
        let words = [
            "--bridge=none".to_owned(),
            "--iptables=false".to_owned(),
            "--ip6tables=false".to_owned(),
            "--storage-driver=vfs".to_owned(),
            format!("--config-file={}", place("daemon.json")),
            format!("--data-root={}", place("root")),
            format!("--exec-root={}", place("exec")),
            format!("--pidfile={}", place("pid")),
            format!("--host={}", self.host()),
            "--log-level=error".to_owned(),
        ];
        self.process = Some(Background::start("dockerd", words));
        wait_until("dockerd", START, || self.run(&["version"]).succeeded());
    }

    /// Tells it to end, and waits for that. Its containers end with it.
    fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let _ = run("kill", [process.id().to_string()]);
        for _ in 0..600 {
            if !process.is_running() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Engine for Docker {
    fn run(&self, words: &[&str]) -> Outcome {
        // Debian's own: another one on PATH may be of another version.
        run("/usr/bin/docker", ["-H", &self.host()].iter().chain(words))
    }

    /// Its driver vfs has a whole tree for each layer.
    fn tree(&self, image: &str) -> Tree {
        let layers = self.run(&["image", "inspect", "--format", "{{json .RootFS.Layers}}", image]).expect();
        let layers: Vec<String> = serde_json::from_str(&layers).expect("a list");
        let (known, trees) = (self.folder.join("root/image/vfs/layerdb/sha256"), self.folder.join("root/vfs/dir"));
        let said = |layer: &Path, of: &str| fs::read_to_string(layer.join(of)).expect("what it notes of a layer");
        let mut all = fs::read_dir(known).expect("its layers").map(|layer| layer.expect("a layer").path());
        let top = all.find(|layer| said(layer, "diff") == *layers.last().expect("a layer")).expect("the last layer");
        tree_of(&trees.join(said(&top, "cache-id")), false)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.stop();
        for point in mounts_below(&self.folder) {
            let _ = run("umount", ["-l".as_ref(), point.as_os_str()]);
        }
    }
}

/// A podman with everything of its own in one folder.
struct Podman {
    folder: PathBuf,
}

impl Podman {
    fn new(folder: &Path, plugin: &Plugin<'_>) -> Self {
        let folder = folder.join("podman");
        fs::create_dir_all(&folder).expect("a folder");
        // crun wants cgroups of one version alone, and limits above the machine's own are not for everybody to set.
        let settings = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n\
             volume_plugin_timeout = 60\n[engine.volume_plugins]\n{} = \"{}\"\n",
            plugin.driver,
            plugin.socket().display()
        );
        fs::write(folder.join("containers.conf"), settings).expect("settings");
        Self { folder }
    }
}

impl Engine for Podman {
    fn run(&self, words: &[&str]) -> Outcome {
        let place = |name: &str| self.folder.join(name).display().to_string();
        let mut all = vec![
            format!("CONTAINERS_CONF={}", place("containers.conf")),
            "podman".to_owned(),
            format!("--root={}", place("root")),
            format!("--runroot={}", place("run")),
            format!("--tmpdir={}", place("tmp")),
            "--storage-driver=vfs".to_owned(),
        ];
        all.extend(words.iter().map(|word| (*word).to_owned()));
        run("env", all)
    }

    fn tree(&self, image: &str) -> Tree {
        let root = self.done(&format!("image mount {image}"));
        let tree = tree_of(Path::new(&root), false);
        self.done(&format!("image unmount {image}"));
        tree
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        for point in mounts_below(&self.folder) {
            let _ = run("umount", ["-l".as_ref(), point.as_os_str()]);
        }
    }
}

/// A shell in a new container, with a volume on /data.
#[track_caller]
fn shell(engine: &impl Engine, volume: &str, script: &str) -> String {
    engine.run(&["run", "--rm", "--network=none", "-v", volume, "tiny", "/bin/sh", "-c", script]).expect()
}

/// What a container of ours wrote, as an image of theirs.
fn committed_container_is_loaded(engine: &impl Engine, pool: &TestPool, folder: &Path) {
    pool.done(&format!("image import tar:{} tiny", folder.join("tiny.tar").display()));
    let script = "echo added > /added && rm /data/from-image";
    pool.plywood(["run", "tiny", "--name", "box", "--network", "none", "--", "/bin/sh", "-c", script]).expect();
    let command = "CMD [\"/bin/sh\", \"-c\", \"cat /added; ls /data\"]";
    pool.plywood(["commit", "box", "committed", "--change", command]).expect();
    let archive = folder.join("committed.tar").display().to_string();
    pool.done(&format!("image export committed docker-archive:{archive}:localhost/committed:1"));
    engine.done(&format!("load --input {archive}"));
    assert_eq!(engine.done("run --rm --network=none localhost/committed:1"), "added");
    engine.done("rmi localhost/committed:1");
    pool.done("image delete committed tiny --yes");
    pool.done("volume delete box --yes");
}

/// All that a layer of ours can say, as an image of theirs, name by name.
fn loaded_image_has_the_same_tree(engine: &impl Engine, pool: &TestPool, folder: &Path) {
    let lower = folder.join("lower");
    fs::create_dir(&lower).expect("a folder");
    fill(&lower);
    pool.done(&format!("image import dir:{} lower", lower.display()));
    container(pool, "lower", "box", change);
    pool.done("commit box changed");
    let point = pool.mount("changed");
    let expected = without_sockets(tree_of(&point, false));
    pool.unmount(&point);
    let archive = folder.join("changed.tar").display().to_string();
    pool.done(&format!("image export changed docker-archive:{archive}:localhost/changed:1"));
    engine.done(&format!("load --input {archive}"));
    assert_same(&engine.tree("localhost/changed:1"), &expected, "what was loaded");
    engine.done("rmi localhost/changed:1");
    pool.done("image delete changed lower --yes");
    pool.done("volume delete box --yes");
    fs::remove_dir_all(&lower).expect("a folder");
}

/// What Docker and Podman have in common: create, fill from the image, write, share, refuse, back up, remove.
fn life_of_a_volume(engine: &impl Engine, plugin: &mut Plugin<'_>, folder: &Path) {
    let driver = plugin.driver.clone();
    engine.import(folder);
    engine.done(&format!("volume create --driver {driver} -o size=64M -o quota=48M data"));
    assert!(engine.done("volume ls -q").lines().any(|name| name == "data"));
    let volume = plugin.pool.volume("data");
    assert_eq!((volume["size_bytes"].as_u64(), volume["quota_bytes"].as_u64()), (Some(64 << 20), Some(48 << 20)));

    // Filled from the image, with owners, at the first use; what is written stays.
    let script = "cat /data/from-image && stat -c %u:%g /data/from-image && echo kept > /data/kept && sync";
    assert_eq!(shell(engine, "data:/data", script), "of the image\n7:8");
    // The kernel takes a dead container's mounts away a moment after its last process.
    wait_until("the end of its use", START, || plugin.pool.volume("data")["device"].is_null());
    assert_eq!(shell(engine, "data:/data", "cat /data/kept"), "kept");

    // Two at a time, one of which may not write.
    engine.done("run -d --name writer --network=none -v data:/data tiny /bin/sleep 600");
    engine.done("run -d --name reader --network=none -v data:/data:ro tiny /bin/sleep 600");
    engine.run(&["exec", "writer", "/bin/sh", "-c", "echo both > /data/both"]).expect();
    assert_eq!(engine.done("exec reader /bin/cat /data/both"), "both");
    let outcome = engine.run(&["exec", "reader", "/bin/touch", "/data/x"]);
    assert!(outcome.stderr.contains("Read-only"), "{}{}", outcome.stdout, outcome.stderr);
    // "in use", says Docker, "being used" Podman.
    engine.refused("volume rm data", "use");
    // Also when it is the plugin that is asked.
    plugin.refused("VolumeDriver.Remove", r#"{"Name":"data"}"#, &["in use", "remove"]);

    // A plugin that is killed and started again knows who has it mounted.
    plugin.kill();
    plugin.start();
    plugin.refused("VolumeDriver.Remove", r#"{"Name":"data"}"#, &["in use"]);
    engine.done("rm -f writer");
    assert_eq!(engine.done("exec reader /bin/cat /data/both"), "both", "the other one keeps it");
    // An engine process that dies is not noticed.
    plugin.pool.kill_engine();
    assert_eq!(engine.done("exec reader /bin/cat /data/from-image"), "of the image");

    // A backup of what is in use: snapshot, clone, tar.
    plugin.pool.done("snapshot create data data.backup --freeze");
    engine.done(&format!("volume create --driver {driver} -o from=data.backup copy"));
    let listed = shell(engine, "copy:/data", "tar -c -C /data . | tar -t");
    assert!(["./from-image", "./kept", "./both"].iter().all(|name| listed.contains(name)), "{listed}");
    engine.done("rm -f reader");
    plugin.pool.done("snapshot delete data.backup --yes");

    for name in ["data", "copy"] {
        engine.done(&format!("volume rm {name}"));
    }
    assert_eq!(plugin.pool.names(), Vec::<String>::new(), "nothing is left");
}

pub fn volumes_of_docker() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut plugin = Plugin::new(&pool);
    let driver = plugin.driver.clone();
    {
        let mut docker = Docker::new(pool.folder());
        life_of_a_volume(&docker, &mut plugin, pool.folder());
        committed_container_is_loaded(&docker, &pool, pool.folder());
        loaded_image_has_the_same_tree(&docker, &pool, pool.folder());

        // It outlives dockerd, and is used again after it.
        docker.done(&format!("volume create --driver {driver} later"));
        docker.done("run -d --stop-signal=KILL --name later --network=none -v later:/data tiny /bin/sleep 600");
        docker.stop();
        docker.start();
        docker.done("start later");
        assert_eq!(docker.done("exec later /bin/cat /data/from-image"), "of the image");
        let inspected: Value = serde_json::from_str(&docker.done("volume inspect later")).expect("JSON");
        let inspected = &inspected[0];
        assert_eq!(inspected["Driver"], driver.as_str());
        assert_eq!(inspected["Scope"], "local");
        assert_eq!(inspected["Status"]["SizeBytes"], 256 << 20);
        assert_eq!(inspected["Status"]["Mounts"], 1);
        assert!(inspected["CreatedAt"].as_str().is_some_and(|created| created.ends_with('Z')), "{inspected}");
        assert!(Path::new(inspected["Mountpoint"].as_str().expect("a path")).join("from-image").exists());
        docker.done("rm -f later");
        docker.refused(&format!("volume create --driver {driver} -o sise=1G wrong"), "size=SIZE");
        docker.refused(&format!("volume create --driver {driver} -o from=nothing wrong"), "from=nothing");
        docker.done("volume rm later");

        // An ephemeral one goes with its container.
        docker.done(&format!("volume create --driver {driver} -o ephemeral=true -o size=16M secret"));
        assert_eq!(shell(&docker, "secret:/data", "echo x > /data/s && cat /data/s"), "x");
        wait_until("the end of the secret", START, || pool.names().is_empty());
    }
    drop(plugin);
    pool.stop();
    pool.check();
}

pub fn volumes_of_podman() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut plugin = Plugin::new(&pool);
    {
        let podman = Podman::new(pool.folder(), &plugin);
        life_of_a_volume(&podman, &mut plugin, pool.folder());
        podman_inspects(&podman, &plugin);
        committed_container_is_loaded(&podman, &pool, pool.folder());
        loaded_image_has_the_same_tree(&podman, &pool, pool.folder());
    }
    drop(plugin);
    pool.stop();
    pool.check();
}

/// What Podman says of a volume in use: what it has noted, and what the plugin answers.
fn podman_inspects(podman: &Podman, plugin: &Plugin<'_>) {
    let driver = plugin.driver();
    podman.done(&format!("volume create --driver {driver} -o size=32M -o quota=24M seen"));
    podman.done("run -d --name seen --network=none -v seen:/data tiny /bin/sleep 600");
    let inspected: Value = serde_json::from_str(&podman.done("volume inspect seen")).expect("JSON");
    let seen = &inspected[0];
    assert_eq!((&seen["Name"], &seen["Driver"], &seen["Scope"]), (&"seen".into(), &driver.into(), &"local".into()));
    assert_eq!((&seen["Options"]["size"], &seen["Options"]["quota"]), (&"32M".into(), &"24M".into()));
    let status = &seen["Status"];
    assert_eq!(status["Uuid"], plugin.pool.volume("seen")["uuid"], "{seen}");
    for (what, value) in [("SizeBytes", 32_u64 << 20), ("QuotaBytes", 24 << 20), ("Mounts", 1)] {
        assert_eq!(status[what], value, "{what}: {seen}");
    }
    assert!(Path::new(seen["Mountpoint"].as_str().expect("a path")).join("from-image").exists(), "{seen}");
    podman.done("rm --force --time 0 seen");
    podman.done("volume rm seen");
}

/// The protocol itself, where Docker and Podman do not go.
pub fn plugin_keeps_its_word() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut plugin = Plugin::new(&pool);
    assert_eq!(plugin.done("Plugin.Activate", "")["Implements"][0], "VolumeDriver");
    assert_eq!(plugin.done("VolumeDriver.Capabilities", "{}")["Capabilities"]["Scope"], "local");
    assert_eq!(plugin.done("VolumeDriver.List", "")["Volumes"], serde_json::json!([]));
    assert_eq!(plugin.ask("VolumeDriver.Nothing", "{}").0, 404);

    // The same again is the same, anything else is refused.
    let create = |options: &str| format!(r#"{{"Name":"a","Opts":{options}}}"#);
    for same in [r#"{"size":"32M"}"#, r#"{"size":"33554432"}"#, r#"{"size":33554432}"#] {
        plugin.done("VolumeDriver.Create", &create(same));
    }
    for other in [r#"{"size":"33M"}"#, "null", r#"{"size":"32M","ephemeral":"true"}"#] {
        plugin.refused("VolumeDriver.Create", &create(other), &["exists", "size=33554432"]);
    }
    for wrong in [r#"{"size":"1"}"#, r#"{"size":"x"}"#, r#"{"fs":"fat"}"#, r#"{"what":"1"}"#] {
        plugin.refused("VolumeDriver.Create", &format!(r#"{{"Name":"b","Opts":{wrong}}}"#), &["plywood: "]);
    }
    assert_eq!(pool.names(), ["a"], "what is refused leaves nothing");

    // Volumes of others are not Docker's.
    pool.done("volume create raw --size 16M");
    pool.done("snapshot create a a.1");
    assert_eq!(plugin.done("VolumeDriver.List", "{}")["Volumes"].as_array().expect("a list").len(), 1);
    for path in ["Get", "Path", "Mount"] {
        let body = r#"{"Name":"raw","ID":"1"}"#;
        plugin.refused(&format!("VolumeDriver.{path}"), body, &["there is no volume raw"]);
    }
    plugin.refused("VolumeDriver.Remove", r#"{"Name":"raw"}"#, &["plywood volume delete raw"]);
    plugin.refused("VolumeDriver.Create", r#"{"Name":"raw"}"#, &["not Docker's"]);
    plugin.refused("VolumeDriver.Create", r#"{"Name":"b","Opts":{"from":"raw"}}"#, &["plywood snapshot create raw"]);
    plugin.refused("VolumeDriver.Create", r#"{"Name":"../b"}"#, &["not a name"]);
    assert_eq!(plugin.done("VolumeDriver.Get", r#"{"Name":"a"}"#)["Volume"]["Status"]["Snapshots"][0]["Name"], "a.1");

    // Ids are a set, and outlive the plugin.
    let mount = |id: &str| format!(r#"{{"Name":"a","ID":"{id}"}}"#);
    let path = plugin.done("VolumeDriver.Mount", &mount("x"))["Mountpoint"].as_str().expect("a path").to_owned();
    assert_eq!(plugin.done("VolumeDriver.Mount", &mount("x"))["Mountpoint"], path.as_str());
    plugin.done("VolumeDriver.Mount", &mount("y"));
    fs::write(Path::new(&path).join("file"), "content").expect("writing");
    plugin.kill();
    plugin.start();
    assert_eq!(plugin.done("VolumeDriver.Path", &mount(""))["Mountpoint"], path.as_str());
    plugin.done("VolumeDriver.Unmount", &mount("x"));
    plugin.done("VolumeDriver.Unmount", &mount("x"));
    plugin.done("VolumeDriver.Unmount", &mount("nobody"));
    assert_eq!(fs::read_to_string(Path::new(&path).join("file")).expect("y has it"), "content");
    plugin.refused("VolumeDriver.Remove", &mount(""), &["in use by a container"]);
    plugin.done("VolumeDriver.Unmount", &mount("y"));
    assert_eq!(plugin.done("VolumeDriver.Path", &mount(""))["Mountpoint"], "");
    assert!(pool.volume("a")["device"].is_null(), "nobody uses it");

    // Ids without a mount, as after a reboot, are of nobody.
    let path = plugin.done("VolumeDriver.Mount", &mount("old"))["Mountpoint"].as_str().expect("a path").to_owned();
    plugin.kill();
    run("umount", [&path]).expect();
    pool.done("detach a");
    pool.stop();
    plugin.start();
    assert_eq!(plugin.done("VolumeDriver.Get", &mount(""))["Volume"]["Status"]["Mounts"], 0);
    // A daemon that is not there is started.
    pool.stop();
    plugin.done("VolumeDriver.Mount", &mount("new"));
    assert_eq!(fs::read_to_string(Path::new(&path).join("file")).expect("the file"), "content");
    plugin.done("VolumeDriver.Unmount", &mount("new"));

    // A clone that is larger than what it is made from.
    plugin.done("VolumeDriver.Create", r#"{"Name":"big","Opts":{"from":"a.1","size":"64M"}}"#);
    plugin.refused("VolumeDriver.Create", r#"{"Name":"b","Opts":{"from":"a.1","size":"16M"}}"#, &["cannot be smaller"]);
    let path = plugin.done("VolumeDriver.Mount", r#"{"Name":"big","ID":"1"}"#)["Mountpoint"].clone();
    let room = rustix::fs::statvfs(path.as_str().expect("a path")).expect("statvfs");
    assert!(room.f_blocks * room.f_frsize > 48 << 20, "the file system has grown");
    plugin.done("VolumeDriver.Unmount", r#"{"Name":"big","ID":"1"}"#);

    // Removing is done once, and asked for as often as one likes.
    for name in ["a", "a", "big", "never"] {
        plugin.done("VolumeDriver.Remove", &format!(r#"{{"Name":"{name}"}}"#));
    }
    assert_eq!(pool.names(), ["a.1", "raw"]);
    drop(plugin);
    pool.stop();
    pool.check();
}

/// They are as large as was said, and gone with their last mount, or with the daemon.
pub fn ephemeral_volumes_end_in_time() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut plugin = Plugin::new(&pool);
    let sizes = [("16777216", 16 << 20), ("20480K", 20 << 20), ("24M", 24 << 20), ("1G", 1_u64 << 30)];
    for (size, bytes) in sizes {
        let call = |what: &str, more: &str| plugin.done(what, &format!(r#"{{"Name":"e-{size}",{more}}}"#));
        call("VolumeDriver.Create", &format!(r#""Opts":{{"size":"{size}","ephemeral":"true"}}"#));
        let mounted = call("VolumeDriver.Mount", r#""ID":"1""#);
        call("VolumeDriver.Mount", r#""ID":"2""#);
        let file = Path::new(mounted["Mountpoint"].as_str().expect("a path")).join("full");
        let mut file = fs::File::create(file).expect("a file");
        let chunk = vec![7; 1 << 20];
        let mut written = 0;
        let error = loop {
            match file.write(&chunk) {
                Ok(count) => written += count as u64,
                Err(error) => break error,
            }
            assert!(written <= bytes, "{written} bytes in {size}");
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{size}");
        assert!(written > bytes / 2, "{written} bytes in {size}");
        drop(file);
        call("VolumeDriver.Unmount", r#""ID":"1""#);
        assert!(pool.volume(&format!("e-{size}"))["device"].is_string(), "it has a mount left");
        call("VolumeDriver.Unmount", r#""ID":"2""#);
    }
    wait_until("their end", START, || pool.names().is_empty());
    for (size, _) in sizes {
        let body = format!(r#"{{"Name":"e-{size}","ID":"3"}}"#);
        plugin.refused("VolumeDriver.Mount", &body, &["there is no volume e-"]);
    }

    // Mounted and not, when the machine stops.
    for name in ["used", "unused"] {
        let body = format!(r#"{{"Name":"{name}","Opts":{{"size":"16M","ephemeral":"true"}}}}"#);
        plugin.done("VolumeDriver.Create", &body);
    }
    plugin.done("VolumeDriver.Create", r#"{"Name":"kept","Opts":{"size":"16M"}}"#);
    let mounted = plugin.done("VolumeDriver.Mount", r#"{"Name":"used","ID":"1"}"#);
    plugin.kill();
    let front = pool.process("front_pid").expect("a front").to_string();
    let engine = pool.process("engine_pid").expect("an engine").to_string();
    run("kill", ["-9", &front, &engine]).expect();
    run("umount", ["-l", mounted["Mountpoint"].as_str().expect("a path")]).expect();
    plugin.start();
    wait_until("their end", START, || pool.names() == ["kept"]);
    drop(plugin);
    pool.stop();
    pool.check();
}

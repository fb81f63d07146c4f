//! Stories with a real containerd: an image is imported, containers run and write, one is committed, daemons are killed or find
//! the pool full, everything is removed, and the collector of garbage brings the pool back to what it held.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use plywood::containerd::api::snapshots::Info;

use crate::engine::Engine;
use crate::image::{GREETING, IMPORT, Image, NAME, filler};
use crate::snapshotter::{Client, Snapshotter, nothing_is_left, unmount};
use crate::support::command::{Outcome, shell, wait_until};
use crate::support::pool::{TestPool, Transport};
use crate::support::tree::{assert_same, tree_of};

const LONG: Duration = Duration::from_secs(60);
/// Is the second layer's file there?
const GREETS: &str = "test \"$(cat /greeting)\" = 'hello from the second layer'";
/// Is there what the container that stays has written?
const KEPT: &str = "test \"$(cat /root/kept)\" = kept";
/// Size of a layer that takes long enough to be unpacked for somebody to die meanwhile.
const SLOW_LAYER_MIB: usize = 64;

/// Runs `script` in a container of its own. It checks for itself and answers by its exit code: `ctr` loses, though seldom,
/// what a process says that ends at once, when its own end of the FIFO is not open by then.
#[track_caller]
pub fn runs_well(containerd: &Engine, namespace: &str, name: &str, script: &str) {
    let line = format!("--namespace {namespace} run --rm --snapshotter plywood {NAME} {name}");
    containerd.ctr_with(&line, &["/bin/sh", "-c", script]).expect();
}

/// Starts the container that stays, and waits until it has written what it keeps.
#[track_caller]
fn start_what_stays(containerd: &Engine) {
    let line = format!("run --detach --snapshotter plywood {NAME} stays");
    containerd.ctr_with(&line, &["/bin/sh", "-c", "echo kept >/root/kept; sleep 1000"]).expect();
    wait_until("the container's file", LONG, || within(containerd, "look", KEPT).succeeded());
}

/// Runs `script` in the container that stays.
#[track_caller]
fn within(containerd: &Engine, exec: &str, script: &str) -> Outcome {
    containerd.ctr_with(&format!("task exec --exec-id {exec} stays"), &["/bin/sh", "-c", script])
}

/// Ends the container that stays. What it has written is there still.
#[track_caller]
fn end_what_stays(containerd: &Engine) {
    containerd.ctr("task kill -s KILL stays").expect();
    wait_until("the end of the container", LONG, || containerd.ctr("task ls").stdout.contains("STOPPED"));
    containerd.ctr("task rm stays").expect();
}

/// Mounts a snapshot as containerd says that it is mounted.
#[track_caller]
fn mount_as_told(containerd: &Engine, key: &str, point: &Path) {
    let told = containerd.ctr_with("snapshot --snapshotter plywood mounts", &[&point.to_string_lossy(), key]).expect();
    shell(&told).expect();
}

/// Bytes in use when all has been given back that is to be.
#[track_caller]
fn used_bytes(pool: &TestPool) -> u64 {
    pool.done("pool trim");
    pool.info()["used_bytes"].as_u64().expect("a number")
}

#[track_caller]
fn wait_for_former_size(pool: &TestPool, before: u64) {
    wait_until("the former size", LONG, || used_bytes(pool) <= before + (1 << 20));
}

pub fn runs_containers() {
    let pool = TestPool::create("10G", Transport::Auto);
    let archive = Image::small(&pool).archive();
    let mut snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let mut containerd = Engine::start(&pool, snapshotter.socket());
    let before = used_bytes(&pool);

    containerd.ctr_with(IMPORT, &[&archive]).expect();
    let listed = containerd.ctr("snapshot --snapshotter plywood ls").expect();
    assert_eq!(listed.lines().filter(|line| line.contains("Committed")).count(), 2, "{listed}");

    // Containers: one that reads both layers, ten that write at once.
    let both_layers = format!("{GREETS} && test -f /etc/debian_version && ! test -e /lost+found");
    runs_well(&containerd, "default", "first", &both_layers);
    thread::scope(|scope| {
        for number in 0..10 {
            let script = format!(
                "echo {number} >/root/own && rm /greeting && test \"$(cat /root/own)\" = {number} && ! {GREETS}"
            );
            let containerd = &containerd;
            scope.spawn(move || runs_well(containerd, "default", &format!("c{number}"), &script));
        }
    });

    // One that stays, outlives our deaths, and is committed when it has ended.
    start_what_stays(&containerd);
    snapshotter.restart();
    pool.kill_engine();
    within(&containerd, "again", KEPT).expect();
    containerd.restart();
    within(&containerd, "anew", KEPT).expect();
    end_what_stays(&containerd);
    containerd.ctr("snapshot --snapshotter plywood commit committed stays").expect();
    containerd.ctr("snapshot --snapshotter plywood prepare from-it committed").expect();
    let point = pool.mount_point("from-it");
    mount_as_told(&containerd, "from-it", &point);
    assert_eq!(fs::read_to_string(point.join("root/kept")).expect("the file"), "kept\n");
    unmount(&point);

    // Another namespace has its own. (This client does not name the layer's chain id, so nothing can be adopted.)
    containerd.ctr_with(&format!("--namespace other {IMPORT}"), &[&archive]).expect();
    runs_well(&containerd, "other", "x", GREETS);

    // All goes.
    containerd.ctr("container rm stays").expect();
    for key in ["from-it", "committed"] {
        containerd.ctr(&format!("snapshot --snapshotter plywood rm {key}")).expect();
    }
    for namespace in ["default", "other"] {
        containerd.ctr(&format!("--namespace {namespace} image rm --sync {NAME}")).expect();
    }
    nothing_is_left(&pool);
    wait_for_former_size(&pool, before);
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

/// A container is committed and goes on. Another one runs from that beside it, and neither sees what the other writes then.
pub fn runs_a_commit_of_what_runs() {
    let pool = TestPool::create("10G", Transport::Auto);
    let archive = Image::small(&pool).archive();
    let snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let containerd = Engine::start(&pool, snapshotter.socket());
    containerd.ctr_with(IMPORT, &[&archive]).expect();
    start_what_stays(&containerd);
    containerd.ctr("snapshot --snapshotter plywood commit committed stays").expect();
    within(&containerd, "later", "echo later >/root/later").expect();

    // This client starts containers from images, or from what is mounted already.
    containerd.ctr("snapshot --snapshotter plywood prepare from-it committed").expect();
    let point = pool.mount_point("from-it");
    mount_as_told(&containerd, "from-it", &point);
    let script = format!("{KEPT} && {GREETS} && ! test -e /root/later && echo own >/root/own");
    let words: [&str; 5] = [&point.to_string_lossy(), "from-it", "/bin/sh", "-c", &script];
    containerd.ctr_with("run --rm --rootfs", &words).expect();
    assert_eq!(fs::read_to_string(point.join("root/own")).expect("what it wrote"), "own\n");
    within(&containerd, "still", &format!("{KEPT} && test -e /root/later && ! test -e /root/own")).expect();
    unmount(&point);

    end_what_stays(&containerd);
    containerd.ctr("container rm stays").expect();
    for key in ["from-it", "committed"] {
        containerd.ctr(&format!("snapshot --snapshotter plywood rm {key}")).expect();
    }
    containerd.ctr(&format!("image rm --sync {NAME}")).expect();
    nothing_is_left(&pool);
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

/// When containerd dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Our answer to Prepare is on its way: its own database may not know of the snapshot yet.
    Prepared,
    /// The layer is mounted and being unpacked.
    Unpacking,
}

/// Imports, and kills containerd (-9) while the layer that stands on `below` others is between Prepare and Commit.
#[track_caller]
fn die_while_unpacking(containerd: &Engine, client: &mut Client, archive: &str, moment: Moment, below: usize) {
    // A death before may have left one.
    let known = client.keys(&["kind==active"]);
    let is_it = |info: &Info| {
        info.name.contains("extract-") && info.parent.is_empty() == (below == 0) && !known.contains(&info.name)
    };
    let mut is_there = || client.list(&["kind==active"]).expect("a list").iter().any(is_it);
    thread::scope(|scope| {
        let import = scope.spawn(|| containerd.ctr_with(IMPORT, &[archive]));
        let began = Instant::now();
        while !is_there() || (moment == Moment::Unpacking && !containerd.is_unpacking()) {
            assert!(!import.is_finished() && began.elapsed() < LONG, "the layer was never seen being unpacked");
            thread::sleep(Duration::from_millis(1));
        }
        containerd.kill();
        let outcome = import.join().expect("a thread");
        assert!(!outcome.succeeded(), "nobody was there any more: {}", outcome.stdout);
    });
    assert!(is_there(), "it was committed before containerd died");
    assert_eq!(client.keys(&["kind==committed"]).len(), below, "layers that were through");
}

pub fn containerd_dies_between_prepare_and_commit() {
    let pool = TestPool::create("10G", Transport::Auto);
    let image = Image::create(&pool, "image", |root| filler(&root.join("filler"), SLOW_LAYER_MIB));
    image.add_layer("second", |root| {
        fs::write(root.join("greeting"), GREETING).expect("a file");
        filler(&root.join("filler"), SLOW_LAYER_MIB);
    });
    let archive = image.archive();
    let snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let mut containerd = Engine::start(&pool, snapshotter.socket());
    let mut client = snapshotter.client();
    for (moment, below) in [(Moment::Prepared, 0), (Moment::Unpacking, 0), (Moment::Unpacking, 1)] {
        println!("{moment:?}, on {below} layers");
        die_while_unpacking(&containerd, &mut client, &archive, moment, below);
        containerd.restart();
        // The client's lease would keep for a day what it was about to unpack. Without it all of that is garbage.
        let leases = containerd.ctr("leases ls -q").expect();
        assert!(!leases.is_empty(), "the client had none");
        for lease in leases.split_whitespace() {
            containerd.ctr(&format!("leases rm --sync {lease}")).expect();
        }
        // Of what containerd does not know it hears only when it collects something else of ours, such as the next one.
        if moment == Moment::Unpacking {
            wait_until("all has been collected", LONG, || client.keys(&[]).is_empty());
        }
    }
    containerd.ctr_with(IMPORT, &[&archive]).expect();
    runs_well(&containerd, "default", "after-all", GREETS);
    containerd.ctr(&format!("image rm --sync {NAME}")).expect();
    assert_eq!(client.keys(&[]), Vec::<String>::new());
    nothing_is_left(&pool);
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

/// The second layer does not fit into the pool. That is said, and no snapshot is made of a part of it; the first layer is whole,
/// and when all is removed, there is space for something smaller.
pub fn full_pool_during_unpack() {
    let pool = TestPool::create("256M", Transport::Auto);
    let image = Image::create(&pool, "large", |_| ());
    let snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
    let containerd = Engine::start(&pool, snapshotter.socket());
    let before = used_bytes(&pool);
    containerd.ctr_with(IMPORT, &[&image.archive()]).expect();
    let committed = || {
        let listed = containerd.ctr("snapshot --snapshotter plywood ls").expect();
        let lines = listed.lines().filter(|line| line.contains("Committed"));
        lines.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect::<Vec<_>>()
    };
    let layers = committed();
    let [first] = &layers[..] else { panic!("not one layer: {layers:?}") };
    // Which keeps it, whatever becomes of the image.
    containerd.ctr(&format!("snapshot --snapshotter plywood prepare look {first}")).expect();

    image.add_layer("second", |root| filler(&root.join("filler"), 256));
    let archive = image.archive();
    let failed = containerd.ctr_with(IMPORT, &[&archive]);
    let said = failed.stderr.to_lowercase();
    assert!(!failed.succeeded(), "256 MiB were unpacked into a pool of 256 MiB: {failed:?}");
    // The kernel's words, or the pool's.
    assert!(["no space", "is full"].iter().any(|words| said.contains(words)), "{said}");

    assert_eq!(committed(), layers, "what was unpacked in part is no layer");
    let point = pool.mount_point("look");
    mount_as_told(&containerd, "look", &point);
    assert_same(&tree_of(&point, false), &tree_of(&image.root("system"), false), "the first layer");
    unmount(&point);

    containerd.ctr("snapshot --snapshotter plywood rm look").expect();
    containerd.ctr(&format!("image rm --sync {NAME}")).expect();
    nothing_is_left(&pool);
    wait_for_former_size(&pool, before);
    containerd.ctr_with(IMPORT, &[&Image::small(&pool).archive()]).expect();
    runs_well(&containerd, "default", "small", GREETS);
    containerd.ctr(&format!("image rm --sync {NAME}")).expect();
    nothing_is_left(&pool);
    drop(containerd);
    drop(snapshotter);
    pool.check();
}

//! The snapshotter, the engine process and the front die (-9) between and inside calls: what was answered holds, what was
//! not is done or not, and nothing is left over.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tonic::Code;

use crate::snapshotter::{Client, Snapshotter, labels, mount, nothing_is_left, unmount};
use crate::support::command::{is_slow, run, wait_until};
use crate::support::pool::{TestPool, Transport, is_alive};

#[derive(Clone, Copy, Debug)]
enum Victim {
    Snapshotter,
    Engine,
    Front,
}

/// Kills one, and comes back when calls are answered again.
fn kill(pool: &TestPool, snapshotter: &mut Snapshotter, victim: Victim) -> Client {
    match victim {
        Victim::Snapshotter => snapshotter.restart(),
        Victim::Engine => pool.kill_engine(),
        Victim::Front => {
            // The snapshotter starts another daemon by itself.
            let front = pool.process("front_pid").expect("a front");
            run("kill", ["-9".to_owned(), front.to_string()]).expect();
            wait_until("the end of the front", Duration::from_secs(60), || !is_alive(front));
        }
    }
    snapshotter.client()
}

pub fn every_step() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
    let point = pool.mount_point("a");
    for (round, victim) in [Victim::Snapshotter, Victim::Engine, Victim::Front].into_iter().enumerate() {
        println!("{victim:?} dies");
        let mut client = snapshotter.client();
        let (layer, view) = (format!("layer-{round}"), format!("view-{round}"));
        client.prepare_with("key", "", labels([("a", "b")])).expect("prepare");
        let before = client.list(&[]).expect("a list");

        let mut client = kill(&pool, &mut snapshotter, victim);
        assert_eq!(client.list(&[]).expect("a list"), before);
        mount(&client.mounts("key").expect("mounts"), &point);
        fs::write(point.join("file"), "content").expect("a file");
        unmount(&point);

        let mut client = kill(&pool, &mut snapshotter, victim);
        client.commit(&layer, "key", labels([])).expect("commit");
        let before = client.list(&[]).expect("a list");

        let mut client = kill(&pool, &mut snapshotter, victim);
        assert_eq!(client.list(&[]).expect("a list"), before);
        assert_eq!(client.stat("key").expect_err("it is committed").code(), Code::NotFound);
        client.view(&view, &layer).expect("view");

        let mut client = kill(&pool, &mut snapshotter, victim);
        mount(&client.mounts(&view).expect("mounts"), &point);
        assert_eq!(fs::read_to_string(point.join("file")).expect("the file"), "content");
        unmount(&point);
        client.remove(&view).expect("remove");

        let mut client = kill(&pool, &mut snapshotter, victim);
        assert_eq!(client.keys(&[]), [layer.as_str()]);
        client.remove(&layer).expect("remove");
        assert_eq!(client.keys(&[]), Vec::<String>::new());
        nothing_is_left(&pool);
    }
    pool.check();
}

/// One caller's view of its own keys: what must be there, and what may or may not.
#[derive(Default)]
struct Told {
    there: BTreeSet<String>,
    unknown: BTreeSet<String>,
    calls: usize,
}

impl Told {
    /// Takes the outcome of a call that makes `made` and takes `taken` away. False: nobody answers.
    fn take(&mut self, outcome: &Result<(), tonic::Status>, made: Option<&str>, taken: Option<&str>) -> bool {
        self.calls += 1;
        let keys = || made.into_iter().chain(taken).map(str::to_owned);
        match outcome {
            Ok(()) => {
                for key in keys() {
                    self.unknown.remove(&key);
                    self.there.remove(&key);
                }
                self.there.extend(made.map(str::to_owned));
                true
            }
            // The connection broke, before or after.
            Err(status)
                if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled) =>
            {
                for key in keys() {
                    self.there.remove(&key);
                    self.unknown.insert(key);
                }
                false
            }
            Err(status) => panic!("{made:?} {taken:?}: {status:?}"),
        }
    }
}

/// Prepares, commits and removes until nobody answers.
fn work(client: &mut Client, life: usize, stop: &AtomicBool, made: &AtomicUsize) -> Told {
    let mut told = Told::default();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (key, layer) = (format!("key-{life}-{number}"), format!("layer-{life}-{number}"));
        let prepared = client.prepare(&key, "image").map(drop);
        if !told.take(&prepared, Some(&key), None) {
            break;
        }
        let committed = client.commit(&layer, &key, labels([]));
        if !told.take(&committed, Some(&layer), Some(&key)) {
            break;
        }
        made.store(told.calls, Ordering::Relaxed);
        if number % 2 == 0 && !told.take(&client.remove(&layer), None, Some(&layer)) {
            break;
        }
    }
    told
}

pub fn random_moments() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
    let mut client = snapshotter.client();
    client.prepare("key", "").expect("prepare");
    client.commit("image", "key", labels([])).expect("commit");
    let mut random = fastrand::Rng::with_seed(26);
    let lives = if is_slow() { 3 } else { 12 };
    let (mut calls, mut done, mut undone) = (0, 0, 0);
    let mut there = BTreeSet::from(["image".to_owned()]);
    for life in 0..lives {
        let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
        let mut client = snapshotter.client();
        let told = std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(&mut client, life, &stop, &made));
            let wanted = random.usize(4..40);
            wait_until("some calls", Duration::from_secs(120), || {
                made.load(Ordering::Relaxed) >= wanted || worker.is_finished()
            });
            // Somewhere in a call.
            std::thread::sleep(Duration::from_micros(random.u64(..20_000)));
            run("kill", ["-9".to_owned(), snapshotter.id().to_string()]).expect();
            stop.store(true, Ordering::Relaxed);
            worker.join().expect("a thread")
        });
        snapshotter.restart();
        let mut client = snapshotter.client();
        let found: BTreeSet<String> = client.keys(&[]).into_iter().collect();
        calls += told.calls;
        there.extend(told.there);
        let lost: Vec<&String> = there.difference(&found).collect();
        assert!(lost.is_empty(), "answered, and lost: {lost:?}");
        for key in found.difference(&there) {
            assert!(told.unknown.contains(key), "{key} was removed, or never made");
        }
        // A commit is one change: never both, and never none.
        for key in told.unknown.iter().filter(|key| key.starts_with("key-")) {
            let layer = key.replace("key-", "layer-");
            if told.unknown.contains(&layer) {
                let (active, committed) = (found.contains(key), found.contains(&layer));
                assert!(active != committed, "{key}: active {active}, committed {committed}");
                if committed { done += 1 } else { undone += 1 }
            }
        }
        there = found;
    }
    println!("{lives} deaths in {calls} calls; of commits under way {done} were done, {undone} not");
    assert!(calls > lives * 3, "the calls hardly began");
    let mut client = snapshotter.client();
    for key in there.iter().filter(|key| *key != "image") {
        client.remove(key).expect("remove");
    }
    client.remove("image").expect("remove");
    nothing_is_left(&pool);
    pool.check();
}

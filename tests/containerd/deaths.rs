//! The snapshotter, the engine process and the front die (-9) between and inside calls: what was answered holds, what was
//! not is done or not, and nothing is left over.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tonic::{Code, Status};

use crate::snapshotter::{Client, Snapshotter, labels, mount, nothing_is_left, unmount};
use crate::support::command::{is_slow, wait_until};
use crate::support::pool::{TestPool, Transport, is_alive};

const LONG: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Snapshotter,
    Engine,
    Front,
}

const VICTIMS: [Victim; 3] = [Victim::Snapshotter, Victim::Engine, Victim::Front];

impl Victim {
    #[track_caller]
    fn process(self, pool: &TestPool, snapshotter: &Snapshotter) -> u32 {
        match self {
            Self::Snapshotter => snapshotter.id(),
            Self::Engine => pool.process("engine_pid").expect("an engine process"),
            Self::Front => pool.process("front_pid").expect("a front"),
        }
    }

    /// Comes back when calls are answered again after the death of this process.
    #[track_caller]
    fn await_successor(self, process: u32, pool: &TestPool, snapshotter: &mut Snapshotter) -> Client {
        match self {
            Self::Snapshotter => snapshotter.restart(),
            Self::Engine => {
                let is_new = || pool.process("engine_pid").is_some_and(|id| id != process);
                wait_until("a new engine process", LONG, is_new);
            }
            // The snapshotter starts another daemon by itself.
            Self::Front => wait_until("the end of the front", LONG, || !is_alive(process)),
        }
        snapshotter.client()
    }
}

#[track_caller]
fn kill_at_once(process: u32) {
    kill_process(Pid::from_raw(process as i32).expect("a process id"), Signal::KILL).expect("it lives");
}

/// Kills one, and comes back when calls are answered again.
#[track_caller]
fn kill(pool: &TestPool, snapshotter: &mut Snapshotter, victim: Victim) -> Client {
    let process = victim.process(pool, snapshotter);
    kill_at_once(process);
    victim.await_successor(process, pool, snapshotter)
}

pub fn every_step() {
    let pool = TestPool::create("4G", Transport::Auto);
    let mut snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
    let point = pool.mount_point("a");
    for (round, victim) in VICTIMS.into_iter().enumerate() {
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

/// A label of a layer: its own name.
const OWN: &str = "own";
/// Lives until one must have ended in the middle of the call that is wanted.
const TRIES: usize = 20;

/// The calls in the middle of which somebody dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Prepare,
    Mounts,
    Commit,
    Update,
    View,
    Remove,
    Cleanup,
}

const CALLS: [Call; 7] =
    [Call::Prepare, Call::Mounts, Call::Commit, Call::Update, Call::View, Call::Remove, Call::Cleanup];

/// Which call a caller is in, if in any, and how many it has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    call: Option<Call>,
    begun: usize,
}

/// One caller's view of its own keys: what must be there, and what may or may not.
#[derive(Default)]
struct Told {
    there: BTreeSet<String>,
    unknown: BTreeSet<String>,
    /// Layers that were given their label.
    labelled: BTreeSet<String>,
    calls: usize,
}

impl Told {
    /// Takes the outcome of a call that makes `made` and takes `taken` away. False: nobody answers.
    fn take(&mut self, outcome: &Result<(), Status>, made: Option<&str>, taken: Option<&str>) -> bool {
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

/// Makes one call after the other, and shows which it is in.
struct Caller<'a> {
    client: Client,
    life: usize,
    place: &'a Mutex<Place>,
    told: Told,
}

impl Caller<'_> {
    /// Goes on until it is told to stop, or nobody answers.
    fn work(mut self, stop: &AtomicBool) -> Told {
        for number in 0.. {
            if stop.load(Ordering::Relaxed) || self.go_through(number).is_none() {
                break;
            }
        }
        self.told
    }

    /// A layer is made, labelled, looked at, and every second time removed. None: a call got no answer.
    fn go_through(&mut self, number: usize) -> Option<()> {
        let name = |kind: &str| format!("{kind}-{}-{number}", self.life);
        let (key, layer, view) = (name("key"), name("layer"), name("view"));
        self.call(Call::Prepare, Some(&key), None, |client| client.prepare(&key, "image").map(drop))?;
        self.call(Call::Mounts, None, None, |client| client.mounts(&key).map(drop))?;
        self.call(Call::Commit, Some(&layer), Some(&key), |client| client.commit(&layer, &key, labels([])))?;
        self.call(Call::Update, None, None, |client| {
            client.update(&layer, labels([(OWN, &layer)]), &["labels.own"]).map(drop)
        })?;
        self.told.labelled.insert(layer.clone());
        self.call(Call::View, Some(&view), None, |client| client.view(&view, &layer).map(drop))?;
        self.call(Call::Remove, None, Some(&view), |client| client.remove(&view))?;
        if number.is_multiple_of(2) {
            self.call(Call::Remove, None, Some(&layer), |client| client.remove(&layer))?;
        }
        self.call(Call::Cleanup, None, None, Client::cleanup)
    }

    fn call(
        &mut self,
        call: Call,
        made: Option<&str>,
        taken: Option<&str>,
        make: impl FnOnce(&mut Client) -> Result<(), Status>,
    ) -> Option<()> {
        self.show(Some(call));
        let outcome = make(&mut self.client);
        self.show(None);
        self.told.take(&outcome, made, taken).then_some(())
    }

    fn show(&self, call: Option<Call>) {
        let mut place = self.place.lock().expect("nobody has panicked with it");
        *place = Place { call, begun: place.begun + usize::from(call.is_some()) };
    }
}

/// Waits until a caller has begun so many calls and is in this one, and answers where exactly.
#[track_caller]
fn wait_until_in(call: Call, begun: usize, place: &Mutex<Place>, is_over: impl Fn() -> bool) -> Place {
    let began = Instant::now();
    loop {
        let now = *place.lock().expect("nobody has panicked with it");
        if now.call == Some(call) && now.begun >= begun {
            return now;
        }
        assert!(!is_over() && began.elapsed() < LONG, "the caller never came to {call:?}");
        thread::sleep(Duration::from_micros(20));
    }
}

/// The caller ends also when something goes wrong here.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Callers' lives, each of which ends with a death, and what they must have left.
struct Lives {
    snapshotter: Snapshotter,
    pool: TestPool,
    random: fastrand::Rng,
    there: BTreeSet<String>,
    count: usize,
    calls: usize,
    /// Commits that got no answer, and of these those that were done.
    cut_off: usize,
    done: usize,
}

impl Lives {
    fn begin() -> Self {
        let pool = TestPool::create("4G", Transport::Auto);
        let snapshotter = Snapshotter::start(&pool, &["--size", "1GiB"]);
        let mut client = snapshotter.client();
        client.prepare("key", "").expect("prepare");
        client.commit("image", "key", labels([])).expect("commit");
        let (random, there) = (fastrand::Rng::with_seed(26), BTreeSet::from(["image".to_owned()]));
        Self { snapshotter, pool, random, there, count: 0, calls: 0, cut_off: 0, done: 0 }
    }

    /// One of them. Answers whether the victim died in the middle of this call.
    fn live(&mut self, victim: Victim, call: Call) -> bool {
        // Whoever asks for this starts a daemon where the last one has died.
        self.snapshotter.client().usage("image").expect("usage");
        let process = victim.process(&self.pool, &self.snapshotter);
        let (stop, place) = (AtomicBool::new(false), Mutex::new(Place::default()));
        let client = self.snapshotter.client();
        let caller = Caller { client, life: self.count, place: &place, told: Told::default() };
        let (told, is_inside) = thread::scope(|scope| {
            let ending = StopOnDrop(&stop);
            let worker = scope.spawn(|| caller.work(&stop));
            let found = wait_until_in(call, self.random.usize(1..16), &place, || worker.is_finished());
            if self.random.bool() {
                thread::sleep(Duration::from_micros(1 << self.random.u32(4..13)));
            }
            kill_at_once(process);
            let is_inside = *place.lock().expect("nobody has panicked with it") == found;
            drop(ending);
            (worker.join().expect("a thread"), is_inside)
        });
        let mut client = victim.await_successor(process, &self.pool, &mut self.snapshotter);
        self.count += 1;
        self.compare(&mut client, &told);
        if victim != Victim::Snapshotter {
            // It has lived on, and what it knows is what the pool holds.
            let known = client.list(&[]).expect("a list");
            self.snapshotter.restart();
            assert_eq!(self.snapshotter.client().list(&[]).expect("a list"), known);
        }
        is_inside
    }

    /// What was answered holds, and what was not is done or not.
    fn compare(&mut self, client: &mut Client, told: &Told) {
        let infos = client.list(&[]).expect("a list");
        let found: BTreeSet<String> = infos.iter().map(|info| info.name.clone()).collect();
        self.calls += told.calls;
        self.there.extend(told.there.iter().cloned());
        let lost: Vec<&String> = self.there.difference(&found).collect();
        assert!(lost.is_empty(), "answered, and lost: {lost:?}");
        for key in found.difference(&self.there) {
            assert!(told.unknown.contains(key), "{key} was removed, or never made");
        }
        for info in &infos {
            match info.labels.get(OWN) {
                Some(own) => assert_eq!(own, &info.name, "the label of another"),
                None => assert!(!told.labelled.contains(&info.name), "{} has lost its label", info.name),
            }
        }
        // A commit is one change: never both, and never none.
        for key in told.unknown.iter().filter(|key| key.starts_with("key-")) {
            let layer = key.replace("key-", "layer-");
            if told.unknown.contains(&layer) {
                let (active, committed) = (found.contains(key), found.contains(&layer));
                assert!(active != committed, "{key}: active {active}, committed {committed}");
                self.cut_off += 1;
                self.done += usize::from(committed);
            }
        }
        self.there = found;
    }

    /// All goes, views before layers before the image.
    fn end(self) {
        let mut client = self.snapshotter.client();
        for key in self.there.iter().rev() {
            client.remove(key).expect("remove");
        }
        assert_eq!(client.keys(&[]), Vec::<String>::new());
        nothing_is_left(&self.pool);
        self.pool.check();
    }
}

pub fn random_moments() {
    let mut lives = Lives::begin();
    for (number, call) in CALLS.into_iter().enumerate() {
        for (turn, victim) in VICTIMS.into_iter().enumerate() {
            if is_slow() && number % VICTIMS.len() != turn {
                continue;
            }
            let before = lives.count;
            while !lives.live(victim, call) {
                assert!(lives.count < before + TRIES, "{victim:?} never died in the middle of {call:?}");
            }
            println!("{victim:?} died in {call:?} in life {} of {}", lives.count - before, lives.count);
        }
    }
    let Lives { count, calls, cut_off, done, .. } = &lives;
    println!("{count} deaths in {calls} calls; of {cut_off} commits without an answer {done} were done");
    assert!(*calls > count * 3, "the calls hardly began");
    lives.end();
}

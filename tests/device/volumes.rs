//! Volumes of containers that `plywood run -v` makes, fills from the image, and hands from one to the next.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::containers::with_image;
use crate::images::container;
use crate::support::command::{Background, Outcome, binary, is_slow, run, wait_until};
use crate::support::mounted::{device_at, mounts_below};
use crate::support::pool::TestPool;
use crate::support::tree::{self, Tree, assert_same};

/// The names in a directory, but for what mkfs.ext4 puts there.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let names = entries.map(|entry| entry.expect("a name").file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name != "lost+found").collect();
    names.sort();
    names
}

fn owner_and_mode(path: &Path) -> (u32, u32, u32) {
    let found = fs::metadata(path).expect("it is there");
    (found.uid(), found.gid(), found.mode() & 0o7777)
}

/// A volume with a file system, made by hand.
fn volume_with_ext4(pool: &TestPool, name: &str) {
    pool.done(&format!("volume create {name} --size 256M"));
    run("mkfs.ext4", ["-q", &pool.attach(name)]).expect();
    pool.done(&format!("detach {name}"));
}

/// Runs a script with something mounted.
fn run_with(pool: &TestPool, image: &str, volume: &str, script: &str) -> Outcome {
    pool.plywood(["run", image, "--rm", "-v", volume, "--", "/bin/sh", "-c", script])
}

/// What the volume is mounted on is as the image has it, when the volume was made for that and when it was empty; what
/// holds something stays as it is.
pub fn filled_from_the_image() {
    let pool = with_image();
    container(&pool, "debian", "box", |root| {
        let (data, file) = (root.join("data"), root.join("data/file"));
        fs::create_dir(&data).expect("a folder");
        fs::write(&file, "of the image").expect("a file");
        xattr::set(&file, "user.x", b"a\nb").expect("an attribute");
        fs::hard_link(&file, data.join("link")).expect("a link");
        chown(&file, Some(9), Some(10)).expect("an owner");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o750)).expect("a mode");
        chown(&data, Some(7), Some(8)).expect("an owner");
    });
    pool.done("commit box image");
    pool.done("volume delete box --yes");
    volume_with_ext4(&pool, "empty");
    for volume in ["made", "empty"] {
        let seen = "stat -c %u:%g:%a /data && ls -A /data | grep -v lost+found";
        assert_eq!(run_with(&pool, "image", &format!("{volume}:/data"), seen).expect(), "7:8:750\nfile\nlink");
        let point = pool.mount(volume);
        assert_eq!(owner_and_mode(&point), (7, 8, 0o750), "{volume}");
        assert_eq!(names(&point), ["file", "link"], "{volume}");
        let [file, link] = ["file", "link"].map(|name| point.join(name));
        assert_eq!(fs::read_to_string(&link).expect("the file"), "of the image");
        assert_eq!(owner_and_mode(&file), (9, 10, 0o644), "{volume}");
        assert_eq!(xattr::get(&file, "user.x").expect("attributes").as_deref(), Some(&b"a\nb"[..]), "{volume}");
        let [file, link] = [file, link].map(|path| fs::metadata(path).expect("the file"));
        assert_eq!((file.ino(), file.nlink()), (link.ino(), 2), "{volume}");
        pool.unmount(&point);
    }
    // Once: what has gone from it since does not come again.
    run_with(&pool, "image", "made:/data", "rm /data/file").expect();
    assert_eq!(run_with(&pool, "image", "made:/data", "ls -A /data").expect(), "link");

    volume_with_ext4(&pool, "own");
    let point = pool.mount("own");
    fs::write(point.join("own"), "of the volume").expect("a file");
    let before = owner_and_mode(&point);
    pool.unmount(&point);
    let seen = run_with(&pool, "image", "own:/data", "ls -A /data | grep -v lost+found; cat /data/own").expect();
    assert_eq!(seen, "own\nof the volume");
    let point = pool.mount("own");
    assert_eq!((names(&point), owner_and_mode(&point)), (vec!["own".to_owned()], before));
    pool.unmount(&point);
    assert_eq!(pool.names(), ["debian", "empty", "image", "made", "own"]);
    pool.stop();
    pool.check();
}

/// Several at a time, none of which finds the volume: it is made and filled once, all see what the others write, and
/// nothing of that is filled over.
pub fn made_by_several_at_once() {
    const RUNS: usize = 3;
    const PLACE: &str = "/var/lib/dpkg";
    let pool = with_image();
    let point = pool.mount("debian");
    let of_image = names(&point.join("var/lib/dpkg"));
    let status = fs::read_to_string(point.join("var/lib/dpkg/status")).expect("the image's file");
    pool.unmount(&point);
    let rounds = if is_slow() { 2 } else { 5 };
    for round in 0..rounds {
        let volume = format!("data-{round}");
        std::thread::scope(|scope| {
            for number in 0..RUNS {
                let (pool, volume) = (&pool, format!("{volume}:{PLACE}"));
                scope.spawn(move || {
                    let script = format!(
                        "cd {PLACE} && echo own-{number} >> status && touch own-{number} || exit 3
                         for look in $(seq 600); do test $(ls -d own-* | wc -l) = {RUNS} && exit; sleep 0.1; done
                         exit 4"
                    );
                    run_with(pool, "debian", &volume, &script).expect();
                });
            }
        });
        assert!(pool.volume(&volume)["device"].is_null(), "nobody uses {volume} any more");
        let point = pool.mount(&volume);
        let own = (0..RUNS).map(|number| format!("own-{number}"));
        let mut expected: Vec<String> = of_image.iter().cloned().chain(own.clone()).collect();
        expected.sort();
        assert_eq!(names(&point), expected);
        let now = fs::read_to_string(point.join("status")).expect("the file");
        let added = now.strip_prefix(status.as_str()).expect("the image's content, and more");
        let mut added: Vec<&str> = added.lines().collect();
        added.sort_unstable();
        assert_eq!(added, own.collect::<Vec<_>>());
        pool.unmount(&point);
        pool.done(&format!("volume delete {volume} --yes"));
    }
    assert_eq!(pool.names(), ["debian"]);
    pool.stop();
    pool.check();
}

/// The device of a volume. None: it is not attached, or not there.
fn device_of(pool: &TestPool, name: &str) -> Option<String> {
    let listed = pool.json("volume list", "volumes");
    let volume = listed.as_array().expect("a list").iter().find(|volume| volume["name"] == name)?;
    volume["device"].as_str().map(str::to_owned)
}

/// What is in a volume but for what mkfs.ext4 puts there.
fn tree_of(pool: &TestPool, name: &str) -> Tree {
    let point = pool.mount(name);
    let mut tree = tree::tree_of(&point, true);
    tree.remove(Path::new("lost+found"));
    pool.unmount(&point);
    tree
}

/// What a start has left that died or was interrupted while it filled a volume is not taken for a volume that is filled.
pub fn made_anew_after_a_death() {
    let pool = with_image();
    let point = pool.mount("debian");
    let expected = tree::tree_of(&point.join("usr"), true);
    pool.unmount(&point);
    volume_with_ext4(&pool, "empty");
    for (volume, signal) in [("made", Signal::KILL), ("made", Signal::INT), ("empty", Signal::INT)] {
        println!("{volume}, {signal:?}");
        let mounted = format!("{volume}:/usr");
        let words = ["run", "debian", "--name", "box", "-v", &mounted, "--", "/bin/true"];
        let pool_file = pool.file().display().to_string();
        let words = ["--pool", &pool_file].into_iter().chain(words);
        let filling = Background::start(&binary().display().to_string(), words);
        wait_until("filling", Duration::from_secs(60), || {
            let device = device_of(&pool, volume);
            let points = mounts_below(Path::new("/run/plywood/volumes"));
            device.is_some() && points.iter().any(|at| device_at(at) == device && !names(at).is_empty())
        });
        let send =
            |signal| kill_process(Pid::from_raw(filling.id() as i32).expect("a process id"), signal).expect("kill");
        if signal == Signal::KILL {
            // Nor is a container that is about to start removed unless that is asked for.
            send(Signal::STOP);
            pool.refused("rm box", &["box", "--force"]);
        }
        send(signal);
        let ended = filling.finish();
        assert!(!ended.succeeded(), "it was filled before it was stopped: {}{}", ended.stdout, ended.stderr);
        if signal == Signal::INT {
            assert_eq!(pool.names(), ["debian", "empty"]);
            assert!(tree_of(&pool, "empty").is_empty(), "what was copied has gone");
        } else {
            pool.refused("run debian --rm --mount source=made,target=/usr -- /bin/true", &["made", "half made"]);
        }
        run_with(&pool, "debian", &mounted, "true").expect();
        assert_same(&tree_of(&pool, volume), &expected, volume);
        if signal == Signal::KILL {
            pool.done("rm --force box");
            // The next daemon deletes what is marked as somebody's who has died.
            pool.stop();
            assert_same(&tree_of(&pool, volume), &expected, volume);
        }
        pool.done(&format!("volume delete {volume} --yes"));
        assert_eq!(pool.names().iter().filter(|name| *name != "empty").count(), 1, "{:?}", pool.names());
    }
    pool.stop();
    pool.check();
}

/// Two count in files of their own on one volume, each step a container: one ends while the other starts.
pub fn goes_from_run_to_run() {
    let pool = with_image();
    let steps = if is_slow() { 5 } else { 20 };
    std::thread::scope(|scope| {
        for own in ["one", "two"] {
            let pool = &pool;
            scope.spawn(move || {
                for step in 1..=steps {
                    let script = format!("n=$(cat /d/{own} 2>/dev/null || echo 0); echo $((n + 1)) | tee /d/{own}");
                    assert_eq!(run_with(pool, "debian", "data:/d", &script).expect(), step.to_string(), "{own}");
                }
            });
        }
    });
    assert_eq!(pool.names(), ["data", "debian"], "what was made for a run has gone");
    assert!(pool.volume("data")["device"].is_null(), "nobody uses it any more");
    let point = pool.mount("data");
    for own in ["one", "two"] {
        assert_eq!(fs::read_to_string(point.join(own)).expect("the file"), format!("{steps}\n"));
    }
    pool.unmount(&point);
    pool.stop();
    pool.check();
}

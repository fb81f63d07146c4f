//! Containers through runc: what an untouched one owns, and what one that wrote keeps or drops.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::support::command::{binary, run, wait_until};
use crate::support::machine::rootfs;
use crate::support::pool::{TestPool, Transport};

/// Own bytes of a container that did nothing but start.
const UNTOUCHED_BYTES: u64 = 64 << 10;

/// A pool with the image `debian`.
pub fn with_image() -> TestPool {
    let pool = TestPool::create("10G", Transport::Auto);
    let source = format!("tar:{}", rootfs().display());
    pool.plywood(["image", "import", &source, "debian"]).expect();
    pool
}

pub fn untouched_owns_next_to_nothing() {
    let pool = with_image();
    pool.done("run debian --name untouched -- /bin/true");
    let own = pool.volume("untouched")["own_bytes"].as_u64().expect("a number");
    let listed = pool.json("ps", "containers");
    assert_eq!((&listed[0]["name"], &listed[0]["own_bytes"]), (&"untouched".into(), &own.into()));
    let shown = pool.done("ps -s");
    assert!(shown.contains("ended") && shown.contains("1 container takes"), "{shown}");
    println!("an untouched container owns {own} bytes");
    assert!(own < UNTOUCHED_BYTES, "an untouched container owns {own} bytes");
    pool.done("volume delete untouched --yes");
    pool.stop();
    pool.check();
}

pub fn runs_and_is_dropped() {
    let pool = with_image();
    let before = pool.names();
    let said = pool.plywood([
        "run",
        "debian",
        "--rm",
        "--",
        "/bin/sh",
        "-c",
        "echo hello from $(cat /etc/debian_version | head -c 2)",
    ]);
    assert!(said.stdout.contains("hello from"), "{}{}", said.stdout, said.stderr);
    assert_eq!(pool.names(), before, "--rm drops the clone");

    // The command's own exit status comes through.
    let failed = pool.plywood(["run", "debian", "--rm", "--", "/bin/sh", "-c", "exit 7"]);
    assert_eq!(failed.status.code(), Some(7), "{}", failed.stderr);

    // What it writes stays in its clone, and the image is as it was.
    pool.plywood([
        "run",
        "debian",
        "--name",
        "writer",
        "--",
        "/bin/sh",
        "-c",
        "echo kept >/root/kept && ls /etc/resolv.conf /etc/hosts",
    ])
    .expect();
    let point = pool.mount("writer");
    assert_eq!(std::fs::read_to_string(point.join("root/kept")).expect("the file"), "kept\n");
    pool.unmount(&point);
    let point = pool.mount("debian");
    assert!(!point.join("root/kept").exists(), "the image has not changed");
    pool.unmount(&point);
    let _ = pool.plywood(["detach", "--all"]);
    pool.done("volume delete writer --yes");
    pool.stop();
    pool.check();
}

/// What a container is told and shown beside its image, with the meaning that it has for Docker.
pub fn options_are_dockers() {
    let pool = with_image();
    let run = |options: &[&str], script: &str| {
        let words = [&["run", "debian", "--rm"], options, &["--", "/bin/sh", "-c", script]].concat();
        pool.plywood(words)
    };
    let said = run(&["-e", "A=b c", "-w", "/tmp", "-u", "daemon"], "echo $A; pwd; id -un").expect();
    assert_eq!(said, "b c\n/tmp\ndaemon");
    run(&["--read-only"], "! touch /x 2>/dev/null").expect();
    let fills = "! dd if=/dev/zero of=/scratch/x bs=64k count=32 2>/dev/null && stat -f -c %T /scratch";
    assert_eq!(run(&["--tmpfs", "/scratch:size=1M"], fills).expect(), "tmpfs");

    // A volume that is not there is made, and filled with what the image has there; what it holds then hides that.
    let said = run(&["-v", "data:/var/lib/dpkg"], "stat -c %U:%a /var/lib/dpkg/status; echo kept > /var/lib/dpkg/kept");
    assert_eq!(said.expect(), "root:644");
    let image = pool.mount("debian");
    let held = std::fs::read_dir(image.join("var/lib/dpkg")).expect("the image's");
    let count = held.map(|entry| entry.expect("a name").file_name()).filter(|name| name != "kept").count();
    pool.unmount(&image);
    assert_eq!(
        run(&["-v", "data:/data:ro"], "! touch /data/x 2>/dev/null; ls -A /data | wc -l").expect(),
        (count + 1).to_string()
    );
    // Over the image's own, which it hides.
    let said = run(&["--mount", "source=data,target=/usr/share/doc"], "cd /usr/share/doc; cat kept; ls -A | wc -l");
    assert_eq!(said.expect(), format!("kept\n{}", count + 1));

    // The host's: -v makes a directory, --mount does not.
    let host = pool.folder().join("host/deep");
    let shown = host.display().to_string();
    let refused = run(&["--mount", &format!("type=bind,source={shown},target=/h")], "true");
    assert!(!refused.succeeded() && refused.stderr.contains("does not exist"), "{}", refused.stderr);
    run(&["-v", &format!("{shown}:/h")], "echo there > /h/file").expect();
    assert_eq!(std::fs::read_to_string(host.join("file")).expect("the file"), "there\n");
    let refused = run(&["--mount", "source=nowhere,target=/h"], "true");
    assert!(!refused.succeeded() && refused.stderr.contains("nowhere"), "{}", refused.stderr);

    assert_eq!(pool.names(), ["data", "debian"], "what was made for a run has gone");
    assert!(pool.volume("data")["device"].is_null(), "no longer in use");
    pool.stop();
    pool.check();
}

const LONG: Duration = Duration::from_secs(60);

/// `plywood run --detach`; answers what it printed.
fn start(pool: &TestPool, options: &[&str], script: &str) -> String {
    pool.plywood([&["run", "debian", "--detach"], options, &["--", "/bin/sh", "-c", script]].concat()).expect()
}

fn listed(pool: &TestPool, name: &str) -> Value {
    let all = pool.json("ps", "containers");
    all.as_array().expect("a list").iter().find(|listed| listed["name"] == name).expect("the container").clone()
}

fn log_files(pool: &TestPool) -> Vec<PathBuf> {
    let folder = PathBuf::from("/var/log/plywood/containers").join(pool.info()["uuid"].as_str().expect("a uuid"));
    fs::read_dir(folder).map(|files| files.map(|file| file.expect("a file").path()).collect()).unwrap_or_default()
}

pub fn in_the_background() {
    let pool = with_image();
    let script = "trap 'echo bye; exit 3' TERM; echo said; echo cried >&2; while :; do sleep 0.1; done";
    assert_eq!(start(&pool, &["--name", "web"], script), "web");
    let web = listed(&pool, "web");
    assert_eq!((&web["running"], &web["exit_code"]), (&true.into(), &Value::Null));
    wait_until("its first words", LONG, || {
        let said = pool.plywood(["logs", "web"]);
        (said.stdout.trim(), said.stderr.trim()) == ("said", "cried")
    });
    let refused = pool.plywood(["rm", "web"]);
    assert!(!refused.succeeded() && refused.stderr.contains("plywood kill web"), "{}", refused.stderr);
    pool.done("kill web");
    wait_until("its end", LONG, || listed(&pool, "web")["running"] == false);
    assert_eq!(listed(&pool, "web")["exit_code"], 3);
    assert!(pool.done("ps").contains("ended (3)"));
    // Following ends with it.
    assert!(pool.done("logs --follow --timestamps web").ends_with("bye"), "what it said last");
    assert_eq!(pool.plywood(["logs", "--tail", "1", "web"]).stdout.trim(), "bye");
    pool.done("rm web");
    assert_eq!((pool.names(), log_files(&pool)), (vec!["debian".to_owned()], vec![]));

    // Its log is bounded, and part of what it takes.
    start(&pool, &["--name", "loud", "--log-size", "16KiB"], "seq 20000");
    wait_until("its end", LONG, || listed(&pool, "loud")["running"] == false);
    let files = log_files(&pool);
    let bytes: u64 = files.iter().map(|file| fs::metadata(file).expect("a file").len()).sum();
    assert!(files.len() == 3 && bytes <= 3 * 16384, "{files:?}: {bytes}");
    assert!(pool.done("logs loud").ends_with("19999\n20000"), "the newest is kept");
    let loud = listed(&pool, "loud");
    assert!((bytes..=bytes + 3 * 4096).contains(&loud["log_bytes"].as_u64().expect("a number")), "{loud}");
    pool.done("volume delete loud --yes");
    pool.done("prune --yes");
    assert_eq!(log_files(&pool), Vec::<PathBuf>::new(), "nobody's log");

    // One that cannot be started leaves nothing.
    let refused = pool.plywood(["run", "debian", "--detach", "--", "/no/such/program"]);
    assert!(!refused.succeeded() && refused.stderr.contains("did not start"), "{}", refused.stderr);
    assert!(refused.stderr.contains("/no/such/program"), "{}", refused.stderr);
    start(&pool, &["--rm", "--name", "brief"], "true");
    wait_until("its end", LONG, || !pool.names().contains(&"brief".to_owned()));
    wait_until("its log's end", LONG, || log_files(&pool).is_empty());

    // Nobody looks after it any more.
    let orphan = format!("orphan-{}", std::process::id());
    start(&pool, &["--name", &orphan, "-v", "data:/data"], "trap '' TERM; while :; do sleep 1; done");
    // Not to be found in the search's own words.
    let looks_after = run("pgrep", ["-f", &format!("[r]un debian --detach --name {orphan}")]).expect();
    run("kill", ["-9", looks_after.trim()]).expect();
    pool.done(&format!("rm --force {orphan}"));
    assert_eq!(pool.names(), ["data", "debian"]);
    assert!(pool.volume("data")["device"].is_null(), "no longer in use");
    pool.stop();
    pool.check();
}

/// What `ps --size` says at its end is what the containers take: what each wrote, and their logs. What they share is the
/// image's, of which there is one.
pub fn sizes_add_up() {
    let pool = with_image();
    let writes = "head -c 3000000 /dev/urandom > /root/written";
    pool.plywood(["run", "debian", "--name", "quiet", "--", "/bin/sh", "-c", writes]).expect();
    start(&pool, &["--name", "loud"], "seq 5000; echo little > /root/written");
    wait_until("its end", LONG, || listed(&pool, "loud")["running"] == false);
    // What the host has not placed yet may take another size when it has.
    run("sync", [] as [&str; 0]).expect();
    pool.done("pool trim");
    let shown = pool.done("ps --size");
    let (mut own, mut logs) = (0, 0);
    for name in ["quiet", "loud"] {
        let (listed, volume) = (listed(&pool, name), pool.volume(name));
        let bytes = |what: &str| listed[what].as_u64().expect("a number");
        let mapped = volume["mapped_bytes"].as_u64().expect("a number");
        assert_eq!((&listed["own_bytes"], &listed["size_bytes"]), (&volume["own_bytes"], &volume["size_bytes"]));
        assert_eq!(bytes("own_bytes") + bytes("shared_bytes"), mapped, "{listed}");
        own += bytes("own_bytes");
        logs += bytes("log_bytes");
    }
    assert!(own > 3_000_000, "{own}");
    assert_eq!(listed(&pool, "quiet")["log_bytes"], 0);
    let on_disk: u64 = log_files(&pool).iter().map(|file| fs::metadata(file).expect("a file").blocks() * 512).sum();
    assert!(on_disk > 0 && logs == on_disk, "{logs} bytes of logs, {on_disk} on disk");
    let sum = shown.lines().last().expect("a sum");
    let bytes = own + logs;
    assert!(sum.starts_with("2 containers take ") && sum.ends_with(&format!("({bytes} bytes)")), "{bytes}: {shown}");
    // Beside the image there is nothing else in the pool.
    let image = pool.volume("debian")["mapped_bytes"].as_u64().expect("a number");
    assert_eq!(pool.info()["live_bytes"], image + own);
    pool.done("rm quiet loud");
    pool.stop();
    pool.check();
}

/// A container that has ended runs again as it was asked for, on what it wrote, though its image has gone.
pub fn started_again() {
    let pool = with_image();
    let script = "for word in $WORD $(pwd) $(hostname); do echo $word >> /data/said; done; cat /data/said
                  test -e /second && exit 4; touch /second; exit 2";
    start(&pool, &["--name", "twice", "-e", "WORD=hello", "-w", "/tmp", "-v", "data:/data"], script);
    let ended_with = |name: &str, code: u8| {
        wait_until("its end", LONG, || {
            let listed = listed(&pool, name);
            listed["running"] == false && listed["exit_code"] == code
        });
    };
    ended_with("twice", 2);
    let said = pool.done("image delete debian --yes");
    assert!(said.ends_with("; its container twice goes on without it, and can no longer be committed"), "{said}");
    assert_eq!(pool.done("start twice"), "twice");
    ended_with("twice", 4);
    let once = "hello\n/tmp\ntwice\n";
    assert_eq!(pool.plywood(["logs", "twice"]).stdout, once.repeat(3), "once, and then twice");
    let seen = pool.plywood(["start", "--attach", "twice"]);
    assert_eq!((seen.status.code(), seen.stdout), (Some(4), once.repeat(3)), "{}", seen.stderr);

    // Neither one that runs nor one that is mounted by hand.
    let point = pool.mount("twice");
    let device = pool.volume("twice")["device"].as_str().expect("a device").to_owned();
    pool.refused("start twice", &[&device]);
    pool.refused("rm twice", &["twice"]);
    pool.unmount(&point);
    // What is attached and no more, as after a power cut by the unit's attach --all, starts.
    pool.attach("twice");
    pool.done("start twice");
    wait_until("its end", LONG, || {
        let listed = listed(&pool, "twice");
        listed["running"] == false && pool.volume("twice")["device"].is_null()
    });
    assert_eq!(pool.plywood(["logs", "twice"]).stdout, once.repeat(3) + &once.repeat(4), "what the last start said");
    pool.plywood(["image", "import", &format!("tar:{}", rootfs().display()), "debian"]).expect();
    let name = format!("runs-{}", std::process::id());
    start(&pool, &["--name", &name], "while :; do sleep 1; done");
    let refused = pool.plywood(["start", &name]);
    assert!(!refused.succeeded() && refused.stderr.contains("runs already"), "{}", refused.stderr);
    // With whoever looked after it, and then by itself.
    let looks_after = run("pgrep", ["-f", &format!("[r]un debian --detach --name {name}")]).expect();
    run("kill", ["-9", looks_after.trim()]).expect();
    let refused = pool.plywood(["start", &name]);
    assert!(!refused.succeeded() && refused.stderr.contains("runs already"), "{}", refused.stderr);
    pool.done(&format!("kill --signal KILL {name}"));
    wait_until("its end", LONG, || pool.plywood(["start", &name]).succeeded());
    assert_eq!(listed(&pool, &name)["running"], true);
    // With the runtime as well, and then the container itself: nobody takes it down.
    let orphan = format!("orphan-{}", std::process::id());
    start(&pool, &["--name", &orphan], &format!("while :; do sleep 1; done; : within-{orphan}"));
    let looks_after = run("pgrep", ["-f", &format!("[r]un debian --detach --name {orphan}")]).expect();
    run("pkill", ["-9", "-P", looks_after.trim()]).expect();
    run("pkill", ["-9", "-f", &format!("[w]ithin-{orphan}")]).expect();
    wait_until("its end", LONG, || listed(&pool, &orphan)["running"] == false);
    pool.done(&format!("start {orphan}"));
    assert_eq!(listed(&pool, &orphan)["running"], true);
    pool.done(&format!("rm --force {name} {orphan}"));
    pool.attach("twice");
    pool.done("rm twice");
    assert_eq!(pool.names().iter().filter(|name| *name != "data").count(), 1, "{:?}", pool.names());
    pool.stop();
    pool.check();
}

/// What is renamed while it runs, root and volume, is what is taken down, and not what has their names now.
pub fn renamed_while_it_runs() {
    let pool = with_image();
    let script = "while ! test -e /data/end; do sleep 0.1; done";
    start(&pool, &["--name", "web", "--rm", "-v", "data:/data"], script);
    pool.done("volume rename web old");
    pool.done("volume rename data other");
    start(&pool, &["--name", "web"], "exit 5");
    wait_until("its end", LONG, || listed(&pool, "web")["exit_code"] == 5);
    pool.done("volume create data --size 64M");
    pool.plywood(["run", "debian", "--rm", "-v", "other:/data", "--", "/bin/touch", "/data/end"]).expect();
    wait_until("the end of the other", LONG, || !pool.names().contains(&"old".to_owned()));
    wait_until("the end of its volume's use", LONG, || pool.volume("other")["device"].is_null());
    assert_eq!(pool.names(), ["data", "debian", "other", "web"]);
    assert_eq!(listed(&pool, "web")["exit_code"], 5);
    // What would be lost is said.
    pool.done("snapshot create other then");
    pool.refused("run debian -v then:/data -- /bin/true", &["then", "--rm", "clone create"]);
    pool.done("run debian --rm -v then:/data -- /bin/touch /data/x");
    pool.done("rm web");
    pool.stop();
    pool.check();
}

/// `run -it` on a terminal: its size and its keys reach the command, and it is afterwards as it was before.
pub fn on_a_terminal() {
    let pool = with_image();
    let plywood = format!("{} --pool {}", binary().display(), pool.file().display());
    let talks = format!("{plywood} run debian -it --name talks -- /bin/sh");
    let within = format!("stty rows 33 cols 77; stty -a > before; {talks}; echo $? > status; stty -a > after");
    // The third key ends what runs.
    let typed = r"
        until_there() { for look in $(seq 600); do grep -q -- $1 $2 2>/dev/null && return; sleep 0.1; done; }
        until_there '#' shown; printf 'stty size; test -t 0 && echo is-a-$((40+2)); sleep 100\n'
        until_there is-a-42 shown; sleep 1; printf '\003'; sleep 1; printf 'exit 5\n'
        until_there . after";
    let line = format!("({typed}) | script -qfec '{within}' shown >/dev/null");
    run("sh", ["-c".to_owned(), format!("cd '{}' && {line}", pool.folder().display())]).expect();
    let read = |file: &str| fs::read_to_string(pool.folder().join(file)).expect("what was written");
    let shown = read("shown");
    assert_eq!(read("status").trim(), "5", "{shown}");
    assert!(shown.contains("33 77") && shown.contains("is-a-42"), "{shown}");
    assert!(read("before").contains(" icanon") && read("after") == read("before"), "{}", read("after"));
    assert_eq!(listed(&pool, "talks")["exit_code"], 5);
    let refused = pool.plywood(["run", "debian", "-t", "--", "/bin/true"]);
    assert!(!refused.succeeded() && refused.stderr.contains("no terminal"), "{}", refused.stderr);
    pool.done("rm talks");
    pool.stop();
    pool.check();
}

/// A container counts in a file of its volume, then in one of its root, each safe before the next: in what was taken at one
/// instant the root is never ahead.
pub fn taken_with_their_volumes() {
    let pool = with_image();
    let script = "n=0; while :; do n=$((n+1)); echo $n >>/data/n; sync /data/n; echo $n >>/n; sync /n
                  test $n = 3 && echo counting; done";
    start(&pool, &["--name", "counts", "-v", "data:/data"], script);
    wait_until("its first steps", LONG, || pool.plywood(["logs", "counts"]).stdout.contains("counting"));
    for number in 0..8 {
        std::thread::sleep(Duration::from_millis(100));
        let freeze = if number % 2 == 0 { "--freeze" } else { "" };
        let taken = pool.done(&format!("snapshot create counts at-{number} --volumes {freeze}"));
        assert!(taken.contains(&format!("at-{number}.data")), "{taken}");
    }
    pool.done("rm --force counts");
    for number in 0..8 {
        let (root, data) = (format!("at-{number}"), format!("at-{number}.data:/data"));
        let words =
            ["run", &root, "--rm", "-v", &data, "--", "/bin/sh", "-c", "echo $(tail -n 1 /data/n) $(tail -n 1 /n)"];
        let said = pool.plywood(words).expect();
        let counts: Vec<u64> = said.split_whitespace().map(|count| count.parse().expect("a count")).collect();
        let [data, root] = counts[..] else { panic!("{said}") };
        assert!(data >= root && data - root <= 1, "volume at {data}, root at {root}");
    }
    let refused = pool.plywood(["snapshot", "create", "debian", "x", "--volumes"]);
    assert!(!refused.succeeded() && refused.stderr.contains("no container with volumes"), "{}", refused.stderr);
    pool.done("volume create other --size 1M");
    pool.done("snapshot create data one --with other=two");
    let (one, two) = (pool.volume("one"), pool.volume("two"));
    assert_eq!((&one["origin"], &two["origin"]), (&"data".into(), &"other".into()));
    pool.stop();
    pool.check();
}

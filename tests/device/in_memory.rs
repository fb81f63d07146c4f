//! Pools that live in memory only.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::docker::{Docker, Engine, Plugin};
use crate::support::command::{binary, run, wait_until};
use crate::support::machine::scratch;
use crate::support::pool::TestPool;

const MIB: u64 = 1 << 20;

/// What a container of Docker's keeps in a volume of it is searched for in swap, beside something of an ordinary tmpfs that has to be found there.
pub fn never_in_swap() {
    let name = format!("plywood-test-memory-{}", std::process::id());
    let program = binary();
    let program = program.to_str().expect("a path in UTF-8");
    let plywood = |words: &[&str]| run(program, words.iter().copied());
    let refused = plywood(&["pool", "create", "--memory", "900T", "--name", &name]);
    assert!(!refused.succeeded() && refused.stderr.contains("of memory are available"), "{}", refused.stderr);
    assert!(!plywood(&["pool", "create", "--memory", "256M"]).succeeded(), "without a name");
    let shared_before = shared_bytes();
    plywood(&["pool", "create", "--memory", "256MiB", "--name", &name]).expect();
    assert!(!plywood(&["pool", "create", "--memory", "256MiB", "--name", &name]).succeeded(), "twice");
    let file = Path::new("/run/plywood-memory").join(&name).join("pool");
    let _deleted = Deleted(&name);
    let pool = TestPool::adopt(&file);
    // A container of Docker's with a volume for secrets, which is gone after its use.
    let plugin = Plugin::new(&pool);
    let docker = Docker::new(pool.folder());
    docker.import(pool.folder());
    docker.done(&format!("volume create --driver {} -o ephemeral=true -o size=96M secrets", plugin.driver()));
    docker.done("run -d --name keeper --network=none -v secrets:/data tiny /bin/sleep 600");
    // No command line has it as one: those are in memory that may be swapped.
    let (first, second) = (format!("a secret of {name}"), "that nobody may find");
    let script = format!(
        "x='{first}'; echo \"$x {second}\" > /data/a; for i in 1 2 3 4 5 6 7 8 9; do \
         cat /data/a /data/a > /data/b && cat /data/b /data/b > /data/a || exit 1; done; \
         cat /data/a /data/a > /data/b && cat /data/b >> /data/a && sync && stat -c %s /data/a"
    );
    let written = docker.run(&["exec", "keeper", "/bin/sh", "-c", &script]).expect();
    assert!(written.parse::<u64>().is_ok_and(|bytes| bytes >= 32 * MIB), "{written} bytes of it");
    let secret = format!("{first} {second}");

    let ordinary = pool.mount_point("ordinary");
    run("mount", ["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), ordinary.as_os_str()]).expect();
    let pattern = format!("a pattern of {name} that is to be found");
    fs::write(ordinary.join("file"), pattern.repeat(MIB as usize / pattern.len())).expect("a file");
    let swap = Swap::on();
    for path in [&file, &ordinary.join("file")] {
        page_out(path);
    }
    // Swap is written by and by, and no sync waits for it.
    wait_until("something is swapped out; the test tells nothing otherwise", Duration::from_secs(60), || {
        swap.holds(&pattern)
    });
    assert!(!swap.holds(&secret), "the secret is in swap");
    drop(swap);
    run("umount", [&ordinary]).expect();

    let refused = plywood(&["--pool", &name, "pool", "delete", "--yes"]);
    assert!(!refused.succeeded() && refused.stderr.contains("secrets is attached"), "{}", refused.stderr);
    docker.refused("volume rm secrets", "in use");
    docker.done("rm -f keeper");
    wait_until("its end", Duration::from_secs(60), || pool.names().is_empty());
    docker.done("rmi tiny");
    drop((docker, plugin));
    plywood(&["--pool", &name, "pool", "delete", "--yes"]).expect();
    assert!(!file.parent().expect("a directory").exists());
    wait_until("the memory's return", Duration::from_secs(60), || shared_bytes() < shared_before + 16 * MIB);
    assert!(!plywood(&["--pool", &name, "pool", "info"]).succeeded());
}

/// Memory of all tmpfs of the machine.
fn shared_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix("Shmem:")).expect("Shmem");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Asks the kernel to write a file's pages to swap (MADV_PAGEOUT).
fn page_out(path: &Path) {
    let script = "import mmap, sys\nwith open(sys.argv[1], 'r+b') as file:\n    memory = mmap.mmap(file.fileno(), 0)\n    \
                  for at in range(0, len(memory), 4096):\n        memory[at]\n    memory.madvise(21)\n";
    run("python3", ["-c".as_ref(), script.as_ref(), path.as_os_str()]).expect();
}

/// A pool that is deleted when a test ends half-way.
struct Deleted<'a>(&'a str);

impl Drop for Deleted<'_> {
    fn drop(&mut self) {
        let program = binary();
        let _ = run(program.to_str().expect("a path in UTF-8"), ["--pool", self.0, "pool", "delete", "--yes"]);
    }
}

/// A swap file, taken away at the end.
struct Swap(tempfile::TempPath);

impl Swap {
    fn on() -> Self {
        let file = tempfile::Builder::new().prefix("plywood-test-swap-").tempfile_in(scratch()).expect("a file");
        let path = file.into_temp_path();
        // Written, and past the host's cache: the kernel puts what it swaps under the file system's feet.
        let zeros =
            format!("dd if=/dev/zero of={} bs=1M count=128 oflag=direct conv=notrunc status=none", path.display());
        run("sh", ["-c", &zeros]).expect();
        run("mkswap", [path.as_os_str()]).expect();
        run("swapon", ["--priority".as_ref(), "32767".as_ref(), path.as_os_str()]).expect();
        Self(path)
    }

    fn holds(&self, text: &str) -> bool {
        let search =
            format!("dd if={} bs=1M iflag=direct status=none | grep -aF '{text}' >/dev/null", self.0.display());
        run("sh", ["-c", &search]).succeeded()
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = run("swapoff", [self.0.as_os_str()]);
    }
}

//! What does a container pay for its first write into a file of its image: on overlayfs, and on plywood?
//!
//! Real mounts: the pool and the lower directory are on the file system of `TMPDIR` (default /var/tmp). The first 4 KiB
//! write and its fsync, opening included, since that is when overlayfs copies. Each is in a container of its own, which is
//! made outside of the time. Needs root, FUSE and loop devices, and skips without. tools/bench compares with more.

#![allow(clippy::print_stderr, reason = "a bench that skips says so")]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use fastrand::Rng;
use tempfile::TempDir;

const SEED: u64 = 1;
const MIB: u64 = 1 << 20;
const FILE_BYTES: [(&str, u64); 3] = [("1 MiB", MIB), ("32 MiB", 32 * MIB), ("256 MiB", 256 * MIB)];

/// Runs a command; answers what it printed.
fn run(command: &mut Command) -> io::Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{:?}: {}", command.get_program(), said.trim())))
}

/// A file of each size.
fn populate(directory: &Path) -> io::Result<()> {
    let mut random = Rng::with_seed(SEED);
    let mut noise = vec![0; MIB as usize];
    for (name, size_bytes) in FILE_BYTES {
        let mut file = File::create(directory.join(name))?;
        for _ in 0..size_bytes / MIB {
            random.fill(&mut noise);
            file.write_all(&noise)?;
        }
        file.sync_all()?;
    }
    Ok(())
}

/// Opens, writes a block, syncs.
fn first_write(path: &Path, random: &mut Rng) -> io::Result<Duration> {
    let blocks = fs::metadata(path)?.len() / 4096;
    let offset = random.u64(..blocks) * 4096;
    let begun = Instant::now();
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&[7; 4096], offset)?;
    file.sync_all()?;
    Ok(begun.elapsed())
}

/// A way of making containers' roots. Dropping it takes everything away.
trait Side {
    fn name(&self) -> &'static str;
    /// Mounts a new root.
    fn make(&mut self) -> io::Result<PathBuf>;
    /// Takes it away again.
    fn unmake(&mut self, root: &Path) -> io::Result<()>;
}

struct Overlay {
    place: TempDir,
    made: u64,
}

impl Overlay {
    fn prepare(temporary: &Path) -> io::Result<Self> {
        let place = TempDir::with_prefix_in("plywood-bench-", temporary)?;
        fs::create_dir(place.path().join("lower"))?;
        populate(&place.path().join("lower"))?;
        let mut overlay = Self { place, made: 0 };
        // Whether this kernel has overlayfs is seen now.
        let root = overlay.make()?;
        overlay.unmake(&root)?;
        Ok(overlay)
    }
}

impl Side for Overlay {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    fn make(&mut self) -> io::Result<PathBuf> {
        self.made += 1;
        let container = self.place.path().join(self.made.to_string());
        for part in ["upper", "work", "root"] {
            fs::create_dir_all(container.join(part))?;
        }
        let (lower, container_text) = (self.place.path().join("lower"), container.display());
        let options = format!(
            "lowerdir={},upperdir={container_text}/upper,workdir={container_text}/work,index=off,redirect_dir=off",
            lower.display()
        );
        let root = container.join("root");
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&root))?;
        Ok(root)
    }

    fn unmake(&mut self, root: &Path) -> io::Result<()> {
        run(Command::new("umount").arg(root))?;
        root.parent().map_or(Ok(()), fs::remove_dir_all)
    }
}

struct Plywood {
    place: TempDir,
}

impl Plywood {
    fn prepare(temporary: &Path) -> io::Result<Self> {
        let side = Self { place: TempDir::with_prefix_in("plywood-bench-", temporary)? };
        let pool = side.pool();
        side.command(&["pool", "create", &pool, "--size", "8G"])?;
        side.command(&["volume", "create", "base", "--size", "1G"])?;
        let device = side.command(&["attach", "base"])?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", &device]))?;
        let root = side.place.path().join("root");
        fs::create_dir(&root)?;
        let root_text = root.display().to_string();
        side.command(&["mount", "base", &root_text])?;
        populate(&root)?;
        side.command(&["unmount", &root_text])?;
        side.command(&["detach", "base"])?;
        side.command(&["snapshot", "create", "base", "image"])?;
        Ok(side)
    }

    fn pool(&self) -> String {
        self.place.path().join("pool").display().to_string()
    }

    fn command(&self, words: &[&str]) -> io::Result<String> {
        run(Command::new(env!("CARGO_BIN_EXE_plywood")).args(["--pool", &self.pool()]).args(words))
    }
}

impl Side for Plywood {
    fn name(&self) -> &'static str {
        "plywood"
    }

    fn make(&mut self) -> io::Result<PathBuf> {
        let root = self.place.path().join("root");
        self.command(&["mount", "image", &root.display().to_string()])?;
        Ok(root)
    }

    fn unmake(&mut self, root: &Path) -> io::Result<()> {
        self.command(&["unmount", &root.display().to_string()]).map(drop)
    }
}

impl Drop for Plywood {
    fn drop(&mut self) {
        let root = self.place.path().join("root");
        // Of a bench that was broken off something may be mounted; of one that ended nothing is.
        let _ = self.command(&["unmount", &root.display().to_string()]);
        if let Err(error) = self.command(&["stop"]) {
            eprintln!("overlay: {error}");
        }
    }
}

/// Both sides, or why not.
fn sides() -> io::Result<Vec<Box<dyn Side>>> {
    if !rustix::process::geteuid().is_root() {
        return Err(io::Error::other("it mounts; run it as root"));
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        fs::metadata(device).map_err(|error| io::Error::other(format!("{device}: {error}")))?;
    }
    let temporary = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    Ok(vec![Box::new(Overlay::prepare(&temporary)?), Box::new(Plywood::prepare(&temporary)?)])
}

fn copy_up(criterion: &mut Criterion) {
    let mut sides = match sides() {
        Ok(sides) => sides,
        Err(error) => {
            eprintln!("overlay: skipped: {error}");
            return;
        }
    };
    let mut group = criterion.benchmark_group("overlay");
    // An iteration takes as long as a container's beginning and end, whatever its write takes: few of them are enough.
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(20));
    for (name, _) in FILE_BYTES {
        for side in &mut sides {
            let mut random = Rng::with_seed(SEED);
            let id = BenchmarkId::new(format!("first write, {}", side.name()), name);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|count| {
                    let mut time = Duration::ZERO;
                    for _ in 0..count {
                        let root = side.make().expect("a container's root");
                        let took = first_write(&root.join(name), &mut random);
                        side.unmake(&root).expect("the end of a container's root");
                        time += took.expect("the first write");
                    }
                    time
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, copy_up);
criterion_main!(benches);

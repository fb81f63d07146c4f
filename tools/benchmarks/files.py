"""File level: what a program in a container sees, its files being part of the image."""

import os
import pwd
import random
import shutil
import sqlite3
import subprocess
import time
from contextlib import ExitStack

from .bench import GIB, MIB, case
from .plywood import Pool, mounted
from .results import Target
from .roots import ALL, FuseOverlay, Overlay, OverlayXfs, Plain, PlywoodRoots
from .shell import NotRun, drop_caches, make_directory, require, run


def write_file(path, size):
    """A file of noise."""
    noise = random.Random(size).randbytes(MIB)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(noise)
        file.flush()
        os.fsync(file.fileno())


def write_block_ms(path, size, number):
    """Opens a file, overwrites one of its blocks, and syncs it, as a database would: overlayfs copies when it is opened."""
    block = random.Random(number).randbytes(4096)
    offset = random.Random(number + 77).randrange(size // 4096) * 4096
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, block, offset)
    os.fsync(descriptor)
    os.close(descriptor)
    return (time.perf_counter() - began) * 1000


@case("files", "copy-up", "4 KiB write and fsync into a file of the image", 7, 14 * GIB)
def copy_up(bench):
    """The first and the second, by the file's size."""
    first_and_second(bench, {"1 MiB": MIB, "64 MiB": 64 * MIB, "1 GiB": GIB} if not bench.quick else {"1 MiB": MIB, "64 MiB": 64 * MIB}, ALL)


@case("files", "copy-up-large", "4 KiB write and fsync into a large file of the image", 5, 15 * GIB)
def copy_up_large(bench):
    """4 GiB. All sides would not fit the space that a run may take: the two that matter."""
    first_and_second(bench, {"4 GiB": 4 * GIB} if not bench.quick else {"128 MiB": 128 * MIB}, [PlywoodRoots, Overlay])


def first_and_second(bench, sizes, kinds):
    """Rows for the first and the second write to files of these sizes."""
    targets = [target for target in (Target(2000, Overlay.name), Target(1, OverlayXfs.name)) if target.against in [kind.name for kind in kinds]]
    largest = max(sizes.values())
    rows = {}
    for name, size in sizes.items():
        for turn in ("first", "second"):
            # 1 GiB is what the design speaks of.
            wanted = targets if turn == "first" and size == largest and len(kinds) > 2 else []
            rows[name, turn] = bench.row(f"{name.replace(' ', '')}-{turn}", f"{turn} write, file of {name}", "ms", better="less",
                                         reference=Overlay.name, targets=wanted)

    def fill(directory):
        for name, size in sizes.items():
            write_file(os.path.join(directory, name.replace(" ", "-")), size)

    room = sum(sizes.values()) // 20 // MIB * MIB + 256 * MIB
    with bench.prepared(kinds, sum(sizes.values()) + room, rows.values(), fill, seal=True) as ready:
        for turn in bench.each_round():
            for roots in ready:
                bench.measure([rows[name, one] for name in sizes for one in ("first", "second")], roots.name,
                              lambda roots=roots, turn=turn: both_writes(roots, sizes, turn))


def both_writes(roots, sizes, turn):
    """First and second write for each size, in a new container."""
    root = roots.fresh()
    os.sync()
    values = []
    for name, size in sizes.items():
        path = os.path.join(root, name.replace(" ", "-"))
        values += [write_block_ms(path, size, turn * 2), write_block_ms(path, size, turn * 2 + 1)]
    roots.drop()
    return values


@case("files", "stat", "stat and open of 10 000 files of the image, cold", 5)
def stat_and_open(bench):
    """By the number of layers; the page cache, dentries and inodes are dropped before."""
    files = bench.size(10000, 2000)
    depths = (1, 20, 100) if not bench.quick else (1, 10)
    for layers in depths:
        row = bench.row(f"layers-{layers}", f"{layers} layer{'s' * (layers > 1)}", "ms", better="less", reference="overlayfs on ext4")
        with ExitStack() as stack:
            sides = {"plywood": layered_volume(bench, files, layers, stack), "overlayfs on ext4": layered_overlay(bench, files, layers, stack)}
            order = list(range(files))
            for number in bench.each_round():
                random.Random(number).shuffle(order)
                for label, root in sides.items():
                    bench.measure(row, label, lambda root=root: visit_ms(root, order))


def visit_ms(root, order):
    """stat and open of every file, nothing being cached."""
    drop_caches()
    began = time.perf_counter()
    for number in order:
        path = os.path.join(root, f"d{number % 100}", f"f{number}")
        os.stat(path)
        os.close(os.open(path, os.O_RDONLY))
    return (time.perf_counter() - began) * 1000


def write_layer(directory, files, layer, layers):
    """A layer's part of the files, over all directories."""
    for number in range(layer, files, layers):
        path = make_directory(directory, f"d{number % 100}")
        with open(os.path.join(path, f"f{number}"), "wb") as file:
            file.write(b"x" * 2000)


def layered_volume(bench, files, layers, stack):
    """A clone at the end of a chain of snapshots, mounted."""
    pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 8 * GIB, stack)
    pool.volume("layer-0", GIB)
    run("mkfs.ext4", "-q", "-F", pool.attach("layer-0"))
    pool.detach("layer-0")
    name = "layer-0"
    for layer in range(layers):
        if layer:
            pool.snapshot(name, f"snapshot-{layer}")
            name = f"layer-{layer}"
            pool.clone(f"snapshot-{layer}", name)
        with ExitStack() as mount:
            write_layer(mounted(pool, name, os.path.join(bench.scratch, f"mnt-{bench.number()}"), mount), files, layer, layers)
    pool.snapshot(name, "image")
    pool.clone("image", "container")
    return mounted(pool, "container", os.path.join(bench.scratch, f"mnt-{bench.number()}"), stack)


def layered_overlay(bench, files, layers, stack):
    """As many lower directories."""
    ground = make_directory(bench.scratch, f"layers-{bench.number()}")
    stack.callback(shutil.rmtree, ground, ignore_errors=True)
    # Short names: the options of a mount are one page.
    for layer in range(layers):
        write_layer(make_directory(ground, str(layer)), files, layer, layers)
    roots = Overlay(bench, 0)
    stack.callback(roots.tear_down)
    roots.ground = ground
    roots.layers = lambda: [str(layer) for layer in range(layers)]
    roots.count = 1
    return roots.make()


@case("files", "chown", "chown -R of files of the image", 8, 18 * GIB)
def chown(bench):
    """overlayfs copies the data of every file whose owner changes."""
    files, large = bench.size(100000, 5000), bench.size(4 * GIB, 64 * MIB)
    many = bench.row("many", f"{files} small files", "ms", better="less", reference=Overlay.name)
    one = bench.row("large", f"a file of {large >> 20} MiB", "ms", better="less", reference=Overlay.name)

    def fill(directory):
        write_layer(make_directory(directory, "many"), files, 0, 1)
        write_file(os.path.join(make_directory(directory, "one"), "large"), large)

    def change(roots):
        root = roots.fresh()
        os.sync()
        values = []
        for part in ("many", "one"):
            began = time.perf_counter()
            run("chown", "-R", "1000:1000", os.path.join(root, part))
            run("sync", "-f", root)
            values.append((time.perf_counter() - began) * 1000)
        roots.drop()
        return values

    kinds = [PlywoodRoots, Overlay, OverlayXfs]
    with bench.prepared(kinds, large * 5 // 4 + bench.size(2 * GIB, 256 * MIB), [many, one], fill, seal=True) as ready:
        for _ in bench.each_round():
            for roots in ready:
                bench.measure([many, one], roots.name, lambda roots=roots: change(roots))


@case("files", "tree", "A tree of the image and beside it", 6)
def tree(bench):
    """Renaming, removing and unpacking many files."""
    files = bench.size(20000, 2000)
    rename = bench.row("rename", f"mv of a directory of the image with {files} files", "ms", better="less", reference=Overlay.name)
    remove = bench.row("remove", f"rm -rf of {files} files of the image", "ms", better="less", reference=Overlay.name)
    unpack = bench.row("unpack", "tar -x of a source tree", "ms", better="less", reference=Overlay.name)
    archive = os.path.join(bench.scratch, "tree.tar")
    run("tar", "-cf", archive, "-C", "/usr", "include")

    def fill(directory):
        write_layer(make_directory(directory, "tree"), files, 0, 1)

    def timed(root, *words):
        began = time.perf_counter()
        run(*words)
        run("sync", "-f", root)
        return (time.perf_counter() - began) * 1000

    def all_three(roots):
        root = roots.fresh()
        values = [timed(root, "mv", os.path.join(root, "tree"), os.path.join(root, "moved")),
                  timed(root, "rm", "-rf", os.path.join(root, "moved")),
                  timed(root, "tar", "-xf", archive, "-C", root)]
        roots.drop()
        return values

    with bench.prepared([PlywoodRoots, Overlay, OverlayXfs, FuseOverlay, Plain], 2 * GIB, [rename, remove, unpack], fill, seal=True) as ready:
        for _ in bench.each_round():
            for roots in ready:
                bench.measure([rename, remove, unpack], roots.name, lambda roots=roots: all_three(roots))


@case("files", "databases", "Databases whose files are part of the image", 8)
def databases(bench):
    """sqlite with synchronous=FULL, and pgbench on a PostgreSQL cluster."""
    lite = bench.row("sqlite", "sqlite, synchronous=FULL, a row a transaction", "transactions/s", reference=Plain.name)
    post = bench.row("pgbench", "pgbench, 4 clients", "transactions/s", reference=Plain.name)
    kinds = [PlywoodRoots, Overlay, OverlayXfs, FuseOverlay, Plain]

    def fill(directory):
        base = sqlite3.connect(os.path.join(directory, "base.sqlite"))
        base.execute("create table facts (id integer primary key, fact text)")
        base.executemany("insert into facts (fact) values (?)", (("x" * 200,) for _ in range(bench.size(100000, 10000))))
        base.commit()
        base.close()
        cluster(directory, bench.size(10, 1))

    with bench.prepared(kinds, 2 * GIB, [lite, post], fill, seal=True) as ready:
        for _ in bench.each_round():
            for roots in ready:
                bench.measure(lite, roots.name, lambda roots=roots: sqlite_rate(roots.fresh(), bench.seconds))
                bench.measure(post, roots.name, lambda roots=roots: pgbench_rate(roots.fresh(), bench.seconds * 2))
                roots.drop()


def sqlite_rate(root, seconds):
    """Transactions a second."""
    base = sqlite3.connect(os.path.join(root, "base.sqlite"), isolation_level=None)
    base.execute("pragma synchronous = full")
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        base.execute("insert into facts (fact) values (?)", ("y" * 200,))
        count += 1
    rate = count / (time.perf_counter() - began)
    base.close()
    return rate


def postgres_programs():
    """Where Debian has the cluster's programs."""
    versions = sorted(os.listdir("/usr/lib/postgresql"), key=float) if os.path.isdir("/usr/lib/postgresql") else []
    if not versions:
        raise NotRun("postgresql is not installed")
    return os.path.join("/usr/lib/postgresql", versions[-1], "bin")


def as_postgres(*words, **options):
    """Runs a command as the user that Debian's package makes: initdb refuses root."""
    require("runuser")
    pwd.getpwnam("postgres")
    return run("runuser", "-u", "postgres", "--", *words, cwd="/", **options)


def reachable(path):
    """Lets others into the directories above."""
    while path not in ("/", "/tmp", "/var/tmp"):
        if os.stat(path).st_mode & 0o011 != 0o011:
            os.chmod(path, os.stat(path).st_mode | 0o011)
        path = os.path.dirname(path)


def cluster(directory, scale):
    """A PostgreSQL cluster with pgbench's tables."""
    programs = postgres_programs()
    data = make_directory(directory, "pg")
    shutil.chown(data, "postgres", "postgres")
    reachable(directory)
    as_postgres(f"{programs}/initdb", "-D", data, "-A", "trust", "--no-instructions")
    with Server(data) as server:
        as_postgres(f"{programs}/pgbench", "-h", server.socket, "-i", "-q", "-s", scale, "postgres")


class Server:
    """A running cluster, reached by a socket of its own."""

    def __init__(self, data):
        self.data, self.programs = data, postgres_programs()
        self.socket = f"/tmp/plywood-bench-pg-{os.getpid()}"

    def __enter__(self):
        make_directory(self.socket)
        shutil.chown(self.socket, "postgres", "postgres")
        # Its output goes nowhere: pg_ctl's child would keep our pipe open.
        done = subprocess.run(["runuser", "-u", "postgres", "--", f"{self.programs}/pg_ctl", "-D", self.data, "-w", "-o",
                               f"-c listen_addresses= -c unix_socket_directories={self.socket}", "start"], check=False, cwd="/",
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode:
            raise NotRun("PostgreSQL does not start")
        return self

    def __exit__(self, *_):
        as_postgres(f"{self.programs}/pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")
        shutil.rmtree(self.socket, ignore_errors=True)


def pgbench_rate(root, seconds):
    """Transactions a second."""
    data = os.path.join(root, "pg")
    # Not the data directory itself: PostgreSQL insists on it being private.
    reachable(root)
    with Server(data) as server:
        said = as_postgres(f"{server.programs}/pgbench", "-h", server.socket, "-n", "-c", 4, "-j", 2, "-T", seconds, "postgres")
    for line in said.splitlines():
        if line.startswith("tps ="):
            return float(line.split()[2])
    raise NotRun("pgbench told no rate")

"""Life cycle: what making, starting, deleting, importing and opening takes."""

import ctypes
import json
import mmap
import os
import signal
import subprocess
import threading
import time
from contextlib import ExitStack

from .bench import GIB, MIB, case
from .block import scattered
from .devices import Disk, Load, attach_loop, fio, host_file_system, make_ext4, mount, overwrite, sparse_file
from .plywood import Connection, Pool, new_uuid
from .results import Target
from .roots import BtrfsRoots, Overlay, OverlayXfs, Qcow2Roots, XfsReflinkRoots
from .shell import NotRun, make_directory, require, run, wait_until

AT_ONCE = 100
MS_NOATIME = 1024
LIBC = ctypes.CDLL(None, use_errno=True)


def timed_ms(function):
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def system_mount(device, directory):
    """mount(2), as a program that embeds plywood calls it."""
    if LIBC.mount(device.encode(), directory.encode(), b"ext4", MS_NOATIME, b"discard"):
        raise OSError(ctypes.get_errno(), f"mounting {device}")


def system_unmount(directory):
    """umount(2)."""
    if LIBC.umount2(directory.encode(), 0):
        raise OSError(ctypes.get_errno(), f"unmounting {directory}")


def image_pool(bench, stack, size):
    """A pool with a snapshot "origin" that has a small ext4 on it."""
    pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
    pool.volume("base", size)
    make_ext4(pool.attach("base"))
    pool.detach("base")
    pool.snapshot("base", "origin")
    return pool


class Embedded:
    """A container's root made and unmade over the control socket, step by step."""

    def __init__(self, pool, scratch, connection=None):
        self.pool, self.scratch = pool, scratch
        self.call = connection.call if connection else pool.call

    def make(self, name):
        """Answers the directory, and each step's milliseconds."""
        answer = {}
        directory = make_directory(self.scratch, name)
        steps = [timed_ms(lambda: self.call("clone-create", snapshot="origin", uuid=new_uuid(), name=name, size_bytes=None)),
                 timed_ms(lambda: answer.update(self.call("attach", name=name, read_only=False)))]
        device = answer["value"][0]["device"]
        steps.append(timed_ms(lambda: system_mount(device, directory)))
        return directory, steps

    def unmake(self, name):
        """The opposite."""
        system_unmount(os.path.join(self.scratch, name))
        self.call("detach", name=name)
        self.call("volume-delete", name=name)


@case("life", "start", "Clone, attach and mount; and back", 6)
def start(bench):
    """One at a time on a loop device that was used before, and 100 at once. A loop device that is new costs more; see the steps."""
    one = bench.row("one", "one: a command (plywood mount SNAPSHOT, or mount)", "ms", better="less", targets=[Target(15)])
    socket = bench.row("socket", "one: over the control socket and mount(2)", "ms", better="less", targets=[Target(15)])
    steps = [bench.row(f"step-{name}", f"of which {name}", "ms", better="less") for name in ("clone", "attach", "mount(2)")]
    new = bench.row("new-device", "one: over the control socket, on a loop device never used before", "ms", better="less", targets=[Target(15)])
    back = bench.row("back", "unmount, detach, delete: a command", "ms", better="less")
    many = bench.row("hundred", f"{AT_ONCE} at once, in all: commands", "ms", better="less", targets=[Target(500)])
    many_back = bench.row("hundred-back", f"{AT_ONCE} at once, and back: commands", "ms", better="less")
    many_socket = bench.row("hundred-socket", f"{AT_ONCE} at once, in all: over the control socket and mount(2)", "ms", better="less",
                            targets=[Target(500)])
    many_socket_back = bench.row("hundred-socket-back", f"{AT_ONCE} at once, and back: over the control socket", "ms", better="less")
    size = 256 * MIB
    with ExitStack() as stack:
        pool = image_pool(bench, stack, size)
        embedded = Embedded(pool, make_directory(bench.scratch, "embedded"))
        directory = make_directory(bench.scratch, "mounted")
        others = stack.enter_context(bench.prepared([Overlay, OverlayXfs, XfsReflinkRoots, BtrfsRoots, Qcow2Roots], size, [one, back],
                                                    lambda directory: None, seal=True))
        for number in bench.each_round():
            # Nine, and the median of them, since each takes little; the first finds what was idle.
            turns = [(timed_ms(lambda: pool.command("mount", "origin", directory)), timed_ms(lambda: pool.command("unmount", directory)))
                     for _ in range(9)]
            one.add("plywood", middle(turn[0] for turn in turns))
            back.add("plywood", middle(turn[1] for turn in turns))
            parts = []
            for turn in range(9):
                name = f"e{number}-{turn}"
                parts.append(embedded.make(name)[1])
                embedded.unmake(name)
            socket.add("plywood", middle(sum(part) for part in parts))
            for index, row in enumerate(steps):
                row.add("plywood", middle(part[index] for part in parts))
            for peer in others:
                bench.measure([one, back], peer.name, lambda peer=peer: (timed_ms(peer.fresh), timed_ms(peer.drop)))
            bench.measure(new, "plywood", lambda number=number: on_new_device(bench, embedded, number))
            bench.measure([many, many_back], "plywood", lambda number=number: commands_at_once(bench, pool, number))
            bench.measure([many_socket, many_socket_back], "plywood", lambda: embedded_at_once(bench, pool))


def middle(values):
    """The median."""
    values = sorted(values)
    return values[len(values) // 2]


def on_new_device(bench, embedded, number):
    """All free loop devices are taken, so that the kernel makes another."""
    with ExitStack() as stack:
        filler = sparse_file(os.path.join(bench.scratch, "filler"), MIB, stack)
        for _ in range(free_loops()):
            attach_loop(filler, stack, direct=False)
        name = f"new-{number}"
        steps = embedded.make(name)[1]
        embedded.unmake(name)
        return sum(steps)


def free_loops():
    """Loop devices that exist and are not used."""
    devices = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    return sum(not os.path.exists(f"/sys/block/{name}/loop") for name in devices)


def commands_at_once(bench, pool, number):
    """100 commands at once: until the last is mounted; and back."""
    places = [make_directory(bench.scratch, "hundred", str(index)) for index in range(AT_ONCE)]
    bench.progress(f"{AT_ONCE} at once", (number + 0.8) / bench.rounds)
    try:
        there = all_at_once(places, lambda place: pool.command("mount", "origin", place))
    finally:
        back = all_at_once(places, lambda place: os.path.ismount(place) and pool.command("unmount", place))
    return there, back


def embedded_at_once(bench, pool):
    """The same by a program that embeds plywood: a thread for each, which connects and hangs up (the daemon serves 64 at a time)."""
    scratch = make_directory(bench.scratch, "hundred-embedded")
    uuid = pool.info()["uuid"]

    def over_connection(act):
        connection = Connection(uuid)
        try:
            return act(Embedded(pool, scratch, connection))
        finally:
            connection.close()

    names = [f"h{index}" for index in range(AT_ONCE)]
    try:
        there = all_at_once(names, lambda name: over_connection(lambda embedded: embedded.make(name)))
    finally:
        back = all_at_once(names, lambda name: os.path.ismount(os.path.join(scratch, name))
                           and over_connection(lambda embedded: embedded.unmake(name)))
    return there, back


def all_at_once(things, function):
    """How long it takes until the function has been called for each thing, by a thread of its own."""
    failures = []

    def guarded(thing):
        try:
            function(thing)
        except (NotRun, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(thing,)) for thing in things]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = (time.perf_counter() - began) * 1000
    if failures:
        raise NotRun(f"{len(failures)} of {AT_ONCE} failed: {failures[0]}")
    return took


@case("life", "snapshot", "Snapshot of a volume with many scattered blocks, under load", 6, 10 * GIB)
def snapshot(bench):
    """100 GiB with 1 M scattered blocks, beside random writes at depth 4; an XFS file with as many extents as fit its disk."""
    blocks, size = bench.size(1_000_000, 32768), bench.size(100 * GIB, 8 * GIB)
    extents = bench.size(32768, 4096)
    row = bench.row("", f"snapshot of {size >> 30} GiB with {blocks} scattered blocks (XFS: {extents} extents)", "ms", better="less",
                    reference="XFS reflink copy", targets=[Target(1, "one flush and 1 ms", text="one flush and 1 ms"),
                             Target(1, "one flush of the host's file and 1 ms", text="one flush of the host's file and 1 ms")])
    latency = bench.row("latency", "99th percentile of 4 KiB writes at depth 32, a snapshot each 200 ms", "ms", better="less")
    added = bench.row("latency-added", "which is more than without snapshots by", "ms", better="less", targets=[Target(2)])
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), size * 2, stack)
        pool.volume("wide", size)
        device = pool.attach("wide")
        step = size // blocks // 4096 * 4096
        bench.progress("scattering blocks", 0.1)
        fio(device, f"write:{step - 4096}", "4k", 64, size, io_size=blocks * 4096, end_fsync=1)
        pool.settle()
        disk = Disk(os.path.join(bench.scratch, "xfs"), 4 * GIB, stack)
        directory = host_file_system(disk, "xfs", os.path.join(bench.scratch, "xfs-mnt"), stack)
        image = sparse_file(os.path.join(directory, "image"), extents * 8192)
        fio(image, "write:4k", "4k", 64, extents * 8192, io_size=extents * 4096, end_fsync=1)
        flush = os.open(device, os.O_RDWR)
        stack.callback(os.close, flush)
        beside = os.open(sparse_file(os.path.join(bench.scratch, "flushed"), 4096), os.O_RDWR)
        stack.callback(os.close, beside)
        for number in bench.each_round():
            with Load(device, "randwrite", "4k", 4, size):
                time.sleep(1)
                row.add("one flush and 1 ms", flushed(flush) + 1)
                row.add("one flush of the host's file and 1 ms", flushed(beside) + 1)
                names = [f"s{number}-{turn}" for turn in range(9)]
                times = [timed_ms(lambda name=name: pool.call("snapshot-create", volume="wide", uuid=new_uuid(), name=name)) for name in names]
                row.add("plywood", middle(times))
            for name in names:
                pool.call("snapshot-delete", name=name)
            copy = os.path.join(directory, "copy")
            row.add("XFS reflink copy", timed_ms(lambda copy=copy: run("cp", "--reflink=always", image, copy)))
            os.unlink(copy)
            pool.settle()
            without = write_p99(bench, device, size)
            with RepeatedSnapshots(pool):
                snapshots = write_p99(bench, device, size)
            latency.add("plywood, no snapshots", without)
            latency.add("plywood", snapshots)
            added.add("plywood", max(0.0, snapshots - without))


def flushed(file):
    """How long a flush after a write of 4 KiB takes, in ms."""
    times = []
    for _ in range(9):
        os.pwrite(file, b"x" * 4096, 0)
        times.append(timed_ms(lambda: os.fdatasync(file)))
    return middle(times)


def write_p99(bench, device, size):
    """The 99th percentile of the completion latency of random writes at depth 32."""
    job = fio(device, "randwrite", "4k", 32, size, seconds=bench.seconds, time_based=True)
    return job["write"]["clat_ns"]["percentile"]["99.000000"] / 1e6


class RepeatedSnapshots:
    """A snapshot each 200 ms, by a thread; deleted at the end."""

    def __init__(self, pool):
        self.pool, self.ended, self.names = pool, threading.Event(), []
        self.thread = threading.Thread(target=self.go_on)

    def go_on(self):
        """Until the end."""
        while not self.ended.wait(0.2):
            name = f"repeated-{len(self.names)}-{time.monotonic_ns()}"
            self.pool.call("snapshot-create", volume="wide", uuid=new_uuid(), name=name)
            self.names.append(name)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        for name in self.names:
            self.pool.call("snapshot-delete", name=name)


def archive(bench):
    """The path of that archive."""
    path = os.path.join(bench.scratch, "rootfs.tar")
    if not os.path.exists(path):
        run(os.path.join(bench.root, "tools/test-rootfs"), path, timeout_seconds=1200)
    return path


@case("life", "container", "Start of a container until its first output", 5)
def container(bench):
    """`plywood run --rm` against runc on overlayfs with the same image and the same bundle's settings."""
    require("runc")
    first = bench.row("first", "until its first output", "ms", better="less", reference="runc on overlayfs")
    whole = bench.row("whole", "and until it is gone", "ms", better="less", reference="runc on overlayfs")
    tar = archive(bench)
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
        pool.command("image", "import", f"tar:{tar}", "debian")
        roots = Overlay(bench, 0)
        stack.callback(roots.tear_down)
        roots.prepare(lambda directory: run("tar", "-xf", tar, "-C", directory, "--xattrs", "--numeric-owner"))
        bundle = make_directory(bench.scratch, "bundle")
        run("runc", "spec", cwd=bundle)
        with open(os.path.join(bundle, "config.json"), encoding="utf-8") as file:
            spec = json.load(file)
        spec["process"].update(terminal=False, args=["/bin/echo", "here"])
        spec["root"]["readonly"] = False
        spec["linux"]["namespaces"] = [one for one in spec["linux"]["namespaces"] if one["type"] != "network"]
        def ours(_turn):
            return echo_ms(bench.program, "--pool", pool.path, "run", "--rm", "debian", "--", "/bin/echo", "here")

        def overlay(turn):
            began = time.perf_counter()
            spec["root"]["path"] = roots.fresh()
            with open(os.path.join(bundle, "config.json"), "w", encoding="utf-8") as file:
                json.dump(spec, file)
            before = (time.perf_counter() - began) * 1000
            until, all_of_it = echo_ms("runc", "run", "--bundle", bundle, f"bench-{os.getpid()}-{turn}")
            return before + until, before + all_of_it + timed_ms(roots.drop)

        def thrice(function):
            turns = [function(turn) for turn in range(3)]
            return middle(turn[0] for turn in turns), middle(turn[1] for turn in turns)

        for _ in bench.each_round():
            bench.measure([first, whole], "plywood", lambda: thrice(ours))
            bench.measure([first, whole], "runc on overlayfs", lambda: thrice(overlay))


def echo_ms(*words):
    """Runs a container that says one word: milliseconds until the word, and until the end."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.stdout.readline()
    until = (time.perf_counter() - began) * 1000
    _, complaint = process.communicate(timeout=60)
    if "here" not in said:
        raise NotRun(f"{os.path.basename(words[0])}: {complaint.strip() or said!r}")
    return until, (time.perf_counter() - began) * 1000


@case("life", "import", "Import of a Debian image", 5)
def import_image(bench):
    """`plywood image import tar:` against tar -x onto ext4 on a loop on a raw file, synced."""
    row = bench.row("", "the whole root file system, synced", "ms", better="less", reference="tar -x onto ext4 on a raw loop")
    tar = archive(bench)
    for _ in bench.each_round():
        def ours():
            with ExitStack() as stack:
                pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
                pool.attach(pool.volume("first", GIB))
                return timed_ms(lambda: pool.command("image", "import", f"tar:{tar}", "debian"))

        def theirs():
            with ExitStack() as stack:
                device = attach_loop(sparse_file(os.path.join(bench.scratch, "raw"), 4 * GIB, stack), stack)

                def unpack():
                    run("mkfs.ext4", "-q", "-F", device)
                    directory = mount(device, os.path.join(bench.scratch, "raw-mnt"), stack)
                    run("tar", "-xf", tar, "-C", directory, "--xattrs", "--numeric-owner")
                    run("sync", "-f", directory)

                return timed_ms(unpack)

        bench.measure(row, "plywood", ours)
        bench.measure(row, "tar -x onto ext4 on a raw loop", theirs)


@case("life", "delete", "Delete of a clone with many blocks of its own", 5, 12 * GIB)
def delete(bench):
    """Until it answers, and until its blocks are free."""
    size = bench.size(4 * GIB, 256 * MIB)
    answer = bench.row("answer", f"delete of a clone with {size // 4096} blocks answers", "ms", better="less", reference="rm of a raw file")
    free = bench.row("free", "all its blocks are free after", "ms", better="less")
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), size * 4, stack)
        pool.volume("base", size)
        pool.attach("base")
        pool.detach("base")
        pool.snapshot("base", "origin")
        for number in bench.each_round():
            name = pool.clone("origin", f"clone-{number}")
            overwrite(pool.attach(name), size)
            pool.detach(name)
            pool.settle()
            began = time.perf_counter()
            answer.add("plywood", timed_ms(lambda name=name: pool.call("volume-delete", name=name)))
            wait_until(lambda: pool.call("pool-info")["value"]["carcasses"] == 0, "the blocks are free", 120, 0.002)
            free.add("plywood", (time.perf_counter() - began) * 1000)
            raw = sparse_file(os.path.join(bench.scratch, "raw"), size)
            overwrite(raw, size)
            answer.add("rm of a raw file", timed_ms(lambda raw=raw: os.unlink(raw)))
            pool.settle()


def kill_pool(pool):
    """Ends front and engine process with SIGKILL, as a crash of the machine would, but for the page cache of the kernel."""
    info = pool.info()
    pool.hang_up()
    pool.orphans += [attachment["device"] for attachment in info["attached"]]
    for pid in (info["front_pid"], info["engine_pid"]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    wait_until(lambda: not is_alive(info["front_pid"]) and not is_alive(info["engine_pid"]), "the daemon's end")


def is_alive(pid):
    """Whether a process runs. One that has ended and nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def opened_ms(pool):
    """How long it takes from no daemon to an answer about the pool by a daemon that serves it."""
    began = time.perf_counter()
    process = subprocess.Popen([pool.program, "--pool", pool.path, "serve"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while True:
        try:
            info = json.loads(run(pool.program, "--pool", pool.path, "pool", "info", "--json"))
            info = info.get("pool", info)
            if info.get("engine_pid"):
                return (time.perf_counter() - began) * 1000, info
        except NotRun:
            pass
        if process.poll() is not None:
            raise NotRun(f"plywood serve ended with {process.returncode}")
        if time.perf_counter() - began > 60:
            raise NotRun("the pool did not open within 60 s")
        time.sleep(0.005)


@case("life", "open", "Open after a crash", 6, 12 * GIB)
def open_after_crash(bench):
    """The daemon is killed under random writes, front and engine; until another serves. The journal has what the writes left."""
    size, volumes = bench.size(1024 * GIB, 64 * GIB), bench.size(10000, 500)
    mapped = bench.row("mapped", f"a volume with leaves all over {size >> 30} GiB", "ms", better="less", targets=[Target(1000)])
    named = bench.row("volumes", f"{volumes} volumes", "ms", better="less", targets=[Target(1000)])
    with ExitStack() as stack:
        device, pool = scattered(bench, size, stack)
        for _ in bench.each_round():
            bench.measure(mapped, "plywood", lambda: crash_and_open(bench, pool, "wide", size))
        mapped.note = "plywood serve, until it answers; the writes before reach over all leaves"
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
        pool.volume("wide", GIB)
        pool.attach("wide")
        for number in range(volumes - 1):
            pool.call("volume-create", uuid=new_uuid(), name=f"volume-{number}", size_bytes=GIB, sector_size=4096, quota_bytes=0)
            if number % 1000 == 0:
                bench.progress(f"{number} volumes", 0.5)
        for _ in bench.each_round():
            bench.measure(named, "plywood", lambda: crash_and_open(bench, pool, "wide", GIB))


def crash_and_open(bench, pool, name, size):
    """Writes, kills, opens."""
    device = pool.attach(name)
    with Load(device, "randwrite", "4k", 32, size):
        time.sleep(bench.seconds)
        kill_pool(pool)
    took, _ = opened_ms(pool)
    # Takes away the devices of the daemon that was killed, as soon as nobody has them open.
    pool.command("detach", "--all")
    return took


@case("life", "kill", "Engine process killed: until I/O goes on", 3)
def kill(bench):
    """The longest pause that a writer at depth 1 sees when the engine process is killed (-9)."""
    row = bench.row("", "pause of a writer", "ms", better="less", targets=[Target(1000)])
    size = bench.size(GIB, 256 * MIB)
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 8 * GIB, stack)
        pool.volume("volume", size)
        device = pool.attach("volume")
        overwrite(device, size)
        for _ in bench.each_round():
            row.add("plywood", pause_ms(pool, device, size))


def pause_ms(pool, device, size):
    """Kills the engine under direct writes."""
    buffer = mmap.mmap(-1, 4096)
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
    longest, last, ends = 0.0, time.perf_counter(), None
    engine = pool.info()["engine_pid"]
    block = 0
    began = time.perf_counter()
    try:
        while ends is None or time.perf_counter() < ends:
            block = (block * 7919 + 104729) % (size // 4096)
            os.pwrite(descriptor, buffer, block * 4096)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            if ends is None and now - began > 0.5:
                longest = 0.0
                os.kill(engine, signal.SIGKILL)
                ends = now + 2.5
    finally:
        os.close(descriptor)
    return longest * 1000

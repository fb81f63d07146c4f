"""Memory and CPU."""

import os
import re
import time
from contextlib import ExitStack

from .bench import GIB, MIB, case
from .devices import fio, make_ext4, mount
from .peers import Ceiling, Plywood, RawLoop, Split
from .plywood import Pool, mounted, new_uuid
from .results import Target
from .roots import Overlay
from .shell import drop_caches, make_directory, run


def resident_bytes(pool):
    """Of front and engine process, a shared page counted once: proportional set size."""
    info = pool.call("pool-info")["value"]
    total = 0
    for pid in (info["front_pid"], info["engine_pid"]):
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            total += int(re.search(r"^Pss:\s+(\d+)", file.read(), re.M).group(1)) * 1024
    return total


def payload_bytes(pool):
    """The part of it that is the front end's budget: what the two share."""
    info = pool.call("pool-info")["value"]
    with open(f"/proc/{info['front_pid']}/smaps_rollup", encoding="ascii") as file:
        text = file.read()
    shared = re.search(r"^Pss_Shmem:\s+(\d+)", text, re.M)
    return int(shared.group(1)) * 1024 * 2 if shared else 0


@case("space", "resident", "Resident memory of front and engine process", 7, 8 * GIB)
def resident(bench):
    """With one volume in use, all its metadata having been touched; then with more attached that do nothing."""
    size = bench.size(4 * GIB, 512 * MIB)
    steps = [1, 100, 1000] if not bench.quick else [1, 20]
    one = bench.row("one", "one volume in use, without the payload buffers", "bytes", better="less", targets=[Target(128 * MIB)])
    budget = bench.row("budget", "payload buffers and queues, shared by the two processes", "bytes", better="less")
    rows = {count: bench.row(f"attached-{count}", f"{count} attached", "bytes", better="less") for count in steps[1:]}
    each = bench.row("each", "each further one, attached and idle", "bytes", better="less", targets=[Target(256 << 10)])
    for _ in bench.each_round():
        with ExitStack() as stack:
            pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 32 * GIB, stack)
            pool.volume("used", size)
            device = pool.attach("used")
            fio(device, "write", "1M", 8, size)
            pool.snapshot("used", "origin")
            fio(device, "randrw", "4k", 128, size, seconds=bench.seconds * 2, time_based=True)
            shared = payload_bytes(pool)
            first = resident_bytes(pool) - shared
            one.add("plywood", first)
            budget.add("plywood", shared)
            attached = 1
            for count in steps[1:]:
                while attached < count:
                    name = f"idle-{attached}"
                    pool.call("clone-create", snapshot="origin", uuid=new_uuid(), name=name, size_bytes=None)
                    pool.call("attach", name=name, read_only=False)
                    attached += 1
                    if attached % 100 == 0:
                        bench.progress(f"{attached} attached", 0.5)
                time.sleep(1)
                now = resident_bytes(pool)
                rows[count].add("plywood", now)
            each.add("plywood", max(0.0, (resident_bytes(pool) - payload_bytes(pool) - first) / (attached - 1)))


@case("space", "page-cache", "Page cache of containers of one image that all read the same files", 5)
def page_cache(bench):
    """Said plainly: each of our containers has a block device of its own, so the kernel holds each file once a container; overlayfs
    holds it once in all."""
    containers, size = bench.size(50, 5), bench.size(128 * MIB, 32 * MIB)
    row = bench.row("", f"{containers} containers, each of which reads {size >> 20} MiB", "bytes", better="less", reference=Overlay.name)

    def fill(directory):
        with open(os.path.join(directory, "file"), "wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))

    for _ in bench.each_round():
        bench.measure(row, "plywood", lambda: cached_by_plywood(bench, containers, size, fill))
        bench.measure(row, Overlay.name, lambda: cached_by_overlay(bench, containers, size, fill))


def cached_bytes():
    """The kernel's page cache."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(re.search(r"^Cached:\s+(\d+)", file.read(), re.M).group(1)) * 1024


def cached_after(roots):
    """How much more is cached when every container has read the file."""
    drop_caches()
    before = cached_bytes()
    for root in roots:
        run("dd", f"if={root}/file", "of=/dev/null", "bs=1M", "status=none")
    return max(0, cached_bytes() - before)


def cached_by_plywood(bench, containers, size, fill):
    """Clones of one snapshot."""
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
        pool.volume("base", size * 2 + 64 * MIB)
        make_ext4(pool.attach("base"))
        with ExitStack() as filling:
            fill(mount(pool.attach("base"), os.path.join(bench.scratch, f"mnt-{bench.number()}"), filling))
        pool.detach("base")
        pool.snapshot("base", "origin")
        return cached_after([mounted(pool, "origin", os.path.join(bench.scratch, f"mnt-{bench.number()}"), stack) for _ in range(containers)])


def cached_by_overlay(bench, containers, size, fill):
    """Unions over one directory."""
    del size
    with ExitStack() as stack:
        first = Overlay(bench, 0)
        stack.callback(first.tear_down)
        first.prepare(fill)
        roots = []
        for number in range(containers):
            one = Overlay(bench, 0)
            stack.callback(one.tear_down)
            one.ground, one.image, one.count = make_directory(one.scratch, "ground"), first.image, number
            roots.append(one.make())
        return cached_after(roots)


@case("space", "cpu", "CPU for an I/O, of the whole machine", 5, 10 * GIB)
def cpu(bench):
    """Busy time of all processors while fio runs at a fixed rate that all can reach, fio's own included, for each I/O. What else runs
    on the machine is in it, so it wants a machine with nothing else to do."""
    size = bench.size(GIB, 256 * MIB)
    rows = {}
    for rw in ("randread", "randwrite"):
        rows[rw] = bench.row(rw, f"4 KiB random {rw[4:]}, 10 k a second at depth 8", "us", better="less", reference=RawLoop.name)
    with bench.prepared([RawLoop, Ceiling, Split, Plywood], size, rows.values()) as peers:
        for _ in bench.each_round():
            for rw, row in rows.items():
                for peer in peers:
                    bench.measure(row, peer.name, lambda peer=peer, rw=rw: busy_us(bench, peer.base, rw, size))


def busy_seconds():
    """Of all processors, since the machine was started: user, nice, system, irq, softirq."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    return (fields[0] + fields[1] + fields[2] + fields[5] + fields[6]) / os.sysconf("SC_CLK_TCK")


def busy_us(bench, device, rw, size):
    """Microseconds for an I/O."""
    before = busy_seconds()
    job = fio(device, rw, "4k", 8, size, seconds=bench.seconds * 2, time_based=True, rate_iops=10000)
    side = job["read" if rw == "randread" else "write"]
    return (busy_seconds() - before) * 1e6 / side["total_ios"]

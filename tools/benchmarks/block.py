"""Block level: what fio sees on the devices themselves."""

import functools
import itertools
import os
import time
from contextlib import ExitStack

from .bench import GIB, MIB, case
from .devices import fio, operations_a_second, overwrite, write_scattered
from .peers import CLONERS, REFERENCES, Plywood, RawLoop, Split
from .plywood import Pool
from .results import Target
from .shell import run

PATTERNS = [  # name, what fio calls it, block size, depth
    ("randread-4k-1", "randread", "4k", 1),
    ("randwrite-4k-1", "randwrite", "4k", 1),
    ("randread-4k-32", "randread", "4k", 32),
    ("randwrite-4k-32", "randwrite", "4k", 32),
    ("randread-4k-128", "randread", "4k", 128),
    ("randwrite-4k-128", "randwrite", "4k", 128),
    ("read-1M-8", "read", "1M", 8),
    ("write-1M-8", "write", "1M", 8),
]
AGAINST_RAW = {1: 0.55, 32: 0.68, 128: 0.85, 8: 0.95}


def title_of(rw, block_size, depth):
    """A pattern in words."""
    order = "random" if rw.startswith("rand") else "sequential"
    side = "read" if rw.endswith("read") else "write"
    return f"{block_size.replace('k', ' KiB').replace('M', ' MiB')} {order} {side}, depth {depth}"


def rate(bench, device, pattern, size_bytes, **more):
    """One fio job of a pattern."""
    _, rw, block_size, depth = pattern
    job = fio(device, rw, block_size, depth, size_bytes, seconds=bench.seconds, time_based=True, **more)
    return operations_a_second(job, rw)


def pattern_rows(bench, targets, reference=None, only=None):
    """A row a pattern."""
    rows = {}
    for pattern in PATTERNS:
        if only and pattern[0] not in only:
            continue
        name, rw, block_size, depth = pattern
        rows[pattern] = bench.row(name, title_of(rw, block_size, depth), "IOPS", reference=reference,
                                  targets=targets(rw, depth))
    return rows


@case("block", "steady", "Every block provisioned, metadata cached", 9, 12 * GIB)
def steady(bench):
    """The cases of tools/compare, on a volume all of whose blocks are its own."""

    def targets(_rw, depth):
        return [Target(0.95, "split", text="split"), Target(0.85 if depth == 1 else 0.90, "ceiling", text="ceiling"),
                Target(AGAINST_RAW[depth], RawLoop.name, text="loop on raw file")]

    size = bench.size(2 * GIB, 256 * MIB)
    rows = pattern_rows(bench, targets, RawLoop.name)
    with bench.prepared([*REFERENCES, Plywood], size, rows.values()) as peers:
        for _ in bench.each_round():
            for pattern, row in rows.items():
                for peer in peers:
                    bench.measure(row, peer.name, lambda peer=peer, pattern=pattern: rate(bench, peer.base, pattern, size))


@case("block", "clone", "Fresh clone of a full volume: every block shared", 14, 14 * GIB)
def clone(bench):
    """Each write job has a clone of its own, and writes no block twice."""

    def targets(rw, depth):
        if rw == "randwrite" and depth == 32:
            return [Target(0.85, "split", text="split"), Target(2.5, "XFS reflink copy", text="XFS reflink copy"),
                    Target(2.5, "qcow2", text="qcow2")]
        return []

    size = bench.size(GIB, 256 * MIB)
    only = None if not bench.quick else {"randwrite-4k-32", "randread-4k-32", "randwrite-4k-1"}
    rows = pattern_rows(bench, targets, "split", only)
    with bench.prepared([Split, *CLONERS], size, rows.values(), seal=True) as peers:
        for _ in bench.each_round():
            for pattern, row in rows.items():
                for peer in peers:
                    def once(peer=peer, pattern=pattern):
                        device = peer.fresh() if peer.clones else peer.base
                        _, rw, block_size, depth = pattern
                        # Not time_based: it ends when every block has been written once.
                        job = fio(device, rw, block_size, depth, size, seconds=bench.seconds)
                        return operations_a_second(job, rw)
                    bench.measure(row, peer.name, once)
                    if peer.clones:
                        bench.measure([], peer.name, peer.drop)


@case("block", "depth", "Reads down a chain, each layer having overwritten scattered blocks", 9, 8 * GIB)
def depth(bench):
    """Clones of clones. Labels are depths; the reference is depth 1. What is read is never written; what is written is a new clone each time."""
    size = bench.size(GIB, 256 * MIB)
    depths = [1, 100, 1000] if not bench.quick else [1, 20, 60]
    labels = {deep: "plywood" if deep == depths[-1] else f"plywood, depth {deep}" for deep in depths}
    first = labels[1]
    rows = pattern_rows(bench, lambda rw, _depth: [Target(0.95, first, text="depth 1")] if rw == "randread" else [], first,
                        {"randread-4k-1", "randread-4k-32", "randwrite-4k-32"} if bench.quick else None)
    for row in rows.values():
        row.note = f"plywood: depth {depths[-1]}"
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
        name, device = pool.volume("layer-0", size), None
        device = pool.attach(name)
        overwrite(device, size)
        attached, origins = {}, {}
        deep = 0
        while deep < depths[-1]:
            pool.detach(name)
            # A snapshot and a clone of it: two steps down.
            snapshot, below = f"snapshot-{deep}", deep
            pool.snapshot(name, snapshot)
            name = f"layer-{deep + 2}"
            pool.clone(snapshot, name)
            deep += 2
            device = pool.attach(name)
            write_scattered(device, size, 64, deep)
            for wanted in depths:
                if below < wanted <= deep and wanted not in attached:
                    sibling = f"at-depth-{wanted}"
                    pool.clone(snapshot, sibling)
                    attached[wanted], origins[wanted] = pool.attach(sibling), snapshot
            if deep % 50 == 0:
                bench.progress(f"depth {deep}", 0.5 * deep / depths[-1])

        def written(wanted, pattern):
            pool.clone(origins[wanted], "written")
            value = rate(bench, pool.attach("written"), pattern, size)
            pool.detach("written")
            pool.delete("written")
            pool.settle()
            return value

        for _ in bench.each_round():
            for pattern, row in rows.items():
                for wanted in depths:
                    if pattern[1].endswith("write"):
                        once = functools.partial(written, wanted, pattern)
                    else:
                        once = functools.partial(rate, bench, attached[wanted], pattern, size)
                    bench.measure(row, labels[wanted], once)


@case("block", "cold", "Cold metadata: random over 1 TiB of leaves", 6, 12 * GIB)
def cold(bench):
    """A block in each leaf of 1 TiB, so that nearly every access loads a leaf; the pool's cache is its default."""
    size = bench.size(1024 * GIB, 64 * GIB)
    raw_size = bench.size(2 * GIB, 256 * MIB)
    patterns = [pattern for pattern in PATTERNS if pattern[2] == "4k"]
    rows = pattern_rows(bench, lambda _rw, _depth: [Target(0.5, "split", text="split")], "split",
                        {pattern[0] for pattern in patterns})
    # A job that went where the one before it was would find its leaves in the cache.
    seeds = itertools.count(1)
    with ExitStack() as stack:
        device, _pool = scattered(bench, size, stack)
        with bench.prepared([Split], raw_size, rows.values()) as peers:
            for _ in bench.each_round():
                for pattern, row in rows.items():
                    for peer in peers:
                        bench.measure(row, peer.name, lambda peer=peer, pattern=pattern: rate(bench, peer.base, pattern, raw_size))
                    bench.measure(row, "plywood", lambda pattern=pattern: rate(
                        bench, device, pattern, size, blockalign="1M", randseed=next(seeds)))


def scattered(bench, size, stack, name="wide"):
    """A volume with one block in each mebibyte: a leaf of its own. Answers its device, and the pool."""
    pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), size // 64 + 16 * GIB, stack)
    pool.volume(name, size)
    device = pool.attach(name)
    bench.progress("writing a block in each leaf", 0.1)
    fio(device, "write:1020k", "4k", 64, size, io_size=size // MIB * 4096, end_fsync=1)
    return device, pool


@case("block", "aged", "After aging: overwritten ten times at random, 50 snapshots rotating, 90 % full", 12, 8 * GIB)
def aged(bench):
    """Two pools side by side, one fresh and one aged, with the same content."""
    size, pool_size = bench.size(512 * MIB, 64 * MIB), bench.size(6 * GIB, GIB)
    snapshots, times = bench.size(50, 10), bench.size(10, 20)
    rows = pattern_rows(bench, lambda _rw, _depth: [Target(0.7, "plywood, fresh", text="fresh")], "plywood, fresh",
                        {"randread-4k-32", "randwrite-4k-32"} if bench.quick else None)
    with ExitStack() as stack:
        fresh = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), pool_size, stack)
        fresh.volume("fresh", size)
        fresh_device = fresh.attach("fresh")
        overwrite(fresh_device, size)
        device, taken = aged_pool(bench, size, pool_size, snapshots, times, stack)
        for row in rows.values():
            row.note = f"{taken} % of the aged pool taken, {snapshots} snapshots; its volume's blocks are its own"
        for _ in bench.each_round():
            for pattern, row in rows.items():
                bench.measure(row, "plywood, fresh", lambda pattern=pattern: rate(bench, fresh_device, pattern, size))
                bench.measure(row, "plywood", lambda pattern=pattern: rate(bench, device, pattern, size))


def aged_pool(bench, size, pool_size, snapshots, times, stack):
    """A pool with a volume that has a hard life behind it. Answers the volume's device, and how full the pool is, in percent."""
    pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), pool_size, stack)
    # So much is written between two snapshots that all of them together take most of the room; the volume keeps twice its own.
    step = (pool.info()["free_bytes"] * 7 // 10 - 2 * size) // snapshots // 4096 * 4096
    pool.volume("aged", size)
    device = pool.attach("aged")
    overwrite(device, size)
    rounds = max(size * times // step, snapshots + 2)
    for number in range(rounds):
        if number % 10 == 0:
            bench.progress(f"aging, {number} of {rounds}", 0.5 * number / rounds)
        pool.snapshot("aged", f"snapshot-{number}")
        if number >= snapshots:
            pool.delete(f"snapshot-{number - snapshots}")
        fio(device, "randwrite", "4k", 32, size, io_size=step, randseed=number + 1)
    # Every block once more: a write to a shared block is another question, and wants room that there is none of afterwards.
    fio(device, "randwrite", "4k", 32, size, randseed=0)
    pool.detach("aged")
    filler = (pool.at_rest()["free_bytes"] - pool_size // 10) // MIB * MIB
    if filler > 0:
        pool.volume("filler", filler)
        overwrite(pool.attach("filler"), filler)
        pool.detach("filler")
    info = pool.at_rest()
    return pool.attach("aged"), 100 - info["free_bytes"] * 100 // pool_size


@case("block", "discard", "Discard of 1 TiB", 5, 14 * GIB)
def discard(bench):
    """blkdiscard of a volume with a block in each leaf, and of dense data: until it answers, and until the host has the space back."""
    size, dense = bench.size(1024 * GIB, 64 * GIB), bench.size(6 * GIB, 512 * MIB)
    answer = bench.row("answer", f"blkdiscard of {size >> 30} GiB answers", "ms", better="less", targets=[Target(1000)])
    back = bench.row("back", f"space back at the host, {dense / GIB:.1f} GiB dense: from a tenth to nine tenths", "GiB/s", targets=[Target(1.0)])
    last = bench.row("back-last", "the last of it back after", "ms", better="less")
    wide = bench.row("back-wide", f"space back, {size >> 30} GiB with a block in each leaf", "GiB/s", targets=[Target(1.0)])
    wide_last = bench.row("back-wide-last", "the last of that back after", "ms", better="less")
    # Each round fills anew, which takes most of the time.
    for _ in bench.each_round():
        with ExitStack() as stack:
            device, pool = scattered(bench, size, stack)
            answer.add("plywood", discarded(pool, device, wide, wide_last))
        with ExitStack() as stack:
            pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), dense * 2 + GIB, stack)
            pool.volume("dense", dense)
            device = pool.attach("dense")
            overwrite(device, dense)
            discarded(pool, device, back, last)


def discarded(pool, device, rate_row, last_row):
    """Discards a device. Answers how long that took; the rest goes into the rows."""
    full = pool.settle()["host_bytes"]
    began = time.monotonic()
    run("blkdiscard", device)
    answered = (time.monotonic() - began) * 1000
    seen = freed_over_time(pool.path, full)
    freed = seen[-1][1]
    rate_row.add("plywood", freed * 0.8 / GIB / max(when(seen, freed * 0.9) - when(seen, freed * 0.1), 0.02))
    last_row.add("plywood", (seen[-1][0] - began) * 1000)
    last_row.note = f"of {full / GIB:.1f} GiB that the pool file took, {freed / GIB:.1f} came back"
    return answered


def freed_over_time(path, full):
    """Pairs of time and bytes that the host has back, until nothing more comes for 12 seconds."""
    seen = [(time.monotonic(), 0)]
    while time.monotonic() - seen[-1][0] < 12:
        freed = full - os.stat(path).st_blocks * 512
        if freed > seen[-1][1]:
            seen.append((time.monotonic(), freed))
        time.sleep(0.02)
    return seen


def when(seen, freed):
    """When so much was back."""
    return next(moment for moment, so_far in seen if so_far >= freed)

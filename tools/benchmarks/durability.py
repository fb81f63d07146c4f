"""Block level, the part about durable writes: fsync and FLUSH, alone, together, and beside neighbours."""

import os
import threading
import time
from contextlib import ExitStack, contextmanager

from .bench import GIB, MIB, case
from .devices import Load, attach_loop, fio, make_ext4, mount, overwrite, sparse_file
from .peers import CLONERS, Plywood, RawLoop, Split
from .plywood import Pool
from .results import Target
from .shell import run

WRITERS = (1, 4, 16)


def synced_rate(bench, path, size, writers, kind="fdatasync"):
    """4 KiB writes a second, each followed by its own sync, by so many writers."""
    job = fio(path, "randwrite", "4k", 1, size, seconds=bench.seconds, time_based=True, numjobs=writers,
              group_reporting=True, **{kind: 1})
    return job["write"]["iops"]


def sync_p99_ms(bench, path, size, seconds=None):
    """The 99th percentile of fdatasync after a 4 KiB write, and the median, in milliseconds."""
    job = fio(path, "randwrite", "4k", 1, size, seconds=seconds or bench.seconds, time_based=True, fdatasync=1)
    percentile = job["sync"]["lat_ns"]["percentile"]
    return percentile["99.000000"] / 1e6, percentile["50.000000"] / 1e6


@case("block", "fsync-ext4", "4 KiB write and fsync in a file of ext4 on the device", 5, 12 * GIB)
def fsync_ext4(bench):
    """In place in a file that is written already, so that the file system changes nothing but times."""
    size = bench.size(GIB, 256 * MIB)
    file_size = size // 2
    rows = {writers: bench.row(f"writers-{writers}", f"{writers} writer{'s' * (writers > 1)}", "IOPS", reference=RawLoop.name,
                               targets=[Target(0.75, RawLoop.name, text="the same ext4 on a loop on a raw file")])
            for writers in WRITERS}

    def fill(device):
        make_ext4(device)
        with ExitStack() as stack:
            directory = mount(device, os.path.join(bench.scratch, f"fill-{bench.number()}"), stack)
            overwrite(sparse_file(os.path.join(directory, "file"), file_size), file_size)

    with bench.prepared([RawLoop, Split, Plywood], size, rows.values(), fill) as peers, ExitStack() as stack:
        paths = {}
        for peer in peers:
            directory = mount(peer.base, os.path.join(bench.scratch, f"mnt-{bench.number()}"), stack)
            paths[peer.name] = os.path.join(directory, "file")
        for _ in bench.each_round():
            for writers, row in rows.items():
                for peer in peers:
                    bench.measure(row, peer.name, lambda peer=peer, writers=writers: synced_rate(bench, paths[peer.name], file_size, writers, "fsync"))


@case("block", "fsync-clone", "4 KiB write and fdatasync on a fresh clone", 6, 14 * GIB)
def fsync_clone(bench):
    """Every write breaks sharing, and its mapping has to be durable too."""
    size = bench.size(GIB, 256 * MIB)
    rows = {writers: bench.row(f"writers-{writers}", f"{writers} writer{'s' * (writers > 1)}", "IOPS", reference="XFS reflink copy")
            for writers in WRITERS}
    with bench.prepared(CLONERS, size, rows.values(), seal=True) as peers:
        for _ in bench.each_round():
            for writers, row in rows.items():
                for peer in peers:
                    bench.measure(row, peer.name, lambda peer=peer, writers=writers: synced_rate(bench, peer.fresh(), size, writers))
                    peer.drop()


@case("block", "fdatasync", "4 KiB write and fdatasync on the device, by what the host's space is", 8, 10 * GIB)
def fdatasync(bench):
    """Recycled: blocks that were written before, and freed. Zeroed: fresh ones, written ahead. Unwritten: allocated only."""
    size = bench.size(512 * MIB, 128 * MIB)
    kinds = ["in place", "recycled", "zeroed", "unwritten"]
    rows = {(kind, writers): bench.row(f"{kind.replace(' ', '-')}-{writers}", f"{kind}, {writers} writer{'s' * (writers > 1)}", "IOPS",
                                       reference=RawLoop.name)
            for kind in kinds for writers in WRITERS}
    together = bench.row("group-commit", "16 writers over 1, on zeroed space", "x", targets=[Target(4.0)])
    with ExitStack() as stack:
        raw = sparse_file(os.path.join(bench.scratch, "raw"), size, stack)
        overwrite(raw, size)
        unwritten = os.path.join(bench.scratch, "unwritten")
        stack.callback(lambda: os.path.exists(unwritten) and os.unlink(unwritten))
        loop = attach_loop(raw, stack)
        for _ in bench.each_round():
            rates = {}
            for kind in kinds:
                for writers in WRITERS:
                    row = rows[kind, writers]
                    bench.measure(row, RawLoop.name, lambda kind=kind, writers=writers: on_raw(bench, loop, unwritten, size, kind, writers))

                    def ours(kind=kind, writers=writers):
                        with space_of_kind(bench, kind, size) as device:
                            rates[kind, writers] = synced_rate(bench, device, size, writers)
                        return rates[kind, writers]

                    bench.measure(row, "plywood", ours)
            if rates.get(("zeroed", 1)) and ("zeroed", 16) in rates:
                together.add("plywood", rates["zeroed", 16] / rates["zeroed", 1])


def on_raw(bench, loop, unwritten, size, kind, writers):
    """The same on a raw file: it knows written and unwritten only."""
    if kind != "unwritten":
        return synced_rate(bench, loop, size, writers)
    if os.path.exists(unwritten):
        os.unlink(unwritten)
    run("fallocate", "-l", size, unwritten)
    with ExitStack() as stack:
        return synced_rate(bench, attach_loop(unwritten, stack), size, writers)


@contextmanager
def space_of_kind(bench, kind, size):
    """A volume of ours whose next writes find host space of a kind."""
    with ExitStack() as stack:
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 8 * GIB, stack)
        pool.volume("volume", size)
        device = pool.attach("volume")
        if kind == "in place":
            overwrite(device, size)
        elif kind == "recycled":
            # Freed by the kilobyte, every other block, so that it is reused and not punched.
            fio(device, "write:4k", "4k", 32, size, io_size=size // 2)
            pool.snapshot("volume", "before")
            fio(device, "write:4k", "4k", 32, size, io_size=size // 2)
            pool.delete("before")
            pool.settle()
        elif kind == "unwritten":
            # What a former session had taken into use and not written is not zeroed anew.
            pool.detach("volume")
            pool.stop()
            run("fallocate", "-l", size * 2, pool.path)
            device = pool.attach("volume")
        yield device


@case("block", "neighbours", "99th percentile of fdatasync beside what else goes on in the pool", 8, 10 * GIB)
def neighbours(bench):
    """One volume's 4 KiB write and fdatasync, alone and beside: the same pool's other volumes, or on raw files another file."""
    size = bench.size(GIB, 256 * MIB)
    seconds = 2 if bench.quick else 4
    what = {"writes": "another volume's random writes", "checkpoint": "checkpoints (writes into a fresh clone)",
            "punching": "punching (another volume is discarded)", "deletion": "a deletion", "ten-writers": "ten writers"}
    alone = "plywood, alone"
    rows = {name: bench.row(name, f"beside {text}", "ms", better="less", reference=alone,
                            targets=[Target(1 / 3, alone, text="alone (at most 3 times as long)")]) for name, text in what.items()}
    middle = bench.row("alone", "alone: median", "ms", better="less")
    with ExitStack() as stack:
        raw = RawNeighbours(bench, size, stack)
        pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 24 * GIB, stack)
        devices = {}
        for name in ("quiet", "busy"):
            pool.volume(name, size)
            devices[name] = pool.attach(name)
            overwrite(devices[name], size)
        pool.snapshot("busy", "busy-origin")
        for number in bench.each_round():
            single = sync_p99_ms(bench, devices["quiet"], size, seconds)
            middle.add("plywood", single[1])
            for name, row in rows.items():
                row.add(alone, single[0])

                def beside(name=name, number=number):
                    with neighbour(name, pool, devices["busy"], size, number):
                        return sync_p99_ms(bench, devices["quiet"], size, seconds)[0]

                bench.measure(row, "plywood", beside)
            quiet = sync_p99_ms(bench, raw.quiet, size, seconds)
            middle.add(RawLoop.name, quiet[1])
            for name in ("writes", "ten-writers"):
                rows[name].add(f"{RawLoop.name}, alone", quiet[0])
                bench.measure(rows[name], RawLoop.name, lambda name=name: raw.beside(name, size, seconds))


class RawNeighbours:
    """Two loop devices on two raw files."""

    def __init__(self, bench, size, stack):
        self.bench = bench
        paths = [sparse_file(os.path.join(bench.scratch, f"raw-{number}"), size, stack) for number in range(2)]
        for path in paths:
            overwrite(path, size)
        self.quiet, self.busy = (attach_loop(path, stack) for path in paths)

    def beside(self, name, size, seconds):
        """The percentile beside writes."""
        with writers(name, self.busy, size):
            return sync_p99_ms(self.bench, self.quiet, size, seconds)[0]


def writers(name, device, size):
    """Random writes at depth 32 of one, or of ten."""
    return Load(device, "randwrite", "4k", 4 if name == "ten-writers" else 32, size, numjobs=10 if name == "ten-writers" else 1)


@contextmanager
def neighbour(name, pool, busy, size, number):
    """Something that goes on meanwhile, and what it takes taken away."""
    if name in ("writes", "ten-writers"):
        with writers(name, busy, size):
            yield
        return
    volume = f"{name}-{number}"
    with ExitStack() as stack:
        pool.clone("busy-origin", volume)
        stack.callback(pool.settle)
        device = pool.attach(volume)
        if name == "checkpoint":
            stack.callback(pool.delete, volume)
            stack.callback(pool.detach, volume)
            stack.enter_context(Load(device, "randwrite", "4k", 32, size))
            yield
            return
        # Blocks of its own, to be given back.
        overwrite(device, size, seed=number + 2)
        if name == "deletion":
            pool.detach(volume)
            act = lambda: pool.delete(volume)  # noqa: E731
        else:
            stack.callback(pool.delete, volume)
            stack.callback(pool.detach, volume)
            act = lambda: run("blkdiscard", device)  # noqa: E731
        thread = threading.Thread(target=lambda: (time.sleep(0.5), act()))
        thread.start()
        try:
            yield
        finally:
            thread.join()

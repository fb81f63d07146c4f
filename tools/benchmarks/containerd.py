"""Life cycle under containerd: plywood as its snapshotter, and its own for overlayfs, in one containerd on one file system."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from .bench import MIB, case
from .containerd_engine import THEIRS, Calls, Containerd, Image
from .devices import attach_loop, sparse_file
from .life import AT_ONCE, all_at_once, archive, echo_ms, free_loops, middle, system_unmount, timed_ms
from .results import OURS, Target
from .shell import NotRun, make_directory, run

SIGKILL = 9


def percentile_99(values):
    """The least value that 99 of 100 do not exceed."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


@case("life", "snapshotter", "Snapshotter of containerd: Prepare, mount, unmount, Remove", 4)
def snapshotter(bench):
    """Over containerd's socket, of children of an unpacked image; what is removed is collected before the next, outside of the time."""
    count, cycles = bench.size(200, 30), bench.size(30, 10)
    alone = bench.row("prepare", "Prepare, one at a time: median", "ms", better="less", reference=THEIRS)
    alone_p99 = bench.row("prepare-p99", f"Prepare, one at a time: 99th percentile of {count}", "ms", better="less", reference=THEIRS,
                          targets=[Target(5)])
    own = bench.row("own", "Prepare asked of plywood's own socket, without containerd: median", "ms", better="less")
    own_p99 = bench.row("own-p99", f"Prepare asked of plywood's own socket: 99th percentile of {count}", "ms", better="less")
    new = bench.row("new-device", "Prepare on a loop device never used before", "ms", better="less")
    cycle = bench.row("cycle", "Prepare, mount(2), umount(2), Remove: one at a time", "ms", better="less", reference=THEIRS)
    steps = [bench.row(f"cycle-{name}", f"of which {text}", "ms", better="less", reference=THEIRS)
             for name, text in (("prepare", "Prepare"), ("mount", "mount(2)"), ("unmount", "umount(2)"), ("remove", "Remove"))]
    gone = bench.row("collect", "and until containerd has collected it, and the snapshotter is through", "ms", better="less", reference=THEIRS)
    many = bench.row("hundred", f"the same, {AT_ONCE} at once, in all", "ms", better="less", reference=THEIRS)
    each = bench.row("hundred-prepare", f"{AT_ONCE} Prepares at once: each", "ms", better="less", reference=THEIRS)
    over = bench.row("hundred-over-one", f"each Prepare of {AT_ONCE} at once over one alone", "x", better="less", targets=[Target(1.5)])
    commits = [bench.row(f"commit-{name}", f"Commit, {text}", "ms", better="less", reference=THEIRS)
               for name, text in (("plain", "not mounted"), ("mounted", "mounted"), ("dirty", "mounted, 64 MiB just written"))]
    commits[2].note = "overlayfs leaves in memory what was written; ours writes it out first, so that the layer holds it"
    own.note = "containerd itself writes and syncs its own database twice in each Prepare; plywood's own socket is without that"
    each.note = f"each Prepare of {AT_ONCE} at once: the time until all have been answered, by {AT_ONCE}; held against the median of one at " \
                "a time in the same round"
    many.note = f"in the first round most of the loop devices of {AT_ONCE} at once have never been used"
    with ExitStack() as stack:
        containerd = Containerd(bench, stack)
        parent = containerd.small_image().chain_id
        for number in bench.each_round():
            for side in containerd.sides:
                bench.measure([alone, alone_p99], side.label, lambda side=side: one_at_a_time(side, parent, count))
                bench.measure([cycle, *steps, gone], side.label, lambda side=side: whole_cycles(side, parent, cycles))
                bench.measure(commits, side.label, lambda side=side: commits_of(side, parent))
                bench.progress(f"{AT_ONCE} at once", (number + 0.6) / bench.rounds)
                bench.measure(many, side.label, lambda side=side: cycles_at_once(side, parent))
                bench.measure([each, over], side.label, lambda side=side: prepares_at_once(side, parent))
            bench.measure([own, own_p99], OURS, lambda: without_containerd(containerd, parent, count))
            bench.measure(new, OURS, lambda: on_new_device(bench, containerd.sides[0], parent))


def one_at_a_time(side, parent, count):
    """Median and 99th percentile of Prepare."""
    times = []
    for _ in range(count):
        times.append(timed_ms(lambda: side.prepare("alone", parent)))
        side.remove("alone")
        side.settle()
    side.alone_ms = middle(times)
    return side.alone_ms, percentile_99(times)


def without_containerd(containerd, parent, count):
    """The same by plywood itself, whose snapshots have containerd's keys."""
    with ExitStack() as stack:
        calls = Calls(containerd.own, stack)
        layer = backing_key(containerd, calls, parent)
        times = []
        for _ in range(count):
            times.append(timed_ms(lambda: calls.call("snapshots.v1.Snapshots/Prepare", {2: "own", 3: layer})))
            calls.call("snapshots.v1.Snapshots/Remove", {2: "own"})
            containerd.sides[0].await_none()
    return middle(times), percentile_99(times)


def backing_key(containerd, calls, name):
    """Under which key the snapshotter has a snapshot of containerd's: `namespace/number/name`, the number being below those of what came
    later."""
    for number in range(1, 100):
        key = f"default/{number}/{name}"
        try:
            calls.call("snapshots.v1.Snapshots/Stat", {2: key})
            return key
        except NotRun:
            continue
    raise NotRun(f"{containerd.own}: no {name}")


def on_new_device(bench, side, parent):
    """All free loop devices are taken, so that the kernel makes another."""
    with ExitStack() as stack:
        filler = sparse_file(os.path.join(bench.scratch, "filler"), MIB, stack)
        for _ in range(free_loops()):
            attach_loop(filler, stack, direct=False)
        took = timed_ms(lambda: side.prepare("new", parent))
        side.remove("new")
        side.settle()
    return took


def whole_cycles(side, parent, cycles):
    """Medians of whole cycles, of each step, and of the collection after it."""
    directory = make_directory(side.containerd.folder, "mounted")

    def one():
        began = time.perf_counter()
        mount = side.prepare("cycle", parent)
        prepared = (time.perf_counter() - began) * 1000
        steps = [prepared, timed_ms(lambda: mount.mount(directory)), timed_ms(lambda: system_unmount(directory)),
                 timed_ms(lambda: side.remove("cycle"))]
        return [sum(steps), *steps, timed_ms(side.settle)]

    return [middle(column) for column in zip(*(one() for _ in range(cycles)))]


def commits_of(side, parent):
    """Medians of Commit of what has one small file: not mounted, mounted, and mounted with 64 MiB just written."""
    directory = make_directory(side.containerd.folder, "committed")

    def one(is_mounted, size):
        mount = side.prepare("active", parent)
        mount.mount(directory)
        with open(os.path.join(directory, "file"), "wb") as file:
            file.write(os.urandom(4096))
        if not is_mounted:
            system_unmount(directory)
        elif size:
            with open(os.path.join(directory, "large"), "wb") as file:
                file.write(os.urandom(size))
        else:
            run("sync", "-f", directory)
        took = timed_ms(lambda: side.commit("active", "layer"))
        if is_mounted:
            system_unmount(directory)
        side.remove("layer")
        side.settle()
        return took

    return [middle(one(*how) for _ in range(5)) for how in ((False, 0), (True, 0), (True, 64 * MIB))]


def cycles_at_once(side, parent):
    """100 threads with one cycle each, until the last is through."""
    places = {f"cycle-{index}": make_directory(side.containerd.folder, f"mounted-{index}") for index in range(AT_ONCE)}

    def one(key):
        side.prepare(key, parent).mount(places[key])
        system_unmount(places[key])
        side.remove(key)

    took = all_at_once(list(places), one)
    side.settle()
    return took


def prepares_at_once(side, parent):
    """What each of 100 Prepares at once comes to, and that over one alone."""
    if side.alone_ms is None:
        raise NotRun("one alone was not measured")
    keys = [f"hundred-{index}" for index in range(AT_ONCE)]
    took = all_at_once(keys, lambda key: side.prepare(key, parent)) / AT_ONCE
    all_at_once(keys, side.remove)
    side.settle()
    return took, took / side.alone_ms


@case("life", "containerd-run", "Start of a container by containerd until its first output", 1)
def containerd_run(bench):
    """`ctr run --rm` of an image with busybox alone."""
    first = bench.row("first", "until its first output", "ms", better="less", reference=THEIRS)
    whole = bench.row("whole", "and until it is gone", "ms", better="less", reference=THEIRS)
    with ExitStack() as stack:
        containerd = Containerd(bench, stack)
        image = containerd.small_image().name
        fifos = make_directory(containerd.folder, "fifos")

        def thrice(side, number):
            turns = [echo_ms("ctr", "--address", containerd.address, "run", "--rm", "--snapshotter", side.name, "--fifo-dir", fifos, image,
                             f"{side.name}-{number}-{turn}", "/bin/echo", "here") for turn in range(3)]
            side.settle()
            return middle(turn[0] for turn in turns), middle(turn[1] for turn in turns)

        for number in bench.each_round():
            for side in containerd.sides:
                bench.measure([first, whole], side.label, lambda side=side, number=number: thrice(side, number))


@case("life", "containerd-unpack", "Unpack of a Debian image by containerd", 2)
def containerd_unpack(bench):
    """The layer is in containerd's store of content, and stays there; `ctr snapshot unpack` makes it a snapshot."""
    answered = bench.row("answered", "the whole root file system", "ms", better="less", reference=THEIRS)
    synced = bench.row("synced", "and synced", "ms", better="less", reference=THEIRS)
    answered.note = "the layer is not compressed: that would be the same on both sides. The end of plywood's unpack unmounts its file system, " \
                    "which writes it out; \"synced\" is with a sync of the host's file system on both sides"
    with ExitStack() as stack:
        containerd = Containerd(bench, stack)
        image = Image(make_directory(containerd.folder, "debian"), "debian", archive(bench))
        containerd.ctr("image", "import", "--no-unpack", "--base-name", image.base_name, image.path)

        def unpacked(side):
            os.sync()
            began = time.perf_counter()
            containerd.ctr("snapshot", "unpack", "--snapshotter", side.name, image.digest)
            answer = (time.perf_counter() - began) * 1000
            run("sync", "-f", containerd.folder)
            took = (time.perf_counter() - began) * 1000
            side.remove(image.chain_id)
            side.settle()
            containerd.pool.settle()
            return answer, took

        for _ in bench.each_round():
            for side in containerd.sides:
                bench.measure([answered, synced], side.label, lambda side=side: unpacked(side))


@case("life", "containerd-remove", "Removal of running containers of containerd, at once", 6)
def containerd_remove(bench):
    """Each is killed, waited for, and removed with its snapshot, by a thread of its own: what is busy still would be in the way."""
    count = bench.size(AT_ONCE, 10)
    answered = bench.row("answered", f"{count} containers at once: killed, and removed with their snapshots", "ms", better="less", reference=THEIRS)
    gone = bench.row("gone", "and until the snapshotter has none of them left", "ms", better="less", reference=THEIRS)
    failed = bench.row("failed", "refused, left behind, or busy by containerd's log", "removals", better="less", targets=[Target(0)])
    with ExitStack() as stack:
        containerd = Containerd(bench, stack)
        image = containerd.small_image().name
        for number in bench.each_round():
            for side in containerd.sides:
                bench.progress(f"{count} containers on {side.name}", (number + 0.5) / bench.rounds)
                bench.measure([answered, gone, failed], side.label, lambda side=side: removed_at_once(side, image, count))


def removed_at_once(side, image, count):
    """Until all removals are answered, until nothing is left, and how many went wrong."""
    containerd, calls = side.containerd, side.containerd.calls
    busy = containerd.busy_lines()
    names = [f"{side.name}-{index}" for index in range(count)]
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda name: containerd.ctr("run", "--detach", "--null-io", "--snapshotter", side.name, image, name,
                                                      "/bin/sleep", "10000"), names))
    refused = []

    def remove(name):
        try:
            calls.call("tasks.v1.Tasks/Kill", {1: name, 3: SIGKILL, 4: 1})
            calls.call("tasks.v1.Tasks/Wait", {1: name})
            calls.call("tasks.v1.Tasks/Delete", {1: name})
            # In this order, as ctr does it: a snapshot without its container is garbage.
            side.remove(name)
            calls.call("containers.v1.Containers/Delete", {1: name})
        except NotRun as error:
            refused.append(error)

    began = time.perf_counter()
    answered = all_at_once(names, remove)
    containerd.collect()
    try:
        side.await_none()
    except NotRun as error:
        print(f"bench: {error}", flush=True)
    gone = (time.perf_counter() - began) * 1000
    left, busy = max(0, side.left()), containerd.busy_lines() - busy
    if refused:
        print(f"bench: {len(refused)} removals refused: {refused[0]}", flush=True)
    return answered, gone, len(refused) + left + busy

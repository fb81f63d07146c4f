"""Space: what is written for a write, what metadata takes, what du sees."""

import functools
import os
import re
import time
from contextlib import ExitStack
from typing import NamedTuple

from .bench import GIB, MIB, case
from .devices import Disk, fio, host_file_system, overwrite
from .peers import BtrfsSnapshot, Plywood, Qcow2, XfsReflink
from .plywood import Pool
from .results import Target
from .shell import NotRun, make_directory, require, run, run_group


class Written(NamedTuple):
    """What a 4 KiB write of the user cost."""

    disk_bytes: float
    disk_writes: float
    # By the counters of our engine; of others nothing.
    own_bytes: float


class Counted:
    """A peer with everything that it has on a disk of its own that counts. btrfs and XFS have one; ours and qcow2 get one."""

    def __init__(self, bench, kind, size):
        self.stack, self.name = ExitStack(), kind.name
        disk_bytes = size * 5 // 2 + GIB
        self.disk = None
        if kind is Plywood:
            # Straight on the device: a pool may be one.
            self.disk = Disk(os.path.join(bench.scratch, f"disk-{bench.number()}"), disk_bytes, self.stack)
            self.peer = kind(bench, size, on=self.disk.device)
        elif kind is Qcow2:
            self.disk = Disk(os.path.join(bench.scratch, f"disk-{bench.number()}"), disk_bytes, self.stack)
            place = host_file_system(self.disk, "ext4", os.path.join(bench.scratch, f"host-{bench.number()}"), self.stack)
            self.peer = kind(bench, size)
            self.peer.scratch = make_directory(place, "qcow2")
        else:
            self.peer = kind(bench, size, disk_bytes)
        self.stack.callback(self.peer.tear_down)
        self.peer.prepare()
        self.peer.seal()
        self.disk = self.disk or self.peer.disk

    def written(self, size, **more):
        """What random writes to a new clone cost, what is written later included."""
        device = self.peer.fresh()
        run("sync")
        before, ours_before = self.disk.counts(), self.own_bytes()
        job = fio(device, "randwrite", "4k", 1 if more["fdatasync"] == 1 else 32, size, **more)
        run("sync")
        if isinstance(self.peer, Plywood):
            # A check of a pool in use begins with a checkpoint, which is part of what the writes cost.
            self.peer.pool.command("pool", "check")
        after, ours_after = self.disk.counts(), self.own_bytes()
        writes = job["write"]["io_bytes"] / 4096
        return Written((after["bytes"] - before["bytes"]) / writes, (after["writes"] - before["writes"]) / writes,
                       (ours_after - ours_before) / writes)

    def own_bytes(self):
        """What our engine says that it has written: data and metadata, and not the zeros ahead of first use."""
        if not isinstance(self.peer, Plywood):
            return 0
        counters = self.peer.pool.counters()
        return counters["data_bytes_written"] + counters["metadata_bytes_written"]


@case("space", "amplification", "Bytes written to the disk for bytes written by the user", 8, 14 * GIB)
def amplification(bench):
    """Random 4 KiB writes over a tenth of a fresh clone, counted at a disk of each peer's own (a loop device), to the end of all
    that is written later. No times."""
    size = bench.size(2 * GIB, 256 * MIB)
    own = bench.row("own", "4 KiB random writes, a FLUSH every 32: bytes for a byte, by plywood's counters", "bytes/byte", better="less",
                    targets=[Target(1.15)])
    own.note = ("the counters have data, nodes, journal and superblocks; the disk's figure also has the zeros that plywood writes once over each fresh "
                "group of 128 MiB, ahead of its first use, which weigh the more the less is written")
    batch = bench.row("batched", "the same at the disk", "bytes/byte", better="less", reference="XFS reflink copy")
    requests = bench.row("batched-requests", "the same: writes of the disk for a write", "writes/write", better="less", reference="XFS reflink copy")
    single = bench.row("single", "4 KiB random write and FLUSH, each, at the disk", "bytes", better="less", reference="XFS reflink copy")
    single_own = bench.row("single-own", "the same by plywood's counters", "bytes", better="less")
    kinds = [Plywood, XfsReflink, BtrfsSnapshot, Qcow2]
    with ExitStack() as stack:
        counted = []
        for kind in kinds:
            bench.progress(f"preparing {kind.name}", 0)
            try:
                one = Counted(bench, kind, size)
            except (NotRun, OSError) as error:
                for row in (batch, requests, single):
                    row.refuse(kind.name, error)
                continue
            stack.callback(one.stack.close)
            counted.append(one)
        for number in bench.each_round():
            for one in counted:
                many = functools.partial(one.written, size, io_size=size // 10, fdatasync=32, randseed=number)
                each = functools.partial(one.written, size, io_size=bench.size(16 * MIB, 2 * MIB), fdatasync=1, randseed=number + 100)
                ours = one.name == Plywood.name
                bench.measure([batch, requests, *([own] if ours else [])], one.name, functools.partial(for_a_byte, many))
                bench.measure([single, *([single_own] if ours else [])], one.name, functools.partial(for_a_write, each))
    thin = bench.row("dm-thin", "dm-thin in QEMU (Debian's kernel, 64 KiB blocks), bytes for a byte, a FLUSH every 32", "bytes/byte", better="less")
    thin_requests = bench.row("dm-thin-requests", "dm-thin in QEMU, the same: writes of its two disks for a write", "writes/write", better="less")
    thin_single = bench.row("dm-thin-single", "dm-thin in QEMU, 4 KiB random write and FLUSH, each", "bytes", better="less")
    bench.settings["dm-thin"] = ("in tools/qemu-test's guest: thin-pool with 64 KiB blocks (its least, and LVM's default) and skip_block_zeroing on two "
                                 "loop disks on ext4; a snapshot of a full thin volume; bytes and I/Os only, since it is emulated")
    bench.measure([thin, thin_requests, thin_single], "dm-thin", lambda: dm_thin(bench))
    for row in (thin, thin_requests, thin_single):
        if row.samples.get("dm-thin"):
            # Counted by a deterministic job in a guest of its own: once is enough, and said so.
            row.note = "dm-thin's counts are of one run: the job has a fixed seed and nothing else runs in the guest"


GUEST = """
modprobe dm_thin_pool
# Nobody else makes the nodes here.
export DM_DISABLE_UDEV=1
cd /var/tmp
truncate -s 64M meta; truncate -s {data}M data
M=$(losetup -f --show meta); D=$(losetup -f --show data)
sectors=$(({data}*2048))
dmsetup create pool --table "0 $sectors thin-pool $M $D 128 0 1 skip_block_zeroing"
dmsetup message pool 0 "create_thin 0"
dmsetup create base --table "0 $(({size}*2048)) thin /dev/mapper/pool 0"
dd if=/dev/urandom of=/dev/mapper/base bs=1M count={size} oflag=direct conv=fsync status=none
snap() {{ dmsetup suspend base; dmsetup message pool 0 "create_snap $1 0"; dmsetup resume base
dmsetup create s$1 --table "0 $(({size}*2048)) thin /dev/mapper/pool $1"; sync; }}
count() {{ awk '{{b += $7*512; w += $5}} END {{print b, w}}' /sys/block/$(basename $M)/stat /sys/block/$(basename $D)/stat; }}
job() {{ fio --name=j --filename=/dev/mapper/s$1 --direct=1 --rw=randwrite --bs=4k --ioengine=libaio --iodepth=$2 --fdatasync=$3 \
--size={size}M --io_size=$4k --randseed=1 >/dev/null; sync; dmsetup suspend s$1; dmsetup resume s$1; }}
snap 1; echo "thin: before $(count)"; job 1 32 32 {batched}; echo "thin: after $(count)"
snap 2; echo "thin: before $(count)"; job 2 1 1 {single}; echo "thin: after $(count)"
"""


def dm_thin(bench):
    """Bytes for a byte, writes of the disks for a write, and bytes for a write with FLUSH."""
    require("qemu-system-x86_64")
    size = bench.size(512, 128)
    batched, single = size * 1024 // 10 // 4 * 4, 2048
    script = GUEST.format(data=size * 3, size=size, batched=batched, single=single)
    bench.progress("dm-thin in QEMU", 0.8)
    said = run_group([os.path.join(bench.root, "tools/qemu-test"), "--shell", script], 3600, cwd=bench.root)
    counts = [tuple(map(int, found)) for found in re.findall(r"^thin: (?:before|after) (\d+) (\d+)", said, re.M)]
    if len(counts) != 4:
        raise NotRun(f"the guest did not get that far: {(said.strip().splitlines() or ['nothing'])[-1]}")
    many = batched // 4
    return (counts[1][0] - counts[0][0]) / (batched * 1024), (counts[1][1] - counts[0][1]) / many, (counts[3][0] - counts[2][0]) / (single // 4)


def for_a_byte(write):
    """Bytes for a byte, requests for a write, and bytes for a byte by our own counters."""
    cost = write()
    return cost.disk_bytes / 4096, cost.disk_writes, cost.own_bytes / 4096


def for_a_write(write):
    """Bytes for a write, and the same by our own counters."""
    cost = write()
    return cost.disk_bytes, cost.own_bytes


@case("space", "metadata", "Metadata for data, dense", 4, 8 * GIB)
def metadata(bench):
    """A volume written from end to end; the same as a snapshot that is sealed. Counted, so one round is enough."""
    size = bench.size(4 * GIB, 512 * MIB)
    plain = bench.row("unsealed", "dense data, unsealed", "%", better="less", targets=[Target(0.8)])
    sealed = bench.row("sealed", "dense data, sealed", "%", better="less", targets=[Target(1.0)])
    for _ in bench.each_round():
        with ExitStack() as stack:
            pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
            pool.volume("volume", size)
            overwrite(pool.attach("volume"), size)
            plain.add("plywood", metadata_part(pool, size))
            pool.snapshot("volume", "snapshot")
            pool.command("snapshot", "seal", "snapshot")
            sealed.add("plywood", metadata_part(pool, size))
    plain.note = "nodes, records, and what of the groups' descriptors and pages is allocated on the host; the journal and the superblocks apart"


# docs/format.md: the superblocks' place, then the journal, then groups, each of which begins with its layout.
SUPERBLOCKS_BYTES, GROUP_BYTES = 512 * 4096, 32768 * 4096


def metadata_part(pool, size):
    """Percent of the data. Part of what is used is the layout, which is there on the host as far as it is needed."""
    info = pool.at_rest()
    head = SUPERBLOCKS_BYTES + info["journal_bytes"]
    layout = info["layout_bytes"] - head
    of_group = 134 * 4096
    taken = sum(allocated_bytes(pool.path, start, of_group) for start in range(head, head + layout // of_group * GROUP_BYTES, GROUP_BYTES))
    return (info["used_bytes"] - layout - size + taken) * 100 / size


def allocated_bytes(path, start, length):
    """How much of a range of a file the host has allocated, as filefrag -v lists it in blocks of 4096 bytes."""
    first, end, total = start // 4096, (start + length) // 4096, 0
    for low, high in extents_of(path):
        total += max(0, min(high, end) - max(low, first))
    return total * 4096


@functools.lru_cache(maxsize=1)
def listed(path, _changed):
    """The extents of a file, as pairs of blocks."""
    found = re.findall(r"^\s*\d+:\s*(\d+)\.\.\s*(\d+):", run("filefrag", "-v", "-b4096", path), re.M)
    return [(int(low), int(high) + 1) for low, high in found]


def extents_of(path):
    """The same, looked up once as long as the file does not change."""
    state = os.stat(path)
    return listed(path, (state.st_mtime_ns, state.st_ctime_ns, state.st_blocks))


@case("space", "du", "du of the pool after each phase", 4, 8 * GIB)
def du(bench):
    """What the host's file takes over what it should: live data and metadata, journal, reserve, 64 MiB (promise P5); and its extents."""
    size = bench.size(2 * GIB, 256 * MIB)
    phases = ["filled", "half overwritten at random", "snapshot kept, half overwritten", "snapshot deleted", "the same, pool trim", "all discarded"]
    # Runs of less than 64 KiB, such as random writes leave, are kept for reuse until a trim: P5 is not about them.
    promised = {"filled", "half overwritten at random", "the same, pool trim", "all discarded"}
    taken = {phase: bench.row(f"taken-{index}", phase, "of what P5 allows", better="less",
                               targets=[Target(1.0)] if phase in promised else []) for index, phase in enumerate(phases)}
    extents = {phase: bench.row(f"extents-{index}", f"{phase}: extents of the pool file", "extents", better="less") for index, phase in enumerate(phases)}
    for number in bench.each_round():
        with ExitStack() as stack:
            pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{bench.number()}"), 16 * GIB, stack)
            pool.volume("volume", size)

            def half(seed):
                fio(pool.attach("volume"), "randwrite", "4k", 32, size, io_size=size // 2, randseed=seed)

            steps = [lambda: overwrite(pool.attach("volume"), size), lambda: half(number), lambda: (pool.snapshot("volume", "kept"), half(number + 9)),
                     lambda: pool.delete("kept"), lambda: pool.command("pool", "trim"), lambda: run("blkdiscard", pool.attach("volume"))]
            for phase, step in zip(phases, steps):
                step()
                # P5 gives it that long.
                time.sleep(10 + size // GIB)
                host = os.stat(pool.path).st_blocks * 512
                extents[phase].add("plywood", count_extents(pool.path))
                taken[phase].add("plywood", host / allowed_bytes(pool.at_rest()))


def allowed_bytes(info):
    """What du may see by P5. The groups' layout is part of what is used."""
    return 1.02 * info["used_bytes"] + info["journal_bytes"] + info["reserve_bytes"] + 64 * MIB


def count_extents(path):
    """As filefrag counts them."""
    found = re.search(r": (\d+) extents? found", run("filefrag", path))
    if not found:
        raise NotRun("filefrag told no number")
    return int(found.group(1))

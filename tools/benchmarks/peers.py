"""What plywood is compared with at block level.

Each peer has a base of a given size, as a device: `base`. `seal` makes it an origin, and `fresh` answers the device of a new
copy-on-write clone of it, the former one being dropped. Sides that cannot clone have no `fresh`. Whatever a peer makes is on its
stack. Each is set up as its project recommends; `settings` says how, for the page.
"""

import os
import subprocess
from contextlib import ExitStack

from . import ceiling
from .devices import Disk, attach_loop, host_file_system, overwrite, remove_file, sparse_file
from .plywood import Pool
from .shell import NotRun, end_process, make_directory, require, run, wait_until


class Peer:
    """What all have in common."""

    name = ""
    settings = ""
    clones = True

    def __init__(self, bench, size_bytes, disk_bytes=None):
        self.bench, self.size_bytes = bench, size_bytes
        # What a peer takes of a disk of its own: the base and a clone that was written all over, and room.
        self.disk_bytes = disk_bytes or size_bytes * 5 // 2 + (1 << 30)
        self.stack, self.clone_stack = ExitStack(), ExitStack()
        self.base = None
        self.fresh_count = 0
        self.scratch = make_directory(bench.scratch, f"{self.name.replace(' ', '-').replace('/', '-')}-{bench.number()}")

    def prepare(self, fill=None):
        """Makes the base and fills it: by `fill(device)`, else from end to end with noise."""
        self.base = self.make_base()
        (fill or (lambda device: overwrite(device, self.size_bytes)))(self.base)

    def make_base(self):
        """The base's device."""
        raise NotImplementedError

    def seal(self):
        """The base becomes what clones are made of."""

    def make_clone(self):
        """A clone's device; what goes away with it is on `clone_stack`."""
        raise NotImplementedError

    def fresh(self):
        """The device of a new clone. The former one is dropped."""
        self.drop()
        self.fresh_count += 1
        return self.make_clone()

    def drop(self):
        """Takes the clone away."""
        self.clone_stack.close()

    def tear_down(self):
        """Takes everything away. Called again, it does nothing."""
        try:
            self.clone_stack.close()
        finally:
            self.stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tear_down()


class RawLoop(Peer):
    """The reference of most: nothing between the loop device and the host's file."""

    name = "loop on raw file"
    settings = "losetup --direct-io=on on a file written from end to end"
    clones = False

    def make_base(self):
        path = sparse_file(os.path.join(self.scratch, "raw"), self.size_bytes, self.stack)
        overwrite(path, self.size_bytes)
        return attach_loop(path, self.stack)


class Null(Peer):
    """The path without an engine."""

    clones = False
    mode = ""

    def make_base(self):
        path = sparse_file(os.path.join(self.scratch, "raw"), self.size_bytes, self.stack)
        overwrite(path, self.size_bytes)
        return ceiling.start(self.bench.root, self.scratch, path, self.mode, self.stack)


class Ceiling(Null):
    """In one process."""

    name = "ceiling"
    settings = "tools/ceiling.c uring: a FUSE server of one file in one process, 128 entries a queue; loop with direct I/O"
    mode = "uring"


class Split(Null):
    """In two."""

    name = "split"
    settings = "tools/ceiling.c split: front and null engine, 128 entries a queue; loop with direct I/O"
    mode = "split"


class Plywood(Peer):
    """Ours."""

    name = "plywood"
    settings = "default configuration; pool file on the host's file system; volume with 4096-byte sectors"

    def __init__(self, bench, size_bytes, disk_bytes=None, on=None, pool_bytes=None):
        super().__init__(bench, size_bytes, disk_bytes)
        self.on, self.pool, self.pool_bytes = on, None, pool_bytes

    def make_base(self):
        path = self.on or os.path.join(self.scratch, "pool")
        self.pool = Pool(self.bench.program, path, self.pool_bytes or max(self.size_bytes * 4, 16 << 30), self.stack)
        self.pool.volume("base", self.size_bytes)
        return self.pool.attach("base")

    def seal(self):
        self.pool.detach("base")
        self.pool.snapshot("base", "origin")

    def make_clone(self):
        name = f"clone-{self.fresh_count}"
        self.pool.clone("origin", name)
        self.clone_stack.callback(self.release, name)
        return self.pool.attach(name)

    def release(self, name):
        """Detaches a clone, unless the daemon was stopped meanwhile, and deletes it."""
        info = self.pool.json("volume", "info", name)
        if info.get("volume", info).get("device"):
            self.pool.detach(name)
        self.pool.delete(name)

    def drop(self):
        had = self.fresh_count and self.pool
        super().drop()
        if had:
            # A deletion that is still being eaten is a neighbour, and not what is asked here.
            self.pool.settle()


class OnImage(Peer):
    """Those whose base is a file: a loop device while it is filled, and a plain file for the clones."""

    def loop_on_image(self, path, *stack):
        self.image = sparse_file(path, self.size_bytes, *stack)
        overwrite(self.image, self.size_bytes)
        self.base_stack = ExitStack()
        self.stack.callback(self.base_stack.close)
        return attach_loop(self.image, self.base_stack)

    def seal(self):
        self.base_stack.close()


class OnDisk(OnImage):
    """Those that want a host file system of another kind: on a disk of ours."""

    kind = ""

    def make_base(self):
        require(f"mkfs.{self.kind}")
        self.disk = Disk(os.path.join(self.scratch, "disk"), self.disk_bytes, self.stack)
        self.directory = host_file_system(self.disk, self.kind, os.path.join(self.scratch, "host"), self.stack)
        return self.base_in_directory()

    def base_in_directory(self):
        """The base's device, a loop on a file in the directory."""
        return self.loop_on_image(os.path.join(self.directory, "base"))


class XfsReflink(OnDisk):
    """A copy that shares extents."""

    name = "XFS reflink copy"
    settings = "mkfs.xfs -m reflink=1 on a loop disk on the host; cp --reflink=always; losetup --direct-io=on"
    kind = "xfs"

    def make_clone(self):
        copy = os.path.join(self.directory, f"clone-{self.fresh_count}")
        run("cp", "--reflink=always", self.image, copy)
        self.clone_stack.callback(remove_file, copy)
        return attach_loop(copy, self.clone_stack)


class BtrfsSnapshot(OnDisk):
    """A snapshot of the subvolume that the image is in. With checksums and copy on write, as btrfs comes."""

    name = "btrfs snapshot"
    settings = "mkfs.btrfs defaults on a loop disk on the host; btrfs subvolume snapshot of the image's subvolume; losetup --direct-io=on"
    kind = "btrfs"

    def base_in_directory(self):
        run("btrfs", "subvolume", "create", os.path.join(self.directory, "origin"))
        top, self.directory = self.directory, os.path.join(self.directory, "origin")
        device = super().base_in_directory()
        self.top = top
        return device

    def make_clone(self):
        snapshot = os.path.join(self.top, f"clone-{self.fresh_count}")
        run("btrfs", "subvolume", "snapshot", os.path.join(self.top, "origin"), snapshot)
        self.clone_stack.callback(run, "btrfs", "subvolume", "delete", snapshot)
        return attach_loop(os.path.join(snapshot, "base"), self.clone_stack)


class Qcow2(OnImage):
    """An overlay with a backing file, served by QEMU's storage daemon over FUSE."""

    name = "qcow2"
    settings = ("qemu-storage-daemon --export fuse,writable=on,growable=off; files with cache.direct=on,aio=native; qcow2 with "
                "cluster_size=128k,extended_l2=on (subclusters of 4 KiB) and lazy_refcounts=on over a raw backing file; an L2 cache "
                "that covers the whole image; losetup --direct-io=on")

    def make_base(self):
        require("qemu-storage-daemon", "qemu-img")
        return self.loop_on_image(os.path.join(self.scratch, "base.raw"), self.stack)

    def make_clone(self):
        overlay = os.path.join(self.scratch, f"clone-{self.fresh_count}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.image, "-o", "cluster_size=128k,extended_l2=on,lazy_refcounts=on",
            overlay)
        self.clone_stack.callback(remove_file, overlay)
        point = os.path.join(self.scratch, f"export-{self.fresh_count}")
        with open(point, "wb"):
            pass
        self.clone_stack.callback(remove_file, point)
        direct = "cache.direct=on,aio=native"
        process = subprocess.Popen(
            ["qemu-storage-daemon",
             "--blockdev", f"driver=file,node-name=raw,filename={self.image},read-only=on,{direct}",
             "--blockdev", f"driver=file,node-name=file,filename={overlay},discard=unmap,{direct}",
             "--blockdev", f"driver=qcow2,node-name=top,file=file,backing=raw,l2-cache-size={max(1 << 20, self.size_bytes >> 12)}",
             "--export", f"type=fuse,id=e,node-name=top,mountpoint={point},writable=on,growable=off,allow-other=auto"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.clone_stack.callback(end_process, process)
        wait_until(lambda: os.path.getsize(point) == self.size_bytes or process.poll() is not None, "qemu-storage-daemon")
        if process.poll() is not None:
            raise NotRun("qemu-storage-daemon: " + (process.stderr.read().strip().splitlines() or ["ended"])[-1])
        return attach_loop(point, self.clone_stack)


REFERENCES = [RawLoop, Ceiling, Split]
CLONERS = [Plywood, XfsReflink, BtrfsSnapshot, Qcow2]
NOT_COMPARED = {
    "aufs": "not in any kernel since Debian 10 (it was never merged); overlayfs replaced it in Docker",
    "ZFS": "no module in Debian's kernel; it would have to be built against each (zfs-dkms, contrib), which this machine's kernel has no headers for",
}

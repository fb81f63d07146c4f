"""Root file systems of containers: what a container's writes go to, in each way of making one.

Each has an image, a directory that is populated once; `fresh` answers a new container's root on it, the former one being dropped.
"""

import os
import shutil
from contextlib import ExitStack

from . import peers
from .devices import Disk, host_file_system, make_ext4, mount
from .shell import attempt, make_directory, require, run, unmount


class Roots:
    """What all have in common."""

    name = ""
    settings = ""

    def __init__(self, bench, size_bytes, disk_bytes=None):
        self.bench, self.size_bytes = bench, size_bytes
        self.disk_bytes = disk_bytes or size_bytes * 5 // 2 + (1 << 30)
        self.stack, self.clone_stack = ExitStack(), ExitStack()
        self.scratch = make_directory(bench.scratch, f"roots-{bench.number()}")
        self.stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
        self.count = 0

    def prepare(self, fill=None):
        """Makes the image and has `fill(directory)` populate it."""
        raise NotImplementedError

    def seal(self):
        """The image is done."""

    def make(self):
        """A container's root; what goes away with it is on `clone_stack`."""
        raise NotImplementedError

    def fresh(self):
        """A new container's root. The former one is dropped."""
        self.drop()
        self.count += 1
        return self.make()

    def drop(self):
        """Takes the container away."""
        self.clone_stack.close()

    def tear_down(self):
        """Takes everything away."""
        try:
            self.drop()
        finally:
            self.stack.close()


class OnDevice(Roots):
    """ext4 on a clone of a block peer."""

    kind = None

    def __init__(self, bench, size_bytes, disk_bytes=None):
        super().__init__(bench, size_bytes, disk_bytes)
        self.peer = self.kind(bench, size_bytes, disk_bytes)
        self.settings = f"ext4 (discard on plywood, noatime) on: {self.peer.settings}"
        self.stack.callback(self.peer.tear_down)

    def prepare(self, fill=None):
        def populate(device):
            make_ext4(device)
            with ExitStack() as stack:
                directory = mount(device, os.path.join(self.scratch, "image"), stack)
                fill(directory)
                os.sync()

        self.peer.prepare(populate)

    def seal(self):
        self.peer.seal()

    def make(self):
        device = self.peer.fresh()
        options = "noatime,discard" if self.kind is peers.Plywood else "noatime"
        return mount(device, os.path.join(self.scratch, f"root-{self.count}"), self.clone_stack, options)

    def drop(self):
        super().drop()
        self.peer.drop()


class PlywoodRoots(OnDevice):
    """Ours."""

    name = "plywood"
    kind = peers.Plywood


class XfsReflinkRoots(OnDevice):
    """A reflinked copy of an image, mounted."""

    name = "XFS reflink copy"
    kind = peers.XfsReflink


class Qcow2Roots(OnDevice):
    """A qcow2 overlay, mounted."""

    name = "qcow2"
    kind = peers.Qcow2


class Directory(Roots):
    """The image as a directory on the host's file system."""

    kind = None

    def prepare(self, fill=None):
        self.ground = self.scratch
        if self.kind:
            require(f"mkfs.{self.kind}")
            disk = Disk(os.path.join(self.scratch, "disk"), self.disk_bytes, self.stack)
            self.ground = host_file_system(disk, self.kind, os.path.join(self.scratch, "host"), self.stack)
        self.image = make_directory(self.ground, "image")
        fill(self.image)
        os.sync()


class Overlay(Directory):
    """overlayfs on the host's file system, as Docker's overlay2 mounts it."""

    name = "overlayfs on ext4"
    settings = "on the host's ext4, or whatever --dir is on; index=off,redirect_dir=off,metacopy=off as Docker's overlay2 has it"
    options = "index=off,redirect_dir=off,metacopy=off"

    def layers(self):
        """The lower directories, the topmost first."""
        return [self.image]

    def make(self):
        place = make_directory(self.ground, f"container-{self.count}")
        self.clone_stack.callback(shutil.rmtree, place, ignore_errors=True)
        upper, work, root = (make_directory(place, part) for part in ("upper", "work", "root"))
        self.mount(":".join(self.layers()), upper, work, root)
        return root

    def mount(self, lower, upper, work, root):
        """Mounts the union."""
        run("mount", "-t", "overlay", "overlay", "-o", f"noatime,lowerdir={lower},upperdir={upper},workdir={work},{self.options}", root,
            cwd=self.ground)
        self.clone_stack.callback(unmount, root)


class OverlayXfs(Overlay):
    """The same on XFS with reflink, where copying up shares extents."""

    name = "overlayfs on XFS with reflink"
    settings = "the same on mkfs.xfs -m reflink=1 on a loop disk (direct I/O) on the host"
    kind = "xfs"


class FuseOverlay(Overlay):
    """Rootless Podman's."""

    name = "fuse-overlayfs"
    settings = "fuse-overlayfs on the host's file system, default options"

    def mount(self, lower, upper, work, root):
        require("fuse-overlayfs")
        run("fuse-overlayfs", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", root)
        self.clone_stack.callback(unmount, root)


class BtrfsRoots(Directory):
    """A snapshot of a subvolume, as Docker's btrfs driver makes it: files straight on btrfs."""

    name = "btrfs snapshot"
    settings = "mkfs.btrfs defaults on a loop disk (direct I/O) on the host; the image is a subvolume, a container a snapshot of it"
    kind = "btrfs"

    def prepare(self, fill=None):
        def into_subvolume(directory):
            os.rmdir(directory)
            run("btrfs", "subvolume", "create", directory)
            fill(directory)

        super().prepare(into_subvolume)

    def make(self):
        root = os.path.join(self.ground, f"container-{self.count}")
        run("btrfs", "subvolume", "snapshot", self.image, root)
        self.clone_stack.callback(attempt, "btrfs", "subvolume", "delete", root)
        return root


class Plain(Directory):
    """What a bind mount or a Docker volume gives: no copy on write at all."""

    name = "plain directory"
    settings = "the files themselves on the host's file system; each round works on the same ones, or on a full copy"

    def make(self):
        root = os.path.join(self.ground, f"container-{self.count}")
        run("cp", "-a", "--sparse=never", self.image, root)
        run("sync", "-f", root)
        self.clone_stack.callback(shutil.rmtree, root, ignore_errors=True)
        return root


ALL = [PlywoodRoots, Overlay, OverlayXfs, FuseOverlay, XfsReflinkRoots, BtrfsRoots, Qcow2Roots, Plain]

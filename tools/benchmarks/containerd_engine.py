"""A containerd of the bench's own with plywood as a snapshotter beside its own one for overlayfs, and what its clients say to it.

Calls go over gRPC to containerd's socket, so that the start of a program is in no figure but those that say `ctr`. Messages are
encoded here; the field numbers are those of containerd's folder `api` (the snapshots' also stand in `src/containerd/api`).
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import tarfile
from dataclasses import dataclass

from .bench import GIB
from .life import LIBC, MS_NOATIME
from .plywood import Pool
from .results import OURS
from .shell import NotRun, attempt, end_process, make_directory, require, run, unmount, wait_until

THEIRS = "overlayfs snapshotter"
MS_RDONLY = 1
MOUNT_FLAGS = {"ro": MS_RDONLY, "noatime": MS_NOATIME}
# Without it a snapshot that no container uses is garbage.
GC_ROOT = {"containerd.io/gc.root": "bench"}
CONFIGURATION = """version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "{folder}/sock"
[proxy_plugins.plywood]
  type = "snapshot"
  address = "{snapshotter}"
"""


def varint(value):
    """A number as protobuf has it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encoded(fields):
    """A message from field numbers and values: a number, text, a message's bytes, or a map of texts."""
    out = b""
    for number, value in fields.items():
        if isinstance(value, dict):
            out += b"".join(encoded({number: encoded({1: key, 2: text})}) for key, text in value.items())
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(content)) + content
    return out


def decoded(message):
    """The values of each field number, in order: numbers, and bytes of all else. No message that is read here has fixed ones."""
    at, fields = 0, {}

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        value = number()
        if key & 7 == 2:
            at += value
            value = message[at - value:at]
        elif key & 7:
            raise NotRun(f"a message with wire type {key & 7}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


class Calls:
    """A connection to a socket that speaks gRPC. Any number of threads may call."""

    def __init__(self, path, stack):
        try:
            import grpc  # pylint: disable=import-outside-toplevel
        except ImportError as error:
            raise NotRun("this Python has no grpc; Debian's /usr/bin/python3 has, with python3-grpcio") from error
        self.failure = grpc.RpcError
        self.channel = grpc.insecure_channel(f"unix:{path}")
        stack.callback(self.channel.close)

    def call(self, method, fields):
        """Calls `service.version.Service/Method` with field numbers and values. Answers the decoded message."""
        try:
            function = self.channel.unary_unary(f"/containerd.services.{method}")
            return decoded(function(encoded(fields), metadata=(("containerd-namespace", "default"),), timeout=300))
        except self.failure as error:
            raise NotRun(f"{method.rpartition('.')[2]}: {error.details()}") from error


@dataclass
class Mount:
    """What a snapshotter has mounted."""

    kind: str
    source: str
    options: list

    @classmethod
    def only(cls, answer):
        """The one mount of an answer."""
        (message,) = answer[1]
        fields = decoded(message)
        return cls(fields[1][0].decode(), fields[2][0].decode(), [option.decode() for option in fields.get(4, [])])

    def mount(self, directory):
        """mount(2)."""
        flags = sum(MOUNT_FLAGS.get(option, 0) for option in self.options)
        data = ",".join(option for option in self.options if option not in MOUNT_FLAGS)
        if LIBC.mount(self.source.encode(), directory.encode(), self.kind.encode(), flags, data.encode()):
            raise OSError(f"mounting {self.source} on {directory}")


class Side:
    """One snapshotter, as containerd's clients see it."""

    def __init__(self, containerd, label, name):
        self.containerd, self.label, self.name = containerd, label, name
        # Snapshots that stay: layers, and our empty file system.
        self.rest = 1 if label == OURS else 0
        # Of one Prepare alone, in this round.
        self.alone_ms = None

    def prepare(self, key, parent):
        """A child of a committed snapshot; answers what is to be mounted."""
        return Mount.only(self.containerd.calls.call("snapshots.v1.Snapshots/Prepare", {1: self.name, 2: key, 3: parent, 4: GC_ROOT}))

    def commit(self, key, name):
        """Makes a layer of an active snapshot."""
        self.containerd.calls.call("snapshots.v1.Snapshots/Commit", {1: self.name, 2: name, 3: key, 4: GC_ROOT})

    def remove(self, key):
        """It is gone for containerd's clients. The snapshotter hears of it when containerd collects garbage."""
        self.containerd.calls.call("snapshots.v1.Snapshots/Remove", {1: self.name, 2: key})

    def left(self):
        """How many snapshots the snapshotter itself has beside those that stay, whatever containerd knows of."""
        if self.label == OURS:
            there = [volume["name"] for volume in self.containerd.pool.call("volume-list")["value"]]
            return sum(name.startswith("containerd-") for name in there) - self.rest
        folder = os.path.join(self.containerd.folder, "root/io.containerd.snapshotter.v1.overlayfs/snapshots")
        return len(os.listdir(folder)) - self.rest

    def await_none(self):
        """Waits until the snapshotter is through with what was removed."""
        wait_until(lambda: self.left() <= 0, f"{self.name} has none left", 30, 0.002)

    def settle(self):
        """Has containerd collect garbage, and the snapshotter take it away."""
        self.containerd.collect()
        self.await_none()


def digest_of(path):
    """A file's name in an image."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class Image:
    """An image of one layer, in an archive as `skopeo copy` makes it. The layer is not compressed: undoing that is the same for all."""

    def __init__(self, folder, name, layer):
        self.folder, self.path = folder, os.path.join(folder, f"{name}.tar")
        self.base_name = f"bench.invalid/{name}"
        self.name = f"{self.base_name}:test"
        # That of a single layer is the layer's own digest.
        self.chain_id = digest_of(layer)
        self.blobs = {self.chain_id: layer}
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        config = self.document("config", "config", {"architecture": machine, "os": "linux", "config": {"Env": ["PATH=/bin:/usr/bin"]},
                                                    "rootfs": {"type": "layers", "diff_ids": [self.chain_id]}})
        layers = [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": self.chain_id, "size": os.path.getsize(layer)}]
        manifest = self.document("manifest", "manifest", {"schemaVersion": 2, "config": config, "layers": layers})
        self.digest = manifest["digest"]
        manifest["annotations"] = {"org.opencontainers.image.ref.name": "test"}
        self.document("index", "index", {"schemaVersion": 2, "manifests": [manifest]})
        self.document("oci-layout", "layout", {"imageLayoutVersion": "1.0.0"})
        with tarfile.open(self.path, "w") as tar:
            for digest, path in self.blobs.items():
                tar.add(path, "blobs/" + digest.replace(":", "/"))
            tar.add(os.path.join(folder, "oci-layout"), "oci-layout")
            tar.add(os.path.join(folder, "index"), "index.json")

    def document(self, name, kind, value):
        """Writes a part of the image; answers its descriptor."""
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file)
        digest = digest_of(path)
        self.blobs[digest] = path
        return {"mediaType": f"application/vnd.oci.image.{kind}.v1+json", "digest": digest, "size": os.path.getsize(path)}


def small_layer(folder):
    """A layer with busybox, and what a container wants."""
    root = make_directory(folder, "small-root")
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc", "root"):
        make_directory(root, name)
    shutil.copy(shutil.which("busybox"), os.path.join(root, "bin/busybox"))
    for name in ("sh", "echo", "sleep"):
        os.symlink("busybox", os.path.join(root, "bin", name))
    path = os.path.join(folder, "small-layer.tar")
    run("tar", "-C", root, "--numeric-owner", "-cf", path, ".")
    return path


class Containerd:
    """A containerd with all of its files in the scratch directory, and plywood on a pool beside them; both sides of each row."""

    def __init__(self, bench, stack):
        require("containerd", "ctr", "runc", "busybox")
        number = bench.number()
        # The sockets' paths have to be short.
        self.folder = make_directory(bench.scratch, f"containerd-{number}")
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.pool = Pool(bench.program, os.path.join(bench.scratch, f"pool-{number}"), 64 * GIB, stack)
        self.address, self.own = os.path.join(self.folder, "sock"), os.path.join(self.folder, "plywood.sock")
        stack.callback(self.unmount_all)
        self.start(stack, self.own, bench.program, "--pool", self.pool.path, "containerd", "--socket", self.own)
        configuration = os.path.join(self.folder, "config.toml")
        with open(configuration, "w", encoding="utf-8") as file:
            file.write(CONFIGURATION.format(folder=self.folder, snapshotter=self.own))
        self.start(stack, self.address, "containerd", "--config", configuration)
        stack.callback(self.end_tasks)
        self.calls = Calls(self.address, stack)
        self.sides = [Side(self, OURS, "plywood"), Side(self, THEIRS, "overlayfs")]
        version = run("containerd", "--version").split()[2]
        bench.settings[THEIRS] = f"containerd {version}, its root on the host's file system like the pool's file, all defaults"

    def start(self, stack, path, *words):
        """Starts a program, whose log is in the folder, and waits until it listens."""
        with open(os.path.join(self.folder, f"{os.path.basename(words[0])}.log"), "wb") as log:
            # A session of its own: Ctrl-C is for us, who end it in our order.
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        stack.callback(end_process, process)

        def listens():
            if process.poll() is not None:
                with open(log.name, encoding="utf-8", errors="replace") as file:
                    raise NotRun(f"{os.path.basename(words[0])} ended: {(file.read().strip() or '?').splitlines()[-1]}")
            with socket.socket(socket.AF_UNIX) as tried:
                return tried.connect_ex(path) == 0

        wait_until(listens, f"{os.path.basename(words[0])} listens", 60)

    def ctr(self, *words):
        """containerd's command."""
        return run("ctr", "--address", self.address, *words)

    def end_tasks(self):
        """Containers outlive containerd; those that a case has left, since it failed, must not."""
        try:
            for name in self.ctr("task", "ls", "-q").split():
                attempt("ctr", "--address", self.address, "task", "rm", "-f", name)
        except NotRun as error:
            print(f"bench: undoing: {error}", flush=True)

    def unmount_all(self):
        """What is still mounted below the folder."""
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            points = [line.split()[4] for line in file]
        for point in reversed(points):
            if point.startswith(f"{self.folder}/"):
                unmount(point)

    def collect(self):
        """Has containerd collect garbage, and waits for it: a lease is deleted, and all that this makes garbage with it."""
        self.calls.call("leases.v1.Leases/Create", {1: "collect"})
        self.calls.call("leases.v1.Leases/Delete", {1: "collect", 2: 1})

    def small_image(self):
        """An image with busybox, unpacked for both sides."""
        image = Image(make_directory(self.folder, "small"), "small", small_layer(self.folder))
        for side in self.sides:
            self.ctr("image", "import", "--snapshotter", side.name, "--base-name", image.base_name, image.path)
            side.rest += 1
            side.await_none()
        return image

    def busy_lines(self):
        """How many lines of containerd's log complain of something that is busy."""
        with open(os.path.join(self.folder, "containerd.log"), encoding="utf-8", errors="replace") as file:
            return sum("resource busy" in line for line in file)

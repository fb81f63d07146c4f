"""A pool of ours, by its commands and by its control socket."""

import json
import os
import re
import shutil
import socket
import time
import uuid

from .devices import remove_file
from .shell import NotRun, attempt, make_directory, run, unmount


class Pool:
    """A pool in a file or on a device, and its daemon, which the first attach starts."""

    def __init__(self, program, path, size_bytes, stack, name=None):
        self.program, self.path = program, path
        self.name = name or f"bench-{uuid.uuid4().hex[:8]}"
        self.connection = None
        # Devices of daemons that were killed, which the next one takes away; unless there is none.
        self.orphans = []
        on_device = path.startswith("/dev/")
        if not on_device:
            stack.callback(remove_file, path)
        words = ["pool", "create", path, "--name", self.name]
        if not on_device:
            words += ["--size", str(size_bytes)]
        # What an earlier peer left on the device is ours to overwrite.
        run(program, *words, *(["--force"] if on_device else []))
        stack.callback(self.stop)

    def command(self, *words):
        """Runs a plywood command on this pool."""
        return run(self.program, "--pool", self.path, *words)

    def json(self, *words):
        """The same, for what prints JSON."""
        return json.loads(self.command(*words, "--json"))

    def volume(self, name, size_bytes):
        """A new volume."""
        self.command("volume", "create", name, "--size", size_bytes)
        return name

    def attach(self, name):
        """A volume's device."""
        return self.command("attach", name)

    def detach(self, name):
        """The opposite."""
        self.command("detach", name)

    def snapshot(self, of, name):
        """A snapshot of a volume."""
        self.command("snapshot", "create", of, name)
        return name

    def clone(self, snapshot, name):
        """A clone of a snapshot."""
        self.command("clone", "create", snapshot, name)
        return name

    def delete(self, name):
        """Deletes a volume or snapshot."""
        self.command("volume", "delete", name, "--yes")

    def info(self):
        """`pool info`."""
        answer = self.json("pool", "info")
        return answer.get("pool", answer)

    def counters(self):
        """What the engine has counted since it was started."""
        answer = self.json("metrics")
        return answer.get("metrics", answer)["counters"]

    def call(self, command, **fields):
        """A command on the control socket, without a process of its own: what a program that embeds plywood pays."""
        if self.connection is None:
            self.connection = Connection(self.info()["uuid"])
        return self.connection.call(command, **fields)

    def hang_up(self):
        """Ends the connection to the control socket."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def stop(self):
        """Ends the daemon, if there is one. What is still attached is detached."""
        self.hang_up()
        try:
            if os.path.exists(self.path) and self.info().get("front_pid") is not None:
                run(self.program, "--pool", self.path, "stop", timeout_seconds=300)
        except NotRun as error:
            print(f"bench: stopping {self.path}: {error}; forcing it", flush=True)
            attempt(self.program, "--pool", self.path, "stop", "--force")
        while self.orphans:
            detach_orphan(self.orphans.pop())

    def settle(self, seconds=60):
        """Waits until the background has nothing left to do: deletions eaten, the journal short."""
        former, deadline = None, time.monotonic() + seconds
        while time.monotonic() < deadline:
            info = self.info()
            state = (info["used_bytes"], info["host_bytes"], info["freeing"], info["generation"])
            if not info["freeing"] and state == former:
                return info
            former = state
            time.sleep(1.2)
        return self.info()


    def at_rest(self):
        """`pool info` of the closed pool: what it says of space while it is in use is as of the last checkpoint."""
        self.settle()
        self.stop()
        return self.info()


class Connection:
    """The control socket: a JSON object a line."""

    def __init__(self, pool_uuid):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(f"/run/plywood/{pool_uuid}.sock")
        self.lines = self.socket.makefile("r", encoding="utf-8")

    def call(self, command, **fields):
        """Answers the reply, or NotRun with what was refused."""
        request = {"version": 1, "command": {"command": command, **fields}}
        self.socket.sendall((json.dumps(request) + "\n").encode())
        outcome = json.loads(self.lines.readline())["outcome"]
        if "failed" in outcome:
            raise NotRun(f"{command}: {outcome['failed'].get('message', outcome['failed'])}")
        return outcome["done"]

    def close(self):
        """Hangs up."""
        self.lines.close()
        self.socket.close()


def detach_orphan(device):
    """Detaches a device whose front is dead. Its file is in no directory any more, so its path is the bare number of a volume."""
    try:
        with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file", encoding="utf-8") as file:
            is_orphan = re.fullmatch(r"/\d+", file.read().strip())
    except FileNotFoundError:
        return
    if is_orphan:
        attempt("losetup", "-d", device)


def new_uuid():
    """Whoever creates something names it."""
    return str(uuid.uuid4())


def mounted(pool, name, directory, stack):
    """`plywood mount`, undone when the stack is unwound."""
    make_directory(directory)
    pool.command("mount", name, directory)
    stack.callback(unmounted, pool, directory)
    return directory


def unmounted(pool, directory):
    """`plywood unmount`; by umount(8) where that is refused."""
    if not os.path.ismount(directory):
        return
    try:
        pool.command("unmount", directory)
    except NotRun as error:
        print(f"bench: {error}", flush=True)
        unmount(directory)


def program(root, given=None):
    """The binary to measure: the one given, or this tree's, built."""
    if given:
        return os.path.abspath(given)
    if not shutil.which("cargo"):
        raise SystemExit("bench: no cargo, and no --program")
    run("cargo", "build", "--locked", "--release", "--quiet", cwd=root, timeout_seconds=3600)
    return os.path.join(root, "target/release/plywood")
